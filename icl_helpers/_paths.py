"""Where the files that travel with the package lie, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from icl_helpers.errors import MissingArtefactError

__all__ = [
    "book_dir",
    "embedded_dir",
    "notebooks_dir",
    "project_root",
    "synthetic_dir",
    "tasks_dir",
]

_PACKAGE = Path(__file__).resolve().parent


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
