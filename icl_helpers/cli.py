"""The ``icl`` command. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from icl_helpers.errors import ICLError, InputError
from icl_helpers.kernels import fork_ahead, preload
from icl_helpers.redaction import redact

__all__ = ["guarded", "main"]


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",") if part.strip()]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def _reader(kind: Any) -> Callable[[str], Any]:
    """What reads an option's text, given the declared type; lists are comma separated."""
    first, *others = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if get_origin(first) is list:
        return _list_of(get_args(first)[0])
    return str if str in others else first


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """An option for every declared parameter, and one for a file of them."""
    from icl_helpers.parameters import about

    parser.add_argument("-f", "--parameters", metavar="FILE", help="YAML file of parameters")
    for name, kind, _, declared in about():
        how = {"action": "store_true", "default": None} if kind is bool else {"type": _reader(kind)}
        parser.add_argument(f"--{name.replace('_', '-')}", help=declared.help, **how)


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
    from icl_helpers.files import imported_dir
    from icl_helpers.models.fingerprint import model_name
    from icl_helpers.parameters import about, read_parameters, stage_parameters

    values: dict[str, Any] = {}
    if args.run_dir is not None and imported_dir(args.run_dir) is not None:
        from icl_helpers.run.plan import stated_parameters

        # An imported run goes on as it was.
        values = stated_parameters(args.run_dir).as_dict()
    values |= read_parameters(args.parameters) if args.parameters else {}
    options = {name: getattr(args, name) for name, *_ in about()}
    values |= {name: value for name, value in options.items() if value is not None}
    if isinstance(values.get("batch_size"), str) and values["batch_size"].isdigit():
        values["batch_size"] = int(values["batch_size"])
    if "run_dir" not in values:
        # Of a folder that of its one name, however it is written.
        values["run_dir"] = f"runs/{_slug(model_name(str(values.get('model', 'icl-tiny'))))}"
    return stage_parameters(**values)


def _slug(model: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "-", model.lower().split("/")[-1]).strip("-.")[:80] or "model"


def _run(args: argparse.Namespace) -> None:
    from icl_helpers.run.stages import execute_stages

    _use_workers(args)
    for path in execute_stages(_parameters(args), only=args.stages):
        print(path)


def _scores(args: argparse.Namespace) -> None:
    from icl_helpers.run.run import Run

    run = Run(_parameters(args))
    mean = run.prefix_scores().mean(0)
    for head in run.induction_heads():
        print(f"layer {head.layer} head {head.head}  {mean[head.layer, head.head]:.3f}")


def _cost(args: argparse.Namespace) -> None:
    from icl_helpers.run.costs import estimate_cost

    print(estimate_cost(_parameters(args), tokens_per_second=args.tokens_per_second))


def _means(args: argparse.Namespace) -> None:
    from icl_helpers.run.run import Run

    shape = list(Run(_parameters(args)).mean_head_outputs().shape)
    print("mean head outputs [layers, positions, heads, d_head]:", shape)


def _evaluate(args: argparse.Namespace) -> None:
    from icl_helpers.run.run import Run

    _use_workers(args)
    results = Run(_parameters(args)).evaluate(*args.conditions)
    print(results.to_string(index=False))


def _export(args: argparse.Namespace) -> None:
    from icl_helpers.run.bundle import export_run
    from icl_helpers.run.run import run_at

    print(export_run(run_at(args.run), args.out))


def _import(args: argparse.Namespace) -> None:
    from icl_helpers.run.bundle import import_bundle

    name = os.path.basename(os.path.abspath(args.bundle))
    print(import_bundle(args.bundle, args.run_dir or os.path.join("runs", name)))


def _report(report: Any, file: str | None) -> None:
    """Print a report, and write it as JSON where a file is named."""
    from icl_helpers.files import write_json

    if file is not None:
        write_json(Path(file), report.as_dict())
    print(report)


def _check(args: argparse.Namespace) -> int:
    from icl_helpers.run.check import check_model

    report = check_model(
        args.model, dtypes=args.dtypes, quantization=args.quantization, revision=args.revision,
        device=args.device, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    _report(report, args.json)
    return 0 if report.passes else 1


def _compare(args: argparse.Namespace) -> None:
    from icl_helpers.results.comparison import compare_logs

    _report(compare_logs(args.first, args.second, metric=args.metric), args.json)


def _verify(args: argparse.Namespace) -> int:
    from icl_helpers.run.verify import verify_bundle

    share = args.share or (0.01 if args.seconds is None else 1.0)
    report = verify_bundle(
        args.bundle, share=share, seconds=args.seconds, seed=args.seed, model=args.model,
        device=args.device, data_dir=args.data_dir, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    _report(report, args.json)
    return 0 if report.agrees else 1


def _book(args: argparse.Namespace) -> None:
    import tempfile

    from icl_helpers.book.build import build_book, prepare_shipped
    from icl_helpers.parameters import about
    from icl_helpers.run.stages import execute_stages

    asked = args.parameters or any(getattr(args, name) is not None for name, *_ in about())
    live = _parameters(args) if asked else None
    with tempfile.TemporaryDirectory() as scratch:
        chapters = None if args.bundles is None else Path(scratch)
        if chapters is not None:
            prepare_shipped(args.bundles, args.runs, live=live, chapters=chapters)
        elif live is not None:
            execute_stages(live)
        print(build_book(args.runs, args.out, chapters=chapters))


def _data(args: argparse.Namespace) -> None:
    from icl_helpers.tasks.data import fetch_original

    print(fetch_original(source=args.source))


def _bench(args: argparse.Namespace) -> int:
    """The performance tests of a checkout, which an installed package does not hold."""
    from icl_helpers.files import project_root

    if not (project_root() / "tests" / "benchmark").is_dir():
        raise InputError("icl bench runs the performance tests of a checkout; run it from one")
    command = [sys.executable, "-m", "tests.benchmark", "--rounds", str(args.rounds)]
    return subprocess.run(command, cwd=project_root(), check=False).returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="icl",
        description="Find induction heads, remove or block them, measure few-shot accuracy.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, function: Callable[[argparse.Namespace], int | None], text: str,
        module: str = "run.run",
    ) -> Any:  # fmt: skip
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function, module=f"icl_helpers.{module}")
        return command

    run = add("run", _run, "run all stages (notebooks) in order")
    _add_run_options(run)
    _add_worker_options(run)
    run.add_argument("--stages", type=_list_of(int), help="numbers of the stages, for example 1,3")
    _add_run_options(add("scores", _scores, "prefix-matching scores and the induction heads"))
    _add_run_options(add("means", _means, "mean head outputs"))
    cost = add("cost", _cost, "estimate memory, tokens and hours of a run; loads no model")
    _add_run_options(cost)
    cost.add_argument("--tokens-per-second", type=float, help="rate of your machine, if known")
    evaluate = add("evaluate", _evaluate, "few-shot accuracy under conditions")
    _add_run_options(evaluate)
    _add_worker_options(evaluate)
    evaluate.add_argument(
        "--conditions", type=_list_of(str), default=["full"],
        help="any of full, mean, zero, knockout, comma separated (default full)",
    )  # fmt: skip
    export = add("export", _export, "write a run as a bundle: a small directory to pass on")
    export.add_argument("run", metavar="RUN", help="directory of the run")
    export.add_argument("--out", required=True, metavar="DIR", help="directory to make")
    bundle = add("import", _import, "make a run of a bundle; it needs no model")
    bundle.add_argument("bundle", metavar="BUNDLE")
    bundle.add_argument(
        "--run-dir", "--out", metavar="RUN", help="directory of the run (default runs/NAME)"
    )
    check = add("check", _check, "check interventions on a model by other means; 1: one fails")
    check.add_argument("model", metavar="MODEL", help="a name, hub id, directory or .gguf file")
    check.add_argument(
        "--dtypes", type=_list_of(str), default=["float32", "bfloat16"],
        help="any of auto, float32, bfloat16, float16 (default float32,bfloat16)",
    )  # fmt: skip
    check.add_argument("--quantization", help="4bit or 8bit weights (needs bitsandbytes)")
    check.add_argument("--revision", help="revision of a hub model")
    compare = add(
        "compare", _compare, "compare two lm-eval sample logs or runs, task by task",
        "results.comparison",
    )  # fmt: skip
    compare.add_argument("first", metavar="A", help="samples_*.jsonl, their folder, or a run")
    compare.add_argument("second", metavar="B", help="another of the same kind")
    compare.add_argument("--metric", help="of the logs, NAME or NAME,FILTER (default: their first)")
    verify = add("verify", _verify, "compute a share of a bundle again and compare; 1: disagrees")
    verify.add_argument("bundle", metavar="BUNDLE")
    verify.add_argument("--share", type=float, help="of its documents (default 0.01)")
    verify.add_argument("--seconds", type=float, help="time limit; then the default share is all")
    verify.add_argument("--seed", type=int, default=0, help="seed of the draw (default 0)")
    verify.add_argument("--model", help="where the model is, if not at the name in the bundle")
    verify.add_argument("--data-dir", help="rows of tasks that were read from a directory")
    for reporting in (check, compare, verify):
        reporting.add_argument("--json", metavar="FILE", help="write the report here too")
    for loading in (check, verify):
        loading.add_argument("--device", help="cpu, cuda, cuda:1, ...")
        loading.add_argument(
            "--trust-remote-code", action="store_true", help="run code from the model's repository"
        )
    book = add(
        "book", _book, "build the HTML book from the runs; with options of a run, run that too"
    )
    _add_run_options(book)
    book.add_argument("--runs", default="runs", help="directory of the runs (default runs)")
    book.add_argument("--out", default="_build", help="directory of the book (default _build)")
    book.add_argument(
        "--bundles", metavar="DIR",
        help="directory of bundles whose runs are imported, executed and verified before",
    )  # fmt: skip
    data = add("data", _data, "fetch the published repository's data files", "tasks.data")
    data.add_argument("what", choices=["original"])
    data.add_argument("--from", dest="source", metavar="DIR", help="copy from a local clone")
    bench = add("bench", _bench, "measure what interventions and evaluation cost", "files")
    bench.add_argument("--rounds", type=int, default=5, help="alternating runs (default 5)")
    commands.add_parser(
        "lm-eval", help="lm-eval's command line with hf-icl and our tasks", add_help=False
    )
    return parser


def guarded(command: Callable[[], int]) -> int:
    """Run a command; return its exit code, or that of the error or signal that ended it."""
    # As for Ctrl-C, so that kernels and files are cleaned up on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return command()
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``icl`` command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)

    def command() -> int:
        if words[:1] == ["lm-eval"]:
            preload("icl_helpers.evaluation.scorer")
            from icl_helpers.lm_eval_command import run_lm_eval

            return run_lm_eval(words[1:])
        args = _parser().parse_args(words)
        preload(args.module)
        # In a process that is this command's alone.
        if args.command in ("run", "book") and arguments is None:
            fork_ahead()
        return args.function(args) or 0

    return guarded(command)


if __name__ == "__main__":
    raise SystemExit(main())
