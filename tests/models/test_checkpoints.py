"""Odd, damaged and missing checkpoints: loaded as they are, or refused at once by name."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import icl_helpers as icl
from icl_helpers.attention.hook import attention_layout
from icl_helpers.files import content_key
from icl_helpers.models.fingerprint import checkpoint_state, model_key, weights_fingerprint
from tests.conftest import make_llama, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    folder = tmp_path / "model"
    make_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


Done = tuple[subprocess.CompletedProcess, float]


def command(*arguments: str, **environment: str) -> Done:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "icl_helpers.cli", *arguments], cwd=ROOT, capture_output=True,
        text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    return done, time.monotonic() - began


def at_once(arguments: tuple[str, ...], *environments: dict[str, str]) -> list[Done]:
    """The command in each environment; it waits for a hub more than it does anything else."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda environment: command(*arguments, **environment), environments))


REMOTE = {
    "model_type": "of_my_own", "architectures": ["Mine"],
    "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Mine"},
}  # fmt: skip


def test_code_of_a_checkpoint_is_not_run_without_permission(checkpoint, tmp_path):
    (checkpoint / "config.json").write_text(json.dumps(REMOTE))
    trace = tmp_path / "ran"
    (checkpoint / "mine.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    began = time.monotonic()
    with pytest.raises(icl.InputError, match="needs code from its repository.*trust_remote_code"):
        icl.load_model(str(checkpoint))
    assert time.monotonic() - began < 10  # nobody is asked
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", "{}", '{"model_type": "no_such_model"}', '{"model_type": 3}',
        '{"model_type": "llama", "hidden_size": "wide"}',
        '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}',
        "\\x00" * 50,
    ],
)  # fmt: skip
def test_malformed_configuration_is_refused_by_name(checkpoint, content):
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(icl.InputError, match="model .*cannot be loaded"):
        icl.load_model(str(checkpoint))


DAMAGES = {
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[: len(whole) * 2 // 3],
    "header cut": lambda whole: whole[:100],
    "garbage": lambda whole: b"\xff\x00garbage" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_damaged_file_of_a_checkpoint_is_refused_by_name(checkpoint, name, damage):
    path = checkpoint / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(icl.InputError, match="model .*cannot be loaded"):
        icl.load_model(str(checkpoint))


def test_checkpoint_without_weights_or_with_weights_missing_is_refused(checkpoint):
    from safetensors.torch import load_file, save_file

    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(icl.InputError, match="lacks the weights.*layers.1.self_attn.q_proj"):
        icl.load_model(str(checkpoint))
    path.unlink()
    with pytest.raises(icl.InputError, match="model .*cannot be loaded"):
        icl.load_model(str(checkpoint))


DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.slow
@pytest.mark.parametrize("order", list(itertools.permutations(DTYPES)))
@pytest.mark.parametrize("stored", DTYPES)
def test_a_dtype_gives_the_same_model_however_and_whenever_it_is_asked_for(
    checkpoint, stored, order
):
    weights = make_llama().to(getattr(torch, stored)).state_dict()
    model = make_llama().to(getattr(torch, stored))
    model.config.dtype = getattr(torch, stored)
    model.save_pretrained(checkpoint)
    ids, logits, keys = torch.randint(2, 400, (1, 9)), {}, {}
    for name in (*order, "auto", *reversed(order)):
        dtype = getattr(torch, stored if name == "auto" else name)
        for asked in {name, *(() if name == "auto" else (dtype,))}:
            loaded, tokenizer = icl.load_model(str(checkpoint), dtype=asked)
            assert torch.get_default_dtype() is torch.float32
            assert loaded.dtype is dtype
            for key, value in loaded.state_dict().items():
                assert torch.equal(value, weights[key].to(dtype))
            with torch.no_grad():
                found = loaded(ids).logits
            assert torch.equal(logits.setdefault(dtype, found), found)
            key = model_key(loaded, tokenizer, None)
            assert keys.setdefault(dtype, key) == key
    assert len({content_key(key) for key in keys.values()}) == len(DTYPES)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_told_apart_as_those_in_memory_are(where, checkpoint, tmp_path):
    """accelerate leaves weights of no values in the model and keeps the others elsewhere."""
    from accelerate import cpu_offload, disk_offload

    def put_away(model):
        folder = tmp_path / f"offload{id(model)}"
        for number, layer in enumerate(model.model.layers[1:]):
            if where == "cpu":
                cpu_offload(layer, torch.device("cpu"))
            else:
                disk_offload(layer, str(folder / str(number)), torch.device("cpu"))
        return model

    other = make_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 0.01
    expected = [weights_fingerprint(model) for model in (make_llama(), other)]
    away = [put_away(model) for model in (make_llama(), other)]
    assert all(p.device.type == "meta" for p in away[0].model.layers[1].parameters())
    assert [weights_fingerprint(model) for model in away] == expected
    assert expected[0] != expected[1]
    ids = torch.randint(2, 400, (2, 9))
    with torch.no_grad(), icl.intervene(away[0], icl.ZeroAblation([(1, 1)])):
        found = away[0](ids).logits
    plain = make_llama()
    with torch.no_grad(), icl.intervene(plain, icl.ZeroAblation([(1, 1)])):
        assert torch.equal(found, plain(ids).logits)


def test_weights_without_values_have_no_fingerprint_and_no_pass():
    model = make_llama().to("meta")
    with pytest.raises(icl.InputError, match="meta device and has no values"):
        weights_fingerprint(model)
    with pytest.raises(icl.UnsupportedArchitectureError, match="meta device.*device_map"):
        attention_layout(model)


@pytest.mark.parametrize("rope_type", ["default", "llama3", "dynamic"])
def test_buffers_are_part_of_a_model_and_rotary_frequencies_where_they_were_edited(rope_type):
    def fresh():
        rope = {
            "rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        }  # fmt: skip
        return make_llama(rope_parameters=rope, max_position_embeddings=64)

    expected, model = weights_fingerprint(fresh()), fresh()
    with torch.no_grad():
        model(torch.randint(2, 400, (1, 100)))  # dynamic angles follow the length
    assert weights_fingerprint(model) == expected
    model.model.register_buffer("shift", torch.zeros(3))
    with_buffer = weights_fingerprint(model)
    model.model.shift += 1
    assert len({expected, with_buffer, weights_fingerprint(model)}) == 3
    if rope_type != "dynamic":
        model = fresh()
        model.model.rotary_emb.inv_freq *= 0.5
        assert weights_fingerprint(model) != expected


def test_merges_of_a_tokenizer_written_in_python_belong_to_the_model(tmp_path):
    from transformers import CTRLTokenizer

    vocabulary = {
        token: n for n, token in enumerate(["<unk>", "a@@", "b", "ab", "ab@@", "c", "b@@"])
    }
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    found = []
    for number, merges in enumerate(("a b</w>", "b c</w>", "a b</w>")):
        (tmp_path / f"{number}.txt").write_text(f"#version\n{merges}\n")
        tokenizer = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / f"{number}.txt"))
        assert getattr(tokenizer, "backend_tokenizer", None) is None
        found.append(model_key(make_llama(), tokenizer, None)["tokenizer"])
    assert found[0] == found[2] != found[1]


class Touch:
    """Unpickled, it creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_plain_pickled_weights_are_loaded_and_code_in_them_is_not_run(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    weights = make_llama().state_dict()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    loaded, _ = icl.load_model(str(checkpoint))
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())
    trace = tmp_path / "ran"
    torch.save({**weights, "extra": Touch(str(trace))}, checkpoint / "pytorch_model.bin")
    with pytest.raises(icl.InputError, match="model .*cannot be loaded"):
        icl.load_model(str(checkpoint))
    assert not trace.exists()


def bare_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token per word or mark: no merges, no BOS, no EOS, no padding."""
    pieces = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(":", "isolated")]
    )
    # Random sequences are drawn from at least fifty tokens.
    words = {"?", *(f"other{i}" for i in range(30))} | {
        piece for text in texts for piece, _ in pieces.pre_tokenize_str(text)
    }
    vocabulary = {word: index for index, word in enumerate(sorted(words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pieces
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("kind", ["no merges, no special tokens", "no pad, no bos"])
def test_tokenizer_without_bos_pad_or_merges_goes_through_every_condition(kind, tmp_path):
    prompts = icl.build_prompts("repetition", shots=3, seed=42)
    texts = [prompt.context + choice for prompt in prompts for choice in prompt.choices]
    if kind.startswith("no merges"):
        tokenizer = bare_tokenizer(texts)
    else:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=make_tokenizer(texts[:100]).backend_tokenizer, eos_token="</s>"
        )
    assert tokenizer.bos_token is None
    assert tokenizer.pad_token is None
    folder = tmp_path / "model"
    model = make_llama(vocab_size=max(400, len(tokenizer)), bos_token_id=None, pad_token_id=None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reference = tmp_path / "reference.txt"
    reference.write_text("\n".join(texts[:300]))
    run = icl.Run(
        icl.stage_parameters(
            model=str(folder), tasks=["repetition"], shots=[3], seeds=[42], ablation_seeds=[42],
            limit=3, fractions=[0.2], control="strict", reference=str(reference), run_dir=str(tmp_path / "run"),
        )
    )  # fmt: skip
    found = run.evaluate("full", "mean", "zero", "knockout")
    assert found["n"].tolist() == [3] * 6
    assert found["n_invalid"].sum() == 0
    one_by_one = icl.evaluate(
        *icl.load_model(str(folder)), tasks=["repetition"], shots=3, seeds=[42], limit=3,
        batch_size=1,
    )  # fmt: skip
    assert one_by_one["accuracy"].iloc[0] == found["accuracy"].iloc[0]


def test_repository_without_a_configuration_has_no_state(monkeypatch):
    """That of an adapter, say: the hub's client finds nothing and raises nothing."""
    monkeypatch.setattr("icl_helpers.models.fingerprint.cached_file", lambda *a, **k: None)
    read = {"dtype": "auto", "device": None, "quantization": None, "trust_remote_code": False}
    assert checkpoint_state("some/adapter", revision=None, **read) is None


def assert_missing(done: subprocess.CompletedProcess, name: str) -> None:
    assert done.returncode == 2, done.stderr[-2000:]
    assert name in done.stderr
    assert "Traceback" not in done.stderr
    assert "HF_TOKEN" in done.stderr  # how to get it


@pytest.mark.slow
def test_missing_model_is_named_at_once_offline_and_where_nothing_answers(tmp_path):
    arguments = ("scores", "--model", "nobody/nothing", "--run-dir", str(tmp_path / "run"))
    empty = {"HF_HOME": str(tmp_path / "empty")}
    refused = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    for done, seconds in at_once(arguments, empty | {"HF_HUB_OFFLINE": "1"}, empty | refused):
        assert_missing(done, "nobody/nothing")
        assert seconds < 60  # most of it the imports


def cached_model(home: Path, checkpoint: Path, *, weights: bool) -> dict[str, str]:
    """``some/model`` as the hub's client keeps it, or leaves it when stopped before its weights."""
    cache = home / "hub" / "models--some--model"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (snapshot / name).write_bytes((checkpoint / name).read_bytes())
    content = (checkpoint / "model.safetensors").read_bytes()
    if weights:
        (snapshot / "model.safetensors").write_bytes(content)
    else:
        (cache / "blobs" / ("1" * 64 + ".incomplete")).write_bytes(content[:1000])
    return {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}


@pytest.mark.slow
def test_interrupted_download_is_named(checkpoint, tmp_path):
    cache = cached_model(tmp_path, checkpoint, weights=False)
    run_dir = str(tmp_path / "run")
    done, _ = command(
        "scores", "--model", "some/model", "--run-dir", run_dir, **cache, HF_HUB_OFFLINE="1"
    )
    assert_missing(done, "some/model")


@pytest.fixture
def silent_hub():
    """A hub that takes connections, and requests, and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"}


@pytest.mark.slow
def test_hub_that_never_answers_holds_nobody(checkpoint, silent_hub, tmp_path):
    empty = {"HF_HOME": str(tmp_path / "empty")}
    cache = cached_model(tmp_path, checkpoint, weights=True)
    arguments = ("scores", "--model", "some/model", "--run-dir", str(tmp_path / "run"))
    (missing, waited), (cached, seconds) = at_once(
        arguments, empty | silent_hub, cache | silent_hub
    )
    assert_missing(missing, "some/model")
    assert cached.returncode == 0, cached.stderr[-2000:]
    for done in (missing, cached):
        assert silent_hub["HF_ENDPOINT"] in done.stderr
    assert waited < 60
    assert seconds < 90


@pytest.mark.slow
def test_text_of_a_hub_that_never_answers_is_named(silent_hub, tmp_path):
    done, seconds = command(
        "evaluate", "--tasks", "sst2", "--limit", "2", "--run-dir", str(tmp_path / "run"),
        **silent_hub, HF_HOME=str(tmp_path / "empty"),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert "sst2/train.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 60
