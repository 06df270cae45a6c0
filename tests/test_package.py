"""What is installed: the wheel's contents, and its use where nothing but its dependencies is.

A virtual environment outside the repository gets the wheel by pip. Its dependencies are not fetched
again: of the environment that runs the tests, exactly those distributions are linked into it that
the wheel's metadata ask for, and what these ask for in turn. What the metadata forget is not there,
as it would not be after ``pip install icl-helpers``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from email.parser import Parser
from functools import cache
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import icl_helpers as icl
from tests.conftest import ROOT, made_once

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the unpacked source distribution as an index would get both."""

    def make(folder: Path) -> None:
        build = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
        subprocess.run([*build, "--target", "sdist"], cwd=ROOT, check=True, capture_output=True)
        (source,) = folder.glob("*.tar.gz")
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
        unpacked = folder / source.name.removesuffix(".tar.gz")
        subprocess.run([*build, "--target", "wheel"], cwd=unpacked, check=True, capture_output=True)

    (path,) = made_once(tmp_path_factory, "wheel", make).glob("*.whl")
    return path


def kept(folder: str) -> set[str]:
    """The files of a folder of the repository, without what running leaves there."""
    left = {"__pycache__", ".ipynb_checkpoints"}
    paths = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in paths if not left & set(path.parts)}


def test_wheel_holds_the_package_and_of_the_made_up_data_no_code(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    bundle = "icl_helpers/_bundle/"
    carried = {name.removeprefix(bundle) for name in names if name.startswith(bundle)}
    # What trains the embedded model is no data of a task.
    data = kept("synthetic") - kept("synthetic/training") - {"synthetic/generate.py"}
    written = kept("book") | kept("notebooks") | kept("tasks")
    assert carried == data | written | {"CITATION.cff", "_config.yml", "_toc.yml"}
    assert names - {bundle + name for name in carried} == kept("icl_helpers")


def requirements(wheel: Path) -> list[Requirement]:
    """What the wheel's metadata ask for, those of its extras too."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def wanted(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Whether something is asked for on this machine, under one of these extras at least."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras})


def closure(asked: Iterable[Requirement]) -> dict[str, Distribution]:
    """Distributions of this environment that pip would install for these requirements."""
    found: dict[str, Distribution] = {}
    seen, waiting = set(), list(asked)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        found[name] = distribution(name)
        assert requirement.specifier.contains(found[name].version, prereleases=True), requirement
        for text in found[name].requires or []:
            if wanted(inner := Requirement(text), requirement.extras):
                waiting.append(inner)
    return found


@cache
def owners() -> Counter[str]:
    """How many distributions of this environment have files below a name in site-packages."""
    return Counter(
        top for found in distributions() for top in {f.parts[0] for f in found.files or []}
    )


def link(found: Distribution, environment: Path, site: Path) -> None:
    """Put a distribution into another environment: whole folders where it alone owns them."""
    for file in found.files or []:
        top, source = file.parts[0], Path(str(found.locate_file(file))).resolve()
        if top == "..":
            # Beside its modules, what Jupyter reads; commands are left out.
            if not source.is_relative_to(Path(sys.prefix, "share")):
                continue
            target = environment / source.relative_to(sys.prefix)
        elif top != "__pycache__" and owners()[top] == 1:
            source, target = Path(str(found.locate_file(top))), site / top
        else:
            target = site / file
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)


def install(folder: Path, wheel: Path, *, extra: str = "") -> Path:
    """A new environment with the wheel and what it asks for; return its folder of commands."""
    venv.create(folder, symlinks=True)
    commands = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(commands / "python"), "install", "--quiet"]
    pip += ["--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, str(wheel)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    asked = [requirement for requirement in requirements(wheel) if wanted(requirement, [extra])]
    for found in closure(asked).values():
        link(found, folder, site)
    return commands


def outside(folder: Path) -> dict[str, object]:
    """How to start a process that sees neither the repository nor a network."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | own
    return {"cwd": folder, "env": environment, "capture_output": True, "text": True}


IN_A_NOTEBOOK = """
import contextlib, importlib, importlib.util, io, json, pkgutil, sys

import icl_helpers as icl

assert icl.__file__.startswith(sys.prefix), icl.__file__
outside = [name for name in ("papermill", "nbformat", "jupyter_book", "pytest", "synthetic")
           if importlib.util.find_spec(name)]
assert not outside, outside
for found in pkgutil.walk_packages(icl.__path__, "icl_helpers."):
    importlib.import_module(found.name)
for name in icl.__all__:
    getattr(icl, name)
for task in [*icl.task_names("abstract"), *icl.task_names("stand_in")]:
    icl.build_prompts(task, shots=1, seed=42)

model, tokenizer = icl.load_model("icl-tiny")
scores = icl.prefix_matching_scores(model, icl.random_sequences(tokenizer)).mean(0)
results = icl.evaluate(
    model, tokenizer, tasks=["repetition"], shots=[5], seeds=[42], limit=2,
    conditions=icl.conditions(scores, fractions=[0.03], ablations=["zero", "knockout"]),
)
errors = []
for command in (["run", "--run-dir", "run"], ["book"]):
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        code = importlib.import_module("icl_helpers.cli").main(command)
    errors.append((code, shown.getvalue()))
print(json.dumps([scores.tolist(), results["accuracy"].tolist(), results["n"].tolist(), errors]))
"""


def test_wheel_alone_does_what_a_notebook_needs_and_names_the_extra_for_the_rest(wheel, tmp_path):
    commands = install(tmp_path / "environment", wheel)
    (tmp_path / "work").mkdir()
    run = [str(commands / "python"), "-c", IN_A_NOTEBOOK]
    done = subprocess.run(run, **outside(tmp_path / "work"))
    assert done.returncode == 0, done.stderr[-3000:]
    scores, accuracy, n, errors = json.loads(done.stdout.splitlines()[-1])
    model, tokenizer = icl.load_model("icl-tiny")
    here = icl.prefix_matching_scores(model, icl.random_sequences(tokenizer)).mean(0)
    assert scores == here.tolist()
    expected = icl.evaluate(
        model, tokenizer, tasks=["repetition"], shots=[5], seeds=[42], limit=2,
        conditions=icl.conditions(here, fractions=[0.03], ablations=["zero", "knockout"]),
    )  # fmt: skip
    assert accuracy == expected["accuracy"].tolist()
    assert set(n) == {2}
    for code, shown in errors:
        assert code == 2
        (line,) = shown.splitlines()
        assert line.startswith("icl: ")
        assert "pip install 'icl-helpers[book]'" in line
    assert not list((tmp_path / "work").glob("run/*"))


def test_wheel_with_the_extra_runs_a_stage_and_builds_a_book(wheel, run_dir, tmp_path):
    commands = install(tmp_path / "environment", wheel, extra="book")
    work = tmp_path / "work"
    shutil.copytree(run_dir, work / "runs" / "icl-tiny")
    stage = work / "runs" / "icl-tiny" / "notebooks" / "01_prefix_matching_scores.ipynb"
    stage.unlink()
    # The chapters are executed as they stand where the checkout's book is built; here some documents do.
    (chapters,) = commands.parent.glob("lib/python*/site-packages/icl_helpers/_bundle/notebooks")
    for chapter in chapters.glob("*.ipynb"):
        text = chapter.read_text()
        chapter.write_text(re.sub(r'"limit = \d+', '"limit = 4', text))
    again = json.loads((run_dir / "run.json").read_text())["parameters"]
    again["run_dir"] = "runs/icl-tiny"
    (work / "parameters.yaml").write_text(json.dumps(again))
    run = [str(commands / "icl"), "run", "-f", "parameters.yaml", "--stages", "1"]
    done = subprocess.run(run, **outside(work))
    assert done.returncode == 0, done.stderr[-3000:]
    assert stage.is_file()
    done = subprocess.run([str(commands / "icl"), "book"], **outside(work))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    front = Path(done.stdout.strip())
    assert front == work / "_build" / "html" / "index.html"
    shown = front.read_text()
    assert "What came out" in shown
    assert "icl-tiny is the test case for the tools" in shown
    assert (front.parent / "run" / "icl-tiny" / "01_prefix_matching_scores.html").is_file()


def pinned() -> Iterator[str]:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line:
            yield canonicalize_name(line.partition("==")[0])


def test_every_dependency_has_a_version_that_the_tests_pass_with(wheel):
    names = {canonicalize_name(requirement.name) for requirement in requirements(wheel)}
    assert names - set(pinned()) == set()
