"""Switches between the paper's text, the published code and this package; what they change."""

from __future__ import annotations

import random

import pytest
import torch

import icl_helpers as icl

FEW_LABELS = "D.\n\nA B:Foo\n\nC D:Bar\n\nE F:"


def test_any_layer_control_is_one_draw_from_all_layers_but_the_last():
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    found = icl.conditions(scores, fractions=[0.25], ablations=["zero"], control="any_layer")
    every = [(layer, head) for layer in range(3) for head in range(6)]
    for condition in found[2:]:
        expected = random.Random(condition.ablation_seed).sample(every, 6)
        assert list(condition.heads) == expected
    with pytest.raises(icl.InputError, match="smaller fraction"):
        icl.conditions(scores, fractions=[0.9], ablations=["zero"], control="any_layer")
    with pytest.raises(icl.InputError, match="any_layer"):
        icl.conditions(scores, control="anything")


def test_opening_blank_line_hides_the_first_sequence_from_later_blank_lines(tokenizer):
    encoded = tokenizer(FEW_LABELS, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded.offset_mapping
    first = next(i for i, (_, end) in enumerate(offsets) if end > FEW_LABELS.index("A"))
    later = [i for i, (a, b) in enumerate(offsets) if a > first and FEW_LABELS[a:b].strip() == ""]
    without = icl.induction_pattern(FEW_LABELS, tokenizer, categories=["blank_lines"])
    names = ["blank_lines", "opening_blank_line"]
    with_it = icl.induction_pattern(FEW_LABELS, tokenizer, categories=names)
    more = (with_it & ~without).nonzero().tolist()
    assert more == [[query, first] for query in later]
    assert not (without & ~with_it).any()
    with pytest.raises(icl.InputError, match="add blank_lines"):
        icl.induction_pattern(FEW_LABELS, tokenizer, categories=["labels", "opening_blank_line"])
