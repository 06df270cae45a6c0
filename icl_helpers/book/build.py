"""Building the HTML book from the hand-written pages and the executed notebooks of every run.

The pages, the settings and each run's notebooks are staged into one fresh folder, so that nothing
of an earlier build is reused, and Sphinx's warnings are errors. Runs that come as bundles are first
made into runs of the book, executed from there, and checked by a sample.

Example
-------
>>> prepare_shipped("book/runs", "runs")
>>> build_book("runs", "_build")
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from icl_helpers.book.html import NARROW, finish_pages, write_print_view
from icl_helpers.book.pages import front, guide
from icl_helpers.book.pages import runs as run_pages
from icl_helpers.book.pages.names import (
    RESULTS,
    chapter_notebooks,
    run_slug,
    run_titles,
    shown_stages,
)
from icl_helpers.book.playground import write_playground
from icl_helpers.errors import ICLError, InputError
from icl_helpers.files import (
    book_dir,
    check_run_dir,
    embedded_models,
    imported_dir,
    notebooks_dir,
    project_root,
    stage_notebooks,
    user_path,
    write_json,
)
from icl_helpers.kernels import NEEDLESS
from icl_helpers.parameters import StageParameters, read_parameters, stage_parameters
from icl_helpers.redaction import check_leaks, redact
from icl_helpers.results.notebook import DESCRIPTION
from icl_helpers.run.bundle import import_bundle
from icl_helpers.run.costs import estimate_cost
from icl_helpers.run.plan import run_info, shown_name, stated_parameters
from icl_helpers.run.stages import Job, StageError, check_book_extra, execute_notebooks, stage_jobs

__all__ = ["BookError", "build_book", "find_runs", "prepare_shipped"]

# The recipe that the page on running one's own model goes through.
_EXAMPLE = "llama-3-8b.yaml"
_WIDGET = "application/vnd.jupyter.widget-view+json"


class BookError(ICLError, RuntimeError):
    """The book could not be built, or what was built is not whole."""


def prepare_shipped(
    bundles: str | os.PathLike[str],
    runs: str | os.PathLike[str],
    *,
    live: StageParameters | None = None,
    chapters: Path | None = None,
    seconds: float = 30,
) -> list[Path]:
    """Import every bundle below ``bundles``, execute its stages, and verify a sample of it.

    Beside them go the stages of a run that is computed here, where ``live`` says which. The run of
    a bundle lies below ``runs`` under the bundle's name; where a run lies that was not imported,
    that one stays. All verifications together take about ``seconds``; what they say is kept in
    ``verification.json`` of each run, that the model is not here too. With ``chapters``, a folder,
    the notebooks that are chapters are executed beside them too, and left there for
    :func:`build_book`. Return the runs.

    Raises :class:`InputError` for a directory that is none, and for a damaged bundle.
    """
    folder = user_path(bundles)
    if not folder.is_dir():
        raise InputError(f"{folder} is no directory of bundles")
    found = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    made: dict[Path, Path] = {}
    jobs = [] if live is None else stage_jobs(live)
    in_order = 0 if live is None or imported_dir(live.run_dir) is not None else len(jobs)
    for bundle in found:
        run = user_path(runs) / bundle.name
        if (run / "run.json").is_file() and imported_dir(run) is None:
            warnings.warn(f"{run} was computed here and takes the place of {bundle}", stacklevel=2)
            continue
        import_bundle(bundle, run)
        jobs += stage_jobs(stated_parameters(run))
        made[run] = bundle
    jobs += [] if chapters is None else _chapter_jobs(chapters)
    execute_notebooks(jobs, in_order=in_order)
    for run, bundle in made.items():
        write_json(run / "verification.json", _verified(bundle, seconds / len(made)))
    return list(made)


def _verified(bundle: Path, seconds: float) -> dict[str, Any]:
    """The report of ``icl verify``, or the ``reason`` for which there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "icl_helpers.cli", "verify", str(bundle)]
        # A process of its own, which gives the model's memory back. Nothing is fetched for a check.
        done = subprocess.run(
            [*command, "--seconds", f"{seconds:g}", "--json", str(report)],
            env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if report.is_file():
            return json.loads(report.read_text(encoding="utf-8"))
    said = re.findall(r"^icl: (.*)", done.stderr, re.MULTILINE)
    reason = said[-1] if said else f"icl verify ended with exit code {done.returncode}"
    return {"reason": redact(reason.replace(str(bundle), bundle.name))}


def find_runs(runs: str | os.PathLike[str]) -> list[Path]:
    """Run directories with a full set of executed notebooks: shipped ones first.

    Those of embedded models come last, for what they show is no evidence about others.
    """
    complete = [run for run, missing in _missing_stages(runs).items() if not missing]

    def place(run: Path) -> tuple[bool, bool, str]:
        info = run_info(run)
        return info["model"] in embedded_models(), "imported" not in info, run.name

    return sorted(complete, key=place)


def _missing_stages(runs: str | os.PathLike[str]) -> dict[Path, list[str]]:
    """Of every run the stages that were not run to their end, or failed when they last were."""
    found = sorted(path.parent for path in check_run_dir(runs).glob("*/run.json"))
    stages = stage_notebooks()
    return {
        run: [path.stem for path in stages if not (run / "notebooks" / path.name).is_file()]
        for run in found
    }


def build_book(
    runs: str | os.PathLike[str] = "runs",
    out: str | os.PathLike[str] = "_build",
    *,
    chapters: Path | None = None,
) -> Path:
    """Build the book and return its front page, ``out/html/index.html``.

    ``chapters`` is a folder in which :func:`prepare_shipped` left the chapters, executed; without
    it they are executed here.

    Raises :class:`InputError` without the extra 'book' or a complete run, and :class:`BookError`
    when jupyter-book is of the wrong generation, a notebook holds an error, Sphinx warns, or an
    expected page is missing.
    """
    check_book_extra()
    if int(version("jupyter-book").split(".")[0]) != 1:
        raise BookError(
            f"jupyter-book {version('jupyter-book')} is installed, but this book needs version 1: "
            f"pip install 'jupyter-book<2'"
        )
    found, gaps = find_runs(runs), _missing_stages(runs).items()
    incomplete = "; ".join(f"{run} lacks {', '.join(names)}" for run, names in gaps if names)
    if not found:
        raise InputError(
            f"no complete run below {runs}{f' ({incomplete})' if incomplete else ''}: run the "
            f"stages first (icl run), which leaves the executed notebooks in RUN/notebooks"
        )
    if incomplete:
        warnings.warn(f"left out of the book: {incomplete}; run those stages", stacklevel=2)
    target = Path(out).resolve()
    staged = target / "source"
    for stale in (staged, target / "html", target / "doctrees"):
        shutil.rmtree(stale, ignore_errors=True)
    wanted = _stage(staged, found, chapters)
    _sphinx(staged, target)
    finish_pages(target / "html")
    # Links in a notebook's outputs stay as they are: what they lead to has to lie there.
    for tables in staged.glob("run/*/tables"):
        shutil.copytree(tables, target / "html" / tables.relative_to(staged))
    write_playground(target / "html" / "_static" / "playground")
    missing = [page for page in wanted if not (target / "html" / f"{page}.html").is_file()]
    if missing:
        raise BookError(f"the built book lacks {', '.join(missing)}")
    write_print_view(target / "html", wanted)
    check_leaks(target / "html")
    return target / "html" / "index.html"


def _stage(staged: Path, runs: list[Path], executed: Path | None = None) -> list[str]:
    """Lay out the book's source; return the pages that must come out of it."""
    shutil.copytree(book_dir(), staged, ignore=shutil.ignore_patterns("runs"))
    # Clean notebooks lie where they are linked from.
    (staged / "notebooks").mkdir()
    for path in [*stage_notebooks(), *chapter_notebooks()]:
        shutil.copyfile(path, staged / "notebooks" / path.name)
    root = project_root()
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    config = yaml.safe_load((root / "_config.yml").read_text())
    parts = {part["caption"]: part["chapters"] for part in toc["parts"]}
    behind = parts["Behind the runs"]
    written = {page["file"] for page in behind}
    behind += [{"file": page} for page in _stage_chapters(staged, executed) if page not in written]
    claims, claims_in_short = run_pages.claims_page(runs)
    pages = {
        "model-card": guide.model_card("icl-tiny"),
        "claims": claims,
        "report": run_pages.report_page(runs, claims_in_short),
        "runs": run_pages.runs_page(runs),
        "notebooks": run_pages.notebooks_page(staged, runs),
        "cite": run_pages.citation_page(runs),
        "comparison": run_pages.comparison_page(runs, staged) if len(runs) > 1 else None,
        "verification": run_pages.verification_page(runs),
    }
    for name, text in pages.items():
        if text is not None:
            (staged / f"{name}.md").write_text(text)
    parts["The study"].insert(0, {"file": "claims"})
    behind[:0] = [{"file": it} for it in ("comparison", "verification") if pages[it] is not None]
    for run in runs:
        bundle = imported_dir(run)
        if bundle is not None:
            _zip_bundle(bundle, staged / "bundles" / f"{run_slug(run)}.zip")
    # What came out stands before how to make more of it.
    toc["parts"][1:1] = [
        {"caption": title, "chapters": [{"file": page} for page in _stage_run(staged, run)]}
        for run, title in run_titles(runs).items()
    ]
    url = config["repository"]["url"]
    config["parse"]["myst_substitutions"] = {
        **front.front_page(staged, runs),
        **_costs(),
        "drawing": front.drawing(),
        "claims_in_short": claims_in_short,
        "code": f" The code is at <{url}>." if url else "",
    }
    _repository_buttons(config)
    (staged / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
    (staged / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    return ["index", *(chapter["file"] for chapter in chapters)]


def _costs() -> dict[str, str]:
    """What is inserted into the page on running one's own model: architectures and estimates."""
    example = stage_parameters(**read_parameters(notebooks_dir() / "parameters" / _EXAMPLE))
    return {
        "architectures": guide.architecture_table(),
        "recipes": guide.recipe_table(),
        "example_cost": f"```text\n{estimate_cost(example)}\n```",
        "example_stages": guide.stage_table(example),
    }


def _chapter_jobs(folder: Path) -> list[Job]:
    return [(path, folder / path.name, {}) for path in chapter_notebooks()]


def _stage_chapters(staged: Path, executed: Path | None = None) -> Iterator[str]:
    """Execute the notebooks that are chapters, or take them as they were; yield their page names.

    One that has the name of a written page takes its place.
    """
    import nbformat  # of the extra 'book'

    jobs = _chapter_jobs(staged)
    try:
        execute_notebooks(jobs if executed is None else [], progress=False)
    except StageError as error:
        raise BookError(str(error)) from None
    for path, target, _ in jobs:
        if executed is not None:
            shutil.copyfile(executed / path.name, target)
        notebook = nbformat.read(target, as_version=4)
        _check_outputs(notebook, path)
        _make_static(notebook, "", staged)
        nbformat.write(notebook, target)
        target.with_suffix(".md").unlink(missing_ok=True)
        yield path.stem


def _stage_run(staged: Path, run: Path) -> Iterator[str]:
    """Copy a run's notebooks, made fit for a static page, and its tables; yield page names."""
    import nbformat  # of the extra 'book'

    slug = run_slug(run)
    folder = staged / "run" / slug
    folder.mkdir(parents=True)
    if (run / "tables").is_dir():
        # Pages link to them, relative to themselves.
        shutil.copytree(run / "tables", folder / "tables", ignore=shutil.ignore_patterns(".*"))
    # Where the run and its model lay on the machine that made it is nobody's business.
    info = run_info(run)
    places = dict.fromkeys((str(run.resolve()), info["parameters"]["run_dir"]), f"runs/{run.name}")
    places[info["model"]] = shown_name(info["model"])
    # The results come first, then how they were got.
    for stage in sorted(shown_stages(run), key=lambda path: path.stem != RESULTS):
        text = (run / "notebooks" / stage.name).read_text(encoding="utf-8")
        for place, shown in places.items():
            text = text.replace(place, shown)
        notebook = nbformat.reads(text, as_version=4)
        _check_outputs(notebook, run / "notebooks" / stage.name)
        _make_static(notebook, f"-{slug}", staged)
        nbformat.write(notebook, folder / stage.name)
        yield f"run/{slug}/{stage.stem}"
    published = run_pages.overlay_page(run, folder)
    if published is not None:
        (folder / "overlay.md").write_text(published)
        yield f"run/{slug}/overlay"


def _check_outputs(notebook: Any, path: Path) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if any(output.output_type == "error" for cell in code for output in cell.outputs):
        raise BookError(f"{path} holds an error; run its stage again before building the book")
    if not any(cell.outputs for cell in code):
        raise BookError(f"{path} has no outputs: it was not executed")


# The label of an exercise, or a solution's mention of it.
_EXERCISE = re.compile(r"(?:\{exercise-start\}\n:label:|\{solution-start\}) \S+")


def _make_static(notebook: Any, suffix: str, staged: Path) -> None:
    """Make an executed notebook fit for a static page; names and labels are unique in the book."""
    # papermill notes where the notebook lay.
    notebook.metadata.pop("papermill", None)
    tags = [set(cell.metadata.get("tags", [])) for cell in notebook.cells]
    injected = any("injected-parameters" in found for found in tags)
    for cell, found in zip(notebook.cells, tags, strict=True):
        if found & {"parameters", "injected-parameters"}:
            # One folded line: the values of this run where there are any, else the defaults.
            default = injected and "parameters" in found
            cell.metadata["tags"] += ["remove-cell" if default else "hide-cell"]
            cell.metadata["mystnb"] = {"code_prompt_show": "Show the parameters of this page"}
        if cell.cell_type == "code":
            # No widget, and no log of the machine that made it.
            cell.outputs = [
                output
                for output in cell.outputs
                if _WIDGET not in output.get("data", {}) and output.get("name") != "stderr"
            ]
            _describe_figure(cell, suffix, staged)
        else:
            cell.source = _EXERCISE.sub(rf"\g<0>{suffix}", cell.source)


def _describe_figure(cell: Any, suffix: str, staged: Path) -> None:
    """Name a cell's figure, put computed caption and alternative text in place, keep the narrow."""
    figure = cell.metadata.get("mystnb", {}).get("figure")
    if not figure:
        return
    figure["name"] += suffix
    for output in cell.outputs:
        described = output.get("metadata", {}).get(DESCRIPTION)
        if described:
            figure["caption"] = described["caption"]
            cell.metadata["mystnb"]["image"]["alt"] = described["alt"]
            if "narrow" in described:
                drawing = staged / NARROW / f"{figure['name']}.png"
                drawing.parent.mkdir(parents=True, exist_ok=True)
                drawing.write_bytes(base64.b64decode(described["narrow"]))


# The same for every file, so that equal bundles become equal files.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


def _zip_bundle(bundle: Path, target: Path) -> None:
    """Pack a bundle into one file, the same bytes whenever and wherever it is packed."""
    target.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(bundle.iterdir()):
            entry = zipfile.ZipInfo(f"{target.stem}/{path.name}", _ZIP_TIME)
            # Parquet files are compressed already; and zlib's output depends on its version.
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_STORED)


def _repository_buttons(config: dict[str, Any]) -> None:
    """Show what needs the repository's address only where it is set."""
    url = config["repository"]["url"]
    if not url:
        del config["repository"]
        return
    config["repository"]["path_to_book"] = "book"
    config["html"] |= {"use_repository_button": True, "use_edit_page_button": True}
    config["launch_buttons"]["colab_url"] = "https://colab.research.google.com"


def _sphinx(staged: Path, target: Path) -> None:
    """Turn the settings into Sphinx's, then build into a fresh folder with warnings as errors."""
    _call("from jupyter_book.cli.main import main; main()", "config", "sphinx", str(staged))
    with open(staged / "conf.py", "a") as file:
        # Thebe runs code on a server elsewhere: it is not used, and its script is not local.
        file.write('\nextensions = [name for name in extensions if name != "sphinx_thebe"]\n')
    options = ["-b", "html", "-E", "-a", "-W", "-n", "--keep-going", "-d", str(target / "doctrees")]
    folders = str(staged), str(target / "html")
    log = _call("from sphinx.cmd.build import main; sys.exit(main())", *options, *folders)
    if "WARNING" in log:
        raise BookError(f"Sphinx warned:\n{log[-3000:]}")


def _call(code: str, *arguments: str) -> str:
    """Run Python code in a process of its own and return what it printed."""
    # Looking for garbage would take a fifth of the time: nearly all that is read stays to the end.
    begin = f"import gc, sys; gc.disable(); sys.modules[{NEEDLESS!r}] = None; "
    command = [sys.executable, "-c", begin + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    if done.returncode:
        warnings = [line for line in log.splitlines() if re.search(r"WARNING|ERROR", line)]
        shown = "\n".join(warnings[:20]) or log[-3000:]
        raise BookError(f"{code} failed (exit code {done.returncode}):\n{shown}")
    return log
