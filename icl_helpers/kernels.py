"""Kernels that start at once: copies of a process that has imported what notebooks import.

PyTorch and Transformers take seconds to import, and a run starts ten kernels. On Linux kernels are
therefore forked from one process that has imported and done nothing else. Elsewhere, where there is
a GPU (a process that so much as asked for one gives no copy that could use it), and where that
process fails, they start as Jupyter starts them.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["forked_kernels", "preload"]

# What is drawn with is not among them: pyplot asks, as it is imported, in which kernel it is.
_IMPORTED = (
    "icl_helpers.run.run", "icl_helpers.book.came_out", "IPython", "ipykernel.kernelapp",
    "matplotlib.figure", "matplotlib.backends.backend_agg",
)  # fmt: skip
# What Linux knows GPUs by: NVIDIA's, in Windows' subsystem, AMD's, others'.
_GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/accel", "/dev/dri")
_KERNEL = [sys.executable, "-m", "ipykernel_launcher"]


@contextmanager
def forked_kernels() -> Iterator[type]:
    """Give a class of managers whose kernels are forked from one process, which ends with this.

    So must the kernels: they watch whether it lives. The class is for
    ``NotebookClient.kernel_manager_class`` of nbclient.
    """
    # Of the extra 'book', which whoever has notebooks executed has.
    import psutil
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_client.provisioning.local_provisioner import LocalProvisioner

    forking = _Forking()

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
        can_fork = sys.platform == "linux" and not any(map(os.path.exists, _GPUS))
        yield Manager if can_fork else AsyncKernelManager
    finally:
        forking.end()


def preload(*modules: str) -> None:
    """Import modules faster: what they bring stays, so no collection, now or later, looks at it."""
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
    """The process that kernels are forked from, begun when the first is asked for."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._process: Any = None

    def fork(self, *order: Any) -> int | None:
        """Have a kernel forked and return its process id; None where that cannot be done.

        ``order`` is a kernel's options, directory and environment.
        """
        with self._one_at_a_time:
            # A session of its own: what interrupts this program in a terminal reaches no kernel.
            self._process = self._process or subprocess.Popen(
                [sys.executable, "-m", __name__], text=True, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            try:
                print(json.dumps(order), file=self._process.stdin, flush=True)
                return int(self._process.stdout.readline())
            except (BrokenPipeError, ValueError):
                # What it may have forked ends with it.
                self.end()
                return None

    def end(self) -> None:
        if self._process is not None:
            with suppress(BrokenPipeError), self._process:
                self._process.kill()


def _serve() -> None:
    """Import, then fork a kernel for every line of standard input and print its process id.

    Ends where the input does, that is with the program that gives it, and the kernels with it.
    """
    # As ipykernel's launcher does: modules beside the program are not in the way.
    if sys.path[0] in ("", os.getcwd()):
        del sys.path[0]
    # Kernels watch whether this process lives; their figures are drawn by the inline backend.
    os.environ["JPY_PARENT_PID"] = parent = str(os.getpid())
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    # What is printed meanwhile is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    preload(*_IMPORTED)
    # The system takes the ended kernels away.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        kernel = os.fork()
        if not kernel:
            answers.close()
            options, directory, environment = json.loads(line)
            _become_kernel(options, directory, {**environment, "JPY_PARENT_PID": parent})
            return
        print(kernel, file=answers, flush=True)


def _become_kernel(options: list[str], directory: str | None, environment: dict[str, str]) -> None:
    from ipykernel.kernelapp import launch_new_instance

    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv[1:] = options
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory or os.getcwd())
    launch_new_instance(argv=options)


if __name__ == "__main__":
    _serve()
