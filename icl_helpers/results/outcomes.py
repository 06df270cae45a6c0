"""What came out of a run: facts by rule, and the sentences that state them.

Tasks are summed up only with others of their kind (letters, words with two or four labels, text),
and then with the range over them. A kind whose tasks behave differently has no mean: its tasks are
named. What a sentence calls lower, below chance or zero-shot-like is decided here, by the one rule
for doubt (:func:`icl_helpers.results.statistics.is_distinguishable`) and the limits below.

Example
-------
>>> outcomes = kind_outcomes(icl.document_results("runs/icl-tiny"))
>>> [line for outcome in outcomes for line in doubts(outcome)]
>>> [outcome_sentence(outcome, heads="4 of 64 heads (6.3 %)") for outcome in outcomes]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from icl_helpers.errors import InputError, MissingArtefactError
from icl_helpers.evaluation.store import CELL
from icl_helpers.files import embedded_dir, embedded_models
from icl_helpers.results.statistics import (
    Interval,
    accuracy_intervals,
    comparisons,
    filled_keys,
    is_distinguishable,
)
from icl_helpers.tasks.specs import (
    TextTaskSpec,
    chance_level,
    get_task_spec,
    task_kind,
    task_name,
)

__all__ = [
    "CONDITION_NAMES", "Difference", "KindOutcome", "Said", "Span", "TaskOutcome", "Verdict",
    "counted", "doubts", "findings", "headline", "kind_lines", "kind_outcomes", "listed",
    "outcome_sentence", "paired_tests", "predicted", "range_in_words", "read_measurements",
    "removal_caption", "removed_in_words", "seed_doubts", "side", "task_outcomes", "tasks_under",
    "training_seed_doubts", "verdict",
]  # fmt: skip

# Percent of documents from which on an answer is called that of all documents.
NEARLY_ALL = 95.0
_ROW = ["task", "labels"]


class Span(NamedTuple):
    """A number's mean over the tasks of a kind, and its range over them."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Span:
        """Sum up the numbers of the tasks."""
        return cls(float(np.mean(values)), min(values), max(values))


@dataclass(frozen=True)
class Difference:
    """Accuracy minus that of another condition, ``against``, in points with its 95 % interval.

    ``control`` says how the random heads were drawn where one side is random heads.
    """

    against: str
    control: str
    points: float
    low: float
    high: float
    distinguishable: bool

    @property
    def sign(self) -> int:
        """-1 for distinguishably lower, 1 for distinguishably higher, 0 for neither."""
        return int(np.sign(self.points)) if self.distinguishable else 0


@dataclass(frozen=True)
class TaskOutcome:
    """What one task gives under one condition; percent, points and nats.

    ``zero_shot_answers`` is the percentage of answers that are those of the full model without
    examples to the same documents, ``one_label`` the percentage of the most frequent label among
    the answers, ``margin`` the median by which the right label leads: all None where the run kept
    no answers. ``left_out`` counts documents whose numbers were not finite. ``seeds_disagree`` and
    ``draws_disagree`` say that single demonstration seeds or control draws lead to different
    conclusions, with ``by_seed`` and ``by_draw`` the accuracy of each.
    """

    task: str
    labels: str
    shots: int
    condition: str
    ablation: str
    fraction: float
    control: str
    chance: float
    documents: int
    left_out: int
    accuracy: Interval
    differences: tuple[Difference, ...]
    zero_shot_answers: float | None
    one_label: float | None
    margin: float | None
    by_seed: dict[int, float]
    by_draw: dict[int, float]
    seeds_disagree: bool
    draws_disagree: bool

    @property
    def row(self) -> tuple[str, str]:
        """The task with its labels, the same under every condition."""
        return self.task, self.labels

    @property
    def to_full(self) -> Difference | None:
        """The difference to the full model; None for itself, and where that was not evaluated."""
        return next((gap for gap in self.differences if gap.against == "full"), None)

    @property
    def level(self) -> str:
        """``one label``, ``below chance``, ``at chance`` or ``above chance``, the first that fits.

        One label: nearly all answers are the same, so accuracy is how often that label is right.
        """
        if self.one_label is not None and self.one_label >= NEARLY_ALL:
            return "one label"
        if self.accuracy.high < self.chance:
            return "below chance"
        return "above chance" if self.accuracy.low > self.chance else "at chance"

    @property
    def zero_shot_like(self) -> bool:
        """Whether nearly all answers with examples are those of the full model without any."""
        return self.shots > 0 and (self.zero_shot_answers or 0.0) >= NEARLY_ALL

    @property
    def conclusion(self) -> tuple[Any, ...]:
        """What is said of the task; tasks of a kind with equal conclusions have a common mean."""
        signs = [(gap.against, gap.control, gap.sign) for gap in self.differences]
        return self.level, self.zero_shot_like, *signs


@dataclass(frozen=True)
class KindOutcome:
    """What the tasks of one kind give under one condition."""

    kind: str
    condition: str
    ablation: str
    fraction: float
    control: str
    tasks: tuple[TaskOutcome, ...]

    @property
    def agree(self) -> bool:
        """Whether the same is to be said of all the tasks."""
        return len({task.conclusion for task in self.tasks}) == 1

    @property
    def chance(self) -> float:
        """Accuracy of guessing, in percent."""
        return self.tasks[0].chance

    @property
    def accuracy(self) -> Span:
        """Accuracy over the tasks, in percent."""
        return Span.of([task.accuracy.mean for task in self.tasks])

    @property
    def margin(self) -> Span | None:
        """Median margin of the right label over the tasks, in nats."""
        margins = [task.margin for task in self.tasks if task.margin is not None]
        return Span.of(margins) if margins else None


def kind_outcomes(
    documents: pd.DataFrame, *, ablation: str = "mean", shots: str = "most"
) -> list[KindOutcome]:
    """Compute what each kind of tasks gives under each condition; arguments: :func:`task_outcomes`.

    Kinds are in the tasks' order, and for each of them the conditions, the full model first.
    """
    groups: dict[tuple[str, str, str, float, str], list[TaskOutcome]] = {}
    for it in task_outcomes(documents, ablation=ablation, shots=shots):
        key = task_kind(it.task, it.labels), it.condition, it.ablation, it.fraction, it.control
        groups.setdefault(key, []).append(it)
    kinds = list(dict.fromkeys(kind for kind, *_ in groups))
    outcomes = [KindOutcome(*key, tasks=tuple(tasks)) for key, tasks in groups.items()]
    return sorted(
        outcomes, key=lambda it: (kinds.index(it.kind), list(CONDITION_NAMES).index(it.condition))
    )


def paired_tests(documents: pd.DataFrame, *, ablation: str = "mean") -> pd.DataFrame:
    """Compare conditions as :func:`icl_helpers.results.statistics.comparisons` does.

    Tests are corrected over the same rows as those of the paper's table of one kind of removal, so
    that a sentence and a star never differ.
    """
    rows = _under(documents, ablation)
    text = [it for it in rows["task"].unique() if isinstance(get_task_spec(it), TextTaskSpec)]
    families = [comparisons(family) for _, family in rows.groupby(rows["task"].isin(text))]
    return filled_keys(pd.concat(families, ignore_index=True))


def _under(documents: pd.DataFrame, ablation: str) -> pd.DataFrame:
    documents = filled_keys(documents)
    return documents[documents["ablation"].isin(["none", ablation, "knockout"])]


def task_outcomes(
    documents: pd.DataFrame, *, ablation: str = "mean", fraction: float | None = None,
    shots: str = "most", levels: bool = True, tests: pd.DataFrame | None = None,
) -> list[TaskOutcome]:  # fmt: skip
    """Compute what each task gives under the full model, one kind of removal and the knockout.

    ``documents`` is :func:`icl_helpers.document_results`. ``ablation`` is ``mean`` or ``zero``,
    ``fraction`` the share of heads (None: the largest of the run), ``shots`` each task's ``most``
    examples or ``none``. ``levels`` False does not look at single seeds and draws, and no outcome
    says that they disagree. ``tests`` are those of :func:`paired_tests` where they are known.
    Raises :class:`InputError` when there is no such row.
    """
    documents = _under(documents, ablation)
    if shots not in ("most", "none") or documents.empty:
        raise InputError(
            f"shots must be 'most' or 'none' and ablation one that was evaluated, got {shots!r} "
            f"and {ablation!r}"
        )
    largest = documents["fraction"].max() if fraction is None else fraction
    at_share = documents[documents["fraction"].isin([0.0, largest])]
    number = at_share.groupby(_ROW)["shots"].transform("max") if shots == "most" else 0
    rows = _with_zero_shot(at_share[at_share["shots"] == number], at_share)
    every = paired_tests(documents, ablation=ablation) if tests is None else tests
    by_cell = dict(list(every.groupby(CELL)))
    cells = dict(list(rows.groupby(CELL)))
    by_seed, by_draw = (
        _levels(rows, name) if levels else {} for name in ("demonstration_seed", "ablation_seed")
    )
    outcomes = []
    for row in filled_keys(accuracy_intervals(rows)).to_dict("records"):
        named = {name: row[name] for name in CELL}
        key = tuple(named.values())
        cell = cells[key]
        share, one_label, margin = _answer_facts(cell[cell["valid"]] if "valid" in cell else cell)
        differences = tuple(
            Difference(
                test["against"], test["against_control"] or test["control"],
                test["difference"], test["low"], test["high"], test["distinguishable"],
            )
            for test in (by_cell[key].to_dict("records") if key in by_cell else ())
        )  # fmt: skip
        of_seeds, seeds_disagree = by_seed.get(key, ({}, False))
        of_draws, draws_disagree = by_draw.get(key, ({}, False))
        outcomes.append(
            TaskOutcome(
                **named,
                chance=chance_level(row["task"]),
                documents=row["documents"],
                left_out=cell["doc_id"].nunique() - row["documents"],
                accuracy=Interval(row["accuracy"], row["low"], row["high"]),
                differences=differences,
                zero_shot_answers=share, one_label=one_label, margin=margin,
                by_seed=of_seeds, by_draw=of_draws,
                seeds_disagree=seeds_disagree, draws_disagree=draws_disagree,
            )
        )  # fmt: skip
    return outcomes


def _with_zero_shot(cells: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Add ``zero_shot``, the full model's answer to the same document without examples."""
    if "chosen" not in cells:
        return cells
    full = rows[(rows["condition"] == "full") & (rows["shots"] == 0)]
    answer = full.drop_duplicates([*_ROW, "doc_id"]).set_index([*_ROW, "doc_id"])["chosen"]
    return cells.join(answer.rename("zero_shot"), on=[*_ROW, "doc_id"])


def _answer_facts(rows: pd.DataFrame) -> tuple[float | None, float | None, float | None]:
    """Return zero-shot answers, one label and margin of single answers; None where not known."""
    margins = rows["margin"].dropna() if "margin" in rows else pd.Series(dtype=float)
    margin = float(margins.median()) if len(margins) else None
    known = rows[rows["chosen"].notna()] if "chosen" in rows else rows.iloc[:0]
    # Where all documents have one label, giving that one label is no oddity.
    if known.empty or known["target"].nunique() < 2:
        return None, None, margin
    both = known[known["zero_shot"].notna()]
    share = 100 * float((both["chosen"] == both["zero_shot"]).mean()) if len(both) else None
    return share, 100 * float(known["chosen"].value_counts(normalize=True).max()), margin


def _levels(rows: pd.DataFrame, name: str) -> dict[Any, tuple[dict[int, float], bool]]:
    """Compute each cell's accuracy at every seed (``name``) alone, and whether they disagree."""
    parts = []
    for level in sorted(rows[name].dropna().unique()):
        part = rows[(rows[name] == level) | (rows[name].isna() & (rows["condition"] == "full"))]
        tests = filled_keys(comparisons(part, over_draws=False)).query("against == 'full'")
        told = is_distinguishable(tests["p"], tests["low"], tests["high"])
        tests = tests.assign(sign=np.sign(tests["difference"]).where(told, 0.0))
        drawn = part.loc[part[name].notna(), CELL].drop_duplicates()
        accuracies = filled_keys(accuracy_intervals(part, over_draws=False)).merge(drawn)
        sides = [side(row.low, row.high, chance_level(row.task)) for row in accuracies.itertuples()]
        both = accuracies.assign(level=int(level), side=sides)
        parts.append(both.merge(tests, how="left", on=CELL, suffixes=("_alone", "")))
    if not parts:
        return {}
    levels = pd.concat(parts, ignore_index=True)
    levels["sign"] = levels["sign"].fillna(0.0)
    for bound in ("low", "high"):
        levels[bound] = levels[bound].fillna(levels[f"{bound}_alone"])
    return {
        key: (
            dict(zip(cell["level"], cell["accuracy"], strict=True)),
            _disagree(cell, ["sign", "side"]),
        )
        for key, cell in levels.groupby(CELL)
    }


def side(low: float, high: float, value: float = 0.0, *, upper: float | None = None) -> int:
    """Return -1 where an interval lies below a value, 1 above it (or above ``upper``), else 0."""
    above = value if upper is None else upper
    return int(low > above) - int(high < value)


def _disagree(rows: pd.DataFrame, conclusion: list[str]) -> bool:
    """Tell whether single seeds conclude differently, and not by a hair: intervals lie apart."""
    different = len(rows[conclusion].drop_duplicates()) > 1
    return different and bool(rows["low"].max() > rows["high"].min())


_CONDITIONS = {
    "full": "full model",
    "induction_heads": "without {heads}, those with the highest induction score",
    "induction_pattern": "with the induction pattern blocked in {heads}",
    "random_heads": "without as many random heads{control}",
}


Verdict = Literal["held", "held in part", "did not hold", "was not shown"]


def verdict(holds: Sequence[bool], against: Sequence[bool]) -> Verdict:
    """Judge a claim about several tasks by those on which it holds and those that contradict it.

    Where it holds of none and none contradicts it, it was not shown, which is not the same as
    wrong. Raises :class:`InputError` without tasks.
    """
    if not holds:
        raise InputError("a claim cannot be judged without tasks")
    if any(holds):
        return "held" if all(holds) else "held in part"
    return "did not hold" if any(against) else "was not shown"


def outcome_sentence(outcome: KindOutcome, *, heads: str) -> str:
    """Say in one sentence what the tasks of a kind give under a condition.

    ``heads`` is how many heads are removed or blocked, as of
    :func:`icl_helpers.attention.heads.heads_in_words`.
    """
    condition = _CONDITIONS[outcome.condition].format(heads=heads, control=_of(outcome.control))
    numbers = sorted({task.shots for task in outcome.tasks})
    shots = " or ".join(map(str, numbers)) if numbers != [0] else "no"
    accuracy, *remarks = findings(outcome)
    said = "; ".join([f"{accuracy} (chance {outcome.chance:.0f} %)", *remarks])
    return f"{outcome.kind.capitalize()}, {shots} examples, {condition}: {said}."


def findings(outcome: KindOutcome, *, brief: bool = False) -> list[str]:
    """Say what is to be said, from the accuracy on; of some of the tasks by their names.

    ``brief`` leaves out what follows from the rest: a loss to the full model beside one to the
    control, and the margin.
    """
    said = [f"{range_in_words(outcome.accuracy)} %"]
    if not outcome.agree:
        each = (f"{task_name(task.task)} {task.accuracy.mean:.0f} %" for task in outcome.tasks)
        said = [", ".join(each)]
    remarks = pd.DataFrame(
        [_remarks(task) for task in outcome.tasks],
        index=[task_name(task.task) for task in outcome.tasks],
    ).eq(True)
    for text, holds in remarks.items():
        if holds.any() and not (brief and text == _BELOW_FULL):
            on = "" if holds.all() else f" on {listed(list(holds.index[holds]))}"
            said.append(f"{text}{on}")
    margin = outcome.margin
    if margin is not None and margin.low < 0 and outcome.condition != "full" and not brief:
        said.append(f"median margin of the right label {range_in_words(margin, 1)} nats")
    return said


_BELOW_FULL = "distinguishably below the full model"


def _remarks(task: TaskOutcome) -> dict[str, bool]:
    """Say what holds of a task, in the order of a sentence."""
    to_full = None if task.to_full is None else task.to_full.sign
    gaps = [gap for gap in task.differences if gap.against == "random_heads"]
    signs = {gap.sign for gap in gaps}
    # Where only one control is told apart, which.
    one = {
        f"distinguishably {'below' if gap.sign < 0 else 'above'} the {gap.control} random control "
        f"alone": True
        for gap in gaps
        if gap.sign and len(signs) > 1
    }
    return {
        "below chance": task.level == "below chance",
        "not distinguishable from chance": task.level == "at chance",
        "one label for nearly all documents": task.level == "one label",
        "nearly always the answer that it gives without examples": task.zero_shot_like,
        _BELOW_FULL: to_full == -1,
        "distinguishably above the full model": to_full == 1,
        "not distinguishable from the full model": to_full == 0,
        "distinguishably below the random control": signs == {-1},
        "distinguishably above the random control": signs == {1},
        **one,
    }


def range_in_words(span: Span, digits: int = 0) -> str:
    """Write the range of a number over tasks: ``1 to 6``, or ``6`` where they are equal."""
    low, high = (f"{value:.{digits}f}" for value in span[1:])
    return low if low == high else f"{low} to {high}"


def listed(names: Sequence[str]) -> str:
    """Join names for a sentence: ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def doubts(outcome: KindOutcome) -> list[str]:
    """Say where seeds or draws disagree, are single, or where numbers were not finite."""
    lines = []
    for what, disagree, levels in (
        ("Demonstration seeds", "seeds_disagree", "by_seed"),
        ("Control draws", "draws_disagree", "by_draw"),
    ):
        for task in outcome.tasks:
            if getattr(task, disagree):
                lines.append(
                    f"{what} disagree on {task_name(task.task)} ({_condition(outcome)}): "
                    f"{_by_seed(getattr(task, levels))}."
                )
        if {len(getattr(task, levels)) for task in outcome.tasks} == {1}:
            lines.append(
                f"One {what.lower()[:-1]} only on {outcome.kind}: how much another would change is "
                f"not known."
            )
    lines += [
        f"{task.left_out} documents of {task_name(task.task)} ({_condition(outcome)}) gave numbers "
        f"that are not finite and are left out."
        for task in outcome.tasks
        if task.left_out
    ]
    return lines


def _by_seed(accuracies: Mapping[Any, float], what: str = "seeds ") -> str:
    """Word the accuracy at each seed."""
    values = listed([f"{accuracy:.0f}" for accuracy in accuracies.values()])
    return f"{values} % ({what}{', '.join(map(str, accuracies))})"


def _condition(outcome: KindOutcome) -> str:
    kind = f", {outcome.ablation} ablation" if outcome.ablation in ("mean", "zero") else ""
    control = f", {outcome.control} control" if outcome.control else ""
    return f"{CONDITION_NAMES[outcome.condition]}{control}{kind}"


CONDITION_NAMES = {
    "full": "full model", "induction_heads": "heads removed",
    "induction_pattern": "pattern blocked", "random_heads": "random heads removed",
}  # fmt: skip


def headline(outcomes: Sequence[KindOutcome], *, heads: str) -> str:
    """Say on how many tasks accuracy with examples falls, and falls more than under the control.

    ``outcomes`` are those of :func:`icl_helpers.results.outcomes.kind_outcomes`; ``heads`` is as of
    :func:`icl_helpers.attention.heads.heads_in_words`.
    """
    removed = tasks_under(outcomes, "induction_heads")
    if not removed:
        return "No head was removed in this run: there is nothing to compare yet."
    learnt = sum(task.level == "above chance" for task in tasks_under(outcomes, "full"))
    signs: dict[tuple[str, str], list[int]] = {("full", ""): []}
    for gap in (gap for task in removed for gap in task.differences):
        signs.setdefault((gap.against, gap.control), []).append(gap.sign)
    fell, *more = (gaps.count(-1) for gaps in signs.values())
    parts = [
        f"With the most examples the full model is above chance on {learnt} of {len(removed)} "
        f"tasks. Without {heads}, those with the highest induction score, accuracy is "
        f"distinguishably lower on {fell} of {len(removed)}"
    ]
    below = sum(task.level == "below chance" for task in removed)
    parts += [f"below chance on {below}"] if below else []
    parts += [
        f"lower than without as many random heads{_of(control)} on {count}"
        for (_, control), count in zip(list(signs)[1:], more, strict=True)
    ]
    return "; ".join(parts) + "."


def kind_lines(outcomes: Sequence[KindOutcome]) -> list[str]:
    """Say of each kind of tasks what it gives under each condition, one line a kind."""
    kinds: dict[str, list[KindOutcome]] = {}
    for outcome in outcomes:
        kinds.setdefault(outcome.kind, []).append(outcome)
    lines = []
    for kind, conditions in kinds.items():
        said = [
            f"{CONDITION_NAMES[it.condition].capitalize()}{_of(it.control)} "
            f"{'; '.join(findings(it, brief=True))}"
            for it in conditions
        ]
        last = conditions[-1]
        tasks = counted(len(last.tasks), "task")
        lines.append(
            f"**{kind.capitalize()}** ({tasks}, chance {last.chance:.0f} %): {'. '.join(said)}."
        )
    return lines


def removal_caption(documents: pd.DataFrame, *, ablation: str = "mean") -> str:
    """Say of each kind of tasks what is left without the induction heads, for a figure's caption.

    ``documents`` is :func:`icl_helpers.document_results`; empty where nothing was removed.
    """
    return removed_in_words(kind_outcomes(documents, ablation=ablation))


def removed_in_words(outcomes: Iterable[KindOutcome]) -> str:
    """Say what :func:`removal_caption` does, of outcomes that are known."""
    said = [
        f"{outcome.kind} {'; '.join(findings(outcome, brief=True))}"
        for outcome in outcomes
        if outcome.condition == "induction_heads"
    ]
    return f"Without the induction heads: {'. '.join(said)}." if said else ""


def seed_doubts(
    outcomes: Sequence[KindOutcome], *, model: str = "", disagreements: bool = True
) -> list[str]:
    """Say where seeds or draws disagree, training seeds of an embedded model too; else the rest.

    The rest (``disagreements`` False) are single seeds and numbers that are not finite.
    """
    lines = [line for outcome in outcomes for line in doubts(outcome)]
    if model in embedded_models():
        lines += training_seed_doubts(read_measurements("effect", model=model))
    return [line for line in dict.fromkeys(lines) if ("disagree on" in line) == disagreements]


def counted(number: int, what: str) -> str:
    """Word a number of things."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def tasks_under(outcomes: Iterable[KindOutcome], condition: str) -> list[TaskOutcome]:
    """Return the tasks of all kinds, under one condition."""
    return [task for it in outcomes if it.condition == condition for task in it.tasks]


def _of(control: str) -> str:
    return control and f" ({control} control)"


def read_measurements(name: str, *, model: str = "icl-tiny") -> pd.DataFrame:
    """Read the shipped measurements of an embedded model: ``effect`` or ``dynamics``.

    Raises :class:`MissingArtefactError` when the model has none.
    """
    path = embedded_dir() / model / f"{name}.parquet"
    if not path.is_file():
        raise MissingArtefactError(
            f"{model!r} has no measurements {name!r}: only an embedded model's training is known; "
            f"the measurements come from `synthetic.training measure`"
        )
    return pd.read_parquet(path)


def training_seed_doubts(
    effect: pd.DataFrame, what: str = "Training seeds", *, named: str = "seeds "
) -> list[str]:
    """Say on which tasks training seeds disagree: intervals lie apart, with different conclusions.

    ``effect`` holds accuracies with intervals by ``training_seed`` (:func:`read_measurements`), or
    by names of ``what`` else was trained, ``named`` so; each task is taken at its most examples.
    A conclusion is on which side of chance the interval lies, and on which of the full model's.
    """
    most = effect[effect["shots"] == effect.groupby(_ROW)["shots"].transform("max")]
    full = most[most["condition"] == "full"]
    both = most.merge(full, on=["training_seed", "task"], suffixes=("", "_full"))
    lines = []
    for (condition, task), rows in both.groupby(["condition", "task"], sort=False):
        concluded = rows.assign(
            side=[side(row.low, row.high, chance_level(task)) for row in rows.itertuples()],
            to_full=[
                side(row.low, row.high, row.low_full, upper=row.high_full)
                for row in rows.itertuples()
            ],
        )
        if _disagree(concluded, ["side", "to_full"]):
            where = f"{task_name(str(task))} ({CONDITION_NAMES[str(condition)]})"
            accuracy = dict(zip(rows["training_seed"], rows["accuracy"], strict=True))
            each = _by_seed(accuracy, named)
            lines.append(f"{what}, on all documents, disagree on {where}: {each}.")
    return lines


# What was found, and what became of the predictions: a sentence each.
Said = tuple[list[str], list[str]]


def predicted(text: str, tasks: Mapping[str, tuple[int, str]], *, of: str = "tasks") -> str:
    """Say what became of a prediction on each task (or what ``of``).

    A task has 1 where it held, -1 where what was seen contradicts it, 0 where it was not shown
    either way; and what was seen.
    """
    signs = [sign for sign, _ in tasks.values()]
    word = verdict([sign > 0 for sign in signs], [sign < 0 for sign in signs])
    seen = {
        name: [f"{task_name(task)} ({why})" for task, (sign, why) in tasks.items() if sign == value]
        for name, value in (("contradicted", -1), ("not shown", 0))
    }
    held = signs.count(1)
    counts = "all" if held == len(signs) else f"{held} of"
    said = [f"on {counts} {len(signs)} {of}"] if held and len(signs) > 1 else []
    said = [f"on both {of}"] if held == len(signs) == 2 else said
    # Of which tasks an outcome is needs saying where there are several outcomes.
    several = held > 0 or all(seen.values())
    said += [
        f"{name}: {listed(names)}" if several else listed(names)
        for name, names in seen.items()
        if names
    ]
    link = ": " if said and not several else ", " if said else ""
    return f"*{text}*: **{word}**{link}{'; '.join(said)}."
