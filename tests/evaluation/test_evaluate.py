"""Evaluation against lm-eval itself and a plain reference path; the result store; runs."""

from __future__ import annotations

import json
import warnings

import pandas as pd
import pytest
import torch

import icl_helpers as icl
from icl_helpers.evaluation.scorer import InterventionLM
from icl_helpers.evaluation.store import CellStore
from icl_helpers.files import StorageError, atomic_path, check_run_dir, write_json
from tests.conftest import make_llama


@pytest.fixture(scope="module")
def tiny():
    return icl.load_model("icl-tiny")


@pytest.fixture(scope="module")
def all_conditions(tiny):
    model, tokenizer = tiny
    scores = icl.prefix_matching_scores(model, icl.random_sequences(tokenizer)).mean(0)
    means = torch.randn(model.config.num_hidden_layers, 400, 16, 16) * 0.1
    return icl.conditions(
        scores, fractions=(0.06,), ablations=("mean", "zero", "knockout"), head_outputs=means,
        ablation_seeds=(42, 43),
    )  # fmt: skip


def reference_correct(model, tokenizer, condition, prompts) -> list[bool]:
    """One prompt and one label at a time: the sum of the label's log-probabilities."""
    found = []
    for prompt in prompts:
        context = tokenizer(prompt.context, add_special_tokens=False).input_ids
        scores = []
        for choice in prompt.choices:
            whole = tokenizer(prompt.context + choice, add_special_tokens=False).input_ids
            ids = torch.tensor([whole])
            blocked = None
            if condition.ablation == "knockout":
                pattern = icl.induction_pattern(prompt.context, tokenizer)
                blocked = torch.zeros(len(whole), len(whole), dtype=torch.bool)
                blocked[: len(pattern), : len(pattern)] = pattern
            with torch.no_grad(), icl.intervene(model, *condition.interventions(blocked)):
                log_probabilities = model(ids).logits[0].log_softmax(-1)
            label = whole[len(context) :]
            scores.append(
                sum(float(log_probabilities[len(context) - 1 + i, t]) for i, t in enumerate(label))
            )
        found.append(max(range(len(scores)), key=scores.__getitem__) == prompt.target)
    return found


@pytest.mark.slow
def test_evaluate_equals_the_reference_path_on_every_document(tiny, all_conditions):
    model, tokenizer = tiny
    results = icl.evaluate(
        model, tokenizer, tasks=["wordseq1_4way", "repetition"], shots=[0, 6],
        conditions=all_conditions, seeds=[42], limit=12, sampling="first", batch_size=5,
    )  # fmt: skip
    documents = results.documents
    for task in ("wordseq1_4way", "repetition"):
        for shots in (0, 6):
            prompts = icl.build_prompts(task, shots=shots, seed=42)[:12]
            for condition in all_conditions:
                seed = condition.ablation_seed
                rows = documents[
                    (documents["task"] == task)
                    & (documents["shots"] == shots)
                    & (documents["condition"] == condition.name)
                    & (documents["ablation"] == condition.ablation)
                    & (
                        documents["ablation_seed"].isna()
                        if seed is None
                        else documents["ablation_seed"].eq(seed)
                    )
                ]
                expected = reference_correct(model, tokenizer, condition, prompts)
                assert rows["correct"].tolist() == expected


@pytest.mark.parametrize("seed", [42, 43])
@pytest.mark.parametrize(
    ("task", "shots"), [("repetition", 5), ("wordseq2_4way", 20), ("recursion", 0)]
)
def test_full_model_equals_stock_lm_eval_to_the_last_digit(tiny, task, shots, seed):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from icl_helpers.files import tasks_dir

    model, tokenizer = tiny
    stock = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), tasks=[task],
        num_fewshot=shots, fewshot_random_seed=seed, limit=60, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks_dir()), include_defaults=False),
    )  # fmt: skip
    ours = icl.evaluate(
        model, tokenizer, tasks=[task], shots=shots, seeds=[seed], limit=60, sampling="first"
    )
    assert float(ours["accuracy"].iloc[0]) == stock["results"][task]["acc,none"]


def test_labels_of_several_tokens_are_scored_as_lm_eval_scores_them(tokenizer, llama):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [
        ("A B C:", "Foo bar baz"),
        ("A B C:", "Foo"),
        ("x y ", " zebra quill"),
        ("hello:", "Mur"),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    stock = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=2).loglikelihood(requests)
    lm = InterventionLM(llama, tokenizer, batch_size=3)
    ours = lm._loglikelihood_tokens(lm.encode(pairs))
    for (a, greedy_a), (b, greedy_b) in zip(stock, ours, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
        assert greedy_a == greedy_b


def test_results_do_not_depend_on_the_batch_size(tiny, all_conditions):
    model, tokenizer = tiny
    frames = [
        icl.evaluate(
            model,
            tokenizer,
            tasks=["centre_embedding"],
            shots=5,
            conditions=all_conditions,
            seeds=[42],
            limit=20,
            batch_size=size,
        )
        for size in (1, 7, "auto")
    ]
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(pd.DataFrame(frames[0]), pd.DataFrame(frame))


def test_prompt_longer_than_the_context_is_refused_and_earlier_results_stay(tokenizer, tmp_path):
    model = make_llama(max_position_embeddings=120)
    request = {"tasks": ["repetition"], "seeds": [42], "limit": 4, "run_dir": tmp_path}
    icl.evaluate(model, tokenizer, shots=0, **request)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(icl.InputError, match="longer than the model's context of 120"):
        icl.evaluate(model, tokenizer, shots=10, **request)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["nope"]}, "unknown task 'nope'"),
        ({"tasks": "repetition"}, "tasks must be a list"),
        ({"shots": -2}, "shots.*-2"),
        ({"shots": 1000}, "1000 shots"),
        ({"limit": 0}, "limit"),
        ({"seeds": []}, "seeds"),
        ({"batch_size": 0}, "batch_size"),
        ({"conditions": ["half"]}, "conditions.*'half'"),
        (
            {
                "conditions": [
                    icl.Condition("induction_heads", "zero", 0.1, None, (icl.Head(9, 0),))
                ]
            },
            "head 9.0",
        ),
        ({"run_dir": "a\0b"}, "run_dir"),
    ],
)
def test_bad_evaluation_request_is_explained(llama, tokenizer, change, message):
    request = {"tasks": ["repetition"], "shots": 0, "limit": 2, **change}
    with pytest.raises(icl.InputError, match=message):
        icl.evaluate(llama, tokenizer, **request)


def test_non_finite_logits_are_counted_and_left_out(tokenizer):
    model = make_llama()
    ids = tokenizer("Q", add_special_tokens=False).input_ids
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[0]] = torch.nan
    with pytest.warns(UserWarning, match="not finite"):
        results = icl.evaluate(model, tokenizer, tasks=["repetition"], shots=0, seeds=[42])
    row = results.iloc[0]
    holding = [
        p
        for p in icl.build_prompts("repetition", shots=0, seed=42)
        if ids[0] in tokenizer(p.context).input_ids
    ]
    assert row["n_invalid"] == len(holding) > 0
    assert row["n"] == 500 - len(holding)
    assert 0 <= row["accuracy"] <= 1


def count_forward_passes(model) -> list[int]:
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_second_evaluation_scores_nothing_and_changed_inputs_are_never_stale(tokenizer, tmp_path):
    model = make_llama()
    request = {"tasks": ["repetition"], "shots": 2, "seeds": [42], "limit": 6, "run_dir": tmp_path}
    first = icl.evaluate(model, tokenizer, **request)
    calls = count_forward_passes(model)
    again = icl.evaluate(model, tokenizer, **request)
    pd.testing.assert_frame_equal(pd.DataFrame(first), pd.DataFrame(again))
    assert not calls
    files = set(tmp_path.glob("cells/*.json"))
    changes = [
        {"limit": 5}, {"sampling": "first"}, {"shots": 3}, {"seeds": [43]}, {"revision": "other"},
        {"conditions": [icl.Condition("induction_heads", "zero", 0.1, None, (icl.Head(0, 0),))]},
        {"conditions": [icl.Condition("induction_heads", "zero", 0.1, None, (icl.Head(0, 1),))]},
    ]  # fmt: skip
    for change in changes:
        icl.evaluate(model, tokenizer, **(request | change))
        now = set(tmp_path.glob("cells/*.json"))
        assert len(now - files) == 1, change
        files = now
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-3
    icl.evaluate(model, tokenizer, **request)
    assert len(set(tmp_path.glob("cells/*.json")) - files) == 1


@pytest.mark.parametrize("damage", [b"", b"{", b"null", None])
def test_damaged_cell_is_set_aside_and_computed_again(tokenizer, tmp_path, damage):
    model = make_llama()
    request = {"tasks": ["repetition"], "shots": 2, "seeds": [42], "limit": 6, "run_dir": tmp_path}
    first = icl.evaluate(model, tokenizer, **request)
    (path,) = tmp_path.glob("cells/*.json")
    whole = path.read_bytes()
    if damage is None:  # valid JSON with one altered result
        content = json.loads(whole)
        content["documents"]["target"][0] = 1 - content["documents"]["target"][0]
        damage = json.dumps(content).encode()
    path.write_bytes(damage)
    with pytest.warns(UserWarning, match="set aside"):
        again = icl.evaluate(model, tokenizer, **request)
    pd.testing.assert_frame_equal(pd.DataFrame(first), pd.DataFrame(again))
    assert path.read_bytes() == whole
    assert path.with_name(path.name + ".damaged-1").read_bytes() == damage


def test_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with (
        pytest.raises(StorageError, match=r"cannot write .*result\.json"),
        atomic_path(path) as temporary,
    ):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_store_returns_what_was_written(tmp_path):
    store = CellStore(tmp_path)
    spec = {
        "task": "t", "labels": "unrelated", "shots": 5, "condition": "full", "ablation": "none",
        "fraction": 0.0, "ablation_seed": None,
    }  # fmt: skip
    store.write(spec, {"doc_id": [0], "correct": [True]})
    assert store.read(spec) == {"doc_id": [0], "correct": [True]}
    assert store.read({**spec, "shots": 6}) is None
    assert list(store.cells()) == [(spec, {"doc_id": [0], "correct": [True]})]


@pytest.mark.parametrize("bad", ["", "a\0b", "x" * 300, 7])
def test_impossible_run_directory_is_refused(bad):
    with pytest.raises(icl.InputError, match="run_dir"):
        check_run_dir(bad)


def test_run_directory_of_another_model_is_refused(tmp_path):
    write_json(tmp_path / "run.json", {"model": "other"})
    with pytest.raises(icl.InputError, match="holds the run of model 'other'"):
        icl.Run(icl.stage_parameters(run_dir=str(tmp_path)))


def test_run_reuses_scores_and_recomputes_a_damaged_file(tmp_path):
    parameters = icl.stage_parameters(run_dir=str(tmp_path))
    scores = icl.Run(parameters).prefix_scores()
    path = tmp_path / "prefix_scores.safetensors"
    stamp = path.stat().st_mtime_ns
    assert torch.equal(icl.Run(parameters).prefix_scores(), scores)
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(b"garbage")
    with pytest.warns(UserWarning, match="set aside"):
        assert torch.equal(icl.Run(parameters).prefix_scores(), scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batchsize": 3}, "unknown parameter 'batchsize'"),
        ({"limit": "5"}, "'limit' must be int or None"),
        ({"tasks": "repetition"}, "'tasks' must be list"),
        ({"tasks": ["nope"]}, "unknown task"),
        ({"fractions": [0.0]}, "fraction"),
        ({"shots": [1.5]}, "'shots'.*1.5"),
        ({"dtype": "int8"}, "dtype"),
        ({"trust_remote_code": 1}, "trust_remote_code"),
        ({"model": "hf_abcdefghijklmnopqrstuvwxyz0123"}, "access token"),
        ({"model": "./no/such/folder"}, "does not exist"),
        ({"run_dir": "runs/\0"}, "run_dir"),
    ],
)
def test_bad_parameter_is_explained_before_any_model_loads(change, message, monkeypatch):
    monkeypatch.setattr(
        "icl_helpers.models.loading.load_model", lambda *a, **k: pytest.fail("loaded")
    )
    with pytest.raises((icl.InputError, icl.MissingArtefactError), match=message):
        icl.stage_parameters(change)


def test_notebook_globals_are_checked_once_and_later_values_left_alone():
    values = {"model": "icl-tiny", "_private": 3, "In": [], "json": json}
    assert icl.stage_parameters(values).model == "icl-tiny"
    values["counts"] = [1, 2]
    assert icl.stage_parameters(values).model == "icl-tiny"


def test_unknown_model_offline_says_what_is_missing():
    with pytest.raises(icl.MissingArtefactError, match="nobody/nothing.*icl-tiny"):
        icl.load_model("nobody/nothing")


def test_pickled_weights_with_code_in_them_are_refused(tmp_path):
    make_llama().config.save_pretrained(tmp_path)
    torch.save({"model.norm.weight": torch.nn.Linear(2, 2)}, tmp_path / "pytorch_model.bin")
    with warnings.catch_warnings(), pytest.raises(Exception, match=r"[Ww]eights|cannot be loaded"):
        warnings.simplefilter("ignore")
        icl.load_model(str(tmp_path))
