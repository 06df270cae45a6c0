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

from icl_helpers.analysis.bias import skill_change
from icl_helpers.attention.heads import SCORE_THRESHOLD, heads_in_words
from icl_helpers.errors import InputError
from icl_helpers.evaluation.store import CELL, accuracies
from icl_helpers.files import assets_dir
from icl_helpers.results.outcomes import (
    Difference,
    Span,
    TaskOutcome,
    counted,
    listed,
    paired_tests,
    range_in_words,
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
from icl_helpers.results.tables import published_more, published_ranges, published_rows
from icl_helpers.run.plan import run_info, run_table
from icl_helpers.tasks.specs import STAND_IN_TASKS, task_name

__all__ = ["VERDICTS", "Claim", "Evidence", "Finding", "claims", "judged_lines"]

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
    """A verdict, one of ``VERDICTS``; what it rests on, a line a task; and where it fails.

    ``reason`` says why a claim is not testable, or why it was not judged by some of the tasks.
    """

    verdict: str
    effects: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    reason: str = ""

    @property
    def because(self) -> str:
        """What the verdict rests on, as it stands after it."""
        effects = f": {'; '.join(self.effects)}" if self.effects else ""
        return effects + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a run has to say: its documents on abstract tasks and on text, and its heads' scores.

    ``scores`` are those of the heads, [layers, heads]; ``followers`` the shares of attention that
    the best heads pay, from the query of each of a few prompts, to what followed earlier elements
    (:meth:`icl_helpers.Run.followers`). Each may be missing.
    """

    abstract: pd.DataFrame = field(default_factory=pd.DataFrame)
    text: pd.DataFrame = field(default_factory=pd.DataFrame)
    scores: np.ndarray | None = None
    followers: Mapping[str, Mapping[str, Sequence[float]]] | None = None

    @classmethod
    def of_run(cls, run_dir: str | os.PathLike[str]) -> Evidence:
        """Read a finished run; loads no model."""
        scores = json.loads((Path(run_dir) / "heads.json").read_text(encoding="utf-8"))["scores"]
        abstract = run_table(run_dir, "documents", "tasks")
        text = run_table(run_dir, "documents", "nlp_tasks")
        return cls(abstract, text, np.array(scores), run_info(run_dir).get("query_followers"))

    def documents(self, text: bool) -> pd.DataFrame:
        """Return the documents of one of the two groups of tasks."""
        return self.text if text else self.abstract

    def fractions(self, text: bool) -> list[float]:
        """Return the shares of heads that were removed, smallest first."""
        rows = self.documents(text)
        return [] if rows.empty else sorted(set(rows["fraction"].dropna()) - {0.0})

    @cache  # noqa: B019 -- an object lives as long as its page is made
    def outcomes(
        self, text: bool, ablation: str, share: str, shots: str
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
            task_outcomes(
                rows, ablation=ablation, fraction=fraction, shots=shots, levels=False,
                tests=self._tests(text, ablation),
            )
        )  # fmt: skip

    @cache  # noqa: B019
    def _tests(self, text: bool, ablation: str) -> pd.DataFrame:
        return paired_tests(self.documents(text), ablation=ablation)

    @property
    def size(self) -> str:
        """How many documents, seeds and draws of random heads there are at most."""
        rows = pd.concat([self.abstract, self.text], ignore_index=True)
        if rows.empty:
            return "no documents"
        documents = rows.groupby(["task", "labels"], dropna=False)["doc_id"].nunique().max()
        seeds, draws = (rows[f"{kind}_seed"].nunique() for kind in ("demonstration", "ablation"))
        return (
            f"{counted(documents, 'document')} of a task at most, "
            f"{counted(seeds, 'demonstration seed')} and {counted(draws, 'draw')} of random heads"
        )

    def learnt(self, text: bool) -> set[tuple[str, str]]:
        """Tasks (with labels) on which the full model is above chance with the most examples.

        Text made from templates says nothing about the paper's tasks.
        """
        full = (
            it for it in self.outcomes(text, "mean", "larger", "most") if it.condition == "full"
        )
        return {
            it.row for it in full if it.level == "above chance" and it.task not in STAND_IN_TASKS
        }

    def cell(self, task: TaskOutcome, text: bool = False, **other: Any) -> pd.DataFrame:
        """Select the documents of a task's cell, or of the one that differs in some keys."""
        key = {name: getattr(task, name) for name in CELL} | other
        return self._cells(text).get(tuple(key.values()), self.documents(text).iloc[:0])

    @cache  # noqa: B019
    def _cells(self, text: bool) -> dict[Any, pd.DataFrame]:
        return dict(iter(filled_keys(self.documents(text)).groupby(CELL)))


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
# Two cells that are compared, with the name of their task.
_Pair = tuple[str, pd.DataFrame, pd.DataFrame]

_FULL = {"condition": "full", "ablation": "none", "fraction": 0.0, "control": ""}


def _finding(seen: Sequence[_Seen], reason: str = "") -> Finding:
    if not seen:
        return Finding("not testable here", reason=reason)
    judged = verdict([holds for _, holds, _ in seen], [against for *_, against in seen])
    failed = tuple(text for text, holds, _ in seen if not holds)
    return Finding(_JUDGED[judged], tuple(text for text, *_ in seen), failed, reason)


def _tasks(
    evidence: Evidence, condition: str, *, text: bool = False, ablation: str = "mean",
    share: str = "larger", shots: str = "most", labels: str | None = None,
) -> list[TaskOutcome]:  # fmt: skip
    """Outcomes of a condition on the tasks that the full model has learnt."""
    learnt = evidence.learnt(text)
    return [
        it
        for it in evidence.outcomes(text, ablation, share, shots)
        if it.condition == condition and it.row in learnt and labels in (None, it.labels)
    ]


_NAMES = {"induction_pattern": "the knockout", "random_heads": "this control"}


def _why_none(
    evidence: Evidence, condition: str = "induction_heads", *, text: bool = False,
    ablation: str = "mean", share: str = "larger", shots: str = "most", labels: str | None = None,
) -> str:  # fmt: skip
    """Say why :func:`_tasks` has none."""
    rows = evidence.documents(text)
    if rows.empty:
        return f"no {'text' if text else 'abstract'} task was run"
    if text and set(rows["task"]) <= set(STAND_IN_TASKS):
        return "the run's texts are made from templates, in place of the paper's"
    if labels is not None and labels not in set(rows["labels"]):
        return f"no task with {labels} labels was run"
    if not evidence.learnt(text):
        return "the full model is above chance on none of the tasks"
    if share == "smaller" and len(evidence.fractions(text)) < 2:
        return "one number of heads was removed"
    if shots == "none" and not (rows["shots"] == 0).any():
        return "nothing was run without examples"
    return f"{_NAMES.get(condition, f'{ablation} ablation')} was not run"


def _name(task: TaskOutcome, text: bool = False) -> str:
    return f"{task_name(task.task)}{f' ({task.labels} labels)' if text else ''}"


def _points(name: str, found: Difference) -> str:
    doubt = ""
    if not found.distinguishable:
        apart = found.low > 0 or found.high < 0
        doubt = f", not distinguishable{' by the corrected test' if apart else ''}"
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
        seen, tasks = [], _tasks(evidence, condition, text=text, **options)
        for task in tasks:
            rivals = (it for it in task.differences if it.against == against)
            found = next((it for it in rivals if it.control in ("", control or it.control)), None)
            if found is not None:
                skill = _skill(evidence, task, text) if against == "full" and found.sign < 0 else ""
                effect = _points(_name(task, text), found)
                seen.append((effect + skill, found.sign < 0, found.sign > 0))
        missing = against if tasks else condition
        return _finding(seen, "" if seen else _why_none(evidence, missing, text=text, **options))

    return judge


def _skill(evidence: Evidence, task: TaskOutcome, text: bool) -> str:
    """Say whether what was lost is the skill to tell labels apart, or a matter of bias."""
    full = evidence.cell(task, text, **_FULL)
    change = skill_change(full, evidence.cell(task, text)) if len(full) else None
    return "" if change is None else f"; {change.in_words}"


def _unmoved(evidence: Evidence) -> Finding:
    """Without examples, removal changes little: the whole interval is small."""
    seen, stuck = [], []
    for text in (False, True):
        one_label = {
            it.row
            for it in evidence.outcomes(text, "mean", "larger", "none")
            if it.condition == "full" and it.level == "one label"
        }
        for task in _tasks(evidence, "induction_heads", text=text, shots="none"):
            found = task.to_full
            if found is None:
                continue
            if task.level == "one label" and task.row in one_label:
                stuck.append(_name(task, text))
            else:
                effect = _points(_name(task, text), found)
                seen.append((effect, _is_small(found), _is_large(found)))
    why = "" if seen or stuck else _why_none(evidence, shots="none")
    return _finding(seen, why or _left_out(stuck, "one label with the heads and without them"))


def _left_out(names: Sequence[str], why: str) -> str:
    return f"left out: {listed(names)} ({why})" if names else ""


def _paired(pairs: Sequence[_Pair]) -> list[Difference]:
    """Differences of pairs of cells, with the tests corrected over the pairs."""
    found = [paired_difference(first, second) for _, first, second in pairs]
    lows, highs = (pd.Series([getattr(it, side) for it, _ in found]) for side in ("low", "high"))
    told = is_distinguishable(pd.Series(holm([p for _, p in found])), lows, highs)
    return [
        Difference("", "", it.mean, it.low, it.high, bool(yes))
        for (it, _), yes in zip(found, told, strict=True)
    ]


def _pairs_claim(
    pairs: Callable[[Evidence], tuple[list[_Pair], str]],
    holds: Callable[[Difference], bool], against: Callable[[Difference], bool],
) -> Callable[[Evidence], Finding]:  # fmt: skip
    """Judge a claim about differences between cells that no table compares."""

    def judge(evidence: Evidence) -> Finding:
        every, reason = pairs(evidence)
        wanted = [pair for pair in every if len(pair[1]) and len(pair[2])]
        return _finding(
            [
                (_points(name, it), holds(it), against(it))
                for (name, *_), it in zip(wanted, _paired(wanted), strict=True)
            ],
            reason,
        )

    return judge


def _is_small(found: Difference) -> bool:
    return max(-found.low, found.high) <= SMALL


def _is_large(found: Difference) -> bool:
    return found.low > SMALL or found.high < -SMALL


def _costs(task: TaskOutcome) -> bool:
    return task.to_full is not None and task.to_full.sign < 0


def _removals(
    first: Mapping[str, str], second: Mapping[str, str]
) -> Callable[[Evidence], tuple[list[_Pair], str]]:
    """Pair two removals of the same tasks; where neither costs anything there is no telling."""

    def pairs(evidence: Evidence) -> tuple[list[_Pair], str]:
        wanted: Any = [{"condition": "induction_heads", **side} for side in (first, second)]
        firsts, seconds = ({it.row: it for it in _tasks(evidence, **side)} for side in wanted)
        if not firsts or not seconds:
            return [], _why_none(evidence, **wanted[1 if not seconds else 0])
        both = [(it, seconds[row]) for row, it in firsts.items() if row in seconds]
        left = [_name(pair[0]) for pair in both if not any(map(_costs, pair))]
        costly = [pair for pair in both if any(map(_costs, pair))]
        cells = [(_name(it), evidence.cell(it), evidence.cell(other)) for it, other in costly]
        return cells, _left_out(left, "neither costs distinguishably")

    return pairs


def _more_examples(evidence: Evidence) -> tuple[list[_Pair], str]:
    """The full model with the most examples and with fewer, but some."""
    pairs, tasks = [], _tasks(evidence, "full")
    for task in tasks:
        rows = evidence.abstract[evidence.abstract["task"] == task.task]
        fewer = sorted(set(rows["shots"]) - {0, task.shots})
        if fewer:
            pairs.append((_name(task), evidence.cell(task), evidence.cell(task, shots=fewer[-1])))
    why = "one number of examples was run" if tasks else _why_none(evidence, "full")
    return pairs, "" if pairs else why


def _removed_and_zero_shot(evidence: Evidence) -> tuple[list[_Pair], str]:
    """On text where examples help: without the heads, beside the full model without examples."""
    pairs, left = [], []
    tasks = _tasks(evidence, "induction_heads", text=True)
    for it in tasks:
        with_examples = evidence.cell(it, True, **_FULL)
        without = evidence.cell(it, True, **_FULL, shots=0)
        if not len(with_examples) or not len(without):
            continue
        if paired_difference(with_examples, without)[0].low > 0:
            pairs.append((_name(it, True), evidence.cell(it, True), without))
        else:
            left.append(_name(it, True))
    if not tasks:
        return [], _why_none(evidence, text=True)
    return pairs, _left_out(left, "examples do not help the full model")


def _level_claim(
    condition: str, holds: Callable[[TaskOutcome], bool], *, shots: str = "most",
    against: Callable[[TaskOutcome], bool] = lambda _: True,
) -> Callable[[Evidence], Finding]:  # fmt: skip
    """Judge a claim about the accuracy of one condition beside chance, on every abstract task."""

    def judge(evidence: Evidence) -> Finding:
        outcomes = evidence.outcomes(False, "mean", "larger", shots)
        found = [it for it in outcomes if it.condition == condition]
        stuck = [_name(it) for it in found if shots == "none" and it.level == "one label"]
        seen = [it for it in found if _name(it) not in stuck]
        return _finding(
            [(_level(it), holds(it), against(it) and not holds(it)) for it in seen],
            _left_out(stuck, "one label for nearly all documents gives chance by itself")
            if found
            else "no abstract task was run so",
        )

    return judge


def _level(task: TaskOutcome) -> str:
    same = ", one label for nearly all documents" if task.level == "one label" else ""
    return (
        f"{_name(task)}: {task.accuracy.mean:.0f} % ({task.accuracy.low:.0f} to "
        f"{task.accuracy.high:.0f}; chance {task.chance:.0f}{same})"
    )


def _near_chance(task: TaskOutcome, margin: float = 0.0) -> bool:
    return task.accuracy.low - margin <= task.chance <= task.accuracy.high + margin


def _falls_to_chance(evidence: Evidence) -> Finding:
    """Without the heads accuracy is close to chance, and it was not before."""
    seen, left = [], []
    tasks = _tasks(evidence, "induction_heads")
    for task in tasks:
        near = _near_chance(task, CLOSE)
        if near and not _costs(task):
            left.append(_name(task))
        else:
            seen.append((_level(task) + _skill(evidence, task, False), near, not near))
    why = "" if tasks else _why_none(evidence)
    return _finding(
        seen,
        why or _left_out(left, "close to chance, but not distinguishably below the full model"),
    )


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
        seen = []
        for prompt, shares in (evidence.followers or {}).items():
            heads = shares.get(category)
            if heads and (category != "words" or prompt.startswith("wordseq")):
                count = sum(share > 0.5 for share in heads)
                said = f"{prompt}: best head {100 * heads[0]:.0f} %, {count} of {len(heads)} heads"
                seen.append((f"{said} more than half", heads[0] > 0.5, heads[0] <= 0.5))
        return _finding(seen, "" if seen else "no prompt that was looked at has such places")

    return judge


def _benefit(evidence: Evidence) -> Finding:
    """On text, what examples add is smaller without the heads."""
    rows = evidence.text
    rows = rows if rows.empty else rows[~rows["task"].isin(list(STAND_IN_TASKS))]
    if rows.empty or not evidence.fractions(True) or rows["shots"].nunique() < 2:
        return _finding([], _why_none(evidence, text=True, shots="none"))
    changes = benefit_changes(accuracies(rows), rows)
    chosen = changes[
        (changes["condition"] == "induction_heads") & (changes["ablation"] == "mean")
        & (changes["fraction"] == evidence.fractions(True)[-1]) & (changes["left_out"] == "")
    ]  # fmt: skip
    return _finding(
        [(f"{task_name(it.task)} ({it.labels} labels): {it.relative_change:+.0f} % of the "
          f"benefit ({it.low:+.0f} to {it.high:+.0f})", it.high < 0, it.low > 0)
         for it in chosen.itertuples()],
        "" if len(chosen) else "examples add nothing on any of the tasks, or they are at chance",
    )  # fmt: skip


def _published_levels(condition: str, fraction: float = 0.0, *, close: float | None = None) -> str:
    """Word the published accuracies of a condition on the abstract tasks, by number of labels.

    With ``close`` how many of them lie within so many points of chance.
    """
    rows = published_rows(1, condition, fraction=fraction)
    four = rows["task"].str.contains("4way")
    said = [
        f"{model}, {'four' if of_four else 'two'} labels, "
        f"{range_in_words(Span.of(list(accuracy)))} %"
        for (model, of_four), accuracy in rows.groupby(["model", four])["accuracy"]
    ]
    if close is None:
        return f"{'; '.join(said)} (Table 1)"
    near = int(((rows["accuracy"] - four.map({True: 25.0, False: 50.0})).abs() <= close).sum())
    within = f"within {close:.0f} points of chance in {near} of {len(rows)} rows"
    return f"{'; '.join(said)} (Table 1); {within}"


_JUDGES: Mapping[str, tuple[Callable[[Evidence], Finding], Callable[[], str] | None]] = {
    "few-heads": (_few_heads, None),
    "best-head": (_best_head, None),
    "zero-shot-chance": (
        _level_claim("full", _near_chance, shots="none"), None,
    ),
    "few-shot": (
        _level_claim(
            "full", lambda task: task.level == "above chance",
            against=lambda task: task.accuracy.high <= task.chance + SMALL,
        ),
        partial(_published_levels, "full"),
    ),
    "more-examples": (
        _pairs_claim(_more_examples, lambda it: it.sign > 0, lambda it: it.sign < 0),
        published_more,
    ),
    "one-percent": (_falls("full", share="smaller"), partial(published_ranges, 1, fraction=0.01)),
    "three-percent": (_falls("full"), partial(published_ranges, 1)),
    "more-heads": (
        _pairs_claim(
            _removals({}, {"share": "smaller"}), lambda it: it.sign < 0, lambda it: it.sign > 0
        ),
        lambda: f"1 %: {published_ranges(1, fraction=0.01)}; 3 %: {published_ranges(1)}",
    ),
    "random-control": (
        _falls("random_heads", control="published"),
        partial(published_ranges, 1, against="random_heads"),
    ),
    "strict-control": (_falls("random_heads", control="strict"), None),
    "near-chance": (
        _falls_to_chance, partial(_published_levels, "induction_heads", fraction=0.03, close=CLOSE),
    ),
    "zero-shot-unmoved": (_unmoved, partial(published_ranges, 3, shots="none")),
    "knockout": (
        _falls("full", condition="induction_pattern"),
        partial(published_ranges, 1, "induction_pattern"),
    ),
    "knockout-as-removal": (
        _pairs_claim(_removals({"condition": "induction_pattern"}, {}), _is_small, _is_large),
        partial(published_ranges, 1, "induction_pattern", against="induction_heads", small=SMALL),
    ),
    "zero-ablation": (_falls("full", ablation="zero"), partial(published_ranges, 4)),
    "zero-as-mean": (
        _pairs_claim(_removals({"ablation": "zero"}, {}), _is_small, _is_large),
        lambda: f"mean: {published_ranges(1)}; zero: {published_ranges(4)}",
    ),
    "text-removal": (
        _falls("random_heads", text=True),
        partial(published_ranges, 3, against="random_heads"),
    ),
    "text-benefit": (_benefit, None),
    "text-zero-shot": (_pairs_claim(_removed_and_zero_shot, _is_small, _is_large), None),
    "unrelated-labels": (
        _falls("full", text=True, labels="unrelated"),
        partial(published_ranges, 3, labels="unrelated"),
    ),
    "text-zero-ablation": (
        _falls("full", text=True, ablation="zero"), partial(published_ranges, 5),
    ),
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


@cache
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
        whole = "both" if count == 2 else f"all {count}"
        times = whole if held == count else f"{held or 'none'} of {count}"
        said = [f"in {times}"] if count > 1 else []
        said += [f"not in {'; '.join(found.failed)}"] if 0 < held < count else found.effects
        said += [found.reason] if found.reason else []
        because = f" ({'; '.join(said)})" if said else ""
        lines.append(f"*{claim.text}* **{found.verdict.capitalize()}**{because}.")
    return lines
