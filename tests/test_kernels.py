"""Forked kernels: what they are forked from has touched nothing, and each is a kernel like others."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from huggingface_hub import constants

from icl_helpers import kernels
from icl_helpers.run import stages
from tests.commands import FORKING, in_a_process, still_there, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")


def notebook(folder: Path, name: str, code: str) -> stages.Job:
    path = folder / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)
    return path, folder / "out" / path.name, {}


def printed(target: Path) -> str:
    (cell,) = (
        cell for cell in nbformat.read(target, as_version=4).cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    )  # fmt: skip
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.fixture(autouse=True)
def as_in_a_program_of_its_own(monkeypatch):
    monkeypatch.setattr(kernels, "_GPUS", ())
    monkeypatch.setattr(kernels, "_ahead", None)


def import_and_look() -> None:
    for name in kernels._IMPORTED:
        importlib.import_module(name)
    sys.exit("matplotlib.pyplot" in sys.modules)


@pytest.mark.slow
def test_what_is_imported_before_draws_nothing():
    """As pyplot is imported it looks in which kernel it is, and what would draw there."""
    in_a_process(import_and_look)


@pytest.mark.slow
def test_nothing_is_forked_beside_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_GPUS", (str(tmp_path),))
    monkeypatch.setenv("OF_TEST", "value")
    (tmp_path / "out").mkdir()
    (target,) = stages.execute_notebooks([notebook(tmp_path, "one", SAYS)], progress=False)
    assert printed(target).split()[2:4] == [str(os.getpid()), "False"]


SAYS = """
import os, subprocess, sys
print(os.getcwd(), os.environ["OF_TEST"], os.getppid(), "torch" in sys.modules)
print(subprocess.run(["false"]).returncode, os.getpgid(0) == os.getpid())
"""


@pytest.mark.slow
def test_kernels_are_forked_from_one_process_which_ends_with_them(tmp_path, monkeypatch):
    monkeypatch.setenv("OF_TEST", "a value")
    (tmp_path / "out").mkdir()
    jobs = [notebook(tmp_path, name, SAYS) for name in ("one", "two")]
    targets = stages.execute_notebooks(jobs, progress=False)
    said = [printed(target).split() for target in targets]
    assert said[0] == said[1]
    folder, *value, parent, imported, status, own_group = said[0]
    assert (folder, value, imported) == (str(tmp_path), ["a", "value"], "True")
    assert (status, own_group) == ("1", "True")
    assert int(parent) not in (os.getpid(), 1)
    assert not psutil.pid_exists(int(parent))


DRAWS = """
import sys, matplotlib.pyplot as plt
print(sys.path, [it for it in sys.argv[1:] if it.startswith("--")], __name__)
plt.plot([1, 2]);
"""


@pytest.mark.slow
def test_figures_and_modules_are_those_of_other_kernels(tmp_path):
    (tmp_path / "out").mkdir()
    job = notebook(tmp_path, "drawing", DRAWS)
    outputs = []
    for execute in (
        lambda: stages.execute_notebooks([job], progress=False),
        lambda: stages.execute_notebook(*job),
        lambda: in_a_process(execute_ahead, tmp_path, job),
    ):
        execute()
        cell = nbformat.read(job[1], as_version=4).cells[-1]
        (drawn,) = (it["data"]["image/png"] for it in cell.outputs if "data" in it)
        outputs.append((printed(job[1]), drawn))
    assert outputs[0] == outputs[1] == outputs[2]


def execute_ahead(folder: Path, job: stages.Job) -> None:
    kernels._GPUS = ()
    # As a program has its own folder, of which kernels know nothing.
    sys.path[0] = str(folder)
    sys.argv[0] = str(folder / "program")
    kernels.fork_ahead()
    stages.execute_notebooks([job], progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["raise SystemExit(3)", "print('no number'); input()"])
def test_where_nothing_can_be_forked_kernels_start_as_others_do(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(kernels, "_SERVER", [sys.executable, "-c", broken])
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("OF_TEST", "value")
    (target,) = stages.execute_notebooks([notebook(tmp_path, "one", SAYS)], progress=False)
    assert printed(target).split()[2:4] == [str(os.getpid()), "False"]


def program(folder: Path, ahead: bool) -> None:
    kernels._GPUS = ()
    constants.HF_HUB_OFFLINE = False
    os.environ["HF_HUB_OFFLINE"] = "0"
    if ahead:
        kernels.fork_ahead()
    os.environ |= {"OMP_NUM_THREADS": "3", "HF_HUB_OFFLINE": "1"}
    stages.execute_notebooks([notebook(folder, "long", LASTS)], progress=False)


LASTS = """
import os, pathlib, time, torch
from huggingface_hub.constants import is_offline_mode
said = os.getpid(), os.getppid(), torch.get_num_threads(), int(is_offline_mode())
pathlib.Path("begun").write_text(" ".join(map(str, said)))
pathlib.Path("begun").rename("said")
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_kernels_end_with_what_they_are_forked_from(tmp_path, ahead):
    """Nothing is left where the program is killed and can end nothing itself."""
    begun = FORKING.Process(target=program, args=(tmp_path, ahead))
    begun.start()
    wait_for((tmp_path / "said").is_file, begun)
    kernel, forked_from, threads, offline = map(int, (tmp_path / "said").read_text().split())
    assert psutil.Process(forked_from).ppid() == begun.pid
    assert (b"icl_helpers.kernels" in Path(f"/proc/{forked_from}/cmdline").read_bytes()) != ahead
    assert (threads, offline) == (3, 1)
    begun.kill()
    begun.join()
    assert not still_there(kernel, forked_from)


@pytest.mark.slow
def test_one_copy_serves_a_program_to_its_end(tmp_path):
    (tmp_path / "out").mkdir()
    in_a_process(twice, tmp_path)
    first, second = (printed(tmp_path / "out" / f"{it}.ipynb").split() for it in ("one", "two"))
    assert first[2:4] == second[2:4] == [first[2], "True"]
    assert int(first[2]) != int((tmp_path / "program").read_text())
    assert not still_there(int(first[2]))


def twice(folder: Path) -> None:
    kernels._GPUS = ()
    (folder / "program").write_text(str(os.getpid()))
    os.environ["OF_TEST"] = "value"
    kernels.fork_ahead()
    for name in ("one", "two"):
        stages.execute_notebooks([notebook(folder, name, SAYS)], progress=False)


def go_astray(folder: Path) -> None:
    kernels._GPUS = ()
    kernels.fork_ahead()
    (folder / str(os.getpid())).touch()
    kernel = kernels._ahead.fork([], str(folder / "absent"), dict(os.environ))
    assert not still_there(kernel)
    kernels._ahead.end()


@pytest.mark.slow
def test_kernel_that_fails_does_not_go_on_as_the_program(tmp_path):
    in_a_process(go_astray, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def end_without_sigchld() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    forking = kernels._Forking()
    forking.begin()
    forking.end()


def test_ended_process_that_the_system_took_away_is_no_error():
    in_a_process(end_without_sigchld)
