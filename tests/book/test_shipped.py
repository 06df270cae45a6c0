"""Shipped runs in the book: imported once, checked, first in the contents, and said to be checked."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import icl_helpers as icl
from icl_helpers.book import build as book
from icl_helpers.book.pages.names import chapter_notebooks
from icl_helpers.book.pages.runs import verification_page
from icl_helpers.run.bundle import open_bundle
from icl_helpers.run.plan import run_info
from tests.run.test_bundle import made, sign  # noqa: F401 - a fixture


@pytest.fixture
def executed(monkeypatch) -> list[str]:
    """Stand-ins for the stages, which test_bundle executes: a notebook each, nothing in it."""
    runs: list[str] = []

    def execute(jobs, *, in_order):
        runs.extend(["in order"] * in_order)
        for notebook, target, _ in jobs:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(notebook, target)
        runs.extend(dict.fromkeys(str(target.parents[1]) for _, target, _ in jobs))

    monkeypatch.setattr(book, "execute_notebooks", execute)
    return runs


@pytest.fixture
def bundles(made, tmp_path) -> Path:  # noqa: F811
    shutil.copytree(made / "bundle", tmp_path / "bundles" / "a-model")
    return tmp_path / "bundles"


@pytest.mark.slow
def test_bundle_becomes_a_run_of_the_book_that_is_verified(bundles, tmp_path, executed):
    runs = tmp_path / "runs"
    (found,) = book.prepare_shipped(bundles, runs, seconds=1)
    assert found == runs / "a-model"
    assert executed == [str(found)]
    assert "imported" in run_info(found)
    assert book.find_runs(runs) == [found]
    report = json.loads((found / "verification.json").read_text())
    assert report["agrees"]
    page = verification_page([found])
    assert "## icl-tiny (a-model)" in page or "## icl-tiny" in page
    assert (
        "**The sample agrees with the bundle, as far as it could be drawn: some tasks are left "
        "out.**" in page
    )
    assert "- Left out: 27 cells of sst2" in page
    assert "<bundles/a-model.zip>" in page
    assert f"{report['documents']:,} of {report['of_documents']:,}" in page
    # Once more: the run is there, and is verified again.
    assert book.prepare_shipped(bundles, runs, seconds=1) == [found]


def test_stages_of_a_live_run_come_first_and_in_order(tmp_path, executed):
    (tmp_path / "bundles").mkdir()
    live = icl.stage_parameters(run_dir=str(tmp_path / "live"))
    chapters = tmp_path / "scratch" / "chapters"
    assert book.prepare_shipped(
        tmp_path / "bundles", tmp_path / "runs", live=live, chapters=chapters
    ) == []  # fmt: skip
    stages = ["in order"] * len(book.stage_notebooks())
    assert executed == [*stages, str(tmp_path / "live"), str(tmp_path / "scratch")]
    assert [path.name for path in chapter_notebooks()] == sorted(os.listdir(chapters))


def test_chapters_that_were_executed_before_are_not_executed_again(tmp_path, executed, monkeypatch):
    done, staged = tmp_path / "done", tmp_path / "staged"
    for folder in (done, staged):
        folder.mkdir()
    for path in chapter_notebooks():
        content = json.loads(path.read_text())
        for cell in content["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "1"}]
        (done / path.name).write_text(json.dumps(content))
    monkeypatch.setattr(book, "execute_notebooks", lambda jobs, progress: executed.extend(jobs))
    names = list(book._stage_chapters(staged, done))
    assert names == [path.stem for path in chapter_notebooks()]
    assert executed == []
    assert {path.stem for path in staged.glob("*.ipynb")} == set(names)


@pytest.mark.slow
def test_absent_model_is_said_and_stops_nothing(bundles, tmp_path, executed):
    bundle = bundles / "a-model"
    info = json.loads((bundle / "run.json").read_text())
    info["model"] = info["parameters"]["model"] = "no-such/model"
    (bundle / "run.json").write_text(json.dumps(info))
    sign(bundle)
    (found,) = book.prepare_shipped(bundles, tmp_path / "runs")
    assert list(json.loads((found / "verification.json").read_text())) == ["reason"]
    page = verification_page([found])
    assert "**Not verified when this book was built:** model 'no-such/model' is not" in page
    assert str(tmp_path) not in page


@pytest.mark.slow
def test_run_that_was_computed_here_stays(bundles, tmp_path, executed):
    run = tmp_path / "runs" / "a-model"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"model": "icl-tiny"}')
    with pytest.warns(UserWarning, match="takes the place of"):
        assert book.prepare_shipped(bundles, tmp_path / "runs") == []
    assert executed == []
    assert verification_page([run]) is None


def test_disagreement_is_said_first(tmp_path):
    run = tmp_path / "a-model"
    run.mkdir()
    (run / "run.json").write_text('{"model": "smollm2-135m", "imported": "0"}')
    report = {
        "agrees": False, "tolerance": 1e-3, "least_equal": 0.995, "documents": 3, "of_documents": 9,
        "cells": 1, "of_cells": 2, "equal_answers": 0.5, "largest": None, "percentile_99": 0.25,
        "scores_largest": 0.0, "made": {"dtype": "float32"}, "here": {"device": "cpu"},
        "seconds": 1.0, "left_out": ["2 cells of sst2: no data"], "notes": [],
    }  # fmt: skip
    (run / "verification.json").write_text(json.dumps(report))
    page = verification_page([run])
    assert "## smollm2-135m (instruct, 4-bit weights)" in page
    assert "**The sample does not agree with the bundle: do not rely on this run.**" in page
    assert "one has a value, the other none" in page
    assert "- Left out: 2 cells of sst2: no data." in page
    assert ".zip" not in page


def test_packed_bundle_is_whole_and_the_same_whenever_it_is_packed(tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(book.book_dir() / "runs" / "smollm2-135m", bundle)
    first, second = tmp_path / "a" / "some-model.zip", tmp_path / "b" / "some-model.zip"
    book._zip_bundle(bundle, first)
    for path in bundle.iterdir():
        os.utime(path, (2e9, 2e9))
    book._zip_bundle(bundle, second)
    assert first.read_bytes() == second.read_bytes()
    shutil.unpack_archive(first, tmp_path / "unpacked")
    assert open_bundle(tmp_path / "unpacked" / "some-model").shown == open_bundle(bundle).shown


def test_shipped_runs_come_first_and_embedded_models_last(tmp_path):
    for name, info in {
        "icl-tiny": {"model": "icl-tiny"}, "a-live-one": {"model": "some/model"},
        "shipped": {"model": "smollm2-135m", "imported": "0"},
    }.items():  # fmt: skip
        (tmp_path / name / "notebooks").mkdir(parents=True)
        (tmp_path / name / "run.json").write_text(json.dumps(info))
        for path in book.stage_notebooks():
            (tmp_path / name / "notebooks" / path.name).touch()
    names = [run.name for run in book.find_runs(tmp_path)]
    assert names == ["shipped", "a-live-one", "icl-tiny"]
