"""The notebooks as they are kept, the stages as they run, and the book as it is built."""

from __future__ import annotations

import ast
import html.parser
import re
import shutil
import subprocess

import nbformat
import pandas as pd
import pytest

import icl_helpers as icl
from icl_helpers.book import build as book
from icl_helpers.book.pages.names import RESULTS
from icl_helpers.cli import main
from icl_helpers.files import book_dir, notebooks_dir, stage_notebooks
from icl_helpers.parameters import about, parameter_cell, read_parameters
from icl_helpers.run.stages import StageError, execute_notebook, execute_stages

NOTEBOOKS = stage_notebooks()


def test_there_is_a_notebook_per_stage():
    stages = {stage for *_, declared in about() for stage in declared.stages}
    numbers = [int(path.name[:2]) for path in NOTEBOOKS]
    assert numbers == list(range(1, len(NOTEBOOKS) + 1))
    assert stages >= set(numbers)
    assert RESULTS in [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_stripped_short_celled_and_has_one_literal_parameters_cell(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert max(len(cell.source.splitlines()) for cell in code) <= 40
    (parameters,) = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    values = {}
    for statement in ast.parse(parameters.source).body:
        assert isinstance(statement, ast.Assign)
        values[statement.targets[0].id] = ast.literal_eval(statement.value)
    stage = int(path.name[:2])
    assert values == {name: default for name, _, default, it in about() if stage in it.stages}
    assert parameters.source == parameter_cell(stage), f"should be:\n{parameter_cell(stage)}"
    figures = [c.metadata["mystnb"] for c in code if "mystnb" in c.metadata]
    assert all(
        f["figure"]["caption"] and f["figure"]["name"] and f["image"]["alt"] for f in figures
    )
    assert notebook.cells[0].source.startswith("# ")


@pytest.mark.parametrize(
    "path", sorted((notebooks_dir() / "parameters").glob("*.yaml")), ids=lambda p: p.stem
)
def test_parameter_files_are_valid(path):
    assert icl.stage_parameters(**read_parameters(path)).run_dir.startswith("runs/")


@pytest.mark.slow
def test_stages_leave_every_artifact(run_dir):
    wanted = [
        "prefix_scores.safetensors", "mean_head_outputs.safetensors", "heads.json", "run.json",
        "results.parquet", "documents.parquet", "tables/table-1.csv", "tables/table-1.tex",
        *(f"notebooks/{path.name}" for path in NOTEBOOKS),
    ]  # fmt: skip
    assert [name for name in wanted if not (run_dir / name).is_file()] == []
    frame = pd.read_parquet(run_dir / "results.parquet")
    assert set(frame["ablation"]) == {"none", "mean", "zero", "knockout"}
    stand_ins = {"review_sentiment", "fact_opinion"}
    assert set(frame["task"]) == {"repetition", "wordseq1_binary"} | stand_ins


@pytest.mark.slow
def test_failing_stage_is_reported_and_leaves_no_finished_notebook(tmp_path):
    parameters = icl.stage_parameters(run_dir=str(tmp_path / "run"))
    with pytest.raises(StageError, match="08_results failed.*results.parquet does not exist"):
        execute_stages(parameters, only=[8], progress=False)
    assert not (tmp_path / "run" / "notebooks" / "08_results.ipynb").exists()


class Links(html.parser.HTMLParser):
    """Internal links, anchors and images of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.anchors: set[str] = set()
        self.without_alt: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if found.get("id"):
            self.anchors.add(found["id"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img") and found.get("src"):
            self.sources.append(found["src"])
        if tag == "link" and found.get("rel") == "stylesheet":
            self.sources.append(found["href"])
        if tag == "img" and not found.get("alt"):
            self.without_alt.append(found.get("src", ""))


@pytest.mark.slow
def test_book_has_every_page_and_a_part_per_run(built):
    for run in ("icl-tiny", "second-model"):
        assert len(list((built / "run" / run).glob("*.html"))) == len(NOTEBOOKS)
    text = (built / "index.html").read_text()
    assert "with the most examples of each task" in text
    assert "{{" not in text


@pytest.mark.slow
def test_every_stage_ends_with_what_came_out_and_folds_its_parameters_to_one_line(built):
    for page in (built / "run" / "icl-tiny").glob("*.html"):
        text = page.read_text()
        assert "How sure" in text.split('<section id="what-came-out">')[1]
        assert text.count("Show the parameters of this page") == 1


@pytest.mark.slow
def test_results_come_before_the_other_stages_and_those_before_ones_own_runs(built):
    links = [link.split("#")[0] for link in Links((built / "index.html").read_text()).links]
    order = ["method.html", "run/icl-tiny/08_results.html", "run/icl-tiny/07_attention_patterns.html",
             "model-card.html", "your-model.html", "api.html"]  # fmt: skip
    side = links[links.index("method.html") :]
    assert sorted(order, key=side.index) == order


@pytest.mark.slow
def test_book_has_no_broken_link_and_needs_nothing_from_elsewhere(built):
    pages = {
        path: Links(path.read_text())
        for path in built.rglob("*.html")
        if "_static" not in path.parts
    }
    broken, foreign, silent = [], [], []
    for path, page in pages.items():
        silent += [f"{path.name}: {source}" for source in page.without_alt]
        foreign += [s for s in page.sources if re.match(r"(https?:)?//", s)]
        local = [
            s
            for s in [*page.links, *page.sources]
            if not re.match(r"(https?:)?//|mailto:|data:", s)
        ]
        for link in local:
            name, _, anchor = link.partition("#")
            target = path if not name else (path.parent / name.split("?")[0]).resolve()
            if not target.exists() or (
                anchor and target in pages and anchor not in pages[target].anchors
            ):
                broken.append(f"{path.name}: {link}")
    assert broken == []
    assert foreign == []
    assert silent == []


@pytest.mark.slow
def test_book_does_not_tell_where_the_run_lay(built, run_dir):
    found = [p for p in built.rglob("*.html") if str(run_dir) in p.read_text()]
    assert found == []


@pytest.mark.slow
def test_notebook_with_an_error_fails_the_build(run_dir, tmp_path, monkeypatch):
    # The chapters, which are executed before, have no part in it.
    monkeypatch.setattr(book, "chapter_notebooks", list)
    runs = tmp_path / "runs"
    shutil.copytree(run_dir, runs / "icl-tiny")
    path = runs / "icl-tiny" / "notebooks" / NOTEBOOKS[2].name
    notebook = nbformat.read(path, as_version=4)
    cell = next(c for c in notebook.cells if c.cell_type == "code" and c.outputs)
    cell.outputs = [nbformat.v4.new_output("error", ename="E", evalue="v", traceback=[])]
    nbformat.write(notebook, path)
    with pytest.raises(book.BookError, match="holds an error"):
        book.build_book(runs, tmp_path / "out")


@pytest.mark.slow
def test_stage_that_fails_after_it_had_succeeded_fails_the_build(
    run_dir, tmp_path, capsys, monkeypatch
):
    """The notebook of the time before does not stand in for it, nor do the pages."""
    run = tmp_path / "runs" / "icl-tiny"
    shutil.copytree(run_dir, run)
    (tmp_path / "out" / "html").mkdir(parents=True)
    (tmp_path / "out" / "html" / "index.html").write_text("a book of the time before")
    broken = tmp_path / NOTEBOOKS[4].name
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, broken)
    with pytest.raises(StageError, match="ZeroDivisionError"):
        execute_notebook(broken, run / "notebooks" / broken.name, {})
    assert main(["book", "--runs", str(run.parent), "--out", str(tmp_path / "out")]) == 2
    assert f"lacks {broken.stem}" in capsys.readouterr().err
    # Beside a whole run, the other is left out and named.
    shutil.copytree(run_dir, tmp_path / "runs" / "whole")
    laid_out = []
    monkeypatch.setattr(book, "_stage", lambda _, runs, chapters: laid_out.extend(runs) or 1 / 0)
    with (
        pytest.warns(UserWarning, match=f"icl-tiny lacks {broken.stem}"),
        pytest.raises(ZeroDivisionError),
    ):
        book.build_book(run.parent, tmp_path / "out")
    assert [path.name for path in laid_out] == ["whole"]


def test_api_page_documents_every_public_name():
    page = (book_dir() / "api.md").read_text()
    names = [name for name in icl.__all__ if not name.startswith("__")]
    assert [name for name in names if not re.search(rf"\.{name}$", page, re.MULTILINE)] == []


def test_jupyter_book_2_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(book, "version", lambda name: "2.0.1")
    with pytest.raises(book.BookError, match="jupyter-book<2"):
        book.build_book(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_pages_open_in_a_browser_without_console_errors(built, tmp_path):
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        "--enable-logging=stderr",
        "--v=0",
    ]
    for page in ("index.html", "method.html", "run/icl-tiny/08_results.html"):
        done = subprocess.run(
            [chromium, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
             "--virtual-time-budget=4000", (built / page).as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert not [line for line in console if re.search(r"Error|Failed|Uncaught", line)], page
        assert "<h1" in done.stdout
