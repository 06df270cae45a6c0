"""The benchmark's own arithmetic, its GPU part on a small model, and its page."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import icl_helpers as icl
from icl_helpers.files import book_dir
from icl_helpers.run.costs import parameter_counts
from tests.benchmark.evaluation import prompt_rows
from tests.benchmark.gpu import EVALUATED, LLAMA_8B, measure_gpu
from tests.benchmark.growth import measure_growth
from tests.benchmark.page import BEGIN, END, with_measurements
from tests.benchmark.run import keep_measured
from tests.benchmark.tools import alternate, operations, prompt_batch, ratio_row, spread_heads
from tests.conftest import make_llama

PAGE = f"# Performance\n\n{BEGIN}\n{END}\n\n## How to read it\n"


@pytest.fixture(scope="module")
def tokenizer():
    return icl.load_model("icl-tiny")[1]


@pytest.mark.parametrize("number", [None, 1, 2, 5, 12])
def test_heads_are_distinct_and_spread_over_the_layers(number):
    model = make_llama()
    heads = spread_heads(model, number)
    assert len(set(heads)) == len(heads) == (number or 1)
    assert all(0 <= head.layer < 3 and 0 <= head.head < 4 for head in heads)
    if number == 5:
        assert {head.layer for head in heads} == {0, 1, 2}


def test_a_row_holds_the_median_and_says_whether_the_bar_is_met():
    low = ratio_row("a", "m", 1.0, [0.5, 3.0, 0.9])
    assert (low["median"], low["low"], low["high"], low["met"]) == (0.9, 0.5, 3.0, True)
    assert not ratio_row("a", "m", 2.0, [0.5, 3.0, 0.9], at="least")["met"]


def test_runs_alternate_after_one_uncounted_run_of_each():
    order: list[str] = []
    found = alternate(lambda: order.append("plain"), lambda: order.append("edited"), 3)
    assert order == ["plain", "edited"] * 4
    assert len(found) == 3


def test_a_batch_pads_on_the_right_and_blocks_only_real_tokens(tokenizer):
    ids, blocked = prompt_batch(tokenizer, shots=2, size=3)
    prompts = icl.build_prompts("repetition", shots=2, seed=42)[:3]
    for row, pairs, prompt in zip(ids, blocked, prompts, strict=True):
        own = tokenizer(prompt.context, add_special_tokens=False).input_ids
        assert row[: len(own)].tolist() == own
        assert not pairs[len(own) :].any()
        assert not pairs[:, len(own) :].any()
        assert pairs.any()


def test_the_gpu_shape_is_that_of_an_8b_llama():
    assert parameter_counts(LLAMA_8B)[0] == pytest.approx(8.03e9, rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scored", [None, 1])
def test_operations_are_those_that_torch_counts(tied, scored):
    model = make_llama(tie_word_embeddings=tied, attn_implementation="eager")
    ids = torch.randint(0, 400, (2, 24))
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        model(input_ids=ids, use_cache=False, logits_to_keep=scored or 0)
    total = None if scored is None else 2 * scored
    assert counted.get_total_flops() == operations(model, ids, scored=total)


@pytest.mark.slow
def test_the_gpu_part_measures_any_shape_on_any_device(tokenizer):
    small = make_llama(vocab_size=2000, num_hidden_layers=2, max_position_embeddings=1024).config
    found = measure_gpu(tokenizer, config=small, device="cpu", documents=4, rounds=1, square=64)
    rates = {row["what"]: row["rate"] for row in found["rates"]}
    assert list(rates) == [
        "plain forward", "zero ablation", "mean ablation", "knockout", EVALUATED,
        "stock lm-eval, full model",
    ]  # fmt: skip
    assert all(rate > 0 for rate in rates.values())
    assert {row["peak_bytes"] for row in found["rates"]} == {None}
    assert found["share"] > 0
    assert found["table_1_hours"] == pytest.approx(
        found["table_1_tokens"] / rates[EVALUATED] / 3600
    )
    shown = with_measurements(PAGE, {**EMPTY, "gpu": found})
    assert "not told off a GPU" in shown
    assert f"{found['share']:.0%} of the rate" in shown
    assert found["machine"]["date"] in shown


EMPTY = {
    "machine": {"processor": "some"}, "rounds": 1, "gpu": None, "floor": [],
    "rows": [ratio_row("cheap", "m", 1.0, [0.5]), ratio_row("dear", "m", 1.0, [7.5])],
    "growth": {
        "model": "m",
        "points": [
            {"axis": axis, "at": 2, "kind": "heads", "cost": 1.5}
            for axis in ("share of heads", "conditions")
        ],
    },
}  # fmt: skip


def test_the_page_says_what_was_measured_missed_or_left_out():
    shown = with_measurements(PAGE, EMPTY)
    assert shown.startswith("# Performance")
    assert shown.endswith("## How to read it\n")
    assert "1 of 2 bars are missed" in shown
    assert "7.5" in shown
    assert "Not measured: no GPU was at hand" in shown
    assert "Not measured yet" in shown
    # Written again it is the same, and what stood there before is gone.
    assert with_measurements(shown, EMPTY) == shown
    assert "7.5" not in with_measurements(shown, {**EMPTY, "rows": EMPTY["rows"][:1]})


def test_the_books_page_is_made_from_its_measurements():
    measured = json.loads((book_dir() / "_static" / "benchmark.json").read_text())
    page = (book_dir() / "performance.md").read_text()
    assert with_measurements(page, measured) == page


def test_a_section_is_kept_with_its_date_when_another_is_measured(tmp_path):
    (tmp_path / "_static").mkdir()
    (tmp_path / "performance.md").write_text(PAGE)
    keep_measured(EMPTY, tmp_path)
    path = keep_measured({"floor": [], "gpu": None, "rounds": 7}, tmp_path)
    kept = json.loads(path.read_text())
    assert kept == {**EMPTY, "rounds": 7}
    assert "Medians of at least 7" in (tmp_path / "performance.md").read_text()


@pytest.mark.slow
def test_growth_is_measured_along_four_axes_and_drawn(tokenizer, tmp_path):
    torch.set_num_threads(1)
    (tmp_path / "_static").mkdir()
    (tmp_path / "performance.md").write_text(PAGE)
    config = {"num_hidden_layers": 2, "vocab_size": tokenizer.vocab_size + 10}
    growth = measure_growth(make_llama(max_position_embeddings=1024, **config), tokenizer, rounds=1)
    assert {point["axis"] for point in growth} == {
        "tokens per prompt", "prompts per batch", "share of heads", "conditions",
    }  # fmt: skip
    rows = prompt_rows(tokenizer, 1)
    keep_measured({**EMPTY, "rows": rows, "growth": {"model": "m", "points": growth}}, tmp_path)
    assert "of 3 bars are" in (tmp_path / "performance.md").read_text().replace(
        "All 3 bars are", "0 of 3 bars are"
    )
    assert (tmp_path / "_static" / "benchmark_growth.svg").is_file()
