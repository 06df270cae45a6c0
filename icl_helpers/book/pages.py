"""Pages of the book that are made from the runs: what they say is computed, never typed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from icl_helpers.files import book_dir, notebooks_dir, project_root
from icl_helpers.models.loading import embedded_models
from icl_helpers.parameters import StageParameters, stage_parameters
from icl_helpers.results.comparison import compare_runs, overlay
from icl_helpers.results.figures import accuracy_bars, bars_alt
from icl_helpers.results.tables import abstract_results, summarise
from icl_helpers.run.costs import _PAPER_MODELS, estimate_cost, stage_tokens
from icl_helpers.run.stages import stage_notebooks

__all__ = [
    "chapter_notebooks",
    "citation_page",
    "comparison_page",
    "front_page",
    "markdown_table",
    "notebooks_page",
    "overlay_page",
    "recipe_table",
    "run_info",
    "run_slug",
    "runs_page",
    "stage_table",
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
    import nbformat  # of the extra 'book'

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


# Tokens per second taken for a recipe that is meant for a smaller GPU than the default's.
_RECIPE_RATES = {"llama-3-8b-4bit.yaml": 900.0}


def recipe_table(folder: Path | None = None) -> str:
    """The ready recipes with their estimates, as a Markdown table for the book.

    Recipes of models whose configuration is not at hand are left out.
    """
    from icl_helpers.run.stages import read_parameters

    lines = [
        "| recipe | dtype | batch size | documents | weights | work | tokens | GPU hours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted((folder or notebooks_dir() / "parameters").glob("*.yaml")):
        p = stage_parameters(**read_parameters(path))
        if p.model not in _PAPER_MODELS:
            continue
        cost = estimate_cost(p, tokens_per_second=_RECIPE_RATES.get(path.name))
        kind = p.dtype if p.quantization is None else f"{p.quantization}, {p.dtype}"
        lines.append(
            f"| `{path.name}` | {kind} | {p.batch_size} | "
            f"{'all' if p.limit is None else f'{p.limit} a task'} | "
            f"{cost.weights_bytes / 1e9:.0f} GB | {cost.working_bytes / 1e9:.0f} GB | "
            f"{cost.tokens / 1e6:.0f} million | {cost.hours:.1f} at {cost.rate:,.0f} tokens/s |"
        )
    return "\n".join(lines)


_OUTCOMES = {
    1: ("prefix-matching scores", "the heat map of Figure 2, every head's score, the head sets"),
    2: ("mean activations", "what each head gives on average text"),
    3: ("full model", "accuracy with and without examples"),
    4: ("heads removed", "Tables 1 and 4, all but the knockout"),
    5: ("pattern blocked", "the knockout's part of Table 1"),
}


def stage_table(p: StageParameters) -> str:
    """What each stage of a run costs and leaves, as a Markdown table for the book."""
    cost = estimate_cost(p)
    lines = ["| stage | tokens | GPU time | what comes out |", "| --- | --- | --- | --- |"]
    for stage, tokens in stage_tokens(p).items():
        name, outcome = _OUTCOMES[stage]
        minutes = tokens / cost.rate / 60
        lines.append(
            f"| {stage}, {name} | {tokens / 1e6:.3f} million | "
            f"{'under a minute' if minutes < 1 else f'{minutes:.0f} minutes'} | {outcome} |"
        )
    return "\n".join(lines)
