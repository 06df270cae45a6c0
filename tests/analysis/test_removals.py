"""Kinds of removal, their controls and side effects, against passes with the heads edited by hand."""

from __future__ import annotations

import math

import pytest
import torch

import icl_helpers as icl
from icl_helpers.analysis import measured
from icl_helpers.analysis.removals import (
    KINDS,
    Removals,
    aligned_outputs,
    blocked_attention,
    score_prompts,
    sequence_losses,
)
from icl_helpers.attention.heads import Head
from icl_helpers.attention.induction_pattern import control_pattern, induction_patterns
from icl_helpers.evaluation.conditions import Condition
from tests.analysis.test_dose_response import by_hand

HEADS = (Head(0, 1), Head(2, 3))
OTHERS = ((Head(0, 2), Head(2, 0)), (Head(0, 3), Head(2, 1)))


@pytest.fixture
def prompts():
    return icl.build_prompts("wordseq1_binary", shots=2, seed=42)[:3]


@pytest.fixture
def removals(llama, tokenizer, prompts):
    generator = torch.Generator().manual_seed(0)
    means = [torch.randn(3, 300, 4, 8, generator=generator) for _ in range(2)]
    return Removals(
        llama, tokenizer, prompts, HEADS, OTHERS, means_of_inputs=means[0],
        means_of_outputs=means[1], categories=["words", "labels", "colons", "blank_lines"],
    )  # fmt: skip


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


@torch.no_grad()
def slow(model, tokenizer, prompts, heads, outputs=None) -> list[list[float]]:
    """Log-probabilities with heads overwritten in front of the output projection, label by label."""
    condition = Condition("random_heads", "mean", 0.1, None, heads, outputs, means_key="m")
    return [
        [by_hand(model, tokenizer, prompt.context, label, condition) for label in prompt.choices]
        for prompt in prompts
    ]


def near(found, expected) -> bool:
    return all(a == pytest.approx(b, abs=1e-3) for a, b in zip(found, expected, strict=True))


def test_scores_without_an_intervention_are_those_of_single_passes(llama, tokenizer, prompts):
    assert near(score_prompts(llama, tokenizer, prompts), slow(llama, tokenizer, prompts, ()))


@pytest.mark.parametrize(
    ("kind", "heads", "means"),
    [
        ("zero", HEADS, None), ("mean of inputs", HEADS, "means_of_inputs"),
        ("mean of outputs", HEADS, "means_of_outputs"), ("zero, random heads", OTHERS[1], None),
        ("mean of inputs, random heads", OTHERS[1], "means_of_inputs"),
    ],
)  # fmt: skip
def test_heads_are_overwritten_by_zero_or_means(kind, heads, means, removals, llama, tokenizer):
    outputs = torch.zeros(3, 300, 4, 8) if means is None else getattr(removals, means)
    expected = slow(llama, tokenizer, removals.prompts, heads, outputs)
    assert near(removals.scores(kind, 1), expected)


@pytest.mark.parametrize("draw", [0, 1])
@torch.no_grad()
def test_resampled_heads_say_what_they_say_at_the_end_of_another_prompt(
    draw, removals, llama, tokenizer
):
    found = removals.scores("resample", draw)
    for number, prompt in enumerate(removals.prompts):
        other = removals.prompts[(number + 1 + draw) % 3]
        given, own = ids_of(tokenizer, other.context), ids_of(tokenizer, prompt.context)
        inputs = {}
        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda _, args, at=at, inputs=inputs: inputs.__setitem__(at, args[0])
            )
            for at, layer in enumerate(llama.model.layers)
        ]
        llama(given)
        for handle in handles:
            handle.remove()
        outputs = torch.zeros(3, 300, 4, 8)
        for position in range(300):
            source = min(max(position + given.shape[1] - own.shape[1], 0), given.shape[1] - 1)
            for layer in range(3):
                outputs[layer, position] = inputs[layer][0, source].view(4, 8)
        assert near([found[number]], slow(llama, tokenizer, [prompt], HEADS, outputs))


@torch.no_grad()
def with_pattern(model, tokenizer, prompt, heads, blocked) -> list[float]:
    """Log-probabilities under a blocked pattern, one sequence at a time."""
    scores = []
    start = ids_of(tokenizer, prompt.context).shape[1]
    for label in prompt.choices:
        ids = ids_of(tokenizer, prompt.context + label)
        with icl.intervene(model, icl.AttentionKnockout(heads, blocked)):
            logits = model(ids).logits[0].log_softmax(-1)
        scores.append(sum(float(logits[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])))
    return scores


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("knockout")])
def test_knockout_blocks_the_pattern_or_its_control(kind, removals, llama, tokenizer, prompts):
    patterns = induction_patterns([p.context for p in prompts], tokenizer)
    heads = OTHERS[1] if kind.endswith("heads") else HEADS
    if kind.endswith("positions"):
        patterns = [control_pattern(pattern, seed=1) for pattern in patterns]
    expected = [
        with_pattern(llama, tokenizer, prompt, heads, pattern)
        for prompt, pattern in zip(prompts, patterns, strict=True)
    ]
    assert near(removals.scores(kind, 1), expected)


def test_unknown_kind_is_refused(removals):
    with pytest.raises(icl.InputError, match="kind must be one of zero, "):
        removals.scores("mean")


def test_outputs_of_a_shorter_and_a_longer_prompt_are_aligned_at_their_ends():
    outputs = torch.arange(4.0).view(1, 4, 1, 1)
    assert aligned_outputs(outputs, 6, more=1).flatten().tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert aligned_outputs(outputs, 2).flatten().tolist() == [2, 3]


@torch.no_grad()
def test_attention_that_is_blocked_is_found_again_elsewhere(llama, tokenizer, prompts):
    patterns = induction_patterns([p.context for p in prompts], tokenizer)
    found = blocked_attention(llama, tokenizer, prompts, HEADS, patterns)
    llama.set_attn_implementation("eager")
    totals = dict.fromkeys(found, 0.0)
    count = 0
    for prompt, blocked in zip(prompts, patterns, strict=True):
        attentions = llama(ids_of(tokenizer, prompt.context), output_attentions=True).attentions
        for layer, head in HEADS:
            weights = attentions[layer][0, head].tolist()
            for query, row in enumerate(blocked.tolist()):
                if not any(row):
                    continue
                count += 1
                lost = sum(w for w, hidden in zip(weights[query], row, strict=True) if hidden)
                totals["blocked"] += lost
                for key, (weight, hidden) in enumerate(zip(weights[query], row, strict=True)):
                    if not hidden:
                        name = "first token" if key == 0 else "itself" if key == query else "rest"
                        totals[name] += weight / (1 - lost) - weight
    for name, value in totals.items():
        assert found[name] == pytest.approx(value / count, abs=1e-5)
    gained = found["first token"] + found["itself"] + found["rest"]
    assert gained == pytest.approx(found["blocked"], abs=1e-5)


@torch.no_grad()
def test_losses_are_those_of_each_token_alone(llama):
    ids = torch.randint(2, 400, (2, 9), generator=torch.Generator().manual_seed(0))
    found = sequence_losses(llama, ids)
    for row in range(2):
        for at in range(1, 9):
            chances = llama(ids[row : row + 1, :at]).logits[0, -1].softmax(-1)
            assert float(found[row, at - 1]) == pytest.approx(
                -math.log(chances[ids[row, at]]), abs=1e-3
            )
    with_edit = sequence_losses(llama, ids, [icl.ZeroAblation([(1, 0)])])
    assert (with_edit - found).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["removal_kinds", "attention_moved", "side_effects"])
def test_what_needs_a_pattern_is_not_measured_on_text_alone(measure, tmp_path):
    parameters = icl.stage_parameters(
        run_dir=str(tmp_path), nlp_tasks=["fact_opinion"], analysis_tasks=["fact_opinion"],
        analysis_limit=2, limit=2,
    )  # fmt: skip
    with pytest.raises(icl.NotMeasuredError, match="no abstract task"):
        getattr(measured, measure)(icl.Run(parameters))
