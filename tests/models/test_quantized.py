"""Interventions, scores and means on weights in 4 and 8 bits, against attention written by hand.

The oracle runs the same quantised projections; only what lies between them is replaced.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import icl_helpers as icl
from icl_helpers.models.loading import quantization_config, weights_fingerprint
from tests.conftest import make_llama, make_tokenizer

pytest.importorskip("bitsandbytes", reason="the optional extra 'quantized' is not installed")

HEADS = [icl.Head(0, 1), icl.Head(1, 3), icl.Head(2, 0), icl.Head(2, 2)]


@pytest.fixture(scope="module", params=["4bit", "8bit"])
def quantized(request, tmp_path_factory):
    """A random grouped-query Llama saved in full precision and loaded in few bits."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_llama(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, head_dim=16,
        initializer_range=0.1,
    )  # fmt: skip
    model.save_pretrained(folder)
    texts = [p.context for p in icl.build_prompts("repetition", shots=3, seed=1)[:50]]
    make_tokenizer(texts).save_pretrained(folder)
    loaded, tokenizer = icl.load_model(
        str(folder), quantization=request.param, dtype="float32", device="cpu"
    )
    return request.param, loaded, tokenizer, model


def by_hand(model, ids, *, change=None):
    """Logits with every attention computed here; ``change(layer, probabilities, output)`` edits."""
    originals = {}

    def replace(layer, attention):
        def forward(hidden_states, position_embeddings, **_):
            batch, tokens, _ = hidden_states.shape
            shape = (batch, tokens, -1, attention.head_dim)
            query = attention.q_proj(hidden_states).view(shape).transpose(1, 2)
            key = attention.k_proj(hidden_states).view(shape).transpose(1, 2)
            value = attention.v_proj(hidden_states).view(shape).transpose(1, 2)
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            outputs = []
            for head in range(query.shape[1]):
                group = head * key.shape[1] // query.shape[1]
                logits = query[:, head] @ key[:, group].transpose(1, 2) * attention.head_dim**-0.5
                logits = logits.masked_fill(~torch.ones_like(logits).tril().bool(), -torch.inf)
                output = change and change(layer, head, logits, value[:, group])
                outputs.append(logits.softmax(-1) @ value[:, group] if output is None else output)
            return attention.o_proj(torch.cat(outputs, dim=-1)), None

        originals[attention] = attention.forward
        attention.forward = forward

    for layer, block in enumerate(model.model.layers):
        replace(layer, block.self_attn)
    try:
        with torch.no_grad():
            return model(input_ids=ids).logits
    finally:
        for attention in originals:
            del attention.forward


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, atol=2e-3 * float(expected.abs().max()))


@pytest.fixture
def ids():
    return torch.randint(2, 390, (2, 24), generator=torch.Generator().manual_seed(1))


def test_weights_are_in_few_bits_and_close_to_the_full_ones(quantized, ids):
    kind, model, _, full = quantized
    linear = model.model.layers[0].self_attn.o_proj
    assert type(linear).__name__ == {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[kind]
    assert model.get_memory_footprint() < 0.6 * full.get_memory_footprint()
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, full(input_ids=ids).logits
    agreement = torch.cosine_similarity(found, expected, dim=-1).mean()
    assert agreement > {"4bit": 0.9, "8bit": 0.99}[kind]
    assert not close(found, expected)


@torch.no_grad()
def test_zero_ablation_equals_zeroed_slices_of_the_projection_input(quantized, ids):
    _, model, _, _ = quantized
    size = model.config.head_dim
    handles = []
    for layer, block in enumerate(model.model.layers):
        heads = [head.head for head in HEADS if head.layer == layer]

        def zeroed(_, args, heads=heads):
            (merged,) = args
            kept = merged.clone()
            for head in heads:
                kept[..., head * size : (head + 1) * size] = 0
            return (kept,)

        handles.append(block.self_attn.o_proj.register_forward_pre_hook(zeroed))
    expected = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    with icl.intervene(model, icl.ZeroAblation(HEADS)):
        found = model(input_ids=ids).logits
    assert close(found, expected)
    assert not close(found, model(input_ids=ids).logits)


@torch.no_grad()
def test_knockout_equals_attention_by_hand(quantized, ids):
    _, model, _, _ = quantized
    draw = torch.rand(2, 24, 24, generator=torch.Generator().manual_seed(2)) < 0.3
    blocked = draw.tril(-1)

    def change(layer, head, logits, value):
        if icl.Head(layer, head) in HEADS:
            return logits.masked_fill(blocked, -torch.inf).softmax(-1) @ value
        return None

    with icl.intervene(model, icl.AttentionKnockout(HEADS, blocked)):
        found = model(input_ids=ids).logits
    assert close(found, by_hand(model, ids, change=change))
    assert not close(found, model(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("average", ["attention_input", "head_output"])
def test_mean_ablation_equals_means_taken_by_hand(quantized, ids, average):
    _, model, _, _ = quantized
    samples = torch.randint(2, 390, (4, 24), generator=torch.Generator().manual_seed(3))
    found_means = icl.mean_head_outputs(model, samples, average=average)
    inputs, outputs = [[] for _ in model.model.layers], [[] for _ in model.model.layers]
    handles = []
    for layer, block in enumerate(model.model.layers):
        store = outputs[layer]
        handles += [
            block.input_layernorm.register_forward_hook(
                lambda _, __, out, store=inputs[layer]: store.append(out)
            ),
            block.self_attn.o_proj.register_forward_pre_hook(
                lambda _, args, store=store: store.append(args[0])
            ),
        ]
    for sample in samples:
        model(input_ids=sample[None])
    for handle in handles:
        handle.remove()
    size = model.config.head_dim
    if average == "head_output":
        expected = [torch.cat(found).mean(0).view(24, -1, size) for found in outputs]
    else:
        expected = [output_on(model, layer, torch.cat(found).mean(0, keepdim=True))
                    for layer, found in enumerate(inputs)]  # fmt: skip
    assert close(found_means, torch.stack(expected))

    def change(layer, head, logits, value):
        if icl.Head(layer, head) in HEADS:
            return found_means[layer, :, head].expand_as(value)
        return None

    with icl.intervene(model, icl.MeanAblation(HEADS, found_means)):
        found = model(input_ids=ids).logits
    assert close(found, by_hand(model, ids, change=change))


def output_on(model, layer, mean):
    """Heads' outputs [position, head, d_head] of one layer on a given attention input."""
    seen = []
    attention = model.model.layers[layer].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    positions = torch.arange(mean.shape[1])[None]
    rotary = model.model.rotary_emb(mean, positions)
    mask = torch.ones(mean.shape[1], mean.shape[1], dtype=torch.bool).tril()[None, None]
    attention(hidden_states=mean, position_embeddings=rotary, attention_mask=mask)
    handle.remove()
    return seen[0][0].view(mean.shape[1], -1, model.config.head_dim)


def test_prefix_scores_equal_attention_by_hand(quantized):
    _, model, _, _ = quantized
    sequence = torch.randperm(390, generator=torch.Generator().manual_seed(4))[:10] + 2
    found = icl.prefix_matching_scores(model, sequence[None], bos_token_id=0)[0]
    expected = torch.zeros_like(found)

    def change(layer, head, logits, value):
        attention = logits.softmax(-1)[0]
        total = sum(
            float(attention[i, 10 * r + i % 10 + 1]) for i in range(11, 41) for r in range(i // 10)
        )
        expected[layer, head] = total / 30

    by_hand(model, torch.cat([torch.tensor([0]), sequence.repeat(4)])[None], change=change)
    assert torch.allclose(found, expected, atol=2e-3)


def test_evaluation_runs_and_is_filed_under_its_own_weights(quantized, tmp_path):
    _, model, tokenizer, full = quantized
    before = weights_fingerprint(model)
    scores = icl.prefix_matching_scores(model, icl.random_sequences(tokenizer, length=20)).mean(0)
    conditions = icl.conditions(scores, fractions=[0.1], ablations=["zero", "knockout"])
    results = icl.evaluate(
        model, tokenizer, tasks=["repetition"], shots=[2], seeds=[42], limit=3,
        conditions=conditions, run_dir=tmp_path,
    )  # fmt: skip
    assert results["accuracy"].between(0, 1).all()
    assert (results["n_invalid"] == 0).all()
    assert weights_fingerprint(model) == before != weights_fingerprint(full)


def test_unknown_quantisation_or_missing_library_is_explained(monkeypatch):
    with pytest.raises(icl.InputError, match=r"'4bit' or '8bit', got '3bit'"):
        icl.load_model("icl-tiny", quantization="3bit")
    with pytest.raises(icl.InputError, match="None, 4bit, 8bit"):
        icl.stage_parameters(quantization="2bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(icl.InputError, match=r"pip install 'icl-helpers\[quantized\]'"):
        icl.load_model("icl-tiny", quantization="4bit")


def test_products_are_computed_in_the_dtype_asked_for():
    config = quantization_config("4bit", torch.bfloat16)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization_config("4bit", "auto").bnb_4bit_compute_dtype == torch.float16
    assert quantization_config("8bit", "auto").load_in_8bit


def test_internlm2_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "internlm2"}')
    with pytest.raises(icl.InputError, match="cannot be quantised"):
        icl.load_model(str(tmp_path), quantization="8bit")
