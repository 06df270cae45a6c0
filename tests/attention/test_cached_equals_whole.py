"""However a sequence is run - whole, from a cache, in a batch, by generate - the numbers are one pass's.

The whole pass itself is held against brute force in ``test_hook``.
"""

from __future__ import annotations

import pytest
import torch

import icl_helpers as icl
from tests.attention.test_hook import FAMILIES, HEADS, batch, make

CONDITIONS = ("full", "zero", "mean", "knockout")
LENGTH, START = 12, 7  # beyond the sliding windows of 5 tokens in both parts


def interventions(condition: str, blocked: torch.Tensor) -> list:
    torch.manual_seed(4)
    means = torch.randn(2, 20, 4, 8)
    return {
        "full": [],
        "zero": [icl.ZeroAblation(HEADS)],
        "mean": [icl.MeanAblation(HEADS, means)],
        "knockout": [icl.AttentionKnockout(HEADS, blocked)],
    }[condition]


def logits(model, chosen: list, **inputs) -> torch.Tensor:
    with torch.no_grad(), icl.intervene(model, *chosen):
        return model(**inputs).logits


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


# In double precision what is left of 1e-5 is no rounding, and no token changes its expert.
@pytest.fixture(params=FAMILIES)
def model(request):
    model = make(request.param).double()
    model.set_experts_implementation("eager")  # the others know no double precision
    return model


@pytest.fixture(params=CONDITIONS)
def condition(request):
    return request.param


def pattern(rows: int) -> torch.Tensor:
    torch.manual_seed(3)
    return (torch.rand(rows, LENGTH, LENGTH) < 0.4).tril(-1)


def test_passes_from_a_cache_equal_one_pass(model, condition):
    ids, _ = batch()
    ids[ids == 1] = 2  # no padding here
    blocked = pattern(3)
    blocked[..., 3:] = False  # a first pass must hold every key that is blocked
    chosen = interventions(condition, blocked)
    whole = logits(model, chosen, input_ids=ids, use_cache=False)
    plain = logits(model, [], input_ids=ids, use_cache=False)
    assert (condition == "full") == equal(whole[:, START:], plain[:, START:])
    with torch.no_grad(), icl.intervene(model, *chosen):
        # Passes of other lengths, and one inside another block, leave nothing behind.
        first = model(input_ids=ids[:, :START], use_cache=True)
        with icl.intervene(model):
            third = model(input_ids=ids[:, :3], use_cache=True)
        rest = model(input_ids=ids[:, START:], past_key_values=first.past_key_values).logits
        after = third.past_key_values
        steps = [
            model(input_ids=ids[:, i : i + 1], past_key_values=after).logits
            for i in range(3, LENGTH)
        ]
    assert equal(torch.cat([first.logits, rest], dim=1), whole)
    assert equal(torch.cat([third.logits, *steps], dim=1), whole)


def test_a_right_padded_batch_equals_its_rows_alone(model, condition):
    ids, _ = batch()
    # Windows of 5: after more than 4 tokens of padding a query would see nothing, and eager
    # attention in double precision makes NaN of that.
    mask = (torch.arange(LENGTH) < torch.tensor([12, 9, 8])[:, None]).long()
    blocked = pattern(3)
    together = logits(
        model, interventions(condition, blocked & mask[:, None].bool() & mask[..., None].bool()),
        input_ids=ids, attention_mask=mask, use_cache=False,
    )  # fmt: skip
    for row, n in enumerate(mask.sum(1).tolist()):
        chosen = interventions(condition, blocked[row, :n, :n])
        alone = logits(model, chosen, input_ids=ids[row : row + 1, :n], use_cache=False)
        assert equal(together[row : row + 1, :n], alone)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_equals_one_pass_over_what_it_gave(model, condition, cache):
    ids = batch()[0][:1, :10]
    chosen = interventions(condition, pattern(1)[:, :10, :10])
    model.generation_config.eos_token_id = None
    with torch.no_grad(), icl.intervene(model, *chosen):
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
            cache_implementation=cache, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    whole = logits(model, chosen, input_ids=found.sequences, use_cache=False)
    assert equal(torch.stack(found.logits, dim=1).double(), whole[:, 9:-1])
