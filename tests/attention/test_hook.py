"""Interventions against brute force under eager attention, on every supported family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import icl_helpers as icl
from icl_helpers.attention.hook import attention_layout
from tests.conftest import make_llama

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "mixtral": {**EXPERTS, "sliding_window": 5},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "olmo2": {},
    "gpt_oss": {**EXPERTS, "sliding_window": 5},
}
# Where each family keeps its decoder layers, their attention, and the output projection.
WHERE = {
    "gpt2": ("transformer.h", "attn", "c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention", "dense"),
    "opt": ("model.decoder.layers", "self_attn", "out_proj"),
}


def make(family: str):
    settings = {**SMALL, **FAMILIES[family]}
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **settings)
    # Eager attention is the oracle's ground: it hands out its probabilities.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name or parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def projections(model, family: str) -> list[torch.nn.Module]:
    layers, attention, projection = WHERE.get(family, ("model.layers", "self_attn", "o_proj"))
    return [getattr(getattr(layer, attention), projection) for layer in model.get_submodule(layers)]


def forward(model, ids: torch.Tensor, mask: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs).logits


def brute_force(model, family: str, ids, mask, replacement: dict) -> torch.Tensor:
    """Overwrite heads where they enter the output projection, by plain PyTorch hooks."""
    handles = []
    try:
        for layer, module in enumerate(projections(model, family)):
            chosen = {head: v for (at, head), v in replacement.items() if at == layer}

            def hook(_, args, chosen=chosen):
                merged = args[0].clone()
                heads = merged.view(*merged.shape[:2], 4, 8)
                for head, value in chosen.items():
                    heads[:, :, head] = value
                return (merged, *args[1:])

            handles.append(module.register_forward_pre_hook(hook))
        return forward(model, ids, mask)
    finally:
        for handle in handles:
            handle.remove()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three right-padded rows of 12, 9 and 7 tokens."""
    torch.manual_seed(2)
    ids = torch.randint(2, 64, (3, 12))
    mask = torch.ones_like(ids)
    for row, length in ((1, 9), (2, 7)):
        ids[row, length:] = 1
        mask[row, length:] = 0
    return ids, mask


def same(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor, atol: float = 2e-5) -> bool:
    keep = mask.bool()
    return torch.allclose(a[keep], b[keep], atol=atol, rtol=1e-4)


HEADS = [icl.Head(0, 1), icl.Head(0, 2), icl.Head(1, 3)]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_equals_overwriting_heads_before_the_projection(family, implementation):
    model = make(family)
    ids, mask = batch()
    means = torch.randn(2, 20, 4, 8)
    zero = brute_force(model, family, ids, mask, {tuple(h): 0.0 for h in HEADS})
    by_head = {tuple(h): means[h.layer, :12, h.head] for h in HEADS}
    mean = brute_force(model, family, ids, mask, by_head)
    plain = forward(model, ids, mask)
    if implementation == "sdpa" and family in ("gemma2", "gpt_oss"):
        implementation = "eager"  # transformers itself refuses SDPA for these two
    model.set_attn_implementation(implementation)
    with icl.intervene(model, icl.ZeroAblation(HEADS)):
        assert same(forward(model, ids, mask), zero, mask)
    with icl.intervene(model, icl.MeanAblation(HEADS, means)):
        assert same(forward(model, ids, mask), mean, mask)
    assert not same(zero, plain, mask)
    assert not same(mean, plain, mask)


def knocked_out(model, family, ids, mask, blocked) -> torch.Tensor:
    """Layer by layer: eager attention's own probabilities, with blocked pairs taken out.

    Taking a key out of a softmax is the same as dropping its probability and dividing by what the
    remaining probabilities and the sink hold.
    """
    replacement: dict = {}
    for layer in range(2):
        seen: dict = {}
        _, attention, _ = WHERE.get(family, ("model.layers", "self_attn", "o_proj"))
        layers = WHERE.get(family, ("model.layers",))[0]
        module = getattr(model.get_submodule(layers)[layer], attention)
        values = value_states(module, family, seen)
        handles = list(values)
        try:
            handles.append(
                module.register_forward_hook(lambda _, a, out, seen=seen: seen.update(p=out[1]))
            )
            brute_force(model, family, ids, mask, replacement)
        finally:
            for handle in handles:
                handle.remove()
        probabilities, value = seen["p"], seen["v"]
        for head in (h.head for h in HEADS if h.layer == layer):
            kept = probabilities[:, head].masked_fill(blocked, 0.0)
            rest = kept.sum(-1, keepdim=True)
            if family == "gpt_oss":  # the sink takes the probability that the keys do not have
                rest = rest + 1.0 - probabilities[:, head].sum(-1, keepdim=True)
            # Padded queries of a sliding window may see nothing at all.
            replacement[layer, head] = (kept / rest.clamp(min=1e-30)) @ value[
                :, head * value.shape[1] // 4
            ]
    return brute_force(model, family, ids, mask, replacement)


def value_states(module, family: str, seen: dict) -> list:
    """Record the value states [batch, kv_heads, key, d_head] of one attention module."""

    def split(out: torch.Tensor) -> torch.Tensor:
        return out.view(*out.shape[:2], -1, 8).transpose(1, 2)

    if family == "gpt2":
        hook = lambda _, a, out: seen.update(v=split(out.split(32, dim=2)[2]))  # noqa: E731
        return [module.c_attn.register_forward_hook(hook)]
    if family == "phi3":
        hook = lambda _, a, out: seen.update(v=split(out[..., 48:]))  # noqa: E731
        return [module.qkv_proj.register_forward_hook(hook)]
    if family == "gpt_neox":
        per_head = lambda out: out.view(*out.shape[:2], 4, 24)[..., 16:].transpose(1, 2)  # noqa: E731
        hook = lambda _, a, out: seen.update(v=per_head(out))  # noqa: E731
        return [module.query_key_value.register_forward_hook(hook)]
    hook = lambda _, a, out: seen.update(v=split(out))  # noqa: E731
    return [module.v_proj.register_forward_hook(hook)]


@pytest.mark.parametrize("family", FAMILIES)
def test_knockout_equals_renormalised_eager_attention(family):
    model = make(family)
    ids, mask = batch()
    torch.manual_seed(3)
    blocked = (torch.rand(3, 12, 12) < 0.4).tril(-1)
    expected = knocked_out(model, family, ids, mask, blocked)
    plain = forward(model, ids, mask)
    with icl.intervene(model, icl.AttentionKnockout(HEADS, blocked)):
        found = forward(model, ids, mask)
    # The oracle gets a sink's probability as a small difference, and loses digits there.
    assert same(found, expected, mask, atol=1e-3 if family == "gpt_oss" else 2e-5)
    assert not same(found, plain, mask, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_scores_equal_a_slow_loop_over_eager_attentions(family):
    model = make(family)
    sequences = torch.stack([torch.randperm(60)[:7] + 2 for _ in range(2)])
    found = icl.prefix_matching_scores(model, sequences, repeats=3, bos_token_id=0)
    ids = torch.cat([torch.zeros(2, 1, dtype=torch.long), sequences.repeat(1, 3)], dim=1)
    with torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    for row in range(2):
        for layer in range(2):
            for head in range(4):
                total = 0.0
                for i in range(8, 22):
                    for r in range(i // 7):
                        if 7 * r + i % 7 + 1 <= i and r <= i // 7 - 1:
                            total += float(attentions[layer][row, head, i, 7 * r + i % 7 + 1])
                assert abs(total / 14 - float(found[row, layer, head])) < 1e-5


def test_empty_intervention_changes_nothing_to_the_bit(llama):
    ids = torch.randint(2, 400, (2, 10))
    mask = torch.ones_like(ids)
    plain = forward(llama, ids, mask)
    with icl.intervene(llama, icl.ZeroAblation([])):
        assert torch.equal(forward(llama, ids, mask), plain)
    with icl.intervene(llama):
        assert torch.equal(forward(llama, ids, mask), plain)


def test_model_is_restored_after_an_exception(llama):
    ids = torch.randint(2, 400, (2, 10))
    mask = torch.ones_like(ids)
    plain = forward(llama, ids, mask)
    before = llama.config._attn_implementation
    means = torch.randn(3, 4, 4, 8)
    with (
        pytest.raises(icl.InterventionError, match="position 9"),
        icl.intervene(llama, icl.MeanAblation([icl.Head(1, 1)], means)),
    ):
        forward(llama, ids, mask)
    assert llama.config._attn_implementation == before
    assert torch.equal(forward(llama, ids, mask), plain)


def test_nested_interventions_add_up(llama):
    ids = torch.randint(2, 400, (2, 10))
    mask = torch.ones_like(ids)
    first, second = icl.Head(0, 1), icl.Head(2, 3)
    with icl.intervene(llama, icl.ZeroAblation([first, second])):
        both = forward(llama, ids, mask)
    with icl.intervene(llama, icl.ZeroAblation([first])):
        with icl.intervene(llama, icl.ZeroAblation([second])):
            assert torch.equal(forward(llama, ids, mask), both)
        once = forward(llama, ids, mask)
    assert not torch.equal(once, both)


def test_cached_generation_equals_full_forward_passes(llama):
    prompt = torch.randint(2, 400, (2, 10))
    means = torch.randn(3, 32, 4, 8)
    blocked = torch.zeros(2, 10, 10, dtype=torch.bool)
    blocked[:, 5:, :3] = True
    heads = [icl.Head(0, 1), icl.Head(2, 0)]
    for intervention in (
        icl.MeanAblation(heads, means),
        icl.ZeroAblation(heads),
        icl.AttentionKnockout(heads, blocked),
    ):
        with icl.intervene(llama, intervention):
            cached = llama.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
            )
            ids = prompt
            for _ in range(6):
                logits = forward(llama, ids, torch.ones_like(ids))
                ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(cached, ids[:, : cached.shape[1]])


def test_fully_blocked_query_gives_zero_output():
    model = make_llama(num_hidden_layers=1)
    ids = torch.randint(2, 400, (1, 6))
    blocked = torch.zeros(6, 6, dtype=torch.bool)
    blocked[3] = True
    head = [icl.Head(0, 2)]
    with icl.intervene(model, icl.AttentionKnockout(head, blocked)):
        knocked = forward(model, ids, torch.ones_like(ids))
    with icl.intervene(model, icl.ZeroAblation(head)):
        zeroed = forward(model, ids, torch.ones_like(ids))
    assert torch.isfinite(knocked).all()
    assert torch.allclose(knocked[0, 3], zeroed[0, 3], atol=1e-6)


@pytest.mark.parametrize("family", ["gptj", "gpt_neo", "bloom", "falcon", "mpt"])
def test_unsupported_architecture_is_refused_by_name(family):
    settings = {
        "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
        "gpt_neo": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]},
        "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
        "falcon": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
        "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 4},
    }[family]  # fmt: skip
    config = AutoConfig.for_model(family, vocab_size=64, **settings)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(icl.UnsupportedArchitectureError, match=f"{family}.*llama"):
        attention_layout(model)


def test_head_out_of_range_is_named(llama):
    with (
        pytest.raises(icl.InputError, match=r"3\.0.*layers 0\.\.2"),
        icl.intervene(llama, icl.ZeroAblation([icl.Head(3, 0)])),
    ):
        pass


@pytest.mark.parametrize("blocked", [torch.zeros(4, 4), torch.zeros(4, dtype=torch.bool), None])
def test_blocked_of_wrong_type_or_shape_is_refused(blocked):
    with pytest.raises(icl.InputError, match="blocked"):
        icl.AttentionKnockout([icl.Head(0, 0)], blocked)


def test_blocked_for_another_batch_size_is_refused(llama):
    blocked = torch.zeros(3, 6, 6, dtype=torch.bool)
    ids = torch.randint(2, 400, (2, 6))
    with (
        pytest.raises(icl.InterventionError, match="3 prompts, the batch 2"),
        icl.intervene(llama, icl.AttentionKnockout([icl.Head(0, 0)], blocked)),
    ):
        forward(llama, ids, torch.ones_like(ids))
