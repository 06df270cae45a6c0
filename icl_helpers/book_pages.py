"""Pages of the book that are made from the runs: what they say is computed, never typed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import yaml

from icl_helpers._paths import book_dir, notebooks_dir, project_root
from icl_helpers.comparison import compare_runs, overlay
from icl_helpers.pipeline import stage_notebooks

__all__ = [
    "chapter_notebooks",
    "citation_page",
    "comparison_page",
    "markdown_table",
    "notebooks_page",
    "overlay_page",
    "run_info",
    "run_slug",
    "runs_page",
]

_COMPARED = ("full", "induction_heads", "induction_pattern", "random_heads")


def run_info(run: Path) -> dict[str, Any]:
    """What a run's ``run.json`` says."""
    info: dict[str, Any] = json.loads((run / "run.json").read_text())
    return info


def run_slug(run: Path) -> str:
    """A run's name as it stands in addresses of the book."""
    return re.sub(r"[^a-z0-9-]+", "-", run.name.lower()).strip("-")


def chapter_notebooks() -> list[Path]:
    """Notebooks that are chapters of the book and no stage of a run: those without a number."""
    stages = set(stage_notebooks())
    return [path for path in sorted(notebooks_dir().glob("*.ipynb")) if path not in stages]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; bars in cells are escaped, missing values left empty."""

    def line(cells: Sequence[Any]) -> str:
        texts = ("" if cell is None else str(cell).replace("|", r"\|") for cell in cells)
        return f"| {' | '.join(texts)} |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def runs_page(runs: Sequence[Path]) -> str:
    """How every run was made: parameters, versions, and how long its stages took."""
    infos = {run.name: run_info(run) for run in runs}
    facts = (
        "model",
        "model_type",
        "dtype",
        "device",
        "machine",
        "python",
        "fingerprint",
        "updated",
    )
    chosen = ("limit", "seeds", "ablation_seeds", "control", "average", "data", "quantization")
    made = {
        name: {fact.replace("_", " "): info.get(fact) for fact in facts}
        | {key.replace("_", " "): _parameter(key, info["parameters"].get(key)) for key in chosen}
        for name, info in infos.items()
    }
    seconds = {name: dict(info.get("seconds", {})) for name, info in infos.items()}
    for stages in seconds.values():
        stages["**together**"] = round(sum(stages.values()), 1)
    return "\n\n".join(
        [
            "# How the runs were made",
            "Everything on this page was written by the runs themselves, into `run.json` in the "
            "directory of each.",
            "## Model, machine and parameters",
            _beside(made, "what"),
            "## Versions",
            _beside({name: info.get("versions", {}) for name, info in infos.items()}, "package"),
            "## Seconds per stage",
            "Of the last time that each stage ran. A stage that finds finished cells in the run "
            "directory uses them, so a run that was interrupted or repeated shows less than the "
            "whole.",
            _beside(seconds, "stage"),
        ]
    )


def _parameter(name: str, value: Any) -> Any:
    if name == "limit":
        return "all documents" if value is None else f"{value} documents a task"
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _beside(columns: Mapping[str, Mapping[str, Any]], corner: str) -> str:
    """One column per run, one row per key that any of them has."""
    keys = list(dict.fromkeys(key for values in columns.values() for key in values))
    # The sum comes last, whichever run names the most stages.
    keys.sort(key=lambda key: key.startswith("**"))
    rows = [[key, *(values.get(key) for values in columns.values())] for key in keys]
    return markdown_table([corner, *columns], rows)


def comparison_page(runs: Sequence[Path], folder: Path) -> str:
    """Runs side by side at each run's larger share of heads; the whole as CSV in ``folder``."""
    frame = compare_runs(runs)
    frame.to_csv(folder / "comparison.csv", index=False)
    shown = frame[
        frame["share"].isin(["", "larger"])
        & frame["ablation"].isin(["none", "mean", "knockout"])
        & frame["condition"].isin(_COMPARED)
    ]
    parts = [
        "# Runs compared",
        "Accuracy in percent, averaged over the demonstration seeds (random heads also over "
        "theirs), and in parentheses the difference to the same run's full model in points. Heads "
        "are removed by mean ablation, patterns blocked by knockout, each at the run's larger "
        "share of heads. "
        "Runs may differ in documents and in what a share of heads is: see [](runs).",
        "{download}`All accuracies as CSV <comparison.csv>`",
    ]
    for condition in _COMPARED:
        rows = shown[shown["condition"] == condition]
        if not rows.empty:
            parts += [f"## {condition.replace('_', ' ').capitalize()}", _pivot(rows, runs)]
    return "\n\n".join(parts)


def _pivot(rows: pd.DataFrame, runs: Sequence[Path]) -> str:
    cells = {
        (row["task"], row["labels"], row["shots"], row["run"]): f"{row['accuracy']:.1f}"
        + (f" ({row['change']:+.1f})" if row["condition"] != "full" else "")
        for row in rows.to_dict("records")
    }
    names = [run.name for run in runs]
    keys = list(dict.fromkeys(key[:3] for key in cells))
    lines = [[*key, *(cells.get((*key, name)) for name in names)] for key in keys]
    return markdown_table(["task", "labels", "shots", *names], lines)


def overlay_page(run: Path, folder: Path) -> str | None:
    """A run of one of the paper's models over the published values; None for any other model."""
    frame = overlay(run)
    if frame is None or frame.empty:
        return None
    frame.to_csv(folder / "overlay.csv", index=False)
    model = run_info(run)["model"]
    rows = [
        [
            row["table"], row["task"], row["labels"], row["shots"],
            row["condition"].replace("_", " "), row["ablation"], f"{row['fraction']:.0%}",
            f"{row['published']:.1f}", f"{row['accuracy']:.1f}",
            f"{row['low']:.1f} to {row['high']:.1f}", f"{row['difference']:+.1f}",
            "yes" if row["inside"] else "no",
        ]
        for row in frame.to_dict("records")
    ]  # fmt: skip
    header = [
        "table", "task", "labels", "shots", "condition", "ablation", "heads", "published",
        "this run", "95 % interval", "difference", "inside",
    ]  # fmt: skip
    return "\n\n".join(
        [
            "# Beside the published values",
            f"Every value that the paper's tables and this run of {model} have in common, in "
            f"percent; *inside* says whether the published value lies in the run's 95 % interval. "
            f"That holds for {int(frame['inside'].sum())} of {len(frame)} values; the differences "
            f"average {frame['difference'].mean():+.1f} points, without their signs "
            f"{frame['difference'].abs().mean():.1f}.",
            "{download}`This table as CSV <overlay.csv>`",
            markdown_table(header, rows),
        ]
    )


def notebooks_page(staged: Path, runs: Sequence[Path]) -> str:
    """Links to every notebook as it is kept and as it was executed.

    Expects clean copies in ``staged/notebooks`` and the executed ones where the book shows them.
    """
    names = [run.name for run in runs]
    rows = [
        [
            _title(path),
            f"{{download}}`clean <notebooks/{path.name}>`",
            *(f"{{download}}`executed <run/{run_slug(run)}/{path.name}>`" for run in runs),
        ]
        for path in stage_notebooks()
    ]
    chapters = [
        [
            _title(path),
            f"{{download}}`clean <notebooks/{path.name}>`",
            f"{{download}}`executed <{path.name}>`",
        ]
        for path in chapter_notebooks()
        if (staged / path.name).is_file()
    ]
    parts = [
        "# Notebooks to download",
        "Clean notebooks are those of the repository; they run wherever this package is installed. "
        "Executed ones hold their outputs and open in Jupyter without running anything.",
        "## Stages of a run",
        markdown_table(["stage", "notebook", *names], rows),
    ]
    if chapters:
        parts += ["## Chapters", markdown_table(["chapter", "notebook", "in this book"], chapters)]
    return "\n\n".join(parts)


def _title(path: Path) -> str:
    first = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0]
    return first.removeprefix("# ")


def citation_page() -> str:
    """How to cite the paper and this software, from ``references.bib`` and ``CITATION.cff``."""
    references = (book_dir() / "references.bib").read_text()
    (paper,) = re.findall(
        r"^@\w+\{crosbie2025induction,.*?^\}", references, re.DOTALL | re.MULTILINE
    )
    text = (project_root() / "CITATION.cff").read_text()
    software = yaml.safe_load(text)
    authors = " and ".join("{" + author["name"] + "}" for author in software["authors"])
    entry = "\n".join(
        [
            "@software{icl_helpers,",
            f"  title = {{{software['title']}}},",
            f"  author = {{{authors}}},",
            f"  version = {{{software['version']}}},",
            f"  license = {{{software['license']}}}",
            "}",
        ]
    )
    return "\n\n".join(
        [
            "# How to cite",
            "If you use results or code of this book, cite the paper that it reproduces "
            "{cite}`crosbie2025induction`, and this software.",
            "## The paper",
            f"```bibtex\n{paper}\n```",
            "## This software",
            f"```bibtex\n{entry}\n```",
            "The same in the Citation File Format, as `CITATION.cff` in the repository:",
            f"```yaml\n{text.strip()}\n```",
        ]
    )
