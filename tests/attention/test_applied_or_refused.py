"""An intervention reaches every head it names, or one error says why not and what to do."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaAttention

import icl_helpers as icl
from icl_helpers.attention.hook import attention_layout
from tests.attention.test_hook import SMALL, make
from tests.conftest import make_llama

HEADS = [icl.Head(0, 1), icl.Head(2, 0)]
ZERO = icl.ZeroAblation(HEADS)
MEAN = icl.MeanAblation(HEADS, torch.ones(3, 32, 4, 8))
KNOCKOUT = icl.AttentionKnockout(HEADS, torch.ones(10, 10, dtype=torch.bool).tril(-1))


def some_ids(rows: int = 2, length: int = 10) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randint(2, 60, (rows, length))


@torch.no_grad()
def run(model, *interventions, **inputs) -> torch.Tensor:
    with icl.intervene(model, *interventions):
        return model(**inputs).logits


# --- wrapped and compiled models


def peft_model():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(make_llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))


def compiled_forward():
    model = make_llama()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_in_place():
    model = make_llama()
    model.compile(backend="eager")
    return model


def compiled_layer():
    model = make_llama()
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


REFUSED = {
    "peft": (peft_model, "merge_and_unload"),
    "torch.compile": (lambda: torch.compile(make_llama(), backend="eager"), "_orig_mod"),
    "DataParallel": (lambda: nn.DataParallel(make_llama()), r"model\.module"),
    "Sequential": (lambda: nn.Sequential(make_llama()), "load_model"),
    "forward": (compiled_forward, "do not compile"),
    "in place": (compiled_in_place, "do not compile"),
    "layer": (compiled_layer, r"model\.layers\.1 .*do not compile"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrapped_or_compiled_model_is_refused_with_the_way_out(name):
    build, way_out = REFUSED[name]
    model = build()
    with pytest.raises(icl.UnsupportedArchitectureError, match=way_out):
        run(model, ZERO, input_ids=some_ids())
    with pytest.raises(icl.UnsupportedArchitectureError, match=way_out):
        icl.prefix_matching_scores(model, some_ids())


def test_a_layer_compiled_after_the_first_use_is_refused():
    model = make_llama()
    run(model, ZERO, input_ids=some_ids())
    model.model.layers[0].compile(backend="eager")
    with pytest.raises(icl.UnsupportedArchitectureError, match=r"model\.layers\.0 "):
        run(model, ZERO, input_ids=some_ids())


def test_the_model_inside_peft_is_edited_with_its_adapter():
    wrapped = peft_model()
    model = wrapped.get_base_model()
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.1)
    found = run(model, ZERO, input_ids=some_ids())
    merged = wrapped.merge_and_unload()
    assert torch.allclose(found, run(merged, ZERO, input_ids=some_ids()), atol=1e-4)


@pytest.mark.slow
def test_what_was_compiled_of_a_model_gives_the_edited_numbers_in_a_block():
    torch._dynamo.reset()
    model, ids = make_llama(num_hidden_layers=1), some_ids()
    compiled = torch.compile(model, backend="eager")
    compiled(ids)
    mean = icl.MeanAblation([(0, 1)], torch.randn(1, 16, 4, 8))
    expected = run(model, mean, input_ids=ids)
    with torch.no_grad(), icl.intervene(model, mean):
        assert torch.allclose(compiled(ids).logits, expected, atol=1e-5)


# --- passes that the edits do not reach


def test_a_block_whose_passes_went_to_a_copy_is_an_error():
    model, copy = make_llama(), make_llama()
    with pytest.raises(icl.InterventionError, match="no forward pass"), icl.intervene(model, ZERO):
        copy(some_ids())


def test_another_attention_set_inside_the_block_is_an_error():
    model = make_llama()
    with icl.intervene(model, ZERO):
        model.set_attn_implementation("sdpa")
        with pytest.raises(icl.InterventionError, match="2 of 2 edited layers"):
            model(some_ids())
        model.set_attn_implementation("icl_sdpa")
        model(some_ids())


def test_a_layer_replaced_after_the_first_use_is_an_error():
    model = make_llama()
    run(model, ZERO, input_ids=some_ids())
    model.model.layers[2] = make_llama().model.layers[2]
    with pytest.raises(icl.InterventionError, match="1 of 2 edited layers"):
        run(model, ZERO, input_ids=some_ids())


def test_an_attention_block_that_keeps_what_was_removed_is_refused(monkeypatch):
    """Heads reach the output by a second way, past the hook."""
    forward = LlamaAttention.forward

    def leaking(self, hidden_states, *args, **kwargs):
        output, weights = forward(self, hidden_states, *args, **kwargs)
        return output + 0.1 * self.o_proj(self.q_proj(hidden_states)), weights

    monkeypatch.setattr(LlamaAttention, "forward", leaking)
    with pytest.raises(icl.UnsupportedArchitectureError, match="leaves something"):
        attention_layout(make_llama())


def test_an_attention_block_that_goes_on_without_the_hooks_output_is_refused(monkeypatch):
    """The hook fires once a layer and the logits are right, but a removal changes nothing."""
    forward = LlamaAttention.forward

    def ignoring(self, *args, **kwargs):
        forward(self, *args, **kwargs)
        hooked = self.config._attn_implementation
        self.config._attn_implementation_internal = hooked.removeprefix("icl_")
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.config._attn_implementation_internal = hooked

    monkeypatch.setattr(LlamaAttention, "forward", ignoring)
    model, ids = make_llama(), some_ids()
    with pytest.raises(icl.UnsupportedArchitectureError, match="leaves something"):
        run(model, ZERO, input_ids=ids)


def test_dead_heads_are_no_error():
    model = make_llama()
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    plain = model(some_ids()).logits
    assert torch.equal(run(model, ZERO, input_ids=some_ids()), plain)


def test_gradient_checkpointing_is_refused_in_training_only():
    model, ids = make_llama(), some_ids()
    plain = run(model, ZERO, input_ids=ids)
    model.gradient_checkpointing_enable()
    assert torch.equal(run(model, ZERO, input_ids=ids), plain)
    model.train()
    refused = pytest.raises(icl.InterventionError, match="gradient_checkpointing_disable")
    with refused, icl.intervene(model, ZERO):
        model(ids)
    model.gradient_checkpointing_disable()
    with icl.intervene(model, ZERO):
        model(ids).logits.sum().backward()


def in_a_thread(function) -> list[BaseException | None]:
    result: list[BaseException | None] = []

    def target():
        try:
            function()
            result.append(None)
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return result


def test_a_second_thread_is_refused_and_the_first_undisturbed():
    model, ids = make_llama(), some_ids()
    expected = run(model, ZERO, input_ids=ids)
    with torch.no_grad(), icl.intervene(model, ZERO):
        for use in (
            lambda: model(ids),
            lambda: model.model(ids),
            lambda: run(model, MEAN, input_ids=ids),
            lambda: icl.prefix_matching_scores(model, ids),
        ):
            (error,) = in_a_thread(use)
            assert isinstance(error, icl.InterventionError)
            assert "another thread" in str(error)
        assert torch.equal(model(ids).logits, expected)
    assert in_a_thread(lambda: run(model, ZERO, input_ids=ids)) == [None]


def test_a_pass_that_another_thread_had_begun_is_refused():
    model, ids = make_llama(), some_ids()
    attention_layout(model)
    begun, installed = threading.Event(), threading.Event()
    handle = model.model.embed_tokens.register_forward_hook(
        lambda *_: (begun.set(), installed.wait(20), None)[2]
    )
    errors: list = []
    thread = threading.Thread(target=lambda: errors.extend(in_a_thread(lambda: model(ids))))
    thread.start()
    assert begun.wait(20)
    handle.remove()
    with icl.intervene(model), icl.intervene(model, ZERO):
        installed.set()
        thread.join()
        model(ids)
    # in_a_thread starts its own thread: the pass ran in neither of ours.
    assert isinstance(errors[0], icl.InterventionError)


# --- positions


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = some_ids(), torch.ones(2, 10, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 1, 0
    return ids, mask


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_left_padding_is_right_for_zero_ablation_and_refused_where_positions_count(
    family, with_ids
):
    model = make(family)
    heads = [icl.Head(0, 1), icl.Head(1, 2)]
    ids, mask = left_padded()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if with_ids:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    blocked = torch.ones(10, 10, dtype=torch.bool).tril(-1)
    means = torch.ones(2, 32, 4, 8)
    for intervention in (icl.AttentionKnockout(heads, blocked), icl.MeanAblation(heads, means)):
        with pytest.raises(icl.InterventionError, match="padding on the left"):
            run(model, intervention, **inputs)
    zero = icl.ZeroAblation(heads)
    if with_ids or family == "opt":  # OPT counts by itself, the others want position_ids
        alone = run(model, zero, input_ids=ids[1:, 3:])
        assert torch.allclose(run(model, zero, **inputs)[1:, 3:], alone, atol=1e-4)


@pytest.mark.parametrize("intervention", [MEAN, KNOCKOUT])
def test_position_ids_are_accepted_where_they_are_the_tokens_places(intervention):
    model, (ids, mask) = make_llama(), left_padded()
    expected = run(model, intervention, input_ids=ids)
    places = torch.arange(10)[None]
    assert torch.equal(run(model, intervention, input_ids=ids, position_ids=places), expected)
    with pytest.raises(icl.InterventionError, match="position_ids"):
        run(model, intervention, input_ids=ids, position_ids=places + 1)
    # What transformers makes of padding on the right: the padded places do not matter.
    right, padded = mask.flip(1), ids
    places = (right.cumsum(-1) - 1).masked_fill(right == 0, 1)
    found = run(model, intervention, input_ids=padded, attention_mask=right, position_ids=places)
    assert torch.allclose(found[1, :7], expected[1, :7], atol=1e-5)


def test_generation_after_padding_on_the_right_is_refused_where_positions_count():
    model, (ids, mask) = make_llama(), left_padded()
    with icl.intervene(model, MEAN), pytest.raises(icl.InterventionError, match="padding"):
        model.generate(ids, attention_mask=mask.flip(1), max_new_tokens=3)


class Forgetful(DynamicCache):
    """A cache that tells a wrong length."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@pytest.mark.parametrize("intervention", [MEAN, KNOCKOUT])
def test_a_cache_of_unknown_length_is_refused(intervention):
    model, ids = make_llama(), some_ids(1)
    cache = Forgetful()
    model(ids[:, :6], past_key_values=cache)
    with pytest.raises(icl.InterventionError, match="keys"):
        run(model, intervention, input_ids=ids[:, 6:], past_key_values=cache)


def test_a_model_that_attends_otherwise_from_a_cache_is_refused_there(monkeypatch):
    """Keys from the cache are turned to wrong positions."""
    from transformers.cache_utils import DynamicLayer

    update = DynamicLayer.update

    def turned(self, keys, values, *args, **kwargs):
        return update(self, keys + self.get_seq_length(), values, *args, **kwargs)

    monkeypatch.setattr(DynamicLayer, "update", turned)
    model, ids = make_llama(), some_ids()
    assert not attention_layout(model).cacheable
    run(model, MEAN, input_ids=ids)
    refused = pytest.raises(icl.InterventionError, match="use_cache=False")
    with refused, icl.intervene(model, MEAN):
        model.generate(ids, max_new_tokens=3)


def test_a_cache_that_drops_keys_of_an_attention_without_a_window_is_refused():
    model, ids = encoder("moshi", sliding_window=9, num_key_value_heads=4), some_ids(1, 14)
    assert attention_layout(model).cacheable  # no key is dropped of the probe's few tokens
    with torch.no_grad(), icl.intervene(model, icl.ZeroAblation([(0, 1)])):
        whole = model(ids, use_cache=False).logits
        cache = model(ids[:, :5], use_cache=True).past_key_values
        rest = model(ids[:, 5:9], past_key_values=cache).logits
        assert torch.allclose(rest, whole[:, 5:9], atol=1e-4)
        with pytest.raises(icl.InterventionError, match="dropped keys"):
            model(ids[:, 9:], past_key_values=cache)


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_a_cache_across_a_change_of_rotary_angles_is_refused(rope_type):
    """The untouched model gives other logits from such a cache than in one pass."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = make_llama(
        max_position_embeddings=16 if rope_type == "dynamic" else 64, rope_parameters=rope
    )
    ids = some_ids(1, 24)
    heads = icl.ZeroAblation([(0, 1)])

    @torch.no_grad()
    def parted(start: int, end: int) -> torch.Tensor:
        cache = model(ids[:, :start], use_cache=True).past_key_values
        return model(ids[:, start:end], past_key_values=cache).logits

    with torch.no_grad(), icl.intervene(model, heads):
        whole = model(ids[:, :14], use_cache=False).logits[:, 10:]
        assert torch.allclose(parted(10, 14), whole, atol=1e-4)
        with pytest.raises(icl.InterventionError, match="beyond its trained 16"):
            parted(10, 24)
        if rope_type == "longrope":  # both parts beyond it: one set of angles
            whole = model(ids, use_cache=False).logits[:, 18:]
            assert torch.allclose(parted(18, 24), whole, atol=1e-4)
        else:
            with pytest.raises(icl.InterventionError, match="beyond its trained 16"):
                parted(18, 24)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, 10:]
    assert not torch.allclose(parted(10, 24), whole, atol=1e-2)


# --- decoders only


def encoder(family: str, **settings):
    config = AutoConfig.for_model(family, **{**SMALL, **settings})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert", {"is_decoder": False}),
        ("roberta", {"is_decoder": False}),
        ("electra", {"is_decoder": False, "embedding_size": 32}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
    ],
)
def test_an_encoder_is_refused_by_name(family, settings, tmp_path, tokenizer):
    model = encoder(family, **settings)
    with pytest.raises(icl.UnsupportedArchitectureError, match=f"{family}.*no decoder"):
        attention_layout(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(icl.UnsupportedArchitectureError, match=f"{family}.*no decoder"):
        attention_layout(icl.load_model(str(tmp_path), device="cpu")[0])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_that_was_made_a_decoder_is_accepted(family):
    assert attention_layout(encoder(family, is_decoder=True)).n_layers == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_its_causal_mask_is_seen_in_any_precision(dtype):
    model = make_llama().to(dtype)
    assert attention_layout(model).cacheable
    model = make_llama().to(dtype)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(icl.UnsupportedArchitectureError, match="no decoder"):
        attention_layout(model)


# --- ids and positions


def gpt2(**settings):
    return GPT2LMHeadModel(GPT2Config(**{"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "bos_token_id": 0, "eos_token_id": 1, **settings})).eval()  # fmt: skip


CASES = {
    "token": (torch.tensor([[2, 64]]), "64 is not one of the model's 0..63"),
    "negative": (torch.tensor([[2, -1]]), "-1 is not one of"),
    "too long": (torch.randint(2, 60, (1, 41)), "context of 40"),
    "one axis": (torch.tensor([2, 3]), r"shape \[batch, tokens\]"),
    "float": (torch.ones(1, 3), "whole numbers"),
    "empty": (torch.ones(1, 0, dtype=torch.long), "at least one"),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_that_a_model_has_not_are_one_error_before_a_pass(case):
    ids, message = CASES[case]
    model = gpt2()
    with pytest.raises(icl.InputError, match=message):
        icl.mean_head_outputs(model, ids)
    with pytest.raises(icl.InputError, match=message):
        icl.attention_patterns(model, ids, [(0, 0)])
    if ids.ndim == 2 and ids.shape[1]:
        with pytest.raises(icl.InputError, match="|".join([message, "context of 40"])):
            icl.prefix_matching_scores(model, ids)


@pytest.mark.parametrize("token", [64, -1])
def test_an_edited_pass_names_a_token_that_the_model_has_not(token):
    model, ids = gpt2(), some_ids(1)
    means = icl.MeanAblation([(0, 1)], torch.ones(2, 40, 4, 8))
    blocked = icl.AttentionKnockout([(0, 1)], torch.zeros(12, 12, dtype=torch.bool))
    beyond = torch.cat([ids[:, 1:], torch.tensor([[token]])], dim=1)
    for intervention in (icl.ZeroAblation([(0, 1)]), means, blocked):
        with torch.no_grad(), icl.intervene(model, intervention):
            cache = model(ids).past_key_values
            for inputs in ({}, {"past_key_values": cache}):
                with pytest.raises(icl.InputError, match=f"{token} is not one of the model's"):
                    model(beyond, **inputs)
            with pytest.raises(icl.InputError, match=f"{token} is not one of the model's"):
                model.generate(beyond, max_new_tokens=2)


def test_bos_and_repeats_beyond_the_model_are_named():
    sequences = some_ids(2, 9)
    with pytest.raises(icl.InputError, match="50256.*bos_token_id"):
        icl.prefix_matching_scores(gpt2(bos_token_id=50256), sequences)
    with pytest.raises(icl.InputError, match="46 tokens .* context of 40.*fewer repeats"):
        icl.prefix_matching_scores(gpt2(), sequences, repeats=5)
    llama = make_llama(max_position_embeddings=40)  # rotary: it would run, on untrained positions
    with pytest.raises(icl.InputError, match="context of 40"):
        icl.prefix_matching_scores(llama, sequences, repeats=5)
    assert icl.prefix_matching_scores(llama, sequences, repeats=4).isfinite().all()


@pytest.mark.parametrize(
    ("family", "settings", "rows"),
    [
        ("gpt2", {}, 64),
        ("opt", {"ffn_dim": 48}, 64),
        ("roberta", {"is_decoder": True}, 62),
    ],
)
def test_generation_beyond_the_table_of_positions_is_one_error(family, settings, rows):
    model = encoder(family, **settings)
    assert attention_layout(model).max_positions == rows
    ids = some_ids(1, rows - 2)
    model.generation_config.eos_token_id = None
    with icl.intervene(model, icl.ZeroAblation([(0, 1)])):
        model.generate(ids, max_new_tokens=3, do_sample=False)
        with pytest.raises(icl.InputError, match=f"0..{rows - 1}"):
            model.generate(ids, max_new_tokens=4, do_sample=False)
        with pytest.raises(icl.InputError, match=f"0..{rows - 1}"):
            model(some_ids(1, rows + 1))


# --- where a head is cut


def test_a_head_is_cut_before_a_norm_in_front_of_the_projection():
    model = encoder("bitnet", num_key_value_heads=2)
    for norm in (layer.self_attn.attn_sub_norm for layer in model.model.layers):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    ids = some_ids()
    plain = run(model, input_ids=ids)
    heads = [icl.Head(0, 1), icl.Head(1, 3)]
    found = run(model, icl.ZeroAblation(heads), input_ids=ids)
    model.set_attn_implementation("eager")

    def cut(where: str) -> torch.Tensor:
        handles = []
        for head in heads:

            def zero(_, args, head=head):
                merged = args[0].clone()
                merged[..., 8 * head.head : 8 * head.head + 8] = 0
                return (merged,)

            module = getattr(model.model.layers[head.layer].self_attn, where)
            handles.append(module.register_forward_pre_hook(zero))
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        for handle in handles:
            handle.remove()
        return logits

    assert torch.allclose(found, cut("attn_sub_norm"), atol=1e-5)
    assert not torch.allclose(found, cut("o_proj"), atol=1e-3)
    assert not torch.allclose(found, plain, atol=1e-3)


# --- models that are not in evaluation mode


MEASURES = {
    "prefix_matching_scores": lambda model, ids: icl.prefix_matching_scores(model, ids),
    "mean_head_outputs": lambda model, ids: icl.mean_head_outputs(model, ids),
    "prompt_head_outputs": lambda model, ids: icl.prompt_head_outputs(model, ids),
    "attention_patterns": lambda model, ids: icl.attention_patterns(model, ids, HEADS),
    "previous_token_scores": lambda model, ids: icl.previous_token_scores(model, ids),
    "direct_logit_effects": lambda model, ids: icl.direct_logit_effects(model, ids),
    "causal_composition": lambda model, ids: icl.causal_composition(model, ids, HEADS[:1]),
}


@pytest.mark.parametrize("name", MEASURES)
def test_measures_of_a_model_in_training_mode_are_those_without_dropout(name):
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, attn_pdrop=0.5,
        resid_pdrop=0.5, embd_pdrop=0.5, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    expected = MEASURES[name](model, some_ids())
    model.train()
    model.transformer.h[1].eval()
    found = MEASURES[name](model, some_ids())
    torch.testing.assert_close(found, expected)
    assert model.training
    assert model.transformer.h[0].training
    assert not model.transformer.h[1].training
