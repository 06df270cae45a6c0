"""The paper's claims, and what the runs of the book say about each of them.

A claim has a rule that turns a run's results into a verdict. The rules are the only judges: nothing
on the page is typed but the claims, their places in the paper, and what later papers say.

Example
-------
>>> evidence = Evidence.of_run("runs/icl-tiny")
>>> [(claim.name, claim.judge(evidence).verdict) for claim in claims()]
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
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
    "published_rows", "range_of_gaps",
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
        """Return the documents of one of the two groups of tasks."""
        return self.text if text else self.abstract

    def fractions(self, text: bool = False) -> list[float]:
        """Return the shares of heads that were removed, smallest first."""
        rows = self.documents(text)
        return [] if rows.empty else sorted(set(rows["fraction"].dropna()) - {0.0})

    @cache  # noqa: B019 -- an object lives as long as its page is made
    def outcomes(
        self, text: bool, ablation: str, share: str = "larger", shots: str = "most"
    ) -> tuple[TaskOutcome, ...]:
        """Compute outcomes at the ``smaller`` or ``larger`` share; none where not evaluated."""
        rows, fractions = self.documents(text), self.fractions(text)
        if (
            rows.empty
            or (share == "smaller" and len(fractions) < 2)
            or not rows["ablation"].isin(["none", ablation, "knockout"]).any()
            or (shots == "none" and not (rows["shots"] == 0).any())
        ):
            return ()
        fraction = fractions[0] if share == "smaller" else None
        return tuple(
            task_outcomes(rows, ablation=ablation, fraction=fraction, shots=shots, levels=False)
        )

    def learnt(self, text: bool = False) -> set[tuple[str, str]]:
        """Name tasks (with labels) that the full model solves above chance with the most shots."""
        full = (it for it in self.outcomes(text, "mean") if it.condition == "full")
        return {(it.task, it.labels) for it in full if it.level == "above chance"}

    def cell(self, task: TaskOutcome, text: bool = False, **other: Any) -> pd.DataFrame:
        """Select the documents of a task's cell, or of the one that differs in some keys."""
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


# One task's share in a claim: its effect, whether the claim holds of it, whether it contradicts it.
_Seen = tuple[str, bool, bool]
_Rule = Callable[[Evidence], list[_Seen]]


def _judged(rule: _Rule, evidence: Evidence) -> Finding:
    seen = rule(evidence)
    if not seen:
        return Finding("not testable here")
    judged = verdict([holds for _, holds, _ in seen], [against for *_, against in seen])
    failed = tuple(effect for effect, holds, _ in seen if not holds)
    return Finding(_JUDGED[judged], tuple(effect for effect, *_ in seen), failed)


def _tasks(
    evidence: Evidence, condition: str, *, text: bool = False, ablation: str = "mean",
    share: str = "larger", shots: str = "most", labels: str | None = None, learnt: bool = True,
) -> list[TaskOutcome]:  # fmt: skip
    """Select outcomes of a condition, on the tasks that the full model has learnt or on all."""
    known = evidence.learnt(text)
    return [
        it
        for it in evidence.outcomes(text, ablation, share, shots)
        if it.condition == condition
        and (not learnt or (it.task, it.labels) in known)
        and labels in (None, it.labels)
    ]


def _name(task: TaskOutcome, text: bool = False) -> str:
    return f"{task_name(task.task)}{f' ({task.labels} labels)' if text else ''}"


# Of a claim about a difference: when it holds, and what contradicts it.
_TESTS: dict[str, tuple[Callable[[Difference], bool], Callable[[Difference], bool]]] = {
    "lower": (lambda gap: gap.sign < 0, lambda gap: gap.sign > 0),
    "higher": (lambda gap: gap.sign > 0, lambda gap: gap.sign < 0),
    "small": (
        lambda gap: max(-gap.low, gap.high) <= SMALL,
        lambda gap: gap.low > SMALL or gap.high < -SMALL,
    ),
}


def _seen(name: str, gap: Difference, test: str) -> _Seen:
    holds, against = _TESTS[test]
    doubt = "" if gap.distinguishable else ", not distinguishable"
    bounds = f"{round(gap.low):+d} to {round(gap.high):+d}"
    return f"{name}: {round(gap.points):+d} points ({bounds}{doubt})", holds(gap), against(gap)


def _differs(
    evidence: Evidence, *, test: str = "lower", against: str = "full",
    condition: str = "induction_heads", control: str = "", text: bool = False, **options: Any,
) -> list[_Seen]:  # fmt: skip
    """Judge accuracy without the heads beside that of the full model, or of the control."""
    seen = []
    for task in _tasks(evidence, condition, text=text, **options):
        rivals = (gap for gap in task.differences if gap.against == against)
        gap = next((gap for gap in rivals if gap.control in ("", control or gap.control)), None)
        if gap is not None:
            seen.append(_seen(_name(task, text), gap, test))
    return seen


def _unmoved(evidence: Evidence) -> list[_Seen]:
    """Judge whether removal changes little without examples."""
    sides = (_differs(evidence, test="small", text=it, shots="none") for it in (False, True))
    return [seen for side in sides for seen in side]


def _pairs(
    evidence: Evidence, other: Callable[[Evidence, TaskOutcome], dict[str, Any]], *,
    test: str = "small", condition: str = "induction_heads", text: bool = False,
    ablation: str = "mean",
) -> list[_Seen]:  # fmt: skip
    """Compare a condition's cells with those that differ in the keys that ``other`` gives."""
    gaps = {}
    for task in _tasks(evidence, condition, text=text, ablation=ablation):
        keys = other(evidence, task)
        first, second = evidence.cell(task, text), evidence.cell(task, text, **keys)
        if keys and len(first) and len(second):
            gaps[_name(task, text)] = paired_difference(first, second)
    lows, highs = (pd.Series([gap[side] for gap, _ in gaps.values()]) for side in (1, 2))
    told = is_distinguishable(pd.Series(holm([p for _, p in gaps.values()])), lows, highs)
    return [
        _seen(name, Difference("", "", *gap, bool(yes)), test)
        for (name, (gap, _)), yes in zip(gaps.items(), told, strict=True)
    ]


def _fewer_heads(evidence: Evidence, _: TaskOutcome) -> dict[str, Any]:
    fractions = evidence.fractions()
    return {"fraction": fractions[0]} if len(fractions) > 1 else {}


def _fewer_examples(evidence: Evidence, task: TaskOutcome) -> dict[str, Any]:
    """Return the next number below the most, but not none."""
    rows = evidence.abstract[evidence.abstract["task"] == task.task]
    fewer = sorted(set(rows["shots"]) - {0, task.shots})
    return {"shots": fewer[-1]} if fewer else {}


def _level(
    evidence: Evidence, condition: str, holds: Callable[[TaskOutcome], bool], *,
    against: Callable[[TaskOutcome], bool] = lambda _: True, **options: Any,
) -> list[_Seen]:  # fmt: skip
    """Judge the accuracy of one condition beside chance."""
    seen = []
    for it in _tasks(evidence, condition, **options):
        bias = ", one label for nearly all documents" if it.level == "one label" else ""
        effect = (
            f"{_name(it)}: {it.accuracy.mean:.0f} % ({it.accuracy.low:.0f} to "
            f"{it.accuracy.high:.0f}; chance {it.chance:.0f}{bias})"
        )
        seen.append((effect, holds(it), against(it) and not holds(it)))
    return seen


def _near_chance(task: TaskOutcome, margin: float = 0.0) -> bool:
    return task.accuracy.low - margin <= task.chance <= task.accuracy.high + margin


def _few_heads(evidence: Evidence) -> list[_Seen]:
    if evidence.scores is None:
        return []
    total = evidence.scores.size
    count = int((evidence.scores >= SCORE_THRESHOLD).sum())
    said = heads_in_words(count / total, total) if count else f"none of {total:,} heads"
    return [(f"{said} score {SCORE_THRESHOLD} or more", 0 < count <= _FEW * total, True)]


def _best_head(evidence: Evidence) -> list[_Seen]:
    if evidence.scores is None:
        return []
    layer, head = divmod(int(evidence.scores.argmax()), evidence.scores.shape[1])
    best = float(evidence.scores.max())
    return [(f"layer {layer} head {head}: {best:.2f}", best >= 0.9, best < 0.9)]


def _looks(evidence: Evidence, category: str) -> list[_Seen]:
    return [
        (f"best head: {100 * share:.0f} % of its attention, on one prompt", share > 0.5, True)
        for share in (evidence.followers or {}).get(category, [])[:1]
    ]


def _benefit(evidence: Evidence) -> list[_Seen]:
    """Judge whether what examples add on text is smaller without the heads."""
    rows, fractions = evidence.text, evidence.fractions(True)
    if not fractions or rows["shots"].nunique() < 2:
        return []
    changes = benefit_changes(accuracies(rows), rows).query(
        "condition == 'induction_heads' and ablation == 'mean' and fraction == @fractions[-1] "
        "and left_out == ''"
    )
    return [
        (f"{task_name(it.task)} ({it.labels} labels): {it.relative_change:+.0f} % of the benefit "
         f"({it.low:+.0f} to {it.high:+.0f})", it.high < 0, it.low > 0)
        for it in changes.itertuples()
    ]  # fmt: skip


def published_rows(
    number: int, condition: str, *, fraction: float = 0.0, shots: str = "most"
) -> pd.DataFrame:
    """Select a published table's rows of a condition at each task's ``most`` or ``none`` shots."""
    rows = published_accuracy().query("table == @number")
    most = rows.groupby(["model", "task", "labels"])["shots"].transform("max")
    rows = rows[rows["shots"] == (most if shots == "most" else 0)]
    return rows[(rows["condition"] == condition) & (rows["fraction"] == fraction)]


def published_gaps(
    number: int, condition: str, *, fraction: float = 0.03, against: str = "full",
    shots: str = "most",
) -> pd.DataFrame:  # fmt: skip
    """Return what a published table says of a condition beside another one of the same row.

    Columns: model, task, labels, shots (each task's ``most``, or ``none``) and gap, in points.
    """
    key = ["model", "task", "labels", "shots"]
    value = published_rows(number, condition, fraction=fraction, shots=shots)
    beside = 0.0 if against == "full" else fraction
    rival = published_rows(number, against, fraction=beside, shots=shots)
    both = value.merge(rival, on=key, suffixes=("", "_against"))
    return both[key].assign(gap=both["accuracy"] - both["accuracy_against"])


def range_of_gaps(gaps: pd.Series, by: pd.Series) -> dict[str, str]:
    """Word the range of differences, in points, by a key in the order of its appearance."""
    bounds = gaps.groupby(by, sort=False).agg(["min", "max"]).round()
    return {
        str(name): f"{low or 0:+.0f} to {high or 0:+.0f}" for name, low, high in bounds.itertuples()
    }


def _published(
    number: int = 1, condition: str = "induction_heads", *, labels: str | None = None,
    **options: Any,
) -> str:  # fmt: skip
    """Word the published differences of a condition as a range over tasks, by model."""
    gaps = published_gaps(number, condition, **options)
    gaps = gaps[gaps["labels"] == labels] if labels else gaps
    ranges = sorted(range_of_gaps(gaps["gap"], gaps["model"]).items())
    return "; ".join(f"{model} {of} points (Table {number})" for model, of in ranges)


def _published_level(condition: str, fraction: float = 0.0) -> str:
    """Word the published accuracies of a condition on the abstract tasks, by number of labels."""
    rows = published_rows(1, condition, fraction=fraction)
    said = [
        f"{model}, {'four' if four else 'two'} labels, {range_in_words(Span.of(list(accuracy)))} %"
        for (model, four), accuracy in rows.groupby(["model", rows["task"].str.contains("4way")])[
            "accuracy"
        ]
    ]
    return f"{'; '.join(said)} (Table 1)"


def _published_more() -> str:
    rows = published_accuracy().query("table == 1 and condition == 'full' and shots in (5, 10)")
    wide = rows.pivot(index=["model", "task"], columns="shots", values="accuracy").dropna()
    gaps = (wide[10] - wide[5]).groupby("model").agg(["min", "max"]).round()
    said = [f"{model} {low:+.0f} to {high:+.0f} points" for model, (low, high) in gaps.T.items()]
    return f"{'; '.join(said)} from 5 to 10 examples (Table 1)"


_ZERO_SHOT = {"shots": 0, "condition": "full", "ablation": "none", "fraction": 0.0, "control": ""}
# By claim the rule that judges it, and what says the published values where they are accuracies.
_RULES: Mapping[str, tuple[_Rule, Callable[[], str] | None]] = {
    "few-heads": (_few_heads, None),
    "best-head": (_best_head, None),
    "zero-shot-chance": (
        partial(_level, condition="full", holds=_near_chance, shots="none", learnt=False), None,
    ),
    "few-shot": (
        partial(
            _level, condition="full", holds=lambda task: task.level == "above chance",
            against=lambda task: task.accuracy.high <= task.chance + SMALL, learnt=False,
        ),
        partial(_published_level, "full"),
    ),
    "more-examples": (
        partial(_pairs, condition="full", other=_fewer_examples, test="higher"), _published_more,
    ),
    "one-percent": (partial(_differs, share="smaller"), partial(_published, fraction=0.01)),
    "three-percent": (_differs, _published),
    "more-heads": (
        partial(_pairs, other=_fewer_heads, test="lower"),
        lambda: f"1 %: {_published(fraction=0.01)}; 3 %: {_published()}",
    ),
    "random-control": (
        partial(_differs, against="random_heads", control="published"),
        partial(_published, against="random_heads"),
    ),
    "strict-control": (partial(_differs, against="random_heads", control="strict"), None),
    "near-chance": (
        partial(_level, condition="induction_heads", holds=partial(_near_chance, margin=CLOSE)),
        partial(_published_level, "induction_heads", 0.03),
    ),
    "zero-shot-unmoved": (_unmoved, partial(_published, 3, shots="none")),
    "knockout": (
        partial(_differs, condition="induction_pattern"),
        partial(_published, 1, "induction_pattern"),
    ),
    "knockout-as-removal": (
        partial(
            _pairs, condition="induction_pattern",
            other=lambda *_: {"condition": "induction_heads", "ablation": "mean"},
        ),
        partial(_published, 1, "induction_pattern", against="induction_heads"),
    ),
    "zero-ablation": (partial(_differs, ablation="zero"), partial(_published, 4)),
    "zero-as-mean": (
        partial(_pairs, ablation="zero", other=lambda *_: {"ablation": "mean"}),
        lambda: f"mean: {_published()}; zero: {_published(4)}",
    ),
    "text-removal": (
        partial(_differs, against="random_heads", text=True),
        partial(_published, 3, against="random_heads"),
    ),
    "text-benefit": (_benefit, None),
    "text-zero-shot": (partial(_pairs, text=True, other=lambda *_: _ZERO_SHOT), None),
    "unrelated-labels": (
        partial(_differs, text=True, labels="unrelated"),
        partial(_published, 3, labels="unrelated"),
    ),
    "text-zero-ablation": (partial(_differs, text=True, ablation="zero"), partial(_published, 5)),
    "looks-at-labels": (partial(_looks, category="colons"), None),
    "looks-at-followers": (partial(_looks, category="words"), None),
}  # fmt: skip

_SHARED = {
    "few": f"{100 * _FEW:.0f}", "small": f"{SMALL:.0f}", "close": f"{CLOSE:.0f}",
    "lower": (
        "Holds of a task whose accuracy is distinguishably lower; distinguishably higher "
        "contradicts it."
    ),
    "learnt": "Tasks on which the full model is above chance count.",
}  # fmt: skip


@cache
def claims() -> tuple[Claim, ...]:
    """Return the paper's claims in order, with their rules."""
    stated = yaml.safe_load((assets_dir() / "claims.yaml").read_text(encoding="utf-8"))
    listed = []
    for name, (rule, published) in _RULES.items():
        claim = stated.pop(name)
        claim["rule"] = claim["rule"].format(**_SHARED)
        if published is not None:
            claim["published"] = published()
        listed.append(Claim(name, **claim, judge=partial(_judged, rule)))
    if stated:
        raise InputError(f"no rule judges the claim {next(iter(stated))!r}")
    return tuple(listed)


def judged_lines(evidence: Evidence, stages: Sequence[int]) -> list[str]:
    """Say of every claim that these stages measure what the evidence makes of it."""
    lines = []
    for claim in claims():
        if claim.stage in stages:
            finding = claim.judge(evidence)
            count, failed = len(finding.effects), finding.failed
            on = f"; it holds {count - len(failed)} of {count} times, not for {'; '.join(failed)}"
            every = f" ({'; '.join(finding.effects)})" if count else ""
            word = finding.verdict.capitalize()
            lines.append(f"*{claim.text}* **{word}**{on if failed else every}.")
    return lines
