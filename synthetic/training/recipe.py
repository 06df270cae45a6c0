"""What the embedded model is trained on at each step, and how fast: four phases.

1. Repeated sequences of few different tokens, until induction heads have formed.
2. Repeated sequences over the whole vocabulary, for a short while.
3. Few-shot episodes, hardened slowly from copying to new instances, beside named letter patterns
   that teach which letters are equal, from two letters upwards.
4. Episodes of letters above all, and the name of every row's pattern is read off early: after the
   second of four layers, so that two are left to match the query with the demonstrations.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerFast

from synthetic.training.batches import Batch, episode_batch, repeat_batch
from synthetic.training.corpus import LETTER_LENGTHS

__all__ = ["Phase", "Recipe", "checkpoint_due", "learning_rate", "phase_at", "step_batches"]


# Letters in a named pattern until this share of the third phase.
_NAMED_LENGTHS = ((0.04, (2,)), (0.10, (2, 3)), (0.20, (2, 3, 4)), (2.0, LETTER_LENGTHS))
# Share of named patterns among the rows: until, and from, these shares of the third phase.
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
    # At most: the phase ends once the mean running score of the induction heads is formed_score.
    repeat_steps: int = 4000
    formed_score: float = 0.7
    repeat_vocab: int = 300
    widening_steps: int = 200
    episode_steps: int = 3700
    # The cosine of this phase is made for more steps than it has.
    episode_schedule: int = 4200
    bursty_steps: int = 300
    hardening_steps: int = 1200
    repeat_rows: int = 96
    repeat_length: int = 48
    episode_rows: int = 36
    max_tokens: int = 192
    text_share: float = 0.12
    word_share: float = 0.35
    unseen_weight: float = 0.15
    pattern_steps: int = 1800
    pattern_rows: int = 32
    pattern_naming_share: float = 0.15
    pattern_word_share: float = 0.25
    pattern_learning_rate: float = 2e-3
    names_after_layer: int = 2
    names_weight: float = 0.5
    learning_rate: float = 3e-3
    episode_learning_rate: float = 2e-3
    induction_heads: int = 4
    penalty: float = 0.3
    penalty_from_score: float = 0.6

    @property
    def steps_after_forming(self) -> int:
        """Optimiser steps that follow once induction heads have formed."""
        return self.widening_steps + self.episode_steps + self.pattern_steps


PhaseName = Literal["repeats", "widening", "episodes", "patterns", "end"]


class Phase(NamedTuple):
    """Where a step lies: the phase's name, and the steps done in it."""

    name: PhaseName
    done: int


def phase_at(recipe: Recipe, step: int, formed: int | None) -> Phase:
    """Phase of a step; ``formed`` is the step at which induction heads had formed, if they have."""
    lengths: dict[PhaseName, int] = {
        "repeats": recipe.repeat_steps if formed is None else formed,
        "widening": recipe.widening_steps,
        "episodes": recipe.episode_steps,
        "patterns": recipe.pattern_steps,
    }
    done = step
    for name, length in lengths.items():
        if done < length:
            return Phase(name, done)
        done -= length
    return Phase("end", done)


def checkpoint_due(recipe: Recipe, phase: Phase, *, per_phase: int = 16) -> bool:
    """Whether weights are saved before this step: log-spaced within the long phases."""
    if phase.done == 0 or phase.name == "end":
        return True
    lengths = {
        "repeats": recipe.repeat_steps,
        "episodes": recipe.episode_schedule,
        "patterns": recipe.pattern_steps,
    }
    if phase.name not in lengths:
        return False
    length = lengths[phase.name]
    low = math.log(max(1, length // 60))
    gap = (math.log(length) - low) / per_phase
    return any(round(math.exp(low + gap * k)) == phase.done for k in range(per_phase))


def step_batches(
    recipe: Recipe, step: int, phase: Phase, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[str, float, Batch]]:
    """(kind, loss weight, batch) of one step."""
    rng = random.Random(f"{recipe.seed}-{step}")
    if phase.name in ("repeats", "widening"):
        wide = phase.name == "widening"
        yield "repeat", 1.0, repeat_batch(
            rng, vocab_size=recipe.vocab_size if wide else recipe.repeat_vocab,
            rows=recipe.repeat_rows, length=recipe.repeat_length, pool=256 if wide else 64,
            watched=16,
        )  # fmt: skip
        return
    # Long repeats keep induction at work over the distances of the prefix-matching score.
    rows, length, pool = (3, 208, 1000) if step % 3 == 0 else (8, 64, 256)
    yield "repeat", 0.2, repeat_batch(
        rng, vocab_size=recipe.vocab_size, rows=rows, length=length, pool=pool, watched=8
    )  # fmt: skip
    for batch in _episodes(recipe, phase, rng, tokenizer):
        yield "episode", 1.0, batch


def _episodes(
    recipe: Recipe, phase: Phase, rng: random.Random, tokenizer: PreTrainedTokenizerFast
) -> list[Batch]:
    lengths: Sequence[int] = LETTER_LENGTHS
    if phase.name == "patterns":
        rows, fresh = recipe.pattern_rows, 1.0
        naming_share, word_share = recipe.pattern_naming_share, recipe.pattern_word_share
    else:
        rows, word_share = recipe.episode_rows, recipe.word_share
        fresh = _ramp(phase.done, recipe.bursty_steps, recipe.hardening_steps)
        progress = phase.done / recipe.episode_schedule
        lengths = next(lengths for end, lengths in _NAMED_LENGTHS if progress < end)
        (until, most), (since, least) = _NAMING
        naming_share = most + (least - most) * _ramp(progress, until, since - until)
    return episode_batch(
        rng, tokenizer, rows=rows, fresh=fresh, text_share=recipe.text_share,
        naming_share=naming_share, word_share=word_share, unseen_weight=recipe.unseen_weight,
        named_lengths=lengths, watched=4, max_tokens=recipe.max_tokens,
    )  # fmt: skip


def _ramp(value: float, start: float, length: float) -> float:
    """From 0 until ``start`` evenly to 1, which is reached ``length`` later."""
    return min(1.0, max(0.0, (value - start) / length))


def learning_rate(recipe: Recipe, phase: Phase) -> float:
    """Learning rate of one step: warm-up anew in each long phase, decay to almost nothing."""
    warm = min(1.0, (phase.done + 1) / 100)
    if phase.name == "repeats":
        return recipe.learning_rate * warm * (1 - 0.5 * phase.done / recipe.repeat_steps)
    if phase.name == "widening":
        return recipe.episode_learning_rate
    length, peak = recipe.episode_schedule, recipe.episode_learning_rate
    if phase.name == "patterns":
        length, peak = recipe.pattern_steps, recipe.pattern_learning_rate
    cosine = 0.5 * (1 + math.cos(math.pi * phase.done / length))
    return peak * warm * (0.03 + 0.97 * cosine)
