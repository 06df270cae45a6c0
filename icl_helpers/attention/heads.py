"""Attention heads: naming them, ranking them, and drawing random controls (paper, section 3)."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float

from icl_helpers.errors import InputError

__all__ = [
    "CONTROLS", "DRAWS", "SCORE_THRESHOLD", "Head", "any_layer_heads", "check_fraction", "doses",
    "head_count", "head_fractions", "heads_in_words", "layer_matched_heads", "random_heads",
    "strict_sets", "top_heads",
]  # fmt: skip


class Head(NamedTuple):
    """One attention head: zero-based ``layer`` and zero-based ``head`` within the layer."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}"


def check_fraction(fraction: float) -> float:
    """Return ``fraction`` as a float, or raise :class:`InputError` unless it lies in (0, 1]."""
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise InputError(f"fraction must be a number in (0, 1], got {fraction!r}")
    if not 0 < fraction <= 1:
        raise InputError(
            f"fraction must lie in (0, 1], got {fraction}; 0.01 means one head in a hundred"
        )
    return float(fraction)


def head_count(n_total: int, fraction: float) -> int:
    """``ceil(n_total * fraction)`` heads (paper, section 3): 7 for 0.07 of 100, and not 8."""
    return math.ceil(round(n_total * check_fraction(fraction), 9))


def heads_in_words(fraction: float, n_total: int) -> str:
    """Say how many heads a fraction is: 0.02 of 64 is "2 of 64 heads (3.1 %)".

    The count is that of :func:`top_heads`, the share is of the count: rounding up makes it larger
    than the fraction asked for.
    """
    count = head_count(n_total, fraction)
    # Half a tenth is rounded up, as a reader does: 6.25 is 6.3.
    tenths = math.floor(1000 * count / n_total + 0.5)
    return f"{count} of {n_total:,} heads ({tenths / 10:.1f} %)"


def top_heads(scores: Float[torch.Tensor, "layers heads"], fraction: float) -> list[Head]:
    """The ``ceil(layers x heads x fraction)`` heads with the highest score, highest first.

    Ties go to the lower layer, then to the lower head. Raises :class:`InputError` for a fraction
    outside (0, 1], scores that are not two-dimensional, or scores that are not finite.
    """
    scores = torch.as_tensor(scores)
    if scores.ndim != 2:
        raise InputError(
            f"scores must have shape [layers, heads], got {list(scores.shape)}; average over the "
            f"sequences first: scores.mean(0)"
        )
    if not torch.isfinite(scores).all():
        raise InputError("scores hold NaN or infinity; the model's attention was not finite")
    order = torch.argsort(scores.flatten(), descending=True, stable=True)
    highest = order[: head_count(scores.numel(), fraction)].tolist()
    return [Head(*divmod(index, scores.shape[1])) for index in highest]


def random_heads(
    like: Iterable[Head | tuple[int, int]],
    n_heads: int,
    *,
    seed: int,
    exclude: Iterable[Head | tuple[int, int]] = (),
) -> list[Head]:
    """Random control: as many heads in every layer as ``like`` has there (paper, section 3).

    Parameters
    ----------
    like
        The induction heads, highest score first; layers are visited in order of first appearance.
    n_heads
        Heads per layer of the model.
    seed
        Seed of ``random.Random``; the paper's ablation seeds are 42, 43 and 44.
    exclude
        Heads that may not be drawn. Empty is the published control, which may draw induction
        heads again; pass the induction heads for the strict control.

    Raises
    ------
    InputError
        A layer has fewer heads left than are asked for; :func:`layer_matched_heads` then borrows
        from neighbouring layers instead.
    """
    drawn, missing = _draw_per_layer(like, n_heads, seed=seed, exclude=exclude)
    if missing:
        layer, count = next(iter(missing.items()))
        raise InputError(
            f"layer {layer} has too few heads for this control: {count} more than it holds are "
            f"asked for once {len(set(map(tuple, exclude)))} heads are excluded. Use a smaller "
            f"fraction, exclude fewer heads, or layer_matched_heads(), which borrows from "
            f"neighbouring layers."
        )
    return drawn


def layer_matched_heads(
    like: Sequence[Head | tuple[int, int]],
    n_heads: int,
    n_layers: int,
    *,
    seed: int,
    exclude: Iterable[Head | tuple[int, int]] = (),
) -> tuple[list[Head], list[Head]]:
    """Strict control: like :func:`random_heads`, but a full layer borrows from its neighbours.

    Returns ``(heads, borrowed)``; ``borrowed`` lists the heads of ``heads`` that lie in a layer
    other than the one they stand for: the nearest layer with a free head, the lower one first.
    """
    excluded = {Head(*head) for head in exclude}
    drawn, missing = _draw_per_layer(like, n_heads, seed=seed, exclude=excluded)
    taken = excluded | set(drawn)
    generator = random.Random(f"{seed}-borrowed")
    borrowed: list[Head] = []
    for layer, count in missing.items():
        for neighbour in sorted(range(n_layers), key=lambda n: (abs(n - layer), n)):
            free = [Head(neighbour, h) for h in range(n_heads) if Head(neighbour, h) not in taken]
            heads = generator.sample(free, min(count, len(free)))
            taken.update(heads)
            borrowed += heads
            count -= len(heads)
        if count:
            raise InputError(
                f"the model has too few heads for a strict control of {len(like)} heads; use a "
                f"smaller fraction"
            )
    return drawn + borrowed, borrowed


# Random sets a dose: the least with which a permutation test can reach 5 %.
DRAWS = 20


def doses(n_removed: int, n_heads: int | None = None) -> list[int]:
    """Numbers of heads to remove: 1, 2, 4, ... up to twice ``n_removed``, never all ``n_heads``."""
    if n_removed < 1:
        raise InputError(f"n_removed must be >= 1, got {n_removed}")
    most = 2 * n_removed if n_heads is None else min(2 * n_removed, n_heads - 1)
    return [2**power for power in range(max(1, most).bit_length())]


def strict_sets(
    like: Sequence[Head], n_layers: int, n_heads: int, *, draws: int = DRAWS, seed: int = 0
) -> tuple[list[tuple[Head, ...]], int | None]:
    """Distinct sets with as many heads in every layer as ``like``, and none of it; how many exist.

    All of them where there are no more than ``draws``, else so many drawn by
    :func:`layer_matched_heads` with the seeds from ``seed`` on. Where a layer has too
    few other heads they come from the nearest layers, and the sets are drawn and not counted.
    Raises :class:`InputError` where the model has too few heads.
    """
    per_layer = Counter(head.layer for head in like)
    free = {
        layer: [Head(layer, h) for h in range(n_heads) if Head(layer, h) not in set(like)]
        for layer in per_layer
    }
    distinct = math.prod(math.comb(len(free[layer]), n) for layer, n in per_layer.items())
    if 0 < distinct <= draws:
        by_layer = [itertools.combinations(free[layer], n) for layer, n in per_layer.items()]
        return [tuple(itertools.chain(*parts)) for parts in itertools.product(*by_layer)], distinct
    sets: dict[frozenset[Head], tuple[Head, ...]] = {}
    # Where sets are not counted there may be fewer than draws: the search ends.
    for number in itertools.count(seed) if distinct else range(seed, seed + 20 * draws):
        heads, _ = layer_matched_heads(like, n_heads, n_layers, seed=number, exclude=like)
        sets.setdefault(frozenset(heads), tuple(heads))
        if len(sets) == draws:
            break
    return list(sets.values()), distinct or None


def any_layer_heads(count: int, n_layers: int, n_heads: int, *, seed: int) -> list[Head]:
    """Control of the zero ablation: heads of any layer but the last (paper, appendix A.5).

    Every head of those layers is as likely as any other, induction heads included. Raises
    :class:`InputError` when they hold fewer than ``count``.
    """
    heads = [Head(layer, head) for layer in range(n_layers - 1) for head in range(n_heads)]
    if count > len(heads):
        raise InputError(
            f"{count} heads are asked for, but the layers before the last hold {len(heads)}; use "
            f"a smaller fraction"
        )
    return random.Random(seed).sample(heads, count)


def _draw_per_layer(
    like: Iterable[Head | tuple[int, int]],
    n_heads: int,
    *,
    seed: int,
    exclude: Iterable[Head | tuple[int, int]],
) -> tuple[list[Head], dict[int, int]]:
    """Draw layer by layer; also return how many heads each layer could not supply."""
    heads = [Head(*head) for head in like]
    for head in heads:
        if not 0 <= head.head < n_heads:
            raise InputError(f"head {head} is out of range: layers have heads 0..{n_heads - 1}")
    excluded = {Head(*head) for head in exclude}
    generator = random.Random(seed)
    drawn: list[Head] = []
    missing: dict[int, int] = {}
    for layer, count in Counter(head.layer for head in heads).items():
        free = [h for h in range(n_heads) if Head(layer, h) not in excluded]
        size = min(count, len(free))
        # `sample` on a list and on a range of equal length draws the same indices, so without
        # exclusions this is the published `sample(range(heads), k)`.
        drawn += [Head(layer, h) for h in generator.sample(free, size)]
        if size < count:
            missing[layer] = count - size
    return drawn, missing


CONTROLS = ("published", "strict", "any_layer")

SCORE_THRESHOLD = 0.3


def head_fractions(scores: torch.Tensor) -> dict[str, float]:
    """Fractions fixed before any ablation: the share of heads scoring 0.3 or more, and a third.

    This is the rule behind the paper's 3 % on Llama-3-8B (paper, section 2). ``scores`` are
    [layers, heads]. Raises :class:`InputError` when no head reaches the threshold.
    """
    n_heads = int((scores >= SCORE_THRESHOLD).sum())
    if n_heads == 0:
        raise InputError(
            f"no head scores {SCORE_THRESHOLD} or more; the model has no induction heads"
        )
    larger = n_heads / scores.numel()
    return {"larger": larger, "smaller": larger / 3}
