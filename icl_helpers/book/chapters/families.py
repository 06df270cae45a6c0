"""What came out of stage 10: tables, predictions and sentences, every one by rule.

Example
-------
>>> table = family_table(measured.family_removals(run))
>>> sentences, predictions = family_said(table, 4)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from icl_helpers.attention.heads import SCORE_THRESHOLD, Head, head_count, top_heads
from icl_helpers.results.outcomes import Said, listed, predicted, side, verdict
from icl_helpers.results.statistics import Interval, finite_interval
from icl_helpers.tasks.specs import task_title

__all__ = [
    "CONTROL", "EXCLUDED", "FAMILIES", "PATTERNS", "circuit_said", "circuit_table", "family_said",
    "family_table", "loss_said", "loss_table", "overlap_said", "overlap_table", "repair_said",
    "repair_table", "shown", "text_said", "text_table",
]  # fmt: skip

FAMILIES = ("induction", "function vectors")
# Share of the heads, the best of one family, that the other may not have.
EXCLUDED = 0.02
# What is blocked in text: an induction pattern of any prompt, by name; and as many other positions.
PATTERNS = ("same token", "same word", "same token of another demonstration")
CONTROL = ", control"
# What counts as copying, and as composing: more than half of the eigenvalues are positive, and
# without the earlier heads that attend to the token before half of the prefix score is gone.
_COPIES, _COMPOSES = 0.5, 0.5


def _bounds(interval: Interval) -> str:
    # Plus zero: what rounds to nothing has no sign.
    mean, low, high = (round(it, 2) + 0.0 for it in interval)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Write a table's intervals as text, and its other numbers with one decimal."""
    return table.map(lambda it: _bounds(it) if isinstance(it, Interval) else it).round(1)


def overlap_table(
    prefix: torch.Tensor, vectors: torch.Tensor, fractions: list[float]
) -> pd.DataFrame:
    """Compare the best heads of both families, a row a number of heads.

    Columns: heads, how many are ``shared``, how many chance shares in the mean, and each family's
    mean layer.
    """
    rows = []
    for fraction in fractions:
        sets = [top_heads(scores, fraction) for scores in (prefix, vectors)]
        count = len(sets[0])
        layers = {
            f"mean layer, {family}": float(np.mean([head.layer for head in heads]))
            for family, heads in zip(FAMILIES, sets, strict=True)
        }
        shared = len(set(sets[0]) & set(sets[1]))
        chance = count * count / prefix.numel()
        rows.append({"heads": count, "shared": shared, "by chance": chance, **layers})
    return pd.DataFrame(rows)


def overlap_said(table: pd.DataFrame) -> Said:
    """Say how many heads are in both families, which lies deeper, and whether they differ."""
    said = [
        f"{row['shared']:.0f} of the best {row['heads']:.0f} of each (chance: "
        f"{row['by chance']:.1f}), in layer {row[f'mean layer, {FAMILIES[0]}']:.1f} and "
        f"{row[f'mean layer, {FAMILIES[1]}']:.1f} in the mean"
        for row in table.to_dict("records")
    ]
    fewer = [bool(row["shared"] < row["heads"] / 2) for row in table.to_dict("records")]
    shared = [f"{row['shared']:.0f} of {row['heads']:.0f}" for row in table.to_dict("records")]
    word = verdict(fewer, [not it for it in fewer])
    return [f"Heads in both families: {'; '.join(said)} (induction first)."], [
        f"*The two families are mostly different heads*: **{word}**; shared are {listed(shared)}."
    ]


def family_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Sum up the margins lost without each family, a row a task and number of heads.

    ``frame`` is ``families_measured.family_removals``. ``difference`` is what
    function-vector heads cost more than induction heads, on the same documents.
    """
    whole = frame[frame["chosen_by"] == "none"].set_index("task")["margins"]
    rows = []
    for (task, heads), dose in frame[frame["heads"] > 0].groupby(["task", "heads"], sort=False):
        induction, vectors = dose.set_index("chosen_by")["margins"][list(FAMILIES)]
        rows.append(
            {
                "task": task, "heads": heads,
                FAMILIES[0]: finite_interval(whole[task] - induction),
                FAMILIES[1]: finite_interval(whole[task] - vectors),
                "difference": finite_interval(induction - vectors),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def family_said(table: pd.DataFrame, removed: int, kept: Sequence[Head] = ()) -> Said:
    """Say what either family costs at the most heads up to ``removed``, and which costs more.

    ``kept`` are induction heads that stay, as they are among the best of the other family.
    """
    said, tasks = [], {}
    largest = table[table["heads"] <= removed].groupby("task", sort=False).tail(1)
    for row in largest.to_dict("records"):
        more, induction, vectors = (row[name] for name in ("difference", *FAMILIES))
        # Where removal adds to the margin nothing is lost that could be more.
        sign = int(more.low > 0 < vectors.low) - int(more.high < 0 < induction.low)
        which = (
            "neither is shown to cost anything" if max(vectors.low, induction.low) <= 0
            else "which of the two cost more is not decided" if not sign
            else f"{'function-vector' if sign > 0 else 'induction'} heads cost more, by the "
            f"interval over documents"
        )  # fmt: skip
        said.append(
            f"{task_title(row['task'])}, {row['heads']} heads removed, nats of margin lost: "
            f"induction {_bounds(induction)}, function vectors {_bounds(vectors)}; {which}."
        )
        tasks[row["task"]] = sign, f"difference {_bounds(more)}"
    if kept:
        said.append(
            f"Kept in this comparison, since they are among the best {100 * EXCLUDED:.0f} % for "
            f"function vectors: {listed(list(map(str, kept)))}. Stage 9 removes them too: where it "
            f"loses more, these heads make the difference."
        )
    claim = "Removing function-vector heads costs more margin than removing as many induction heads"
    return said, [predicted(claim, tasks)]


def loss_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Sum up the fall of the token-loss difference without each family, a row a number of heads.

    ``frame`` is ``families_measured.token_losses``.
    """
    whole = frame.loc[frame["chosen_by"] == "none", "values"].item()
    removed = frame[frame["heads"] > 0]
    falls = removed.assign(fall=[finite_interval(whole - values) for values in removed["values"]])
    table = falls.pivot(index="heads", columns="chosen_by", values="fall")[list(FAMILIES)]
    table.insert(0, "full model", [finite_interval(whole)] * len(table))
    return table.rename_axis(columns=None).reset_index()


def loss_said(table: pd.DataFrame, removed: int) -> Said:
    """Say how much of what later tokens gain goes with either family, and with which more."""
    row = table[table["heads"] <= removed].iloc[-1]
    whole, induction, vectors = row["full model"], row[FAMILIES[0]], row[FAMILIES[1]]
    gains, more = whole.low > 0, induction.low > vectors.high
    word = verdict([bool(gains and more)], [bool(gains and vectors.low > induction.high)])
    why = "" if gains else ": late tokens are not predicted better than early ones, by the interval"
    return [
        f"On running text, loss of early tokens less that of late ones: {_bounds(whole)} nats; it "
        f"falls without {row['heads']} induction heads by {_bounds(induction)}, without as many "
        f"function-vector heads by {_bounds(vectors)}."
    ], [
        f"*On running text it is the other way round: induction heads carry more of what late "
        f"tokens gain*: **{word}**{why}."
    ]


def circuit_table(frame: pd.DataFrame, n_heads: int) -> pd.DataFrame:
    """Lay behavioural and mechanistic evidence side by side, a row an induction head.

    ``frame`` is ``families_measured.circuits``. ``behaves``: the score is 0.3
    or more; ``copies``: more than half of the eigenvalues are positive; ``raises``: the direct
    logit effect on repeats is positive; ``composes``: removing the earlier previous-token heads
    takes half of the score, and removing as many others does not; ``both``: all of these.
    ``within``: the head is among the best 1 % or 3 %.
    """
    composes = frame["together"] >= _COMPOSES * frame["prefix"]
    tests = pd.DataFrame(
        {
            "behaves": frame["prefix"] >= SCORE_THRESHOLD, "copies": frame["copying"] > _COPIES,
            "raises": frame["logit"] > 0,
            "composes": composes & (frame["control"] < _COMPOSES * frame["prefix"]),
        }
    )  # fmt: skip
    shares = ["1 %"] * head_count(n_heads, 0.01)
    shares += ["3 %"] * (head_count(n_heads, 0.03) - len(shares))
    within = (shares + ["more"] * len(frame))[: len(frame)]
    return frame.join(tests).assign(both=tests.all(axis=1), within=within)


def _named(rows: pd.DataFrame) -> list[str]:
    return [str(Head(*row)) for row in rows[["layer", "head"]].to_numpy()]


def circuit_said(table: pd.DataFrame) -> Said:
    """Say how many of the best heads pass which test, and whether high scores go with mechanism."""
    words = {
        "behaves": "with a score of 0.3 or more", "copies": "copying by the weights",
        "raises": "raising the logit of what followed",
        "composes": "losing half of the score without the previous-token heads, and not without "
        "as many others",
    }  # fmt: skip
    said = []
    first, second = table[table["within"] == "1 %"], table[table["within"] != "more"]
    named = [("best 1 %", first), ("best 3 %", second)]
    named += [("heads that the run removes", table)] * (len(second) < len(table))
    for name, part in named:
        counts = [f"{int(part[test].sum())} {word}" for test, word in words.items()]
        passed = _named(part[part["both"]])
        said.append(
            f"Of the {name} ({len(part)}), {', '.join(counts)}; all of these: "
            f"{listed(passed) if passed else 'none'}"
        )
    best = table[table["behaves"]]
    failed = _named(best[~best["both"]])
    word = verdict(best["both"].tolist() or [False], [len(best) > 0])
    of = f"{len(best) - len(failed) or 'none'} of {len(best)} heads" if len(best) else "no head"
    but = f"; not for {listed(failed)}" if failed else ""
    return [f"Behaviour and mechanism: {'. '.join(said)}."], [
        f"*Heads that score 0.3 or more copy, by weights and by logits, and lose half of their "
        f"score with the earlier previous-token heads alone*: **{word}**, for {of}{but}."
    ]


def text_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Sum up what blocking each pattern of text costs and its control, a row a task and pattern.

    ``frame`` is ``families_measured.natural_text``. Columns: pairs blocked,
    ``loss`` and ``control`` (margin lost, nats), ``more`` (loss less that of the control, on the
    same documents) and accuracy.
    """
    rows = []
    for task, part in frame.groupby("task", sort=False):
        of = part.set_index("pattern")
        margins, whole = of["margins"], of.loc["none", "margins"]
        rows += [
            {
                "task": task, "pattern": pattern, "pairs": of.loc[pattern, "pairs"],
                "loss": finite_interval(whole - margins[pattern]),
                "control": finite_interval(whole - margins[pattern + CONTROL]),
                "more": finite_interval(margins[pattern + CONTROL] - margins[pattern]),
                "accuracy": of.loc[pattern, "accuracy"], "full model": of.loc["none", "accuracy"],
            }
            for pattern in PATTERNS
        ]  # fmt: skip
    return pd.DataFrame(rows)


def text_said(table: pd.DataFrame) -> Said:
    """Say what each pattern costs on text, and whether more than as many other positions."""
    if table.empty:
        return ["No text task is evaluated in this run."], []
    each = table.assign(said=[
        f"{row['pattern']} {_bounds(row['loss'])}, control {row['control'].mean:+.2f}"
        for row in table.to_dict("records")
    ])  # fmt: skip
    said = [
        f"{task_title(str(task))}, nats of margin lost with followers blocked: {costs}."
        for task, costs in each.groupby("task", sort=False)["said"].agg("; ".join).items()
    ]
    return said, [
        predicted(
            f"On text, blocking what followed the {pattern} costs more than the control",
            {
                task: (side(more.low, more.high), f"difference {_bounds(more)}")
                for task, more in part.set_index("task")["more"].items()
            },
        )
        for pattern, part in table.groupby("pattern", sort=False)
    ]


def repair_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Sum up direct and total effects of the removal, a row a task, and what later layers add."""
    effects = frame.assign(**{"later layers": frame["total"] - frame["direct"]})
    names = ["direct", "total", "later layers"]
    return effects[["task"]].join(effects[names].map(finite_interval))


def repair_said(table: pd.DataFrame) -> Said:
    """Say of each task what later layers make of the removal, and whether they repair it."""
    said, tasks = [], {}
    for row in table.to_dict("records"):
        later = row["later layers"]
        what = (
            "later layers add to the loss" if later.low > 0
            else "later layers repair part of it" if later.high < 0 < row["direct"].low
            else "later layers add to a margin not shown to be lost directly" if later.high < 0
            else "what later layers change is not distinguishable from nothing"
        )  # fmt: skip
        said.append(
            f"{task_title(row['task'])}, nats of margin lost without the heads: directly "
            f"{_bounds(row['direct'])}, in all {_bounds(row['total'])}; {what}."
        )
        repaired = later.high < 0 < row["direct"].low
        sign = int(repaired) - int(later.low > 0)
        tasks[row["task"]] = sign, f"later layers {_bounds(later)}"
    return said, [predicted("Later layers repair part of the direct loss", tasks)]
