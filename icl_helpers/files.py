"""Files: where those that travel with the package lie, and results that are whole or absent.

Results are written under a temporary name, flushed and renamed, which needs no locks and is safe
with several writers on one directory; a tensor's file holds the key of what it was computed from
and a checksum.
"""

from __future__ import annotations

import codecs
import fcntl
import functools
import hashlib
import json
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from icl_helpers.errors import ICLError, InputError, MissingArtefactError

__all__ = [
    "SMOLLM2", "SMOLLM2_SHA256", "StorageError", "assets_dir", "atomic_directory", "atomic_path",
    "book_dir", "cache_dir", "cached_json", "cached_tensor", "check_run_dir", "content_key",
    "embedded_dir", "embedded_models", "file_name", "file_state", "files_digest", "imported_dir",
    "locked", "notebooks_dir", "project_root", "quarantine", "read_text", "smollm2_dir",
    "stage_notebooks", "synthetic_dir", "tasks_dir", "user_path", "write_json",
]  # fmt: skip

_PACKAGE = Path(__file__).resolve().parent
_LONGEST_NAME = 255

# The model that is read from an installed package's GGUF file (icl_helpers.models.gguf).
SMOLLM2 = "smollm2-135m"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of its name in the cache: raised whenever the same file would be converted to something else.
_CONVERTER = 1


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path that a user gave, ``~`` for home; :class:`InputError` for what can be none."""
    text = os.fspath(path)
    too_long = any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(text).parts)
    if too_long or not text.strip() or "\0" in text:
        shown = text if len(text) <= 60 else text[:60] + "..."
        raise InputError(
            f"{shown!r} can be no path: it is empty, or holds a NUL or a name of more than "
            f"{_LONGEST_NAME} bytes"
        )
    # Unlike pathlib's, this one leaves the name of an unknown user as it is.
    return Path(os.path.expanduser(text))


def read_text(path: Path) -> str:
    """A user's UTF-8, with a mark or without, or UTF-16; :class:`InputError` for any other."""
    content = path.read_bytes()
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
        # A NUL is a part of a letter of 2 or 4 bytes, read as one of 1.
        wrong = text.find("\0")
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong >= 0:
        raise InputError(
            f"{path} is not UTF-8 text (byte {wrong}): save it as UTF-8, or convert it, for "
            f"example with: iconv -f latin1 -t utf-8"
        )
    return text


def file_state(path: Path) -> tuple[str, int, int, int]:
    """What changes whenever a file is written: the change time, unlike others, cannot be set."""
    stat = path.stat()
    return path.name, stat.st_size, stat.st_ino, stat.st_ctime_ns


def files_digest(*paths: Path) -> str:
    """SHA-256 of what these files hold; they are read again only where one has changed."""
    return _files_digest(paths, tuple(map(file_state, paths)))


@functools.lru_cache(maxsize=64)
def _files_digest(paths: tuple[Path, ...], states: tuple[Any, ...]) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def file_name(path: str | None) -> str | None:
    """The last part of a path: what may be published of it, and the same on every machine."""
    return path and Path(path).name


def imported_dir(run_dir: str | os.PathLike[str]) -> Path | None:
    """Folder of what an imported run has of its bundle; None for any other run."""
    path = check_run_dir(run_dir) / "bundle"
    return path if path.is_dir() else None


def project_root() -> Path:
    """Folder of ``tasks/``, ``synthetic/``, ``notebooks/`` and ``book/``, of wheel or checkout."""
    bundle = _PACKAGE / "_bundle"
    return bundle if bundle.is_dir() else _PACKAGE.parent


def _folder(name: str) -> Path:
    path = project_root() / name
    if not path.is_dir():
        raise MissingArtefactError(
            f"{path} is missing: the installation is incomplete. Reinstall icl-helpers, or run "
            f"from a complete checkout."
        )
    return path


# Folders of the lm-eval task files (pass it to lm-eval as ``--include_path``), of word lists and of
# generated data sets, of the stage notebooks, and of the hand-written pages of the book.
tasks_dir = functools.partial(_folder, "tasks")
synthetic_dir = functools.partial(_folder, "synthetic")
notebooks_dir = functools.partial(_folder, "notebooks")
book_dir = functools.partial(_folder, "book")


def stage_notebooks() -> list[Path]:
    """The stage notebooks, in order."""
    return sorted(notebooks_dir().glob("[0-9]*.ipynb"))


def cache_dir() -> Path:
    """The user's cache: ``$ICL_CACHE_DIR`` or ``~/.cache/icl_helpers``."""
    root = os.environ.get("ICL_CACHE_DIR")
    return Path(root) if root else Path.home() / ".cache" / "icl_helpers"


def assets_dir() -> Path:
    """Folder of the viewer's style and script, and of the templates of the book's pages."""
    return _PACKAGE / "assets"


def embedded_dir() -> Path:
    """Folder of the embedded models, one sub-folder each."""
    return _PACKAGE / "embedded"


# Seconds after which whoever left a temporary directory behind was surely killed.
_ABANDONED = 3600.0
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
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes that ask for the same directory waiting until the block ends."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        # Not every file system of a cluster has locks.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path to write, renamed to this one when the block succeeds; else :class:`StorageError`."""
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


@contextmanager
def atomic_directory(
    target: Path, *, way_out: str = "Free space or choose another directory, then try again"
) -> Iterator[Path]:
    """Yield an empty directory beside ``target``; it takes that name when the block succeeds.

    Raises :class:`StorageError` naming the target when the disk is full or not writable.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        # A process cannot clean up after its own kill.
        for path in target.parent.glob(f".{target.name}.*.tmp"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(path, ignore_errors=True)
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        try:
            temporary.rename(target)
        except OSError:
            # Another process was first, and made the same.
            if not target.is_dir():
                raise
    except (OSError, SafetensorError) as error:
        if isinstance(error, ICLError):
            raise
        why = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write {target}: {why}. {way_out}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused rather than written as invalid JSON."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def quarantine(path: Path, why: str) -> None:
    """Rename a damaged file to ``<name>.damaged-N`` and say so; it is never deleted."""
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    try:
        os.replace(path, target)
    except FileNotFoundError:
        return
    warnings.warn(f"{path} {why}; set aside as {target.name} and computed again", stacklevel=2)


def cached_tensor(path: Path, key: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The tensor in ``path`` if written under this key, else computed and written there."""
    try:
        with safe_open(path, framework="pt") as file:
            written, _, checksum = (file.metadata() or {}).get("key", "").partition(" ")
            if written == key and checksum:
                stored: torch.Tensor = file.get_tensor(path.stem)
                if _checksum(stored) == checksum:
                    return stored
                raise ValueError("checksum differs")
    except FileNotFoundError:
        pass
    except (SafetensorError, OSError, ValueError) as error:
        quarantine(path, f"is damaged ({error})")
    tensor = compute().contiguous()
    # One entry: several would be written in any order, and equal files would differ.
    metadata = {"key": f"{key} {_checksum(tensor)}"}
    with atomic_path(path) as temporary:
        save_file({path.stem: tensor}, temporary, metadata=metadata)
    return tensor


def cached_json(path: Path, key: str, compute: Callable[[], Any]) -> Any:
    """The JSON value in ``path``, as :func:`cached_tensor` has a tensor."""
    try:
        stored = json.loads(path.read_bytes())
        if stored["checksum"] != content_key([stored["key"], stored["value"]]):
            raise ValueError("checksum differs")
        if stored["key"] == key:
            return stored["value"]
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        quarantine(path, f"is damaged ({error})")
    value = compute()
    write_json(path, {"key": key, "value": value, "checksum": content_key([key, value])})
    return value


def _checksum(tensor: torch.Tensor) -> str:
    raw = tensor.contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()


def embedded_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in embedded_dir().glob("*/config.json"))


def smollm2_dir() -> Path:
    """Where the converted checkpoint is kept, whether it is there yet or not."""
    return cache_dir() / f"{SMOLLM2}-{SMOLLM2_SHA256[:12]}-{_CONVERTER}"
