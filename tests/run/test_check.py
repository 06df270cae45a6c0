"""The checks of a model: pass on sound ones, and the right one fails where something is broken."""

from __future__ import annotations

import json

import pytest
import torch

import icl_helpers as icl
from icl_helpers.attention import interventions, passes
from icl_helpers.attention.hook import attention_layout
from icl_helpers.cli import main
from icl_helpers.run.check import Check, ModelCheck
from tests.attention.test_hook import FAMILIES, make
from tests.conftest import make_llama

CONDITIONS = ("full model", "zero", "mean", "knockout")
NAMES = [
    "no intervention", "zero ablation", "mean ablation", "knockout", "grouped queries",
    *(f"{kind}, {name}" for name in CONDITIONS for kind in ("padded batch", "generation")),
]  # fmt: skip


def failed(model) -> list[str]:
    found = icl.check_model(model)
    assert [check.name for check in found.checks] == NAMES
    names = [check.name for check in found.checks if check.verdict == "FAIL"]
    assert found.passes == (not names)
    return names


def test_command_checks_the_embedded_model_in_two_dtypes(tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main(["check", "icl-tiny", "--json", str(report)]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(report.read_text())
    assert found["passes"]
    rows = {(row["weights"], row["name"]): row for row in found["checks"]}
    assert list(rows) == [(weights, name) for weights in ("float32", "bfloat16") for name in NAMES]
    own = [("bfloat16", f"{kind}, full model") for kind in ("padded batch", "generation")]
    left_out = [key for key, row in rows.items() if row["verdict"] != "pass"]
    assert left_out == own
    assert "by which the others are judged" in rows[own[0]]["reason"]
    assert rows["float32", "no intervention"]["difference"] == 0
    assert 0 < rows["float32", "knockout"]["difference"] < rows["float32", "knockout"]["bound"]
    assert printed[0] == "icl-tiny"
    assert printed[-1].startswith(f"2 not applicable, {len(rows) - 2} pass (")


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_models_of_every_family_pass(family):
    model = make(family)
    before = model.config._attn_implementation
    found = icl.check_model(model.train())
    left_out = {check.name: check.reason for check in found.checks if check.verdict != "pass"}
    shared = family in ("gpt2", "gpt_neox", "opt")
    assert left_out == (
        {"grouped queries": "every head has keys and values of its own"} if shared else {}
    )
    assert model.training
    assert model.config._attn_implementation == before


def test_a_loaded_model_is_named_without_its_place():
    model, _ = icl.load_model("icl-tiny", device="cpu")
    assert icl.check_model(model).model == "icl-tiny"


def test_a_norm_in_front_of_the_projection_is_what_comes_after_the_heads():
    from tests.attention.test_applied_or_refused import encoder

    model = encoder("bitnet", num_key_value_heads=2)
    for norm in (layer.self_attn.attn_sub_norm for layer in model.model.layers):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    assert failed(model) == []


# --- something is broken, and these checks say so


@pytest.fixture
def model():
    model = make_llama()
    attention_layout(model)  # what is broken below is not seen by the probe
    return model


def test_a_hook_that_changes_what_it_should_leave(model, monkeypatch):
    monkeypatch.setattr(passes.Passes, "at", lambda *_: [lambda call: call.output * 1.001])
    assert "no intervention" in failed(model)


def test_an_ablation_of_the_heads_beside(model, monkeypatch):
    def beside(heads, call):
        output = call.output.clone()
        output[:, :, [(head + 1) % 4 for head in heads]] = 0
        return output

    monkeypatch.setattr(interventions, "_zeroed", beside)
    assert failed(model) == ["zero ablation"]


def test_an_ablation_that_does_nothing(model, monkeypatch):
    monkeypatch.setattr(interventions, "_zeroed", lambda _, call: call.output)
    assert failed(model) == ["zero ablation"]
    assert failed(model.bfloat16()) == ["zero ablation"]


def test_means_of_the_position_beside(model, monkeypatch):
    def beside(edit, call):
        output = call.output.clone()
        output[:, :, edit.heads] = edit.outputs.roll(1, 0)[call.positions[0]].to(output)
        return output

    monkeypatch.setattr(interventions._GivenEdit, "__call__", beside)
    assert failed(model) == ["mean ablation"]


def test_a_knockout_of_the_whole_group(model, monkeypatch):
    right = interventions._knocked_out

    def whole_group(heads, window, call):
        heads = sorted({2 * (head // 2) + i for head in heads for i in (0, 1)})
        return right(heads, window, call)

    monkeypatch.setattr(interventions, "_knocked_out", whole_group)
    assert failed(model) == ["knockout", "grouped queries"]


def test_positions_that_forget_the_cache(model, monkeypatch):
    monkeypatch.setattr(passes.Passes, "offset", lambda *_: 0)
    assert failed(model) == ["generation, mean"]


def test_a_pattern_of_the_first_row_for_all(model, monkeypatch):
    right = interventions._BlockedWindow.at

    def first_row(window, call):
        found = right(window, call)
        return found[:1].expand_as(found) if found.ndim == 3 else found

    monkeypatch.setattr(interventions._BlockedWindow, "at", first_row)
    assert failed(model) == ["knockout", "padded batch, knockout"]


def test_a_broken_model_makes_the_command_fail(model, monkeypatch, capsys):
    monkeypatch.setattr(interventions, "_zeroed", lambda _, call: call.output)
    assert main(["check", "icl-tiny", "--dtypes", "float32"]) == 1
    assert "FAIL" in capsys.readouterr().out


# --- what cannot be told


def test_an_effect_within_rounding_is_no_pass():
    model = make_llama(initializer_range=0.002).bfloat16()
    checks = {check.name: check for check in icl.check_model(model).checks}
    assert checks["zero ablation"].verdict == "not applicable"
    assert "is rounding here" in checks["zero ablation"].reason


def test_a_difference_that_is_not_a_number_fails_and_is_null_in_json():
    check = Check("knockout", "float16", float("nan"), 0.03)
    assert check.verdict == "FAIL"
    assert ModelCheck("m", (check,), 1.0).as_dict()["checks"][0]["difference"] is None
    assert "1 FAIL" in str(ModelCheck("m", (check,), 1.0))


def test_a_dtype_is_checked_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("icl_helpers.run.check.load_model", None)
    with pytest.raises(icl.InputError, match="dtype must be one of .* got 'float8'"):
        icl.check_model("icl-tiny", dtypes=["float32", "float8"])


@pytest.mark.slow
def test_quantised_weights_are_checked_as_they_are():
    pytest.importorskip("bitsandbytes")
    found = icl.check_model("icl-tiny", dtypes=["float32"], quantization="4bit", device="cpu")
    assert found.passes
    assert {check.weights for check in found.checks} == {"4bit, float32"}
