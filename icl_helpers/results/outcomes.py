"""What came out of a run: facts by rule, and the sentences that state them.

Tasks are summed up only with others of their kind (letters, words with two or four labels, text),
and then with the range over them. A kind whose tasks behave differently has no mean: its tasks are
named. What a sentence calls lower, below chance or zero-shot-like is decided here, by the one rule
for doubt (:func:`icl_helpers.results.statistics.is_distinguishable`) and the limits below.

Example
-------
>>> found = kind_outcomes(icl.document_results("runs/icl-tiny"))
>>> [line for outcome in found for line in doubts(outcome)]
>>> [outcome_sentence(outcome, heads="4 of 64 heads (6.3 %)") for outcome in found]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from icl_helpers.tasks.specs import TextTaskSpec, get_task_spec

__all__ = [
    "Difference", "KindOutcome", "Said", "Span", "TaskOutcome", "Verdict", "doubts", "findings",
    "headline", "kind_lines", "kind_outcomes", "listed", "outcome_sentence", "predicted",
    "range_in_words", "read_measurements", "removal_caption", "seed_doubts", "task_kind",
    "task_name", "task_outcomes", "tasks_under", "training_seed_doubts", "verdict",
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
    def to_full(self) -> Difference | None:
        """The difference to the full model; None for itself, and where that was not evaluated."""
        return next((found for found in self.differences if found.against == "full"), None)

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
        found = self.zero_shot_answers
        return self.shots > 0 and found is not None and found >= NEARLY_ALL

    @property
    def conclusion(self) -> tuple[str, bool, tuple[tuple[str, str, int], ...]]:
        """What is said of the task; tasks of a kind with equal conclusions have a common mean."""
        signs = ((found.against, found.control, found.sign) for found in self.differences)
        return self.level, self.zero_shot_like, tuple(signs)


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
    def change(self) -> Span | None:
        """Difference to the full model over the tasks, in points; None where there is none."""
        return _known_span(task.to_full.points if task.to_full else None for task in self.tasks)

    @property
    def zero_shot_answers(self) -> Span | None:
        """Percentage of answers that are the full model's without examples."""
        return _known_span(task.zero_shot_answers for task in self.tasks)

    @property
    def margin(self) -> Span | None:
        """Median margin of the right label over the tasks, in nats."""
        return _known_span(task.margin for task in self.tasks)

    def names(self, holds: Callable[[TaskOutcome], bool]) -> list[str]:
        """Names of the tasks for which something holds."""
        return [task_name(task.task) for task in self.tasks if holds(task)]


def task_kind(task: str, labels: str) -> str:
    """Return the kind whose tasks may be summed up together.

    ``letters``, ``words, two labels``, ``words, four labels``, ``text, semantic labels`` or
    ``text, unrelated labels``.
    """
    spec = get_task_spec(task)
    if isinstance(spec, TextTaskSpec):
        return f"text, {labels} labels"
    if spec.sampler == "balanced":
        return "letters"
    return f"words, {'four' if len(spec.choices) > 2 else 'two'} labels"


def kind_outcomes(
    documents: pd.DataFrame, *, ablation: str = "mean", fraction: float | None = None,
    shots: str = "most",
) -> list[KindOutcome]:  # fmt: skip
    """Compute what each kind of tasks gives under each condition; arguments: :func:`task_outcomes`.

    Kinds are in the tasks' order, and for each of them the conditions, the full model first.
    """
    groups: dict[tuple[str, str, str, float, str], list[TaskOutcome]] = {}
    for found in task_outcomes(documents, ablation=ablation, fraction=fraction, shots=shots):
        kind = task_kind(found.task, found.labels)
        key = kind, found.condition, found.ablation, found.fraction, found.control
        groups.setdefault(key, []).append(found)
    kinds = list(dict.fromkeys(kind for kind, *_ in groups))
    outcomes = [KindOutcome(*key, tasks=tuple(tasks)) for key, tasks in groups.items()]
    order = ["full", "induction_heads", "induction_pattern", "random_heads"]
    return sorted(outcomes, key=lambda it: (kinds.index(it.kind), order.index(it.condition)))


def task_outcomes(
    documents: pd.DataFrame, *, ablation: str = "mean", fraction: float | None = None,
    shots: str = "most", levels: bool = True,
) -> list[TaskOutcome]:  # fmt: skip
    """Compute what each task gives under the full model, one kind of removal and the knockout.

    ``documents`` is :func:`icl_helpers.document_results`. ``ablation`` is ``mean`` or ``zero``,
    ``fraction`` the share of heads (None: the largest of the run), ``shots`` each task's ``most``
    examples or ``none``. ``levels`` False does not look at single seeds and draws, and no outcome
    says that they disagree. Tests are corrected over the same rows as those of the paper's table of
    these conditions, so that a sentence and a star never differ. Raises :class:`InputError` when
    there is no such row.
    """
    documents = filled_keys(documents)
    kept = documents[documents["ablation"].isin(["none", ablation, "knockout"])]
    if shots not in ("most", "none") or kept.empty:
        raise InputError(
            f"shots must be 'most' or 'none' and ablation one that was evaluated, got {shots!r} "
            f"and {ablation!r}"
        )
    largest = kept["fraction"].max() if fraction is None else fraction
    rows = kept[kept["fraction"].isin([0.0, largest])]
    wanted = rows.groupby(_ROW)["shots"].transform("max") if shots == "most" else 0
    chosen = rows[rows["shots"] == wanted]
    is_text = kept["task"].map(lambda task: isinstance(get_task_spec(task), TextTaskSpec))
    families = [part for _, part in kept.groupby(is_text)]
    tests = filled_keys(pd.concat([comparisons(part) for part in families], ignore_index=True))
    answers = _with_zero_shot(chosen, rows)
    by_seed, by_draw = (
        _levels(chosen, name) if levels else {} for name in ("demonstration_seed", "ablation_seed")
    )
    outcomes = []
    for row in filled_keys(accuracy_intervals(chosen)).to_dict("records"):
        named = {name: row[name] for name in CELL}
        key = tuple(named.values())
        own = answers[_equal(answers, named)]
        same = tests[_equal(tests, named)]
        share, one_label, margin = _answer_facts(own[own["valid"]] if "valid" in own else own)
        seeds, draws = by_seed.get(key, {}), by_draw.get(key, {})
        outcomes.append(
            TaskOutcome(
                **named,
                chance=_chance(row["task"]),
                documents=row["documents"],
                left_out=own["doc_id"].nunique() - row["documents"],
                accuracy=Interval(row["accuracy"], row["low"], row["high"]),
                differences=tuple(_difference(test) for test in same.to_dict("records")),
                zero_shot_answers=share, one_label=one_label, margin=margin,
                by_seed={level: found[0].mean for level, found in seeds.items()},
                by_draw={level: found[0].mean for level, found in draws.items()},
                seeds_disagree=_disagree(seeds.values()),
                draws_disagree=_disagree(draws.values()),
            )
        )  # fmt: skip
    return outcomes


def _chance(task: Any) -> float:
    return 100 / len(get_task_spec(str(task)).choices)


def _difference(test: Mapping[Any, Any]) -> Difference:
    bounds = (test[name] for name in ("difference", "low", "high", "distinguishable"))
    return Difference(test["against"], test["against_control"] or test["control"], *bounds)


def _equal(frame: pd.DataFrame, key: dict[str, Any]) -> pd.Series:
    """Tell which rows of a frame have this key."""
    return pd.concat([frame[name] == value for name, value in key.items()], axis=1).all(axis=1)


def _with_zero_shot(chosen: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Add ``zero_shot``, the full model's answer to the same document without examples."""
    if "chosen" not in chosen:
        return chosen
    full = rows[(rows["condition"] == "full") & (rows["shots"] == 0)]
    answer = full.drop_duplicates([*_ROW, "doc_id"]).set_index([*_ROW, "doc_id"])["chosen"]
    return chosen.join(answer.rename("zero_shot"), on=[*_ROW, "doc_id"])


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


# Of one seed or draw: its accuracy, the interval of what is concluded from, and the conclusion.
_Level = tuple[Interval, Interval, tuple[int, int]]


def _levels(rows: pd.DataFrame, name: str) -> dict[tuple[Any, ...], dict[int, _Level]]:
    """Compute accuracy and conclusion of every cell at each single seed (``name``) on its own."""
    found: dict[tuple[Any, ...], dict[int, _Level]] = {}
    for value in sorted(rows[name].dropna().unique()):
        part = rows[(rows[name] == value) | (rows[name].isna() & (rows["condition"] == "full"))]
        tests = filled_keys(comparisons(part, over_draws=False)).query("against == 'full'")
        tests = tests.set_index(CELL)
        own = set(part.loc[part[name].notna(), CELL].itertuples(index=False, name=None))
        for row in filled_keys(accuracy_intervals(part, over_draws=False)).to_dict("records"):
            key = tuple(row[name] for name in CELL)
            accuracy = basis = Interval(row["accuracy"], row["low"], row["high"])
            sign = 0
            if key in tests.index:
                test = tests.loc[[key]]
                basis = Interval(*test.iloc[0][["difference", "low", "high"]])
                seen = is_distinguishable(test["p"], test["low"], test["high"]).item()
                sign = int(np.sign(basis.mean)) if seen else 0
            if key in own:
                side = _side(accuracy, _chance(key[0]))
                found.setdefault(key, {})[int(value)] = accuracy, basis, (sign, side)
    return found


def _side(interval: Interval, value: float, *, upper: float | None = None) -> int:
    """Return -1 where an interval lies below a value, 1 above it (or above ``upper``), else 0."""
    above = value if upper is None else upper
    return int(interval.low > above) - int(interval.high < value)


def _disagree(levels: Iterable[_Level]) -> bool:
    """Tell whether single seeds conclude differently, and not by a hair: intervals lie apart."""
    found = list(levels)
    conclusions = {conclusion for _, _, conclusion in found}
    lows, highs = ([basis[at] for _, basis, _ in found] for at in (1, 2))
    return len(conclusions) > 1 and max(lows) > min(highs)


def _known_span(values: Iterable[float | None]) -> Span | None:
    known = [value for value in values if value is not None]
    return Span.of(known) if known else None


_TASK_NAMES = {
    f"wordseq{n}_{kind}": f"{added}word sequences {n}"
    for kind, added in (("binary", ""), ("4way", "four-way "))
    for n in (1, 2)
}


def task_name(task: str) -> str:
    """A task's name in a sentence, as on the page on the method."""
    return _TASK_NAMES.get(task, task.replace("_", " "))


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
    control = f" ({outcome.control} control)" if outcome.control else ""
    condition = _CONDITIONS[outcome.condition].format(heads=heads, control=control)
    start = f"{outcome.kind.capitalize()}, {_shots(outcome)}, {condition}"
    accuracy, *remarks = findings(outcome)
    chance = f"(chance {outcome.chance:.0f} %)"
    return f"{start}: {'; '.join([f'{accuracy} {chance}', *remarks])}."


def _shots(outcome: KindOutcome) -> str:
    numbers = sorted({task.shots for task in outcome.tasks})
    return f"{' or '.join(map(str, numbers))} examples" if numbers != [0] else "no examples"


def findings(outcome: KindOutcome, *, brief: bool = False) -> list[str]:
    """Say what is to be said, from the accuracy on; of some of the tasks by their names.

    ``brief`` leaves out what follows from the rest: a loss to the full model beside one to the
    control, and the margin.
    """
    found = [f"{range_in_words(outcome.accuracy)} %"]
    if not outcome.agree:
        each = (f"{task_name(task.task)} {task.accuracy.mean:.0f} %" for task in outcome.tasks)
        found = [", ".join(each)]
    for text, holds in _REMARKS.items():
        names = outcome.names(holds)
        if names and not (brief and text == _BELOW_FULL):
            found.append(text if len(names) == len(outcome.tasks) else f"{text} on {listed(names)}")
    margin = outcome.margin
    if margin is not None and margin.low < 0 and outcome.condition != "full" and not brief:
        found.append(f"median margin of the right label {range_in_words(margin, 1)} nats")
    return found


def _differs(against: str, sign: int) -> Callable[[TaskOutcome], bool]:
    return lambda task: any(
        found.against == against and found.sign == sign for found in task.differences
    )


def _beside_controls(sign: int, *, every: bool) -> Callable[[TaskOutcome], bool]:
    """Whether the difference to every control has this sign, or that to some and not to every."""

    def holds(task: TaskOutcome) -> bool:
        signs = [it.sign == sign for it in task.differences if it.against == "random_heads"]
        return any(signs) and all(signs) == every

    return holds


def _undecided(task: TaskOutcome) -> bool:
    return task.to_full is not None and task.to_full.sign == 0


_BELOW_FULL = "distinguishably below the full model"
_REMARKS: dict[str, Callable[[TaskOutcome], bool]] = {
    "below chance": lambda task: task.level == "below chance",
    "not distinguishable from chance": lambda task: task.level == "at chance",
    "one label for nearly all documents": lambda task: task.level == "one label",
    "nearly always the answer that it gives without examples": lambda task: task.zero_shot_like,
    _BELOW_FULL: _differs("full", -1),
    "distinguishably above the full model": _differs("full", 1),
    "not distinguishable from the full model": _undecided,
    "distinguishably below the random control": _beside_controls(-1, every=True),
    "distinguishably above the random control": _beside_controls(1, every=True),
    "distinguishably below one random control and not the other": _beside_controls(-1, every=False),
    "distinguishably above one random control and not the other": _beside_controls(1, every=False),
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
                each = ", ".join(f"{k}: {v:.0f} %" for k, v in getattr(task, levels).items())
                lines.append(
                    f"{what} disagree on {task_name(task.task)} ({_condition(outcome)}): {each}."
                )
        if {len(getattr(task, levels)) for task in outcome.tasks} == {1}:
            lines.append(
                f"One {what.lower()[:-1]} only on {outcome.kind} ({_condition(outcome)}): how much "
                f"another would change is not known."
            )
    lines += [
        f"{task.left_out} documents of {task_name(task.task)} ({_condition(outcome)}) gave numbers "
        f"that are not finite and are left out."
        for task in outcome.tasks
        if task.left_out
    ]
    return lines


def _condition(outcome: KindOutcome) -> str:
    # A stage that removes heads in both ways says both; the paper's own is the mean.
    kind = ", zero ablation" if outcome.ablation == "zero" else ""
    name = " ".join(filter(None, [outcome.condition.replace("_", " "), outcome.control]))
    return f"{name}{kind}"


_NAMES = {
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
    fell = sum(_sign(task, "full") < 0 for task in removed)
    parts = [
        f"With the most examples the full model is above chance on {learnt} of {len(removed)} "
        f"tasks. Without {heads}, those with the highest induction score, accuracy is "
        f"distinguishably lower on {fell} of {len(removed)}"
    ]
    below = sum(task.level == "below chance" for task in removed)
    parts += [f"below chance on {below}"] if below else []
    for control in _controls(removed):
        more = sum(_sign(task, "random_heads", control) < 0 for task in removed)
        parts.append(f"lower than without as many random heads{_of(control)} on {more}")
    return "; ".join(parts) + "."


def kind_lines(outcomes: Sequence[KindOutcome]) -> list[str]:
    """Say of each kind of tasks what it gives under each condition, one line a kind."""
    lines: dict[str, list[str]] = {}
    for outcome in outcomes:
        said = f"{_NAMES[outcome.condition]}{_of(outcome.control)} "
        said += "; ".join(findings(outcome, brief=True))
        lines.setdefault(outcome.kind, []).append(said)
    chances = {outcome.kind: outcome.chance for outcome in outcomes}
    tasks = {outcome.kind: len(outcome.tasks) for outcome in outcomes}
    return [
        f"**{kind.capitalize()}** ({tasks[kind]} {'task' if tasks[kind] == 1 else 'tasks'}, chance "
        f"{chances[kind]:.0f} %): {'. '.join(part[0].upper() + part[1:] for part in said)}."
        for kind, said in lines.items()
    ]


def removal_caption(documents: pd.DataFrame, *, ablation: str = "mean") -> str:
    """Say of each kind of tasks what is left without the induction heads, for a figure's caption.

    ``documents`` is :func:`icl_helpers.document_results`; empty where nothing was removed.
    """
    if not (documents["condition"] == "induction_heads").any():
        return ""
    said = [
        f"{outcome.kind} {'; '.join(findings(outcome, brief=True))}"
        for outcome in kind_outcomes(documents, ablation=ablation)
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


def tasks_under(outcomes: Iterable[KindOutcome], condition: str) -> list[TaskOutcome]:
    """The tasks of all kinds, under one condition."""
    return [task for it in outcomes if it.condition == condition for task in it.tasks]


def _controls(tasks: Iterable[TaskOutcome]) -> list[str]:
    found = (it.control for task in tasks for it in task.differences if it.against != "full")
    return list(dict.fromkeys(found))


def _of(control: str) -> str:
    return control and f" ({control} control)"


def _sign(task: TaskOutcome, against: str, control: str = "") -> int:
    signs = (it.sign for it in task.differences if (it.against, it.control) == (against, control))
    return next(signs, 0)


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


def training_seed_doubts(effect: pd.DataFrame) -> list[str]:
    """Say on which tasks training seeds disagree: intervals lie apart, with different conclusions.

    ``effect`` holds accuracies with intervals by ``training_seed``
    (:func:`read_measurements`); each task is taken at its most examples.
    A conclusion is on which side of chance the interval lies, and on which of the full model's.
    """
    most = effect[effect["shots"] == effect.groupby(_ROW)["shots"].transform("max")]
    full = most[most["condition"] == "full"].set_index(["training_seed", "task"])
    lines = []
    for (condition, task), rows in most.groupby(["condition", "task"], sort=False):
        conclusions = set()
        for row in rows.itertuples():
            interval, whole = (
                Interval(row.accuracy, row.low, row.high),
                full.loc[(row.training_seed, task)],
            )
            to_full = _side(interval, whole["low"], upper=whole["high"])
            conclusions.add((_side(interval, _chance(task)), to_full))
        if len(conclusions) > 1 and rows["low"].max() > rows["high"].min():
            each = ", ".join(f"{r.training_seed}: {r.accuracy:.0f} %" for r in rows.itertuples())
            where = f"{task_name(str(task))} ({str(condition).replace('_', ' ')})"
            lines.append(f"Training seeds disagree on {where}: {each}.")
    return lines


# What was found, and what became of the predictions: a sentence each.
Said = tuple[list[str], list[str]]


def predicted(text: str, tasks: Mapping[str, tuple[bool, str]], *, of: str = "tasks") -> str:
    """Say on which tasks (or what ``of``) a prediction held, and on which not and what was seen."""
    failed = [f"{task_name(task)} ({why})" for task, (held, why) in tasks.items() if not held]
    word = verdict([held for held, _ in tasks.values()], [True])
    on = f"on {len(tasks) - len(failed)} of {len(tasks)} {of}"
    return f"*{text}*: **{word}**, {on}{f'; not on {listed(failed)}' if failed else ''}."
