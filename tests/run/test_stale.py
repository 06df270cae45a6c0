"""Nothing out of date and nothing damaged is ever served: it is computed again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch

import icl_helpers as icl
from icl_helpers.files import embedded_dir
from icl_helpers.tasks import specs as task_registry
from tests.conftest import make_llama

ROWS = [
    ("A B C A B", "Foo"), ("D E F G H", "Bar"), ("K L M K L", "Foo"), ("P Q R S T", "Bar"),
    ("U V W U V", "Foo"), ("B D F H K", "Bar"),
]  # fmt: skip


def write_rows(directory, rows=ROWS):
    directory.mkdir(exist_ok=True)
    content = [{"sequence": text, "label": label} for text, label in rows]
    (directory / "repetition_dataset_500.json").write_text(json.dumps(content))
    return str(directory)


@pytest.fixture
def request_for(llama, tokenizer, tmp_path):
    return {
        "model": llama, "tokenizer": tokenizer, "tasks": ["repetition"], "shots": [0],
        "seeds": [42], "run_dir": tmp_path / "run", "data": write_rows(tmp_path / "data"),
    }  # fmt: skip


def cells(request_for) -> dict:
    return {path: path.read_bytes() for path in request_for["run_dir"].glob("cells/*.json")}


def assert_one_more_cell(request_for, **changes) -> pd.DataFrame:
    """The changed request adds a cell, and its results are those of a fresh directory."""
    before = cells(request_for)
    found = icl.evaluate(**(request_for | changes))
    after = cells(request_for)
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()
    fresh = icl.evaluate(**(request_for | changes | {"run_dir": None}))
    pd.testing.assert_frame_equal(pd.DataFrame(found), pd.DataFrame(fresh))
    return found


def test_label_of_a_row_that_no_prompt_shows_is_part_of_the_key(request_for, tmp_path):
    first = icl.evaluate(**request_for)
    turned = {"Foo": "Bar", "Bar": "Foo"}
    write_rows(tmp_path / "data", [(text, turned[label]) for text, label in ROWS])
    second = assert_one_more_cell(request_for)
    assert second["accuracy"].iloc[0] == 1 - first["accuracy"].iloc[0]


def test_changed_text_of_a_row_is_no_hit(request_for, tmp_path):
    icl.evaluate(**request_for)
    write_rows(tmp_path / "data", [*ROWS[:-1], ("Z D F H K", "Bar")])
    assert_one_more_cell(request_for)


def test_edited_task_is_no_hit(request_for, monkeypatch):
    icl.evaluate(**request_for)
    spec = task_registry.get_task_spec("repetition")
    monkeypatch.setitem(
        task_registry._TASKS, "repetition", replace(spec, description="Classify each sequence.")
    )
    assert_one_more_cell(request_for)


def test_changed_dtype_tokenizer_or_version_is_no_hit(request_for, tokenizer, monkeypatch):
    icl.evaluate(**request_for)
    assert_one_more_cell(request_for, model=make_llama().to(torch.bfloat16))
    other = json.loads(tokenizer.backend_tokenizer.to_str())
    other["model"]["merges"] = other["model"]["merges"][:-20]
    changed = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(other)),
        bos_token="<s>", eos_token="</s>", pad_token="</s>",
    )  # fmt: skip
    assert_one_more_cell(request_for, tokenizer=changed)
    monkeypatch.setattr(icl, "__version__", "99")
    assert_one_more_cell(request_for)


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A directory with a tiny random model, and the parameters of a run of it."""
    folder = tmp_path / "model"
    make_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reference = tmp_path / "reference.txt"
    reference.write_text("\n".join(f"{text} {text} {label}" for text, label in ROWS * 60))
    parameters = icl.stage_parameters(
        model=str(folder), run_dir=str(tmp_path / "run"), tasks=["repetition"], shots=[0],
        seeds=[42], ablation_seeds=[42], fractions=[0.1], limit=3, reference=str(reference),
    )  # fmt: skip
    return folder, parameters


def test_weight_changed_in_place_with_its_old_date_is_no_hit(checkpoint):
    folder, parameters = checkpoint
    first = icl.Run(parameters)
    first.evaluate("full")
    path = folder / "model.safetensors"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-2] ^= 0x40
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = icl.Run(parameters)
    second.evaluate("full")
    assert second.identity["key"]["fingerprint"] != first.identity["key"]["fingerprint"]
    assert len(list(second.directory.glob("cells/*.json"))) == 2


def test_another_dtype_of_a_finished_run_is_no_hit(checkpoint):
    _, parameters = checkpoint
    icl.Run(parameters).evaluate("full")
    other = icl.Run(parameters.model_copy(update={"dtype": "bfloat16"}))
    other.evaluate("full")
    assert other.identity["key"]["dtype"] == "torch.bfloat16"
    assert len(list(other.directory.glob("cells/*.json"))) == 2


DAMAGES = {
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "header cut": lambda whole: whole[:20],
    "garbage": lambda whole: b"\xffgarbage" * 40,
    "one bit": lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["prefix_scores", "mean_head_outputs"])
def test_damaged_tensor_is_set_aside_by_name_and_computed_again(checkpoint, name, damage):
    _, parameters = checkpoint
    expected = getattr(icl.Run(parameters), name)()
    path = icl.Run(parameters).directory / f"{name}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    with pytest.warns(UserWarning, match=rf"{name}\.safetensors.*set aside as {name}"):
        again = getattr(icl.Run(parameters), name)()
    assert torch.equal(again, expected)
    assert path.read_bytes() == whole
    assert path.with_name(path.name + ".damaged-1").read_bytes() == DAMAGES[damage](whole)


@pytest.mark.parametrize("name", ["documents.parquet", "results.parquet", "run.json"])
@pytest.mark.parametrize("damage", [b"", b"garbage" * 50])
def test_damaged_table_or_record_is_made_anew_from_the_cells(checkpoint, name, damage):
    _, parameters = checkpoint
    expected = icl.Run(parameters).evaluate("full")
    directory = icl.Run(parameters).directory
    before = {path: path.stat().st_mtime_ns for path in directory.glob("cells/*.json")}
    (directory / name).write_bytes(damage)
    run = icl.Run(parameters)
    if name == "results.parquet":
        with (
            pytest.warns(UserWarning, match="set aside"),
            pytest.raises(icl.InputError, match="damaged"),
        ):
            run.results()
    found = run.evaluate("full")
    pd.testing.assert_frame_equal(found, expected)
    assert len(run.results()) == len(run.documents()) // 3 == 1
    assert json.loads((directory / "run.json").read_text())["fingerprint"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_copied_run_directory_does_not_vouch_for_another_checkpoint(checkpoint, tmp_path):
    """The state of the files that a run remembers is of one place: a copy is loaded afresh."""
    shutil.copytree(embedded_dir() / "icl-tiny", tmp_path / "copy")
    given = {"tasks": ["repetition"], "shots": [0], "seeds": [42], "limit": 2}
    state = [
        icl.Run(icl.stage_parameters(**given, model=str(folder), run_dir=str(tmp_path / name)))
        .identity["state"]
        for name, folder in (("one", embedded_dir() / "icl-tiny"), ("two", tmp_path / "copy"))
    ]  # fmt: skip
    assert state[0] != state[1]
