"""Shared fixtures: tiny random models and an attention oracle that knows nothing of the package."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import icl_helpers as icl
from icl_helpers.book.build import build_book
from icl_helpers.run.stages import execute_stages

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"

DESCRIPTION = "Classify each sequence."


def make_tokenizer(texts: list[str], vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_llama(**changes: object) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention; large weights, so that edits show."""
    settings: dict[str, object] = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache neither helps nor hurts: a test that needs one fills it itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages on a few documents, by papermill."""
    directory = tmp_path_factory.mktemp("runs") / "icl-tiny"
    parameters = icl.stage_parameters(
        run_dir=str(directory), limit=4, tasks=["repetition", "wordseq1_binary"], shots=[0, 5],
        seeds=[42], ablation_seeds=[42],
    )  # fmt: skip
    execute_stages(parameters, progress=False)
    return directory


@pytest.fixture(scope="session")
def built(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book of that run and of a second one."""
    runs = tmp_path_factory.mktemp("two-runs")
    for name in ("icl-tiny", "second-model"):
        shutil.copytree(run_dir, runs / name)
    return build_book(runs, tmp_path_factory.mktemp("book")).parent


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    import icl_helpers as icl

    texts = [p.context for p in icl.build_prompts("wordseq1_binary", shots=5, seed=1)[:100]]
    texts += [p.context for p in icl.build_prompts("repetition", shots=5, seed=1)[:50]]
    return make_tokenizer(texts)
