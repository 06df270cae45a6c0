"""Prompts per second of the evaluation beside stock lm-eval, and the cost of building prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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

_SEEDS = (42, 43, 44)
_DOCUMENTS = 500


def prompt_rows(tokenizer: PreTrainedTokenizerBase, rounds: int) -> list[dict[str, Any]]:
    """Seconds for all prompts, tokens and blocked pairs of one task x shots x three seeds."""

    def build(task: str, shots: int) -> None:
        for seed in _SEEDS:
            prompts = build_prompts(task, shots=shots, seed=seed)[:_DOCUMENTS]
            induction_patterns([prompt.context for prompt in prompts], tokenizer)

    rows = []
    for task, shots in ((TASK, SHOTS), ("wordseq1_binary", SHOTS), ("wordseq2_4way", 20)):
        build(task, shots)
        what = f"prompts and patterns of {task}, {shots} shots, 3 seeds, {_DOCUMENTS} documents"
        taken = [seconds(functools.partial(build, task, shots)) for _ in range(rounds)]
        rows.append(ratio_row(what, "-", 1.0, taken, unit="seconds"))
    return rows


def zero_ablation(model: PreTrainedModel) -> Condition:
    """3 % of the heads, spread over the layers, set to zero."""
    return Condition("induction_heads", "zero", FRACTION, heads=tuple(spread_heads(model)))


def our_evaluation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> Callable[[], Any]:
    """``evaluate`` of ten-shot prompts of one task, if ``options`` name no others, to be called."""
    options = {"tasks": [TASK], "shots": SHOTS, "seeds": [42], **options}
    return functools.partial(evaluate, model, tokenizer, **options)


def stock_evaluation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = (TASK,),
    limit: int,
    batch_size: int,
) -> Callable[[], None]:
    """The same prompts by lm-eval's own ``hf`` model around the same weights, to be called."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    stock = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False,
        max_length=model.config.max_position_embeddings,
    )  # fmt: skip
    # Without one it would read the thousands of tasks of its own at every call, for seconds.
    manager = TaskManager(include_defaults=False)

    def run() -> None:
        for name in tasks:
            task: Any = load_task(name, shots=SHOTS, seed=42)
            simple_evaluate(
                stock, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0,
                verbosity="ERROR",
            )  # fmt: skip

    return run


def evaluation_rows(
    shape: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rounds: int
) -> list[dict[str, Any]]:
    """Prompts per second of ablated ``evaluate`` over those of stock lm-eval, un-ablated.

    Once for one task under one condition, once for the ten-shot prompts of all abstract tasks under
    the conditions of Table 1 at 3 %, heads chosen by their scores.
    """
    scores = prefix_matching_scores(model, random_sequences(tokenizer, n_sequences=2)).mean(0)
    grid = conditions(
        scores, fractions=(FRACTION,), ablations=("zero", "knockout"), ablation_seeds=(42,),
        full=False,
    )  # fmt: skip
    rows = []
    for what, tasks, limit, chosen in (
        ("one condition", [TASK], 2 * BATCH, [zero_ablation(model)]),
        ("Table 1 grid", task_names("abstract"), BATCH, grid),
    ):
        stock = stock_evaluation(model, tokenizer, tasks=tasks, limit=limit, batch_size=BATCH)
        ours = our_evaluation(
            model, tokenizer, tasks=tasks, conditions=chosen, limit=limit, batch_size=BATCH
        )
        # Ours scores every prompt once a condition, stock lm-eval once.
        values = [len(chosen) * a / b for a, b in alternate(stock, ours, rounds)]
        what = f"prompts per second, {what} / stock lm-eval"
        rows.append(ratio_row(what, shape, 2.0, values, at="least"))
    return rows
