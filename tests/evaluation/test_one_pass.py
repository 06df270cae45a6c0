"""All labels of a context in one pass, and what is kept of every document."""

from __future__ import annotations

import inspect
import json
import math
import random

import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import icl_helpers as icl
from icl_helpers.evaluation.conditions import CATEGORIES, FULL, Condition
from icl_helpers.evaluation.scorer import Encoded, InterventionLM
from icl_helpers.evaluation.shared_work import scored_logits, shares_context, shares_start
from icl_helpers.evaluation.store import (
    KEYS,
    CellStore,
    document_frame,
    document_results,
    merge_into_run_tables,
)
from icl_helpers.files import content_key
from icl_helpers.tasks.lm_eval_task import load_task
from tests.attention.test_hook import (
    FAMILIES,
    HEADS,
    SMALL,
    brute_force,
    forward,
    knocked_out,
    make,
)
from tests.conftest import make_llama

ABLATIONS = ("none", "zero", "mean", "knockout")
# One to four tokens; the second and third begin alike, the fourth goes on where the third ends.
LABELS = [[7], [8, 9], [8, 10, 11], [8, 10, 11, 12], [13, 7]]


def _condition(ablation: str) -> Condition:
    torch.manual_seed(4)
    means = torch.randn(2, 40, 4, 8)
    if ablation == "none":
        return FULL
    return Condition("induction_heads", ablation, 0.1, heads=tuple(HEADS), head_outputs=means)


def _contexts() -> list[list[int]]:
    """Contexts of 9 to 14 tokens; their first seven, more than a window of five, are the same."""
    torch.manual_seed(5)
    rest = torch.randint(2, 64, (6, 7)).tolist()
    return [[3, 9, 27, 17, 51, 25, 11, *row[: 2 + number]] for number, row in enumerate(rest)]


def _pattern(context: list[int]) -> torch.Tensor:
    """Pairs blocked after the sixth token."""
    torch.manual_seed(len(context))
    blocked = (torch.rand(len(context), len(context)) < 0.4).tril(-1)
    blocked[:6] = False
    return blocked


def _requests(labels: list[list[int]] = LABELS) -> list[Encoded]:
    return [
        ((str(context), str(label)), context, label) for context in _contexts() for label in labels
    ]


def _alone(model, family: str, condition: Condition, request: Encoded) -> tuple[float, bool]:
    """One sequence for one label, heads overwritten where they enter the output projection."""
    _, context, label = request
    ids = torch.tensor([[*context, *label]])
    mask = torch.ones_like(ids)
    if condition.ablation == "none":
        logits = forward(model, ids, mask)
    elif condition.ablation == "knockout":
        blocked = torch.zeros(1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        blocked[0, : len(context), : len(context)] = _pattern(context)
        if family == "gpt_oss":  # the brute force gets a sink's probability as a small difference
            with icl.intervene(model, *condition.interventions(blocked)):
                logits = forward(model, ids, mask)
        else:
            logits = knocked_out(model, family, ids, mask, blocked)
    else:
        means = condition.head_outputs[:, : ids.shape[1]] * (condition.ablation == "mean")
        replacement = {tuple(head): means[head.layer, :, head.head] for head in HEADS}
        logits = brute_force(model, family, ids, mask, replacement)
    total, greedy = 0.0, True
    for place, token in enumerate(label, start=len(context) - 1):
        total += float(logits[0, place].double().log_softmax(-1)[token])
        greedy = greedy and int(logits[0, place].argmax()) == token
    return total, greedy


def _scorer(model, tokenizer, batch_size: int | str = 4) -> InterventionLM:
    lm = InterventionLM(model, tokenizer, batch_size=batch_size)
    for context in _contexts():
        lm._patterns[str(context), CATEGORIES] = _pattern(context)
    return lm


def _count_passes(model) -> list[int]:
    """Rows of every forward pass that has logits."""
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


# transformers itself refuses SDPA for two families.
MODELS = [
    (family, implementation)
    for family in FAMILIES
    for implementation in ("eager", "sdpa")
    if implementation == "eager" or family not in ("gemma2", "gpt_oss")
]


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize(("family", "implementation"), MODELS)
def test_labels_score_as_sequences_of_their_own(tokenizer, family, implementation, ablation):
    model, condition = make(family), _condition(ablation)
    alone = [_alone(model, family, condition, request) for request in _requests()]
    model.set_attn_implementation(implementation)
    assert shares_context(model, condition.ablation)
    assert shares_start(model)
    lm = _scorer(model, tokenizer)
    passes = _count_passes(model)
    with lm.under(condition):
        scored = lm._loglikelihood_tokens(_requests(), True)
    assert passes == [4, 2]
    values, expected = ([value for value, _ in found] for found in (scored, alone))
    assert values == pytest.approx(expected, rel=0, abs=1e-5)
    assert [greedy for _, greedy in scored] == [greedy for _, greedy in alone]


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_scores_depend_neither_on_batches_nor_on_a_shared_start(tokenizer, batch_size, ablation):
    model, condition = make("mistral"), _condition(ablation)
    # The first context alone has nothing to share a start with.
    for requests in (_requests(), _requests()[: len(LABELS)]):
        lm = _scorer(model, tokenizer, batch_size)
        with lm.under(condition):
            values = [value for value, _ in lm._loglikelihood_tokens(requests, True)]
        alone = [_alone(model, "mistral", condition, request)[0] for request in requests]
        assert values == pytest.approx(alone, rel=0, abs=1e-5)


def test_labels_that_need_no_branches_are_plain_sequences(tokenizer, monkeypatch):
    """One label of several tokens continues its context, and those of one token need no more."""
    monkeypatch.setattr(
        "icl_helpers.evaluation.scorer.shares_context", lambda *_: pytest.fail("asked")
    )
    model, requests = make("llama"), _requests([[7], [8, 9, 10], [11], [8, 9, 12]])
    lm = _scorer(model, tokenizer)
    passes = _count_passes(model)
    values = [value for value, _ in lm._loglikelihood_tokens(requests, True)]
    assert passes[-2:] == [4, 2]
    alone = [_alone(model, "llama", FULL, request)[0] for request in requests]
    assert values == pytest.approx(alone, rel=0, abs=1e-5)


def test_conditions_share_the_layers_of_branches_too(tokenizer):
    """To the bit, whichever condition comes first, and labels of other tokens are not mixed up."""
    model = make_llama()
    conditions = [
        FULL,
        Condition("induction_heads", "zero", 0.1, heads=(icl.Head(2, 1),)),
        Condition("random_heads", "zero", 0.2, 42, heads=(icl.Head(1, 0),)),
        Condition("induction_pattern", "knockout", 0.2, heads=(icl.Head(2, 1),)),
    ]
    lm = _scorer(model, tokenizer)
    # The same tokens in the same columns, once as two branches and once as two others.
    several = [
        _requests(),
        _requests([[8, 9, 10, 3], [11, 4]]),
        _requests([[8, 9, 3], [10, 11, 4]]),
    ]

    def score() -> list[list[tuple[float, bool]]]:
        found = []
        for condition in conditions:
            for requests in several:
                with lm.under(condition):
                    found.append(lm._loglikelihood_tokens(requests, True))
        return found

    apart = score()
    lm.forget()
    for context in _contexts():
        lm._patterns[str(context), CATEGORIES] = _pattern(context)
    lm._reuse.want([1, 2])
    assert score() == apart
    assert lm._reuse._kept


@pytest.mark.parametrize("lost", ["position_ids", "attention_mask", "mask"])
def test_a_model_that_takes_no_branches_runs_a_sequence_per_label(tokenizer, lost, monkeypatch):
    model = make("llama")
    inner = model.model.forward
    if lost == "mask":  # a model that builds its masks by itself
        monkeypatch.setattr("icl_helpers.attention.passes._APPLIED", _Nothing())
    else:

        def forgetful(*args, **kwargs):
            return inner(*args, **{**kwargs, lost: None})

        forgetful.__signature__ = inspect.signature(inner)
        model.model.forward = forgetful
    # Without any mask the positions look like several packed sequences, unless there is a cache.
    assert not shares_context(model, "none")
    lm = _scorer(model, tokenizer, 100)
    passes = _count_passes(model)
    scored = lm._loglikelihood_tokens(_requests(), True)
    assert passes == [len(_contexts()) * len(LABELS)]
    alone = [_alone(make("llama"), "llama", FULL, request) for request in _requests()]
    assert [v for v, _ in scored] == pytest.approx([v for v, _ in alone], rel=0, abs=1e-5)
    assert [greedy for _, greedy in scored] == [greedy for _, greedy in alone]


class _Nothing:
    """Stands in for the branches that are applied: there never are any."""

    def get(self) -> None:
        return None

    def set(self, _: object) -> None:
        return None

    def reset(self, _: object) -> None:
        return None


def test_each_ablation_is_checked_by_itself(monkeypatch):
    model = make("llama")
    assert shares_context(model, "zero")
    monkeypatch.setattr(
        "icl_helpers.evaluation.shared_work.equal_but_for_rounding", lambda *_: False
    )
    assert shares_context(model, "zero")
    assert not shares_context(model, "mean")
    assert not shares_context(model, "none")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma2", {"final_logit_softcapping": 1.5, **FAMILIES["gemma2"]}),
        ("granite", {"logits_scaling": 7.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("opt", FAMILIES["opt"]),
    ],
)
@pytest.mark.parametrize("hooked", [True, False])
def test_gathered_logits_are_the_models_own(family, settings, hooked, monkeypatch):
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**SMALL, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(2, 64, (3, 9))
    columns = torch.tensor([[0, 8], [3, 4], [7, 7]])
    expected = forward(model, ids, torch.ones_like(ids))[torch.arange(3)[:, None], columns]
    projected: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda _, args, output: projected.append(output.shape[:-1].numel())
    )
    if not hooked:  # a model that does not say where it projects
        monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with torch.no_grad():
        found = scored_logits(model, ids, columns)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert projected == [6 if hooked else 27]
    if hooked:
        assert not model.get_output_embeddings()._forward_pre_hooks


ARRAYS = ["log_probabilities", "n_tokens", "greedy"]
COLUMNS = [*KEYS, "doc_id", "correct", "margin", "valid", "target", "chosen", *ARRAYS]


def test_documents_keep_what_every_label_scored(tokenizer, tmp_path):
    model = make_llama()
    found = icl.evaluate(
        model, tokenizer, tasks=["wordseq1_4way"], shots=2, seeds=[42], limit=9, sampling="first",
        run_dir=tmp_path,
        conditions=["full", Condition("induction_heads", "zero", 0.1, heads=(icl.Head(1, 1),))],
    ).documents  # fmt: skip
    assert set(found.columns) == {
        *COLUMNS, "setting", "n_demonstrations", "n_leaked", "n_dropped", "n_blocked",
    }  # fmt: skip
    prompts = icl.build_prompts("wordseq1_4way", shots=2, seed=42)[:9]
    rows = found[found["condition"] == "full"].to_dict("records")
    for prompt, row in zip(prompts, rows, strict=True):
        context = tokenizer(prompt.context, add_special_tokens=False).input_ids
        scores, lengths, greedy = [], [], []
        for label in prompt.choices:
            whole = tokenizer(prompt.context + label, add_special_tokens=False).input_ids
            ids = torch.tensor([whole])
            logits = forward(model, ids, torch.ones_like(ids))[0, len(context) - 1 : -1]
            tokens = torch.tensor(whole[len(context) :])
            scores.append(float(logits.log_softmax(-1).gather(1, tokens[:, None]).sum()))
            lengths.append(len(tokens))
            greedy.append(bool((logits.argmax(-1) == tokens).all()))
        assert row["log_probabilities"] == pytest.approx(scores, rel=0, abs=1e-5)
        assert row["n_tokens"].tolist() == lengths
        assert row["greedy"].tolist() == greedy
        assert row["target"] == prompt.target
        assert row["chosen"] == scores.index(max(scores))
        assert row["correct"] == (row["chosen"] == prompt.target)
        wrong = [score for label, score in enumerate(scores) if label != prompt.target]
        assert row["margin"] == pytest.approx(scores[prompt.target] - max(wrong), abs=1e-5)
    assert any(length > 1 for row in rows for length in row["n_tokens"])
    stored = document_results(tmp_path)
    pd.testing.assert_frame_equal(stored, found)


def _spec(**changes: object) -> dict[str, object]:
    return {
        "task": "wordseq1_4way", "labels": "unrelated", "shots": 2, "condition": "full",
        "ablation": "none", "fraction": 0.0, "ablation_seed": None, **changes,
    }  # fmt: skip


def test_the_answer_chosen_is_the_one_that_lm_eval_judges():
    task = load_task("wordseq1_4way", shots=2, seed=42)
    task.build_all_requests(limit=40, rank=0, world_size=1)
    docs = {instance.doc_id: instance.doc for instance in task.instances}
    draw = random.Random(3)
    # Few different values: most documents have a tie, many of them for the best label.
    scores = [[float(draw.randint(-4, -1)) for _ in range(4)] for _ in docs]
    documents = {
        "doc_id": list(docs), "target": [task.doc_to_target(doc) for doc in docs.values()],
        "log_probabilities": scores, "n_tokens": [[1] * 4] * len(docs),
        "greedy": [[False] * 4] * len(docs),
    }  # fmt: skip
    frame = document_frame(_spec(), documents, 42)
    judged = [
        task.process_results(doc, [(value, False) for value in values])["acc"]
        for doc, values in zip(docs.values(), scores, strict=True)
    ]
    assert frame["correct"].tolist() == [accuracy == 1.0 for accuracy in judged]
    assert frame["valid"].all()
    assert 0 < frame["correct"].mean() < 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_kept_as_missing(tokenizer, tmp_path, value):
    model = make_llama()
    bar = tokenizer("Bar", add_special_tokens=False).input_ids[0]

    def spoil(module, args, output):
        output[..., bar] = value
        return output

    model.lm_head.register_forward_hook(spoil)
    request = {"tasks": ["repetition"], "shots": 0, "seeds": [42], "limit": 3, "run_dir": tmp_path}
    with pytest.warns(UserWarning, match="not finite"):
        found = icl.evaluate(model, tokenizer, **request)
    (path,) = tmp_path.glob("cells/*.json")
    stored = json.loads(path.read_bytes())["documents"]["log_probabilities"]
    assert all(None in scores for scores in stored)
    documents = found.documents
    assert not documents["valid"].any()
    assert not documents["correct"].any()
    assert documents["margin"].isna().all()
    assert documents["chosen"].isna().all()
    assert documents["target"].notna().all()
    assert all(any(map(math.isnan, scores)) for scores in documents["log_probabilities"])
    with pytest.warns(UserWarning, match="not finite"):
        again = icl.evaluate(model, tokenizer, **request)
    pd.testing.assert_frame_equal(again.documents, documents)
    pd.testing.assert_frame_equal(document_results(tmp_path), documents)


@pytest.mark.filterwarnings("error")
def test_cells_of_the_earlier_format_are_computed_again_and_left_alone(tokenizer, tmp_path):
    model = make_llama()
    request = {"tasks": ["repetition"], "shots": 0, "seeds": [42], "limit": 3}
    expected = icl.evaluate(model, tokenizer, **request, run_dir=tmp_path / "new")
    ((spec, kept),) = CellStore(tmp_path / "new" / "cells").cells()
    store = CellStore(tmp_path / "old" / "cells")
    body = {
        "format": 1, "spec": spec,
        "documents": {"doc_id": [0, 1, 2], "correct": [True] * 3, "margin": [9.0] * 3,
                      "valid": [True] * 3},
    }  # fmt: skip
    text = json.dumps({**body, "checksum": content_key(body)})
    # Under its own name, and under one that a cell of today might have.
    old = store.directory / f"{store.stem(spec)}_{content_key(spec)}.json"
    old.parent.mkdir(parents=True)
    old.write_text(text)
    store.path(spec).write_text(text)
    assert store.read(spec) is None
    assert not list(store.cells())
    found = icl.evaluate(model, tokenizer, **request, run_dir=tmp_path / "old")
    pd.testing.assert_frame_equal(found.documents, expected.documents)
    assert list(store.cells()) == [(spec, kept)]
    assert old.read_text() == text


def test_rows_of_an_earlier_version_stay_in_the_tables(tokenizer, tmp_path):
    model = make_llama()
    request = {"shots": 0, "seeds": [42], "limit": 3}
    earlier = icl.evaluate(model, tokenizer, tasks=["recursion"], **request).documents
    merge_into_run_tables(tmp_path, earlier[[*KEYS, "doc_id", "correct", "margin", "valid"]])
    new = icl.evaluate(model, tokenizer, tasks=["repetition"], run_dir=tmp_path, **request)
    for _ in range(2):  # once from rows in memory, once from files only
        merge_into_run_tables(tmp_path, new.documents)
        found = document_results(tmp_path)
        assert found["task"].tolist() == ["recursion"] * 3 + ["repetition"] * 3
        assert found["correct"].tolist()[:3] == earlier["correct"].tolist()
        assert found[["target", "chosen", *ARRAYS]][:3].isna().all(axis=None)
        assert found["target"].tolist()[3:] == new.documents["target"].tolist()
        assert [len(scores) for scores in found["log_probabilities"][3:]] == [2, 2, 2]
        merge_into_run_tables(
            tmp_path, icl.evaluate(model, tokenizer, tasks=["repetition"], **request).documents
        )
