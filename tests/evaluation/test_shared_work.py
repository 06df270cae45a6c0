"""What prompts and conditions share changes no result."""

from __future__ import annotations

import pytest
import torch

import icl_helpers as icl
from icl_helpers.attention.induction_pattern import induction_pattern
from icl_helpers.evaluation.conditions import FULL, Condition
from icl_helpers.evaluation.scorer import InterventionLM
from icl_helpers.evaluation.shared_work import LayerReuse, common_start, shares_layers, shares_start
from tests.attention.test_hook import FAMILIES, make
from tests.conftest import make_llama

LOW, HIGH = (icl.Head(1, 0), icl.Head(2, 1)), (icl.Head(2, 0), icl.Head(2, 2))


def _conditions(model) -> list[Condition]:
    means = torch.randn(model.config.num_hidden_layers, 400, 4, 8)
    return [
        FULL,
        Condition("induction_heads", "zero", 0.1, heads=HIGH),
        Condition("induction_heads", "mean", 0.1, heads=HIGH, head_outputs=means),
        Condition("random_heads", "zero", 0.2, 42, heads=LOW),
        Condition("induction_pattern", "knockout", 0.2, heads=LOW),
        Condition("induction_heads", "zero", 0.3, heads=(icl.Head(0, 1), *HIGH)),
    ]


def _pairs(number: int = 11) -> list[tuple[str, str]]:
    prompts = icl.build_prompts("recursion", shots=3, seed=42)[:number]
    return [(prompt.context, label) for prompt in prompts for label in prompt.choices]


@torch.no_grad()
def _one_by_one(model, tokenizer, condition, pair) -> float:
    """One prompt, one label, all logits, nothing shared or kept."""
    context, label = pair
    ids = tokenizer(context, add_special_tokens=False).input_ids
    whole = tokenizer(context + label, add_special_tokens=False).input_ids
    blocked = torch.zeros(len(whole), len(whole), dtype=torch.bool)
    blocked[: len(ids), : len(ids)] = induction_pattern(context, tokenizer)
    with icl.intervene(model, *condition.interventions(blocked)):
        logits = model(torch.tensor([whole]), use_cache=False).logits[0, len(ids) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(whole[len(ids) :])[:, None]).sum())


@pytest.fixture(scope="module")
def alone(tokenizer) -> list[list[float]]:
    """What every label scores under each condition, by a model of its own."""
    model = make_llama()
    return [
        [_one_by_one(model, tokenizer, condition, pair) for pair in _pairs()]
        for condition in _conditions(model)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_every_label_scores_as_it_does_alone(tokenizer, batch_size, first, alone):
    model = make_llama()
    conditions, pairs = _conditions(model), _pairs()
    # Whichever comes first meets a model that nothing is known of.
    conditions = [*conditions[first:], *conditions[:first]]
    expected = [*alone[first:], *alone[:first]]
    lm = InterventionLM(model, tokenizer, batch_size=batch_size)
    encoded = lm.encode(pairs)
    lm.share(conditions)
    for condition, values in zip(conditions, expected, strict=True):
        with lm.under(condition):
            scored = [value for value, _ in lm._loglikelihood_tokens(encoded, True)]
        torch.testing.assert_close(scored, values, atol=2e-4, rtol=1e-4)


def test_kept_layers_give_the_same_bits_and_are_not_run_again(tokenizer):
    model = make_llama()
    conditions = _conditions(model)
    lm = InterventionLM(model, tokenizer, batch_size=4)
    encoded = lm.encode(_pairs())

    def score(condition) -> list[tuple[float, bool]]:
        with lm.under(condition):
            return lm._loglikelihood_tokens(encoded, True)

    assert shares_layers(model)
    apart = [score(condition) for condition in conditions]
    attended = [0, 0, 0]

    def count(layer: int) -> None:
        attended[layer] += 1

    for layer, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(lambda *_, layer=layer: count(layer))
    lm.share(conditions)
    assert [score(condition) for condition in conditions] == apart
    # Eleven prompts are three batches, and each condition runs the prompts' common start. Layer 0
    # is run for the full model and for the condition that edits it; layer 1 once more for each of
    # the two that edit it; layer 2 for all.
    assert attended == [6 + 3 * 2, 6 + 3 * 4, 6 + 3 * 6]
    lm.forget()
    assert not lm._reuse._kept
    assert all("forward" not in block.__dict__ for block in model.model.layers)


def test_a_failing_pass_leaves_no_block_skipped():
    model = make_llama()
    ids = torch.tensor([[5, 6, 7, 8]])
    reuse = LayerReuse(model)
    reuse.want([2])
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        with reuse.around(b"key", 2):
            model(ids, use_cache=False)
        with pytest.raises(RuntimeError, match="on purpose"), reuse.around(b"key", 2):
            raise RuntimeError("on purpose")
        assert torch.equal(model(ids, use_cache=False).logits, before)


def test_no_more_is_kept_than_the_budget(tokenizer):
    model = make_llama()
    reuse = LayerReuse(model, max_bytes=4 * 32 * 4)
    reuse.want([0, 1])
    for number in range(3):
        with torch.no_grad(), reuse.around(bytes([number]), 2):
            model(torch.tensor([[number, 6, 7, 8]]), use_cache=False)
    assert len(reuse._kept) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shares_starts_and_layers(family):
    model = make(family)
    assert shares_start(model)
    assert shares_layers(model)


def test_a_model_without_a_usable_cache_is_run_in_full(tokenizer):
    model = make_llama()
    forward = model.model.forward

    def without_cache(*args, past_key_values=None, **kwargs):
        return forward(*args, **{**kwargs, "use_cache": False})

    model.model.forward = without_cache
    assert not shares_start(model)
    pairs = _pairs(3)
    lm = InterventionLM(model, tokenizer)
    scored = [value for value, _ in lm._loglikelihood_tokens(lm.encode(pairs), True)]
    alone = [_one_by_one(model, tokenizer, FULL, pair) for pair in pairs]
    torch.testing.assert_close(scored, alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 2, 3, 4]], 2),
        ([[1, 2], [1, 2]], 2),
        ([[1, 2], [1, 2, 3]], 2),
        ([[4], [5]], 0),
    ],
)
def test_common_start_is_what_all_rows_begin_with(rows, length):
    assert common_start(rows) == length
