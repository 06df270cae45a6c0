"""Drawing demonstrations exactly as the published code does (paper, section 7).

One ``random.Random(seed)`` serves a task's documents in order, so demonstrations are drawn for all
of them before anything is split or cut short: a prompt does not depend on a limit or on workers.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np

from icl_helpers.errors import InputError
from icl_helpers.tasks.specs import Sampler

__all__ = ["Pool", "draw_demonstrations"]

Key = TypeVar("Key", bound=Hashable)


class Pool(Generic[Key]):
    """Labelled rows that demonstrations are drawn from.

    ``texts`` and ``labels`` are parallel. ``sampler`` balanced: every row of a class is a
    candidate; disjoint_words: those whose first and second word both differ from the query's.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        sampler: Sampler,
    ) -> None:
        self.texts, self.labels = list(texts), list(labels)
        self.sampler = sampler
        self.classes = list(dict.fromkeys(self.labels))
        self._rows = {
            label: [i for i, found in enumerate(self.labels) if found == label]
            for label in self.classes
        }
        if sampler == "disjoint_words":
            words = np.array([text.split()[:2] for text in self.texts])
            self._words = {label: words[rows] for label, rows in self._rows.items()}
        self._disjoint = functools.cache(self._disjoint_rows)

    def candidates(self, label: str, query: str) -> list[int]:
        """Indices of the rows of a class that may stand before this query."""
        if self.sampler == "balanced":
            return self._rows[label]
        words = query.split()
        return self._disjoint(label, words[0], words[1])

    def _disjoint_rows(self, label: str, first: str, second: str) -> list[int]:
        words = self._words[label]
        kept = (words[:, 0] != first) & (words[:, 1] != second)
        return list(itertools.compress(self._rows[label], kept.tolist()))


def draw_demonstrations(
    pool: Pool[str],
    queries: Sequence[tuple[str, str]],
    *,
    shots: int,
    seed: int,
    same_split: bool = True,
) -> list[list[int]]:
    """Indices into the pool of each query's demonstrations, in the order they are shown.

    Parameters
    ----------
    queries
        (text, label) of every document, in order.
    same_split
        True when the queries are themselves rows of the pool: one more row is drawn. Rows equal to
        the query are dropped in either case, and the first ``shots`` are kept.

    Raises
    ------
    InputError
        Negative shots, a pool with a single class, or more shots than the pool can give.
    """
    _check(pool, shots, len(pool.texts) - same_split)
    if shots == 0:
        return [[] for _ in queries]
    rng = random.Random(seed)
    wanted = shots + 1 if same_split else shots
    drawn_for_all = []
    for text, label in queries:
        base, rest = divmod(wanted, len(pool.classes))
        counts = [(name, base) for name in pool.classes]
        # Called even when nothing is left over: it draws from the generator all the same.
        extra = {name for name, _ in rng.sample(counts, rest)}
        drawn: list[int] = []
        for name, count in counts:
            candidates = pool.candidates(name, text)
            size = min(count + (name in extra), len(candidates))
            drawn += rng.sample(candidates, size)
        rng.shuffle(drawn)
        drawn = [i for i in drawn if (pool.texts[i], pool.labels[i]) != (text, label)]
        drawn_for_all.append(drawn[:shots])
    return drawn_for_all


def _check(pool: Pool[str], shots: int, most: int) -> None:
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 0:
        raise InputError(f"shots must be a whole number >= 0, got {shots!r}")
    if len(pool.classes) < 2:
        raise InputError(
            f"the demonstration pool has a single class, {pool.classes}; at least two are needed"
        )
    if shots > most:
        raise InputError(
            f"{shots} shots are more than the pool of {len(pool.texts)} rows can give; ask for at "
            f"most {most}"
        )
