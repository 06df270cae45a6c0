"""Circuit scores against slow loops over eager attentions and the checkpoints' own matrices."""

from __future__ import annotations

import pytest
import torch

import icl_helpers as icl
from icl_helpers.analysis.weights import head_weights
from tests.analysis.families import (
    FIVE,
    entering,
    final_norm,
    gain,
    make,
    replaced,
    weights_by_hand,
)
from tests.attention.test_hook import projections
from tests.conftest import make_llama

HEADS = [(layer, head) for layer in range(2) for head in range(4)]


def some_ids(rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(3))


def sequences() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.stack([torch.randperm(60, generator=generator)[:6] + 2 for _ in range(2)])


def repeated(sequences: torch.Tensor, repeats: int = 3) -> torch.Tensor:
    return torch.cat([torch.zeros(2, 1, dtype=torch.long), sequences.repeat(1, repeats)], dim=1)


def close(found: torch.Tensor, expected: float | torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-5)


@torch.no_grad()
def attentions(model, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return model(input_ids=ids, output_attentions=True, use_cache=False).attentions


@pytest.mark.parametrize("family", FIVE)
def test_previous_token_scores_equal_a_slow_loop(family):
    model, ids = make(family), some_ids()
    found = icl.previous_token_scores(model, ids)
    of_layers = attentions(model, ids)
    for layer, head in HEADS:
        expected = sum(
            float(of_layers[layer][row, head, t, t - 1]) for row in range(2) for t in range(1, 11)
        )
        assert close(found[layer, head], expected / 20)


@pytest.mark.parametrize("family", FIVE)
def test_weights_of_heads_are_the_checkpoints_own(family):
    model = make(family)
    found = head_weights(model)
    for layer, head in HEADS:
        for name, expected in weights_by_hand(model, family, layer, head)._asdict().items():
            matrix = getattr(found, name)[layer, head]
            assert torch.allclose(matrix, expected, atol=1e-5), (name, layer, head)


@pytest.mark.parametrize("family", FIVE)
@torch.no_grad()
def test_copying_scores_equal_those_of_the_whole_circuit(family):
    model = make(family)
    found, weighted = icl.copying_scores(model), icl.copying_scores(model, weighted=True)
    embedding = model.get_input_embeddings().weight.double()
    unembedding = model.get_output_embeddings().weight.double()
    unembedding = unembedding * gain(final_norm(model, family), family)
    for layer, head in HEADS:
        weights = weights_by_hand(model, family, layer, head)
        circuit = embedding @ weights.value.double() @ weights.output.double() @ unembedding.T
        assert circuit.shape == (64, 64)
        eigenvalues = torch.linalg.eigvals(circuit)
        eigenvalues = eigenvalues[eigenvalues.abs().argsort(descending=True)[:8]]
        positive = sum(float(value.real) > 0 for value in eigenvalues)
        assert close(found[layer, head], positive / 8)
        assert close(weighted[layer, head], float(eigenvalues.real.sum() / eigenvalues.abs().sum()))


@pytest.mark.parametrize("family", FIVE)
@torch.no_grad()
def test_composition_scores_equal_norms_of_whole_products(family):
    model = make(family)
    found = {kind: icl.composition_scores(model, kind=kind) for kind in ("Q", "K", "V")}
    for layer, head in HEADS:
        earlier = weights_by_hand(model, family, layer, head)
        for later_layer, later_head in HEADS:
            if later_layer <= layer:
                for scores in found.values():
                    assert scores[layer, head, later_layer, later_head] == 0
                continue
            later = weights_by_hand(model, family, later_layer, later_head)
            circuits = {
                "Q": later.query @ later.key.T,
                "K": later.key @ later.query.T,
                "V": later.value @ later.output,
            }
            for kind, circuit in circuits.items():
                ov = earlier.value @ earlier.output
                expected = (ov @ circuit).norm() / (ov.norm() * circuit.norm())
                assert close(found[kind][layer, head, later_layer, later_head], expected)


@pytest.mark.parametrize("family", FIVE)
def test_causal_composition_equals_zeroing_by_hand(family):
    model = make(family, sliding_window=64)
    ids = repeated(sequences())

    def scores() -> torch.Tensor:
        """The published formula: also the position after BOS, from the end of each later copy."""
        total, of_layers = torch.zeros(2, 4), attentions(model, ids)
        for layer, head in HEADS:
            for i in range(7, 19):
                for r in range(i // 6):
                    total[layer, head] += of_layers[layer][:, head, i, 6 * r + i % 6 + 1].mean()
        return total / 12

    whole = scores()
    found = icl.causal_composition(model, sequences(), [(0, 1), (0, 3)], repeats=3, bos_token_id=0)
    for index, head in enumerate((1, 3)):
        with replaced(model, family, 0, head, 0.0):
            assert close(found[index], whole - scores())
    assert (found[:, 0] == 0).all()
    assert (found[:, 1] != 0).any()


@pytest.mark.parametrize("family", FIVE)
@torch.no_grad()
def test_direct_logit_effects_equal_a_slow_loop_over_positions(family):
    model = make(family)
    ids, norm = repeated(sequences()), final_norm(model, family)
    layered = family in ("gpt2", "gpt_neox")
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))

    def through(norm, eps, part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """A part of what a norm is given, centred and divided as the whole is."""
        if layered:
            part, whole = part - part.mean(), whole - whole.mean()
        return part * gain(norm, family) / (whole.square().mean() + eps).sqrt()

    with entering([*projections(model, family), norm]) as seen:
        model(input_ids=ids, use_cache=False)
    found = icl.direct_logit_effects(model, sequences(), repeats=3, bos_token_id=0)
    unembedding = model.get_output_embeddings().weight
    for layer, head in HEADS:
        projection = projections(model, family)[layer]
        total = 0.0
        for row in range(2):
            for i in range(7, 19):
                alone = torch.zeros(32)
                alone[head * 8 : head * 8 + 8] = seen[layer][row, i, head * 8 : head * 8 + 8]
                written = projection(alone) - projection(torch.zeros(32))
                if family == "gemma3_text":
                    post = model.model.layers[layer].post_attention_layernorm
                    written = through(post, post.eps, written, projection(seen[layer][row, i]))
                logits = unembedding @ through(norm, eps, written, seen[2][row, i])
                total += float(logits[ids[row, i - 5]] - logits.mean())
        assert close(found[layer, head], total / 24)


def sublayers(model, family: str) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Of each layer what adds to the residual stream: attention and MLP, norms behind included."""
    if family == "gpt2":
        return [(block.attn, block.mlp) for block in model.transformer.h]
    if family == "gpt_neox":
        return [(block.attention, block.mlp) for block in model.gpt_neox.layers]
    if family == "gemma3_text":
        names = ("post_attention_layernorm", "post_feedforward_layernorm")
    else:
        names = ("self_attn", "mlp")
    return [tuple(getattr(block, name) for name in names) for block in model.model.layers]


@pytest.mark.parametrize("family", FIVE)
@torch.no_grad()
def test_direct_removal_equals_freezing_everything_that_comes_later(family):
    model, ids, head = make(family), some_ids(), (0, 2)
    plain = model(ids, use_cache=False).logits
    kept: dict = {}
    attention, mlp = zip(*sublayers(model, family), strict=True)
    frozen = [mlp[0], attention[1], mlp[1]]
    handles = [m.register_forward_hook(lambda m, _, out: kept.update({m: out})) for m in frozen]
    if family == "gemma3_text":
        # The norm behind the attention divides by what it did.
        norm, seen = attention[0], {}
        handles.append(norm.register_forward_hook(lambda _m, a, _o: seen.update(x=a[0])))
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    handles = [m.register_forward_hook(lambda m, _a, _o: kept[m]) for m in frozen]
    if family == "gemma3_text":
        size = (seen["x"].square().mean(-1, keepdim=True) + norm.eps).sqrt()
        handles.append(
            norm.register_forward_hook(lambda _m, a, _o: a[0] * gain(norm, family) / size)
        )
    with replaced(model, family, *head, 0.0):
        expected = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    with icl.direct_removal(model, icl.ZeroAblation([head])):
        found = model(ids, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-4)
    with icl.intervene(model, icl.ZeroAblation([head])):
        total = model(ids, use_cache=False).logits
    assert not torch.allclose(found, total, atol=1e-2)
    assert not torch.allclose(found, plain, atol=1e-2)
    assert torch.equal(model(ids, use_cache=False).logits, plain)


def test_eigenvalues_of_unused_directions_are_left_out():
    model = make_llama(tie_word_embeddings=False)
    with torch.no_grad():
        # A head of two directions that copies, and one without weights.
        embedding = torch.linalg.qr(torch.randn(400, 32))[0]
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(embedding)
        attention = model.model.layers[0].self_attn
        for parameter in attention.parameters():
            parameter.zero_()
        attention.v_proj.weight[:2, :2] = torch.eye(2)
        attention.o_proj.weight[:2, :2] = torch.eye(2)
    assert icl.copying_scores(model)[0].tolist() == [1, 0, 0, 0]


def test_a_kind_of_composition_that_is_none_is_named(llama):
    with pytest.raises(icl.InputError, match="'Q', 'K' or 'V', got 'k'"):
        icl.composition_scores(llama, kind="k")


def test_rows_of_one_token_have_none_before():
    with pytest.raises(icl.InputError, match="one token"):
        icl.previous_token_scores(make_llama(), torch.ones(2, 1, dtype=torch.long))


@pytest.mark.parametrize("kind", ["projection", "norm"])
def test_a_model_whose_heads_are_no_matrices_is_refused_by_name(kind):
    model = make_llama()
    attention = model.model.layers[1].self_attn
    if kind == "projection":
        attention.v_proj.register_forward_hook(lambda _m, _a, out: out.tanh())
    else:
        attention.register_forward_pre_hook(
            lambda _m, a, k: (a, {**k, "hidden_states": k["hidden_states"] * 2}), with_kwargs=True
        )
    with pytest.raises(icl.UnsupportedArchitectureError, match=r"'llama' cannot be read"):
        icl.copying_scores(model)
