"""Measure and write ``book/_static/benchmark.json``: ``python -m tests.benchmark [--rounds 5]``."""

from __future__ import annotations

import argparse

from icl_helpers.cli import guarded


def _write(rounds: int) -> int:
    from tests.benchmark.run import write_benchmark

    print(write_benchmark(rounds=rounds))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark")
    parser.add_argument("--rounds", type=int, default=5, help="alternating runs (default 5)")
    given = parser.parse_args()
    raise SystemExit(guarded(lambda: _write(given.rounds)))
