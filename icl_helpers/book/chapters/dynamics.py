"""What the chapter on training dynamics says of its measurements, by rule.

Example
-------
>>> measured = read_measurements("dynamics", model="icl-tiny")
>>> counts = rise_counts(measured, "icl-tiny")
>>> rise_sentences(counts)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from icl_helpers.attention.heads import SCORE_THRESHOLD, heads_in_words
from icl_helpers.results.comparison import count_induction_heads, published_head_scores
from icl_helpers.results.outcomes import Span, listed, predicted, range_in_words
from icl_helpers.tasks.specs import get_task_spec, task_kind

__all__ = [
    "effect_summary", "episode_sentences", "loss_sentences", "penalty_sentences",
    "removal_sentences", "rise_counts", "rise_sentences",
]  # fmt: skip


def rise_counts(measured: pd.DataFrame, model: str) -> pd.DataFrame:
    """Count induction heads over training: the embedded model's, and those that are published.

    ``measured`` is the shipped ``dynamics`` of the model. Columns are those of
    :func:`icl_helpers.results.comparison.count_induction_heads`; a model's name says who measured
    it, and with which seed it was trained where there are several.
    """
    ours = measured[measured["measure"] == "prefix_score"].rename(columns={"value": "score"})
    names = model + ", seed " + ours["training_seed"].astype(str) + " (here)"
    theirs = published_head_scores()
    trained = theirs[theirs["step"].groupby(theirs["model"]).transform("count") > 0]
    published = trained.assign(model=trained["model"] + " (Feucht et al.)")
    return count_induction_heads(pd.concat([ours.assign(model=names), published]))


def rise_sentences(counts: pd.DataFrame) -> str:
    """Say of each model between which checkpoints induction heads appear, and what becomes of them.

    They have appeared with the first checkpoint after which none is without a head of 0.3 or more.
    """
    return "\n".join(f"- **{name}**: {_rise(rows)}." for name, rows in counts.groupby("model"))


def _rise(counts: pd.DataFrame) -> str:
    rows: list[Any] = list(counts.itertuples())
    without = [at for at, row in enumerate(rows) if not row.induction]
    last, most = rows[-1], max(rows, key=lambda row: row.induction)
    if not last.induction:
        return f"no head scores 0.3 or more at the end; the best has {last.score:.2f}"
    end = (
        f"{most.induction} at most ({_step(most.step)}), "
        f"{heads_in_words(last.induction / last.heads, last.heads)} at the end, where the best has "
        f"{last.score:.2f}"
    )
    if not without:
        return f"heads score 0.3 or more at every checkpoint; {end}"
    before, after = rows[without[-1]], rows[without[-1] + 1]
    earlier = max(row.induction for row in rows[: without[-1] + 1])
    lost = f" (up to {earlier} did so before, and no longer)" if earlier else ""
    return (
        f"no head scores 0.3 or more at {_step(before.step)}, {after.induction} of "
        f"{after.heads:,} at the next checkpoint, {_step(after.step)}{lost}; {end}"
    )


def _step(step: int) -> str:
    return "the final weights" if pd.isna(step) else f"step {step:,}"


def episode_sentences(measured: pd.DataFrame) -> str:
    """Say of each training seed what its heads score where the few-shot episodes begin."""
    sentences = []
    for seed, frame in measured.groupby("training_seed"):
        begin = int(frame.loc[frame["measure"] == "phase_begins", "value"].min())
        scores = frame.loc[(frame["measure"] == "prefix_score") & (frame["step"] == begin), "value"]
        count = int((scores >= SCORE_THRESHOLD).sum())
        heads = f"{count} of {len(scores)} heads score" if count else "no head scores"
        sentences.append(
            f"In training seed {seed} the episodes begin at step {begin:,}; there {heads} 0.3 or "
            f"more on the sequences of this page, and the best has {scores.max():.2f}."
        )
    return " ".join(sentences)


def loss_sentences(measured: pd.DataFrame, vocabulary: int) -> str:
    """Say how the losses of each training seed stand to an even guess among all tokens."""
    even = math.log(vocabulary)
    sentences = [f"An even guess among {vocabulary:,} tokens costs {even:.1f} nats."]
    for seed, frame in measured.groupby("training_seed"):
        first, last = (
            frame[frame["measure"] == f"loss_{copy}_copy"].groupby("step")["value"].mean()
            for copy in ("first", "last")
        )
        peak = last.idxmax()
        side = "more" if last[peak] > even else "no more"
        sentences.append(
            f"In training seed {seed} the last copy costs {side} than that at its worst, "
            f"{last[peak]:.1f} nats at step {peak:,}, where the first costs {first[peak]:.1f}; at "
            f"the end the last costs {last.iloc[-1]:.2f} and the first {first.iloc[-1]:.1f}."
        )
    return " ".join(sentences)


def removal_sentences(measured: pd.DataFrame, *, level: float = 0.75) -> str:
    """Say what is left without the induction heads at the steps where the full model is good.

    Said of each kind of tasks apart; good are the steps at which the full model has ``level`` or
    more on every task of the kind. What is left is the range over these steps and tasks.
    """
    sentences = []
    rows = measured[measured["task"].notna()]
    kinds = rows["task"].map(lambda task: task_kind(task, "unrelated"))
    for (seed, kind), frame in rows.groupby(["training_seed", kinds], sort=False):
        wide = frame.pivot_table("value", ["step", "task"], "measure")
        lowest = wide["accuracy"].groupby("step").min()
        good = wide[wide.index.get_level_values("step").isin(lowest.index[lowest >= level])]
        start = f"In training seed {seed}, on {kind},"
        if good.empty:
            sentences.append(f"{start} no step has {100 * level:.0f} % or more on every task.")
            continue
        left, control = (
            f"{100 * good[name].min():.0f} to {100 * good[name].max():.0f} %"
            for name in ("accuracy_without_induction_heads", "accuracy_without_random_heads")
        )
        steps = good.index.get_level_values("step").unique()
        sentences.append(
            f"{start} the full model has {100 * level:.0f} % or more on every task at "
            f"{len(steps)} of {len(lowest)} saved steps, the first of them {steps[0]:,}; at "
            f"these, {left} remain without its induction heads and {control} without as many "
            f"others; chance is 50 %."
        )
    return "\n".join(f"- {sentence}" for sentence in sentences)


def penalty_sentences(trained: Mapping[str, pd.DataFrame]) -> list[str]:
    """Say of trainings with and without the penalty how many induction heads there are, and where.

    ``trained`` has the ``dynamics`` of each by what is said of it, that without the penalty last.
    The prediction, that most heads of a layer do then, is judged by the layer that has most.
    """
    said, share = [], pd.Series([0.0])
    for name, measured in trained.items():
        scores = measured[measured["measure"] == "prefix_score"]
        last = scores[scores["step"] == scores["step"].max()]
        layers = (last["value"] >= SCORE_THRESHOLD).groupby(last["layer"])
        counts, share = layers.sum(), layers.mean()
        where = [
            f"{count} of the {size} of layer {layer}"
            for (layer, count), size in zip(counts.items(), layers.size(), strict=True)
            if count
        ]
        said.append(
            f"{name} {counts.sum()} of {len(last)} heads end at 0.3 or more, the best at "
            f"{last['value'].max():.2f}: {listed(where) or 'none'}."
        )
    claim = "Without the penalty most heads of a layer become induction heads"
    sign, why = 1 if share.max() > 0.5 else -1, f"{100 * share.max():.0f} % of its heads"
    return [*said, predicted(claim, {f"layer {share.idxmax()}": (sign, why)})]


_EFFECT = {
    "full": "full model", "induction_heads": "without induction heads",
    "induction_pattern": "pattern blocked", "random_heads": "without random heads",
}  # fmt: skip


def effect_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Summarise the finding by kind of tasks: ranges over them, one column a training seed.

    Accuracies are percent at each task's most examples. *Furthest from chance* and *moved* are
    points of the worst task without examples.
    """
    key = ["training_seed", "task", "labels", "shots"]
    wide = frame.pivot_table("accuracy", key, "condition").reset_index()
    wide["kind"] = [task_kind(*pair) for pair in zip(wide["task"], wide["labels"], strict=True)]
    summaries = {seed: _summary(part) for seed, part in wide.groupby("training_seed")}
    return pd.DataFrame(summaries).rename_axis(columns="training seed")


def _summary(wide: pd.DataFrame) -> dict[str, str]:
    few = wide["shots"] == wide.groupby("task")["shots"].transform("max")
    summary = {
        f"{kind}, {name}": range_in_words(Span.of(list(rows[condition])))
        for kind, rows in wide[few].groupby("kind", sort=False)
        for condition, name in _EFFECT.items()
    }
    zero = wide[wide["shots"] == 0]
    chance = 100 / zero["task"].map(lambda task: len(get_task_spec(task).choices))
    furthest = (zero["full"] - chance).abs().max()
    moved = (zero["full"] - zero["induction_heads"]).abs().max()
    return summary | {
        "no examples, furthest from chance": f"{furthest:.1f}",
        "no examples, moved by removal at most": f"{moved:.1f}",
    }
