"""The libraries side by side: what each computes, rounds that go on, and the bars made of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import icl_helpers as icl
from icl_helpers.errors import InputError
from tests.benchmark import side_by_side
from tests.benchmark.libraries import LIBRARIES, Ours, Part, Plain, Sequences, StockLMEval, answer
from tests.benchmark.page import draw_libraries, with_measurements
from tests.benchmark.side_by_side import CASES, CONDITIONS, SMOLLM2_SHAPE, measure_side_by_side
from tests.benchmark.test_benchmark import EMPTY, PAGE
from tests.conftest import make_llama

HEADS = [[0, 1], [1, 3], [1, 2]]
# Labels of one to three tokens; the second context is longer than the first.
LABELS = ("Foo", "Bar", "Bar mango zq")
SHAPE = {"vocab_size": 2000, "num_hidden_layers": 2, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    model = make_llama(**SHAPE)
    for part in (model, icl.load_model("icl-tiny")[1]):
        part.save_pretrained(folder)
    means = torch.randn(2, 300, 4, 8, generator=torch.Generator().manual_seed(1))
    save_file({"means": means}, folder / "means.safetensors")
    pairs = [[f"apple dog:{a}\n\npear cat:", label] for a in ("Foo", "Bar Bar") for label in LABELS]
    return {
        "model": "tiny", "directory": str(folder), "means": str(folder / "means.safetensors"),
        "batch": 4, "threads": 1, "documents": 2, "heads": HEADS,
        "cases": {"some": {"pairs": pairs, "checked": 3}},
        "seven": [("none", []), ("zero", HEADS), ("knockout", HEADS)],
    }  # fmt: skip


def by_hand(plan, condition: str) -> list[float]:
    """Each label on its own, token by token; heads ablated by columns of the output projection.

    A head that gives zero is one whose columns are zero; one that gives its mean adds the product
    of those columns and the mean, position by position.
    """
    model = make_llama(**SHAPE)
    tokenizer = icl.load_model("icl-tiny")[1]
    means = LIBRARIES["plain forward"](plan).means
    added = {}
    for layer, head in HEADS if condition != "full" else []:
        weight = model.model.layers[layer].self_attn.o_proj.weight
        columns = slice(8 * head, 8 * head + 8)
        if condition == "mean":
            term = means[layer, :, head] @ weight[:, columns].T.detach()
            added[layer] = added.get(layer, 0) + term
        with torch.no_grad():
            weight[:, columns] = 0
    for layer, term in added.items():
        model.model.layers[layer].self_attn.o_proj.register_forward_hook(
            lambda module, given, output, term=term: output + term[: output.shape[1]]
        )
    values = []
    for context, label in plan["cases"]["some"]["pairs"]:
        n = len(tokenizer(context, add_special_tokens=False).input_ids)
        ids = tokenizer(context + label, add_special_tokens=False).input_ids
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        values.append(sum(float(logits[at - 1, ids[at]]) for at in range(n, len(ids))))
    return values


@pytest.mark.parametrize("condition", ["full", "zero", "mean"])
def test_each_library_at_hand_scores_what_single_labels_by_hand_give(plan, condition):
    expected = by_hand(plan, condition)
    for library in (Plain, StockLMEval, Ours):
        if library is Plain or condition not in library.cannot:
            found = library(plan).score(plan["cases"]["some"]["pairs"], condition)
            assert found == pytest.approx(expected, abs=1e-4), library


def test_ablations_are_told_from_each_other(plan):
    full, zero, mean = (by_hand(plan, name) for name in ("full", "zero", "mean"))
    for one, other in ((full, zero), (full, mean), (zero, mean)):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.01


def test_a_library_of_logits_edits_a_copy_of_just_the_heads_named(plan):
    library = Sequences(plan)
    outputs = torch.randn(2, 5, 4, 8)
    before = outputs.clone()
    for condition, put in (("zero", torch.zeros(5, 8)), ("mean", None)):
        edited = library.edited(1, outputs, condition)
        assert torch.equal(outputs, before)
        for head in range(4):
            wanted = library.means[1, :5, head] if put is None else put
            wanted = wanted.expand(2, 5, 8) if head in (2, 3) else before[:, :, head]
            assert torch.equal(edited[:, :, head], wanted)


def test_sequences_are_those_that_are_run(plan):
    pairs = plan["cases"]["some"]["pairs"]
    tokenizer = icl.load_model("icl-tiny")[1]
    rows = set()
    for context, label in pairs:
        rows.add(tuple(tokenizer(context + label, add_special_tokens=False).input_ids[:-1]))
    assert StockLMEval(plan).sequences(pairs) == len(rows) > 2
    assert Ours(plan).sequences(pairs) == Plain(plan).sequences(pairs) == 2
    assert Sequences(plan).sequences(pairs) == 6


def test_a_part_goes_on_only_with_the_same_plan(plan, tmp_path):
    path, raw = tmp_path / "part.json", json.dumps(plan).encode()
    library, part = Plain(plan), Part(path, Plain, raw)
    for what in ("check", "time", "time"):
        answer(library, part, {"case": "some", "condition": "full", "what": what})
    kept = Part(path, Plain, raw).content
    cell = kept["cells"]["some/full"]
    assert (len(cell["check"]), len(cell["seconds"]), cell["sequences"]) == (1, 2, [2])
    assert len(cell["check"][0]) == 3
    assert {"python", "torch", "transformers"} <= set(kept["versions"])
    assert kept["processor"]
    assert len(kept["date"]) == 10
    assert Part(path, Plain, raw + b" ").content["cells"] == {}


@pytest.mark.slow
def test_what_only_one_library_needs_is_imported_by_it_alone():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['icl_helpers', 'lm_eval', 'nnsight', "
        "'transformer_lens']));\nimport tests.benchmark.libraries"
    )
    root = Path(side_by_side.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


PLAN = {
    "model": "random weights", "threads": 1, "documents": 4, "batch": 8, "heads": HEADS,
    "seven": [("none", [])] * 7,
}  # fmt: skip


def cells(rounds: dict[str, list[float]]):
    """A library's part in which every cell took the same times."""
    one = {"check": [[-1.0, -2.0]], "sequences": [8], "peak_bytes": [5_000_000_000, 1, 1]}
    names = [f"{case}/{condition}" for case in CASES for condition in CONDITIONS]
    return {
        "versions": {"python": "3", "torch": "2", "transformers": "5", "some": "1"},
        "cells": {name: {**one, "seconds": rounds[name.split("/")[1]]} for name in names},
    }


def test_bars_are_medians_of_ratios_round_by_round():
    same = {key: [2.0, 4.0, 8.0] for key in CONDITIONS}
    parts = {
        "plain forward": cells(same), "icl_helpers": cells({**same, "seven": [7.0, 7.0, 56.0]}),
        "stock lm-eval": cells({**same, "full": [6.0, 4.0, 24.0]}),
        "TransformerLens": cells({**same, "zero": [10.0, 20.0, 8.0]}),
    }  # fmt: skip
    parts["TransformerLens"]["cells"][f"{next(iter(CASES))}/mean"]["check"] = [[-1.0, -2.001]]
    found = side_by_side._section(PLAN, parts, {"nnsight": "not installed for this run"}, 3)
    rows = {(row["what"], row["model"]): row for row in found["rows"]}
    two, four = CASES
    plain = "one document, all labels / plain forward of its prompt"
    assert [rows[plain, case]["median"] for case in CASES] == [1, 1]
    assert [rows[plain, case]["bar"] for case in CASES] == [1.0, 1.1]
    stock = rows["documents per second, full model / stock lm-eval", two]
    assert (stock["median"], stock["low"], stock["met"]) == (3, 1, True)
    zero = "documents per second, zero ablation / TransformerLens"
    assert (rows[zero, two]["met"], rows[zero, four]["met"]) == (True, True)
    assert rows[zero, four]["median"] == 5
    # 7 / 14, 7 / 28, 56 / 56 of seven plain forwards.
    assert rows["seven conditions / seven plain forwards", two]["median"] == 0.5
    assert not any("nnsight" in what for what, _ in rows)
    differences = {what: row for (what, _), row in rows.items() if "largest difference" in what}
    assert len(differences) == 3
    (missed,) = (row for row in differences.values() if not row["met"])
    assert "TransformerLens" in missed["what"]
    assert missed["median"] == pytest.approx(1e-3)
    assert found["trial"]
    mine = [c for c in found["cells"] if c["library"] == "icl_helpers" and c["case"] == two]
    assert [c["documents_per_second"] for c in mine] == [1, 1, 1, 4]
    assert [c["over_plain"] for c in mine] == [1, 1, 1, 0.5]
    assert {c["peak_bytes"] for c in mine} == {5_000_000_000}


def test_a_page_shows_every_cell_or_why_there_is_none(tmp_path):
    parts = {name: cells({key: [2.0] for key in CONDITIONS}) for name in LIBRARIES}
    del parts["nnsight"]
    found = side_by_side._section(PLAN, parts, {"nnsight": "not installed for this run"}, 1)
    shown = with_measurements(PAGE, {**EMPTY, "side_by_side": found})
    assert "A trial run" in shown
    assert "random weights" in shown
    assert "no: not installed for this run" in shown
    assert "no: lm-eval ablates no heads" in shown
    assert "2.00 (1.00)" in shown
    assert "5.00" in shown
    assert found["machine"]["date"] in shown
    assert with_measurements(shown, {**EMPTY, "side_by_side": found}) == shown
    full = {**found, "trial": False}
    assert "trial" not in with_measurements(PAGE, {**EMPTY, "side_by_side": full})
    draw_libraries(found["cells"], tmp_path / "bars.svg")
    assert (tmp_path / "bars.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize("given", [{"rounds": 0}, {"documents": 0}])
def test_less_than_one_is_refused(given, tmp_path):
    with pytest.raises(InputError, match="at least 1"):
        measure_side_by_side(tmp_path, **given)


def test_the_shape_is_that_of_the_real_model():
    from icl_helpers.run.costs import parameter_counts

    assert parameter_counts(SMOLLM2_SHAPE)[0] == 134_515_008


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Processes and all, on a tiny shape; without an environment for TransformerLens and nnsight."""
    shape = make_llama(**SHAPE, max_position_embeddings=1024).config
    options = {"rounds": 2, "documents": 2, "shape": shape}
    sent: list[dict] = []
    send = side_by_side._send

    def stopping(process, asked):
        if len(sent) == 20:
            raise KeyboardInterrupt
        sent.append(asked)
        send(process, asked)

    monkeypatch.setattr(side_by_side, "_send", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure_side_by_side(tmp_path / "work", **options)
    kept = {path.stem: path.read_text() for path in (tmp_path / "work").glob("*.json")}
    assert set(kept) == {"plan", "plain forward", "stock lm-eval", "icl_helpers"}
    monkeypatch.setattr(side_by_side, "_send", lambda *given: (sent.append(given[1]), send(*given)))
    found = measure_side_by_side(tmp_path / "work", **options)
    # Two cases: checks of 3 + 1 + 3 cells, twice the times of 1 + 1 + 4; none asked for twice but
    # the one that was stopped.
    assert len(sent) in (2 * (7 + 2 * 6), 2 * (7 + 2 * 6) + 1)
    assert found["model"] == "random weights, 2 layers of 32"
    assert not (tmp_path / "work").exists()
    assert all(row["met"] for row in found["rows"] if "largest difference" in row["what"])
    absent = {
        c["library"] for c in found["cells"] if c.get("cannot") == "not installed for this run"
    }
    assert absent == {"TransformerLens", "nnsight"}
    assert len(found["cells"]) == 2 * 4 * 5
