"""Measure, write ``book/_static/benchmark.json`` and the page made from it.

``python -m tests.benchmark`` measures this package alone; with ``--peers PYTHON`` the libraries side
by side instead, with ``--gpu`` what a GPU makes of it, and with ``--page`` nothing, but writes the
page anew. Sections that are not measured stay as they were.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from icl_helpers.cli import guarded


def _write(given: argparse.Namespace) -> int:
    from icl_helpers.errors import InputError
    from icl_helpers.files import project_root
    from tests.benchmark.run import keep_measured

    if given.page:
        measured = {}
    elif given.gpu:
        import torch

        from icl_helpers.models.loading import load_model
        from tests.benchmark.gpu import measure_gpu

        if not torch.cuda.is_available():
            raise InputError("--gpu needs a CUDA GPU, and torch sees none here")
        measured = {"gpu": measure_gpu(load_model("icl-tiny", device="cpu")[1])}
    elif given.peers:
        from tests.benchmark.side_by_side import measure_side_by_side

        work = project_root() / "_build" / "benchmark"
        found = measure_side_by_side(
            work,
            peers_python=given.peers.absolute(),
            rounds=given.rounds,
            documents=given.documents,
        )
        measured = {"side_by_side": found}
    else:
        from tests.benchmark.run import run_benchmark

        measured = run_benchmark(rounds=given.rounds)
    print(keep_measured(measured))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark")
    parser.add_argument("--rounds", type=int, default=5, help="alternating runs (default 5)")
    parser.add_argument(
        "--documents", type=int, default=4, help="documents that --peers scores (default 4)"
    )
    parser.add_argument(
        "--peers", type=Path, metavar="PYTHON", help="that has TransformerLens and nnsight"
    )
    parser.add_argument("--gpu", action="store_true", help="an 8B-shaped model on a GPU")
    parser.add_argument("--page", action="store_true", help="only the page, from what is there")
    given = parser.parse_args()
    raise SystemExit(guarded(lambda: _write(given)))
