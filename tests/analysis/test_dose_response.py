"""Sets of heads, what their removal costs, and the statistics on it, each against a slow count."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import icl_helpers as icl
from icl_helpers.analysis.dose_response import (
    dose_sets,
    group_answers,
    permutation_p,
    rank_correlation,
    set_stability,
    shapley_orders,
    shapley_values,
)
from icl_helpers.attention.heads import Head, doses, strict_sets
from icl_helpers.evaluation.cells import CellGroup
from icl_helpers.evaluation.conditions import FULL, Condition
from icl_helpers.evaluation.scorer import InterventionLM


def test_doses_double_up_to_twice_what_a_run_removes_and_leave_a_head():
    assert doses(4) == [1, 2, 4, 8]
    assert doses(9) == [1, 2, 4, 8, 16]
    assert doses(1) == [1, 2]
    assert doses(8, 12) == [1, 2, 4, 8]
    with pytest.raises(icl.InputError, match="n_removed must be >= 1"):
        doses(0)


def layers(heads) -> Counter:
    return Counter(head.layer for head in heads)


def test_few_strict_sets_are_all_of_them():
    like = [Head(0, 0), Head(0, 1), Head(1, 2)]
    sets, distinct = strict_sets(like, 2, 4)
    expected = {
        frozenset(chosen)
        for chosen in itertools.combinations([Head(a, b) for a in range(2) for b in range(4)], 3)
        if layers(chosen) == layers(like) and not set(chosen) & set(like)
    }
    assert distinct == len(expected) == 3
    assert set(map(frozenset, sets)) == expected
    assert len(sets) == 3


def test_many_strict_sets_are_distinct_draws_of_as_many_heads_in_each_layer():
    like = [Head(1, 3), Head(1, 0), Head(2, 5)]
    sets, distinct = strict_sets(like, 3, 8, draws=20)
    assert distinct == math.comb(6, 2) * 7
    assert len(set(map(frozenset, sets))) == 20
    assert all(layers(one) == layers(like) and not set(one) & set(like) for one in sets)
    assert strict_sets(like, 3, 8, draws=20)[0] == sets


def test_full_layers_borrow_and_the_sets_are_not_counted():
    like = [Head(1, head) for head in range(3)]
    sets, distinct = strict_sets(like, 3, 4, draws=20)
    assert distinct is None
    # Head 1.3 and two of the four heads of layer 0.
    assert set(map(frozenset, sets)) == {
        frozenset([Head(1, 3), Head(0, a), Head(0, b)])
        for a, b in itertools.combinations(range(4), 2)
    }


def test_every_dose_has_the_highest_the_lowest_and_random_sets():
    scores = torch.arange(12).float().view(3, 4)
    found = dose_sets(scores, [1, 2])
    highest, lowest = ([one.heads for one in found if one.chosen_by == way] for way in ("highest", "lowest"))  # fmt: skip
    assert highest == [((2, 3),), ((2, 3), (2, 2))]
    assert lowest == [((0, 0),), ((0, 0), (0, 1))]
    random = [one for one in found if one.chosen_by == "random"]
    assert [(one.draw, one.distinct) for one in random] == [(0, 3), (1, 3), (2, 3), (0, 1)]


def test_answers_are_those_of_single_passes_with_the_heads_taken_out_by_hand(llama, tokenizer):
    heads = (Head(0, 1), Head(2, 3))
    means = torch.randn(3, 512, 4, 8, generator=torch.Generator().manual_seed(0))
    conditions = (FULL, Condition("random_heads", "mean", 0.1, None, heads, means, means_key="m"))
    prompt_set = ("wordseq1_binary", "unrelated", 2, (42,), "synthetic", None, "balanced")
    group = CellGroup(*prompt_set, 4, conditions)
    found = group_answers(InterventionLM(llama, tokenizer), group)
    prompts = icl.build_prompts("wordseq1_binary", shots=2, seed=42)
    with torch.no_grad():
        for condition, answers in zip(conditions, found, strict=True):
            expected = []
            for prompt in chosen_prompts(prompts):
                scores = [by_hand(llama, tokenizer, prompt.context, label, condition)
                          for label in prompt.choices]  # fmt: skip
                expected.append(scores[prompt.target] - scores[1 - prompt.target])
            assert answers.margins == pytest.approx(expected, abs=1e-3)
            assert answers.right == [margin > 0 for margin in expected]
    broken = replace(group, conditions=(FULL,))
    llama.lm_head.weight.data[:] = float("nan")
    assert group_answers(InterventionLM(llama, tokenizer), broken)[0] == ([None] * 4, [False] * 4)


def chosen_prompts(prompts):
    from icl_helpers.tasks.prompts import sample_documents

    return [prompts[at] for at in sample_documents([p.target for p in prompts], 4)]


def by_hand(model, tokenizer, context, label, condition) -> float:
    """A label's log-probability, with heads overwritten in front of the output projection."""
    ids = tokenizer(context + label, add_special_tokens=False, return_tensors="pt").input_ids
    start = len(tokenizer(context, add_special_tokens=False).input_ids)
    handles = []
    for layer, head in condition.heads:

        def overwrite(_, args, layer=layer, head=head):
            states = args[0].clone()
            states[..., 8 * head : 8 * head + 8] = condition.head_outputs[
                layer, : states.shape[1], head
            ]
            return (states,)

        projection = model.model.layers[layer].self_attn.o_proj
        handles.append(projection.register_forward_pre_hook(overwrite))
    scores = model(ids).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    return sum(float(scores[at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))


def test_permutation_p_counts_the_set_itself():
    assert permutation_p(1.0, [0.0] * 19) == 0.05
    assert permutation_p(1.0, [1.0, 2.0, 0.5]) == 3 / 4
    with pytest.raises(icl.InputError, match="draws is empty"):
        permutation_p(1.0, [])


def test_rank_correlation_equals_scipys_on_all_documents_and_on_every_resample():
    rng = np.random.default_rng(5)
    scores = rng.random(12).round(1)
    effects = scores[:, None] + rng.normal(0, 0.6, (12, 9))
    found, low, high = rank_correlation(scores, effects, resamples=300, seed=2)
    assert found == pytest.approx(stats.spearmanr(scores, effects.mean(axis=1)).statistic)
    counts = np.random.default_rng(2).multinomial(9, [1 / 9] * 9, size=300)
    slow = [
        stats.spearmanr(scores, np.repeat(effects, count, axis=1).mean(axis=1)).statistic
        for count in counts
    ]
    assert (low, high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))
    assert low < found < high
    assert np.isnan(rank_correlation(np.ones(12), effects)[0])
    with pytest.raises(icl.InputError, match="a row a score"):
        rank_correlation(scores, effects[:5])


def test_shapley_values_over_all_orders_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    n = 4
    worth = {
        frozenset(s): rng.random() for size in range(n + 1) for s in itertools.combinations(range(n), size)
    }  # fmt: skip
    orders = list(itertools.permutations(range(n)))
    losses = np.array([[worth[frozenset(order[:k])] for k in range(n + 1)] for order in orders])
    found = shapley_values(orders, losses)
    for head in range(n):
        rest = [other for other in range(n) if other != head]
        value = sum(
            math.factorial(len(s)) * math.factorial(n - len(s) - 1) / math.factorial(n)
            * (worth[frozenset({*s, head})] - worth[frozenset(s)])
            for size in range(n) for s in itertools.combinations(rest, size)
        )  # fmt: skip
        assert found[head] == pytest.approx(value)
    whole, nothing = worth[frozenset(range(n))], worth[frozenset()]
    assert found.sum() == pytest.approx(whole - nothing)


def test_shapley_orders_come_with_their_reverses():
    first, second, third = shapley_orders(6, 3, seed=1)
    assert second == first[::-1]
    assert sorted(first) == sorted(third) == list(range(6))
    with pytest.raises(icl.InputError, match=r"heads \+ 1"):
        shapley_values([first], np.zeros((1, 6)))


def test_stability_is_one_for_equal_sequences_and_a_slow_count_for_others():
    scores = torch.rand(1, 2, 8, generator=torch.Generator().manual_seed(0)).repeat(5, 1, 1)
    assert set_stability(scores, 0.25) == (1.0, 1.0, 1.0)
    noisy = scores + torch.rand(5, 2, 8, generator=torch.Generator().manual_seed(1))
    mean, low, high = set_stability(noisy, 0.25, resamples=50, seed=3)
    chosen = set(icl.top_heads(noisy.mean(0), 0.25))
    each = []
    for drawn in np.random.default_rng(3).integers(0, 5, (50, 5)):
        total = sum(noisy[at] for at in drawn.tolist()) / 5
        again = set(icl.top_heads(total, 0.25))
        each.append(len([h for h in again if h in chosen]) / len({*again, *chosen}))
    assert mean == pytest.approx(np.mean(each))
    assert 0 < low <= mean <= high <= 1
    with pytest.raises(icl.InputError, match="at least 2 sequences"):
        set_stability(scores[:1], 0.25)
