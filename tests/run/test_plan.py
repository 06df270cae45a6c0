"""The plan of a run: what it evaluates, and which rows of a table are its own."""

from __future__ import annotations

import json

import pandas as pd
import pytest

import icl_helpers as icl
from icl_helpers.evaluation.store import KEYS, document_results
from icl_helpers.parameters import about
from icl_helpers.run.plan import Plan

SMALL = {
    "tasks": ["repetition"], "nlp_tasks": [], "shots": [0], "seeds": [42], "limit": 3,
    "fractions": [0.1], "ablation_seeds": [42],
}  # fmt: skip
# Another value of every parameter that decides results or which there are. Stages on data that are
# not here, other weights and remote code have tests of their own.
CHANGES = {
    "tasks": ["recursion"], "shots": [1], "seeds": [43], "limit": 2, "fractions": [0.2],
    "ablation_seeds": [43], "control": "strict", "sampling": "first", "categories": ["labels"],
    "average": "head_output", "positions": 300, "dtype": "bfloat16", "demonstrations": "fewer",
}  # fmt: skip
ELSEWHERE = {
    "model", "revision", "quantization", "trust_remote_code", "nlp_tasks", "labels", "data",
    "data_dir", "reference",
}  # fmt: skip


def run(directory, **changes) -> icl.Run:
    return icl.Run(icl.stage_parameters(**{**SMALL, **changes, "run_dir": str(directory)}))


def numbers(of: icl.Run) -> pd.DataFrame:
    frame = of.documents()
    keys = [*KEYS, "doc_id"]
    return frame[[*keys, "correct", "margin", "valid"]].sort_values(keys, ignore_index=True)


def test_every_parameter_that_decides_anything_is_tried():
    deciding = {name for name, *_, declared in about() if declared.decides != "nothing"}
    assert deciding == set(CHANGES) | ELSEWHERE


@pytest.mark.parametrize("name", CHANGES)
def test_rows_of_another_setting_in_the_same_directory_are_never_among_the_results(name, tmp_path):
    kinds = ("full", "mean", "knockout")
    run(tmp_path / "used").evaluate(*kinds)
    changed = {name: CHANGES[name]}
    before = run(tmp_path / "used", **changed)
    # What does not depend on the parameter is the same number either way; the rest is no result.
    stored, key = document_results(tmp_path / "used"), before.identity["key"]
    assert len(before.plan.selected(stored, "tasks", key)) < len(stored)
    before.evaluate(*kinds)
    fresh = run(tmp_path / "fresh", **changed)
    fresh.evaluate(*kinds)
    pd.testing.assert_frame_equal(numbers(before), numbers(fresh))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["rope_parameters"].update(rope_theta=50.0),
        lambda config: config.update(rms_norm_eps=0.5),
        lambda config: config.update(bos_token_id=7),
    ],
)
def test_other_settings_of_the_same_weights_are_another_model(change, tmp_path):
    model, tokenizer = icl.load_model("icl-tiny")
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "reference": __file__}
    first = run(tmp_path / "used", **given)
    first.evaluate("full")
    scores = first.prefix_scores()
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    second, fresh = run(tmp_path / "used", **given), run(tmp_path / "fresh", **given)
    for each in (second, fresh):
        each.evaluate("full")
    assert second.identity["key"] == fresh.identity["key"] != first.identity["key"]
    pd.testing.assert_frame_equal(numbers(second), numbers(fresh))
    assert (second.prefix_scores() == fresh.prefix_scores()).all()
    assert not (second.prefix_scores() == scores).all()


def test_rows_that_say_nothing_of_their_setting_are_left_out(tmp_path):
    model, tokenizer = icl.load_model("icl-tiny")
    icl.evaluate(model, tokenizer, tasks=["repetition"], shots=[0], seeds=[42], limit=3,
                 run_dir=tmp_path)  # fmt: skip
    rows = document_results(tmp_path)
    plan, key = Plan(icl.stage_parameters(**SMALL)), {"fingerprint": "any"}
    assert len(rows) == 3
    assert plan.selected(rows, "tasks", key).empty
    assert plan.selected(rows.drop(columns="setting"), "tasks", key).empty


def test_prompt_sets_are_those_of_every_task_labels_shots_and_seed():
    plan = Plan(icl.stage_parameters(tasks=["repetition"], nlp_tasks=["sst2"], seeds=[1, 2]))
    found = [(s.labels, s.shots, s.seeds) for s in plan.prompt_sets("nlp_tasks")]
    assert found == [
        ("semantic", 0, (1, 2)), *(("semantic", n, (s,)) for n in (5, 10) for s in (1, 2)),
        ("unrelated", 0, (1, 2)), *(("unrelated", 10, (s,)) for s in (1, 2)),
    ]  # fmt: skip
    assert [s.shots for s in plan.prompt_sets()] == [0, 5, 5, 10, 10]


def test_closer_stages_take_the_first_task_of_each_kind_with_most_examples_and_the_first_seed():
    plan = Plan(icl.stage_parameters(seeds=[7, 8]))
    found = [(s.task, s.shots, s.seeds) for s in plan.analysis_sets()]
    assert found == [
        ("repetition", 10, (7,)), ("wordseq1_binary", 10, (7,)), ("wordseq1_4way", 20, (7,))
    ]  # fmt: skip
    chosen = icl.stage_parameters(
        tasks=["wordseq2_binary"], analysis_tasks=["recursion"], shots=[3]
    )
    assert [(s.task, s.shots) for s in Plan(chosen).analysis_sets()] == [("recursion", 3)]
    assert [
        s.task for s in Plan(icl.stage_parameters(tasks=["wordseq2_4way"])).analysis_sets()
    ] == ["wordseq2_4way"]
    with pytest.raises(icl.InputError, match="analysis_limit must be >= 2"):
        icl.stage_parameters(analysis_limit=1)
    with pytest.raises(icl.InputError, match="unknown task 'nowhere'"):
        icl.stage_parameters(analysis_tasks=["nowhere"])
