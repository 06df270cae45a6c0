"""Train the embedded model, or measure finished trainings.

Usage, from the root of a checkout::

    python -m synthetic.training train DIRECTORY [--seed 0] [--device cuda]
    python -m synthetic.training measure DIRECTORY [DIRECTORY ...] [--out .] [--limit 100]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from icl_helpers.cli import guarded


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m synthetic.training")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    training = commands.add_parser("train", help="train the embedded model from a seed")
    training.add_argument("output_dir")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device")
    measure = commands.add_parser("measure", help="measure finished trainings: effect and dynamics")
    measure.add_argument("output_dirs", nargs="+", help="output directories of train")
    measure.add_argument("--out", default=".", help="directory of the measurements (default .)")
    measure.add_argument("--limit", type=int, help="only the first documents of each task")
    args = parser.parse_args(arguments)

    def command() -> int:
        if args.command == "train":
            from synthetic.training.train import Recipe, train

            print(train(args.output_dir, recipe=Recipe(seed=args.seed), device=args.device))
        else:
            from synthetic.training.measure import measure_trainings

            for path in measure_trainings(args.output_dirs, args.out, limit=args.limit):
                print(path)
        return 0

    return guarded(command)


if __name__ == "__main__":
    raise SystemExit(main())
