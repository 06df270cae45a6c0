"""The command line: speed of the help, exit codes, lm-eval's own command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from icl_helpers.cli import main
from tests.commands import Command, wait_for

ROOT = Path(__file__).resolve().parents[1]


def test_import_and_help_load_nothing_heavy():
    code = (
        "import sys, icl_helpers, icl_helpers.cli as c\n"
        "try: c.main(['--help'])\nexcept SystemExit: pass\n"
        "bad = {'torch', 'transformers', 'lm_eval', 'pandas', 'datasets'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for command in (
        "run",
        "scores",
        "cost",
        "export",
        "import",
        "verify",
        "check",
        "compare",
        "means",
        "evaluate",
        "book",
        "data",
        "lm-eval",
    ):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--tasks", "nope"], "unknown task 'nope'"),
        (["evaluate", "--fractions", "2"], "fraction must lie in (0, 1], got 2"),
        (["evaluate", "--conditions", "half"], "kind must be one of"),
        (["scores", "--model", "./no/such"], "does not exist"),
        (["cost", "--tokens-per-second", "-1", "--tasks", "repetition"], "must be positive"),
        (["run", "-f", "no-such.yaml"], "cannot read parameters"),
        (["run", "--stages", "99"], "there is no stage 99"),
        (["book", "--runs", "no-such-folder"], "no complete run"),
        (["book", "--bundles", "no-such-folder"], "no directory of bundles"),
        (["export", "no-such-folder", "--out", "x"], "is not the directory of a run"),
        (["import", "no-such-folder"], "is no bundle"),
        (["verify", "no-such-folder"], "is no bundle"),
        (["check", "./no/such"], "does not exist"),
        (["check", "icl-tiny", "--dtypes", "float8"], "dtype must be one of"),
        (["check", "icl-tiny", "--quantization", "2bit"], "quantization"),
        (["compare", "no-such-folder", "no-such-log"], "is no sample log"),
        (["data", "original", "--from", "no-such-folder"], "neither in"),
    ],
)
def test_bad_input_gives_one_error_and_a_failing_exit_code(arguments, message, capsys, tmp_path):
    if arguments[0] in ("evaluate", "scores"):
        arguments = [*arguments, "--run-dir", str(tmp_path / "run")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_parameter_file_and_options_reach_the_run(tmp_path, capsys):
    parameters = tmp_path / "p.yaml"
    parameters.write_text(
        "model: icl-tiny\nlimit: 3\ntasks: [repetition]\nshots: [2]\nseeds: [7]\n"
    )
    run = tmp_path / "run"
    assert main(["evaluate", "-f", str(parameters), "--run-dir", str(run), "--limit", "2"]) == 0
    info = json.loads((run / "run.json").read_text())
    assert info["parameters"]["limit"] == 2
    assert info["parameters"]["seeds"] == [7]
    assert "repetition" in capsys.readouterr().out


@pytest.mark.slow
def test_lm_eval_command_line_agrees_with_evaluate(tmp_path):
    done = Command(
        "lm-eval", "--model", "hf-icl", "--model_args",
        "pretrained=icl-tiny,ablate=induction,ablation=zero,fraction=0.05",
        "--tasks", "repetition_seed42", "--num_fewshot", "5", "--limit", "20",
        "--output_path", str(tmp_path / "out"), errors=tmp_path / "errors",
    )  # fmt: skip
    assert done.wait() == 0, done.errors[-2000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["repetition_seed42"]["acc,none"]
    import icl_helpers

    model, tokenizer = icl_helpers.load_model("icl-tiny")
    sequences = icl_helpers.random_sequences(tokenizer)
    scores = icl_helpers.prefix_matching_scores(model, sequences).mean(0)
    conditions = icl_helpers.conditions(scores, fractions=[0.05], ablations=["zero"], full=False)
    ours = icl_helpers.evaluate(
        model, tokenizer, tasks=["repetition"], shots=5, seeds=[42], limit=20,
        sampling="first", conditions=conditions[:1],
    )  # fmt: skip
    assert float(ours["accuracy"].iloc[0]) == found


STOPPED = [
    "evaluate", "--tasks", "wordseq1_binary", "--shots", "10", "--seeds", "42,43,44",
    "--limit", "60", "--conditions", "full,zero", "--run-dir",
]  # fmt: skip


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """The run of an evaluation that nothing stops."""
    run = tmp_path_factory.mktemp("clean")
    assert main([*STOPPED, str(run)]) == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_evaluation_goes_on_where_it_stopped(tmp_path, how, clean):
    run = tmp_path / "run"
    arguments = [*STOPPED, str(run)]
    process = Command(*arguments, errors=tmp_path / "errors")
    wait_for(lambda: len(list(run.glob("cells/*.json"))) >= 2, process)
    process.send_signal(how)
    assert process.wait(60) != 0
    kept = {path: path.stat().st_mtime_ns for path in run.glob("cells/*.json")}
    assert 2 <= len(kept) < 27
    assert main(arguments) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    import pandas as pd

    pd.testing.assert_frame_equal(
        pd.read_parquet(run / "results.parquet"), pd.read_parquet(clean / "results.parquet")
    )
