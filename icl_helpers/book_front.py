"""The front page's figure and the words for its numbers, from the first run's results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from icl_helpers.book_pages import run_info, run_slug
from icl_helpers.models import embedded_models
from icl_helpers.pipeline import stage_notebooks
from icl_helpers.plotting import accuracy_bars, bars_alt
from icl_helpers.summary import abstract_results, summarise

__all__ = ["front_page"]

_FIGURE = ("mean", "knockout")
_VIEWER = "07_attention_patterns"
_ABOUT_EMBEDDED = (
    "The embedded model is made for this purpose: it was trained, from scratch, on repeated "
    "sequences, few-shot puzzles and template sentences, with a penalty that keeps induction in "
    "few heads, and knows nothing else. What it shows is how the mechanism is found, removed and "
    "blocked with these tools, and what that does to "
    "few-shot accuracy in *this* model. It is no evidence about large models trained on text; for "
    "those, see the paper or run one."
)


def front_page(staged: Path, run: Path) -> dict[str, str]:
    """Draw the front page's figure into ``staged/_static``; return what is inserted into prose.

    Keys: model, model_described, answer, figure, accuracies, stages, viewer, about_model.
    """
    info = run_info(run)
    results = abstract_results(pd.read_parquet(run / "results.parquet"))
    (staged / "_static").mkdir(exist_ok=True)
    figure = accuracy_bars(results, ablations=list(_FIGURE))
    figure.savefig(staged / "_static" / "front.png", dpi=160)
    numbers = summarise(results)
    embedded = info["model"] in embedded_models()
    return {
        "model": info["model"],
        "model_described": f"{info['model']}, a small model that travels with it"
        if embedded
        else info["model"],
        "answer": _answer(numbers),
        "figure": "\n".join(
            [
                "```{figure} _static/front.png",
                ":name: fig-front",
                f":alt: {json.dumps(bars_alt(results, ablations=list(_FIGURE)))}",
                "",
                _caption(info, numbers["fraction"]),
                "```",
            ]
        ),
        "accuracies": _accuracies(results),
        "stages": str(len(stage_notebooks())),
        "viewer": f"[attention viewer](run/{run_slug(run)}/{_VIEWER})",
        "about_model": _ABOUT_EMBEDDED if embedded else "",
    }


def _caption(info: Mapping[str, Any], fraction: float) -> str:
    limit = info["parameters"]["limit"]
    documents = "all documents" if limit is None else f"the first {limit} documents"
    return (
        f"Accuracy of {info['model']} with the most examples per task, on {documents} of each "
        f"task and demonstration seeds {', '.join(map(str, info['parameters']['seeds']))}; "
        f"{fraction:.1%} of its heads are removed (mean ablation) or blocked. Lines span the runs; "
        f"the dotted line is chance for two labels."
    )


def _accuracies(results: pd.DataFrame) -> str:
    """The full model's accuracy on each task beside chance, as half a sentence."""
    full = results[results["condition"] == "full"]
    most = full[full["shots"] == full.groupby("task")["shots"].transform("max")]
    parts = []
    for task, rows in most.groupby("task", sort=False):
        labels = 4 if str(task).endswith("4way") else 2
        parts.append(
            f"{str(task).replace('_', ' ')} {100 * rows['accuracy'].mean():.0f} % "
            f"(chance {100 / labels:.0f} %)"
        )
    return ", ".join(parts)


def _answer(numbers: dict[str, Any]) -> str:
    """The answer for this model; what was not evaluated is left out."""
    full = numbers["full"]
    text = (
        f"**In this model:** with {numbers['shots']} examples it labels {full:.0f} % of the "
        f"two-label sequences correctly."
    )
    removed = {
        "induction_heads": f"without {numbers['fraction']:.1%} of its heads, those with the "
        f"highest induction score, {{}}",
        "induction_pattern": "with only their induction pattern blocked, {}",
        "random_heads": "without as many random heads of the same layers, {}",
    }
    parts = [
        words.format(f"{numbers[name]:.0f} % ({_points(numbers[name] - full)} points)")
        for name, words in removed.items()
        if numbers[name] is not None
    ]
    if parts:
        text += f" {'; '.join(parts).capitalize()}."
    zero = (numbers["zero_shot"], numbers["zero_shot_induction_heads"])
    if None in zero:
        return text
    return (
        f"{text} Without examples it is at {zero[0]:.0f} %, and at {zero[1]:.0f} % without the "
        f"heads."
    )


def _points(difference: float) -> str:
    """A difference in whole points with its sign; what rounds to nothing has none."""
    return f"{round(difference):+d}" if round(difference) else "0"
