"""The one hook: an attention function registered with transformers' attention interface.

transformers sends every decoder that supports its ``AttentionInterface`` through one function that
sees the module, query, key, value and mask of each layer and returns the heads' outputs before the
output projection. This module registers such a function twice, once over SDPA and once over eager
attention. It calls the model's own attention and then applies the *edits* that are active for that
module. Head ablation, attention knockout and every measurement of attention are edits, so none of
them needs code per architecture.

Example
-------
>>> def record(call):
...     seen.append(attention_probabilities(call))
...     return call.output
>>> with edited_attention(model, {0: [record]}):
...     model(input_ids)
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from icl_helpers.attention.branches import branching_mask
from icl_helpers.errors import InputError, InterventionError, UnsupportedArchitectureError

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "AttentionCall",
    "AttentionEdit",
    "AttentionLayout",
    "attention_layout",
    "attention_probabilities",
    "check_heads",
    "edited_attention",
]


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
    ``positions`` is [query] or [batch, query]: the absolute position of every query token, and
    ``last_position`` the largest of them; ``offset`` tokens came before this pass, in the cache.
    """

    module: torch.nn.Module
    query: Float[torch.Tensor, "batch heads query d_head"]
    key: Float[torch.Tensor, "batch kv_heads key d_head"]
    value: Float[torch.Tensor, "batch kv_heads key d_value"]
    mask: torch.Tensor | None
    kwargs: dict[str, Any]
    positions: Int[torch.Tensor, "... query"]
    last_position: int
    offset: int
    output: Float[torch.Tensor, "batch query heads d_value"]


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


_PREFIX = "icl_"


AttentionEdit = Callable[[AttentionCall], torch.Tensor]


@dataclass(frozen=True)
class AttentionLayout:
    """The attention modules of a model, layer by layer, and the shape of their heads."""

    modules: tuple[torch.nn.Module, ...]
    n_heads: int
    d_head: int

    @property
    def n_layers(self) -> int:
        """Number of attention layers."""
        return len(self.modules)


@dataclass
class _Active:
    """What is active for one attention module while a hook is installed."""

    edits: list[AttentionEdit]
    positions: _Positions


class _Positions:
    """Absolute positions of the tokens of the forward pass that is under way.

    Worked out once per pass and shared by all layers: reading the largest position back from an
    accelerator waits for it.
    """

    def __init__(self) -> None:
        self.offset = 0
        self._given: torch.Tensor | None = None
        self._known: tuple[torch.Tensor, int] | None = None

    def record(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Forward pre-hook of the decoder: note where this pass starts."""
        given_arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        cache = given_arguments.get("past_key_values")
        self.offset = 0 if cache is None else int(cache.get_seq_length())
        given = given_arguments.get("position_ids")
        self._given = given if given is not None and given.ndim == 2 else None
        self._known = None

    def of(self, query: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Positions of the query tokens, [query] or [batch, query], and the largest of them."""
        if self._known is None:
            end = self.offset + query.shape[2]
            if self._given is None:
                self._known = torch.arange(self.offset, end, device=query.device), end - 1
            else:
                self._known = self._given.to(query.device), int(self._given.max())
        return self._known


_ACTIVE: WeakKeyDictionary[torch.nn.Module, _Active] = WeakKeyDictionary()
_LAYOUTS: WeakKeyDictionary[torch.nn.Module, dict[str, AttentionLayout]] = WeakKeyDictionary()


def _eager_base(module: torch.nn.Module) -> Callable[..., Any] | None:
    """The model file's own eager attention; transformers keeps it out of its registry."""
    return getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)


def _hooked(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    base: str,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    function = sdpa_attention_forward if base == "sdpa" else _eager_base(module)
    if function is None:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} has no eager attention function that can be called; "
            f"supported: {SUPPORTED_ARCHITECTURES}"
        )
    output, weights = function(module, query, key, value, attention_mask, **kwargs)
    active = _ACTIVE.get(module)
    if active is None or not active.edits:
        return output, weights
    positions, last = active.positions.of(query)
    call = AttentionCall(
        module, query, key, value, attention_mask, kwargs, positions, last,
        active.positions.offset, output,
    )  # fmt: skip
    for edit in active.edits:
        call.output = edit(call)
    return call.output, weights


for _base, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    # Without its mask function the mask would arrive as None and causality would be lost.
    AttentionInterface.register(_PREFIX + _base, functools.partial(_hooked, base=_base))
    AttentionMaskInterface.register(_PREFIX + _base, functools.partial(branching_mask, base=_mask))


@contextmanager
def edited_attention(
    model: PreTrainedModel, edits: Mapping[int, Sequence[AttentionEdit]]
) -> Iterator[AttentionLayout]:
    """Apply ``edits[layer]`` after each layer's attention, in order, for the length of the block.

    May be nested: inner edits come after outer ones. Whatever way the block is left, the model is
    as it was. Raises :class:`UnsupportedArchitectureError` before anything is computed.
    """
    layout = attention_layout(model)
    unknown = [layer for layer in edits if not 0 <= layer < layout.n_layers]
    if unknown:
        raise InterventionError(
            f"layer {unknown[0]} is out of range: the model has layers 0..{layout.n_layers - 1}"
        )
    with _installed(model):
        positions = _Positions()
        active = {}
        for layer, module in enumerate(layout.modules):
            outer = _ACTIVE.get(module)
            inherited = outer.edits if outer is not None else []
            active[module] = _Active([*inherited, *edits.get(layer, ())], positions)
        # Not the base model, which OPT passes by.
        decoder = model.get_decoder()
        handle = decoder.register_forward_pre_hook(positions.record, with_kwargs=True)
        try:
            with _activated(active):
                yield layout
        finally:
            handle.remove()


@contextmanager
def _activated(active: Mapping[torch.nn.Module, _Active]) -> Iterator[None]:
    """Set what is active for these modules; put back what was there before."""
    before = {module: _ACTIVE.get(module) for module in active}
    try:
        _ACTIVE.update(active)
        yield
    finally:
        for module, outer in before.items():
            if outer is None:
                _ACTIVE.pop(module, None)
            else:
                _ACTIVE[module] = outer


@contextmanager
def _installed(model: PreTrainedModel) -> Iterator[None]:
    """Route the model through the hooked function; restore the implementation afterwards."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        if not str(model.config._attn_implementation).startswith(_PREFIX):
            model.set_attn_implementation(_PREFIX + _base_of(model))
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def _base_of(model: PreTrainedModel) -> str:
    """The implementation to build on: the model's own; SDPA under flash or flex attention."""
    implementation = str(model.config._attn_implementation).removeprefix(_PREFIX)
    if implementation in ("sdpa", "eager"):
        return implementation
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def attention_layout(model: PreTrainedModel) -> AttentionLayout:
    """Find the model's attention modules by a probe of three tokens, and check the hook.

    The hook must fire exactly once for every layer, and logits with nothing edited must equal the
    untouched model's. The answer is kept for as long as the model lives.

    Raises
    ------
    UnsupportedArchitectureError
        The model is outside the attention interface (gptj, gpt_neo, bloom, falcon, mpt, models
        without attention), or its layers differ in ways that head interventions cannot serve.
    """
    known = _LAYOUTS.setdefault(model, {})
    base = _base_of(model) if isinstance(model, PreTrainedModel) else ""
    if base not in known:
        known[base] = _probe(model)
    return known[base]


def check_heads(heads: Iterable[tuple[int, int]], layout: AttentionLayout) -> None:
    """Raise :class:`InputError` for a head (layer, head) that the model does not have."""
    for layer, head in heads:
        if not (0 <= layer < layout.n_layers and 0 <= head < layout.n_heads):
            raise InputError(
                f"head {layer}.{head} is out of range: the model has layers "
                f"0..{layout.n_layers - 1} and heads 0..{layout.n_heads - 1}"
            )


def _refuse(model: torch.nn.Module, why: str) -> UnsupportedArchitectureError:
    name = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    return UnsupportedArchitectureError(
        f"architecture {name!r} is not supported: {why}. Supported: {SUPPORTED_ARCHITECTURES}."
    )


@torch.no_grad()
def _probe(model: PreTrainedModel) -> AttentionLayout:
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        raise _refuse(model, "it does not go through transformers' AttentionInterface")
    ids = torch.tensor([[1, 2, 1]], device=model.device)
    calls: list[tuple[torch.nn.Module, torch.Size]] = []
    training = model.training
    model.eval()
    try:
        plain = model(input_ids=ids, use_cache=False).logits
        with _installed(model), _recording(model, calls):
            hooked = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)
    layout = _layout_of(model, calls)
    exact = model.config._attn_implementation in ("sdpa", "eager")
    same = (
        torch.equal(plain, hooked) if exact else torch.allclose(plain, hooked, atol=0.1, rtol=0.1)
    )
    if not same and not plain.isnan().any():
        raise _refuse(model, "its logits change when the hook is installed without any edit")
    return layout


def _recording(
    model: PreTrainedModel, calls: list[tuple[torch.nn.Module, torch.Size]]
) -> AbstractContextManager[None]:
    def record(call: AttentionCall) -> torch.Tensor:
        calls.append((call.module, call.output.shape))
        return call.output

    # Which modules hold attention is not known yet: the record waits at all of them.
    positions = _Positions()
    return _activated({module: _Active([record], positions) for module in model.modules()})


def _layout_of(
    model: PreTrainedModel, calls: list[tuple[torch.nn.Module, torch.Size]]
) -> AttentionLayout:
    n_layers = model.config.get_text_config().num_hidden_layers
    if len(calls) != n_layers or len({id(module) for module, _ in calls}) != n_layers:
        raise _refuse(model, f"the attention hook fired {len(calls)} times for {n_layers} layers")
    shapes = {tuple(shape[2:]) for _, shape in calls}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise _refuse(model, f"its heads differ in shape from layer to layer: {sorted(shapes)}")
    n_heads, d_head = next(iter(shapes))
    return AttentionLayout(tuple(module for module, _ in calls), n_heads, d_head)
