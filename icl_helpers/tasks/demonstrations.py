"""Drawing demonstrations exactly as the published code does (paper, section 7), and checking them.

One ``random.Random(seed)`` serves a task's documents in order, so demonstrations are drawn for all
of them before anything is split or cut short: a prompt does not depend on a limit or on workers.
What the published code lets pass (fewer demonstrations than asked for, the document among its own
ones under another id) is mended or refused unless a :data:`Rule` allows it.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from icl_helpers.errors import InputError
from icl_helpers.tasks.specs import Sampler

__all__ = ["Demonstrations", "Pool", "Rule", "check_rule", "draw_demonstrations"]

Rule = Literal["exact", "fewer", "published"]


class Demonstrations(NamedTuple):
    """What is shown before a document: ``rows`` of the pool, in order.

    ``n_leaked`` of them are the document itself, by content; ``n_dropped`` more were drawn and are
    not shown for that reason.
    """

    rows: list[int]
    n_leaked: int = 0
    n_dropped: int = 0


def check_rule(rule: str | None) -> None:
    """Raise :class:`InputError` for a rule that is none."""
    if rule is not None and rule not in get_args(Rule):
        raise InputError(
            f"demonstrations must be None, {', '.join(map(repr, get_args(Rule)))}, got {rule!r}"
        )


class Pool:
    """Labelled rows that demonstrations are drawn from.

    ``texts``, ``labels`` and ``contents`` are parallel; a row's content is what a prompt shows of
    it (default: the text). ``sampler`` balanced: every row of a class is a candidate;
    disjoint_words: those whose first and second word both differ from the query's. ``name`` is what
    errors call the pool.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        sampler: Sampler,
        contents: Sequence[str] | None = None,
        name: str = "the demonstration pool",
    ) -> None:
        self.texts, self.labels = list(texts), list(labels)
        self.contents = list(map(_content, texts if contents is None else contents))
        self.sampler, self.name = sampler, name
        self.classes = list(dict.fromkeys(self.labels))
        self._rows: dict[str, list[int]] = {label: [] for label in self.classes}
        for row, label in enumerate(self.labels):
            self._rows[label].append(row)
        if sampler == "disjoint_words":
            words = np.array([text.split()[:2] for text in self.texts])
            self._words = {label: words[rows] for label, rows in self._rows.items()}
        self._disjoint = functools.cache(self._disjoint_rows)
        self._copies = Counter(zip(self.labels, self.contents, strict=True))

    def candidates(self, label: str, query: str) -> list[int]:
        """Indices of the rows of a class that may stand before this query."""
        if self.sampler == "balanced":
            return self._rows[label]
        words = query.split()
        return self._disjoint(label, words[0], words[1])

    def usable(self, label: str, query: str, content: str) -> int:
        """How many of these candidates are not the query itself, by content."""
        # Rows of its content share the query's words: with disjoint_words none is a candidate.
        copies = self._copies[label, content] if self.sampler == "balanced" else 0
        return len(self.candidates(label, query)) - copies

    def _disjoint_rows(self, label: str, first: str, second: str) -> list[int]:
        words = self._words[label]
        disjoint = (words[:, 0] != first) & (words[:, 1] != second)
        return list(itertools.compress(self._rows[label], disjoint.tolist()))


def draw_demonstrations(
    pool: Pool,
    queries: Sequence[tuple[str, str]],
    *,
    shots: int,
    seed: int,
    same_split: bool = True,
    contents: Sequence[str] | None = None,
    rule: Rule = "exact",
) -> list[Demonstrations]:
    """The demonstrations of each of the ``queries``, (text, label) of every document in order.

    ``same_split``: the queries are themselves rows of the pool, and one more row is drawn. The
    first ``shots`` rows are shown. ``contents`` are what a prompt shows of each query; default: its
    text. ``rule`` exact: rows with the query's content are dropped, others of their class take
    their places where fewer than ``shots`` are left, and a class with too few rows for that, or for
    an even share, is an error; fewer: the same, but fewer may be shown; published: as the published
    code, which shows fewer without a word, and drops only what equals the query in text and label.

    Raises :class:`InputError` for negative shots, a pool with a single class, or more shots than
    the pool can give.
    """
    most = len(pool.texts) - same_split
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 0:
        raise InputError(f"shots must be a whole number >= 0, got {shots!r}")
    if len(pool.classes) < 2:
        raise InputError(f"{pool.name} has a single class, {pool.classes}; at least two are needed")
    if shots > most and rule != "fewer":
        raise InputError(
            f"{shots} shots are more than the {len(pool.texts)} rows of {pool.name} can give; ask "
            f"for at most {most}"
        )
    if shots == 0:
        return [Demonstrations([]) for _ in queries]
    rng = random.Random(seed)
    wanted = shots + 1 if same_split else shots
    shown = map(_content, [text for text, _ in queries] if contents is None else contents)
    drawn_for_all = []
    for number, ((text, label), content) in enumerate(zip(queries, shown, strict=True)):
        base, rest = divmod(wanted, len(pool.classes))
        counts = [(name, base) for name in pool.classes]
        # Called even when nothing is left over: it draws from the generator all the same.
        extra = {name for name, _ in rng.sample(counts, rest)}
        shares = {name: count + (name in extra) for name, count in counts}
        drawn: list[int] = []
        for name, share in shares.items():
            candidates = pool.candidates(name, text)
            drawn += rng.sample(candidates, min(share, len(candidates)))
        rng.shuffle(drawn)
        if rule == "published":
            rows = [i for i in drawn if (pool.texts[i], pool.labels[i]) != (text, label)]
        else:
            # A generator of its own: what stands before the other queries stays as it is.
            again = random.Random(f"{seed} {number}")
            rows = _without(pool, drawn, text, content, shots, again)
        if rule == "exact":
            usable = {name: pool.usable(name, text, content) for name in shares}
            if len(rows) < shots or min(usable.values()) < shots // len(usable):
                # The class that is furthest from its share.
                worst = max(shares, key=lambda name: shares[name] - usable[name])
                raise InputError(
                    f"{pool.name}: class {worst!r} has {usable[worst]} rows that can stand before "
                    f"the document {content[:60]!r}, where {shares[worst]} are drawn for {shots} "
                    f"demonstrations, which would be fewer or unbalanced. Ask for fewer shots, "
                    f"give the pool more rows, or let that pass with demonstrations='fewer'"
                )
        leaks = sum(pool.contents[i] == content for i in drawn)
        leaked = sum(pool.contents[i] == content for i in rows[:shots])
        drawn_for_all.append(Demonstrations(rows[:shots], leaked, leaks - leaked))
    return drawn_for_all


def _content(text: str) -> str:
    return " ".join(text.split())


def _without(
    pool: Pool, drawn: list[int], text: str, content: str, shots: int, rng: random.Random
) -> list[int]:
    """``drawn`` without rows of this content; others of their class stand in for those missing."""
    missing = shots - sum(pool.contents[i] != content for i in drawn)
    rows: list[int] = []
    for row in drawn:
        if pool.contents[row] != content:
            rows.append(row)
        elif missing > 0:
            others = [
                i
                for i in pool.candidates(pool.labels[row], text)
                if pool.contents[i] != content and i not in drawn and i not in rows
            ]
            rows += rng.sample(others, min(1, len(others)))
            missing -= bool(others)
    return rows
