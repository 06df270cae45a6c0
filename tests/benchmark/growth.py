"""How the cost of an intervened pass grows: with prompt length, batch, heads and conditions."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.heads import Head
from icl_helpers.attention.interventions import AttentionKnockout, ZeroAblation, intervene
from icl_helpers.evaluation.conditions import FULL, Condition
from icl_helpers.evaluation.evaluate import evaluate
from tests.benchmark.tools import (
    BATCH,
    FRACTION,
    SHOTS,
    TASK,
    alternate,
    prompt_batch,
    spread_heads,
)

__all__ = ["measure_growth"]


_SHOTS = (0, 5, 10, 20, 40)
_BATCHES = (1, 4, 16, 32)
_SHARES = (0.02, 0.1, 0.25, 0.5, 1.0)
_CONDITIONS = (1, 2, 4, 8)


def measure_growth(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, rounds: int = 3
) -> list[dict[str, Any]]:
    """Points of four curves, each with ``axis``, ``at``, ``kind`` (the line) and ``cost``.

    ``cost`` is the ratio to a plain forward pass of the same batch; along ``conditions`` it is the
    time of ``evaluate`` over that for the full model alone.
    """
    with torch.inference_mode():
        found = list(_forward_points(model, tokenizer, rounds))
    return found + _condition_points(model, tokenizer, rounds)


def _forward_points(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rounds: int
) -> Iterator[dict[str, Any]]:
    total = model.config.num_hidden_layers * model.config.num_attention_heads
    few = len(spread_heads(model))
    cases: list[tuple[str, float, int, int, int]] = []
    cases += [("tokens per prompt", shots, shots, BATCH, few) for shots in _SHOTS]
    cases += [("prompts per batch", size, SHOTS, size, few) for size in _BATCHES]
    cases += [
        ("share of heads", share, SHOTS, BATCH, max(1, round(share * total))) for share in _SHARES
    ]
    for axis, at, shots, size, number in cases:
        ids, blocked = prompt_batch(tokenizer, shots=shots, size=size)
        heads = spread_heads(model, number)
        place = ids.shape[1] if axis == "tokens per prompt" else at
        for kind, intervention in (
            ("zero ablation", ZeroAblation(heads)),
            ("knockout", AttentionKnockout(heads, blocked)),
        ):
            cost = _ratio(model, ids, intervention, rounds)
            yield {"axis": axis, "at": place, "kind": kind, "cost": cost}


def _ratio(model: PreTrainedModel, ids: torch.Tensor, intervention: Any, rounds: int) -> float:
    def plain() -> None:
        model(input_ids=ids, use_cache=False)

    def edited() -> None:
        with intervene(model, intervention):
            plain()

    return statistics.median(b / a for a, b in alternate(plain, edited, rounds))


def _condition_points(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rounds: int
) -> list[dict[str, Any]]:
    """Time of the full model and further conditions, whose heads leave few or many layers alone."""
    last = model.config.num_hidden_layers - 1
    places = {"heads in the last layer": [Head(last, 0)], "heads spread": spread_heads(model, 4)}
    points = []
    for kind, heads in places.items():
        for number in _CONDITIONS:
            alone, together = (_evaluation(model, tokenizer, heads, n) for n in (1, number))
            cost = statistics.median(b / a for a, b in alternate(alone, together, rounds))
            points.append({"axis": "conditions", "at": number, "kind": kind, "cost": cost})
    return points


def _evaluation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heads: list[Head], number: int
) -> Callable[[], Any]:
    """The full model and ``number - 1`` conditions on one batch of prompts."""
    edited = [
        Condition("random_heads", "zero", FRACTION, seed, heads=tuple(heads))
        for seed in range(number - 1)
    ]
    return functools.partial(
        evaluate, model, tokenizer, tasks=[TASK], shots=SHOTS, seeds=[42], limit=BATCH,
        conditions=[FULL, *edited], batch_size=BATCH,
    )  # fmt: skip
