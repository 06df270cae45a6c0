"""Loading a model and its tokenizer: an embedded one, a hub id or a directory.

Weights in 4 or 8 bits are bitsandbytes' work, through transformers' own configuration;
interventions and scores act on the heads' outputs between the projections and need nothing special.
Such numbers are those of a slightly different model: compare them with others of the same
``quantization`` only.

Example
-------
>>> model, tokenizer = icl.load_model("icl-tiny")
>>> model, tokenizer = icl.load_model("meta-llama/Meta-Llama-3-8B", dtype="bfloat16")
"""

from __future__ import annotations

import importlib.util
import json
import os
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

from icl_helpers.attention.hook import attention_layout
from icl_helpers.attention.inputs import position_limit
from icl_helpers.errors import InputError, MissingArtefactError, UnsupportedArchitectureError
from icl_helpers.files import embedded_dir, user_path
from icl_helpers.models.fingerprint import _FINGERPRINTS, weights_fingerprint
from icl_helpers.models.hub import use_cache_where_hub_is_silent
from icl_helpers.models.internlm2 import (
    fetch_internlm2,
    internlm2_config,
    internlm2_settings,
    is_internlm2,
    load_internlm2,
    load_internlm2_tokenizer,
)

__all__ = [
    "QUANTIZATIONS",
    "check_quantization",
    "context_length",
    "embedded_models",
    "load_config",
    "load_model",
    "load_tokenizer",
    "model_fractions",
    "quantization_config",
    "resolve_model",
]


_DTYPES = ("auto", "float32", "bfloat16", "float16")
# Settings under which a model that is loaded as a decoder may look ahead.
_DECODER_SWITCHES = {"is_decoder": True, "is_causal": True, "use_bidirectional_attention": False}
_PAPER_FRACTIONS = (0.01, 0.03)


def embedded_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in embedded_dir().glob("*/config.json"))


def resolve_model(name: str) -> str:
    """The directory or hub id behind a model name; raises :class:`InputError` for a bad name."""
    if not isinstance(name, str) or not name.strip() or "\0" in name or len(name) > 4096:
        raise InputError(
            f"model must be an embedded model ({', '.join(embedded_models())}), a hub id such as "
            f"'meta-llama/Meta-Llama-3-8B' or a directory, got {name!r}"
        )
    if name in embedded_models():
        return str(embedded_dir() / name)
    path = user_path(name)
    if path.is_dir():
        return str(path)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep * 2 in name
    if looks_local:
        raise MissingArtefactError(f"model directory {name} does not exist")
    return name


def _reachable(name: str) -> str:
    """What :func:`resolve_model` gives; for a hub id after a look whether the hub answers."""
    source = resolve_model(name)
    if not Path(source).is_dir():
        use_cache_where_hub_is_silent()
    return source


def load_model(
    name: str = "icl-tiny",
    *,
    revision: str | None = None,
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
        An embedded model (``icl-tiny``), a hub id, or a directory.
    dtype
        ``"auto"`` (the checkpoint's own), ``"float32"``, ``"bfloat16"``, ``"float16"``.
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
    source = _reachable(name)
    torch_dtype = _check_dtype(dtype)
    target = _check_device(device, device_map)
    check_quantization(quantization)
    if is_internlm2(source, revision=revision):
        if quantization is not None:
            raise InputError(
                f"{name} is an InternLM2 checkpoint, which is read tensor by tensor and cannot be "
                f"quantised on the way; leave quantization out, or use device_map='auto'"
            )
        directory = fetch_internlm2(source, revision=revision)
        place = {"device": target} if device_map is None else {"device_map": device_map}
        model = load_internlm2(directory, dtype=torch_dtype, **place)
        return model, load_internlm2_tokenizer(directory)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = _load_config(name, source, options)
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, torch_dtype)
        # Quantised weights cannot be moved afterwards: they are placed while they are read.
        device_map = {"": target} if device_map is None else device_map
    try:
        tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=torch_dtype, device_map=device_map,
            output_loading_info=True, **options,
        )  # fmt: skip
    except (MemoryError, torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:
        # A damaged file fails in whatever way its reader does.
        raise _explain(name, error) from error
    if report["missing_keys"]:
        # transformers would go on with random weights in their place.
        raise InputError(
            f"model {name!r} lacks the weights {', '.join(sorted(report['missing_keys'])[:5])}; "
            f"its files are incomplete, fetch them again"
        )
    if device_map is None:
        model.to(target)
    if quantization is not None:
        _FINGERPRINTS[model] = weights_fingerprint(model)
    model.eval()
    settings = model.config.get_text_config()
    if any(getattr(settings, name, usual) != usual for name, usual in _DECODER_SWITCHES.items()):
        attention_layout(model)  # refuses it where the switch makes it no decoder
    return model, tokenizer


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer alone. Raises as :func:`load_model` does."""
    source = _reachable(name)
    if is_internlm2(source, revision=revision):
        return load_internlm2_tokenizer(fetch_internlm2(source, revision=revision))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        # A damaged file fails in whatever way its reader does.
        raise _explain(name, error) from error
    return tokenizer


def _check_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def _check_device(device: str | torch.device | None, device_map: Any) -> torch.device:
    if device is not None and device_map is not None:
        raise InputError(f"give device ({device}) or device_map ({device_map}), not both")
    try:
        chosen = torch.device(
            device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
        )
    except RuntimeError as error:
        raise InputError(
            f"device must be a torch device such as 'cpu', 'cuda' or 'cuda:1', got {device!r}"
        ) from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but torch sees no CUDA GPU here")
    return chosen


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """A model's configuration alone; InternLM2's as that of the Llama it is loaded as.

    Raises as :func:`load_model` does.
    """
    source = _reachable(name)
    settings = internlm2_settings(source, revision=revision)
    if settings is not None:
        return internlm2_config(settings)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    return _load_config(name, source, options)


def _load_config(name: str, source: str, options: dict[str, Any]) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:
        # A malformed file fails in whatever way its reader does.
        raise _explain(name, error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedArchitectureError(
            f"{name} is an encoder-decoder ({config.model_type}); only decoder models can be used"
        )
    return config


def _explain(name: str, error: Exception) -> Exception:
    """One clear error for the many ways in which loading from the hub or a directory fails."""
    text = str(error)
    if "trust_remote_code" in text:
        return InputError(
            f"model {name!r} needs code from its repository; if you trust it, pass "
            f"trust_remote_code=True"
        )
    if isinstance(error, OSError) and not user_path(name).is_dir():
        return MissingArtefactError(
            f"model {name!r} is not embedded ({', '.join(embedded_models())}), not a directory, "
            f"not in the Hugging Face cache, and could not be fetched from the hub. Check the "
            f"name, the network, and for gated models that HF_TOKEN is set in the environment; or "
            f"download it elsewhere and pass its directory."
        )
    return InputError(
        f"model {name!r} cannot be loaded: {text.splitlines()[0] if text else error!r}"
    )


def context_length(model: PreTrainedModel) -> int:
    """Most tokens the model allows in one sequence; 2,048 where nothing in it says."""
    return position_limit(model) or 2048


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


QUANTIZATIONS = ("4bit", "8bit")


def check_quantization(quantization: str | None) -> str | None:
    """Return it, or raise :class:`InputError` for an unknown one or a missing library."""
    if quantization is None:
        return None
    if quantization not in QUANTIZATIONS:
        raise InputError(
            f"quantization must be None, {' or '.join(map(repr, QUANTIZATIONS))}, got "
            f"{quantization!r}"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"quantization={quantization!r} needs the package bitsandbytes; install it with: "
            f"pip install 'icl-helpers[quantized]'"
        )
    return quantization


def quantization_config(quantization: str, dtype: str | torch.dtype) -> BitsAndBytesConfig:
    """transformers' configuration for ``"4bit"`` or ``"8bit"``.

    4 bits are NormalFloat with doubly quantised scales, about 4.1 bits a weight; products are
    computed in ``dtype``, and in float16 where that is ``"auto"``, as GPUs without bfloat16 want.
    """
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    options: dict[str, Any] = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float16 if dtype == "auto" else dtype,
    }
    return BitsAndBytesConfig(load_in_4bit=True, **options)
