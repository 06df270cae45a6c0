"""Kernels that start at once: copies of a process that has imported what notebooks import.

PyTorch and Transformers take seconds to import, and a run starts ten kernels. On Linux kernels are
therefore forked from one process that has imported and done nothing else. Elsewhere, where there is
a GPU (a process that so much as asked for one gives no copy that could use it), and where that
process fails, they start as Jupyter starts them.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from icl_helpers.models.hub import go_offline

__all__ = [
    "NEEDLESS", "can_fork", "default_environment", "fork_ahead", "forked_kernels", "preload",
    "take_environment",
]  # fmt: skip

# Notebooks are checked with jsonschema, which where this is installed takes a second to prepare for
# addresses, of which notebooks have none.
NEEDLESS = "rfc3987_syntax"
# What is drawn with is not among them: pyplot asks, as it is imported, in which kernel it is.
_IMPORTED = (
    "icl_helpers.run.run", "icl_helpers.book.came_out", "IPython", "ipykernel.kernelapp",
    "matplotlib.figure", "matplotlib.backends.backend_agg",
)  # fmt: skip
# What Linux knows GPUs by: NVIDIA's, in Windows' subsystem, AMD's, others'.
_GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/accel", "/dev/dri")
_KERNEL = [sys.executable, "-m", "ipykernel_launcher"]
_SERVER = [sys.executable, "-m", "icl_helpers.kernels"]
# What was begun before it was asked for.
_ahead: _Forking | None = None


@contextmanager
def forked_kernels() -> Iterator[type]:
    """Give a class of managers whose kernels are forked from one process.

    That is the copy of :func:`fork_ahead`, or one which ends with this, and so must its kernels:
    they watch whether it lives. For ``NotebookClient.kernel_manager_class`` of nbclient.
    """
    # Of the extra 'book', which whoever has notebooks executed has.
    import psutil
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_client.provisioning.local_provisioner import LocalProvisioner

    forking = _ahead or _Forking()

    class Kernel(psutil.Process):
        """A forked kernel, as the provisioner expects of a child process of its own."""

        stdin = stdout = stderr = None

        def poll(self) -> int | None:
            # Of a zombie nobody may be left to take it away.
            with suppress(psutil.NoSuchProcess):
                if self.is_running() and self.status() != psutil.STATUS_ZOMBIE:
                    return None
            return 0

        def wait(self, timeout: float | None = None) -> int | None:
            return self.poll()

    class Provisioner(LocalProvisioner):
        async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
            program, options = cmd[: len(_KERNEL)], cmd[len(_KERNEL) :]
            order = options, kwargs.get("cwd"), kwargs["env"]
            if program != _KERNEL or (kernel := forking.fork(*order)) is None:
                return await super().launch_kernel(cmd, **kwargs)
            self.process = Kernel(kernel)
            self.pid = self.pgid = kernel
            return self.connection_info

    class Manager(AsyncKernelManager):
        async def _async_pre_start_kernel(self, **kwargs: Any) -> Any:
            self.provisioner = Provisioner(
                kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self
            )
            return await super()._async_pre_start_kernel(**kwargs)

    try:
        yield Manager if can_fork() else AsyncKernelManager
    finally:
        if forking is not _ahead:
            forking.end()


def fork_ahead() -> None:
    """Have kernels forked from a copy of this process, which so far has imported and no more.

    For a program's beginning; the copy ends with the program.
    """
    global _ahead
    if can_fork():
        forking = _Forking()
        with suppress(OSError):
            forking.begin(as_copy=True)
            atexit.register(forking.end)
            _ahead = forking


def can_fork() -> bool:
    """Whether a copy of a process that has imported can do what the process could."""
    return sys.platform == "linux" and not any(map(os.path.exists, _GPUS))


@contextmanager
def default_environment(name: str, value: str) -> Iterator[None]:
    """Have processes that start inside find this variable, where it is not set otherwise."""
    unset = name not in os.environ
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if unset:
            del os.environ[name]


def take_environment(environment: Mapping[str, str]) -> None:
    """Do in a forked process what its environment would have done before it imported."""
    os.environ.clear()
    os.environ.update(environment)
    if environment.get("HF_HUB_OFFLINE") == "1":
        go_offline()


def preload(*modules: str) -> None:
    """Import modules faster: what they bring stays, so no collection, now or later, looks at it."""
    sys.modules.setdefault(NEEDLESS, None)  # type: ignore[arg-type]
    if set(modules) <= set(sys.modules):
        return
    gc.disable()
    try:
        for name in modules:
            importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


class _Forking:
    """The process that kernels are forked from, begun at the latest when one is asked for."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._process: int | None = None

    def begin(self, *, as_copy: bool = False) -> None:
        """Begin the process; as a copy of this one, it never returns from here."""
        (theirs, orders), (answers, ours) = os.pipe(), os.pipe()
        if not as_copy:
            # A session of its own: what interrupts this program in a terminal reaches no kernel.
            self._process = os.posix_spawn(
                sys.executable, _SERVER, os.environ, setsid=True,
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs, 0), (os.POSIX_SPAWN_DUP2, ours, 1)],
            )  # fmt: skip
        else:
            self._process = os.fork()
            if not self._process:
                os.setsid()
                # This process ends where nobody else can give it orders any more.
                os.close(orders)
                os.close(answers)
                try:
                    _serve(os.fdopen(theirs), os.fdopen(ours, "w"))
                except Exception:
                    # Nor a kernel of it must go on as the program, whatever that suppresses.
                    traceback.print_exc()
                    os._exit(1)
                raise SystemExit
        os.close(theirs)
        os.close(ours)
        self._orders, self._answers = os.fdopen(orders, "w"), os.fdopen(answers)

    def fork(self, *order: Any) -> int | None:
        """Have a kernel forked and return its process id; None where that cannot be done.

        ``order`` is a kernel's options, directory and environment.
        """
        with self._one_at_a_time:
            try:
                if self._process is None:
                    self.begin()
                print(json.dumps(order), file=self._orders, flush=True)
                return int(self._answers.readline())
            except (OSError, ValueError):
                # What it may have forked ends with it.
                self.end()
                return None

    def end(self) -> None:
        if self._process:
            # Where this program was begun without SIGCHLD, the system has taken it away.
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._process, signal.SIGKILL)
                os.waitpid(self._process, 0)
            # It is not begun again.
            self._process = 0
            with suppress(BrokenPipeError), self._orders, self._answers:
                pass


def _serve(orders: TextIO, answers: TextIO) -> None:
    """Import, then fork a kernel for every line of the orders and answer its process id.

    Ends where the orders do, that is with the program that gives them, and the kernels with it.
    """
    # As ipykernel's launcher does: modules beside the program are not in the way.
    if sys.path[0] in ("", os.getcwd(), os.path.dirname(sys.argv[0])):
        del sys.path[0]
    # Kernels watch whether this process lives; their figures are drawn by the inline backend.
    os.environ["JPY_PARENT_PID"] = parent = str(os.getpid())
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    # What is printed meanwhile is no answer.
    os.dup2(2, 1)
    preload(*_IMPORTED)
    # The system takes the ended kernels away.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for line in orders:
        kernel = os.fork()
        if not kernel:
            orders.close()
            answers.close()
            options, directory, environment = json.loads(line)
            _become_kernel(options, directory, {**environment, "JPY_PARENT_PID": parent})
            return
        print(kernel, file=answers, flush=True)


def _become_kernel(options: list[str], directory: str | None, environment: dict[str, str]) -> None:
    import torch
    from ipykernel.kernelapp import launch_new_instance

    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv[1:] = options
    take_environment(environment)
    if (threads := environment.get("OMP_NUM_THREADS", "")).isdigit():
        torch.set_num_threads(int(threads))
    os.chdir(directory or os.getcwd())
    launch_new_instance(argv=options)


if __name__ == "__main__":
    _serve(os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w"))
