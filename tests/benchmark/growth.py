"""How the cost of an intervened pass grows: with prompt length, batch, heads and conditions."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.heads import Head
from icl_helpers.attention.interventions import AttentionKnockout, ZeroAblation
from icl_helpers.evaluation.conditions import FULL, Condition
from tests.benchmark.evaluation import our_evaluation
from tests.benchmark.tools import (
    BATCH,
    FRACTION,
    SHOTS,
    forward,
    prompt_batch,
    ratios,
    spread_heads,
)

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
        points = list(_forward_points(model, tokenizer, rounds))
    return [*points, *_condition_points(model, tokenizer, rounds)]


def _forward_points(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rounds: int
) -> Iterator[dict[str, Any]]:
    total = model.config.num_hidden_layers * model.config.num_attention_heads
    numbers = {share: max(1, round(share * total)) for share in _SHARES}
    # Axis, shots, prompts a batch, heads (None: 3 % of all), and the place on the axis.
    cases = [
        *(("tokens per prompt", shots, BATCH, None, None) for shots in _SHOTS),
        *(("prompts per batch", SHOTS, size, None, size) for size in _BATCHES),
        *(("share of heads", SHOTS, BATCH, number, share) for share, number in numbers.items()),
    ]
    for axis, shots, size, number, at in cases:
        ids, blocked = prompt_batch(tokenizer, shots=shots, size=size)
        heads = spread_heads(model, number)
        at = ids.shape[1] if at is None else at
        for kind, intervention in (
            ("zero ablation", ZeroAblation(heads)),
            ("knockout", AttentionKnockout(heads, blocked)),
        ):
            costs = ratios(forward(model, ids), forward(model, ids, intervention), rounds)
            yield {"axis": axis, "at": at, "kind": kind, "cost": statistics.median(costs)}


def _condition_points(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rounds: int
) -> Iterator[dict[str, Any]]:
    """Time of the full model and further conditions, whose heads leave few or many layers alone."""
    last = model.config.num_hidden_layers - 1
    lines = {"heads in the last layer": [Head(last, 0)], "heads spread": spread_heads(model, 4)}
    for kind, heads in lines.items():
        edited = [
            Condition("random_heads", "zero", FRACTION, seed, heads=tuple(heads))
            for seed in range(max(_CONDITIONS) - 1)
        ]
        runs = {
            number: our_evaluation(
                model, tokenizer, conditions=[FULL, *edited[: number - 1]], limit=BATCH,
                batch_size=BATCH,
            )
            for number in _CONDITIONS
        }  # fmt: skip
        for number, run in runs.items():
            cost = statistics.median(ratios(runs[1], run, rounds))
            yield {"axis": "conditions", "at": number, "kind": kind, "cost": cost}
