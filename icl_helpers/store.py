"""Result files that are whole or absent: atomic writes, checked reads, one file per finished cell.

A cell is one task x labels x shots x demonstration seed x condition. Its file's name and content
carry a key: a hash of everything that decides the number. Files are written under a temporary name,
flushed and renamed, which needs no locks and is safe with several writers on one directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from icl_helpers._paths import user_path
from icl_helpers.errors import ICLError, InputError

__all__ = [
    "CellStore",
    "StorageError",
    "atomic_path",
    "check_run_dir",
    "content_key",
    "set_aside",
    "write_json",
]

# Part of a cell's name: a file of another format is never in the way, and never read.
_FORMAT = 2
# Less than file systems allow: archives and copies add to a directory's name.
_LONGEST_PART = 200


class StorageError(ICLError, OSError):
    """A result could not be written; what was there before is intact."""


def content_key(content: Any) -> str:
    """Hash of a JSON-serialisable value, 24 hex digits."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def check_run_dir(run_dir: str | os.PathLike[str]) -> Path:
    """Validate a run directory; raises :class:`InputError` for one that cannot be one."""
    text = os.fspath(run_dir) if isinstance(run_dir, (str, os.PathLike)) else run_dir
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise InputError(
            f"run_dir must be a directory path such as 'runs/icl-tiny', got {run_dir!r}"
        )
    if any(len(os.fsencode(part)) > _LONGEST_PART for part in Path(text).parts):
        raise InputError(
            f"run_dir has a part longer than {_LONGEST_PART} bytes; choose a shorter name"
        )
    path = user_path(text)
    if path.exists() and not path.is_dir():
        raise InputError(f"run_dir {path} is a file; give a directory")
    return path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it there when the block succeeds.

    Raises :class:`StorageError` naming the path when the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}. Free space or choose another run "
            f"directory, then run again; finished results are kept"
        ) from error
    finally:
        # What cannot be removed was never there: its own error would hide the first one.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused rather than written as invalid JSON."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def set_aside(path: Path, why: str) -> Path:
    """Rename a damaged file to ``<name>.damaged-N`` and say so; it is never deleted."""
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    try:
        os.replace(path, target)
    except FileNotFoundError:
        return target
    warnings.warn(f"{path} {why}; set aside as {target.name} and computed again", stacklevel=2)
    return target


class CellStore:
    """Finished cells below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, spec: dict[str, Any]) -> Path:
        """File of the cell that ``spec`` describes."""
        return self.directory / f"{self.stem(spec)}_{content_key([_FORMAT, spec])}.json"

    def stem(self, spec: dict[str, Any]) -> str:
        """Start of the file's name, without the key; cells of other models share it."""
        parts = [spec["task"], spec["labels"], f"{spec['shots']}shot", spec["condition"]]
        parts += [spec["ablation"], f"{spec['fraction']:.4g}", f"a{spec['ablation_seed']}"]
        return re.sub(r"[^A-Za-z0-9._-]", "-", "_".join(map(str, parts)))[:120]

    def stems(self) -> set[str]:
        """Starts of the names of all files."""
        return {path.name.rpartition("_")[0] for path in self.directory.glob("*.json")}

    def read(self, spec: dict[str, Any]) -> dict[str, Any] | None:
        """The cell's documents, or None when it is not there or damaged (then set aside)."""
        path = self.path(spec)
        cell = _read_checked(path, lambda content: content["spec"] == spec)
        return None if cell is None else cell["documents"]

    def write(self, spec: dict[str, Any], documents: dict[str, Any]) -> None:
        """Write a finished cell."""
        body = {"format": _FORMAT, "spec": spec, "documents": documents}
        write_json(self.path(spec), {**body, "checksum": content_key(body)})

    def cells(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Every valid cell of this format in the directory: its spec and its documents."""
        for path in sorted(self.directory.glob("*.json")):
            cell = _read_checked(path, lambda content: True)
            if cell is not None:
                yield cell["spec"], cell["documents"]


def _read_checked(path: Path, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
        if checksum != content_key(content):
            raise ValueError("checksum differs")
        if content["format"] != _FORMAT:
            return None
        if not fits(content):
            raise ValueError("another cell's file")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        set_aside(path, f"is damaged ({type(error).__name__})")
        return None
    return content
