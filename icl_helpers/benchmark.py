"""What interventions and the evaluation cost, beside a plain forward pass and stock lm-eval.

Every figure is a ratio of runs that alternate in one process, the median over the rounds, with the
smallest and the largest. Models are Llama-shaped with random weights, made in memory.

Example
-------
>>> results = run_benchmark(rounds=5)
>>> results["rows"][0]["median"]
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers._paths import book_dir
from icl_helpers.condition import Condition
from icl_helpers.evaluation import evaluate
from icl_helpers.heads import Head
from icl_helpers.interventions import AttentionKnockout, MeanAblation, ZeroAblation, intervene
from icl_helpers.means import mean_head_outputs
from icl_helpers.models import load_model
from icl_helpers.patterns import induction_patterns
from icl_helpers.prefix_matching import prefix_matching_scores, random_sequences
from icl_helpers.prompts import build_prompts

__all__ = ["SHAPES", "random_llama", "run_benchmark", "write_benchmark"]

BATCH = 16
SHOTS = 10
TASK = "repetition"
FRACTION = 0.03
# Hidden size, layers, heads, feed-forward size; 32,000 tied embeddings.
SHAPES = {"25M": (384, 8, 6, 1024), "110M": (768, 12, 12, 2048)}


def random_llama(shape: str) -> LlamaForCausalLM:
    """A Llama of one of :data:`SHAPES`, float32, with random weights from a fixed seed."""
    hidden, layers, heads, inner = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=inner, tie_word_embeddings=True,
        max_position_embeddings=4096, bos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def run_benchmark(*, shapes: Sequence[str] = tuple(SHAPES), rounds: int = 5) -> dict[str, Any]:
    """Measure every row; takes some minutes. The result holds JSON values only.

    Each row has ``what``, ``model``, ``unit``, ``bar``, ``at`` (most or least), ``median``,
    ``low``, ``high`` and ``met``.
    """
    _, tokenizer = load_model("icl-tiny")
    rows = [*_commands(rounds)]
    floors = []
    for shape in shapes:
        model = random_llama(shape)
        rows += _forward_rows(shape, model, tokenizer, rounds)
        rows.append(_evaluation_row(shape, model, tokenizer, rounds))
        floors.append(_floor(shape, model, tokenizer, rounds))
    return {"machine": _machine(), "rounds": rounds, "rows": rows, "floor": floors}


def write_benchmark(path: Path | None = None, *, rounds: int = 5) -> Path:
    """Measure and write the JSON that the book's chapter is made from; returns its path."""
    target = book_dir() / "_static" / "benchmark.json" if path is None else path
    target.write_text(json.dumps(run_benchmark(rounds=rounds), indent=1) + "\n")
    return target


def _machine() -> dict[str, Any]:
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    packages = ("torch", "transformers", "lm_eval")
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), **{name: version(name) for name in packages},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "gpu": "not measured",
    }  # fmt: skip


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _alternate(
    plain: Callable[[], Any], edited: Callable[[], Any], rounds: int
) -> list[tuple[float, float]]:
    """Seconds of (plain, edited), in alternation after one uncounted run of each."""
    plain(), edited()
    return [(_seconds(plain), _seconds(edited)) for _ in range(rounds)]


def _row(
    what: str, model: str, unit: str, bar: float, values: Sequence[float], *, at: str = "most"
) -> dict[str, Any]:
    median = statistics.median(values)
    met = median <= bar if at == "most" else median >= bar
    return {
        "what": what, "model": model, "unit": unit, "bar": bar, "at": at, "median": median,
        "low": min(values), "high": max(values), "met": met,
    }  # fmt: skip


def _commands(rounds: int) -> list[dict[str, Any]]:
    wanted = (
        ("import icl_helpers", ["-c", "import icl_helpers"], 0.3),
        ("icl --help", ["-m", "icl_helpers.cli", "--help"], 1.0),
    )
    rows = []
    for what, arguments, bar in wanted:
        call = functools.partial(
            subprocess.run, [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL
        )
        rows.append(_row(what, "-", "seconds", bar, [_seconds(call) for _ in range(rounds)]))
    return rows


def _heads(model: PreTrainedModel) -> list[Head]:
    """3 % of the heads, spread evenly over the layers."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    number = max(1, round(FRACTION * layers * heads))
    return [Head((2 * i + 1) * layers // (2 * number), i % heads) for i in range(number)]


def _batch(tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and blocked pairs of one batch of prompts, padded on the right."""
    prompts = [prompt.context for prompt in build_prompts(TASK, shots=SHOTS, seed=42)[:BATCH]]
    patterns = induction_patterns(prompts, tokenizer)
    encoded = tokenizer(prompts, add_special_tokens=False).input_ids
    width = max(map(len, encoded))
    ids = torch.zeros(BATCH, width, dtype=torch.long)
    blocked = torch.zeros(BATCH, width, width, dtype=torch.bool)
    for index, (row, pattern) in enumerate(zip(encoded, patterns, strict=True)):
        ids[index, : len(row)] = torch.tensor(row)
        blocked[index, : len(row), : len(row)] = pattern
    return ids, blocked


@torch.inference_mode()
def _forward_rows(
    shape: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rounds: int
) -> list[dict[str, Any]]:
    ids, blocked = _batch(tokenizer)
    heads = _heads(model)
    means = mean_head_outputs(model, ids)

    def plain() -> None:
        model(input_ids=ids, use_cache=False)

    def under(intervention: Any) -> Callable[[], None]:
        def edited() -> None:
            with intervene(model, intervention):
                plain()

        return edited

    sequences = random_sequences(tokenizer, n_sequences=5)
    repeated = torch.cat([torch.zeros(5, 1, dtype=torch.long), sequences.repeat(1, 4)], dim=1)
    cases = (
        ("zero ablation / plain forward", 1.03, plain, under(ZeroAblation(heads))),
        ("mean ablation / plain forward", 1.03, plain, under(MeanAblation(heads, means))),
        ("knockout / plain forward", 1.10, plain, under(AttentionKnockout(heads, blocked))),
        (
            "prefix-matching scores / plain forward", 1.5,
            lambda: model(input_ids=repeated, use_cache=False),
            lambda: prefix_matching_scores(model, sequences),
        ),
        (
            "mean head outputs / plain forward", 1.2, plain,
            lambda: mean_head_outputs(model, ids, batch_size=BATCH),
        ),
    )  # fmt: skip
    return [
        _row(what, shape, "ratio", bar, [b / a for a, b in _alternate(base, edited, rounds)])
        for what, bar, base, edited in cases
    ]


def _evaluation_row(
    shape: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rounds: int
) -> dict[str, Any]:
    """Prompts per second of ablated ``evaluate`` over those of stock lm-eval, un-ablated."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from icl_helpers.lm_eval_tasks import load_task

    limit = 2 * BATCH
    condition = Condition("induction_heads", "zero", FRACTION, heads=tuple(_heads(model)))
    stock = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=BATCH, add_bos_token=False,
        max_length=model.config.max_position_embeddings,
    )  # fmt: skip

    def baseline() -> None:
        task: Any = load_task(TASK, shots=SHOTS, seed=42, labels=None, data="synthetic")
        simple_evaluate(stock, tasks=[task], limit=limit, bootstrap_iters=0, verbosity="ERROR")

    def ours() -> None:
        evaluate(
            model, tokenizer, tasks=[TASK], shots=SHOTS, conditions=[condition], seeds=[42],
            limit=limit, batch_size=BATCH,
        )  # fmt: skip

    values = [a / b for a, b in _alternate(baseline, ours, rounds)]
    return _row("prompts per second / stock lm-eval", shape, "ratio", 2.0, values, at="least")


@torch.inference_mode()
def _floor(
    shape: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rounds: int
) -> dict[str, Any]:
    """Operations and weight bytes of one forward, and the share of the matmul rate it reaches."""
    ids, _ = _batch(tokenizer)
    weights = sum(p.numel() for p in model.parameters())
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    # Each weight takes part in one multiply-add a token (the tied embedding as the output
    # projection); attention adds two products of [tokens, tokens, hidden] per layer.
    operations = 2 * weights * ids.numel() + 4 * layers * ids.shape[1] * hidden * ids.numel()
    square = torch.randn(2048, 2048)
    matmul = min(_seconds(lambda: square @ square) for _ in range(rounds))
    forward = statistics.median(
        _seconds(lambda: model(input_ids=ids, use_cache=False)) for _ in range(rounds)
    )
    rate, reached = 2 * 2048**3 / matmul, operations / forward
    return {
        "model": shape, "parameters": weights, "tokens": ids.numel(), "operations": operations,
        "bytes": 4 * weights, "matmul_per_second": rate, "forward_per_second": reached,
        "share": reached / rate,
    }  # fmt: skip
