"""What tells a model from any other, found without loading it where its files have not changed.

A run remembers the key of the model it loaded, beside the state of the checkpoint's files. While
that state stays the same, finished results are found, and workers given their jobs, without the
model in memory.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

import icl_helpers
from icl_helpers.cells import model_key
from icl_helpers.models import context_length, resolve_model
from icl_helpers.parameters import StageParameters
from icl_helpers.store import content_key

__all__ = ["checkpoint_state", "describe_model", "model_facts"]

_PACKAGES = ("torch", "transformers", "tokenizers", "lm_eval", "numpy", "pandas", "safetensors")


def describe_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parameters: StageParameters
) -> dict[str, Any]:
    """The model's key, its context in tokens, and the state of its files, as JSON values."""
    return {
        "key": model_key(model, tokenizer, parameters.revision),
        "context": context_length(model),
        "state": checkpoint_state(parameters),
    }


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


def checkpoint_state(parameters: StageParameters) -> str | None:
    """Hash of the checkpoint's files, as the file system tells them apart, and how they are read.

    None where the files do not decide everything: remote code, an adapter of another model.
    """
    p = parameters
    source = _source(p)
    if source is None or p.trust_remote_code or (source / "adapter_config.json").exists():
        return None
    files = []
    for path in [source] if source.is_file() else sorted(source.iterdir()):
        if path.is_file():
            # The change time moves with every write and cannot be set, unlike the others.
            found = path.stat()
            files.append([path.name, found.st_size, found.st_ino, found.st_ctime_ns])
    read = [p.revision, p.dtype, p.device, p.quantization]
    versions = [version("torch"), version("transformers"), icl_helpers.__version__]
    return content_key([str(source.resolve()), files, read, versions])


def _source(parameters: StageParameters) -> Path | None:
    """The folder of the checkpoint's files, or its GGUF file; None where not on this machine."""
    source = resolve_model(parameters.model)
    if os.path.exists(source):
        return Path(source)
    try:
        # Asks the hub, where it can be reached, so that a moved branch is another folder.
        config = cached_file(source, "config.json", revision=parameters.revision)
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
