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

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

import icl_helpers
from icl_helpers.files import content_key
from icl_helpers.models.loading import weights_fingerprint

__all__ = ["checkpoint_state", "model_facts", "model_key"]


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
    path = _source(source, revision)
    if path is None or trust_remote_code or (path / "adapter_config.json").exists():
        return None
    files = []
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        if file.is_file():
            # The change time moves with every write and cannot be set, unlike the others.
            found = file.stat()
            files.append([file.name, found.st_size, found.st_ino, found.st_ctime_ns])
    read = [revision, dtype, device, quantization]
    versions = [version("torch"), version("transformers"), icl_helpers.__version__]
    return content_key([str(path.resolve()), files, read, versions])


def _source(source: str, revision: str | None) -> Path | None:
    """The folder of the checkpoint's files, or its GGUF file; None where not on this machine."""
    if os.path.exists(source):
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
