"""What the embedded model is trained on at each step, and how fast: four phases.

1. Repeated sequences from small pools of tokens, until induction heads have formed.
2. Few-shot episodes, hardened slowly from copying to new instances.
3. Long repeats over the whole vocabulary, and mostly letter patterns, some of them named.
4. Which letters are equal: named patterns of two letters, then of more, then episodes again.
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

# Lengths of the sequences until this share of the last phase, and when episodes mix in.
_LENGTHS_BY_PROGRESS = ((0.2, (2,)), (0.32, (2, 3)), (0.45, (2, 3, 4)), (2.0, LETTER_LENGTHS))
_EPISODES_FROM = 0.25


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
    repeat_steps: int = 2600
    repeat_vocab: int = 300
    episode_steps: int = 3900
    # The cosine of the second phase is made for 4,500 steps; the third phase begins before its end.
    episode_schedule: int = 4500
    pattern_steps: int = 1000
    pattern_schedule: int = 2400
    equality_steps: int = 900
    bursty_steps: int = 500
    hardening_steps: int = 1500
    repeat_rows: int = 96
    repeat_length: int = 48
    episode_rows: int = 48
    pattern_rows: int = 32
    max_tokens: int = 192
    text_share: float = 0.15
    naming_share: float = 0.25
    pattern_word_share: float = 0.2
    learning_rate: float = 3e-3
    episode_learning_rate: float = 2e-3
    pattern_learning_rate: float = 2e-3
    induction_heads: int = 4
    penalty: float = 0.3
    penalty_from_score: float = 0.6

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return sum(self.phases)

    @property
    def phases(self) -> tuple[int, int, int, int]:
        """Steps of each phase: repeats, episodes, patterns, equality."""
        return self.repeat_steps, self.episode_steps, self.pattern_steps, self.equality_steps


def checkpoint_steps(recipe: Recipe, *, per_phase: int = 12) -> list[int]:
    """Log-spaced steps within each of the four phases, 0 and the last among them."""
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
    if done >= recipe.episode_steps + recipe.pattern_steps:
        done -= recipe.episode_steps + recipe.pattern_steps
        yield from _equality_batches(recipe, done / recipe.equality_steps, rng, tokenizer)
        return
    if done >= recipe.episode_steps:
        yield from _pattern_batches(recipe, rng, tokenizer)
        return
    fresh = min(1.0, max(0.0, (done - recipe.bursty_steps) / recipe.hardening_steps))
    yield (
        "repeat",
        0.2,
        repeat_batch(rng, vocab_size=recipe.vocab_size, rows=16, length=64, pool=256, watched=16),
    )
    for batch in episode_batch(
        rng, tokenizer, rows=recipe.episode_rows, fresh=fresh, text_share=recipe.text_share,
        watched=4, max_tokens=recipe.max_tokens,
    ):  # fmt: skip
        yield "episode", 1.0, batch


def _pattern_batches(
    recipe: Recipe, rng: random.Random, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[str, float, Batch]]:
    """Last phase: long repeats over the whole vocabulary, and mostly letters, a third named."""
    yield (
        "repeat",
        0.2,
        repeat_batch(rng, vocab_size=recipe.vocab_size, rows=4, length=208, pool=1000, watched=4),
    )
    for batch in episode_batch(
        rng, tokenizer, rows=recipe.pattern_rows, fresh=1.0, text_share=recipe.text_share,
        watched=4, max_tokens=recipe.max_tokens, naming_share=recipe.naming_share,
        word_share=recipe.pattern_word_share,
    ):  # fmt: skip
        yield "episode", 1.0, batch


def _equality_batches(
    recipe: Recipe, progress: float, rng: random.Random, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[str, float, Batch]]:
    """Which letters are equal, from two letters up to five: named patterns, then more episodes."""
    stage = next(lengths for until, lengths in _LENGTHS_BY_PROGRESS if progress < until)
    yield (
        "repeat",
        0.2,
        repeat_batch(rng, vocab_size=recipe.vocab_size, rows=4, length=160, pool=1000, watched=4),
    )
    naming = 1.0 if progress < _EPISODES_FROM else 0.35
    for batch in episode_batch(
        rng, tokenizer, rows=24, fresh=1.0, text_share=0.0 if naming == 1.0 else recipe.text_share,
        watched=4, max_tokens=256, naming_share=naming, named_rows=(14, 14),
        word_share=recipe.pattern_word_share, lengths=stage,
    ):  # fmt: skip
        yield "episode", 1.0, batch


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of one step: warm-up and decay anew in every phase."""
    done = step - recipe.repeat_steps
    if done < 0:
        warm = min(1.0, (step + 1) / 100)
        return recipe.learning_rate * warm * (1 - 0.5 * step / recipe.repeat_steps)
    warm = min(1.0, (done + 1) / 100)
    length, peak = recipe.episode_schedule, recipe.episode_learning_rate
    if done >= recipe.episode_steps:
        done -= recipe.episode_steps
        length, peak = recipe.pattern_schedule, recipe.pattern_learning_rate
        if done >= recipe.pattern_steps:
            done -= recipe.pattern_steps
            length = recipe.equality_steps
        warm = min(1.0, (done + 1) / 100)
    cosine = 0.5 * (1 + math.cos(math.pi * done / length))
    return peak * warm * (0.03 + 0.97 * cosine)
