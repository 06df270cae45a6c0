"""Building the HTML book from the hand-written pages and the executed notebooks of every run.

The pages, the settings and each run's notebooks are staged into one fresh folder, so that nothing
of an earlier build is reused, and Sphinx's warnings are errors.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import yaml

from icl_helpers._paths import book_dir, project_root
from icl_helpers.costs import recipe_table
from icl_helpers.errors import ICLError, InputError
from icl_helpers.pipeline import stage_notebooks
from icl_helpers.plotting import accuracy_bars
from icl_helpers.reporting import DESCRIPTION
from icl_helpers.store import check_run_dir
from icl_helpers.summary import abstract_results, summarise

__all__ = ["BookError", "build_book", "find_runs"]

_WIDGET = "application/vnd.jupyter.widget-view+json"


class BookError(ICLError, RuntimeError):
    """The book could not be built, or what was built is not whole."""


def find_runs(runs: str | os.PathLike[str]) -> list[Path]:
    """Run directories with a full set of executed notebooks, the embedded model's first."""
    root = check_run_dir(runs)
    names = {path.name for path in stage_notebooks()}
    complete = [
        path.parent
        for path in sorted(root.glob("*/run.json"))
        if names <= {notebook.name for notebook in (path.parent / "notebooks").glob("*.ipynb")}
    ]
    return sorted(complete, key=lambda path: (path.name != "icl-tiny", path.name))


def build_book(
    runs: str | os.PathLike[str] = "runs", out: str | os.PathLike[str] = "_build"
) -> Path:
    """Build the book and return its front page, ``out/html/index.html``.

    Raises :class:`InputError` when there is no complete run, and :class:`BookError` when
    jupyter-book is of the wrong generation, a notebook holds an error, Sphinx warns, or an expected
    page is missing.
    """
    if int(version("jupyter-book").split(".")[0]) != 1:
        raise BookError(
            f"jupyter-book {version('jupyter-book')} is installed, but this book needs version 1: "
            f"pip install 'jupyter-book<2'"
        )
    found = find_runs(runs)
    if not found:
        raise InputError(
            f"no complete run below {runs}: run the stages first (icl run), which leaves the "
            f"executed notebooks in RUN/notebooks"
        )
    target = Path(out).resolve()
    staged = target / "source"
    for stale in (staged, target / "html", target / "doctrees"):
        shutil.rmtree(stale, ignore_errors=True)
    pages = _stage(staged, found)
    _sphinx(staged, target)
    _point_at_sources(target / "html")
    missing = [page for page in pages if not (target / "html" / f"{page}.html").is_file()]
    if missing:
        raise BookError(f"the built book lacks {', '.join(missing)}")
    return target / "html" / "index.html"


def _stage(staged: Path, runs: list[Path]) -> list[str]:
    """Lay out the book's source; return the pages that must come out of it."""
    shutil.copytree(book_dir(), staged)
    root = project_root()
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    config = yaml.safe_load((root / "_config.yml").read_text())
    for run in runs:
        slug = re.sub(r"[^a-z0-9-]+", "-", run.name.lower()).strip("-")
        chapters = [{"file": page} for page in _stage_run(staged, run, slug)]
        model = _info(run)["model"]
        toc["parts"].append({"caption": f"Run: {model}", "chapters": chapters})
    config["parse"]["myst_substitutions"] = {
        **_front_page(staged, runs[0]),
        "recipes": recipe_table(),
    }
    _repository_buttons(config)
    (staged / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
    (staged / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    return ["index", *(chapter["file"] for chapter in chapters)]


def _stage_run(staged: Path, run: Path, slug: str) -> Iterator[str]:
    """Copy a run's notebooks, made fit for a static page; yield their page names."""
    folder = staged / "run" / slug
    folder.mkdir(parents=True)
    # Where the run lay on the machine that made it is nobody's business.
    places = {str(run.resolve()), _info(run)["parameters"]["run_dir"]}
    for stage in stage_notebooks():
        notebook = nbformat.read(run / "notebooks" / stage.name, as_version=4)
        _check_outputs(notebook, run / "notebooks" / stage.name)
        for cell in notebook.cells:
            _make_static(cell, slug)
            for place in places:
                cell.source = cell.source.replace(place, f"runs/{run.name}")
        nbformat.write(notebook, folder / stage.name)
        yield f"run/{slug}/{stage.stem}"


def _info(run: Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads((run / "run.json").read_text())
    return info


def _check_outputs(notebook: Any, path: Path) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if any(output.output_type == "error" for cell in code for output in cell.outputs):
        raise BookError(f"{path} holds an error; run its stage again before building the book")
    if not any(cell.outputs for cell in code):
        raise BookError(f"{path} has no outputs: it was not executed")


def _make_static(cell: Any, slug: str) -> None:
    """Drop widget outputs, and make figure names unique among the runs."""
    figure = cell.metadata.get("mystnb", {}).get("figure")
    if figure:
        figure["name"] = f"{figure['name']}-{slug}"
        for output in cell.get("outputs", []):
            described = output.get("metadata", {}).get(DESCRIPTION)
            if described:
                figure["caption"] = described["caption"]
                cell.metadata["mystnb"]["image"]["alt"] = described["alt"]
    if "injected-parameters" in cell.metadata.get("tags", []):
        cell.metadata["tags"] += ["hide-cell"]
    if cell.cell_type == "code":
        cell.outputs = [o for o in cell.outputs if _WIDGET not in o.get("data", {})]


def _front_page(staged: Path, run: Path) -> dict[str, str]:
    """Draw the front page's figure and word its numbers from the first run's results."""
    info = _info(run)
    results = abstract_results(pd.read_parquet(run / "results.parquet"))
    (staged / "_static").mkdir(exist_ok=True)
    accuracy_bars(results, ablations=["mean", "knockout"]).savefig(
        staged / "_static" / "front.png", dpi=160
    )
    numbers = summarise(results)
    limit = info["parameters"]["limit"]
    documents = "all documents" if limit is None else f"the first {limit} documents"
    return {
        "model": info["model"],
        "answer": _answer(numbers),
        "figure_caption": (
            f"Accuracy of {info['model']} with the most examples per task, on {documents} of each "
            f"task and demonstration seeds {', '.join(map(str, info['parameters']['seeds']))}; "
            f"{numbers['fraction']:.1%} of its heads are removed (mean ablation) or blocked. Lines "
            f"span the runs; the dotted line is chance for two labels."
        ),
    }


def _answer(numbers: dict[str, Any]) -> str:
    lost = {
        name: numbers["full"] - numbers[name]
        for name in ("induction_heads", "induction_pattern", "random_heads")
    }
    text = (
        f"**In this model:** with {numbers['shots']} examples it labels {numbers['full']:.0f} % of "
        f"the two-label sequences correctly. Without {numbers['fraction']:.1%} of its heads, those "
        f"with the highest induction score, {numbers['induction_heads']:.0f} % "
        f"({_points(-lost['induction_heads'])} points); with only their induction pattern blocked, "
        f"{numbers['induction_pattern']:.0f} % ({_points(-lost['induction_pattern'])}); without as "
        f"many random heads of the same layers, {numbers['random_heads']:.0f} % "
        f"({_points(-lost['random_heads'])}). "
    )
    zero = (numbers["zero_shot"], numbers["zero_shot_induction_heads"])
    return text + (
        f"Without examples it is at {zero[0]:.0f} %, and at {zero[1]:.0f} % without the heads."
    )


def _points(difference: float) -> str:
    """A difference in whole points with its sign; what rounds to nothing has none."""
    return f"{round(difference):+d}" if round(difference) else "0"


def _repository_buttons(config: dict[str, Any]) -> None:
    """Show what needs the repository's address only where it is set."""
    url = config["repository"]["url"]
    if not url:
        del config["repository"]
        return
    config["repository"]["path_to_book"] = "book"
    config["html"] |= {"use_repository_button": True, "use_edit_page_button": True}
    config["launch_buttons"]["colab_url"] = "https://colab.research.google.com"


def _point_at_sources(html: Path) -> None:
    """Lead the buttons of a run's pages to the notebooks as the repository keeps them.

    The theme takes a page's place in the book for its place in the repository, where runs are not.
    """
    for page in html.glob("run/*/*.html"):
        text = page.read_text(encoding="utf-8")
        page.write_text(
            re.sub(r"(/(?:blob|edit|tree)/[^\"]*?)/book/run/[a-z0-9-]+/", r"\1/notebooks/", text),
            encoding="utf-8",
        )


def _sphinx(staged: Path, target: Path) -> None:
    """Turn the settings into Sphinx's, then build into a fresh folder with warnings as errors."""
    entry = "from jupyter_book.cli.main import main; main()"
    _call([sys.executable, "-c", entry, "config", "sphinx", str(staged)])
    with open(staged / "conf.py", "a") as file:
        # Thebe runs code on a server elsewhere: it is not used, and its script is not local.
        file.write('\nextensions = [name for name in extensions if name != "sphinx_thebe"]\n')
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-E", "-a", "-W", "-n"]
    command += ["--keep-going", "-d", str(target / "doctrees"), str(staged), str(target / "html")]
    log = _call(command)
    if "WARNING" in log:
        raise BookError(f"Sphinx warned:\n{log[-3000:]}")


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    if done.returncode:
        warnings = [line for line in log.splitlines() if re.search(r"WARNING|ERROR", line)]
        shown = "\n".join(warnings[:20]) or log[-3000:]
        raise BookError(f"{' '.join(command[1:4])} failed (exit code {done.returncode}):\n{shown}")
    return log
