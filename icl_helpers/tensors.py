"""A tensor in a file of its own, with the key of what it was computed from and a checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from icl_helpers.store import atomic_path, set_aside

__all__ = ["kept_tensor"]


def kept_tensor(path: Path, key: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The tensor in ``path`` if it was written under this key, else a computed one, written there.

    A damaged file is set aside by name. Raises :class:`StorageError` when it cannot be written.
    """
    stored = _read(path, key)
    if stored is None:
        stored = compute().contiguous()
        # One entry: several would be written in any order, and equal files would differ.
        metadata = {"key": f"{key} {_checksum(stored)}"}
        with atomic_path(path) as temporary:
            save_file({path.stem: stored}, temporary, metadata=metadata)
    return stored


def _read(path: Path, key: str) -> torch.Tensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            written, _, checksum = (file.metadata() or {}).get("key", "").partition(" ")
            if written != key or not checksum:
                return None
            tensor: torch.Tensor = file.get_tensor(path.stem)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError) as error:
        set_aside(path, f"is damaged ({error})")
        return None
    if _checksum(tensor) != checksum:
        set_aside(path, "is damaged (checksum differs)")
        return None
    return tensor


def _checksum(tensor: torch.Tensor) -> str:
    raw = tensor.contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()
