"""Function-vector scores against overwriting one head at a time, a whole prompt each."""

from __future__ import annotations

import pytest
import torch

import icl_helpers as icl
from icl_helpers.tasks.prompts import sample_documents, shuffled_labels
from tests.analysis.families import FIVE, entering, make, replaced
from tests.attention.test_hook import projections

TASKS = ["repetition", "fact_opinion"]
LONG = {"vocab_size": 400, "max_position_embeddings": 640, "n_positions": 640}


def drawn(task: str) -> list[icl.Prompt]:
    prompts = icl.build_prompts(task, shots=3, seed=7)
    return [prompts[i] for i in sample_documents([p.target for p in prompts], 2, seed=7)]


@torch.no_grad()
def label_probability(model, tokenizer, prompt: icl.Prompt) -> float:
    context = tokenizer(prompt.context).input_ids
    whole = tokenizer(prompt.context + prompt.choices[prompt.target]).input_ids
    probabilities = model(torch.tensor([whole]), use_cache=False).logits[0].softmax(-1)
    product = 1.0
    for place in range(len(context), len(whole)):
        product *= float(probabilities[place - 1, whole[place]])
    return product


def by_hand(model, tokenizer, family: str) -> torch.Tensor:
    scores = torch.zeros(2, 4)
    for task in TASKS:
        prompts = drawn(task)
        means = torch.zeros(2, 4, 8)
        for prompt in prompts:
            with torch.no_grad(), entering(projections(model, family)) as seen:
                model(torch.tensor([tokenizer(prompt.context).input_ids]), use_cache=False)
            for layer in range(2):
                means[layer] += seen[layer][0, -1].view(4, 8) / len(prompts)
        for prompt in prompts:
            corrupted = shuffled_labels(prompt, seed=7)
            last = len(tokenizer(corrupted.context).input_ids) - 1
            before = label_probability(model, tokenizer, corrupted)
            for layer in range(2):
                for head in range(4):
                    with replaced(model, family, layer, head, means[layer, head], last):
                        after = label_probability(model, tokenizer, corrupted)
                    scores[layer, head] += (after - before) / len(prompts) / len(TASKS)
    return scores


@pytest.mark.parametrize("family", FIVE)
def test_scores_equal_overwriting_heads_one_by_one(family, tokenizer):
    model = make(family, **LONG)
    expected = by_hand(model, tokenizer, family)
    found = icl.function_vector_scores(model, tokenizer, tasks=TASKS, shots=3, n_prompts=2, seed=7)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_scores_without_a_cache_are_the_same(tokenizer, monkeypatch):
    model = make("llama", **LONG)
    options = {"tasks": TASKS, "shots": 3, "n_prompts": 2}
    cached = icl.function_vector_scores(model, tokenizer, **options)
    monkeypatch.setattr("icl_helpers.analysis.function_vectors.shares_start", lambda _: False)
    whole = icl.function_vector_scores(model, tokenizer, **options)
    assert torch.allclose(cached, whole, atol=1e-6)
    assert not torch.equal(cached, torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "at least one task"),
        ({"tasks": "repetition"}, "a list of at least one task, got 'repetition'"),
        ({"tasks": ["repitition"]}, "unknown task 'repitition'"),
        ({"tasks": ["repetition"], "shots": 1}, "shots must be at least 2"),
        ({"tasks": ["repetition"], "n_prompts": 0}, "n_prompts at least 1"),
        ({"tasks": ["repetition"], "n_prompts": 9999}, "fewer than 9999"),
    ],
)
def test_what_cannot_be_scored_is_named(options, message, llama, tokenizer):
    with pytest.raises(icl.InputError, match=message):
        icl.function_vector_scores(llama, tokenizer, **options)
