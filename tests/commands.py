"""The ``icl`` command in a process of its own, which need not wait for its imports.

It is forked from a process that has imported what commands import, and done nothing else. What
reads its environment as it is imported, or starts where nothing is installed, starts Python itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from subprocess import Popen

from icl_helpers import kernels
from icl_helpers.cli import main

ROOT = Path(__file__).resolve().parents[1]
sys.modules.setdefault(kernels.NEEDLESS, None)
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    ["icl_helpers.run.run", "icl_helpers.cli", "tests.commands", "papermill"]
)


class Command:
    """A command that has begun; what it prints as errors is in a file.

    In its process ``before`` is called first.
    """

    def __init__(
        self, *arguments: str, errors: Path, before: Callable[[], object] = bool, **environment: str
    ) -> None:
        self._errors = errors
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._process = FORKING.Process(
            target=_run, args=(arguments, variables, str(errors), before)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def errors(self) -> str:
        return self._errors.read_text() if self._errors.is_file() else ""

    def poll(self) -> int | None:
        """Its exit code, minus the number of the signal that ended it; None while it goes on."""
        return self._process.exitcode

    def wait(self, seconds: float = 400) -> int:
        self._process.join(seconds)
        assert self.poll() is not None, f"not ended in {seconds} s"
        return self.poll()

    def send_signal(self, which: int) -> None:
        os.kill(self.pid, which)


def _run(
    arguments: tuple[str, ...], variables: dict[str, str], errors: str, before: Callable[[], object]
) -> None:
    kernels.take_environment(variables)
    os.chdir(ROOT)
    for stream, file in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before()
    sys.argv[1:] = arguments
    sys.exit(main())


class Kernels(kernels._Forking):
    """What the notebooks' kernels of all tests of a process are forked from."""

    def begin(self, *, as_copy: bool = False) -> None:
        here, there = FORKING.Pipe()
        process = FORKING.Process(target=_serve_kernels, args=(there,))
        process.start()
        self._process = process.pid
        self._orders, self._answers = (os.fdopen(os.dup(here.fileno()), mode) for mode in "wr")

    def end(self) -> None:
        if self._process:
            self._orders.close()
            self._answers.close()


def _serve_kernels(given: Connection) -> None:
    orders, answers = (os.fdopen(os.dup(given.fileno()), mode) for mode in "rw")
    given.close()
    kernels._serve(orders, answers)


def in_a_process(target: Callable[..., None], *arguments: object) -> None:
    """Call a function in a process that has imported, and is not the tests'."""
    process = FORKING.Process(target=target, args=arguments)
    process.start()
    process.join(300)
    assert process.exitcode == 0


def wait_for(
    condition: Callable[[], object], process: Command | Popen | Process, seconds: float = 400
) -> None:
    """Wait while the process goes on, which it does until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = process.exitcode if isinstance(process, Process) else process.poll()
        assert ended is None, getattr(process, "errors", "")[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """The processes that a process started, and that are still there."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def still_there(*pids: int, seconds: float = 30) -> list[int]:
    """Which of the processes do not end in so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := list(filter(_is_alive, pids))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _is_alive(pid: int) -> bool:
    """Whether there is such a process, and not only what an ended one leaves to its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
