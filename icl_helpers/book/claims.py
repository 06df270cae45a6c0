"""The paper's claims, and what the runs of the book say about each of them.

A claim has a rule that turns a run's results into a verdict. The rules are the only judges: nothing
on the page is typed but the claims, their places in the paper, and what later papers say.

Example
-------
>>> evidence = Evidence.of_run("runs/icl-tiny")
>>> [(claim.name, claim.judge(evidence).verdict) for claim in claims()]
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from icl_helpers.attention.heads import SCORE_THRESHOLD, heads_in_words
from icl_helpers.errors import InputError
from icl_helpers.evaluation.store import CELL, accuracies
from icl_helpers.files import assets_dir
from icl_helpers.results.outcomes import (
    Difference,
    Span,
    TaskOutcome,
    range_in_words,
    task_name,
    task_outcomes,
    verdict,
)
from icl_helpers.results.statistics import (
    benefit_changes,
    filled_keys,
    holm,
    is_distinguishable,
    paired_difference,
)
from icl_helpers.results.tables import published_accuracy
from icl_helpers.run.plan import run_info, run_table

__all__ = [
    "VERDICTS", "Claim", "Evidence", "Finding", "claims", "judged_lines", "published_gaps",
    "range_of_gaps",
]  # fmt: skip

VERDICTS = ("reproduced", "partly", "not reproduced", "undecided", "not testable here")
_JUDGED = dict(
    zip(("held", "held in part", "did not hold", "was not shown"), VERDICTS[:4], strict=True)
)
# From this share of all heads on, induction is not said to sit in few of them.
_FEW = 0.1
# A difference is called small where its whole interval lies within so many points.
SMALL = 10.0
# Accuracy is called close to chance where its interval comes within so many points of it.
CLOSE = 5.0


@dataclass(frozen=True)
class Finding:
    """A verdict, one of ``VERDICTS``; what it rests on, a line a task; and where it fails."""

    verdict: str
    effects: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a run has to say: its documents on abstract tasks and on text, and its heads' scores.

    ``scores`` are those of the heads, [layers, heads]; ``followers`` the shares of attention that
    the best heads pay, from the query of one prompt, to what followed earlier elements
    (:func:`icl_helpers.results.viewer.query_followers`). Each may be missing.
    """

    abstract: pd.DataFrame = field(default_factory=pd.DataFrame)
    text: pd.DataFrame = field(default_factory=pd.DataFrame)
    scores: np.ndarray | None = None
    followers: Mapping[str, Sequence[float]] | None = None

    @classmethod
    def of_run(cls, run_dir: str | os.PathLike[str]) -> Evidence:
        """Read a finished run; loads no model."""
        scores = json.loads((Path(run_dir) / "heads.json").read_text(encoding="utf-8"))["scores"]
        abstract = run_table(run_dir, "documents", "tasks")
        text = run_table(run_dir, "documents", "nlp_tasks")
        return cls(abstract, text, np.array(scores), run_info(run_dir).get("followers"))

    def documents(self, text: bool) -> pd.DataFrame:
        """The documents of one of the two groups of tasks."""
        return self.text if text else self.abstract

    def fractions(self, text: bool = False) -> list[float]:
        """Shares of heads that were removed, smallest first."""
        rows = self.documents(text)
        return [] if rows.empty else sorted(set(rows["fraction"].dropna()) - {0.0})

    @functools.cache  # noqa: B019 -- an object lives as long as its page is made
    def outcomes(
        self, text: bool, ablation: str, share: str = "larger", shots: str = "most"
    ) -> tuple[TaskOutcome, ...]:
        """Outcomes at the ``smaller`` or ``larger`` share of heads; none where not evaluated."""
        rows, fractions = self.documents(text), self.fractions(text)
        if share == "smaller" and len(fractions) < 2:
            return ()
        if rows.empty or not rows["ablation"].isin(["none", ablation, "knockout"]).any():
            return ()
        if shots == "none" and not (rows["shots"] == 0).any():
            return ()
        fraction = fractions[0] if share == "smaller" else None
        return tuple(
            task_outcomes(rows, ablation=ablation, fraction=fraction, shots=shots, levels=False)
        )

    def learnt(self, text: bool = False) -> set[tuple[str, str]]:
        """Tasks (with labels) on which the full model is above chance with the most examples."""
        full = (it for it in self.outcomes(text, "mean") if it.condition == "full")
        return {(it.task, it.labels) for it in full if it.level == "above chance"}

    def cell(self, task: TaskOutcome, text: bool = False, **other: Any) -> pd.DataFrame:
        """The documents of a task's cell, or of the one that differs from it in some keys."""
        key = {name: getattr(task, name) for name in CELL}
        rows = filled_keys(self.documents(text))
        for name, value in (key | other).items():
            rows = rows[rows[name] == value]
        return rows


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and how it is judged.

    ``place`` says where it stands in the paper, ``rule`` in words when it is reproduced and what
    contradicts it, ``stage`` which stage measures it, ``published`` the published values of the
    same thing, ``later`` what later work says about it, in Markdown.
    """

    name: str
    text: str
    place: str
    stage: int
    rule: str
    judge: Callable[[Evidence], Finding]
    published: str
    later: str = ""


# One task's share in a claim: its name, whether the claim holds of it, whether it contradicts it.
_Seen = tuple[str, bool, bool]


def _finding(seen: Sequence[_Seen]) -> Finding:
    if not seen:
        return Finding("not testable here")
    judged = verdict([holds for _, holds, _ in seen], [against for *_, against in seen])
    failed = tuple(text for text, holds, _ in seen if not holds)
    return Finding(_JUDGED[judged], tuple(text for text, *_ in seen), failed)


def _tasks(
    evidence: Evidence, condition: str, *, text: bool = False, ablation: str = "mean",
    share: str = "larger", shots: str = "most", labels: str | None = None,
) -> list[TaskOutcome]:  # fmt: skip
    """Outcomes of a condition on the tasks that the full model has learnt."""
    learnt = evidence.learnt(text)
    return [
        it
        for it in evidence.outcomes(text, ablation, share, shots)
        if it.condition == condition
        and (it.task, it.labels) in learnt
        and labels in (None, it.labels)
    ]


def _name(task: TaskOutcome, text: bool = False) -> str:
    return f"{task_name(task.task)}{f' ({task.labels} labels)' if text else ''}"


def _points(name: str, found: Difference) -> str:
    doubt = "" if found.distinguishable else ", not distinguishable"
    return (
        f"{name}: {round(found.points):+d} points "
        f"({round(found.low):+d} to {round(found.high):+d}{doubt})"
    )


def _falls(
    against: str, *, condition: str = "induction_heads", control: str = "", text: bool = False,
    **options: Any,
) -> Callable[[Evidence], Finding]:  # fmt: skip
    """Accuracy without the heads is lower than that of the full model, or of the control."""

    def judge(evidence: Evidence) -> Finding:
        seen = []
        for task in _tasks(evidence, condition, text=text, **options):
            rivals = (it for it in task.differences if it.against == against)
            found = next((it for it in rivals if it.control in ("", control or it.control)), None)
            if found is not None:
                seen.append(_seen_difference(_name(task, text), found, -1))
        return _finding(seen)

    return judge


def _seen_difference(name: str, found: Difference, sign: int) -> _Seen:
    return _points(name, found), found.sign == sign, found.sign == -sign


def _unmoved(evidence: Evidence) -> Finding:
    """Without examples, removal changes little: the whole interval is small."""
    seen = []
    for text in (False, True):
        for task in _tasks(evidence, "induction_heads", text=text, shots="none"):
            found = task.to_full
            if found is not None:
                effect = _points(_name(task, text), found)
                seen.append((effect, _is_small(found), _is_large(found)))
    return _finding(seen)


def _paired(
    evidence: Evidence, pairs: Sequence[tuple[str, pd.DataFrame, pd.DataFrame]]
) -> list[Difference]:
    """Differences of pairs of cells, with the tests corrected over the pairs."""
    found = [paired_difference(first, second) for _, first, second in pairs]
    if not found:
        return []
    lows, highs = (pd.Series([getattr(it, side) for it, _ in found]) for side in ("low", "high"))
    told = is_distinguishable(pd.Series(holm([p for _, p in found])), lows, highs)
    return [
        Difference("", "", it.mean, it.low, it.high, bool(yes))
        for (it, _), yes in zip(found, told, strict=True)
    ]


def _pairs_claim(
    pairs: Callable[[Evidence], list[tuple[str, pd.DataFrame, pd.DataFrame]]],
    holds: Callable[[Difference], bool], against: Callable[[Difference], bool],
) -> Callable[[Evidence], Finding]:  # fmt: skip
    """Judge a claim about differences between cells that no table compares."""

    def judge(evidence: Evidence) -> Finding:
        wanted = [pair for pair in pairs(evidence) if len(pair[1]) and len(pair[2])]
        return _finding(
            [
                (_points(name, it), holds(it), against(it))
                for (name, *_), it in zip(wanted, _paired(evidence, wanted), strict=True)
            ]
        )

    return judge


def _is_small(found: Difference) -> bool:
    return max(-found.low, found.high) <= SMALL


def _is_large(found: Difference) -> bool:
    return found.low > SMALL or found.high < -SMALL


def _shares(evidence: Evidence) -> list[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """The larger share of heads removed, and the smaller."""
    fractions = evidence.fractions()
    if len(fractions) < 2:
        return []
    return [
        (_name(it), evidence.cell(it), evidence.cell(it, fraction=fractions[0]))
        for it in _tasks(evidence, "induction_heads")
    ]


def _blocked_and_removed(evidence: Evidence) -> list[tuple[str, pd.DataFrame, pd.DataFrame]]:
    return [
        (
            _name(it),
            evidence.cell(it),
            evidence.cell(it, condition="induction_heads", ablation="mean"),
        )
        for it in _tasks(evidence, "induction_pattern")
    ]


def _zero_and_mean(evidence: Evidence) -> list[tuple[str, pd.DataFrame, pd.DataFrame]]:
    return [
        (_name(it), evidence.cell(it), evidence.cell(it, ablation="mean"))
        for it in _tasks(evidence, "induction_heads", ablation="zero")
    ]


def _more_examples(evidence: Evidence) -> list[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """The full model with the most examples and with fewer, but some."""
    pairs = []
    for task in _tasks(evidence, "full"):
        rows = evidence.abstract[evidence.abstract["task"] == task.task]
        fewer = sorted(set(rows["shots"]) - {0, task.shots})
        if fewer:
            pairs.append((_name(task), evidence.cell(task), evidence.cell(task, shots=fewer[-1])))
    return pairs


def _removed_and_zero_shot(evidence: Evidence) -> list[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """On text, with examples and without the heads, beside the full model without examples."""
    full = {"shots": 0, "condition": "full", "ablation": "none", "fraction": 0.0, "control": ""}
    return [
        (_name(it, True), evidence.cell(it, True), evidence.cell(it, True, **full))
        for it in _tasks(evidence, "induction_heads", text=True)
    ]


def _level_claim(
    condition: str, holds: Callable[[TaskOutcome], bool], *, shots: str = "most",
    learnt: bool = True, against: Callable[[TaskOutcome], bool] = lambda _: True,
) -> Callable[[Evidence], Finding]:  # fmt: skip
    """Judge a claim about the accuracy of one condition beside chance."""

    def judge(evidence: Evidence) -> Finding:
        found = _tasks(evidence, condition, shots=shots) if learnt else [
            it for it in evidence.outcomes(False, "mean", "larger", shots)
            if it.condition == condition
        ]  # fmt: skip
        return _finding(
            [
                (f"{_name(it)}: {it.accuracy.mean:.0f} % ({it.accuracy.low:.0f} to "
                 f"{it.accuracy.high:.0f}; chance {it.chance:.0f}"
                 f"{', one label for nearly all documents' if it.level == 'one label' else ''})",
                 holds(it), against(it) and not holds(it))
                for it in found
            ]
        )  # fmt: skip

    return judge


def _near_chance(task: TaskOutcome, margin: float = 0.0) -> bool:
    return task.accuracy.low - margin <= task.chance <= task.accuracy.high + margin


def _few_heads(evidence: Evidence) -> Finding:
    if evidence.scores is None:
        return _finding([])
    total = evidence.scores.size
    count = int((evidence.scores >= SCORE_THRESHOLD).sum())
    said = heads_in_words(count / total, total) if count else f"none of {total:,} heads"
    return _finding([(f"{said} score {SCORE_THRESHOLD} or more", 0 < count <= _FEW * total, True)])


def _best_head(evidence: Evidence) -> Finding:
    if evidence.scores is None:
        return _finding([])
    layer, head = divmod(int(evidence.scores.argmax()), evidence.scores.shape[1])
    best = float(evidence.scores.max())
    return _finding([(f"layer {layer} head {head}: {best:.2f}", best >= 0.9, best < 0.9)])


def _looks(category: str) -> Callable[[Evidence], Finding]:
    def judge(evidence: Evidence) -> Finding:
        shares = (evidence.followers or {}).get(category, [])
        return _finding(
            [(f"best head: {100 * share:.0f} % of its attention, on one prompt", share > 0.5, True)
             for share in shares[:1]]
        )  # fmt: skip

    return judge


def _benefit(evidence: Evidence) -> Finding:
    """On text, what examples add is smaller without the heads."""
    rows = evidence.text
    if rows.empty or not evidence.fractions(True) or rows["shots"].nunique() < 2:
        return _finding([])
    changes = benefit_changes(accuracies(rows), rows)
    chosen = changes[
        (changes["condition"] == "induction_heads") & (changes["ablation"] == "mean")
        & (changes["fraction"] == evidence.fractions(True)[-1]) & (changes["left_out"] == "")
    ]  # fmt: skip
    return _finding(
        [(f"{task_name(it.task)} ({it.labels} labels): {it.relative_change:+.0f} % of the "
          f"benefit ({it.low:+.0f} to {it.high:+.0f})", it.high < 0, it.low > 0)
         for it in chosen.itertuples()]
    )  # fmt: skip


def published_gaps(
    number: int, condition: str, *, fraction: float = 0.03, against: str = "full",
    shots: str = "most",
) -> pd.DataFrame:  # fmt: skip
    """Return what a published table says of a condition beside another one of the same row.

    Columns: model, task, labels, shots (each task's ``most``, or ``none``) and gap, in points.
    """
    rows, key = published_accuracy().query("table == @number"), ["model", "task", "labels"]
    most = rows.groupby(key)["shots"].transform("max")
    rows = rows[rows["shots"] == (most if shots == "most" else 0)]
    value = rows[(rows["condition"] == condition) & (rows["fraction"] == fraction)]
    rival = rows[(rows["condition"] == against) & rows["fraction"].isin([fraction, 0])]
    both = value.merge(rival, on=[*key, "shots"], suffixes=("", "_against"))
    return both[[*key, "shots"]].assign(gap=both["accuracy"] - both["accuracy_against"])


def range_of_gaps(gaps: pd.Series, by: pd.Series) -> dict[str, str]:
    """Word the range of differences, in points, by a key in the order of its appearance."""
    bounds = gaps.groupby(by, sort=False).agg(["min", "max"]).round()
    return {
        str(name): f"{low or 0:+.0f} to {high or 0:+.0f}" for name, low, high in bounds.itertuples()
    }


def _published(
    number: int, condition: str = "induction_heads", *, labels: str | None = None, **options: Any
) -> Callable[[], str]:
    """Word the published differences of a condition as a range over tasks, by model."""

    def say() -> str:
        gaps = published_gaps(number, condition, **options)
        gaps = gaps[gaps["labels"] == labels] if labels else gaps
        ranges = sorted(range_of_gaps(gaps["gap"], gaps["model"]).items())
        return "; ".join(f"{model} {of} points (Table {number})" for model, of in ranges)

    return say


def _published_level(
    condition: str, *, shots: str = "most", fraction: float = 0.0
) -> Callable[[], str]:
    """Word the published accuracies of a condition on the abstract tasks, by number of labels."""

    def say() -> str:
        rows = published_accuracy().query("table == 1")
        most = rows.groupby(["model", "task"])["shots"].transform("max")
        rows = rows[rows["shots"] == (most if shots == "most" else 0)]
        rows = rows[(rows["condition"] == condition) & (rows["fraction"] == fraction)]
        said = []
        for (model, four), part in rows.groupby(["model", rows["task"].str.contains("4way")]):
            span = Span.of(list(part["accuracy"]))
            said.append(f"{model}, {'four' if four else 'two'} labels, {range_in_words(span)} %")
        return f"{'; '.join(said)} (Table 1)" if said else "no number is published"

    return say


def _published_more() -> str:
    rows = published_accuracy().query("table == 1 and condition == 'full' and shots in (5, 10)")
    wide = rows.pivot(index=["model", "task"], columns="shots", values="accuracy").dropna()
    gaps = (wide[10] - wide[5]).groupby("model").agg(["min", "max"]).round()
    said = [f"{model} {low:+.0f} to {high:+.0f} points" for model, (low, high) in gaps.T.items()]
    return f"{'; '.join(said)} from 5 to 10 examples (Table 1)"


_JUDGES: Mapping[str, tuple[Callable[[Evidence], Finding], Callable[[], str] | None]] = {
    "few-heads": (_few_heads, None),
    "best-head": (_best_head, None),
    "zero-shot-chance": (
        _level_claim("full", _near_chance, shots="none", learnt=False), None,
    ),
    "few-shot": (
        _level_claim(
            "full", lambda task: task.level == "above chance", learnt=False,
            against=lambda task: task.accuracy.high <= task.chance + SMALL,
        ),
        _published_level("full"),
    ),
    "more-examples": (
        _pairs_claim(_more_examples, lambda it: it.sign > 0, lambda it: it.sign < 0),
        _published_more,
    ),
    "one-percent": (_falls("full", share="smaller"), _published(1, fraction=0.01)),
    "three-percent": (_falls("full"), _published(1)),
    "more-heads": (
        _pairs_claim(_shares, lambda it: it.sign < 0, lambda it: it.sign > 0),
        lambda: f"1 %: {_published(1, fraction=0.01)()}; 3 %: {_published(1)()}",
    ),
    "random-control": (
        _falls("random_heads", control="published"), _published(1, against="random_heads"),
    ),
    "strict-control": (_falls("random_heads", control="strict"), None),
    "near-chance": (
        _level_claim("induction_heads", lambda task: _near_chance(task, CLOSE)),
        _published_level("induction_heads", fraction=0.03),
    ),
    "zero-shot-unmoved": (_unmoved, _published(3, shots="none")),
    "knockout": (
        _falls("full", condition="induction_pattern"), _published(1, "induction_pattern"),
    ),
    "knockout-as-removal": (
        _pairs_claim(_blocked_and_removed, _is_small, _is_large),
        _published(1, "induction_pattern", against="induction_heads"),
    ),
    "zero-ablation": (_falls("full", ablation="zero"), _published(4)),
    "zero-as-mean": (
        _pairs_claim(_zero_and_mean, _is_small, _is_large),
        lambda: f"mean: {_published(1)()}; zero: {_published(4)()}",
    ),
    "text-removal": (
        _falls("random_heads", text=True),
        _published(3, against="random_heads"),
    ),
    "text-benefit": (_benefit, None),
    "text-zero-shot": (_pairs_claim(_removed_and_zero_shot, _is_small, _is_large), None),
    "unrelated-labels": (
        _falls("full", text=True, labels="unrelated"), _published(3, labels="unrelated"),
    ),
    "text-zero-ablation": (_falls("full", text=True, ablation="zero"), _published(5)),
    "looks-at-labels": (_looks("colons"), None),
    "looks-at-followers": (_looks("words"), None),
}  # fmt: skip

_SHARED = {
    "few": f"{100 * _FEW:.0f}", "small": f"{SMALL:.0f}", "close": f"{CLOSE:.0f}",
    "lower": (
        "Holds of a task whose accuracy is distinguishably lower; distinguishably higher "
        "contradicts it."
    ),
    "learnt": "Tasks on which the full model is above chance count.",
}  # fmt: skip


@functools.cache
def claims() -> tuple[Claim, ...]:
    """Return the paper's claims in order, with their rules."""
    stated = yaml.safe_load((assets_dir() / "claims.yaml").read_text(encoding="utf-8"))
    found = []
    for name, (judge, published) in _JUDGES.items():
        claim = stated.pop(name)
        typed = claim.pop("published", "")
        rule = claim.pop("rule").format(**_SHARED)
        found.append(
            Claim(
                name, **claim, rule=rule, judge=judge,
                published=published() if published else typed,
            )
        )  # fmt: skip
    if stated:
        raise InputError(f"no rule judges the claim {next(iter(stated))!r}")
    return tuple(found)


def judged_lines(evidence: Evidence, stages: Sequence[int]) -> list[str]:
    """Say of every claim that these stages measure what the evidence makes of it."""
    lines = []
    for claim in claims():
        if claim.stage not in stages:
            continue
        found = claim.judge(evidence)
        count, held = len(found.effects), len(found.effects) - len(found.failed)
        on = f"; it holds {held} of {count} times, not for {'; '.join(found.failed)}"
        every = f" ({'; '.join(found.effects)})" if found.effects else ""
        lines.append(
            f"*{claim.text}* **{found.verdict.capitalize()}**{on if found.failed else every}."
        )
    return lines
