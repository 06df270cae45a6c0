"""What interventions and the evaluation cost, beside a plain forward pass and stock lm-eval.

Every figure is a ratio of runs that alternate in one process, the median over the rounds, with the
smallest and the largest. Models are Llama-shaped with random weights, made in memory.

Example
-------
>>> results = run_benchmark(rounds=5)
>>> results["rows"][0]["median"]
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.interventions import AttentionKnockout, MeanAblation, ZeroAblation
from icl_helpers.attention.means import mean_head_outputs
from icl_helpers.attention.scores import prefix_matching_scores, random_sequences
from icl_helpers.errors import InputError
from icl_helpers.files import atomic_path, book_dir
from icl_helpers.models.loading import load_model
from tests.benchmark.evaluation import evaluation_rows, prompt_rows
from tests.benchmark.growth import measure_growth
from tests.benchmark.page import write_page
from tests.benchmark.process import seconds
from tests.benchmark.tools import (
    BATCH,
    SHAPES,
    forward,
    machine,
    operations,
    prompt_batch,
    random_llama,
    ratio_row,
    ratios,
    spread_heads,
)

# Positions of the reference samples whose memory is measured (paper, section 4).
_POSITIONS = 3000


def run_benchmark(*, rounds: int = 5) -> dict[str, Any]:
    """Measure everything; takes ten to twenty minutes on two cores. JSON values only.

    Each row has ``what``, ``model``, ``unit``, ``bar``, ``at`` (most or least), ``median``,
    ``low``, ``high`` and ``met``. Raises :class:`InputError` for less than one round.
    """
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, got {rounds}")
    _, tokenizer = load_model("icl-tiny")
    rows = [*_commands(rounds), *prompt_rows(tokenizer, rounds)]
    floors = []
    for shape in SHAPES:
        model = random_llama(shape)
        rows += _forward_rows(shape, model, tokenizer, rounds)
        rows += _memory_rows(shape)
        rows += evaluation_rows(shape, model, tokenizer, rounds)
        floors.append(_floor(shape, model, tokenizer, rounds))
    smallest = next(iter(SHAPES))
    growth = measure_growth(random_llama(smallest), tokenizer, rounds=min(rounds, 3))
    return {
        "machine": machine(), "rounds": rounds, "rows": rows, "floor": floors,
        "growth": {"model": smallest, "points": growth},
    }  # fmt: skip


def keep_measured(measured: dict[str, Any], book: Path | None = None) -> Path:
    """Put what was measured into the book's ``benchmark.json``, and the page made from it.

    Other sections stay as they are, each with its own machine and date. Returns the JSON's path.
    """
    book = book_dir() if book is None else book
    target = book / "_static" / "benchmark.json"
    earlier = json.loads(target.read_text()) if target.is_file() else {}
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps({**earlier, **measured}, indent=1) + "\n")
    write_page(book)
    return target


def _commands(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for what, arguments, bar in (
        ("import icl_helpers", ["-c", "import icl_helpers"], 0.3),
        ("icl --help", ["-m", "icl_helpers.cli", "--help"], 1.0),
    ):
        call = functools.partial(
            subprocess.run, [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL
        )
        taken = [seconds(call) for _ in range(rounds)]
        rows.append(ratio_row(what, "-", bar, taken, unit="seconds"))
    return rows


@torch.inference_mode()
def _forward_rows(
    shape: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rounds: int
) -> list[dict[str, Any]]:
    ids, blocked = prompt_batch(tokenizer)
    heads = spread_heads(model)
    mean_outputs = functools.partial(mean_head_outputs, model, ids, batch_size=BATCH)
    sequences = random_sequences(tokenizer, n_sequences=5)
    repeated = torch.cat([torch.zeros(5, 1, dtype=torch.long), sequences.repeat(1, 4)], dim=1)
    plain = forward(model, ids)
    cases = (
        ("zero ablation", 1.03, plain, forward(model, ids, ZeroAblation(heads))),
        ("mean ablation", 1.03, plain, forward(model, ids, MeanAblation(heads, mean_outputs()))),
        ("knockout", 1.10, plain, forward(model, ids, AttentionKnockout(heads, blocked))),
        (
            "prefix-matching scores", 1.5, forward(model, repeated),
            functools.partial(prefix_matching_scores, model, sequences),
        ),
        ("mean head outputs", 1.2, plain, mean_outputs),
    )  # fmt: skip
    return [
        ratio_row(f"{what} / plain forward", shape, bar, ratios(base, edited, 3 * rounds))
        for what, bar, base, edited in cases
    ]


_MEMORY = """
import sys, torch
from tests.benchmark.process import peak_bytes
from tests.benchmark.tools import random_llama
from icl_helpers.attention.means import mean_head_outputs

def plain():
    with torch.no_grad():
        for row in ids:
            model.base_model(input_ids=row[None], use_cache=False)

model = random_llama(sys.argv[1])
ids = torch.randint(0, 32_000, (3, int(sys.argv[2])), generator=torch.Generator().manual_seed(0))
mean_head_outputs(model, ids[:, :8])
plain()
before = peak_bytes(plain)
print(peak_bytes(lambda: mean_head_outputs(model, ids)) - before)
"""


def _memory_rows(shape: str) -> list[dict[str, Any]]:
    """Peak memory that the means add to a plain pass, in accumulators; in a process of its own.

    The peak does not depend on the number of samples, which stream through the model. Only Linux
    tells it.
    """
    if not sys.platform.startswith("linux"):
        return []
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, shape, str(_POSITIONS)],
        check=True, capture_output=True, text=True,
        # Tensors go back to the system when they are freed: what is counted is what is held at
        # once, not the gaps that the allocator happens to leave between them.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    hidden, layers, *_ = SHAPES[shape]
    ratio = float(done.stdout) / (4 * layers * _POSITIONS * hidden)
    what = f"peak memory of means of {_POSITIONS} positions / one accumulator"
    # The mean of the layer that is under way, and what the allocator rounds up, come on top.
    return [ratio_row(what, shape, 1.1, [ratio])]


@torch.inference_mode()
def _floor(
    shape: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rounds: int
) -> dict[str, Any]:
    """Operations and weight bytes of one forward, and the share of the matmul rate it reaches."""
    ids, _ = prompt_batch(tokenizer)
    weights = sum(p.numel() for p in model.parameters())
    needed = operations(model, ids)
    square = torch.randn(2048, 2048)
    matmul = min(seconds(lambda: square @ square) for _ in range(rounds))
    taken = statistics.median(seconds(forward(model, ids)) for _ in range(rounds))
    rate, reached = 2 * 2048**3 / matmul, needed / taken
    return {
        "model": shape, "parameters": weights, "tokens": ids.numel(), "operations": needed,
        "bytes": 4 * weights, "matmul_per_second": rate, "forward_per_second": reached,
        "share": reached / rate,
    }  # fmt: skip
