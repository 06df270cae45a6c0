"""What tells a model from any other, found without loading it where its files have not changed.

A run remembers the key of the model it loaded, beside the state of the checkpoint's files. While
that state stays the same, finished results are found, and workers given their jobs, without the
model in memory.
"""

from __future__ import annotations

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

import icl_helpers
from icl_helpers.files import content_key

__all__ = ["checkpoint_state", "model_facts", "model_key", "weights_fingerprint"]


_PACKAGES = ("torch", "transformers", "tokenizers", "lm_eval", "numpy", "pandas", "safetensors")


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What ``run.json`` tells of a loaded model and of the software around it."""
    return {
        "model_type": model.config.model_type,
        "versions": {**_versions(), "icl_helpers": icl_helpers.__version__},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": str(model.device.type),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def checkpoint_state(
    source: str,
    *,
    revision: str | None,
    dtype: str,
    device: str | None,
    quantization: str | None,
    trust_remote_code: bool,
) -> str | None:
    """Hash of the checkpoint's files, as the file system tells them apart, and how they are read.

    ``source`` is the directory or hub id behind the model's name. None where the files do not
    decide everything: remote code, an adapter of another model.
    """
    directory = _directory(source, revision)
    if directory is None or trust_remote_code or (directory / "adapter_config.json").exists():
        return None
    files = []
    for path in sorted(directory.iterdir()):
        if path.is_file():
            # The change time moves with every write and cannot be set, unlike the others.
            found = path.stat()
            files.append([path.name, found.st_size, found.st_ino, found.st_ctime_ns])
    read = [revision, dtype, device, quantization]
    versions = [version("torch"), version("transformers"), icl_helpers.__version__]
    return content_key([str(directory.resolve()), files, read, versions])


def _directory(source: str, revision: str | None) -> Path | None:
    """The folder of the checkpoint's files; None where they are not on this machine."""
    if os.path.isdir(source):
        return Path(source)
    try:
        # Asks the hub, where it can be reached, so that a moved branch is another folder.
        config = cached_file(source, "config.json", revision=revision)
    except (OSError, ValueError):
        return None
    return None if config is None else Path(config).parent


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def model_key(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, revision: str | None
) -> dict[str, Any]:
    """Everything about a model that decides a result, as JSON values."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return {
        "fingerprint": weights_fingerprint(model),
        "revision": revision,
        "dtype": str(model.dtype),
        "tokenizer": hashlib.sha256(text.encode()).hexdigest()[:16],
        "version": icl_helpers.__version__,
    }


# Elements hashed at a time: bounds the extra memory of the fingerprint to about 0.3 GB.
_CHUNK = 1 << 24
# Of quantised models, taken before their first use: on a CPU bitsandbytes repacks 4-bit weights
# then, and reading the state back would round their scales a second time.
_FINGERPRINTS: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


@torch.no_grad()
def weights_fingerprint(model: PreTrainedModel) -> str:
    """Hash of every weight, 16 hex digits; changes with any weight's value, shape or dtype.

    Sums the raw bits twice, plainly and weighted by position, in wrapping 64-bit integers on the
    weights' own device, so that it is fast and the same on every machine.
    """
    if model in _FINGERPRINTS:
        return _FINGERPRINTS[model]
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type == "meta":
            continue
        bits = tensor.detach().contiguous().flatten()
        bits = bits.view(
            {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.itemsize]
        )
        for start in range(0, len(bits), _CHUNK):
            part = bits[start : start + _CHUNK].long()
            weight = torch.arange(start, start + len(part), device=part.device) * 2654435761 + 1
            digest.update(f"{int(part.sum())} {int((part * weight).sum())}".encode())
    return digest.hexdigest()[:16]
