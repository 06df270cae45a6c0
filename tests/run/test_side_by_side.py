"""Notebooks side by side: those in order one after another, the others beside them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from icl_helpers.run import stages


def job(name: str) -> stages.Job:
    return Path(name), Path(f"{name}-done"), {}


def test_notebooks_in_order_do_not_wait_for_those_beside_them(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    log, first_began, beside_ended = [], threading.Event(), threading.Event()

    def execute(notebook, *_, **__):
        log.append(f"{notebook.name} begins with {os.environ.get('OMP_NUM_THREADS')}")
        if notebook.name == "first":
            first_began.set()
            # Ends only after one that is to go beside it has.
            assert beside_ended.wait(30)
        elif notebook.name == "beside":
            assert first_began.wait(30)
            beside_ended.set()
        log.append(f"{notebook.name} ends")

    monkeypatch.setattr(stages, "execute_notebook", execute)
    jobs = [job("first"), job("second"), job("beside")]
    targets = stages.execute_notebooks(jobs, in_order=2, progress=False)
    assert [path.name for path in targets] == ["first-done", "second-done", "beside-done"]
    assert log.index("first ends") < log.index("second begins with 1")
    assert "beside begins with 1" in log
    assert "OMP_NUM_THREADS" not in os.environ


def test_kernels_that_go_one_by_one_use_every_processor(monkeypatch):
    limited: list[bool] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(
        stages, "execute_notebook", lambda *_, **__: limited.append("OMP_NUM_THREADS" in os.environ)
    )
    stages.execute_notebooks([job("one"), job("two")], in_order=2, progress=False)
    assert limited == [False, False]


def begun_beside_a_failure(monkeypatch, failing: str, names: list[str], in_order: int) -> list[str]:
    """Names of the notebooks that had begun when the failure of one of them was raised."""
    begun = []

    def execute(notebook, *_, **__):
        begun.append(notebook.name)
        if notebook.name == failing:
            raise stages.StageError(f"{failing} failed")

    monkeypatch.setattr(stages, "execute_notebook", execute)
    with pytest.raises(stages.StageError, match=f"{failing} failed"):
        stages.execute_notebooks([job(name) for name in names], in_order=in_order, progress=False)
    return begun


def test_notebook_that_fails_stops_those_that_have_not_begun(monkeypatch):
    assert begun_beside_a_failure(monkeypatch, "first", ["first", "second"], 2) == ["first"]


def test_failure_beside_is_raised_when_those_in_order_are_through(monkeypatch):
    begun = begun_beside_a_failure(monkeypatch, "beside", ["first", "beside"], 1)
    assert sorted(begun) == ["beside", "first"]
