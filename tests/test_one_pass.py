"""All labels of a context in one pass score as sequences of their own, on every family."""

from __future__ import annotations

import pytest
import torch

import icl_helpers as icl
from icl_helpers import reuse
from icl_helpers.condition import CATEGORIES, FULL, Condition
from icl_helpers.lm import Encoded, InterventionLM
from icl_helpers.reuse import scored_logits, shares_context, shares_start
from tests.conftest import make_llama
from tests.test_attention import FAMILIES, HEADS, brute_force, forward, knocked_out, make

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


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_score_as_sequences_of_their_own(tokenizer, family, implementation, ablation):
    if implementation == "sdpa" and family in ("gemma2", "gpt_oss"):
        pytest.skip("transformers refuses SDPA for this family")
    model, condition = make(family), _condition(ablation)
    alone = [_alone(model, family, condition, request) for request in _requests()]
    model.set_attn_implementation(implementation)
    assert shares_context(model, condition)
    assert shares_start(model)
    lm = _scorer(model, tokenizer)
    passes = _count_passes(model)
    with lm.under(condition):
        scored = lm._loglikelihood_tokens(_requests(), True)
    assert passes == [4, 2]
    values, expected = ([value for value, _ in found] for found in (scored, alone))
    print("ERR", family, ablation, max(abs(a-b) for a,b in zip(values, expected)), min(expected))
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
    assert [greedy for _, greedy in scored] == [greedy for _, greedy in alone]
