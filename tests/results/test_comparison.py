"""Runs side by side, and a run of a paper's model over the published values, from written runs."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import icl_helpers as icl
from icl_helpers.evaluation.store import merge_into_run_tables
from icl_helpers.results.comparison import compare_runs, overlay
from icl_helpers.run.plan import run_table


def write_run(directory: Path, model: str, *, fraction: float, right: dict[str, int]) -> Path:
    """A run whose documents are right as often in 20 as ``right`` says."""
    rows = []
    for condition, count in right.items():
        ablation = "none" if condition == "full" else "mean"
        for seed in (42, 43):
            for doc in range(20):
                rows.append(
                    {"task": "repetition", "labels": "unrelated", "shots": 10,
                     "condition": condition, "ablation": ablation,
                     "fraction": 0.0 if condition == "full" else fraction, "ablation_seed": None,
                     "demonstration_seed": seed, "doc_id": doc, "correct": doc < count,
                     "margin": 0.0, "valid": True}
                )  # fmt: skip
    frame = pd.DataFrame(rows).astype({"ablation_seed": "Int64"})
    directory.mkdir()
    merge_into_run_tables(directory, frame)
    info = {"model": model, "parameters": {"seeds": [42, 43], "fractions": None}}
    (directory / "run.json").write_text(json.dumps(info))
    return directory


def test_runs_stand_side_by_side_with_their_change_to_the_full_model(tmp_path):
    first = write_run(
        tmp_path / "a", "icl-tiny", fraction=0.06, right={"full": 18, "induction_heads": 10}
    )
    second = write_run(
        tmp_path / "b", "gpt2", fraction=0.03, right={"full": 12, "induction_heads": 11}
    )
    runs = {path.name: path for path in (first, second)}
    models = {"a": "icl-tiny", "b": "gpt2"}
    results = {name: pd.read_parquet(path / "results.parquet") for name, path in runs.items()}
    found = compare_runs({name: (models[name], results[name], 100) for name in runs}).set_index(
        ["model", "condition"]
    )
    assert found["accuracy"].to_dict() == pytest.approx(
        {("icl-tiny", "full"): 90, ("icl-tiny", "induction_heads"): 50,
         ("gpt2", "full"): 60, ("gpt2", "induction_heads"): 55}
    )  # fmt: skip
    assert found.loc[("icl-tiny", "induction_heads"), "change"] == pytest.approx(-40)
    assert found.loc[("gpt2", "induction_heads"), "share"] == "larger"
    assert set(found["documents"]) == {20}
    assert found.loc[("icl-tiny", "induction_heads"), "heads"] == "6 of 100 heads (6.0 %)"
    assert found.loc[("gpt2", "full"), "heads"] == ""


def test_overlay_has_the_published_value_beside_the_run_of_the_same_model(tmp_path):
    model = "meta-llama/Meta-Llama-3-8B"
    run = write_run(tmp_path / "a", model, fraction=0.03, right={"full": 18, "induction_heads": 10})
    found = overlay(model, icl.document_results(run))
    assert found is not None
    published = icl.published_accuracy().query(
        "table == 1 and model == 'Llama-3-8B' and task == 'repetition' and shots == 10"
        " and condition == 'induction_heads' and fraction == 0.03"
    )["accuracy"]
    row = found.query("table == 1 and condition == 'induction_heads'").iloc[0]
    assert row["published"] == published.item()
    assert row["accuracy"] == pytest.approx(50)
    assert row["difference"] == pytest.approx(50 - published.item())
    assert row["inside"] == (row["low"] <= published.item() <= row["high"])


def test_overlay_leaves_out_fractions_that_were_not_published(tmp_path):
    model = "internlm/internlm2-20b"
    run = write_run(tmp_path / "a", model, fraction=0.05, right={"full": 18, "induction_heads": 10})
    found = overlay(model, icl.document_results(run))
    assert found is not None
    assert set(found["condition"]) == {"full"}


def test_no_overlay_for_another_model_and_none_without_a_run(tmp_path):
    run = write_run(tmp_path / "a", "icl-tiny", fraction=0.06, right={"full": 18})
    assert overlay("icl-tiny", icl.document_results(run)) is None
    with pytest.raises(icl.InputError, match=r"run\.json does not exist"):
        run_table(tmp_path, "results", "tasks")
    with pytest.raises(icl.InputError, match="at least one"):
        compare_runs({})
