"""Loading a model and its tokenizer: one known by name, a hub id, a directory or a GGUF file.

Weights in 4 or 8 bits are bitsandbytes' work, through transformers' own configuration;
interventions and scores act on the heads' outputs between the projections and need nothing special.
Such numbers are those of a slightly different model: compare them with others of the same
``quantization`` only.

Example
-------
>>> model, tokenizer = icl.load_model("icl-tiny")
>>> model, tokenizer = icl.load_model("smollm2-135m")
>>> model, tokenizer = icl.load_model("meta-llama/Meta-Llama-3-8B", dtype="bfloat16")
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from icl_helpers.errors import (
    ICLError,
    InputError,
    MissingArtefactError,
    UnsupportedArchitectureError,
)
from icl_helpers.files import SMOLLM2, smollm2_dir, user_path
from icl_helpers.models.fingerprint import named_models, remember_fingerprint, resolve_model
from icl_helpers.models.gguf import convert_smollm2, dequantized, gguf_arguments
from icl_helpers.models.hub import go_offline_if_hub_unreachable
from icl_helpers.models.internlm2 import InternLM2ForCausalLM, internlm2_config, internlm2_settings
from icl_helpers.models.internlm2_tokenizer import load_internlm2_tokenizer

__all__ = [
    "QUANTIZATIONS", "check_dtype", "check_quantization", "load_config", "load_model",
    "load_tokenizer", "quantization_config",
]  # fmt: skip

_DTYPES = ("auto", "float32", "bfloat16", "float16")


class _Checkpoint:
    """Where and how a model is read; ``settings`` are InternLM2's, None for any other."""

    def __init__(
        self, name: str, revision: str | None, gguf_file: str | None, trust_remote_code: bool
    ) -> None:
        if name == SMOLLM2:
            convert_smollm2()
        self.name = name
        self.source, gguf = gguf_arguments(resolve_model(name), gguf_file)
        if not Path(self.source).is_dir():
            go_offline_if_hub_unreachable()
        self.reading = {"revision": revision, "trust_remote_code": trust_remote_code, **gguf}
        with _explained(name):
            self.settings = None if gguf else internlm2_settings(self.source, revision=revision)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        with _explained(self.name):
            if self.settings is not None:
                return load_internlm2_tokenizer(self.source, revision=self.reading["revision"])
            return AutoTokenizer.from_pretrained(self.source, **self.reading)

    def config(self) -> PreTrainedConfig:
        with _explained(self.name):
            if self.settings is not None:
                return internlm2_config(self.settings)
            config = AutoConfig.from_pretrained(self.source, **self.reading)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedArchitectureError(
                f"{self.name} is an encoder-decoder ({config.model_type}); only decoder models can "
                f"be used"
            )
        return config


@contextmanager
def _explained(name: str, *passing: type[Exception]) -> Iterator[None]:
    """One clear error for the many ways in which malformed and damaged files fail their readers."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError, *passing)):
            raise
        raise _loading_error(name, error) from error


def load_model(
    name: str = "icl-tiny",
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, and its fast tokenizer.

    Parameters
    ----------
    name
        An embedded model (``icl-tiny``), ``smollm2-135m`` (instruct, 4-bit weights; see
        :mod:`icl_helpers.models.gguf`), a hub id, a directory, or a GGUF file.
    gguf_file
        Name of a GGUF file in the directory or on the hub, to be read instead of its weights.
    dtype
        ``"auto"`` (the checkpoint's own; float32 for a GGUF file, whose blocks are unpacked),
        ``"float32"``, ``"bfloat16"``, ``"float16"``.
    device
        Default: CUDA if there is one, else the CPU. Not together with ``device_map``.
    device_map
        Passed to transformers; ``"auto"`` spreads a large model over several GPUs.
    quantization
        ``"4bit"`` or ``"8bit"`` weights, by bitsandbytes (``pip install icl-helpers[quantized]``);
        None: the weights as they are. ``dtype`` is then that of everything else.

    Raises
    ------
    InputError
        A name, dtype, device or quantisation that cannot be used, or remote code without
        permission.
    UnsupportedArchitectureError
        The model is no decoder.
    MissingArtefactError
        The model is neither here nor in the cache and the hub cannot be reached.
    """
    # First of all: to locate a named model may mean to convert it.
    torch_dtype = check_dtype(dtype)
    target = _check_device(device, device_map)
    check_quantization(quantization)
    checkpoint = _Checkpoint(name, revision, gguf_file, trust_remote_code)
    gguf = "gguf_file" in checkpoint.reading
    if gguf and quantization is not None:
        raise InputError(
            f"quantization={quantization!r} does not go with a GGUF file, which is unpacked to "
            f"ordinary weights; leave quantization out"
        )
    config = checkpoint.config()
    options = dict(checkpoint.reading)
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, torch_dtype)
    if gguf:
        options.update(dequantized())
        torch_dtype = torch.float32 if torch_dtype == "auto" else torch_dtype
    elif device_map is None:
        # Placed while they are read, weights take no memory elsewhere; quantised ones cannot move.
        device_map = {"": target}
    tokenizer = checkpoint.tokenizer()
    kind = AutoModelForCausalLM if checkpoint.settings is None else InternLM2ForCausalLM
    with _explained(name, ICLError):
        model, report = kind.from_pretrained(
            checkpoint.source, config=config, dtype=torch_dtype, device_map=device_map,
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    # transformers goes on with random weights where the files hold none that fit.
    if report["mismatched_keys"]:
        weight, shape, expected = min(report["mismatched_keys"])
        raise InputError(
            f"model {name!r} does not fit its config.json: {weight} has shape {tuple(shape)}, "
            f"expected {tuple(expected)}"
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"model {name!r} lacks the weights {', '.join(missing[:5])}; its files are incomplete "
            f"(they lack {len(missing)} tensors), fetch them again"
        )
    if device_map is None:
        model.to(target)
    if quantization is not None:
        remember_fingerprint(model)
    return model.eval(), tokenizer


def load_tokenizer(
    name: str, *, revision: str | None = None, gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:  # fmt: skip
    """The tokenizer alone. Raises as :func:`load_model` does."""
    return _Checkpoint(name, revision, gguf_file, trust_remote_code).tokenizer()


def load_config(
    name: str, *, revision: str | None = None, gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedConfig:  # fmt: skip
    """The configuration alone, InternLM2's as a Llama's; raises as :func:`load_model` does."""
    return _Checkpoint(name, revision, gguf_file, trust_remote_code).config()


def check_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """What torch calls a dtype; raises :class:`InputError` for one that no model is loaded in."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def _check_device(device: str | torch.device | None, device_map: Any) -> torch.device:
    if device is not None and device_map is not None:
        raise InputError(f"give device ({device}) or device_map ({device_map}), not both")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(usual if device is None else device)
    except RuntimeError as error:
        raise InputError(
            f"device must be a torch device such as 'cpu', 'cuda' or 'cuda:1', got {device!r}"
        ) from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but torch sees no CUDA GPU here")
    return target


def _loading_error(name: str, error: Exception) -> Exception:
    text = str(error)
    what = text.splitlines()[0] if text else repr(error)
    if name == SMOLLM2:
        return InputError(
            f"model {name!r} cannot be loaded from {smollm2_dir()}: {what}; if its files are "
            f"damaged, delete that directory: the next load makes it again"
        )
    if "trust_remote_code" in text:
        return InputError(
            f"model {name!r} needs code from its repository; if you trust it, pass "
            f"trust_remote_code=True"
        )
    if isinstance(error, OSError) and not user_path(name).exists():
        return MissingArtefactError(
            f"model {name!r} is not one of {', '.join(named_models())}, not a directory, not in "
            f"the Hugging Face cache, and could not be fetched from the hub. Check the name, the "
            f"network, and for gated models that HF_TOKEN is set in the environment; or download "
            f"it elsewhere and pass its directory."
        )
    kind = MissingArtefactError if isinstance(error, FileNotFoundError) else InputError
    return kind(f"model {name!r} cannot be loaded: {what}")


QUANTIZATIONS = ("4bit", "8bit")


def check_quantization(quantization: str | None) -> None:
    """Raise :class:`InputError` for an unknown one or a missing library."""
    if quantization not in (None, *QUANTIZATIONS):
        raise InputError(
            f"quantization must be None, {' or '.join(map(repr, QUANTIZATIONS))}, got "
            f"{quantization!r}"
        )
    if quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"quantization={quantization!r} needs the package bitsandbytes; install it with: "
            f"pip install 'icl-helpers[quantized]'"
        )


def quantization_config(quantization: str, dtype: str | torch.dtype) -> BitsAndBytesConfig:
    """transformers' configuration for ``"4bit"`` or ``"8bit"``.

    4 bits are NormalFloat with doubly quantised scales, about 4.1 bits a weight; products are
    computed in ``dtype``, and in float16 where that is ``"auto"``, as GPUs without bfloat16 want.
    """
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16 if dtype == "auto" else dtype,
    )  # fmt: skip
