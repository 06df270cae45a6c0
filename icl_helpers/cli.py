"""The ``icl`` command. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from icl_helpers.errors import ICLError, InputError
from icl_helpers.leaks import redact

__all__ = ["main"]


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",") if part.strip()]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--parameters", metavar="FILE", help="YAML file of parameters")
    known = "icl-tiny (the default), smollm2-135m, a hub id, a directory or a .gguf file"
    parser.add_argument("--model", help=known)
    parser.add_argument("--revision", help="revision of a hub model")
    parser.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--quantization", help="4bit or 8bit weights (needs bitsandbytes)")
    parser.add_argument("--batch-size", help="prompts per forward pass, or auto")
    parser.add_argument("--tasks", type=_numbers(str), help="task names, comma separated")
    parser.add_argument("--nlp-tasks", type=_numbers(str), help="text tasks; '' for none")
    parser.add_argument("--labels", help="of text tasks: semantic, unrelated or both")
    parser.add_argument("--shots", type=_numbers(int), help="numbers of demonstrations")
    parser.add_argument("--fractions", type=_numbers(float), help="fractions of heads")
    parser.add_argument("--seeds", type=_numbers(int), help="demonstration seeds")
    parser.add_argument("--ablation-seeds", type=_numbers(int), help="seeds of the random heads")
    parser.add_argument("--limit", type=int, help="only the first documents of each task")
    parser.add_argument("--data", help="synthetic, original, or a directory of the published files")
    parser.add_argument("--data-dir", help="local files of NLP tasks, DIR/TASK/train.jsonl, ...")
    parser.add_argument("--control", help="published, strict or any_layer")
    parser.add_argument("--reference", help="text file for the means, one text a line")
    parser.add_argument("--run-dir", help="directory of the run (default runs/<model>)")
    parser.add_argument("--trust-remote-code", action="store_true", default=None)


_OPTIONS = (
    "model", "revision", "dtype", "device", "quantization", "batch_size", "tasks",
    "nlp_tasks", "labels", "shots", "fractions", "seeds", "ablation_seeds", "limit", "data",
    "data_dir", "control", "reference", "run_dir",
    "trust_remote_code",
)  # fmt: skip


def _add_worker_options(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, metavar="N", help="processes that score cells")
    where.add_argument(
        "--scheduler", metavar="ADDRESS|FILE",
        help="dask scheduler whose workers score cells (needs the extra 'cluster')",
    )  # fmt: skip


def _use_workers(args: argparse.Namespace) -> None:
    """Leave word of the workers in the environment, where the notebooks' kernels find it."""
    if args.workers is not None:
        if not 1 <= args.workers <= 1024:
            raise InputError(f"workers must be a whole number from 1 to 1024, got {args.workers}")
        os.environ["ICL_WORKERS"] = str(args.workers)
        os.environ.pop("ICL_SCHEDULER", None)
    if args.scheduler is not None:
        file = args.scheduler if "://" in args.scheduler else os.path.abspath(args.scheduler)
        os.environ["ICL_SCHEDULER"] = file


def _parameters(args: argparse.Namespace) -> Any:
    from icl_helpers.parameters import stage_parameters
    from icl_helpers.pipeline import read_parameters

    values = read_parameters(args.parameters) if args.parameters else {}
    given = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    if isinstance(given.get("batch_size"), str) and given["batch_size"].isdigit():
        given["batch_size"] = int(given["batch_size"])
    values |= given
    if "run_dir" not in values:
        values["run_dir"] = f"runs/{_slug(str(values.get('model', 'icl-tiny')))}"
    return stage_parameters(**values)


def _slug(model: str) -> str:
    import re

    return re.sub(r"[^a-z0-9.-]+", "-", model.lower().split("/")[-1]).strip("-.")[:80] or "model"


def _run(args: argparse.Namespace) -> int:
    from icl_helpers.pipeline import execute_stages

    _use_workers(args)
    for path in execute_stages(_parameters(args), only=args.stages):
        print(path)
    return 0


def _scores(args: argparse.Namespace) -> int:
    from icl_helpers.run import Run

    run = Run(_parameters(args))
    mean = run.prefix_scores().mean(0)
    for head in run.induction_heads():
        print(f"layer {head.layer} head {head.head}  {mean[head.layer, head.head]:.3f}")
    return 0


def _cost(args: argparse.Namespace) -> int:
    from icl_helpers.costs import estimate_cost

    print(estimate_cost(_parameters(args), tokens_per_second=args.tokens_per_second))
    return 0


def _means(args: argparse.Namespace) -> int:
    from icl_helpers.run import Run

    run = Run(_parameters(args))
    print(
        "mean head outputs [layers, positions, heads, d_head]:", list(run.mean_head_outputs().shape)
    )
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from icl_helpers.run import Run

    _use_workers(args)
    results = Run(_parameters(args)).evaluate(*args.conditions)
    print(results.to_string(index=False))
    return 0


def _book(args: argparse.Namespace) -> int:
    from icl_helpers.book import build_book

    print(build_book(args.runs, args.out))
    return 0


def _data(args: argparse.Namespace) -> int:
    from icl_helpers.original_data import fetch_original

    print(fetch_original(source=args.source))
    return 0


def _train(args: argparse.Namespace) -> int:
    from icl_helpers.train import Recipe, train

    print(train(args.output_dir, recipe=Recipe(seed=args.seed), device=args.device))
    return 0


def _measure(args: argparse.Namespace) -> int:
    from icl_helpers.effect import measure_trainings

    for path in measure_trainings(args.output_dirs, args.out, limit=args.limit):
        print(path)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from icl_helpers.benchmark import write_benchmark

    print(write_benchmark(rounds=args.rounds))
    return 0


def _lm_eval(arguments: Sequence[str]) -> int:
    """lm-eval's own command line, with ``hf-icl`` registered and our tasks included."""
    import icl_helpers.lm  # noqa: F401 - registers hf-icl
    from icl_helpers._paths import tasks_dir

    found = list(arguments)
    if found[:1] != ["ls"] and found[:1] != ["validate"] and found[:1] != ["run"]:
        found = ["run", *found]
    if "--include_path" not in found:
        found += ["--include_path", str(tasks_dir())]
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *found]
    cli_evaluate()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="icl",
        description="Find induction heads, remove or block them, measure few-shot accuracy.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], int], text: str) -> Any:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        return command

    run = add("run", _run, "run all stages (notebooks) in order")
    _add_run_options(run)
    _add_worker_options(run)
    run.add_argument("--stages", type=_numbers(int), help="numbers of the stages, for example 1,3")
    _add_run_options(add("scores", _scores, "prefix-matching scores and the induction heads"))
    _add_run_options(add("means", _means, "mean head outputs"))
    cost = add("cost", _cost, "estimate memory, tokens and hours of a run; loads no model")
    _add_run_options(cost)
    cost.add_argument("--tokens-per-second", type=float, help="rate of your machine, if known")
    evaluate = add("evaluate", _evaluate, "few-shot accuracy under conditions")
    _add_run_options(evaluate)
    _add_worker_options(evaluate)
    evaluate.add_argument(
        "--conditions", type=_numbers(str), default=["full"],
        help="any of full, mean, zero, knockout, comma separated (default full)",
    )  # fmt: skip
    book = add("book", _book, "build the HTML book from the runs")
    book.add_argument("--runs", default="runs", help="directory of the runs (default runs)")
    book.add_argument("--out", default="_build", help="directory of the book (default _build)")
    data = add("data", _data, "fetch the published repository's data files")
    data.add_argument("what", choices=["original"])
    data.add_argument("--from", dest="source", metavar="DIR", help="copy from a local clone")
    train = add("train", _train, "train the embedded model from a seed")
    train.add_argument("output_dir")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device")
    measure = add("measure", _measure, "measure finished trainings: effect and dynamics")
    measure.add_argument("output_dirs", nargs="+", help="output directories of icl train")
    measure.add_argument("--out", default=".", help="directory of the measurements (default .)")
    measure.add_argument("--limit", type=int, help="only the first documents of each task")
    bench = add("bench", _bench, "measure what interventions and evaluation cost")
    bench.add_argument("--rounds", type=int, default=5, help="alternating runs (default 5)")
    commands.add_parser(
        "lm-eval", help="lm-eval's command line with hf-icl and our tasks", add_help=False
    )
    return parser


def _stop(number: int, frame: Any) -> None:
    # As for Ctrl-C, so that kernels and files are cleaned up on the way out.
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``icl`` command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _stop)
    try:
        if given[:1] == ["lm-eval"]:
            return _lm_eval(given[1:])
        args = _parser().parse_args(given)
        function: Callable[[argparse.Namespace], int] = args.function
        return function(args)
    except ICLError as error:
        print(f"icl: {redact(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("icl: stopped; finished results are kept", file=sys.stderr)
        return 130
    except Exception:
        # As Python would, but logs are published: without tokens that a request or path may hold.
        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
