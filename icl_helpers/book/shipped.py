"""Runs that come as bundles: made into runs of the book, executed from there, checked by a sample.

Example
-------
>>> prepare_shipped("book/runs", "runs")
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from icl_helpers.errors import InputError
from icl_helpers.files import imported_dir, user_path, write_json
from icl_helpers.redaction import redact
from icl_helpers.run.bundle import import_bundle
from icl_helpers.run.plan import stated_parameters
from icl_helpers.run.stages import execute_stages

__all__ = ["VERIFICATION", "prepare_shipped"]

VERIFICATION = "verification.json"


def prepare_shipped(
    bundles: str | os.PathLike[str], runs: str | os.PathLike[str], *, seconds: float = 90
) -> list[Path]:
    """Import every bundle below ``bundles``, execute its stages, and verify a sample of it.

    The run of a bundle lies below ``runs`` under the bundle's name; where a run lies that was not
    imported, that one stays. All verifications together take about ``seconds``; what they say is
    kept in ``verification.json`` of each run, that the model is not here too. Return the runs.

    Raises :class:`InputError` for a directory that is none, and for a damaged bundle.
    """
    folder = user_path(bundles)
    if not folder.is_dir():
        raise InputError(f"{folder} is no directory of bundles")
    found = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    made = []
    for bundle in found:
        run = user_path(runs) / bundle.name
        if (run / "run.json").is_file() and imported_dir(run) is None:
            warnings.warn(f"{run} was computed here and takes the place of {bundle}", stacklevel=2)
            continue
        import_bundle(bundle, run)
        execute_stages(stated_parameters(run))
        write_json(run / VERIFICATION, _verified(bundle, seconds / len(found)))
        made.append(run)
    return made


def _verified(bundle: Path, seconds: float) -> dict[str, Any]:
    """The report of ``icl verify``, or the ``reason`` for which there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "icl_helpers.cli", "verify", str(bundle)]
        # A process of its own, which gives the model's memory back. Nothing is fetched for a check.
        done = subprocess.run(
            [*command, "--seconds", f"{seconds:g}", "--json", str(report)],
            env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if report.is_file():
            found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
            return found
    said = re.findall(r"^icl: (.*)", done.stderr, re.MULTILINE)
    reason = said[-1] if said else f"icl verify ended with exit code {done.returncode}"
    return {"reason": redact(reason.replace(str(bundle), bundle.name))}
