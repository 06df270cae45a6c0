"""InternLM2 checkpoints: fused here by plain loops from a random Llama, and loaded back."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import icl_helpers as icl
from icl_helpers.models.fingerprint import weights_fingerprint
from icl_helpers.models.internlm2 import (
    internlm2_config,
    internlm2_settings,
)
from icl_helpers.models.internlm2_tokenizer import load_internlm2_tokenizer
from tests.conftest import make_llama

TEXT = "Below is a list.\n\nfig cat:Foo\n\nbed  nurse:Bar\n\nJosé 猫 date fox:"


def fuse(attention, part: str, heads: int, kv_heads: int, size: int) -> torch.Tensor:
    """Rows of each key-value head's queries, then its key, then its value."""
    q, k, v = (getattr(getattr(attention, f"{n}_proj"), part) for n in "qkv")
    rows = []
    for kv in range(kv_heads):
        for query in range(kv * heads // kv_heads, (kv + 1) * heads // kv_heads):
            rows.append(q[query * size : (query + 1) * size])
        rows.append(k[kv * size : (kv + 1) * size])
        rows.append(v[kv * size : (kv + 1) * size])
    return torch.cat(rows)


def internlm2_weights(llama: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    config = llama.config
    shape = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    weights = {
        "model.tok_embeddings.weight": llama.model.embed_tokens.weight,
        "model.norm.weight": llama.model.norm.weight,
    }
    if not config.tie_word_embeddings:
        weights["output.weight"] = llama.lm_head.weight
    for number, layer in enumerate(llama.model.layers):
        at = f"model.layers.{number}."
        weights |= {
            at + "attention.wqkv.weight": fuse(layer.self_attn, "weight", *shape),
            at + "attention.wo.weight": layer.self_attn.o_proj.weight,
            at + "feed_forward.w1.weight": layer.mlp.gate_proj.weight,
            at + "feed_forward.w3.weight": layer.mlp.up_proj.weight,
            at + "feed_forward.w2.weight": layer.mlp.down_proj.weight,
            at + "attention_norm.weight": layer.input_layernorm.weight,
            at + "ffn_norm.weight": layer.post_attention_layernorm.weight,
        }
        if config.attention_bias:
            weights[at + "attention.wqkv.bias"] = fuse(layer.self_attn, "bias", *shape)
            weights[at + "attention.wo.bias"] = layer.self_attn.o_proj.bias
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def write_checkpoint(directory, llama: LlamaForCausalLM, *, layout: str, **settings) -> None:
    config = llama.config
    content = {
        name: getattr(config, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
            "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id",
            "pad_token_id", "hidden_act",
        )
    } | {
        "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"],
        "bias": config.attention_bias, "rope_theta": config.rope_parameters["rope_theta"],
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(content | settings))
    weights = internlm2_weights(llama)
    base = "model.safetensors" if "safetensors" in layout else "pytorch_model.bin"
    parts = {base: weights}
    if "sharded" in layout:
        stem, suffix = base.split(".")
        parts = {}
        for place, name in enumerate(sorted(weights)):
            shard = f"{stem}-{place % 3 + 1:05d}-of-00003.{suffix}"
            parts.setdefault(shard, {})[name] = weights[name]
        shards = {name: shard for shard, part in parts.items() for name in part}
        index = {"metadata": {"total_size": 0}, "weight_map": shards}
        (directory / f"{base}.index.json").write_text(json.dumps(index))
    for shard, part in parts.items():
        if shard.endswith("safetensors"):
            save_file(part, directory / shard)
        else:
            torch.save(part, directory / shard, _use_new_zipfile_serialization="old" not in layout)


def random_llama(**changes) -> LlamaForCausalLM:
    llama = make_llama(**changes)
    with torch.no_grad():
        for name, weight in llama.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
    return llama


def load(folder, **options) -> LlamaForCausalLM:
    """The model by the public loader; a tokenizer is put beside it where there is none."""
    if not (folder / "tokenizer.model").exists():
        write_sentencepiece(folder)
    place = {} if "device_map" in options else {"device": "cpu"}
    return icl.load_model(str(folder), **place, **options)[0]


LAYOUTS = ["safetensors", "sharded safetensors", "bin", "sharded bin", "old bin"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4},
     {"attention_bias": True}],
    ids=["grouped", "tied", "one kv head", "no grouping", "bias"],
)  # fmt: skip
def test_fused_checkpoint_gives_the_logits_of_the_llama_it_was_made_from(layout, changes, tmp_path):
    llama = random_llama(**changes)
    write_checkpoint(tmp_path, llama, layout=layout)
    ids = torch.randint(0, 400, (2, 40))
    loaded = load(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(loaded(ids).logits, llama(ids).logits)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == llama.config.tie_word_embeddings


def test_dynamic_scaling_follows_the_formula_beyond_the_trained_length(tmp_path):
    llama = random_llama(max_position_embeddings=32)
    scaling = {"type": "dynamic", "factor": 3.0}
    write_checkpoint(tmp_path, llama, layout="safetensors", rope_scaling=scaling)
    loaded = load(tmp_path)
    short = torch.randint(0, 400, (1, 32))
    assert torch.equal(loaded(short).logits, llama(short).logits)
    tokens, size = 50, 8
    base = 10_000 * (3.0 * tokens / 32 - 2.0) ** (size / (size - 2))
    angles = [[i / base ** (2 * j / size) for j in range(size // 2)] * 2 for i in range(tokens)]
    cos, sin = loaded.model.rotary_emb(torch.zeros(1), torch.arange(tokens)[None])
    assert torch.allclose(cos[0], torch.tensor(angles).cos(), atol=1e-5)
    assert torch.allclose(sin[0], torch.tensor(angles).sin(), atol=1e-5)


def test_dtype_is_kept_unless_another_is_asked_for(tmp_path):
    llama = random_llama().to(torch.bfloat16)
    write_checkpoint(tmp_path, llama, layout="sharded safetensors")
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.bfloat16}
    assert load(tmp_path, dtype="float32").dtype == torch.float32
    assert load(tmp_path).model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map_places_the_model(tmp_path, device_map):
    llama = random_llama()
    write_checkpoint(tmp_path, llama, layout="safetensors")
    ids = torch.arange(9)[None]
    loaded = load(tmp_path, device_map=device_map)
    assert torch.equal(loaded(ids).logits, llama(ids).logits)


def test_interventions_and_scores_work_on_the_loaded_model(tmp_path):
    llama = random_llama()
    write_checkpoint(tmp_path, llama, layout="safetensors")
    loaded = load(tmp_path)
    ids = torch.arange(30)[None]
    with icl.intervene(loaded, icl.ZeroAblation([icl.Head(1, 2)])):
        found = loaded(ids).logits
    with icl.intervene(llama, icl.ZeroAblation([icl.Head(1, 2)])):
        assert torch.equal(found, llama(ids).logits)
    assert not torch.equal(found, loaded(ids).logits)


def test_only_internlm2_is_recognised(tmp_path):
    write_checkpoint(tmp_path, make_llama(), layout="safetensors")
    assert internlm2_settings(tmp_path)["model_type"] == "internlm2"
    assert internlm2_settings(tmp_path / "nowhere") is None
    other = tmp_path / "llama"
    make_llama().save_pretrained(other)
    assert internlm2_settings(str(other)) is None
    # What reads InternLM2's names is no part of a Llama: its weights are not found there.
    config = json.loads((other / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(icl.InputError, match=r"lacks the weights.*layers\.0\.\w+"):
        load(tmp_path)


def test_a_checkpoint_that_does_not_fit_is_refused_with_its_reason(tmp_path):
    llama = make_llama()
    write_checkpoint(tmp_path, llama, layout="safetensors", num_key_value_heads=4)
    with pytest.raises(icl.InputError, match=r"wqkv.*rows"):
        load(tmp_path)
    write_checkpoint(tmp_path, llama, layout="safetensors", vocab_size=401)
    with pytest.raises(icl.InputError, match="expected"):
        load(tmp_path)
    write_checkpoint(tmp_path, llama, layout="safetensors", num_hidden_layers=4)
    with pytest.raises(icl.InputError, match=r"lack \d+ tensors"):
        load(tmp_path)
    write_checkpoint(tmp_path, llama, layout="safetensors", rope_scaling={"type": "yarn"})
    with pytest.raises(icl.InputError, match="yarn"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write_checkpoint(tmp_path, llama, layout="sharded bin")
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(icl.MissingArtefactError, match="00002"):
        load(tmp_path)


def test_foreign_and_wrongly_shaped_weights_are_named_and_old_frequencies_are_not(tmp_path):
    llama = random_llama()
    write_checkpoint(tmp_path, llama, layout="bin")
    path = tmp_path / "pytorch_model.bin"
    weights = internlm2_weights(llama)
    torch.save({**weights, "model.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)}, path)
    ids = torch.arange(9)[None]
    assert torch.equal(load(tmp_path)(ids).logits, llama(ids).logits)
    torch.save({**weights, "model.layers.0.attention.q_norm.weight": torch.ones(8)}, path)
    with pytest.raises(icl.InputError, match=r"has no weight model\.layers\.0\.attention\.q_norm"):
        load(tmp_path)
    narrow = {"model.layers.1.attention.wqkv.weight": torch.ones(64, 30)}
    torch.save({**weights, **narrow}, path)
    with pytest.raises(
        icl.InputError, match=r"layers\.1\.\S+_proj.*\(\d+, 30\), expected \(\d+, 32\)"
    ):
        load(tmp_path)
    path.write_bytes(b"garbage")
    with pytest.raises(icl.InputError, match=r"^model \S+ cannot be loaded: .+$"):
        load(tmp_path)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}])
def test_loaded_model_is_a_llama_and_is_saved_as_one(changes, tmp_path):
    llama = random_llama(**changes)
    write_checkpoint(tmp_path, llama, layout="sharded safetensors")
    loaded = load(tmp_path)
    assert loaded.config.model_type == "llama"
    assert weights_fingerprint(loaded) == weights_fingerprint(llama)
    loaded.save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.architectures == ["LlamaForCausalLM"]
    assert weights_fingerprint(again) == weights_fingerprint(llama)


def test_biases_are_the_default_of_a_silent_configuration():
    assert internlm2_config({"model_type": "internlm2"}).attention_bias
    assert not internlm2_config({"bias": False}).attention_bias


def write_sentencepiece(folder, *, dummy_prefix: bool = True) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(dummy_prefix))


@functools.cache
def sentencepiece_model(dummy_prefix: bool) -> bytes:
    """A byte-fallback BPE of 400 pieces, as InternLM2's repositories hold one."""
    import io

    import sentencepiece

    texts = [p.context for p in icl.build_prompts("wordseq1_binary", shots=5, seed=1)[:100]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=400,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix, hard_vocab_limit=False, minloglevel=2,
        allow_whitespace_only_pieces=True, split_digits=True,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(params=[True, False], ids=["dummy prefix", "no prefix"])
def sentencepiece_folder(request, tmp_path):
    write_sentencepiece(tmp_path, dummy_prefix=request.param)
    return tmp_path


def test_fast_tokenizer_gives_the_ids_of_sentencepiece(sentencepiece_folder):
    import sentencepiece

    slow = sentencepiece.SentencePieceProcessor(
        model_file=str(sentencepiece_folder / "tokenizer.model")
    )
    fast = load_internlm2_tokenizer(sentencepiece_folder)
    texts = [
        TEXT,
        "fig",
        "a  b   c",
        *(p.context for p in icl.build_prompts("repetition", shots=3, seed=1)[:20]),
    ]
    for text in texts:
        ids = fast(text, add_special_tokens=False).input_ids
        assert ids == slow.encode(text)
        assert fast(text).input_ids == [fast.bos_token_id, *ids]
        assert fast.decode(ids) == text


def test_pattern_of_a_sentencepiece_tokenizer_follows_its_offsets(sentencepiece_folder):
    fast = load_internlm2_tokenizer(sentencepiece_folder)
    prompt = icl.build_prompts("wordseq1_binary", shots=4, seed=1)[0].context
    encoded = fast(prompt, add_special_tokens=False, return_offsets_mapping=True)
    blocked = icl.induction_pattern(prompt, fast, categories=("colons",))
    final = len(encoded.input_ids) - 1
    seen = {
        prompt[a:b].strip() for k, (a, b) in enumerate(encoded.offset_mapping) if blocked[final, k]
    }
    assert "".join(sorted("".join(seen))) != ""
    assert all(piece in "FooBar" for piece in seen)


def test_added_tokens_replace_unused_pieces_by_id(sentencepiece_folder):
    added = {"7": {"content": "<|im_start|>", "special": True, "lstrip": False}}
    (sentencepiece_folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added, "add_bos_token": False})
    )
    fast = load_internlm2_tokenizer(sentencepiece_folder)
    assert fast.convert_tokens_to_ids("<|im_start|>") == 7
    assert 7 in fast("<|im_start|>fig").input_ids
    assert fast("fig").input_ids == fast("fig", add_special_tokens=False).input_ids


@pytest.mark.parametrize("sentencepiece_folder", [True], indirect=True)
def test_checkpoint_loads_by_its_directory_and_evaluates(sentencepiece_folder):
    llama = random_llama()
    write_checkpoint(sentencepiece_folder, llama, layout="sharded bin")
    model, tokenizer = icl.load_model(str(sentencepiece_folder))
    ids = torch.randint(0, 400, (2, 20))
    assert torch.equal(model(ids).logits, llama(ids).logits)
    scores = icl.prefix_matching_scores(model, torch.randint(5, 390, (2, 12))).mean(0)
    means = icl.mean_head_outputs(model, torch.randint(5, 390, (3, 300)))
    conditions = icl.conditions(
        scores, fractions=[0.2], ablations=["mean", "zero", "knockout"], head_outputs=means
    )
    results = icl.evaluate(
        model, tokenizer, tasks=["repetition"], shots=2, seeds=[42], limit=4, conditions=conditions
    )
    assert len(results) == 10
    assert results["accuracy"].between(0, 1).all()
