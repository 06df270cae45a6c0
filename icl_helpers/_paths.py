"""Where the files that travel with the package lie, in a checkout and in an installed wheel; and
where the user's cache is.
"""

from __future__ import annotations

import os
from pathlib import Path

from icl_helpers.errors import InputError, MissingArtefactError

__all__ = [
    "book_dir",
    "cache_dir",
    "embedded_dir",
    "notebooks_dir",
    "project_root",
    "synthetic_dir",
    "tasks_dir",
    "user_path",
]

_PACKAGE = Path(__file__).resolve().parent
_LONGEST_NAME = 255


def user_path(given: str | os.PathLike[str]) -> Path:
    """A path that a user gave, with ``~`` for the home directory.

    Raises :class:`InputError` for what no file system takes, before one is asked.
    """
    text = os.fspath(given)
    too_long = any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(text).parts)
    if too_long or not text.strip() or "\0" in text:
        shown = text if len(text) <= 60 else text[:60] + "..."
        raise InputError(
            f"{shown!r} can be no path: it is empty, or holds a NUL or a name of more than "
            f"{_LONGEST_NAME} bytes"
        )
    # Unlike pathlib's, this one leaves the name of an unknown user as it is.
    return Path(os.path.expanduser(text))


def cache_dir() -> Path:
    """The user's cache: ``$ICL_CACHE_DIR`` or ``~/.cache/icl_helpers``."""
    root = os.environ.get("ICL_CACHE_DIR")
    return Path(root) if root else Path.home() / ".cache" / "icl_helpers"


def project_root() -> Path:
    """Folder that holds ``tasks/``, ``synthetic/``, ``notebooks/`` and ``book/``.

    A wheel carries them under ``icl_helpers/_bundle``; in a checkout they lie beside the package.
    """
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


def tasks_dir() -> Path:
    """Folder of the lm-eval task files (pass it to lm-eval as ``--include_path``)."""
    return _folder("tasks")


def synthetic_dir() -> Path:
    """Folder of the word lists and the generated data sets."""
    return _folder("synthetic")


def notebooks_dir() -> Path:
    """Folder of the stage notebooks."""
    return _folder("notebooks")


def book_dir() -> Path:
    """Folder of the hand-written pages of the book."""
    return _folder("book")


def embedded_dir() -> Path:
    """Folder of the embedded models, one sub-folder each."""
    return _PACKAGE / "embedded"
