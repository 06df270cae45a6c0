"""Heads, random sequences, mean head outputs, and the published code's expected values."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import icl_helpers as icl
from icl_helpers.attention.passes import AttentionCall, attention_probabilities
from icl_helpers.attention.scores import token_pool
from tests.conftest import SHARED, make_llama

REFERENCE = SHARED / "reference"


def test_top_heads_are_the_highest_scores_in_order():
    scores = torch.tensor([[0.1, 0.9, 0.2], [0.8, 0.3, 0.7]])
    assert icl.top_heads(scores, 0.5) == [(0, 1), (1, 0), (1, 2)]


@given(st.integers(1, 48), st.integers(1, 64), st.floats(0.001, 1.0))
def test_number_of_top_heads_is_the_ceiling(layers, heads, fraction):
    found = icl.top_heads(torch.rand(layers, heads), fraction)
    exact = layers * heads * fraction
    assert len(set(found)) == len(found)
    assert exact - 1e-6 <= len(found) < exact + 1


@pytest.mark.parametrize(
    ("total", "fraction", "count"), [(1024, 0.01, 11), (1024, 0.03, 31), (100, 0.07, 7)]
)
def test_number_of_top_heads_in_known_cases(total, fraction, count):
    assert len(icl.top_heads(torch.rand(1, total), fraction)) == count


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, math.nan, "0.1", True])
def test_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(icl.InputError, match="fraction"):
        icl.top_heads(torch.rand(2, 2), fraction)


def test_random_heads_are_drawn_layer_by_layer_as_published():
    like = [(3, 1), (0, 2), (3, 5), (1, 7)]
    generator = random.Random(43)
    expected = [(3, h) for h in generator.sample(range(8), 2)]
    expected += [(0, h) for h in generator.sample(range(8), 1)]
    expected += [(1, h) for h in generator.sample(range(8), 1)]
    assert icl.random_heads(like, 8, seed=43) == expected


@given(st.integers(0, 2**31), st.integers(1, 8))
def test_strict_control_matches_layers_and_avoids_the_excluded(seed, count):
    like = [icl.Head(2, h) for h in range(count)]
    found, borrowed = icl.layer_matched_heads(like, 12, 4, seed=seed, exclude=like)
    assert len(set(found)) == count
    assert not set(found) & set(like)
    assert len(borrowed) == max(0, count - (12 - count))
    assert all(head.layer in (1, 3) for head in borrowed)


def test_random_sequences_are_distinct_reproducible_and_from_the_middle_merges(tokenizer):
    first = icl.random_sequences(tokenizer, n_sequences=3, length=20, seed=5)
    assert torch.equal(first, icl.random_sequences(tokenizer, n_sequences=3, length=20, seed=5))
    assert torch.equal(first[1:], icl.random_sequences(tokenizer, n_sequences=2, length=20, seed=6))
    assert all(len(set(row)) == 20 for row in first.tolist())
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    ranked = [tokenizer.get_vocab()["".join(pair)] for pair in merges]
    cut = int(len(ranked) * 0.04)
    allowed = set(ranked[cut : len(ranked) - cut])
    assert set(first.flatten().tolist()) <= allowed


def test_tokenizer_without_merges_is_ranked_by_id():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, **{f"w{i}": i for i in range(1, 101)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    words = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<s>")
    pool, ranking = token_pool(words)
    assert ranking == "token ids"
    assert pool == list(range(5, 97))
    assert icl.random_sequences(words, length=50).shape == (5, 50)


def test_reserved_tokens_of_a_tokenizer_without_merges_are_never_drawn():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    reserved = ["<s>", "[PAD]", "[unused7]", "<extra_id_0>", "<0x0A>", "<|im_end|>", "[control_8]"]
    ordinary = [*(f"w{i}" for i in range(60)), "<", ">", "[", "]", "<two words>", "[a-b]", "a<b>c"]
    vocabulary = {token: number for number, token in enumerate([*reserved, *ordinary])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<s>")
    # An added one looks like a word, and a word may become special.
    words.add_tokens(["tool"])
    words.add_special_tokens({"eos_token": "w3"})
    expected = [vocabulary[token] for token in ordinary if token != "w3"]
    assert token_pool(words, exclude_ratio=0.0) == (expected, "token ids")
    drawn = icl.random_sequences(words, length=60)
    assert set(drawn.flatten().tolist()) <= set(expected)


def test_too_long_a_sequence_is_refused(tokenizer):
    with pytest.raises(icl.InputError, match="length is 5000"):
        icl.random_sequences(tokenizer, length=5000)


def test_published_formula_adds_the_position_after_bos(llama):
    sequences = torch.stack([torch.randperm(300)[:9] + 5])
    published = icl.prefix_matching_scores(llama, sequences, bos_token_id=0)
    strict = icl.prefix_matching_scores(llama, sequences, bos_token_id=0, published_formula=False)
    llama.set_attn_implementation("eager")
    ids = torch.cat([torch.zeros(1, 1, dtype=torch.long), sequences.repeat(1, 4)], dim=1)
    with torch.no_grad():
        attentions = llama(ids, output_attentions=True).attentions
    for layer in range(3):
        extra = sum(attentions[layer][0, :, i, 1] for i in (18, 27, 36)) / 27
        assert torch.allclose(published[0, layer] - strict[0, layer], extra, atol=1e-6)


def test_scores_do_not_depend_on_the_batch_size(llama):
    sequences = torch.stack([torch.randperm(300)[:9] + 5 for _ in range(5)])
    whole = icl.prefix_matching_scores(llama, sequences)
    assert torch.allclose(
        whole, icl.prefix_matching_scores(llama, sequences, batch_size=2), atol=1e-6
    )


def slow_attention(model, layer: int, x: torch.Tensor) -> torch.Tensor:
    """One Llama attention block by loops over heads and queries, [positions, heads, d_head]."""
    module = model.model.layers[layer].self_attn
    position = torch.arange(len(x))
    frequency = 1.0 / model.config.rope_parameters["rope_theta"] ** (torch.arange(0, 8, 2) / 8)
    angle = position[:, None] * frequency[None]
    cos, sin = torch.cat([angle, angle], 1).cos(), torch.cat([angle, angle], 1).sin()

    def rotate(t: torch.Tensor) -> torch.Tensor:
        return t * cos + torch.cat([-t[:, 4:], t[:, :4]], dim=1) * sin

    q, k, v = (x @ getattr(module, f"{n}_proj").weight.T for n in "qkv")
    out = torch.zeros(len(x), 4, 8)
    for head in range(4):
        kv = head // 2
        query = rotate(q[:, head * 8 : head * 8 + 8])
        key = rotate(k[:, kv * 8 : kv * 8 + 8])
        value = v[:, kv * 8 : kv * 8 + 8]
        for i in range(len(x)):
            weights = torch.softmax(query[i] @ key[: i + 1].T / 8**0.5, dim=-1)
            out[i, head] = weights @ value[: i + 1]
    return out


@torch.no_grad()
def test_mean_head_outputs_equal_a_slow_loop(llama):
    ids = torch.randint(2, 400, (5, 11))
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}
    handles = [
        block.input_layernorm.register_forward_hook(lambda _, a, o, i=i: inputs.update({i: o}))
        for i, block in enumerate(llama.model.layers)
    ]
    handles += [
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda _, a, i=i: outputs.update({i: a[0]})
        )
        for i, block in enumerate(llama.model.layers)
    ]
    llama(ids)
    for handle in handles:
        handle.remove()
    by_input = icl.mean_head_outputs(llama, ids, batch_size=2)
    by_output = icl.mean_head_outputs(llama, ids, average="head_output", batch_size=2)
    for layer in range(3):
        slow = slow_attention(llama, layer, inputs[layer].mean(0))
        assert torch.allclose(by_input[layer], slow, atol=1e-4)
        assert torch.allclose(by_output[layer], outputs[layer].mean(0).view(11, 4, 8), atol=1e-5)
    assert not torch.allclose(by_input, by_output, atol=1e-3)


def test_mean_output_of_one_sample_ablates_nothing_on_that_sample(llama):
    ids = torch.randint(2, 400, (1, 11))
    means = icl.mean_head_outputs(llama, ids)
    with torch.no_grad():
        plain = llama(ids).logits
        everything = [icl.Head(layer, head) for layer in range(3) for head in range(4)]
        with icl.intervene(llama, icl.MeanAblation(everything, means)):
            assert torch.allclose(llama(ids).logits, plain, atol=1e-4)


def test_unknown_average_is_refused(llama):
    with pytest.raises(icl.InputError, match="attention_input.*head_output.*'median'"):
        icl.mean_head_outputs(llama, torch.ones(1, 4, dtype=torch.long), average="median")


def test_reference_samples_are_joined_texts_cut_to_length(tokenizer):
    texts = [f"apple {word} cat" for word in ["banana", "cherry", "fig", "grape", "lemon"]] * 40
    ids = icl.reference_ids(tokenizer, texts, n_samples=3, n_positions=30)
    assert ids.shape == (3, 30)
    used = 0
    for row in ids:
        n = 1
        while len(tokenizer(" ".join(texts[used : used + n])).input_ids) <= 30:
            n += 1
        expected = tokenizer(" ".join(texts[used : used + n])).input_ids[:30]
        assert row.tolist() == expected
        used += n


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the published code's values are not here")
class TestPublishedValues:
    @pytest.fixture(scope="class")
    def setup(self):
        expected = json.loads((REFERENCE / "expected.json").read_text())
        model = AutoModelForCausalLM.from_pretrained(REFERENCE / "llama-tiny", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "llama-tiny")
        means = icl.mean_head_outputs(model, torch.tensor(expected["reference_ids"]), batch_size=4)
        return expected, model, tokenizer, means

    def test_prefix_matching_scores(self, setup):
        expected, model, _, _ = setup
        found = icl.prefix_matching_scores(model, torch.tensor(expected["sequences"])).mean(0)
        assert torch.allclose(found, torch.tensor(expected["prefix_matching_mean"]), atol=1e-6)

    @pytest.mark.parametrize("case", range(3))
    def test_logits_under_every_condition(self, setup, case):
        expected, model, tokenizer, means = setup
        scores = torch.tensor(expected["prefix_matching_mean"])
        entry = expected["cases"][case]
        ids = tokenizer(entry["context"], add_special_tokens=False, return_tensors="pt").input_ids
        assert len(entry["logits_last_position"]) > 10
        for name, logits in entry["logits_last_position"].items():
            kind, _, fraction = name.partition("_")
            interventions = []
            if kind != "full":
                heads = icl.top_heads(scores, float(fraction))
                if kind.startswith("rnd"):
                    heads = icl.random_heads(heads, 8, seed=int(kind[3:]))
                if kind == "knock":
                    blocked = icl.induction_pattern(
                        entry["context"], tokenizer, categories=("words", "labels", "colons")
                    )
                    interventions = [icl.AttentionKnockout(heads, blocked)]
                else:
                    interventions = [icl.MeanAblation(heads, means)]
            with torch.no_grad(), icl.intervene(model, *interventions):
                found = model(ids).logits[0, -1]
            assert torch.allclose(found, torch.tensor(logits), atol=1e-4), name


def test_attention_patterns_equal_eager_attention():
    model = make_llama()
    ids = torch.randint(2, 400, (2, 9))
    found = icl.attention_patterns(model, ids, [(0, 3), (2, 1)])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    assert torch.allclose(found[icl.Head(0, 3)], attentions[0][:, 3], atol=1e-5)
    assert torch.allclose(found[icl.Head(2, 1)], attentions[2][:, 1], atol=1e-5)


def test_a_pattern_made_on_the_cpu_is_taken_to_the_device_of_the_attention():
    """The meta device refuses a mask of another device, as an accelerator does."""
    query, key = (torch.empty(1, n, 5, 8, device="meta") for n in (4, 2))
    passes: Any = None
    call = AttentionCall(torch.nn.Identity(), query, key, key, None, {}, query, passes)
    blocked = torch.zeros(5, 5, dtype=torch.bool)
    probabilities = attention_probabilities(call, heads=[1, 3], blocked=blocked)
    assert probabilities.device.type == "meta"
    assert probabilities.shape == (1, 2, 5, 5)
