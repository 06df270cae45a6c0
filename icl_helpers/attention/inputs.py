"""Token ids and positions that a model has; everything else is refused before a forward pass."""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel

from icl_helpers.errors import InputError

__all__ = ["check_ids", "learned_positions", "position_limit", "rope_switch"]


_POSITION_TABLE = re.compile(r"(?!.*(vision|visual|image|audio|rel)).*(pos|wpe)[^.]*$")


def learned_positions(model: PreTrainedModel) -> int | None:
    """Rows of the model's table of positions that tokens can reach; None: it has no table."""
    tables = [
        module.num_embeddings - _first_row(module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and _POSITION_TABLE.match(name)
    ]
    return min(tables, default=None)


def _first_row(table: torch.nn.Embedding) -> int:
    """Row of position 0: OPT and Bart start at 2, RoBERTa behind the padding."""
    if table.padding_idx is not None:
        return table.padding_idx + 1
    return int(getattr(table, "offset", 0))


def position_limit(model: PreTrainedModel) -> int | None:
    """Most tokens that configuration and table of positions allow; None: neither says."""
    config = model.config.get_text_config()
    fields = ("max_position_embeddings", "n_positions", "n_ctx")
    stated = [v for v in (getattr(config, f, None) for f in fields) if isinstance(v, int) and v > 0]
    known = [*stated[:1], learned_positions(model)]
    return min((limit for limit in known if limit is not None), default=None)


def rope_switch(model: PreTrainedModel) -> tuple[int, bool] | None:
    """Length beyond which rotary angles depend on a sequence's whole length.

    And whether they change with every further token (dynamic scaling) or once (longrope).
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if part.get("rope_type") in ("longrope", "dynamic"):
            trained = part.get("original_max_position_embeddings", config.max_position_embeddings)
            return int(trained), part["rope_type"] == "dynamic"
    return None


def check_ids(model: PreTrainedModel, ids: torch.Tensor, *, way_out: str) -> None:
    """Raise :class:`InputError` for ids that are not [batch, tokens] of this model's tokens."""
    if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point() or ids.is_complex():
        raise InputError(
            f"token ids must be whole numbers of shape [batch, tokens], at least one, got "
            f"{ids.dtype} of shape {list(ids.shape)}"
        )
    rows = model.get_input_embeddings().num_embeddings
    for worst in (int(ids.min()), int(ids.max())):
        if not 0 <= worst < rows:
            raise InputError(
                f"token id {worst} is not one of the model's 0..{rows - 1}; use the model's own "
                f"tokenizer, and a BOS token that it has (bos_token_id)"
            )
    limit = position_limit(model)
    if limit is not None and ids.shape[1] > limit:
        raise InputError(
            f"sequences of {ids.shape[1]} tokens are longer than the model's context of {limit}; "
            f"{way_out}"
        )
