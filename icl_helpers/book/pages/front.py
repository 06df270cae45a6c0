"""The front page: the first run's numbers, what they say of the paper, and the drawing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icl_helpers.attention.heads import heads_in_words
from icl_helpers.attention.induction_pattern import (
    CATEGORIES,
    elements_pattern,
    induction_pattern,
    prompt_elements,
)
from icl_helpers.book.pages.names import (
    RESULTS,
    described_model,
    filled_page,
    model_of,
    run_slug,
    run_titles,
    size_of,
)
from icl_helpers.files import embedded_models, stage_notebooks
from icl_helpers.models.loading import load_tokenizer
from icl_helpers.results.figures import accuracy_bars, bars_alt
from icl_helpers.results.outcomes import (
    KindOutcome,
    headline,
    kind_outcomes,
    listed,
    removed_in_words,
    seed_doubts,
)
from icl_helpers.results.tables import abstract_results, markdown_table
from icl_helpers.run.plan import run_heads, run_info, run_table
from icl_helpers.tasks.prompts import build_prompts
from icl_helpers.tasks.specs import task_name

__all__ = ["drawing", "front_page"]

_SHIPPED = "computed beforehand and shipped with it (see [](verification))"
_FIGURE = ("mean", "knockout")
_VIEWER = "07_attention_patterns"


def front_page(staged: Path, runs: Sequence[Path]) -> dict[str, str]:
    """Draw the front page's figure into ``staged/_static``; return what is inserted into prose.

    Its numbers are those of the first run. Keys: model, model_described, size, origin, answer,
    outcome, doubts, figure, runs_here, stages, viewer, about_model.
    """
    run = runs[0]
    info, titles, n_heads = run_info(run), run_titles(runs), run_heads(run)
    name, parameters = model_of(run), info["parameters"]
    results = abstract_results(run_table(run, "results", "tasks"))
    every = {it: kind_outcomes(run_table(it, "documents", None)) for it in runs}
    said = {it: headline(of, heads=_removed(it, of)) for it, of in every.items()}
    outcomes, heads = every[run], _removed(run, every[run])
    (staged / "_static" / "narrow").mkdir(parents=True, exist_ok=True)
    for narrow, file in ((False, "front.png"), (True, "narrow/fig-front.png")):
        figure = accuracy_bars(results, ablations=_FIGURE, n_heads=n_heads, narrow=narrow)
        figure.savefig(staged / "_static" / file, dpi=160)
    drawn = set(results["task"])
    left = removed_in_words(it for it in outcomes if {task.task for task in it.tasks} <= drawn)
    alt = f"{bars_alt(results, ablations=_FIGURE, n_heads=n_heads)} {left}".strip()
    embedded = [name for name in embedded_models() if name in map(model_of, runs)]
    return {
        "model": name,
        "model_described": described_model(run),
        "size": size_of(run),
        "origin": "computed when the book was built" if "imported" not in info else _SHIPPED,
        "answer": filled_page(
            "answer", title=titles[run], heads=heads, table=_task_table(outcomes),
            results=f"run/{run_slug(run)}/{RESULTS}",
        ),
        "doubts": filled_page("doubts", doubts=seed_doubts(outcomes, model=name)),
        "figure": filled_page("figure", **parameters | {"model": name}, alt=alt, heads=heads),
        "outcome": said[run],
        "runs_here": "\n".join(
            f"- [{titles[it]}](run/{run_slug(it)}/{RESULTS}), {size_of(it)}. {said[it]}"
            for it in runs
        ),
        "stages": str(len(stage_notebooks())),
        "viewer": f"[attention viewer](run/{run_slug(run)}/{_VIEWER})",
        "about_model": "\n\n".join(
            [filled_page("real")] * (name not in embedded)
            + [filled_page("embedded", model=it) for it in embedded]
        ),
    }  # fmt: skip


def _removed(run: Path, outcomes: Sequence[KindOutcome]) -> str:
    return heads_in_words(max(it.fraction for it in outcomes) or 1.0, run_heads(run))


_COLUMNS = {
    "full": "full model", "induction_heads": "induction heads removed",
    "induction_pattern": "their pattern blocked", "random_heads": "random heads removed",
}  # fmt: skip


def _task_table(outcomes: Sequence[KindOutcome]) -> str:
    """Accuracy of each task under each condition, marked where it is told apart from another."""
    cells: dict[str, dict[str, str]] = {}
    for outcome in outcomes:
        control = f" ({outcome.control})" if outcome.control else ""
        for task in outcome.tasks:
            # Of text there are two sets of labels.
            labels = f"{task.labels} labels, " if outcome.kind.startswith("text") else ""
            name = f"{task_name(task.task)} ({labels}chance {task.chance:.0f})"
            row = cells.setdefault(name, {})
            marks = "\\*" * bool(task.to_full and task.to_full.sign)
            marks += "".join(
                _MARKS[gap.control]
                for gap in task.differences
                if gap.against == "random_heads" and gap.sign < 0
            )
            level = f", {task.level}" if task.level in ("below chance", "one label") else ""
            row[_COLUMNS[outcome.condition] + control] = f"{task.accuracy.mean:.0f}{marks}{level}"
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    rows = [[task, *(row.get(name, "") for name in columns)] for task, row in cells.items()]
    return markdown_table(["accuracy in percent", *columns], rows)


# Marks of a removal that costs distinguishably more than that of a control's heads.
# The paper's has no name in results that were made without a run.
_MARKS = {"": "†", "published": "†", "strict": "‡", "any_layer": "§"}


def drawing() -> str:
    """Draw what an induction head attends to, and the pairs that a knockout blocks, on a prompt.

    Pairs are those of :func:`icl_helpers.induction_pattern` by icl-tiny's tokenizer; the prompt is
    the task's first whose query shares a word's category with a demonstration.
    """
    copied = list("KRT") * 2
    ideal = {
        (at, key + 1): "words"
        for at, key in itertools.product(range(len(copied)), repeat=2)
        if key < at and copied[key] == copied[at]
    }
    tokenizer = load_tokenizer("icl-tiny")
    for prompt in build_prompts("wordseq1_binary", shots=2, seed=42):
        encoded = tokenizer(prompt.context, add_special_tokens=False, return_offsets_mapping=True)
        spans, elements = encoded["offset_mapping"], prompt_elements(prompt.context)
        kinds = {name: elements_pattern(elements, spans, categories=(name,)) for name in CATEGORIES}
        first, query = (
            next(at for at, (_, end) in enumerate(spans) if end > element.start)
            for element in (elements[0], elements[-3])
        )
        if kinds["words"][query].any():
            break
    pairs = {
        (at - first, key - first): next(kind for kind in CATEGORIES if kinds[kind][at, key])
        for at, key in induction_pattern(prompt.context, tokenizer).nonzero().tolist()
    }
    shown = [prompt.context[start:end].strip() or "blank line" for start, end in spans[first:]]
    figures = [(copied, ideal, 0), (shown, pairs, query - first)]
    return filled_page("drawing", figures=figures, arcs=_arcs, say=_say_pairs)


def _arcs(pairs: Mapping[tuple[int, int], str], loud: int) -> list[dict[str, Any]]:
    """Say where each arc of a drawing runs, and whether it starts in the query (from ``loud``)."""
    return [
        {"start": 22 * at + 11, "end": 22 * key + 11, "out": 12 * (at - key) + 14, "kind": kind,
         "quiet": at < loud}
        for (at, key), kind in sorted(pairs.items())
    ]  # fmt: skip


def _say_pairs(tokens: Sequence[str], pairs: Mapping[tuple[int, int], str], loud: int) -> str:
    """Say which pairs start in the query, for readers who do not see the drawing."""
    looks: dict[int, list[str]] = {}
    for at, key in sorted(pairs):
        if at >= loud:
            looks.setdefault(at, []).append(f"{tokens[key]} (token {key + 1})")
    return "; ".join(
        f"from {tokens[at]} (token {at + 1}) to {listed(keys)}" for at, keys in looks.items()
    )
