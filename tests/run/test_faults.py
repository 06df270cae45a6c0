"""Faults that a run must survive, each of them really done."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import icl_helpers as icl
from icl_helpers.cli import _slug, main
from icl_helpers.evaluation.store import CellStore, merge_into_run_tables
from icl_helpers.files import StorageError, write_json
from icl_helpers.redaction import LeakError, check_leaks
from icl_helpers.run.stages import StageError, execute_notebook, execute_stages
from tests.commands import Command

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "aB3" * 9


def test_full_disk_is_named_and_what_was_there_is_intact(tmp_path):
    path = tmp_path / "cell.json"
    write_json(path, {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as on a disk with one block left
    try:
        with pytest.raises(StorageError, match=r"cannot write .*cell\.json.*finished results"):
            write_json(path, {"a": ["x" * 100] * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["cell.json"]


def test_read_only_directory_is_named_and_what_was_there_is_intact():
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    was_root = os.geteuid() == 0
    try:
        write_json(directory / "cell.json", {"a": 1})
        directory.chmod(0o555)
        if was_root:  # root may write anywhere
            os.seteuid(65534)
        try:
            with pytest.raises(StorageError, match=r"cannot write .*cell\.json: Permission denied"):
                write_json(directory / "cell.json", {"a": 2})
        finally:
            if was_root:
                os.seteuid(0)
        assert (directory / "cell.json").read_text() == '{\n "a": 1\n}\n'
    finally:
        directory.chmod(0o755)
        shutil.rmtree(directory)


@pytest.mark.slow
def test_two_processes_filling_one_directory_leave_one_valid_file_per_cell(tmp_path):
    run = tmp_path / "run"
    both = [
        Command(
            "evaluate", "--tasks", "repetition", "--shots", "2", "--seeds", "42,43", "--limit", "5",
            "--conditions", "full,zero", "--run-dir", str(run), errors=tmp_path / name,
        )
        for name in ("first", "second")
    ]  # fmt: skip
    assert [process.wait(500) for process in both] == [0, 0]
    cells = list(CellStore(run / "cells").cells())
    keys = {str(sorted(spec.items())) for spec, _ in cells}
    assert len(cells) == len(keys) == 2 * (1 + 2 * (1 + 2 * 3))
    assert len(list((run / "cells").iterdir())) == len(cells)
    assert len(pd.read_parquet(run / "results.parquet")) == len(cells)


def rows(task: str, *, seed: int = 42, correct: bool = True) -> pd.DataFrame:
    """Two documents of one cell, as an evaluation gives them."""
    values = {
        "task": task, "labels": "unrelated", "shots": 5, "condition": "full", "ablation": "none",
        "fraction": 0.0, "ablation_seed": None, "demonstration_seed": seed,
    }  # fmt: skip
    frame = pd.DataFrame([values] * 2).assign(
        doc_id=[0, 1], correct=correct, margin=0.5, valid=True
    )
    return frame.astype({"ablation_seed": "Int64", "demonstration_seed": "Int64"})


@pytest.mark.slow
def test_writers_of_different_tasks_at_once_lose_no_row(tmp_path):
    names = [f"task{number}" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: merge_into_run_tables(tmp_path, rows(name)), names))
    found = pd.read_parquet(tmp_path / "documents.parquet")
    assert sorted(found["task"]) == sorted(names * 2)
    assert sorted(pd.read_parquet(tmp_path / "results.parquet")["task"]) == sorted(names)


@pytest.mark.slow
def test_writers_of_one_task_at_once_leave_its_rows_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: merge_into_run_tables(tmp_path, rows("a")), range(40)))
    assert pd.read_parquet(tmp_path / "documents.parquet")["task"].tolist() == ["a", "a"]
    assert merge_into_run_tables(tmp_path, rows("b"))["task"].tolist() == ["a", "b"]


def test_newest_of_two_results_with_one_key_is_in_the_tables_in_copies_too(tmp_path):
    both = pd.concat([rows("a", correct=False), rows("b", correct=False)])
    merge_into_run_tables(tmp_path / "run", both)
    merge_into_run_tables(tmp_path / "run", rows("a"))
    merge_into_run_tables(tmp_path / "run", rows("a", seed=43))
    # A copy need not keep the times of the files.
    copy = tmp_path / "copy"
    for path in sorted((tmp_path / "run").rglob("*.parquet"), reverse=True):
        (copy / path.relative_to(tmp_path / "run")).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(tmp_path / "run")).write_bytes(path.read_bytes())
    for directory in (tmp_path / "run", copy):
        results = merge_into_run_tables(directory, rows("c"))
        found = {(row.task, row.demonstration_seed): row.accuracy for row in results.itertuples()}
        assert found == {("a", 42): 1.0, ("b", 42): 0.0, ("a", 43): 1.0, ("c", 42): 1.0}
    merge_into_run_tables(copy, rows("c"))
    assert len(list((copy / "parts").iterdir())) == 4


def test_damaged_part_is_set_aside_and_the_rest_assembled(tmp_path):
    merge_into_run_tables(tmp_path, rows("a"))
    (part,) = (tmp_path / "parts").iterdir()
    part.write_bytes(part.read_bytes()[:100])
    with pytest.warns(UserWarning, match=f"{part.name} is damaged.*set aside"):
        results = merge_into_run_tables(tmp_path, rows("b"))
    assert results["task"].tolist() == ["b"]
    assert sorted(merge_into_run_tables(tmp_path, rows("a"))["task"]) == ["a", "b"]


@pytest.mark.slow
def test_killed_kernel_fails_the_stage_and_leaves_no_finished_notebook(tmp_path):
    source = tmp_path / "stage.ipynb"
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbformat.write(notebook, source)
    with pytest.raises(StageError, match="its kernel died.*running again"):
        execute_notebook(source, tmp_path / "out" / "stage.ipynb", {})
    assert not (tmp_path / "out" / "stage.ipynb").exists()


@pytest.mark.parametrize(
    "model", ["..", "../..", "/", "/etc", "a" * 300, "x/" + "y" * 300, "~", ".", "a b\tc"]
)
def test_default_run_directory_stays_inside_the_run_root(model, tmp_path):
    slug = _slug(model)
    assert slug not in ("", ".", "..")
    assert "/" not in slug
    assert len(slug) <= 80
    assert (tmp_path / slug).resolve().parent == tmp_path.resolve()


HOSTILE = ["..", "../..", "../../escape", "/", "/etc", "/nowhere/at/all", "~", "~nobody-of-this-name", ".", "a\0b", "\0", " ",
           "", "a" * 300, "x/" + "y" * 300, "z" * 5000, "a b\tc", "-rf", "name\nname"]  # fmt: skip


@pytest.mark.parametrize("command", ["scores", "evaluate"])
@pytest.mark.parametrize("model", HOSTILE)
def test_command_given_a_hostile_model_name_refuses_and_writes_nothing_outside(
    model, command, tmp_path, monkeypatch, capsys
):
    work = tmp_path / "outer" / "work"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (work / "parameters.yaml").write_text(json.dumps({"model": model}))
    assert main([command, "-f", "parameters.yaml"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("icl: ")
    assert len(printed) < 6000
    written = {path.relative_to(tmp_path).parts for path in tmp_path.rglob("*")}
    inside = ("outer", "work", "runs")
    assert {parts for parts in written if parts[:3] != inside} == {
        ("outer",), ("outer", "work"), ("outer", "work", "parameters.yaml"),
    }  # fmt: skip


@pytest.mark.parametrize("run_dir", ["", " ", "a\0b", "r" * 300, "runs/" + "r" * 300, "a-file"])
def test_command_given_a_hostile_run_directory_refuses(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("mine")
    (tmp_path / "parameters.yaml").write_text(json.dumps({"run_dir": run_dir}))
    assert main(["scores", "-f", "parameters.yaml"]) == 2
    assert "run_dir" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a-file", "parameters.yaml"]
    assert (tmp_path / "a-file").read_text() == "mine"


@pytest.mark.parametrize("content", ["model: 5", "model: [a]", "- model", "model: null", "{"])
def test_parameter_file_of_another_form_is_refused(content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parameters.yaml").write_text(content)
    assert main(["scores", "-f", "parameters.yaml"]) == 2
    assert capsys.readouterr().err.startswith("icl: ")
    assert os.listdir(tmp_path) == ["parameters.yaml"]


@pytest.mark.parametrize("name", ["reference", "data", "data_dir"])
@pytest.mark.parametrize("value", ["", "a\0b", "n" * 300, "~nobody-of-this-name", "/nowhere"])
def test_path_that_cannot_be_is_refused_before_the_first_stage(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((icl.InputError, icl.MissingArtefactError)):
        execute_stages(icl.stage_parameters(**{name: value}), progress=False)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        pytest.param(
            ["bench", "--rounds", "0"], "rounds must be at least 1", marks=pytest.mark.slow
        ),
        (["book", "--runs", "a-file"], "a-file is a file"),
        (["data", "original", "--from", "a-file"], "a-file"),
    ],
)
def test_file_or_number_that_cannot_serve_is_named(command, message, refuses_a_file):
    refuses_a_file(main, command, message)


def test_case_twins_do_not_share_a_run_directory(tmp_path):
    assert _slug("Org/Model") == _slug("org/model")
    write_json(tmp_path / "run.json", {"model": "Org/Model"})
    with pytest.raises(icl.InputError, match="holds the run of model 'Org/Model'"):
        icl.Run(icl.stage_parameters(model="org/model", run_dir=str(tmp_path)))


@pytest.mark.parametrize("name", ["model", "revision", "reference", "tasks", "seeds"])
@pytest.mark.parametrize("value", [TOKEN, [TOKEN], {"token": TOKEN}])
def test_token_as_a_parameter_is_refused_without_repeating_it(name, value):
    with pytest.raises(icl.InputError, match="access token") as error:
        icl.stage_parameters(**{name: value})
    assert TOKEN not in str(error.value)


SECRET_VALUE = "correct-horse-battery-staple"


@pytest.mark.slow
@pytest.mark.parametrize("fails", [True, False])
def test_executed_notebook_holds_no_token_that_its_cells_print(tmp_path, monkeypatch, fails):
    monkeypatch.setenv("HF_TOKEN", SECRET_VALUE)
    code = f"""import os, sys
print(os.environ["HF_TOKEN"], file=sys.stderr)
message = "line one\\n{TOKEN}\\nhttps://user:" + os.environ["HF_TOKEN"] + "@example"
print(message, repr(message))
{"raise OSError(message)" if fails else "message"}"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbformat.write(notebook, tmp_path / "stage.ipynb")
    target = tmp_path / "out" / "stage.ipynb"
    message = ""
    try:
        execute_notebook(tmp_path / "stage.ipynb", target, {})
    except StageError as error:
        message = str(error)
    assert fails == bool(message)
    (written,) = (tmp_path / "out").iterdir()
    nbformat.validate(nbformat.read(written, as_version=4))
    for text in (message, written.read_text()):
        assert TOKEN not in text
        assert SECRET_VALUE not in text
    assert "[removed: access token]" in written.read_text()


@pytest.mark.parametrize("kind", [OSError, icl.InputError])
def test_command_prints_no_token(monkeypatch, capsys, kind):
    monkeypatch.setenv("HF_TOKEN", SECRET_VALUE)

    def fail(*_, **__):
        raise kind(f"https://{SECRET_VALUE}@hub says no to {TOKEN}")

    monkeypatch.setattr("icl_helpers.tasks.data.fetch_original", fail)
    assert main(["data", "original"]) == (2 if kind is icl.InputError else 1)
    printed = "".join(capsys.readouterr())
    assert "says no to" in printed
    assert TOKEN not in printed
    assert SECRET_VALUE not in printed


@pytest.mark.parametrize("before", ["\\n", "\x1b[33m", '"', " ", "="])
def test_scan_sees_a_token_after_colours_and_line_breaks(tmp_path, before):
    (tmp_path / "a.ipynb").write_text(f'"text{before}{TOKEN}"')
    with pytest.raises(LeakError, match="an access token"):
        check_leaks(tmp_path)


@pytest.mark.parametrize("kind", ["token", "environment", "home", "user"])
def test_scan_names_the_file_and_not_the_secret(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HOME", "/home/marieke")
    monkeypatch.setenv("LOGNAME", "marieke")
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    (tmp_path / "deep").mkdir()
    harmless = "task-with-a-long-hyphenated-name-and-more hf_ marie /homes sk-short"
    (tmp_path / "index.html").write_text(harmless)
    check_leaks(tmp_path)
    secret = {
        "token": TOKEN,
        "environment": "correct-horse-battery",
        "home": "/home/marieke/data",
        "user": "by Marieke's account marieke.",
    }[kind]
    (tmp_path / "deep" / "page.json").write_bytes(b'\xff{"a": "' + secret.encode() + b'"}')
    with pytest.raises(LeakError, match=r"deep/page\.json") as error:
        check_leaks(tmp_path)
    assert secret not in str(error.value)
