"""Mean, resample and zero ablation and attention knockout, as edits of the attention hook.

Each intervention is a small immutable object; :func:`intervene` applies any number of them around
any forward pass, generation included, and leaves the model as it was (paper, sections 4 and 5).

Example
-------
>>> heads = icl.top_heads(scores, 0.03)
>>> with icl.intervene(model, icl.ZeroAblation(heads)):
...     ablated = model(input_ids).logits
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Bool, Float
from transformers import PreTrainedModel

from icl_helpers.attention.heads import Head
from icl_helpers.attention.hook import (
    AttentionCall,
    AttentionEdit,
    AttentionLayout,
    attention_layout,
    attention_probabilities,
    check_heads,
    edited_attention,
)
from icl_helpers.errors import InputError, InterventionError

__all__ = [
    "AttentionKnockout", "Intervention", "MeanAblation", "ResampleAblation", "ZeroAblation",
    "intervene",
]  # fmt: skip


class Intervention(Protocol):
    """Anything that can say which edits it makes to which layers of a model."""

    def edits(self, layout: AttentionLayout) -> dict[int, AttentionEdit]:
        """One edit per intervened layer; raises :class:`InputError` where it does not fit."""


@dataclass(frozen=True, init=False)
class ZeroAblation:
    """Set the output of each head to zero (paper, appendix A.5)."""

    heads: tuple[Head, ...]

    def __init__(self, heads: Iterable[Head | tuple[int, int]]) -> None:
        object.__setattr__(self, "heads", _as_heads(heads))

    def edits(self, layout: AttentionLayout) -> dict[int, AttentionEdit]:
        layers = _by_layer(self.heads, layout)
        return {layer: functools.partial(_zeroed, heads) for layer, heads in layers.items()}


@dataclass(frozen=True, init=False, eq=False)
class _OutputsGiven:
    """Replace the output of each head by what is given for the position of the token."""

    heads: tuple[Head, ...]
    head_outputs: Float[torch.Tensor, "... layers positions heads d_head"]

    # Numbers of axes that ``head_outputs`` may have, and how to come by more positions.
    _axes: ClassVar[tuple[int, ...]]
    _way_out: ClassVar[str]

    def __init__(
        self,
        heads: Iterable[Head | tuple[int, int]],
        head_outputs: Float[torch.Tensor, "... layers positions heads d_head"],
    ) -> None:
        object.__setattr__(self, "heads", _as_heads(heads))
        object.__setattr__(self, "head_outputs", head_outputs)

    def edits(self, layout: AttentionLayout) -> dict[int, AttentionEdit]:
        layers = _by_layer(self.heads, layout)
        shape = tuple(self.head_outputs.shape)
        wanted = (layout.n_layers, layout.n_heads, layout.d_head)
        if len(shape) not in self._axes or (shape[-4], *shape[-2:]) != wanted:
            raise InputError(
                f"head_outputs must have shape {'[batch, ' if 5 in self._axes else '['}"
                f"{wanted[0]} layers, positions, {wanted[1]} heads, {wanted[2]} d_head] for this "
                f"model, got {list(shape)}; {self._way_out}"
            )
        edits: dict[int, AttentionEdit] = {}
        for layer, heads in layers.items():
            outputs = self.head_outputs.select(-4, layer)[..., heads, :]
            edits[layer] = _GivenEdit(heads, outputs, self._way_out)
        return edits


class MeanAblation(_OutputsGiven):
    """Replace the output of each head by a fixed vector per position (paper, section 4).

    Parameters
    ----------
    heads
        The heads to ablate.
    head_outputs
        [layers, positions, heads, d_head], from :func:`icl_helpers.mean_head_outputs`. A batch may
        be no longer than its positions. Positions are those of the tokens in their sequence, so
        batches must be padded on the right.
    """

    _axes = (4,)
    _way_out = "compute them with mean_head_outputs(model, input_ids) from longer samples"


class ResampleAblation(_OutputsGiven):
    """Replace the output of each head by what it gave at the same position of another prompt.

    Also known as interchange intervention (Geiger et al. 2021) and as the building block of causal
    scrubbing (Chan et al. 2022): unlike a mean, what stands in is something the head does say.

    Parameters
    ----------
    heads
        The heads to ablate.
    head_outputs
        [batch, layers, positions, heads, d_head], one prompt's outputs for each prompt of the
        batch, or [layers, positions, heads, d_head] for all; from
        :func:`icl_helpers.prompt_head_outputs`. As with :class:`MeanAblation` a batch may be no
        longer than the positions, and is padded on the right.
    """

    _axes = (4, 5)
    _way_out = "compute them with prompt_head_outputs(model, input_ids) from longer prompts"


@dataclass(frozen=True, init=False, eq=False)
class AttentionKnockout:
    """Forbid the heads to attend from some queries to some keys (paper, section 5).

    Parameters
    ----------
    heads
        The heads in which attention is blocked; all others are untouched.
    blocked
        True where a query may not attend to a key: [query, key] for every prompt of the batch, or
        [batch, query, key]. Tokens beyond it (padding, generated tokens) are not blocked. See
        :func:`icl_helpers.induction_pattern`.
    """

    heads: tuple[Head, ...]
    blocked: Bool[torch.Tensor, "... query key"]

    def __init__(
        self, heads: Iterable[Head | tuple[int, int]], blocked: Bool[torch.Tensor, "... query key"]
    ) -> None:
        if not isinstance(blocked, torch.Tensor) or blocked.dtype != torch.bool:
            got = getattr(blocked, "dtype", type(blocked).__name__)
            raise InputError(f"blocked must be a boolean tensor, got {got}")
        if blocked.ndim not in (2, 3):
            raise InputError(
                f"blocked must have shape [query, key] or [batch, query, key], got "
                f"{list(blocked.shape)}"
            )
        object.__setattr__(self, "heads", _as_heads(heads))
        object.__setattr__(self, "blocked", blocked)

    def edits(self, layout: AttentionLayout) -> dict[int, AttentionEdit]:
        layers = _by_layer(self.heads, layout)
        window = _BlockedWindow(self.blocked)
        return {
            layer: functools.partial(_knocked_out, heads, window) for layer, heads in layers.items()
        }


@contextmanager
def intervene(model: PreTrainedModel, *interventions: Intervention) -> Iterator[PreTrainedModel]:
    """Apply interventions to every forward pass of ``model`` inside the block, in the order given.

    Blocks may be nested. The model is restored on every exit, also after an exception.

    Raises
    ------
    InputError
        A head or a tensor does not fit the model; raised before anything is computed.
    UnsupportedArchitectureError
        The model does not go through transformers' attention interface.
    InterventionError
        A batch does not fit the intervention (longer than the means, another batch size).
    """
    layout = attention_layout(model)
    edits: defaultdict[int, list[AttentionEdit]] = defaultdict(list)
    for intervention in interventions:
        for layer, edit in intervention.edits(layout).items():
            edits[layer].append(edit)
    with edited_attention(model, edits):
        yield model


def _as_heads(heads: Iterable[Head | tuple[int, int]]) -> tuple[Head, ...]:
    # A head named twice is one head; the order of first mention is kept.
    return tuple(dict.fromkeys(Head(*head) for head in heads))


def _by_layer(heads: Iterable[Head], layout: AttentionLayout) -> dict[int, list[int]]:
    """The heads of each layer; raises :class:`InputError` for one that the model does not have."""
    check_heads(heads, layout)
    layers: defaultdict[int, list[int]] = defaultdict(list)
    for head in heads:
        layers[head.layer].append(head.head)
    return layers


def _zeroed(heads: list[int], call: AttentionCall) -> torch.Tensor:
    output = call.output.clone()
    output[:, :, heads] = 0
    return output


@dataclass
class _GivenEdit:
    heads: list[int]
    outputs: Float[torch.Tensor, "... positions chosen d_head"]
    way_out: str

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        self.outputs = self.outputs.to(device=call.output.device, dtype=call.output.dtype)
        positions, last = call.positions
        if last >= self.outputs.shape[-3]:
            raise InterventionError(
                f"the batch reaches position {last}, but the head outputs given end at position "
                f"{self.outputs.shape[-3] - 1}; {self.way_out}"
            )
        output = call.output.clone()
        if self.outputs.ndim == 3:
            output[:, :, self.heads] = self.outputs[positions]
            return output
        if len(self.outputs) != len(output):
            raise InterventionError(
                f"head_outputs are of {len(self.outputs)} prompts, the batch has {len(output)}; "
                f"give one for each, or leave the batch axis out"
            )
        rows = torch.arange(len(output), device=positions.device)[:, None]
        output[:, :, self.heads] = self.outputs[rows, positions]
        return output


class _BlockedWindow:
    """The blocked pairs of a forward pass, cut to its queries and keys once for all layers."""

    def __init__(self, blocked: Bool[torch.Tensor, "... query key"]) -> None:
        self.blocked = blocked
        self.key: tuple[int, int, int, int] | None = None
        self.cut = blocked

    def at(self, call: AttentionCall) -> Bool[torch.Tensor, "... query key"]:
        batch, n_query, n_key = call.query.shape[0], call.query.shape[2], call.key.shape[2]
        if self.blocked.ndim == 3 and self.blocked.shape[0] not in (1, batch):
            raise InterventionError(
                f"blocked holds {self.blocked.shape[0]} prompts, the batch {batch}; give one "
                f"pattern per prompt, or a single [query, key] pattern for all"
            )
        offset = call.offset
        if offset == 0 and self.blocked.shape[-1] > n_key and self.blocked[..., n_key:].any():
            raise InterventionError(
                f"blocked covers {self.blocked.shape[-1]} tokens, the batch has {n_key}; build "
                f"the pattern from the same tokens as the batch"
            )
        wanted = (offset, n_query, n_key, hash(call.query.device))
        if wanted != self.key:
            # A sliding-window cache drops the oldest keys: the first key left is then not token 0.
            first_key = max(0, offset + n_query - n_key)
            part = self.blocked[..., offset : offset + n_query, first_key : first_key + n_key]
            short = (0, n_key - part.shape[-1], 0, n_query - part.shape[-2])
            self.cut = torch.nn.functional.pad(part, short, value=False).to(call.query.device)
            self.key = wanted
        return self.cut


def _knocked_out(heads: list[int], window: _BlockedWindow, call: AttentionCall) -> torch.Tensor:
    probabilities = attention_probabilities(call, heads=heads, blocked=window.at(call))
    n_heads, n_kv = call.query.shape[1], call.value.shape[1]
    value = call.value[:, [head // (n_heads // n_kv) for head in heads]]
    attended = torch.matmul(probabilities.to(value.dtype), value)
    output = call.output.clone()
    output[:, :, heads] = attended.transpose(1, 2)
    return output
