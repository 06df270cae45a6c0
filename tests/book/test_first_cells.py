"""How a notebook begins: it installs the package where it is missing, and says what it will take."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest

import icl_helpers as icl
from icl_helpers.files import notebooks_dir, stage_notebooks
from icl_helpers.parameters import install_cell
from icl_helpers.run.costs import estimate_cost, stage_tokens

NOTEBOOKS = sorted(notebooks_dir().glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_code_cell_installs_this_version_and_stays_out_of_the_book(path):
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert notebook.cells.index(first) == 1
    assert first.source == install_cell(), f"should be:\n{install_cell()}"
    assert first.metadata["tags"] == ["remove-cell"]
    # Nothing of it may look like a parameter of the run.
    names = {"__name__": "__main__"}
    exec(first.source, names)
    icl.stage_parameters(names)


@pytest.fixture
def elsewhere(monkeypatch, tmp_path) -> list[str]:
    """A place where the package is missing and pip finds nothing; what was asked of pip."""
    asked: list[str] = []

    def run(command):
        assert command[:-1] == [sys.executable, "-m", "pip", "install", "--quiet"]
        asked.append(command[-1])
        return SimpleNamespace(returncode=int(not command[-1].endswith(".whl")))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_where_the_package_is_missing_a_wheel_comes_first(elsewhere, tmp_path):
    wheel = f"icl_helpers-{icl.__version__}-py3-none-any.whl"
    (tmp_path / wheel).touch()
    exec(install_cell(), {})
    assert elsewhere == [wheel]


def test_where_nothing_can_be_had_it_says_what_to_do_and_invents_no_address(elsewhere):
    with pytest.raises(ModuleNotFoundError, match="pip wheel --no-deps .*run this cell again"):
        exec(install_cell(), {})
    assert elsewhere == [f"icl-helpers=={icl.__version__}"]


def test_repository_of_the_settings_is_asked_for_the_tag(elsewhere, tmp_path, monkeypatch):
    (tmp_path / "_config.yml").write_text("repository: {url: 'https://example.org/o/n'}")
    monkeypatch.setattr("icl_helpers.files.project_root", lambda: tmp_path)
    with pytest.raises(ModuleNotFoundError):
        exec(install_cell(), {})
    assert elsewhere[0] == f"icl-helpers @ git+https://example.org/o/n@v{icl.__version__}"


@pytest.mark.parametrize("path", stage_notebooks(), ids=lambda path: path.stem)
def test_first_cell_tells_the_default_limit_and_what_it_takes(path):
    text = nbformat.read(path, as_version=4).cells[0].source
    assert "**Default.**" in text
    stage = int(path.name[:2])
    cost = estimate_cost(icl.stage_parameters())
    if stage in cost.closer:
        tokens = cost.closer[stage]
        told = r"([\d.]+) million tokens.*?(?:about (\d+) minutes?|under a minute)"
        ((millions, minutes),) = re.findall(told, text)
        assert float(millions) == pytest.approx(tokens / 1e6, rel=0.15)
        assert int(minutes or 0) == pytest.approx(tokens / cost.rate / 60, abs=0.51)
        assert f"`analysis_limit = {icl.stage_parameters().analysis_limit}`" in text
        return
    if stage not in (3, 4, 5, 6):
        assert "under a minute" in text.lower()
        return
    told = re.findall(
        r"([\d.]+) million(?: tokens)?.*?(?:about (\d+) minutes?|under a minute)", text
    )
    assert len(told) == 2
    for limit, (millions, minutes) in zip((None, 100), told, strict=True):
        p = icl.stage_parameters(limit=limit)
        cost = estimate_cost(p)
        tokens = stage_tokens(p).get(stage)
        if tokens is None:
            abstract = estimate_cost(icl.stage_parameters(limit=limit, nlp_tasks=[]))
            tokens = cost.tokens - abstract.tokens
        assert float(millions) == pytest.approx(tokens / 1e6, rel=0.15)
        assert int(minutes or 0) == pytest.approx(tokens / cost.rate / 60, abs=0.51)
        assert f"{cost.rate:,.0f} tokens a second" in text
