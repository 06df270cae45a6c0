"""The benchmark's own arithmetic, its GPU part on a small model, and its page."""

from __future__ import annotations

import json

import pytest
import torch

import icl_helpers as icl
from icl_helpers.book.performance import write_benchmark_page
from icl_helpers.run.costs import parameter_counts
from tests.benchmark.evaluation import prompt_rows
from tests.benchmark.gpu import LLAMA_8B, measure_gpu
from tests.benchmark.growth import measure_growth
from tests.benchmark.tools import alternate, prompt_batch, ratio_row, spread_heads
from tests.conftest import make_llama

PAGE = "# Performance\n\n<!-- measurements -->\n"


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


@pytest.mark.slow
def test_the_gpu_part_measures_any_shape_on_any_device(tokenizer):
    small = make_llama(vocab_size=2000, num_hidden_layers=2).config
    found = measure_gpu(tokenizer, config=small, device="cpu", documents=4, rounds=1)
    assert found["peak_bytes"] is None
    rates = found["tokens_per_second"]
    assert len(rates) == 5
    assert all(rate > 0 for rate in rates.values())
    hours = found["table_1_tokens"] / rates["icl.evaluate, zero ablation"] / 3600
    assert found["table_1_hours"] == pytest.approx(hours)


@pytest.mark.slow
def test_the_page_says_what_was_measured_missed_or_left_out(tokenizer, tmp_path):
    torch.set_num_threads(1)
    (tmp_path / "_static").mkdir()
    page = tmp_path / "performance.md"
    page.write_text(PAGE)
    write_benchmark_page(tmp_path)
    assert "Nothing was measured" in page.read_text()
    config = {"num_hidden_layers": 2, "vocab_size": tokenizer.vocab_size + 10}
    growth = measure_growth(make_llama(max_position_embeddings=1024, **config), tokenizer, rounds=1)
    assert {point["axis"] for point in growth} == {
        "tokens per prompt", "prompts per batch", "share of heads", "conditions",
    }  # fmt: skip
    found = {
        "machine": {"processor": "some"}, "rounds": 1, "gpu": None,
        "rows": [
            ratio_row("cheap", "m", 1.0, [0.5]), ratio_row("dear", "m", 1.0, [7.5]),
            *prompt_rows(tokenizer, 1),
        ],
        "floor": [],
        "growth": {"model": "m", "points": growth},
    }  # fmt: skip
    (tmp_path / "_static" / "benchmark.json").write_text(json.dumps(found))
    page.write_text(PAGE)
    write_benchmark_page(tmp_path)
    shown = page.read_text()
    missed = sum(not row["met"] for row in found["rows"])
    assert f"{missed} of 5 bars are missed" in shown
    assert "7.5" in shown
    assert "Not measured: the machine had no GPU" in shown
    assert (tmp_path / "_static" / "benchmark_growth.svg").is_file()
