"""What the benchmarks share: random models, a batch of prompts, runs that alternate."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.heads import Head
from icl_helpers.attention.induction_pattern import induction_patterns
from icl_helpers.attention.interventions import Intervention, intervene
from icl_helpers.tasks.prompts import build_prompts
from tests.benchmark.process import processor, seconds

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


def machine(*, threads: int | None = None) -> dict[str, Any]:
    """Where, with what and when something is measured; ``threads``: default torch's own number."""
    packages = ("torch", "transformers", "lm_eval")
    return {
        "processor": processor(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "python": platform.python_version(), **{name: version(name) for name in packages},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }  # fmt: skip


def operations(model: PreTrainedModel, ids: torch.Tensor, *, scored: int | None = None) -> int:
    """Operations of a forward pass of ids [batch, tokens], with logits at ``scored`` tokens.

    Each weight of a matrix takes part in one multiply-add a token, an embedding in none but as the
    output projection; attention adds two products of [tokens, tokens, hidden] a layer. Default: all
    tokens are scored.
    """
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    embedding = model.get_input_embeddings().weight.numel()
    body = sum(p.numel() for p in model.base_model.parameters() if p.dim() > 1) - embedding
    head = model.get_output_embeddings().weight.numel()
    scored = ids.numel() if scored is None else scored
    attention = 4 * layers * ids.shape[1] * hidden * ids.numel()
    return 2 * body * ids.numel() + 2 * head * scored + attention


def forward(
    model: PreTrainedModel, ids: torch.Tensor, *interventions: Intervention, **options: Any
) -> Callable[[], None]:
    """A forward pass of ids [batch, tokens], plain or under interventions, to be called."""

    def run() -> None:
        with intervene(model, *interventions) if interventions else nullcontext():
            model(input_ids=ids, use_cache=False, **options)

    return run


def alternate(
    plain: Callable[[], Any], edited: Callable[[], Any], rounds: int
) -> list[tuple[float, float]]:
    """Seconds of (plain, edited), in alternation after one uncounted run of each."""
    plain(), edited()
    return [(seconds(plain), seconds(edited)) for _ in range(rounds)]


def ratios(plain: Callable[[], Any], edited: Callable[[], Any], rounds: int) -> list[float]:
    """How many times as long ``edited`` takes, round by round."""
    return [b / a for a, b in alternate(plain, edited, rounds)]


def ratio_row(
    what: str,
    model: str,
    bar: float,
    values: Sequence[float],
    *,
    unit: str = "ratio",
    at: str = "most",
) -> dict[str, Any]:
    """One row of the table: the median of ``values`` against the bar."""
    median = statistics.median(values)
    met = median <= bar if at == "most" else median >= bar
    return {
        "what": what, "model": model, "unit": unit, "bar": bar, "at": at, "median": median,
        "low": min(values), "high": max(values), "met": met,
    }  # fmt: skip


def spread_heads(model: PreTrainedModel, number: int | None = None) -> list[Head]:
    """``number`` heads, by default 3 % of all, spread evenly over the layers."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    number = max(1, round(FRACTION * layers * heads)) if number is None else number
    order = [Head((2 * i + 1) * layers // (2 * number), i % heads) for i in range(number)]
    if len(set(order)) == number:
        return order
    # More heads than fit one by one: fill up layer by layer.
    every = [Head(layer, head) for head in range(heads) for layer in range(layers)]
    return every[:number]


def prompt_batch(
    tokenizer: PreTrainedTokenizerBase, *, shots: int = SHOTS, size: int = BATCH
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [batch, tokens] and blocked pairs [batch, tokens, tokens], padded on the right."""
    prompts = [prompt.context for prompt in build_prompts(TASK, shots=shots, seed=42)[:size]]
    patterns = induction_patterns(prompts, tokenizer)
    encoded = tokenizer(prompts, add_special_tokens=False).input_ids
    ids = pad_sequence([torch.tensor(row) for row in encoded], batch_first=True)
    missing = [ids.shape[1] - len(pattern) for pattern in patterns]
    blocked = [
        torch.nn.functional.pad(pattern, (0, short, 0, short))
        for pattern, short in zip(patterns, missing, strict=True)
    ]
    return ids, torch.stack(blocked)
