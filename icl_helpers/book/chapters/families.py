"""What came out of stage 10: tables, predictions and sentences, every one by rule.

Example
-------
>>> table = family_table(measured.family_removals(run))
>>> family_verdict(table, 4)
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from icl_helpers.attention.heads import SCORE_THRESHOLD, Head, head_count, top_heads
from icl_helpers.results.outcomes import listed, predicted, task_name, verdict
from icl_helpers.results.statistics import Interval, finite_interval

__all__ = [
    "CONTROL", "EXCLUDED", "FAMILIES", "PATTERNS",
    "circuit_sentence", "circuit_table", "circuit_verdict", "family_sentences", "family_table",
    "family_verdict", "loss_sentence", "loss_table", "loss_verdict", "overlap_sentence",
    "overlap_table", "overlap_verdict", "repair_sentences", "repair_table", "repair_verdict",
    "shown", "text_sentences", "text_table", "text_verdicts",
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
    mean, low, high = (round(it, 2) + 0.0 for it in (interval.mean, interval.low, interval.high))
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """A table with its intervals as text, and other numbers with one decimal."""
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
        layers = [float(np.mean([head.layer for head in heads])) for heads in sets]
        count = len(sets[0])
        rows.append(
            {
                "heads": count, "shared": len(set(sets[0]) & set(sets[1])),
                "by chance": count * count / prefix.numel(),
                **{f"mean layer, {name}": one for name, one in zip(FAMILIES, layers, strict=True)},
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def overlap_sentence(table: pd.DataFrame) -> str:
    """Say how many heads are in both families, and which family lies deeper."""
    said = [
        f"{row['shared']:.0f} of the best {row['heads']:.0f} of each (chance: "
        f"{row['by chance']:.1f}), in layer {row[f'mean layer, {FAMILIES[0]}']:.1f} and "
        f"{row[f'mean layer, {FAMILIES[1]}']:.1f} in the mean"
        for row in table.to_dict("records")
    ]
    return f"Heads in both families: {'; '.join(said)} (induction first)."


def overlap_verdict(table: pd.DataFrame) -> str:
    """Say whether the two families are mostly different heads."""
    row = table.iloc[-1]
    held = row["shared"] <= row["heads"] / 2
    return (
        f"*The two families are mostly different heads*: **{'held' if held else 'did not hold'}**, "
        f"{row['shared']:.0f} of {row['heads']:.0f} are in both."
    )


def family_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Margins lost without each family, a row a task and number of heads.

    ``frame`` is ``families_measured.family_removals``. ``difference`` is what
    function-vector heads cost more than induction heads, on the same documents.
    """
    rows = []
    for task, part in frame.groupby("task", sort=False):
        whole = part.loc[part["chosen_by"] == "none", "margins"].item()
        for heads, dose in part[part["heads"] > 0].groupby("heads"):
            left = {row["chosen_by"]: row["margins"] for row in dose.to_dict("records")}
            induction, vectors = (finite_interval(whole - left[family]) for family in FAMILIES)
            more = finite_interval(left[FAMILIES[0]] - left[FAMILIES[1]])
            rows.append(
                {"task": task, "heads": heads, FAMILIES[0]: induction, FAMILIES[1]: vectors,
                 "difference": more}
            )  # fmt: skip
    return pd.DataFrame(rows)


def _at(table: pd.DataFrame, removed: int) -> pd.DataFrame:
    """Each task's row with the most heads up to as many as the run removes."""
    return table[table["heads"] <= removed].groupby("task", sort=False).tail(1)


def family_sentences(table: pd.DataFrame, removed: int) -> list[str]:
    """Say of each task what either family costs at a matched number of heads."""
    said = []
    for row in _at(table, removed).to_dict("records"):
        more = row["difference"]
        which = (
            "function-vector heads cost distinguishably more" if more.low > 0
            else "induction heads cost distinguishably more" if more.high < 0
            else "the two are not distinguishable"
        )  # fmt: skip
        said.append(
            f"{task_name(row['task']).capitalize()}, {row['heads']} heads removed, nats of margin "
            f"lost: induction {_bounds(row[FAMILIES[0]])}, function vectors "
            f"{_bounds(row[FAMILIES[1]])}; {which}."
        )
    return said


def family_verdict(table: pd.DataFrame, removed: int) -> str:
    """Say whether function-vector heads matter more than induction heads."""
    tasks = {
        row["task"]: (bool(row["difference"].low > 0), f"difference {_bounds(row['difference'])}")
        for row in _at(table, removed).to_dict("records")
    }
    return predicted("Removing function-vector heads costs more margin than removing as many "
                   "induction heads", tasks)  # fmt: skip


def loss_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Fall of the token-loss difference without each family, a row a number of heads.

    ``frame`` is ``families_measured.token_losses``.
    """
    whole = frame.loc[frame["chosen_by"] == "none", "values"].item()
    rows = [
        {"heads": heads, "full model": finite_interval(whole),
         **{family: finite_interval(whole - values)
            for family, values in part[["chosen_by", "values"]].itertuples(index=False)}}
        for heads, part in frame[frame["heads"] > 0].groupby("heads")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def loss_sentence(table: pd.DataFrame, removed: int) -> str:
    """Say how much of the gain from early to late tokens goes with either family."""
    row = table[table["heads"] <= removed].iloc[-1]
    return (
        f"On running text, loss of early tokens less that of late ones: "
        f"{_bounds(row['full model'])} nats; it falls without {row['heads']} induction heads by "
        f"{_bounds(row[FAMILIES[0]])}, without as many function-vector heads by "
        f"{_bounds(row[FAMILIES[1]])}."
    )


def loss_verdict(table: pd.DataFrame, removed: int) -> str:
    """Say whether what later tokens gain goes with induction heads rather."""
    row = table[table["heads"] <= removed].iloc[-1]
    gains = row["full model"].low > 0
    held = row[FAMILIES[0]].low > row[FAMILIES[1]].high
    word = "held" if gains and held else "did not hold" if gains else "was not shown"
    why = "" if gains else ": late tokens are not predicted distinguishably better than early ones"
    return (
        f"*On running text it is the other way round: induction heads carry more of what late "
        f"tokens gain*: **{word}**{why}."
    )


def circuit_table(frame: pd.DataFrame, n_heads: int) -> pd.DataFrame:
    """Lay behavioural and mechanistic evidence side by side, a row an induction head.

    ``frame`` is ``families_measured.circuits``. ``behaves``: the score is 0.3
    or more; ``copies``: more than half of the eigenvalues are positive; ``raises``: the direct
    logit effect on repeats is positive; ``composes``: removing the earlier previous-token heads
    takes half of the score, and more than removing as many others; ``both``: all of these.
    ``within``: the head is among the best 1 % or 3 %.
    """
    behaves = frame["prefix"] >= SCORE_THRESHOLD
    copies, raises = frame["copying"] > _COPIES, frame["logit"] > 0
    composes = (frame["together"] >= _COMPOSES * frame["prefix"]) & (
        frame["together"] > frame["control"]
    )
    rank = np.arange(1, len(frame) + 1)
    share = np.where(
        rank <= head_count(n_heads, 0.01), "1 %",
        np.where(rank <= head_count(n_heads, 0.03), "3 %", "more"),
    )  # fmt: skip
    return frame.assign(
        behaves=behaves, copies=copies, raises=raises, composes=composes,
        both=behaves & copies & raises & composes, within=share,
    )  # fmt: skip


def circuit_sentence(table: pd.DataFrame) -> str:
    """Say how many of the best heads pass which test."""
    said = []
    for name, part in (("1 %", table[table["within"] == "1 %"]),
                       ("3 %", table[table["within"] != "more"]),
                       (f"{len(table)} heads that the run removes", table)):  # fmt: skip
        passed = [str(Head(*row)) for row in part.loc[part["both"], ["layer", "head"]].to_numpy()]
        counts = [f"{int(part[column].sum())} {word}" for column, word in
                  (("behaves", "score 0.3 or more"), ("copies", "copy by their weights"),
                   ("raises", "raise the logit of what followed"),
                   ("composes", "lose half of it with the previous-token heads"))]  # fmt: skip
        said.append(
            f"of the best {name} ({len(part)}), {', '.join(counts)}; all of these: "
            f"{listed(passed) if passed else 'none'}"
        )
    return f"Behaviour and mechanism: {'. '.join(one[:1].upper() + one[1:] for one in said)}."


def circuit_verdict(table: pd.DataFrame) -> str:
    """Say whether the heads that score high are induction heads by mechanism too."""
    best = table[table["behaves"]]
    failed = [str(Head(*row)) for row in best.loc[~best["both"], ["layer", "head"]].to_numpy()]
    count = len(best) - len(failed)
    word = verdict(best["both"].tolist() or [False], [True])
    but = f"; not of {listed(failed)}" if failed else ""
    return (
        f"*Heads that score 0.3 or more copy, by weights and by logits, and lose half of their "
        f"score with the earlier previous-token heads*: **{word}**, of {count} of {len(best)}{but}."
    )


def text_table(frame: pd.DataFrame) -> pd.DataFrame:
    """What blocking each pattern of text costs and its control, a row a task and pattern.

    ``frame`` is ``families_measured.natural_text``. Columns: pairs blocked,
    ``loss`` and ``control`` (margin lost, nats), ``more`` (loss less that of the control, on the
    same documents) and accuracy.
    """
    rows = []
    for task, part in frame.groupby("task", sort=False):
        of = part.set_index("pattern")
        whole = of.loc["none", "margins"]
        for pattern in PATTERNS:
            own, control = of.loc[pattern, "margins"], of.loc[pattern + CONTROL, "margins"]
            rows.append(
                {"task": task, "pattern": pattern, "pairs": of.loc[pattern, "pairs"],
                 "loss": finite_interval(whole - own), "control": finite_interval(whole - control),
                 "more": finite_interval(control - own), "accuracy": of.loc[pattern, "accuracy"],
                 "full model": of.loc["none", "accuracy"]}
            )  # fmt: skip
    return pd.DataFrame(rows)


def text_sentences(table: pd.DataFrame) -> list[str]:
    """Say of each text task what each pattern costs."""
    said = []
    for task, part in table.groupby("task", sort=False):
        each = [
            f"{row['pattern']} {_bounds(row['loss'])}, control {row['control'].mean:+.2f}"
            for row in part.to_dict("records")
        ]
        said.append(
            f"{task_name(str(task)).capitalize()}, nats of margin lost with followers blocked: "
            f"{'; '.join(each)}."
        )
    return said


def text_verdicts(table: pd.DataFrame) -> list[str]:
    """Say whether each pattern costs more on text than as many other positions."""
    return [
        predicted(
            f"On text, blocking what followed the {pattern} costs more than the control",
            {
                row["task"]: (bool(row["more"].low > 0), f"difference {_bounds(row['more'])}")
                for row in part.to_dict("records")
            },
        )
        for pattern, part in table.groupby("pattern", sort=False)
    ]


def repair_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Direct and total effects of the removal, a row a task, and what later layers add."""
    rows = [
        {
            "task": row["task"], "direct": finite_interval(row["direct"]),
            "total": finite_interval(row["total"]),
            "later layers": finite_interval(row["total"] - row["direct"]),
        }
        for row in frame.to_dict("records")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def repair_sentences(table: pd.DataFrame) -> list[str]:
    """Say of each task what later layers make of the removal."""
    said = []
    for row in table.to_dict("records"):
        later = row["later layers"]
        what = (
            "later layers add to the loss" if later.low > 0
            else "later layers repair part of it" if later.high < 0 < row["direct"].mean
            else "later layers turn it into a gain or add to one" if later.high < 0
            else "what later layers change is not distinguishable from nothing"
        )  # fmt: skip
        said.append(
            f"{task_name(row['task']).capitalize()}, nats of margin lost without the heads: "
            f"directly {_bounds(row['direct'])}, in all {_bounds(row['total'])}; {what}."
        )
    return said


def repair_verdict(table: pd.DataFrame) -> str:
    """Say whether later layers make up for part of what is lost directly."""
    tasks = {
        row["task"]: (
            bool(row["later layers"].high < 0),
            f"later layers {_bounds(row['later layers'])}",
        )
        for row in table.to_dict("records")
    }
    return predicted("Later layers repair part of the direct loss", tasks)
