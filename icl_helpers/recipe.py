"""What the embedded model is trained on at each step, and how fast: two phases.

1. Repeated sequences from small pools of tokens, until induction heads have formed.
2. Few-shot episodes, hardened slowly from copying to new instances, beside named letter patterns
   that teach which letters are equal, from two letters upwards.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from icl_helpers.corpus import LETTER_LENGTHS
from icl_helpers.training_data import Batch, episode_batch, repeat_batch

__all__ = ["Recipe", "checkpoint_steps", "learning_rate", "step_batches"]

# Letters in a named pattern until this share of the second phase.
_NAMED_LENGTHS = ((0.04, (2,)), (0.10, (2, 3)), (0.20, (2, 3, 4)), (2.0, LETTER_LENGTHS))
# Share of named patterns among the rows: until, and from, these shares of the second phase.
_NAMING = ((0.20, 0.40), (0.60, 0.15))


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, besides the library versions."""

    seed: int = 0
    vocab_size: int = 1500
    hidden_size: int = 128
    intermediate_size: int = 256
    n_layers: int = 4
    n_heads: int = 16
    n_kv_heads: int = 4
    head_dim: int = 16
    max_positions: int = 1024
    repeat_steps: int = 2200
    repeat_vocab: int = 300
    episode_steps: int = 4200
    bursty_steps: int = 300
    hardening_steps: int = 1200
    repeat_rows: int = 96
    repeat_length: int = 48
    episode_rows: int = 36
    max_tokens: int = 192
    text_share: float = 0.12
    word_share: float = 0.35
    unseen_weight: float = 0.15
    learning_rate: float = 3e-3
    episode_learning_rate: float = 2e-3
    induction_heads: int = 4
    penalty: float = 0.3
    penalty_from_score: float = 0.6

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return sum(self.phases)

    @property
    def phases(self) -> tuple[int, int]:
        """Steps of each phase: repeats, episodes."""
        return self.repeat_steps, self.episode_steps


def checkpoint_steps(recipe: Recipe, *, per_phase: int = 14) -> list[int]:
    """Log-spaced steps within each of the two phases, 0 and the last among them."""
    phases = recipe.phases
    starts = [sum(phases[:index]) for index in range(len(phases))]
    steps = {0, recipe.steps}
    for start, length in zip(starts, phases, strict=True):
        low = math.log(max(1, length // 60))
        for k in range(per_phase):
            steps.add(start + round(math.exp(low + (math.log(length) - low) * k / (per_phase - 1))))
    return sorted(steps)


def step_batches(
    recipe: Recipe, step: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[str, float, Batch]]:
    """(kind, loss weight, batch) of one step."""
    rng = random.Random(f"{recipe.seed}-{step}")
    done = step - recipe.repeat_steps
    if done < 0:
        yield "repeat", 1.0, repeat_batch(
            rng, vocab_size=recipe.repeat_vocab, rows=recipe.repeat_rows,
            length=recipe.repeat_length, pool=64, watched=16,
        )  # fmt: skip
        return
    progress = done / recipe.episode_steps
    # Long repeats keep induction at work over the distances of the prefix-matching score.
    rows, length, pool = (3, 208, 1000) if step % 3 == 0 else (8, 64, 256)
    yield (
        "repeat",
        0.2,
        repeat_batch(
            rng, vocab_size=recipe.vocab_size, rows=rows, length=length, pool=pool, watched=8
        ),
    )
    (until, most), (since, least) = _NAMING
    fade = min(1.0, max(0.0, (progress - until) / (since - until)))
    for batch in episode_batch(
        rng, tokenizer, rows=recipe.episode_rows,
        fresh=min(1.0, max(0.0, (done - recipe.bursty_steps) / recipe.hardening_steps)),
        text_share=recipe.text_share, naming_share=most + (least - most) * fade,
        word_share=recipe.word_share, unseen_weight=recipe.unseen_weight,
        named_lengths=next(lengths for end, lengths in _NAMED_LENGTHS if progress < end),
        watched=4, max_tokens=recipe.max_tokens,
    ):  # fmt: skip
        yield "episode", 1.0, batch


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of one step: warm-up and decay anew in each phase."""
    done = step - recipe.repeat_steps
    if done < 0:
        warm = min(1.0, (step + 1) / 100)
        return recipe.learning_rate * warm * (1 - 0.5 * step / recipe.repeat_steps)
    warm = min(1.0, (done + 1) / 100)
    cosine = 0.5 * (1 + math.cos(math.pi * done / recipe.episode_steps))
    return recipe.episode_learning_rate * warm * (0.03 + 0.97 * cosine)
