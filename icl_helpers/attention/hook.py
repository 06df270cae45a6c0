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
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from icl_helpers.attention.passes import (
    SUPPORTED_ARCHITECTURES,
    AttentionCall,
    AttentionLayout,
    Passes,
    attention_probabilities,
    branching_mask,
    check_usable,
    learned_positions,
    measuring,
    rope_switch,
)
from icl_helpers.errors import InputError, InterventionError, UnsupportedArchitectureError

__all__ = [
    "SUPPORTED_ARCHITECTURES", "AttentionCall", "AttentionEdit", "AttentionLayout",
    "attention_layout", "attention_probabilities", "check_heads", "edited_attention",
    "equal_but_for_rounding", "watched_attention",
]  # fmt: skip

_PREFIX = "icl_"

AttentionEdit = Callable[[AttentionCall], torch.Tensor]


# The model, and each attention module while it is edited; one thread at a time.
_ACTIVE: WeakKeyDictionary[torch.nn.Module, Passes] = WeakKeyDictionary()
_ACTIVE_LOCK = threading.Lock()
_LAYOUTS: WeakKeyDictionary[torch.nn.Module, dict[str, AttentionLayout]] = WeakKeyDictionary()


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
    # The model file's own eager attention, which transformers keeps out of its registry.
    eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    function = sdpa_attention_forward if base == "sdpa" else eager
    if function is None:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} has no eager attention function that can be called; "
            f"supported: {SUPPORTED_ARCHITECTURES}"
        )
    output, weights = function(module, query, key, value, attention_mask, **kwargs)
    passes = _ACTIVE.get(module)
    edits = () if passes is None else passes.at(module, query.shape[2], key.shape[2])
    if passes is None or not edits:
        return output, weights
    call = AttentionCall(module, query, key, value, attention_mask, kwargs, output, passes)
    for edit in edits:
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
    check_usable(model)  # again: layers may have been compiled since the first use
    unknown = [layer for layer in edits if not 0 <= layer < layout.n_layers]
    if unknown:
        raise InterventionError(
            f"layer {unknown[0]} is out of range: the model has layers 0..{layout.n_layers - 1}"
        )
    with _installed(model, layout.modules, Passes(layout)) as passes:
        outer, required, before = passes.edits, passes.required, passes.completed
        inner = {layout.modules[layer]: list(of_layer) for layer, of_layer in edits.items()}
        passes.edits = {m: [*outer.get(m, ()), *inner.get(m, ())] for m in {**outer, **inner}}
        passes.required = frozenset(passes.edits)
        try:
            yield layout
            if inner and passes.completed == before:
                raise InterventionError(
                    "no forward pass of this model was seen while it was edited; call the model "
                    "itself inside the block, not a copy and not what torch.compile made of it"
                )
        finally:
            passes.edits, passes.required = outer, required


@contextmanager
def watched_attention(
    model: PreTrainedModel,
    function: Callable[[int, AttentionCall], object],
    layers: Iterable[int] | None = None,
) -> Iterator[AttentionLayout]:
    """Call ``function(layer, call)`` after the attention of these layers, or of every layer."""

    def watch(layer: int, call: AttentionCall) -> torch.Tensor:
        function(layer, call)
        return call.output

    watched = range(attention_layout(model).n_layers) if layers is None else layers
    edits = {layer: [functools.partial(watch, layer)] for layer in watched}
    with edited_attention(model, edits) as layout:
        yield layout


@contextmanager
def _installed(
    model: PreTrainedModel, attention: Iterable[torch.nn.Module], passes: Passes
) -> Iterator[Passes]:
    """Route the model through the hooked function; nested, by the outer block's passes."""
    with _ACTIVE_LOCK:
        outer = _ACTIVE.setdefault(model, passes)
        outer.check_thread()
    if outer is not passes:
        yield outer
        return
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = {id(part.config): part.config for part in parts}
    before = [(config, config._attn_implementation) for config in configs.values()]
    modules = dict.fromkeys(attention, passes)
    try:
        _ACTIVE.update(modules)
        model.set_attn_implementation(_PREFIX + _base_of(model))
        with passes.watching(parts):
            yield passes
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        for module in {model: passes, **modules}:
            _ACTIVE.pop(module, None)


def _base_of(model: PreTrainedModel) -> str:
    """The implementation to build on: the model's own; SDPA under flash or flex attention."""
    implementation = str(model.config._attn_implementation).removeprefix(_PREFIX)
    if implementation in ("sdpa", "eager"):
        return implementation
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def attention_layout(model: PreTrainedModel) -> AttentionLayout:
    """Find the model's attention modules by a probe of a few tokens, and check the hook.

    The hook must fire exactly once for every layer; logits with nothing edited must equal the
    untouched model's; no token may see a later one; with every head at zero no attention block may
    tell tokens apart. The answer is kept for as long as the model lives. Raises
    :class:`UnsupportedArchitectureError` for a model that is wrapped or compiled, no decoder, or
    outside the attention interface (gptj, bloom, falcon, ...), or whose layers' heads differ.
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


@measuring
def _probe(model: PreTrainedModel) -> AttentionLayout:
    check_usable(model)
    if not model._can_set_attn_implementation():
        raise _refuse(model, "it does not go through transformers' AttentionInterface")
    max_positions = learned_positions(model)
    ids = _probe_ids(model, min(8, max_positions or 8))
    exact = model.config._attn_implementation in ("sdpa", "eager")
    calls: list[AttentionCall] = []
    plain = model(input_ids=ids, use_cache=False).logits
    with _installed(model, model.modules(), Passes(AttentionLayout((), 0, 0))) as passes:
        # Which modules hold attention is not known yet: the record waits at all of them.
        passes.edits = {module: [_Record(calls)] for module in model.modules()}
        hooked = model(input_ids=ids, use_cache=False).logits
        layout = _layout_of(model, calls)
        same = torch.equal if exact else functools.partial(torch.allclose, atol=0.1, rtol=0.1)
        if not same(plain, hooked) and not plain.isnan().any():
            raise _refuse(model, "its logits change when the hook is installed without edits")
        outputs = [plain, *(call.output for call in calls)]
        if not all(_close(output[0, :-1], output[1, :-1]) for output in outputs):
            raise _refuse(
                model,
                "it is no decoder, a token sees those after it (an encoder, or a switch such "
                "as is_decoder, is_causal or use_bidirectional_attention in its configuration)",
            )
        _check_removal(model, layout, passes, ids)
        cacheable = _cache_holds(model, calls[0], passes, ids)
    return replace(
        layout, cacheable=cacheable, max_positions=max_positions, rope_switch=rope_switch(model)
    )


def _probe_ids(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Two rows of tokens that differ in the last one only; padding is none of them."""
    table = model.get_input_embeddings()
    padding = (model.config.get_text_config().pad_token_id, getattr(table, "padding_idx", None))
    usable = [token for token in range(1, table.num_embeddings) if token not in padding]
    row = [usable[i % min(3, len(usable))] for i in range(length)]
    other = next(token for token in (*usable[3:4], *usable, 0) if token != row[-1])
    return torch.tensor([row, [*row[:-1], other]], device=model.device)


class _Record:
    """An edit that keeps the calls, with their offsets, and changes nothing."""

    def __init__(self, calls: list[AttentionCall]) -> None:
        self.calls, self.offsets = calls, list[int]()

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        self.offsets.append(call.offset)
        return call.output


def equal_but_for_rounding(
    expected: torch.Tensor, found: torch.Tensor, *, also_not_finite: bool = False
) -> bool:
    """Whether tensors differ by rounding only; ``also_not_finite``: NaN is equal to its like."""
    largest = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = (expected.to(wide) - found.to(wide)).abs()
    alike = difference <= torch.finfo(expected.dtype).eps ** 0.5 * largest
    if also_not_finite:
        alike |= (expected == found) | (expected.isnan() & found.isnan())
    return bool(alike.all())


# A model that gives NaN gives it with the hook and without.
_close = functools.partial(equal_but_for_rounding, also_not_finite=True)


def _check_removal(
    model: PreTrainedModel, layout: AttentionLayout, passes: Passes, ids: torch.Tensor
) -> None:
    """With no heads left, an attention block must give the same for every token."""
    outputs: list[torch.Tensor] = []

    def note(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    with ExitStack() as stack:
        for module in layout.modules:
            stack.callback(module.register_forward_hook(note).remove)
        passes.edits = {m: [lambda call: torch.zeros_like(call.output)] for m in layout.modules}
        model(input_ids=ids, use_cache=False)
    if not all(_close(rows, rows[:1, :1].expand_as(rows)) for rows in outputs):
        raise _refuse(model, "removing all heads leaves something of them in its attention blocks")


def _cache_holds(
    model: PreTrainedModel, whole: AttentionCall, passes: Passes, ids: torch.Tensor
) -> bool:
    """Whether positions are known in a pass from a cache, and attention is that of one pass."""
    start = ids.shape[1] // 2
    record = _Record([])
    try:
        cache = model(input_ids=ids[:, :start], use_cache=True).past_key_values
        passes.edits = {module: [record] for module in passes.edits}
        model(input_ids=ids[:, start:], past_key_values=cache, use_cache=True)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False  # it has no cache, or one of another make
    right = [start] * len(passes.edits)
    # Deeper layers may differ by rounding that sends a token to another expert.
    return record.offsets == right and _close(record.calls[0].output, whole.output[:, start:])


def _layout_of(model: PreTrainedModel, calls: list[AttentionCall]) -> AttentionLayout:
    n_layers = model.config.get_text_config().num_hidden_layers
    if len(calls) != n_layers or len({id(call.module) for call in calls}) != n_layers:
        raise _refuse(model, f"the attention hook fired {len(calls)} times for {n_layers} layers")
    shapes = {tuple(call.output.shape[2:]) for call in calls}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise _refuse(model, f"its heads differ in shape from layer to layer: {sorted(shapes)}")
    n_heads, d_head = next(iter(shapes))
    return AttentionLayout(tuple(call.module for call in calls), n_heads, d_head)
