"""A run of notebooks that is killed, or whose disk fills up: what is finished stays and is used."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from icl_helpers.cli import main
from tests.commands import Command, children, still_there, wait_for

ROOT = Path(__file__).resolve().parents[2]
STAGE = "03_full_model.ipynb"
ARGUMENTS = [
    "run", "--stages", "3", "--tasks", "repetition,recursion", "--nlp-tasks", "", "--shots", "5,10",
    "--seeds", "42,43,44", "--limit", "60",
]  # fmt: skip
CELLS = 2 * 2 * 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def start(run: Path) -> Command:
    return Command(*ARGUMENTS, "--run-dir", str(run), errors=run.with_name("errors"))


def finish(run: Path) -> None:
    """The same command to its end, in this process: only what is stopped needs its own."""
    assert main([*ARGUMENTS, "--run-dir", str(run)]) == 0


def kernels(pid: int) -> list[int]:
    """Kernels of the notebooks of a command: where they are forked, from a copy of the command."""
    found = []
    for child in children(pid):
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"ipykernel" in command:
            found.append(child)
        elif command == Path(f"/proc/{pid}/cmdline").read_bytes():
            found += children(child)
    return found


def kernel_in_mid_stage(process: Command, run: Path) -> int:
    wait_for(lambda: list(run.glob("cells/*.json")), process)
    (kernel,) = kernels(process.pid)
    return kernel


def times(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in run.glob("cells/*.json")}


def tables(run: Path) -> list[pd.DataFrame]:
    return [pd.read_parquet(run / f"{name}.parquet") for name in ("documents", "results")]


def assert_same_tables(run: Path, other: Path) -> None:
    for ours, theirs in zip(tables(run), tables(other), strict=True):
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The same run, left alone."""
    run = tmp_path_factory.mktemp("clean") / "run"
    finish(run)
    assert len(times(run)) == CELLS
    return run


def test_killed_kernel_costs_only_what_it_had_not_finished(clean, tmp_path):
    run = tmp_path / "run"
    process = start(run)
    os.kill(kernel_in_mid_stage(process, run), signal.SIGKILL)
    assert process.wait(120) == 2
    assert "its kernel died" in process.errors
    kept = times(run)
    assert 0 < len(kept) < CELLS
    assert not list(run.glob("notebooks/*"))
    finish(run)
    assert {name: times(run)[name] for name in kept} == kept
    assert_same_tables(run, clean)


def test_executed_notebook_is_no_proof_that_its_cells_are_there(clean, tmp_path):
    shutil.copytree(clean, tmp_path / "run")
    run = tmp_path / "run"
    assert (run / "notebooks" / STAGE).is_file()
    lost, *kept = sorted(run.glob("cells/*.json"))
    content = lost.read_bytes()
    before = times(run)
    lost.unlink()
    finish(run)
    assert lost.read_bytes() == content
    assert {path.name: times(run)[path.name] for path in kept} == {
        path.name: before[path.name] for path in kept
    }
    assert_same_tables(run, clean)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_run_leaves_no_kernel_and_keeps_what_is_finished(tmp_path, how):
    run = tmp_path / "run"
    process = start(run)
    kernel = kernel_in_mid_stage(process, run)
    process.send_signal(how)
    assert process.wait(60) != 0
    assert still_there(kernel) == []
    kept = list(run.glob("cells/*.json"))
    assert kept
    assert not list(run.glob("notebooks/*.ipynb"))
    for path in kept:
        assert json.loads(path.read_bytes())["checksum"]
    assert not list(run.glob("cells/.*.tmp")) or how == signal.SIGKILL


# A file system of its own, in a name space of its own, that is as large as the test wants it.
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=$1 tmpfs "$2" || exit 77
shift; disk=$1; shift
"$@"; echo "exit code $?"
ls -A "$disk" "$disk/cells"
mount -o remount,size=64m "$disk"
"$@"; echo "exit code $?"
cp -r "$disk/." "$disk-kept"
"""
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


def can_mount() -> bool:
    tried = [*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(tried, capture_output=True).returncode
    )


@pytest.mark.skipif(not can_mount(), reason="needs a kernel that lets users mount a tmpfs")
def test_full_disk_is_named_and_the_run_goes_on_when_there_is_room(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [
        sys.executable, "-m", "icl_helpers.cli", "evaluate", "--tasks", "repetition", "--shots",
        "5", "--seeds", "42,43", "--limit", "100", "--conditions", "full,zero", "--run-dir",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", ON_A_SMALL_DISK, "sh", "100k", str(disk), *command, str(disk)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert "exit code 2" in done.stdout, done.stderr[-2000:]
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("icl: ")]
    assert f"cannot write {disk}" in message
    assert "No space left on device" in message
    assert ".json" in done.stdout
    assert ".tmp" not in done.stdout
    assert "exit code 0" in done.stdout, done.stderr[-2000:]
    assert main([*command[3:], str(tmp_path / "clean")]) == 0
    assert_same_tables(tmp_path / "disk-kept", tmp_path / "clean")
    names = [name for name in os.listdir(tmp_path / "disk-kept") if "damaged" in name]
    assert not names
