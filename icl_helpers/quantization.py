"""Loading weights in 4 or 8 bits, for a model that does not fit into memory otherwise.

The work is bitsandbytes', through transformers' own configuration; interventions and scores act on
the heads' outputs between the projections and need nothing special. The numbers are those of a
slightly different model: compare them with others of the same ``quantization`` only.

Example
-------
>>> model, tokenizer = icl.load_model("meta-llama/Meta-Llama-3-8B", quantization="4bit")
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from icl_helpers.errors import InputError

__all__ = ["QUANTIZATIONS", "check_quantization", "quantization_config"]

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
