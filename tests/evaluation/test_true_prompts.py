"""What results say of their prompts, and lengths at which a model changes its rotary angles."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

import icl_helpers as icl
from icl_helpers.attention.hook import attention_layout
from icl_helpers.attention.passes import one_angle_length
from icl_helpers.evaluation.conditions import Condition
from icl_helpers.evaluation.scorer import InterventionLM
from icl_helpers.evaluation.store import document_results
from tests.conftest import make_llama

HEADS = (icl.Head(0, 1), icl.Head(1, 2), icl.Head(2, 0))
KNOCKOUT = Condition("induction_pattern", "knockout", 0.2, None, HEADS)


def test_results_carry_what_prompts_show_and_what_a_knockout_blocks(llama, tokenizer, tmp_path):
    rows = [{"sequence": f"A {i} B", "label": "Foo" if i < 28 else "Bar"} for i in range(30)]
    (tmp_path / "repetition_dataset_500.json").write_text(json.dumps(rows))
    request = {
        "tasks": ["repetition"], "shots": [0, 8], "seeds": [42], "data": str(tmp_path),
        "conditions": ["full", KNOCKOUT],
    }  # fmt: skip
    with pytest.raises(icl.InputError, match=r"repetition, .*_500.json: class 'Bar' has \d rows"):
        icl.evaluate(llama, tokenizer, **request)
    for _ in range(2):  # computed, and from finished cells
        found = icl.evaluate(
            llama, tokenizer, **request, demonstrations="fewer", run_dir=tmp_path / "run"
        )
        documents = found.documents
        for shots in (0, 8):
            prompts = icl.build_prompts(
                "repetition", shots=shots, seed=42, data=str(tmp_path), demonstrations="fewer"
            )
            shown = [prompt.context.count("\n\n") - 1 for prompt in prompts]
            blocked = [int(icl.induction_pattern(p.context, tokenizer).sum()) for p in prompts]
            assert max(shown) <= shots
            assert (min(shown) < shots) == (shots == 8)
            for name in ("full", "induction_pattern"):
                those = documents[(documents.shots == shots) & (documents.condition == name)]
                row = found[(found.shots == shots) & (found.condition == name)].iloc[0]
                assert those.n_demonstrations.tolist() == shown
                assert row.n_demonstrations == pytest.approx(sum(shown) / len(shown))
                assert (row.n_leaked, row.n_dropped) == (0, those.n_dropped.sum())
                if name == "full":
                    assert those.n_blocked.isna().all()
                    assert pd.isna(row.n_blocked)
                else:
                    assert those.n_blocked.tolist() == blocked
                    assert (sum(blocked) > 0) == (shots == 8)
    stored = document_results(tmp_path / "run")
    assert stored.n_demonstrations.tolist() == documents.n_demonstrations.tolist()


def test_a_knockout_that_blocks_nothing_or_has_no_pattern_is_an_error(llama, tokenizer):
    nothing = Condition("induction_pattern", "knockout", 0.2, None, HEADS, categories=("words",))
    request = {"shots": 4, "seeds": [42], "limit": 3}
    with pytest.raises(icl.InputError, match="knockout of words blocks nothing"):
        icl.evaluate(llama, tokenizer, tasks=["repetition"], conditions=[nothing], **request)
    with pytest.raises(
        icl.InputError, match="'review_sentiment' is a text task.*no induction pattern"
    ):
        icl.evaluate(llama, tokenizer, tasks=["review_sentiment"], conditions=[KNOCKOUT], **request)


@pytest.mark.parametrize(
    "prompt",
    [
        "G G A E G G A",
        "Q: which?\n\nA:",
        "Classify.\n\nReview: good\n\nSentiment: Positive\n\nReview: bad\n\nSentiment:",
        "D.\n\nA B:Foo\n\nC D",
        "D.\n\nA B:\n\nC D:",
        "D.\n\nA:B:Foo\n\nC D:",
    ],
)
def test_prompts_without_an_induction_pattern_are_refused(prompt, tokenizer):
    if prompt.startswith("Q: which"):  # description and query, nothing blocked
        assert not icl.induction_pattern(prompt, tokenizer).any()
        return
    with pytest.raises(icl.InputError, match="no induction pattern is defined"):
        icl.induction_pattern(prompt, tokenizer)


def test_labels_of_the_same_tokens_are_refused(llama, tokenizer, monkeypatch):
    from dataclasses import replace

    from icl_helpers.tasks import specs

    spec = replace(specs.get_task_spec("repetition"), choices=("Foo", "Bar"))
    monkeypatch.setitem(specs._TASKS, "repetition", spec)
    ids = tokenizer.__class__.__call__

    def blind(self, texts, *args, **kwargs):
        """Both labels are one unknown token."""
        texts = [text.replace("Bar", "Foo") for text in texts] if isinstance(texts, list) else texts
        return ids(self, texts, *args, **kwargs)

    monkeypatch.setattr(tokenizer.__class__, "__call__", blind)
    with pytest.raises(icl.InputError, match="labels 'Foo' and 'Bar' are the same tokens"):
        icl.evaluate(llama, tokenizer, tasks=["repetition"], shots=0, seeds=[42], limit=3)


def test_labels_that_a_tokenizer_makes_one_unknown_token_of_are_refused(llama):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({w for p in icl.build_prompts("repetition", shots=0, seed=1) for w in p.context.replace(":", " : ").split()})  # fmt: skip
    backend = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["?", *words])}, unk_token="?")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    blind = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    for condition in ("full", Condition("induction_heads", "zero", 0.1, heads=HEADS)):
        with pytest.raises(icl.InputError, match="labels 'Foo' and 'Bar' are the same tokens"):
            icl.evaluate(
                llama, blind, tasks=["repetition"], shots=0, seeds=[42], conditions=[condition]
            )


@pytest.mark.parametrize("ablation", ["none", "zero", "knockout"])
def test_a_tokenizer_of_another_model_is_named_before_a_pass(ablation, tokenizer, monkeypatch):
    """Its tokens are beyond the embedding: of a prompt, or of a label only."""
    from lm_eval.api.instance import Instance

    condition = Condition("induction_heads", ablation, 0.1, None, HEADS)
    request = {"tasks": ["repetition"], "shots": 2, "seeds": [42], "limit": 3}
    condition = "full" if ablation == "none" else condition
    model = make_llama(vocab_size=300)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was begun"), prepend=True)
    monkeypatch.setattr("icl_helpers.evaluation.evaluate.attention_layout", attention_layout_of)
    with pytest.raises(icl.InputError, match=r"token id \d+ is not one of the model's 0..299"):
        icl.evaluate(model, tokenizer, conditions=[condition], **request)
    if ablation == "none":
        lm = InterventionLM(model, tokenizer)
        far = max(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        text = tokenizer.decode([tokenizer.get_vocab()[far]])
        asked = {
            "loglikelihood": ("A\n\n", text), "loglikelihood_rolling": (f"A\n\n{text}",),
            "generate_until": (f"A\n\n{text}", {"until": [], "max_gen_toks": 3}),
        }  # fmt: skip
        for kind, arguments in asked.items():
            with pytest.raises(icl.InputError, match="is not one of the model's 0..299"):
                getattr(lm, kind)([Instance(kind, {}, arguments, 0)], disable_tqdm=True)


def attention_layout_of(_):
    """That of any model of these sizes: a probe would be a pass."""
    return attention_layout(make_llama())


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4, "factor": 4.0,
}  # fmt: skip


@pytest.mark.parametrize("ablation", ["none", "zero", "mean", "knockout"])
def test_prompts_on_both_sides_of_a_rope_switch_equal_one_pass_each(ablation, tokenizer):
    prompts = icl.build_prompts("wordseq1_binary", shots=4, seed=42)[:10]
    lengths = [len(tokenizer(p.context, add_special_tokens=False).input_ids) for p in prompts]
    switch = sorted(lengths)[5]
    assert min(lengths) < switch < max(lengths)
    rope = {**LONGROPE, "original_max_position_embeddings": switch}
    model = make_llama(rope_parameters=rope, max_position_embeddings=512)
    torch.manual_seed(2)
    means = torch.randn(3, 512, 4, 8)
    condition = Condition("induction_heads", ablation, 0.2, None, HEADS, means)
    if ablation == "none":
        condition = Condition("full")
    found = icl.evaluate(
        model, tokenizer, tasks=["wordseq1_binary"], shots=4, seeds=[42], limit=10,
        sampling="first",
        conditions=[condition],
    ).documents  # fmt: skip
    for prompt, scores in zip(prompts, found.log_probabilities, strict=True):
        for label, score in zip(prompt.choices, scores, strict=True):
            context = tokenizer(prompt.context, add_special_tokens=False).input_ids
            whole = tokenizer(prompt.context + label, add_special_tokens=False).input_ids
            ids = torch.tensor([whole[:-1]])
            blocked = torch.zeros(ids.shape[1], ids.shape[1], dtype=torch.bool)
            n = len(context)
            if ablation == "knockout":
                blocked[:n, :n] = icl.induction_pattern(prompt.context, tokenizer)
            with torch.no_grad(), icl.intervene(model, *condition.interventions(blocked)):
                log = model(ids, use_cache=False).logits[0].log_softmax(-1)
            expected = sum(float(log[i - 1, whole[i]]) for i in range(n, len(whole)))
            assert score == pytest.approx(expected, abs=1e-3)


def test_means_of_samples_beyond_a_rope_switch_are_refused():
    rope = {**LONGROPE, "original_max_position_embeddings": 32}
    model = make_llama(rope_parameters=rope, max_position_embeddings=512)
    assert one_angle_length(model) == 32
    assert icl.mean_head_outputs(model, torch.ones(1, 32, dtype=torch.long)).shape[1] == 32
    with pytest.raises(icl.InputError, match="33 tokens are beyond the model's trained 32"):
        icl.mean_head_outputs(model, torch.ones(1, 33, dtype=torch.long))


def test_dynamic_angles_do_not_remember_longer_sequences():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    ids = torch.randint(2, 400, (1, 100), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def logits(model, length):
        with icl.intervene(model, icl.ZeroAblation(HEADS)):
            return model(ids[:, :length], use_cache=False).logits

    used = make_llama(rope_parameters=rope, max_position_embeddings=64)
    logits(used, 100)
    for length in (80, 64, 20):
        fresh = make_llama(rope_parameters=rope, max_position_embeddings=64)
        assert torch.allclose(logits(used, length), logits(fresh, length), atol=1e-5)
