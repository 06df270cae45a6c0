"""InternLM2 checkpoints as Llama models, without running code from their repository.

InternLM2 is Llama with other names and one fused matrix: ``wqkv`` is
``[kv_heads, groups + 2, head_dim, hidden]`` with a group's queries first, then its key, then its
value. transformers' own conversion of checkpoints renames and unfuses while it reads, so that
files, dtypes, devices and quantisation are those of any other model.

Example
-------
>>> settings = internlm2_settings("internlm/internlm2-20b")
>>> model = InternLM2ForCausalLM.from_pretrained(
...     "internlm/internlm2-20b", config=internlm2_config(settings), dtype="bfloat16"
... )
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.utils import cached_file

from icl_helpers.errors import InputError

__all__ = ["InternLM2ForCausalLM", "internlm2_config", "internlm2_settings"]

_SAME_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "tie_word_embeddings",
)  # fmt: skip
_ROPE_TYPES = ("default", "linear", "dynamic")


def internlm2_settings(
    source: str | os.PathLike[str], *, revision: str | None = None
) -> dict[str, Any] | None:
    """An InternLM2 directory's or hub id's ``config.json``; None for any other, or unreadable."""
    try:
        file = cached_file(os.fspath(source), "config.json", revision=revision)
        settings = json.loads(Path(file or "").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(settings, dict) and settings.get("model_type") == "internlm2"
    return settings if known else None


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
        dtype=settings.get("dtype", settings.get("torch_dtype")),
        rope_parameters=rope,
        # A configuration that does not say has biases: that is InternLM2's default.
        attention_bias=bool(settings.get("bias", True)),
    )


class InternLM2ForCausalLM(LlamaForCausalLM):
    """Reads InternLM2 checkpoints, by a conversion that has its name, and gives Llama models."""

    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: bool = False, **options: Any
    ) -> LlamaForCausalLM | tuple[LlamaForCausalLM, dict[str, Any]]:
        """As transformers' own; ``config`` must be that of :func:`internlm2_config`.

        Raises :class:`InputError` for a weight that InternLM2 has not, or whose rows do not fit the
        numbers of heads.
        """
        model, report = super().from_pretrained(*args, output_loading_info=True, **options)
        misfit = model.__dict__.pop("misfit", None)
        if misfit is None and report["unexpected_keys"]:
            misfit = f"InternLM2 has no weight {min(report['unexpected_keys'])}"
        if misfit is not None:
            raise InputError(f"the checkpoint in {args[0]} cannot be loaded: {misfit}")
        # From here on it is a Llama, and saved as one.
        model.__class__ = LlamaForCausalLM
        model._weight_conversions = []
        return (model, report) if output_loading_info else model


class _Unfuse(ConversionOps):
    """``wqkv`` [kv_heads * (groups + 2) * head_dim, ...] into queries, keys and values."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: LlamaForCausalLM,
        config: LlamaConfig,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        (fused,) = input_dict.pop(source_patterns[0])
        heads, kv_heads, size = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )  # fmt: skip
        if len(fused) != (heads + 2 * kv_heads) * size:
            # Raised here, it would end in a table of transformers' log: from_pretrained raises it.
            model.misfit = (
                f"{full_layer_name.replace(target_patterns[0], source_patterns[0])} has "
                f"{len(fused)} rows; {heads} heads and {kv_heads} key-value heads of {size}, as "
                f"config.json says, need {(heads + 2 * kv_heads) * size}"
            )
            return {}
        # A bias has no hidden axis.
        grouped = fused.view(kv_heads, heads // kv_heads + 2, size, *fused.shape[1:])
        rows = torch.arange(heads // kv_heads + 2).tensor_split([-2, -1])
        return {
            # Picking by indices copies, so that the fused matrix is freed.
            target: grouped[:, part].reshape(-1, *fused.shape[1:])
            for target, part in zip(target_patterns, rows, strict=True)
        }


_RENAMED = {
    r"^model\.tok_embeddings\.": "model.embed_tokens.",
    r"^output\.": "lm_head.",
    r"\.attention\.wo\.": ".self_attn.o_proj.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
    r"\.feed_forward\.w1\.": ".mlp.gate_proj.",
    r"\.feed_forward\.w3\.": ".mlp.up_proj.",
    r"\.feed_forward\.w2\.": ".mlp.down_proj.",
}
register_checkpoint_conversion_mapping(
    InternLM2ForCausalLM.__name__,
    [
        *(WeightRenaming(old, new) for old, new in _RENAMED.items()),
        WeightConverter(
            ".attention.wqkv.", [f".self_attn.{part}_proj." for part in "qkv"], [_Unfuse()]
        ),
    ],
    overwrite=True,
)
