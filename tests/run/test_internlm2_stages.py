"""InternLM2 and 2.5 checkpoints through every stage, and the memory that loading them takes."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
import torch

import icl_helpers as icl
from icl_helpers.files import embedded_dir, stage_notebooks
from icl_helpers.models.internlm2 import (
    InternLM2ForCausalLM,
    internlm2_config,
    internlm2_settings,
)
from icl_helpers.run.stages import execute_stages
from tests.commands import in_a_process
from tests.models.test_internlm2 import random_llama, write_checkpoint, write_sentencepiece

# What the hub's configurations of the two generations say beyond the sizes.
GENERATIONS = {
    "InternLM2": ({"rope_theta": 1e6}, {"type": "dynamic", "factor": 3.0}),
    "InternLM2.5": ({"rope_theta": 5e6}, {"type": "dynamic", "factor": 2.0}),
}
PARAMETERS = {
    "tasks": ["repetition", "wordseq1_binary"], "nlp_tasks": ["review_sentiment"], "shots": [0, 2],
    "fractions": [0.2], "seeds": [42], "ablation_seeds": [42], "limit": 4, "dtype": "float32",
    "analysis_tasks": ["repetition"], "analysis_limit": 2,
    "reference": str(embedded_dir() / "icl-tiny" / "reference.txt"),
}  # fmt: skip


def checkpoint(folder, generation: str, *, tied: bool = False, length: int = 512):
    """A random checkpoint of that generation; return the Llama it was made from."""
    rope, scaling = GENERATIONS[generation]
    parameters = {"rope_type": "dynamic", "factor": scaling["factor"], **rope}
    llama = random_llama(
        tie_word_embeddings=tied, max_position_embeddings=length, rope_parameters=parameters
    )
    extra = {"attn_implementation": "eager", "pretraining_tp": 1} if "2.5" in generation else {}
    write_checkpoint(
        folder, llama, layout="sharded safetensors", rope_scaling=scaling, use_cache=True, **extra
    )
    write_sentencepiece(folder)
    return llama


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_logits_equal_the_unfused_llamas_within_and_beyond_the_trained_length(
    generation, tied, tmp_path
):
    llama = checkpoint(tmp_path, generation, tied=tied, length=32)
    loaded, _ = icl.load_model(str(tmp_path))
    assert loaded.config.num_key_value_heads < loaded.config.num_attention_heads
    for tokens in (8, 32, 33, 60):
        ids = torch.randint(0, 400, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        assert torch.equal(loaded(ids).logits, llama(ids).logits)
    assert loaded.config.rope_parameters["rope_theta"] == GENERATIONS[generation][0]["rope_theta"]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_scores_means_and_all_conditions_equal_those_of_the_unfused_llama(tied, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    llama = checkpoint(folder, "InternLM2.5", tied=tied)
    given = {**PARAMETERS, "model": str(folder)}
    run = icl.Run(icl.stage_parameters(**given, run_dir=str(tmp_path / "run")))
    other = icl.Run(icl.stage_parameters(**given, run_dir=str(tmp_path / "other")))
    other._loaded = (llama, run.tokenizer)
    assert torch.equal(run.prefix_scores(), other.prefix_scores())
    assert torch.equal(run.mean_head_outputs(), other.mean_head_outputs())
    kinds = ("full", "mean", "zero", "knockout")
    found, expected = run.evaluate(*kinds), other.evaluate(*kinds)
    pd.testing.assert_frame_equal(pd.DataFrame(found), pd.DataFrame(expected))
    assert set(found["condition"]) == {
        "full", "induction_heads", "random_heads", "induction_pattern",
    }  # fmt: skip
    assert found["n_invalid"].sum() == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_runs_on_a_checkpoint_directory(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    checkpoint(folder, "InternLM2")
    parameters = icl.stage_parameters(
        **PARAMETERS, model=str(folder), run_dir=str(tmp_path / "run")
    )
    executed = execute_stages(parameters, progress=False)
    assert [path.name for path in executed] == [path.name for path in stage_notebooks()]
    results = pd.read_parquet(tmp_path / "run" / "results.parquet")
    assert {"repetition", "wordseq1_binary", "review_sentiment"} <= set(results["task"])
    assert {"none", "mean", "zero", "knockout"} == set(results["ablation"])


def anonymous() -> int:
    """Bytes of memory that are the process's: pages of mapped files can be dropped at any time."""
    (line,) = re.findall(
        r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE
    )
    return 1024 * int(line)


def measure(folder: Path) -> None:
    """Leave in ``peak`` what loading takes, in sizes of the model."""
    config = internlm2_config(internlm2_settings(str(folder)))
    samples, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            samples.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    model = InternLM2ForCausalLM.from_pretrained(str(folder), config=config)
    done.set()
    thread.join()
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    (folder / "peak").write_text(str((max(*samples, anonymous()) - samples[0]) / size))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("layout", ["sharded safetensors", "sharded bin", "bin"])
def test_loading_takes_the_models_memory_and_little_more(layout, tmp_path):
    llama = random_llama(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8,
        head_dim=64, vocab_size=4000,
    )  # fmt: skip
    write_checkpoint(tmp_path, llama, layout=layout)
    in_a_process(measure, tmp_path)
    assert float((tmp_path / "peak").read_text()) < 1.3
