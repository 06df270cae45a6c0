"""Work that prompts, labels and conditions share: common starts, contexts and untouched layers.

All prompts of a task begin with the same description. Its keys and values are computed once and
handed to every batch (:class:`SharedStart`). Conditions do not touch the layers below their first
head: what these layers made of a batch is kept and handed on (:class:`LayerReuse`). The labels of a
prompt branch off its context (:mod:`icl_helpers.attention.passes`). Kept layers are exact to the
bit; the others are the same arithmetic in another order. All work from the outside, on
transformers' cache and masks and on the decoder's blocks, so none needs code per architecture. A
model that does not come through the check on a few tokens is run in full.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from transformers import Cache, DynamicCache, PreTrainedModel

from icl_helpers.attention.heads import Head
from icl_helpers.attention.hook import attention_layout, equal_but_for_rounding
from icl_helpers.attention.interventions import (
    AttentionKnockout,
    Intervention,
    MeanAblation,
    ZeroAblation,
    intervene,
)
from icl_helpers.attention.passes import Branches, forget_lengths

__all__ = [
    "Encoded", "LayerReuse", "SharedStart", "common_start", "scored_logits", "shares_context",
    "shares_layers", "shares_start",
]  # fmt: skip

# lm-eval's form of a tokenised request: the two strings, the context's and the label's token ids.
Encoded = tuple[tuple[str, str], list[int], list[int]]

# Bytes of hidden states kept per model; what does not fit is computed again.
_KEPT_BYTES = {"cpu": 2**30, "cuda": 2**33}

# Tokens of a check: enough to leave a sliding window behind, where that is affordable.
_SHORT_PROBE, _LONG_PROBE = 6, 160

# What was found out about a model, by the name of the check.
_OUTCOMES: WeakKeyDictionary[PreTrainedModel, dict[str, bool]] = WeakKeyDictionary()


def common_start(rows: Sequence[list[int]]) -> int:
    """Number of tokens that all rows begin with."""
    first, last = min(rows), max(rows)  # rows between these two in order share what they share
    length = min(len(first), len(last))
    return next((i for i in range(length) if first[i] != last[i]), length)


class SharedStart:
    """Keys and values of what every prompt begins with, as the model made them, edited or not."""

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
        """Run one pass over the batch named ``key``, from the deepest state kept for it.

        It is untouched below ``first_layer``; states that are wanted there are kept.
        """
        usable = [layer for layer in self.wanted if layer <= first_layer]
        if not usable:
            yield
            return
        blocks = _blocks(self._model)
        known = max((layer for layer in usable if (key, layer) in self._kept), default=0)
        new = [layer for layer in usable if layer > known]
        with ExitStack() as stack:
            if known:
                stack.enter_context(_starting_at(blocks, known, self._kept[key, known]))
            seen = stack.enter_context(_recording(blocks, new))
            yield
        for layer, states in seen.items():
            size = states.numel() * states.element_size()
            if size <= self._left:
                self._kept[key, layer] = states
                self._left -= size


def scored_logits(
    model: PreTrainedModel,
    ids: Int[torch.Tensor, "batch columns"],
    columns: Int[torch.Tensor, "batch scored"],
    *,
    start: SharedStart | None = None,
    branches: Branches | None = None,
) -> Float[torch.Tensor, "batch scored vocabulary"]:
    """Logits of each row's own columns; the output projection is computed for no others.

    Rows are padded on the right, begin with ``start`` and have these ``branches``, which need the
    hooked attention of :func:`icl_helpers.intervene`. Columns are gathered in front of the
    projection, so that whatever the model does to logits (soft-capping, scaling) is done to these.
    """
    forget_lengths(model)
    skipped = 0 if start is None else start.length
    cache = {"use_cache": False} if start is None else start.arguments(len(ids))
    rows, places = torch.arange(len(ids))[:, None], columns - skipped
    gathered = False

    def gather(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal gathered
        gathered = True
        return (args[0][rows, places], *args[1:])

    with ExitStack() as stack:
        projection = model.get_output_embeddings()
        if projection is not None:
            stack.callback(projection.register_forward_pre_hook(gather).remove)
        if branches is not None:
            stack.enter_context(branches.applied())
            cache |= branches.arguments(skipped)
        # Padding lies to the right of every scored column, so causality hides it and no attention
        # mask is needed.
        logits = model(input_ids=ids[:, skipped:].to(model.device), **cache).logits
    return logits if gathered else logits[rows, places]


def shares_start(model: PreTrainedModel) -> bool:
    """Whether the model gives the same logits when its first tokens come from a cache."""

    def check() -> bool:
        ids = _probe_ids(model)
        length = ids.shape[1] - 3
        whole = model(input_ids=ids, use_cache=False).logits[:, length:]
        start = SharedStart(model, ids[:1, :length])
        rest = model(input_ids=ids[:, length:], **start.arguments(2)).logits
        return equal_but_for_rounding(whole, rest)

    return _holds(model, "start", check)


def shares_context(model: PreTrainedModel, ablation: str) -> bool:
    """Whether branches of a context have the logits of sequences of their own, so ablated."""
    return _holds(model, f"context, {ablation}", lambda: _branches_hold(model, ablation))


def shares_layers(model: PreTrainedModel) -> bool:
    """Whether the model gives the same logits when its lower layers are skipped."""

    def check() -> bool:
        blocks = _blocks(model)
        ids = _probe_ids(model)[:, -_SHORT_PROBE:]
        for layer in {1, len(blocks) - 1} - {0}:
            with _recording(blocks, [layer]) as seen:
                whole = model(input_ids=ids, use_cache=False).logits
            with _starting_at(blocks, layer, seen[layer]):
                above = model(input_ids=ids, use_cache=False).logits
            if not torch.equal(whole, above):
                return False
        return len(blocks) > 1

    return _holds(model, "layers", check)


def _holds(model: PreTrainedModel, name: str, check: Callable[[], bool]) -> bool:
    """The outcome of a check, which is made once for a model."""
    outcomes = _OUTCOMES.setdefault(model, {})
    if name not in outcomes:
        try:
            with torch.inference_mode():
                outcomes[name] = check()
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError):
            # A decoder of another make: sharing is a saving, not a need.
            outcomes[name] = False
    return outcomes[name]


def _probe_ids(model: PreTrainedModel) -> Int[torch.Tensor, "2 tokens"]:
    """Two rows that differ in their last three tokens only."""
    # Three tokens, two more than a cache keeps of a window, and the three that differ.
    beyond = (getattr(model.config.get_text_config(), "sliding_window", None) or 0) + 5
    length = beyond if _SHORT_PROBE < beyond <= _LONG_PROBE else _SHORT_PROBE
    start = [1 + number * number % 7 % 3 for number in range(length - 3)]
    return torch.tensor([[*start, 3, 2, 1], [*start, 2, 3, 3]], device=model.device)


def _branches_hold(model: PreTrainedModel, ablation: str) -> bool:
    """Two contexts of different lengths, each with a branch of one token and one of two."""
    ids = _probe_ids(model)
    shared = ids.shape[1] - 3
    contexts = [ids[0], ids[1, :-1]]
    labels = ids.new_tensor([1]), ids.new_tensor([2, 3])
    # A context's last column, and then those of the label; the branches stand side by side.
    ends = [len(context) - 1 for context in contexts]
    apart = _padded([torch.cat([context, label]) for label in labels for context in contexts])
    columns = torch.tensor([[end + step for step in (0, 1, n)] for n in (1, 2) for end in ends])
    with intervene(model, *_probe_edits(model, ablation, shared, ends * 2)):
        short, long = scored_logits(model, apart, columns).split(2)
    expected = torch.cat([short[:, :2], long[:, 1:]], dim=1)

    together = _padded([torch.cat([context, *labels]) for context in contexts])
    branches = Branches.of([(len(context), (1, 2)) for context in contexts], model.device)
    columns = torch.tensor([[end + step for step in range(4)] for end in ends])
    edits = _probe_edits(model, ablation, shared, ends)
    start = None
    if shares_start(model):
        with intervene(model, *([] if ablation == "knockout" else edits)):
            start = SharedStart(model, ids[:1, :shared])
    with intervene(model, *edits):
        return all(
            equal_but_for_rounding(
                expected, scored_logits(model, together, columns, start=s, branches=branches)
            )
            for s in {None, start}
        )


def _probe_edits(
    model: PreTrainedModel, ablation: str, shared: int, ends: Sequence[int]
) -> list[Intervention]:
    """Edits of one head a layer by this ablation, with means or blocked pairs made up for it."""
    layout = attention_layout(model)
    n_layers, n_heads, d_head = layout.n_layers, layout.n_heads, layout.d_head
    heads = tuple(Head(layer, layer % n_heads) for layer in range(n_layers))
    width = max(ends) + 4  # the longest context and its branches
    means = torch.arange(n_layers * width * n_heads * d_head).sin()
    blocked = torch.zeros(len(ends), width, width, dtype=torch.bool)
    for row, end in enumerate(ends):
        # As in a prompt, tokens of the shared start and of labels keep all their keys.
        blocked[row, shared : end + 1, :shared:2] = True
    kinds: dict[str, list[Intervention]] = {
        "none": [],
        "zero": [ZeroAblation(heads)],
        "mean": [MeanAblation(heads, means.view(n_layers, width, n_heads, d_head))],
        "knockout": [AttentionKnockout(heads, blocked.to(model.device))],
    }
    return kinds[ablation]


def _padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder block around each attention module, from the first layer to the last."""
    parents = {child: module for module in model.modules() for child in module.children()}
    return [parents[attention] for attention in attention_layout(model).modules]


@contextmanager
def _recording(
    blocks: Sequence[torch.nn.Module], layers: Collection[int]
) -> Iterator[dict[int, torch.Tensor]]:
    """Note the input of each of these layers: the output of the block below it."""
    seen: dict[int, torch.Tensor] = {}
    below = {blocks[layer - 1]: layer for layer in layers}

    def note(block: torch.nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            seen[below[block]] = output

    with ExitStack() as stack:
        for block in below:
            stack.callback(block.register_forward_hook(note).remove)
        yield seen


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
