"""Work that prompts and conditions share: the prompts' common start, and the untouched layers.

All prompts of a task begin with the same description. Its keys and values are computed once and
handed to every batch (:class:`SharedStart`). Conditions do not touch the layers below their first
head: what these layers made of a batch is kept and handed on (:class:`LayerReuse`). The second is
exact to the bit; the first is the same arithmetic in another order. Both work from the outside, on
transformers' cache and on the decoder's blocks, so neither needs code per architecture. A model
that does not come through the check on a few tokens is run in full.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from transformers import Cache, DynamicCache, PreTrainedModel

from icl_helpers.attention.hook import attention_layout

__all__ = ["LayerReuse", "SharedStart", "common_start", "shares_layers", "shares_start"]


# Bytes of hidden states kept per model; what does not fit is computed again.
_KEPT_BYTES = {"cpu": 2**30, "cuda": 2**33}

_STARTS: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_LAYERS: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def common_start(rows: Sequence[list[int]]) -> int:
    """Number of tokens that all rows begin with."""
    first, last = min(rows), max(rows)  # rows between these two in order share what they share
    length = min(len(first), len(last))
    return next((i for i in range(length) if first[i] != last[i]), length)


class SharedStart:
    """Keys and values of tokens that every prompt begins with.

    Made inside :func:`icl_helpers.intervene`, they are those of the intervened model.
    """

    def __init__(self, model: PreTrainedModel, ids: Int[torch.Tensor, "1 tokens"]) -> None:
        self.length = ids.shape[1]
        self._cache = DynamicCache(config=model.config)
        model.base_model(
            input_ids=ids.to(model.device), past_key_values=self._cache, use_cache=True
        )

    def arguments(self, n_rows: int) -> dict[str, Any]:
        """Arguments for a forward pass over the rest of ``n_rows`` prompts."""
        # A forward pass writes into its cache, so each has its own.
        cache: Cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(n_rows)
        return {"past_key_values": cache, "use_cache": True}


class LayerReuse:
    """Hidden states of batches, kept below the layers at which conditions begin to differ.

    ``wanted`` are the layers whose inputs are worth keeping, none of them 0, which has nothing
    below it. The model was found to give the same logits from them.
    """

    def __init__(self, model: PreTrainedModel, *, max_bytes: int | None = None) -> None:
        self._model = model
        self._left = _KEPT_BYTES.get(model.device.type, 2**30) if max_bytes is None else max_bytes
        self._budget = self._left
        self._kept: dict[tuple[bytes, int], torch.Tensor] = {}
        self.wanted: tuple[int, ...] = ()

    def want(self, layers: Collection[int]) -> None:
        """Set ``wanted``; to be called outside :func:`icl_helpers.intervene`."""
        useful = sorted(layer for layer in layers if layer > 0)
        self.wanted = tuple(useful) if useful and shares_layers(self._model) else ()

    def forget(self) -> None:
        """Drop what is kept."""
        self._kept.clear()
        self._left = self._budget

    @contextmanager
    def around(self, key: bytes, first_layer: int) -> Iterator[None]:
        """Run one forward pass over the batch named ``key``, untouched below ``first_layer``.

        Layers below the deepest kept state that holds for this pass are not run; states that are
        wanted and not kept yet are kept.
        """
        usable = [layer for layer in self.wanted if layer <= first_layer]
        if not usable:
            yield
            return
        blocks = _blocks(self._model)
        known = max((layer for layer in usable if (key, layer) in self._kept), default=0)
        seen: dict[int, torch.Tensor] = {}
        with ExitStack() as stack:
            if known:
                stack.enter_context(_starting_at(blocks, known, self._kept[key, known]))
            stack.enter_context(
                _recording(blocks, [layer for layer in usable if layer > known], seen)
            )
            yield
        for layer, states in seen.items():
            size = states.numel() * states.element_size()
            if size <= self._left:
                self._kept[key, layer] = states
                self._left -= size


def shares_start(model: PreTrainedModel) -> bool:
    """Whether the model gives the same logits when its first tokens come from a cache."""
    if model not in _STARTS:
        _STARTS[model] = _holds(_cached_start_holds, model)
    return _STARTS[model]


def shares_layers(model: PreTrainedModel) -> bool:
    """Whether the model gives the same logits when its lower layers are skipped."""
    if model not in _LAYERS:
        _LAYERS[model] = _holds(_skipped_layers_hold, model)
    return _LAYERS[model]


def _holds(check: Any, model: PreTrainedModel) -> bool:
    try:
        with torch.inference_mode():
            return bool(check(model))
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError):
        # A decoder of another make: sharing is a saving, not a need.
        return False


def _probe_ids(model: PreTrainedModel) -> torch.Tensor:
    return torch.tensor([[1, 2, 1, 3, 2, 1], [1, 2, 1, 2, 3, 3]], device=model.device)


def _cached_start_holds(model: PreTrainedModel) -> bool:
    ids = _probe_ids(model)
    whole = model(input_ids=ids, use_cache=False).logits[:, 3:].float()
    start = SharedStart(model, ids[:1, :3])
    rest = model(input_ids=ids[:, 3:], **start.arguments(2)).logits.float()
    # Rounding in another order, far from what a wrong mask or position would do.
    slack = torch.finfo(model.dtype).eps ** 0.5 * float(whole.abs().max())
    return torch.allclose(whole, rest, rtol=0, atol=slack)


def _skipped_layers_hold(model: PreTrainedModel) -> bool:
    blocks = _blocks(model)
    ids = _probe_ids(model)
    for layer in {1, len(blocks) - 1} - {0}:
        seen: dict[int, torch.Tensor] = {}
        with _recording(blocks, [layer], seen):
            whole = model(input_ids=ids, use_cache=False).logits
        with _starting_at(blocks, layer, seen[layer]):
            above = model(input_ids=ids, use_cache=False).logits
        if not torch.equal(whole, above):
            return False
    return len(blocks) > 1


def _blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder block around each attention module, from the first layer to the last."""
    parents = {child: module for module in model.modules() for child in module.children()}
    return [parents[attention] for attention in attention_layout(model).modules]


@contextmanager
def _recording(
    blocks: Sequence[torch.nn.Module], layers: Collection[int], into: dict[int, torch.Tensor]
) -> Iterator[None]:
    """Note the input of each of these layers: the output of the block below it."""

    def note(layer: int, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            into[layer] = output

    handles = [
        blocks[layer - 1].register_forward_hook(
            lambda _module, _args, output, layer=layer: note(layer, output)
        )
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _starting_at(
    blocks: Sequence[torch.nn.Module], layer: int, states: torch.Tensor
) -> Iterator[None]:
    """Skip the blocks below ``layer``: each of them hands on ``states``."""
    skipped = blocks[:layer]
    # accelerate puts a forward of its own on a module; that one comes back afterwards.
    before = [block.__dict__.get("forward") for block in skipped]
    try:
        for block in skipped:
            block.forward = lambda *_args, **_kwargs: states
        yield
    finally:
        for block, forward in zip(skipped, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
