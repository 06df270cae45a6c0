"""What one layer's attention was called with, and the attention that it paid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float

from icl_helpers.attention.passes import Passes
from icl_helpers.errors import UnsupportedArchitectureError

__all__ = ["SUPPORTED_ARCHITECTURES", "AttentionCall", "attention_probabilities"]


SUPPORTED_ARCHITECTURES = (
    "llama, internlm2, mistral, mixtral, qwen2, qwen3, gemma2, gemma3, phi3, gpt2, gpt_neox, opt, "
    "olmo2, gpt_oss and other decoders that transformers sends through its AttentionInterface"
)


@dataclass
class AttentionCall:
    """What one layer's attention was called with, and what it returned.

    ``query`` is [batch, heads, query, d_head]; ``key`` and ``value`` are [batch, kv_heads, key,
    d_head]; ``mask`` is None (causal), boolean (True = may attend) or additive, broadcastable to
    [batch, heads, query, key]; ``output`` is [batch, query, heads, d_head].
    """

    module: torch.nn.Module
    query: Float[torch.Tensor, "batch heads query d_head"]
    key: Float[torch.Tensor, "batch kv_heads key d_head"]
    value: Float[torch.Tensor, "batch kv_heads key d_value"]
    mask: torch.Tensor | None
    kwargs: dict[str, Any]
    output: Float[torch.Tensor, "batch query heads d_value"]
    passes: Passes

    @property
    def offset(self) -> int:
        """Number of tokens before this pass, in the cache: the first query token's position."""
        return self.passes.offset(self.query.shape[2], self.key.shape[2])


def _causal_mask(call: AttentionCall) -> Bool[torch.Tensor, "query key"] | None:
    """The causal mask that SDPA applies by itself when it is handed none; else None."""
    n_query, n_key = call.query.shape[2], call.key.shape[2]
    is_causal = call.kwargs.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if is_causal is None else is_causal
    if call.mask is not None or n_query == 1 or not causal:
        return None
    ones = torch.ones(n_query, n_key, dtype=torch.bool, device=call.query.device)
    return ones.tril()


def attention_probabilities(
    call: AttentionCall,
    *,
    heads: Sequence[int] | None = None,
    blocked: Bool[torch.Tensor, "... query key"] | None = None,
) -> Float[torch.Tensor, "batch chosen query key"]:
    """Attention of the chosen heads (default: all) in float32, from the call's query and key.

    Honours the call's mask, scaling, logit soft-capping and attention sinks. ``blocked`` forbids
    further query-key pairs; a query with nothing left to attend to gets a row of zeros.
    """
    n_heads, n_kv = call.query.shape[1], call.key.shape[1]
    chosen = torch.arange(n_heads) if heads is None else torch.as_tensor(heads)
    chosen = chosen.to(call.query.device)
    query = call.query[:, chosen]
    # Grouped queries share keys: head h reads key-value head h // (n_heads // n_kv).
    key = call.key[:, chosen // (n_heads // n_kv)]
    scaling = call.kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = (torch.matmul(query, key.transpose(2, 3)) * scaling).float()
    softcap = call.kwargs.get("softcap")
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = _masked(logits, call, chosen)
    if blocked is not None:
        logits = logits.masked_fill(blocked.unsqueeze(-3), -torch.inf)
        # Softmax of a row of minus infinities would be NaN: such a query attends to nothing.
        empty = torch.isneginf(logits).all(dim=-1, keepdim=True)
    else:
        empty = None
    sinks = call.kwargs.get("s_aux")
    if sinks is not None:
        column = sinks[chosen].float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.softmax(torch.cat([logits, column], dim=-1), dim=-1)[..., :-1]
    probabilities = torch.softmax(logits, dim=-1)
    return probabilities if empty is None else probabilities.masked_fill(empty, 0.0)


def _masked(logits: torch.Tensor, call: AttentionCall, chosen: torch.Tensor) -> torch.Tensor:
    if call.kwargs.get("position_bias") is not None:
        raise UnsupportedArchitectureError(
            f"{type(call.module).__name__} adds a position bias to its attention, which is not "
            f"supported here; supported: {SUPPORTED_ARCHITECTURES}"
        )
    mask = _causal_mask(call) if call.mask is None else call.mask[..., : call.key.shape[2]]
    if mask is None:
        return logits
    if mask.ndim == 4 and mask.shape[1] > 1:
        mask = mask[:, chosen]
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf)
    # An additive mask forbids with the lowest finite number; minus infinity forbids for certain.
    return logits + mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
