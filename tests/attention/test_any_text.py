"""Patterns of any text, their control, and resample ablation, against loops and plain hooks."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import icl_helpers as icl
from icl_helpers.attention.induction_pattern import token_segments
from icl_helpers.tasks.prompts import demonstration_spans, shuffled_labels
from tests.attention.test_hook import HEADS, batch, brute_force, forward, make, projections, same
from tests.conftest import make_llama

FIVE = ["llama", "gpt2", "gpt_neox", "gemma3_text", "qwen3"]
TEXT = "The cat saw the dog. The dog saw the cat, and THE cat_1 sat; a cat slept"


def slow_pattern(ids: list[int], segments: list[int] | None = None) -> torch.Tensor:
    blocked = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for i in range(len(ids)):
        for j in range(1, i + 1):
            apart = segments is None or (
                segments[i] != segments[j - 1] and min(segments[i], segments[j - 1]) >= 0
            )
            blocked[i, j] = ids[j - 1] == ids[i] and apart
    return blocked


@given(st.data())
def test_repeated_token_pattern_equals_a_slow_loop(data):
    length = data.draw(st.integers(1, 12))
    rows = st.lists(st.integers(0, 3), min_size=length, max_size=length)
    first, second = data.draw(rows), data.draw(rows)
    segments = [number - 1 for number in data.draw(rows)]
    found = icl.repeated_token_pattern(torch.tensor(first))
    assert torch.equal(found, slow_pattern(first))
    assert not found[:, 0].any()
    together = icl.repeated_token_pattern(torch.tensor([first, second]))
    assert torch.equal(together, torch.stack([slow_pattern(first), slow_pattern(second)]))
    across = icl.repeated_token_pattern(torch.tensor(first), segments=torch.tensor(segments))
    assert torch.equal(across, slow_pattern(first, segments))


@pytest.mark.parametrize("ids", [torch.zeros(3), torch.zeros(1, 2, 3, dtype=torch.long)])
def test_ids_that_are_no_prompt_are_refused(ids):
    with pytest.raises(icl.InputError, match=r"\[tokens\] or \[batch, tokens\]"):
        icl.repeated_token_pattern(ids)


def test_repeated_word_pattern_equals_a_slow_loop_over_words(tokenizer):
    encoded = tokenizer(TEXT, return_offsets_mapping=True)
    offsets = encoded.offset_mapping
    words = [(m[0].lower(), m.start(), m.end()) for m in re.finditer(r"\w+", TEXT)]

    def tokens(start: int, end: int) -> list[int]:
        return [i for i, (first, last) in enumerate(offsets) if first < end and last > start]

    expected = torch.zeros(len(offsets), len(offsets), dtype=torch.bool)
    for number, (word, start, end) in enumerate(words):
        for earlier, first, last in words[:number]:
            if earlier == word:
                for query in tokens(start, end):
                    expected[query, max(tokens(first, last)) + 1] = True
    assert expected.sum() > 20
    assert torch.equal(icl.repeated_word_pattern(TEXT, tokenizer), expected)
    # "cat_1" is a word of its own.
    assert not expected[tokens(*next(w for w in words if w[0] == "cat_1")[1:])].any()


@pytest.mark.parametrize("text", ["", "...", "word", ". word"])
def test_text_without_a_repeated_word_has_no_pattern(text, tokenizer):
    found = icl.repeated_word_pattern(text, tokenizer)
    assert found.shape == (len(tokenizer(text).input_ids),) * 2
    assert not found.any()


@pytest.mark.parametrize("task", ["wordseq1_4way", "repetition", "fact_opinion"])
def test_demonstrations_are_found_and_their_labels_shuffled(task, tokenizer):
    prompt = icl.build_prompts(task, shots=6, seed=3)[5]
    spans = demonstration_spans(prompt)
    parts = [prompt.context[start:end] for start, end in spans]
    assert prompt.context.endswith("".join(parts))
    assert len(parts) == 7
    labels = [next(c for c in prompt.choices if p.endswith(f":{c}\n\n")) for p in parts[:-1]]
    other = shuffled_labels(prompt, seed=1)
    assert other != prompt
    assert shuffled_labels(prompt, seed=1) == other
    pieces = [part.removesuffix(f"{label}\n\n") for part, label in zip(parts, labels, strict=False)]
    start = prompt.context[: spans[0][0]]
    shown = [
        other.context[start_ : end - 2].rpartition(":")[2]
        for start_, end in demonstration_spans(other)[:-1]
    ]
    assert sorted(shown) == sorted(labels)
    demonstrations = [f"{piece}{label}\n\n" for piece, label in zip(pieces, shown, strict=False)]
    assert other.context == start + "".join(demonstrations) + parts[-1]
    segments = token_segments(prompt.context, tokenizer, spans)
    ends = [end for _, end in tokenizer(prompt.context, return_offsets_mapping=True).offset_mapping]
    for segment, end in zip(segments.tolist(), ends, strict=True):
        inside = [number for number, (a, b) in enumerate(spans) if a < end <= b]
        assert [segment] == (inside or [-1])


def test_a_prompt_made_otherwise_has_no_demonstrations_to_find():
    prompt = icl.Prompt("Say.\n\nA:Foo\n\nB:", ("Foo", "Bar"), 0, 0, n_demonstrations=2)
    with pytest.raises(icl.InputError, match="1 labels stand in a prompt of 2"):
        shuffled_labels(prompt, seed=0)


@given(st.integers(1, 14), st.integers(0, 2**31), st.floats(0, 1))
def test_control_blocks_as_many_other_earlier_keys(length, seed, density):
    generator = torch.Generator().manual_seed(seed)
    blocked = (torch.rand(2, length, length, generator=generator) < density).tril()
    control = icl.control_pattern(blocked, seed=seed)
    assert torch.equal(control, icl.control_pattern(blocked, seed=seed))
    assert not (control & blocked).any()
    for row in range(2):
        for query in range(length):
            free = sum(not blocked[row, query, key] for key in range(query))
            assert control[row, query].sum() == min(free, int(blocked[row, query].sum()))
            assert not control[row, query, query:].any()


def test_control_draws_every_key_about_as_often():
    blocked = torch.zeros(9, 9, dtype=torch.bool)
    blocked[8, :3] = True
    counts = sum(icl.control_pattern(blocked, seed=seed)[8].int() for seed in range(500))
    assert counts[:3].sum() == counts[8] == 0
    assert counts[3:8].min() > 250


@pytest.mark.parametrize("family", FIVE)
def test_resample_equals_overwriting_each_prompts_heads(family):
    model = make(family)
    ids, mask = batch()
    others = torch.randint(2, 64, (3, 14), generator=torch.Generator().manual_seed(8))
    seen: dict = {}
    handles = [
        module.register_forward_pre_hook(lambda _, a, i=i: seen.update({i: a[0].view(3, 14, 4, 8)}))
        for i, module in enumerate(projections(model, family))
    ]
    forward(model, others, torch.ones_like(others))
    for handle in handles:
        handle.remove()
    outputs = icl.prompt_head_outputs(model, others)
    expected = torch.stack([seen[0], seen[1]], dim=1)
    assert outputs.shape == (3, 2, 14, 4, 8)
    assert torch.allclose(outputs, expected, atol=1e-5)
    positions = torch.tensor([[0, 5], [13, 1], [2, 2]])
    some = icl.prompt_head_outputs(model, others, positions=positions)
    for row in range(3):
        assert torch.allclose(some[row], expected[row][:, positions[row]], atol=1e-5)
    for given_, by_head in (
        (outputs, {tuple(h): expected[:, h.layer, :12, h.head] for h in HEADS}),
        (outputs[1], {tuple(h): expected[1, h.layer, :12, h.head] for h in HEADS}),
    ):
        with icl.intervene(model, icl.ResampleAblation(HEADS, given_)):
            found = forward(model, ids, mask)
        assert same(found, brute_force(model, family, ids, mask, by_head), mask)
    assert not same(found, forward(model, ids, mask), mask)


def test_resampling_a_prompts_own_outputs_changes_nothing(llama):
    ids = torch.randint(2, 400, (2, 9))
    everywhere = [(layer, head) for layer in range(3) for head in range(4)]
    plain = forward(llama, ids, torch.ones_like(ids))
    own = icl.ResampleAblation(everywhere, icl.prompt_head_outputs(llama, ids))
    with icl.intervene(llama, own):
        assert torch.allclose(forward(llama, ids, torch.ones_like(ids)), plain, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((2, 3, 4, 4, 8), icl.InterventionError, "position 9, .* end at position 3"),
        ((3, 3, 12, 4, 8), icl.InterventionError, "of 3 prompts, the batch has 2"),
        ((2, 12, 4, 8), icl.InputError, r"\[batch, 3 layers, positions, 4 heads, 8 d_head\]"),
        ((12, 4, 8), icl.InputError, "prompt_head_outputs"),
    ],
)
def test_outputs_that_do_not_fit_are_named(shape, error, message):
    model, ids = make_llama(), torch.randint(2, 400, (2, 10))
    with (
        pytest.raises(error, match=message),
        icl.intervene(model, icl.ResampleAblation([(1, 1)], torch.zeros(shape))),
    ):
        forward(model, ids, torch.ones_like(ids))
