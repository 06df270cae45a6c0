"""How the book names its runs and their pages, and the templates that pages are filled from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open

from icl_helpers.files import (
    SMOLLM2,
    assets_dir,
    embedded_dir,
    embedded_models,
    notebooks_dir,
    stage_notebooks,
)
from icl_helpers.results.outcomes import listed
from icl_helpers.results.tables import unsigned_zeros
from icl_helpers.run.plan import Plan, run_info, shown_name
from icl_helpers.tasks.specs import task_kind

__all__ = [
    "RESULTS", "chapter_notebooks", "described_model", "filled_page", "model_of", "run_slug",
    "run_titles", "shown_stages", "size_of", "stage_pages",
]  # fmt: skip

# The stage that sums up the ones before it, and the one on text.
RESULTS, _TEXT = "08_results", "06_nlp_tasks"

# Their prose stands in Markdown files of the package; autoescaping would spoil Markdown.
_PAGES = Environment(
    loader=FileSystemLoader(assets_dir() / "pages"), trim_blocks=True, undefined=StrictUndefined
)


def run_slug(run: Path) -> str:
    """Return a run's name as it stands in addresses of the book."""
    return re.sub(r"[^a-z0-9-]+", "-", run.name.lower()).strip("-")


def chapter_notebooks() -> list[Path]:
    """List notebooks that are chapters of the book and no stage of a run: those without number."""
    stages = set(stage_notebooks())
    return [path for path in sorted(notebooks_dir().glob("*.ipynb")) if path not in stages]


def shown_stages(run: Path) -> list[Path]:
    """List the stage notebooks that have something to show of a run, in order.

    A stage on text without text tasks has nothing, nor has one whose measurements are all missing.
    """
    plan = Plan.of_run(run_info(run))
    shown = []
    for stage in stage_notebooks():
        executed = run / "notebooks" / stage.name
        text = executed.read_text(encoding="utf-8") if executed.is_file() else ""
        measured, missing = text.count("said_where_not_measured()"), text.count("**Not measured.**")
        empty = stage.stem == _TEXT and not plan.tasks("nlp_tasks")
        if not empty and (missing < measured or not measured):
            shown.append(stage)
    return shown


def stage_pages(run: Path) -> dict[int, str]:
    """Return the pages of a run's stages that have something to show, by the stages' numbers."""
    return {int(path.name[:2]): path.stem for path in shown_stages(run)}


def filled_page(name: str, **values: Any) -> str:
    """Fill the page template of that name."""
    return unsigned_zeros(_PAGES.get_template(f"{name}.md").render(values).strip())


def run_titles(runs: Sequence[Path]) -> dict[Path, str]:
    """Name each run by its model, and by its tasks where others are of that model."""
    titles = {}
    for run in runs:
        titles[run] = described = described_model(run)
        model = model_of(run)
        others = [_kinds(it) for it in runs if it != run and model_of(it) == model]
        if others:
            titles[run] = f"{described}: {run.name if _kinds(run) in others else _kinds(run)}"
    return titles


def described_model(run: Path) -> str:
    """Name a run's model with what has to stand wherever its numbers do."""
    name = model_of(run)
    remarks = ["instruct, 4-bit weights"] if name == SMOLLM2 else []
    remarks += ["trained on these puzzles"] if name in embedded_models() else []
    return f"{name} ({'; '.join(remarks)})" if remarks else name


def _kinds(run: Path) -> str:
    """Say what a run's tasks are made of: letters, words, text."""
    plan = Plan.of_run(run_info(run))
    tasks = [*plan.tasks(), *plan.tasks("nlp_tasks")]
    return listed(list(dict.fromkeys(task_kind(task, "").split(",")[0] for task in tasks)))


def model_of(run: Path) -> str:
    """Return the name of a run's model as it is shown."""
    return shown_name(run_info(run)["model"])


def size_of(run: Path) -> str:
    """Word the size of a run's model; an embedded model's parameters too."""
    scores = json.loads((run / "heads.json").read_text(encoding="utf-8"))["scores"]
    name, size = model_of(run), f"{len(scores)} layers of {len(scores[0])} heads"
    if name in embedded_models():
        with safe_open(embedded_dir() / name / "model.safetensors", "pt") as weights:
            shapes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118
        size += f", {sum(map(math.prod, shapes)) / 1e6:.1f} million parameters"
    return size
