"""Properties of head selection, and of patterns under tokenizers and texts of any kind."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import icl_helpers as icl
from icl_helpers.attention.heads import head_count

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10**6))
FRACTIONS = st.floats(0.01, 1.0)


def scores_of(layers: int, heads: int, seed: int) -> torch.Tensor:
    return torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed))


@given(SIZES, FRACTIONS)
def test_no_head_left_out_scores_more_than_one_chosen(size, fraction):
    scores = scores_of(*size)
    chosen = icl.top_heads(scores, fraction)
    assert len(set(chosen)) == len(chosen) == head_count(scores.numel(), fraction)
    rest = [float(s) for i, s in enumerate(scores.flatten()) if divmod(i, size[1]) not in chosen]
    assert not rest or min(float(scores[head]) for head in chosen) >= max(rest)


@given(SIZES, FRACTIONS, FRACTIONS)
def test_a_larger_fraction_holds_the_heads_of_a_smaller_one(size, a, b):
    scores = scores_of(*size)
    small, large = (icl.top_heads(scores, fraction) for fraction in sorted((a, b)))
    assert large[: len(small)] == small


@given(SIZES, FRACTIONS, st.integers(0, 10**6))
def test_random_heads_have_the_layers_of_the_chosen_ones_and_depend_on_the_seed_alone(
    size, fraction, seed
):
    chosen = icl.top_heads(scores_of(*size), fraction)
    drawn = icl.random_heads(chosen, size[1], seed=seed)
    assert len(set(drawn)) == len(drawn)
    assert Counter(h.layer for h in drawn) == Counter(h.layer for h in chosen)
    assert drawn == icl.random_heads(chosen, size[1], seed=seed)


@given(SIZES, FRACTIONS, st.integers(0, 10**6))
def test_strict_control_is_disjoint_and_as_large(size, fraction, seed):
    layers, heads, _ = size
    chosen = icl.top_heads(scores_of(*size), fraction)
    assume(2 * len(chosen) <= layers * heads)
    drawn, borrowed = icl.layer_matched_heads(chosen, heads, layers, seed=seed, exclude=chosen)
    assert len(set(drawn)) == len(chosen)
    assert not set(drawn) & set(chosen)
    assert set(borrowed) <= set(drawn)
    assert all(0 <= h.layer < layers and 0 <= h.head < heads for h in drawn)


def word_tokenizer(words: list[str], *, pieces: bool) -> PreTrainedTokenizerFast:
    """A tokenizer without BOS, padding or merges: whole words, or single characters."""
    vocab = {"[UNK]": 0, **{word: i + 1 for i, word in enumerate(dict.fromkeys(words))}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    split = pre_tokenizers.Split("", "isolated") if pieces else pre_tokenizers.Whitespace()
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


WORDS = st.text(st.characters(categories=["Ll", "Lu", "Lo", "Nd"]), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.lists(WORDS, min_size=1, max_size=4), WORDS), min_size=1, max_size=6),
    st.lists(WORDS, min_size=1, max_size=4),
    st.booleans(),
)
def test_pattern_of_any_prompt_is_square_and_blocks_only_the_past(examples, query, pieces):
    shown = "\n\n".join(f"{' '.join(words)}: {label}" for words, label in examples)
    prompt = f"Classify.\n\n{shown}\n\n{' '.join(query)}:"
    known = [word for words, label in examples for word in (*words, label)]
    tokenizer = word_tokenizer([*known[::2], ":", *(known[0])], pieces=pieces)
    n = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    try:
        pattern = icl.induction_pattern(prompt, tokenizer)
    except icl.InputError:
        return
    assert pattern.shape == (n, n)
    assert pattern.dtype == torch.bool
    assert not pattern.triu(1).any()
