"""Prompts per second of the evaluation beside stock lm-eval, and the cost of building prompts."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.induction_pattern import induction_patterns
from icl_helpers.attention.scores import prefix_matching_scores, random_sequences
from icl_helpers.evaluation.conditions import Condition, conditions
from icl_helpers.evaluation.evaluate import evaluate
from icl_helpers.tasks.lm_eval_task import load_task
from icl_helpers.tasks.prompts import build_prompts
from icl_helpers.tasks.specs import task_names
from tests.benchmark.tools import (
    BATCH,
    FRACTION,
    SHOTS,
    TASK,
    alternate,
    ratio_row,
    seconds,
    spread_heads,
)

__all__ = ["evaluation_rows", "prompt_rows", "stock_scorer"]


_SEEDS = (42, 43, 44)
_DOCUMENTS = 500


def prompt_rows(tokenizer: PreTrainedTokenizerBase, rounds: int) -> list[dict[str, Any]]:
    """Seconds for all prompts, tokens and blocked pairs of one task x shots x three seeds."""
    rows = []
    for task, shots in ((TASK, SHOTS), ("wordseq1_binary", SHOTS), ("wordseq2_4way", 20)):

        def build(task: str = task, shots: int = shots) -> None:
            for seed in _SEEDS:
                prompts = build_prompts(task, shots=shots, seed=seed)[:_DOCUMENTS]
                induction_patterns([prompt.context for prompt in prompts], tokenizer)

        build()
        what = f"prompts and patterns of {task}, {shots} shots, 3 seeds, {_DOCUMENTS} documents"
        taken = [seconds(build) for _ in range(rounds)]
        rows.append(ratio_row(what, "-", 1.0, taken, unit="seconds"))
    return rows


def stock_scorer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int) -> Any:
    """lm-eval's own ``hf`` model around the same weights."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch, add_bos_token=False,
        max_length=model.config.max_position_embeddings,
    )  # fmt: skip


def evaluation_rows(
    shape: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rounds: int
) -> list[dict[str, Any]]:
    """Prompts per second of ablated ``evaluate`` over those of stock lm-eval, un-ablated.

    Once for one task under one condition, once for the ten-shot prompts of all abstract tasks under
    the conditions of Table 1 at 3 %, heads chosen by their scores.
    """
    one = Condition("induction_heads", "zero", FRACTION, heads=tuple(spread_heads(model)))
    scores = prefix_matching_scores(model, random_sequences(tokenizer, n_sequences=2)).mean(0)
    grid = conditions(
        scores, fractions=(FRACTION,), ablations=("zero", "knockout"), ablation_seeds=(42,),
        full=False,
    )  # fmt: skip
    cases = (
        ("prompts per second, one condition / stock lm-eval", (TASK,), 2 * BATCH, [one]),
        ("prompts per second, Table 1 grid / stock lm-eval", task_names("abstract"), BATCH, grid),
    )
    return [
        _evaluation_row(what, shape, model, tokenizer, rounds, tuple(tasks), limit, chosen)
        for what, tasks, limit, chosen in cases
    ]


def _evaluation_row(
    what: str,
    shape: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rounds: int,
    tasks: tuple[str, ...],
    limit: int,
    chosen: list[Condition],
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    stock = stock_scorer(model, tokenizer, BATCH)

    def baseline() -> None:
        for name in tasks:
            task: Any = load_task(name, shots=SHOTS, seed=42)
            simple_evaluate(stock, tasks=[task], limit=limit, bootstrap_iters=0, verbosity="ERROR")

    def ours() -> None:
        evaluate(
            model, tokenizer, tasks=tasks, shots=SHOTS, conditions=chosen, seeds=[42], limit=limit,
            batch_size=BATCH,
        )  # fmt: skip

    # Ours scores every prompt once a condition, stock lm-eval once.
    values = [len(chosen) * a / b for a, b in alternate(baseline, ours, rounds)]
    return ratio_row(what, shape, 2.0, values, at="least")
