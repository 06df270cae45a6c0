"""Running the stage notebooks in order with papermill.

Every notebook is executed on each call: finished scores, means and cells are reused from the run
directory, so a repeated stage costs seconds, and an executed notebook is never taken as proof that
a stage is complete. A notebook's file appears only when it has run to its end, and goes when it is
run again: what is there is what the last execution left.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from icl_helpers.errors import ICLError, InputError
from icl_helpers.files import atomic_path, imported_dir, stage_notebooks, user_path
from icl_helpers.kernels import default_environment, forked_kernels
from icl_helpers.parameters import StageParameters, about, stage_parameters
from icl_helpers.redaction import redact
from icl_helpers.run.plan import Plan, check_same_model, run_info

__all__ = [
    "Job", "StageError", "check_book_extra", "execute_notebook", "execute_notebooks",
    "execute_stages", "stage_jobs",
]  # fmt: skip

# What the extra 'book' installs and this package imports or starts.
_BOOK_EXTRA = (
    "ipykernel", "jupyter_book", "jupyter_client", "nbclient", "nbformat", "papermill", "psutil",
)  # fmt: skip

# A socket's path, which ends in the number of a port, is at most 108 bytes long; on macOS 104.
_LONGEST_SOCKET = 100


class StageError(ICLError, RuntimeError):
    """A notebook failed; results finished before it are kept."""


def check_book_extra() -> None:
    """Raise :class:`InputError` where what runs notebooks and builds the book is not installed."""
    missing = [name for name in _BOOK_EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"running the stages and building the book need the extra 'book' (missing here: "
            f"{', '.join(missing)}): pip install 'icl-helpers[book]'"
        )


# A notebook, what becomes of it, and its parameters.
Job = tuple[Path, Path, dict[str, Any]]


def execute_stages(
    parameters: StageParameters, *, only: Sequence[int] | None = None, progress: bool = True
) -> list[Path]:
    """Execute the stages and return the executed notebooks, in ``run_dir/notebooks``.

    ``only`` gives the numbers of the stages to run. Raises :class:`StageError` with the failing
    cell's error when a notebook fails, and before the first one as :func:`stage_jobs` does.
    """
    jobs = stage_jobs(parameters, only=only)
    # Stages read what earlier ones wrote, and each loads the model, whose passes take every
    # processor; an imported run has what it needs.
    in_order = len(jobs) if imported_dir(parameters.run_dir) is None else 0
    return execute_notebooks(jobs, in_order=in_order, progress=progress)


def stage_jobs(parameters: StageParameters, *, only: Sequence[int] | None = None) -> list[Job]:
    """List the notebooks of a run's stages with their parameters, checked.

    Raises :class:`MissingArtefactError` when the rows of a task, or the reference text, cannot be
    had, and :class:`InputError` without the extra 'book', for a stage that there is not, and for
    another model's run.
    """
    check_book_extra()
    stage_parameters(**parameters.as_dict())
    stages = {int(path.name.split("_")[0]): path for path in stage_notebooks()}
    for number in only or ():
        if number not in stages:
            raise InputError(f"there is no stage {number}; the stages are {sorted(stages)}")
    chosen = {number: stages[number] for number in stages if only is None or number in only}
    if imported_dir(parameters.run_dir) is None:
        Plan(parameters).check_data(path.stem[3:] for path in chosen.values())
    run_dir = user_path(parameters.run_dir).resolve()
    if (run_dir / "run.json").is_file():
        check_same_model(run_info(run_dir), parameters)
    values = {**parameters.as_dict(), "run_dir": str(run_dir)}
    # Notebooks run in their own folder: what is a path from here must stay one from there.
    for name, *_, declared in about():
        given = values[name]
        if (
            declared.path
            and given not in (None, "synthetic", "original")
            and user_path(given).exists()
        ):
            values[name] = os.path.abspath(user_path(given))
    jobs = []
    for number, notebook in chosen.items():
        used = {name: values[name] for name, *_, declared in about() if number in declared.stages}
        jobs.append((notebook, run_dir / "notebooks" / notebook.name, used))
    return jobs


def execute_notebooks(
    jobs: Sequence[Job], *, in_order: int = 0, progress: bool = True
) -> list[Path]:
    """:func:`execute_notebook` for several; return their targets.

    The first ``in_order`` go one after another, the others beside them, as many at a time as there
    are processors left. Raises as that does, once those that have begun are through.
    """
    bar = tqdm(total=len(jobs), desc="stages", unit="notebook", disable=not progress)
    workers = max(1, (os.cpu_count() or 1) - bool(in_order))
    # Threads of two kernels that wait for each other take several times as long.
    one_thread = default_environment("OMP_NUM_THREADS", "1")
    with (
        bar, one_thread if in_order < len(jobs) else nullcontext(), forked_kernels() as kernels,
        ThreadPoolExecutor(max_workers=workers) as pool,
    ):  # fmt: skip
        begun = [pool.submit(execute_notebook, *job, kernels=kernels) for job in jobs[in_order:]]
        for beside in begun:
            beside.add_done_callback(lambda _: bar.update())
        try:
            # In the main thread, where an interrupt reaches the kernel.
            for job in jobs[:in_order]:
                execute_notebook(*job, kernels=kernels)
                bar.update()
            for beside in as_completed(begun):
                beside.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return [target for _, target, _ in jobs]


def execute_notebook(
    notebook: Path, target: Path, values: dict[str, Any], *, kernels: type | None = None
) -> Path:
    """Execute one notebook with these parameters; return ``target``, which appears only then.

    ``kernels`` is a class of managers of its kernel (:mod:`icl_helpers.kernels`), None Jupyter's
    own. What an earlier execution left there is removed first: a book of it would hide that this
    one failed. Raises :class:`StageError` with the failing cell's error.
    """
    # Only where notebooks run: a notebook that imports this package needs none of it.
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / notebook.name
        try:
            papermill.execute_notebook(
                str(notebook), str(output), parameters=values, kernel_name="python3",
                # Nobody sees it before it is whole, or has failed.
                request_save_on_cell_execute=False, autosave_cell_every=0, progress_bar=False,
                **_kernel_settings(scratch, kernels),
                # As papermill's cwd, which would move the whole process and notebooks beside it.
                resources={"metadata": {"path": str(notebook.parent)}},
            )  # fmt: skip
        except PapermillExecutionError as error:
            failed = target.with_suffix(".failed.ipynb")
            _keep(output, failed)
            raise StageError(
                f"notebook {notebook.stem} failed: {error.ename}: {redact(error.evalue)}. The "
                f"notebook up to the error is {failed}; finished results are kept, and running "
                f"again goes on from them"
            ) from None
        except DeadKernelError:
            raise StageError(
                f"notebook {notebook.stem} failed: its kernel died (killed, out of memory, or "
                f"crashed); finished results are kept, and running again goes on from them"
            ) from None
        _keep(output, target)
        target.with_suffix(".failed.ipynb").unlink(missing_ok=True)
    return target


def _kernel_settings(scratch: str, kernels: type | None) -> dict[str, Any]:
    """Settings of nbclient that keep a kernel to itself, and quiet.

    It talks over sockets in this folder, which is its user's alone; over TCP every user of the
    machine could reach it. Of its own log, which goes to the terminal, only what is fatal is shown:
    it names the TCP, and every end of a notebook that interrupts its last message.
    """
    from traitlets.config import Config

    settings = Config()
    if kernels is not None:
        settings.NotebookClient.kernel_manager_class = kernels
    address = os.path.join(scratch, "kernel")
    if len(os.fsencode(address)) <= _LONGEST_SOCKET:
        settings.KernelManager.transport = "ipc"
        settings.KernelManager.ip = address
    return {"config": settings, "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"]}


def _keep(output: Path, target: Path) -> None:
    """Move an executed notebook to its place, without tokens that its cells or errors printed."""
    with atomic_path(target) as temporary:
        temporary.write_text(redact(output.read_text(encoding="utf-8")), encoding="utf-8")
