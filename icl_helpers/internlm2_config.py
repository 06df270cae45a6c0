"""Recognising InternLM2 checkpoints, and their configuration as Llama's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig
from transformers.utils import cached_file

from icl_helpers.errors import InputError

__all__ = ["internlm2_config", "internlm2_settings", "is_internlm2"]

_SAME_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "tie_word_embeddings",
)  # fmt: skip
_ROPE_TYPES = ("default", "linear", "dynamic")


def is_internlm2(
    source: str | os.PathLike[str] | PreTrainedConfig | Mapping[str, Any],
    *,
    revision: str | None = None,
) -> bool:
    """Whether a directory, hub id or configuration is InternLM2's.

    False where no configuration can be read: the caller's ordinary loading then explains why.
    """
    if isinstance(source, PreTrainedConfig):
        return source.model_type == "internlm2"
    if isinstance(source, Mapping):
        return source.get("model_type") == "internlm2"
    return internlm2_settings(source, revision=revision) is not None


def internlm2_settings(
    source: str | os.PathLike[str], *, revision: str | None = None
) -> dict[str, Any] | None:
    """The ``config.json`` of an InternLM2 directory or hub id; None for any other model."""
    try:
        file = cached_file(os.fspath(source), "config.json", revision=revision)
        settings = json.loads(Path(file or "").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and is_internlm2(settings) else None


def internlm2_config(settings: Mapping[str, Any]) -> LlamaConfig:
    """The Llama configuration of an InternLM2 ``config.json``.

    The two models' dynamic scaling is the same: beyond the trained length L, the rotary base is
    multiplied by ``(factor * n / L - (factor - 1)) ** (d / (d - 2))`` for n tokens and d dimensions
    per head. Up to L tokens it is plain rotary embedding. One difference does not touch a single
    prompt: after a prompt longer than L, InternLM2's code keeps the wider base for shorter ones,
    transformers returns to the plain one.
    """
    scaling = settings.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        raise InputError(
            f"InternLM2's rope_scaling must be one of {', '.join(_ROPE_TYPES)}, got {rope_type!r}"
        )
    rope = {"rope_type": rope_type, "rope_theta": float(settings.get("rope_theta", 10_000))}
    if rope_type != "default":
        rope["factor"] = float(scaling["factor"])
    same = {field: settings[field] for field in _SAME_FIELDS if field in settings}
    return LlamaConfig(
        **same,
        architectures=["LlamaForCausalLM"],
        rope_parameters=rope,
        # A configuration that does not say has biases: that is InternLM2's default.
        attention_bias=bool(settings.get("bias", True)),
    )
