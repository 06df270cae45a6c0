"""Typed errors: each one says what was wrong, what is allowed and how to fix it."""

from __future__ import annotations

__all__ = [
    "ICLError", "InputError", "InterventionError", "MissingArtefactError", "NotMeasuredError",
    "UnsupportedArchitectureError",
]  # fmt: skip


class ICLError(Exception):
    """Base class of every error this package raises on purpose."""


class InputError(ICLError, ValueError):
    """A value given by the user cannot be used; raised before a model is loaded if possible."""


class MissingArtefactError(ICLError, FileNotFoundError):
    """A model, data set or file is not on this machine and could not be fetched."""


class NotMeasuredError(ICLError):
    """A measurement is not in an imported run's bundle, or the run has no task to make it on."""


class UnsupportedArchitectureError(ICLError):
    """The model's attention does not go through transformers' attention interface."""


class InterventionError(ICLError, RuntimeError):
    """An intervention does not fit the model or the batch it was applied to."""
