"""Two sample logs or runs beside each other: tests by hand and by enumeration, matching, refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import icl_helpers as icl
from icl_helpers.cli import main
from icl_helpers.evaluation.store import merge_into_run_tables
from icl_helpers.results.statistics import difference_interval


def write_log(
    folder: Path, task: str, right: dict[str, int], *, draw: str = "", date: int = 1, **more
) -> Path:
    """A sample log as lm-eval writes it; ``draw`` stands for the demonstrations in the prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"samples_{task}_2026-01-{date:02}T10-00-00.000001.jsonl"
    lines = [
        {"doc_id": place, "doc_hash": doc, "prompt_hash": f"{doc}{draw}", "filter": "none",
         "metrics": ["acc"], "acc": float(value), **more}
        for place, (doc, value) in enumerate(right.items())
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def named(values) -> dict[str, int]:
    return {f"d{place}": int(value) for place, value in enumerate(values)}


def by_enumeration(one: np.ndarray, other: np.ndarray) -> float:
    """The share of all ways to swap A and B within documents that differ as much as was seen."""
    gaps = (other - one).reshape(len(one), -1).sum(1)
    sums = [abs(np.dot(signs, gaps)) for signs in itertools.product((1, -1), repeat=len(gaps))]
    return float(np.mean([found >= abs(gaps.sum()) for found in sums]))


def test_one_log_each_is_the_exact_mcnemar_test_by_hand(tmp_path):
    # Of 12 documents B alone has 9 right, A alone 1, and both have 2.
    first = write_log(tmp_path / "a", "sums", named([0] * 9 + [1] * 3))
    second = write_log(tmp_path / "b", "sums", named([1] * 9 + [0, 1, 1]))
    (row,) = icl.compare_logs(first, second).table.to_dict("records")
    assert (row["task"], row["documents"], row["runs"]) == ("sums", 12, 1)
    assert row["first"] == pytest.approx(25)
    assert row["second"] == pytest.approx(100 * 11 / 12)
    assert row["difference"] == pytest.approx(100 * 8 / 12)
    assert row["p"] == pytest.approx(2 * (1 + 10) / 2**10)
    assert row["low"] > 0
    assert row["distinguishable"]


def test_documents_and_seeds_are_crossed_as_enumeration_has_it(tmp_path):
    rng = np.random.default_rng(3)
    one, other = rng.random((2, 10, 3)) < [[[0.4]], [[0.7]]]
    for side, array, dates in (("a", one, (1, 2, 3)), ("b", other, (3, 1, 2))):
        for seed, date in enumerate(dates):  # B's draws were made in another order
            right = named(array[:, seed])
            if side == "b":
                right = dict(reversed(right.items()))
            write_log(tmp_path / side, "sums", right, draw=f"-{seed}", date=date)
    (row,) = icl.compare_logs(tmp_path / "a", tmp_path / "b").table.to_dict("records")
    assert (row["documents"], row["runs"]) == (10, 3)
    assert row["first"] == pytest.approx(100 * one.mean())
    assert row["p"] == pytest.approx(by_enumeration(one.astype(int), other.astype(int)))
    # Widened by the spread over draws, which depends on which belong together.
    expected = difference_interval(other.astype(int), one.astype(int))
    assert [row["low"], row["high"]] == pytest.approx([100 * expected.low, 100 * expected.high])


def test_p_values_are_corrected_over_the_tasks_and_tell_with_the_interval(tmp_path):
    for task, wins in (("large", 9), ("small", 7), ("none", 0)):
        write_log(tmp_path / "a", task, named([0] * 9 + [1] * 3))
        write_log(tmp_path / "b", task, named([1] * wins + [0] * (9 - wins) + [1] * 3))
    table = icl.compare_logs(tmp_path / "a", tmp_path / "b").table.set_index("task")
    assert table["p"].to_dict() == pytest.approx({"large": 2 / 2**9, "small": 2 / 2**7, "none": 1})
    holm = {"large": 3 * 2 / 2**9, "small": 2 * 2 / 2**7, "none": 1}
    assert table["p_holm"].to_dict() == pytest.approx(holm)
    assert table["distinguishable"].to_dict() == {"large": True, "small": True, "none": False}


def test_what_only_one_log_has_is_counted_and_named(tmp_path):
    write_log(tmp_path / "a", "sums", named([1, 0, 1, 0]))
    write_log(tmp_path / "a", "apart", named([1, 0]))
    write_log(tmp_path / "b", "sums", {"d1": 1, "d2": 1, "other": 0})
    found = icl.compare_logs(tmp_path / "a", tmp_path / "b")
    (row,) = found.table.to_dict("records")
    assert (row["documents"], row["first"], row["second"]) == (2, 50, 100)
    assert found.left_out == (
        "only in A: 2 documents of apart (d0, d1, ...)",
        "only in A: 2 documents of sums (d0, d3, ...)",
        "only in B: 1 documents of sums (other, ...)",
    )
    assert found.left_out[2] in str(found)


def test_the_same_content_twice_is_two_documents_and_a_repeated_log_is_one(tmp_path):
    path = write_log(tmp_path / "a", "sums", named([1, 0, 1]), date=1)
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    write_log(tmp_path / "b", "sums", named([0, 0, 0]), date=1)
    newer = write_log(tmp_path / "b", "sums", named([1, 0, 1]), date=2)
    newer.write_text(newer.read_text() + newer.read_text().splitlines()[1] + "\n")
    (row,) = icl.compare_logs(tmp_path / "a", tmp_path / "b").table.to_dict("records")
    assert (row["documents"], row["runs"], row["difference"]) == (4, 1, 0)


def test_seeds_in_names_are_draws_and_a_text_may_hold_any_end_of_line(tmp_path):
    for side in ("a", "b"):
        for seed in (42, 43):
            write_log(tmp_path / side, f"sums_seed{seed}", named([1, 0, side == "b"]),
                      draw=f"-{seed}", doc={"text": "one\u2028two\x0bthree"})  # fmt: skip
    (row,) = icl.compare_logs(tmp_path / "a", tmp_path / "b").table.to_dict("records")
    assert (row["task"], row["documents"], row["runs"]) == ("sums", 3, 2)


def test_metric_and_filter_are_the_first_or_those_named(tmp_path):
    for side, strict in (("a", 0), ("b", 1)):
        path = write_log(tmp_path / side, "sums", named([0, 0]), metrics=["loss", "acc"], loss=0.7)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines += [line | {"filter": "strict", "acc": strict} for line in lines]
        path.write_text("\n".join(map(json.dumps, lines)))
    compare = [tmp_path / "a", tmp_path / "b"]
    assert icl.compare_logs(*compare).table["difference"].tolist() == [0]
    assert icl.compare_logs(*compare, metric="acc,strict").table["difference"].tolist() == [100]
    with pytest.raises(icl.InputError, match=r"loss is 0.7, neither 0 nor 1; .* loss, acc"):
        icl.compare_logs(*compare, metric="loss")
    with pytest.raises(icl.InputError, match="no sample of acc,lenient"):
        icl.compare_logs(*compare, metric="acc,lenient")


def write_run(directory: Path, right: dict[str, list[int]], *, target: int = 0) -> Path:
    rows = [
        {"task": "repetition", "labels": "unrelated", "shots": 5, "condition": condition,
         "ablation": "none" if condition == "full" else "mean", "ablation_seed": None,
         "fraction": None if condition == "full" else 0.05, "control": "", "doc_id": doc,
         "demonstration_seed": seed, "correct": bool(value), "valid": True, "target": target}
        for condition, values in right.items()
        for seed in (42, 43)
        for doc, value in enumerate(values)
    ]  # fmt: skip
    frame = pd.DataFrame(rows).astype({"ablation_seed": "Int64", "fraction": "float64"})
    directory.mkdir()
    merge_into_run_tables(directory, frame.assign(margin=0.0))
    return directory


def test_runs_are_compared_condition_by_condition(tmp_path):
    first = write_run(tmp_path / "a", {"full": [1] * 10, "induction_heads": [0] * 8 + [1, 1]})
    second = write_run(tmp_path / "b", {"full": [1] * 9 + [0], "induction_heads": [1] * 10})
    table = icl.compare_logs(first, second).table.set_index("condition")
    assert table["difference"].to_dict() == pytest.approx({"full": -10, "induction_heads": 80})
    assert table["p"].to_dict() == pytest.approx({"full": 1, "induction_heads": 2 / 2**8})
    assert set(table["runs"]) == {2}
    other = write_run(tmp_path / "c", {"full": [1] * 10}, target=1)
    with pytest.raises(icl.InputError, match="document 0 of repetition has another right label"):
        icl.compare_logs(first, other)


def test_what_cannot_be_compared_is_one_error(tmp_path):
    log = write_log(tmp_path / "a", "sums", named([1, 0]))
    write_log(tmp_path / "two" / "x", "sums", named([1, 0]))
    write_log(tmp_path / "two" / "y", "sums", named([1, 0]))
    run = write_run(tmp_path / "run", {"full": [1, 0]})
    more = [
        write_log(tmp_path / "more", "sums", named([1, 0]), draw=f"-{i}", date=i) for i in (1, 2)
    ]
    (tmp_path / "broken.jsonl").write_text('{"doc_id": 1}\n')
    cases = {
        "is no sample log": tmp_path / "no-such-folder",
        "several models; name one": tmp_path / "two",
        "one is a run": run,
        "there are 1 and 2 logs": more[0].parent,
        "line 1 of .*broken.jsonl is no sample": tmp_path / "broken.jsonl",
        "share no cell": write_log(tmp_path / "b", "products", named([1, 0])),
    }
    for message, other in cases.items():
        with pytest.raises(icl.InputError, match=message):
            icl.compare_logs(log, other)


@pytest.mark.slow
def test_logs_of_lm_eval_itself_are_read_and_agree_with_its_own_accuracies(tmp_path, capsys):
    accuracies = {}
    for name, condition in (("full", ""), ("edited", ",ablate=induction,ablation=zero")):
        out = tmp_path / name
        assert main([
            "lm-eval", "--model", "hf-icl", "--model_args", f"pretrained=icl-tiny{condition}",
            "--tasks", "wordseq1_binary_seeds", "--num_fewshot", "5", "--limit", "25",
            "--output_path", str(out), "--log_samples",
        ]) == 0  # fmt: skip
        (path,) = out.rglob("results_*.json")
        results = json.loads(path.read_text())["results"]
        seeds = [f"wordseq1_binary_seed{seed}" for seed in (42, 43, 44)]
        accuracies[name] = 100 * np.mean([results[seed]["acc,none"] for seed in seeds])
    capsys.readouterr()
    report = tmp_path / "report.json"
    sides = [str(tmp_path / "full"), str(tmp_path / "edited")]
    assert main(["compare", *sides, "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    (row,) = json.loads(report.read_text())["rows"]
    assert (row["task"], row["documents"], row["runs"]) == ("wordseq1_binary", 25, 3)
    assert row["first"] == pytest.approx(accuracies["full"])
    assert row["second"] == pytest.approx(accuracies["edited"])
    assert f"{row['difference']:+.1f}" in printed
    assert row["distinguishable"] == ("yes" in printed.splitlines()[3])
