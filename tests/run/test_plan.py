"""The plan of a run: what it evaluates, and which rows of a table are its own."""

from __future__ import annotations

import json
import os
import shutil

import pandas as pd
import pytest
import torch

import icl_helpers as icl
from icl_helpers.evaluation.store import KEYS, document_results
from icl_helpers.parameters import about
from icl_helpers.run.plan import Plan, run_table
from tests.commands import FORKING
from tests.conftest import make_llama

SMALL = {
    "tasks": ["repetition"], "nlp_tasks": [], "shots": [0], "seeds": [42], "limit": 3,
    "fractions": [0.1], "ablation_seeds": [42], "positions": 80,
}  # fmt: skip
# Another value of every parameter that decides results or which there are. Stages on data that are
# not here, other weights and remote code have tests of their own.
CHANGES = {
    "tasks": ["recursion"], "shots": [1], "seeds": [43], "limit": 2, "fractions": [0.2],
    "ablation_seeds": [43], "control": "strict", "sampling": "first", "categories": ["labels"],
    "average": "head_output", "positions": 72, "dtype": "bfloat16", "demonstrations": "fewer",
}  # fmt: skip
ELSEWHERE = {
    "model", "revision", "quantization", "trust_remote_code", "nlp_tasks", "labels", "data",
    "data_dir", "reference",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def few_samples():
    """Of how many texts the means are is nothing that a parameter, a file or a model decides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icl_helpers.run.run.PAPER_SAMPLES", 20)
        yield


def run(directory, **changes) -> icl.Run:
    return icl.Run(icl.stage_parameters(**{**SMALL, **changes, "run_dir": str(directory)}))


def numbers(of: icl.Run, group="tasks") -> pd.DataFrame:
    frame = of.documents(group)
    keys = [*KEYS, "doc_id"]
    return frame[[*keys, "correct", "margin", "valid"]].sort_values(keys, ignore_index=True)


def test_every_parameter_that_decides_anything_is_tried():
    deciding = {name for name, *_, declared in about() if declared.decides != "nothing"}
    assert deciding == set(CHANGES) | ELSEWHERE


CONDITIONS = ("full", "mean", "knockout")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A directory with the results of the small run."""
    directory = tmp_path_factory.mktemp("evaluated") / "run"
    run(directory).evaluate(*CONDITIONS)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_rows_of_another_setting_in_the_same_directory_are_never_among_the_results(
    name, evaluated, tmp_path
):
    shutil.copytree(evaluated, tmp_path / "used")
    changed = {name: CHANGES[name]}
    before = run(tmp_path / "used", **changed)
    # What does not depend on the parameter is the same number either way; the rest is no result.
    stored, key = document_results(tmp_path / "used"), before.identity["key"]
    assert len(before.plan.selected(stored, "tasks", key)) < len(stored)
    before.evaluate(*CONDITIONS)
    fresh = run(tmp_path / "fresh", **changed)
    fresh.evaluate(*CONDITIONS)
    pd.testing.assert_frame_equal(numbers(before), numbers(fresh))


@pytest.mark.slow
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


def rewrite(path, change) -> None:
    """Change a JSON file, keeping its date."""
    before, content = path.stat(), json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_weight(path) -> None:
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-2] ^= 0x40
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# A change of every file of a checkpoint, and whether numbers depend on it.
FILES = {
    "config.json": (lambda path: rewrite(path, lambda c: c.update(rms_norm_eps=0.5)), True),
    "generation_config.json": (lambda path: rewrite(path, lambda c: c.update(top_k=3)), False),
    "model.safetensors": (change_weight, True),
    "tokenizer.json": (
        lambda path: rewrite(path, lambda c: c["model"].update(merges=c["model"]["merges"][:60])),
        True,
    ),
    # A token made of others: random sequences may not have it any more.
    "tokenizer_config.json": (
        lambda path: rewrite(path, lambda c: c.update(unk_token=merged(path))), None,
    ),
}  # fmt: skip


def merged(path) -> str:
    merges = json.loads((path.parent / "tokenizer.json").read_text())["model"]["merges"]
    return next("".join(pair) for pair in merges[20:] if "".join(pair).isascii())


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A tiny model's folder, and the parameters of a run of it."""
    for saved in (make_llama(), tokenizer):
        saved.save_pretrained(tmp_path / "model")
    text = "\n".join(p.context for p in icl.build_prompts("repetition", shots=2, seed=1)[:300])
    (tmp_path / "reference.txt").write_text(text)
    return {"model": str(tmp_path / "model"), "reference": str(tmp_path / "reference.txt")}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_checkpoint_is_computed_anew_or_makes_no_difference(
    name, checkpoint, tmp_path
):
    assert set(os.listdir(tmp_path / "model")) == set(FILES)
    kinds = ("full", "mean", "zero")
    first = run(tmp_path / "used", **checkpoint)
    first.evaluate(*kinds)
    before, key = numbers(first), first.identity["key"]
    change, matters = FILES[name]
    change(tmp_path / "model" / name)
    second, fresh = (run(tmp_path / where, **checkpoint) for where in ("used", "fresh"))
    if matters:
        with pytest.raises(icl.InputError, match="holds no results of this model"):
            second.results()
    for each in (second, fresh):
        each.evaluate(*kinds)
    pd.testing.assert_frame_equal(numbers(second), numbers(fresh))
    assert torch.equal(second.prefix_scores(), fresh.prefix_scores())
    assert torch.equal(second.mean_head_outputs(), fresh.mean_head_outputs())
    if matters is not None:
        assert (key == fresh.identity["key"]) != matters
        assert before.equals(numbers(fresh)) != matters


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "of_my_own"

class Mine(LlamaForCausalLM):
    config_class = Config

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * SIGN
        return outputs
"""
REMOTE = {
    "model_type": "of_my_own", "architectures": ["Mine"],
    "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Mine"},
}  # fmt: skip


@pytest.mark.parametrize("change", ["code", "permission"])
def test_remote_code_belongs_to_a_result(change, checkpoint, tmp_path):
    folder = tmp_path / "model"
    rewrite(folder / "config.json", lambda config: config.update(REMOTE))
    (folder / "mine.py").write_text(CODE.replace("SIGN", "1"))
    asked = {**checkpoint, "trust_remote_code": True}
    first = run(tmp_path / "used", **asked)
    first.evaluate("full")
    before = numbers(first)
    if change == "code":
        (folder / "mine.py").write_text(CODE.replace("SIGN", "-1"))
    else:
        rewrite(folder / "config.json", lambda config: config.update(model_type="llama"))
        asked["trust_remote_code"] = False
    second, fresh = (run(tmp_path / where, **asked) for where in ("used", "fresh"))
    for each in (second, fresh):
        each.evaluate("full")
    pd.testing.assert_frame_equal(numbers(second), numbers(fresh))
    assert first.identity["key"] != fresh.identity["key"]
    if change == "code":
        assert (before["margin"] == -numbers(fresh)["margin"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_weights_are_another_model_in_the_same_directory(kind, checkpoint, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the optional extra 'quantized' is not installed")
    # Rows of a weight are quantised in blocks of 64.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    make_llama(**sizes).save_pretrained(tmp_path / "model")
    asked = {**checkpoint, "device": "cpu", "dtype": "float32"}
    first = run(tmp_path / "used", **asked)
    first.evaluate("full", "zero")
    before = numbers(first)
    asked["quantization"] = kind
    second, fresh = (run(tmp_path / where, **asked) for where in ("used", "fresh"))
    with pytest.raises(icl.InputError, match="holds no results of this model"):
        second.results()
    for each in (second, fresh):
        each.evaluate("full", "zero")
    pd.testing.assert_frame_equal(numbers(second), numbers(fresh))
    assert not before.equals(numbers(fresh))


def write_rows(folder, marker: str) -> dict[str, str]:
    """Rows of an abstract and of a text task, and a reference text, all of the same names."""
    (folder / "texts" / "sst2").mkdir(parents=True, exist_ok=True)
    rows = [{"sequence": f"{marker} {i}", "label": ("Foo", "Bar")[i % 2]} for i in range(20)]
    text = [{"sentence": f"{marker} {i}", "label": i % 2} for i in range(20)]
    files = {
        "repetition_dataset_500.json": json.dumps(rows),
        "texts/sst2/train.jsonl": "\n".join(map(json.dumps, text)),
        "texts/sst2/validation.jsonl": "\n".join(map(json.dumps, text[:6])),
        "reference.txt": "\n".join(f"{marker} {i} and a few words more" for i in range(2000)),
    }
    for name, content in files.items():
        (folder / name).write_text(content)
        os.utime(folder / name, ns=(10**18, 10**18))
    return {
        "data": str(folder), "data_dir": str(folder / "texts"),
        "reference": str(folder / "reference.txt"),
    }  # fmt: skip


KINDS = {"tasks": ("full", "mean", "zero"), "nlp_tasks": ("full", "mean")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "data_dir", "reference"])
@pytest.mark.parametrize("how", ["edited", "elsewhere"])
def test_what_the_users_files_hold_belongs_to_a_result_and_not_only_their_name(name, how, tmp_path):
    asked = {
        **write_rows(tmp_path / "one" / "data", "A B"), "nlp_tasks": ["sst2"], "shots": [2],
        "labels": "semantic", "positions": 200,
    }  # fmt: skip
    first = run(tmp_path / "used", **asked)
    for group, kinds in KINDS.items():
        first.evaluate(*kinds, group=group)
    expected = {group: first.documents(group) for group in KINDS}
    # The same names in another folder, or in the same one, and the other two as they were.
    changed = write_rows(tmp_path / ("one" if how == "edited" else "two") / "data", "C D E")
    asked |= write_rows(tmp_path / "kept" / "data", "A B") | {name: changed[name]}
    second, fresh = (run(tmp_path / where, **asked) for where in ("used", "fresh"))
    stale = {
        "data": {"tasks": kinds_of("full", "mean", "zero")},
        "data_dir": {"nlp_tasks": kinds_of("full", "mean")},
        "reference": {"tasks": kinds_of("mean"), "nlp_tasks": kinds_of("mean")},
    }[name]
    key, stored = second.identity["key"], document_results(tmp_path / "used")
    for group in KINDS:
        selected = second.plan.selected(stored, group, key)
        assert not set(selected["ablation"]) & stale.get(group, set())
        assert set(selected["ablation"]) == set(expected[group]["ablation"]) - stale.get(
            group, set()
        )
    # Of the conditions only some are evaluated again: the others' old rows stay out.
    if name == "data":
        second.evaluate("full")
        assert set(second.documents()["ablation"]) == {"none"}
    for each in (second, fresh):
        for group, kinds in KINDS.items():
            each.evaluate(*kinds, group=group)
    for group in KINDS:
        pd.testing.assert_frame_equal(numbers(second, group), numbers(fresh, group))


def kinds_of(*kinds: str) -> set[str]:
    return {"none" if kind == "full" else kind for kind in kinds}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed", [{"labels": "unrelated"}, {"nlp_tasks": ["review_sentiment"]}, {"revision": "other"}]
)
def test_other_labels_text_tasks_and_revisions_are_other_results(changed, checkpoint, tmp_path):
    asked = {**checkpoint, "nlp_tasks": ["fact_opinion"], "labels": "semantic", "shots": [2]}
    for where, values in (
        ("used", asked),
        ("used", {**asked, **changed}),
        ("fresh", {**asked, **changed}),
    ):
        found = run(tmp_path / where, **values)
        found.evaluate("full", "zero", group="nlp_tasks")
        assert set(found.documents("nlp_tasks")["task"]) == set(values["nlp_tasks"])
    used = run(tmp_path / "used", **{**asked, **changed})
    pd.testing.assert_frame_equal(numbers(used, "nlp_tasks"), numbers(found, "nlp_tasks"))


def test_rows_that_say_nothing_of_their_setting_are_left_out(tmp_path):
    model, tokenizer = icl.load_model("icl-tiny")
    icl.evaluate(model, tokenizer, tasks=["repetition"], shots=[0], seeds=[42], limit=3,
                 run_dir=tmp_path)  # fmt: skip
    rows = document_results(tmp_path)
    plan, key = Plan(icl.stage_parameters(**SMALL)), {"fingerprint": "any"}
    assert len(rows) == 3
    assert plan.selected(rows, "tasks", key).empty
    assert plan.selected(rows.drop(columns="setting"), "tasks", key).empty


def test_a_task_named_twice_counts_once(tmp_path):
    twice = {
        "tasks": ["repetition", "fact_opinion", "repetition"],
        "shots": [1, 1],
        "seeds": [42, 42],
    }
    found = run(tmp_path, **twice, nlp_tasks=["fact_opinion", "review_sentiment"] * 2)
    assert found.plan.tasks() == ["repetition", "fact_opinion"]
    assert found.plan.tasks("nlp_tasks") == ["review_sentiment"]
    assert run(tmp_path, **twice, nlp_tasks=None).plan.tasks("nlp_tasks") == ["review_sentiment"]
    found.evaluate("full", "full")
    found.evaluate("full", group="nlp_tasks")
    rows = run_table(tmp_path, "results", None)
    assert rows["n"].tolist() == [3] * 4  # review_sentiment has both sets of labels
    assert not rows.duplicated(KEYS).any()


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


def note(directory: str, name: str) -> None:
    """A stage of a run, in a process of its own."""
    for _ in range(20):
        with icl.Run(icl.stage_parameters(**SMALL, run_dir=directory)).stage(name):
            pass


@pytest.mark.slow
def test_stages_side_by_side_leave_what_the_others_noted(tmp_path):
    with FORKING.Pool(2) as pool:
        pool.starmap(note, [(str(tmp_path), f"stage {number}") for number in range(4)])
    seconds = json.loads((tmp_path / "run.json").read_text())["seconds"]
    assert set(seconds) == {f"stage {number}" for number in range(4)}
    # The longest is kept: a repeated stage finds what is there already.
    run(tmp_path)._record(took={"stage 0": 99.0})
    run(tmp_path)._record(took={"stage 0": 0.5})
    assert json.loads((tmp_path / "run.json").read_text())["seconds"]["stage 0"] == 99.0
