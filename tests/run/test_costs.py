"""Ready parameter files and the estimates of what they will need."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import icl_helpers as icl
from icl_helpers.book.pages.guide import recipe_table, stage_table
from icl_helpers.files import notebooks_dir
from icl_helpers.models.loading import load_model
from icl_helpers.parameters import read_parameters
from icl_helpers.run import costs
from tests.conftest import make_llama, make_tokenizer

RECIPES = sorted((notebooks_dir() / "parameters").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_accepted_and_keeps_secrets_out(path):
    values = read_parameters(path)
    parameters = icl.stage_parameters(**values)
    assert parameters.run_dir.startswith("runs/")
    assert "token" not in values
    if parameters.model.startswith("meta-llama"):
        text = path.read_text()
        assert "HF_TOKEN into the environment" in text
        assert "licence" in text


def test_the_papers_models_have_a_recipe_each_and_a_small_gpu_one():
    found = [icl.stage_parameters(**read_parameters(path)) for path in RECIPES]
    kinds = {(p.model, p.dtype, p.quantization) for p in found}
    assert ("meta-llama/Meta-Llama-3-8B", "bfloat16", None) in kinds
    assert ("internlm/internlm2-20b", "bfloat16", None) in kinds
    assert ("meta-llama/Meta-Llama-3-8B", "float16", "4bit") in kinds
    llama = next(p for p in found if p.model.startswith("meta-llama") and not p.quantization)
    assert "blank_lines" not in llama.categories


@pytest.mark.parametrize(
    ("model", "billions"),
    [("meta-llama/Meta-Llama-3-8B", 8.030261248), ("internlm/internlm2-20b", 19.861149696)],
)
def test_parameters_of_the_papers_models_are_the_published_numbers(model, billions):
    cost = costs.estimate_cost(icl.stage_parameters(model=model, tasks=["repetition"]))
    assert cost.parameters == round(billions * 1e9)
    assert cost.weights_bytes == 2 * cost.parameters


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_as_they_lie_in_memory(tied):
    model = make_llama(tie_word_embeddings=tied)
    expected = sum(p.numel() * p.element_size() for p in model.parameters())
    assert costs.weights_bytes(model.config, dtype="float32") == expected
    assert costs.weights_bytes(model.config, dtype="bfloat16") == expected // 2
    small = costs.weights_bytes(model.config, dtype="float16", quantization="4bit")
    tables = sum(
        {id(t): t.numel() for t in (model.model.embed_tokens.weight, model.lm_head.weight)}.values()
    )
    assert tables * 2 < small < tables * 2 + (expected // 4 - tables) * 0.6


def test_quantised_estimate_is_near_what_the_library_allocates(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer(["a b c"]).save_pretrained(tmp_path)
    for kind in ("4bit", "8bit"):
        loaded, _ = load_model(str(tmp_path), quantization=kind, dtype="float16", device="cpu")
        estimate = costs.weights_bytes(config, dtype="float16", quantization=kind)
        assert estimate == pytest.approx(loaded.get_memory_footprint(), rel=0.05)


def test_tokens_are_those_of_all_prompts_under_all_conditions(tokenizer):
    parameters = icl.stage_parameters(
        tasks=["repetition", "wordseq1_4way"], nlp_tasks=[], shots=[0, 5], fractions=[0.1, 0.2],
        seeds=[42, 43], ablation_seeds=[1, 2, 3], limit=30,
        control="strict",
    )  # fmt: skip
    cost = costs.estimate_cost(parameters, tokenizer=tokenizer, tokens_per_second=1000)
    # Full model; for each fraction mean and zero of one induction and three random sets; knockout.
    conditions = 1 + 2 * (2 * 4 + 1)
    tokens = 0
    for task in parameters.tasks:
        for shots, seed in ((0, 42), (5, 42), (5, 43)):
            prompts = icl.build_prompts(task, shots=shots, seed=seed)[:30]
            tokens += sum(
                len(tokenizer(p.context, add_special_tokens=False).input_ids) for p in prompts
            )
    means, closer = 500 * 512, sum(cost.closer.values())
    assert cost.tokens - closer == pytest.approx(tokens * conditions + means, rel=0.05)
    assert cost.hours == pytest.approx(cost.tokens / 1000 / 3600)
    assert cost.uncounted == ()


def test_stages_that_look_closer_are_listed_with_the_tokens_of_their_conditions(tokenizer):
    parameters = icl.stage_parameters(
        analysis_tasks=["repetition"], analysis_limit=8, shots=[0, 5], fractions=[4 / 64]
    )
    cost = costs.estimate_cost(parameters, tokenizer=tokenizer)
    prompts = icl.build_prompts("repetition", shots=5, seed=42)[:8]
    tokens = sum(len(tokenizer(p.context, add_special_tokens=False).input_ids) for p in prompts)
    # 1, 2, 4 and 8 heads: highest, lowest and 20 random sets; each of 64 heads; kinds of removal.
    assert cost.closer[9] == pytest.approx(tokens * (4 * 22 + 64 + 45), rel=0.05)
    assert f"stage 9  {cost.closer[9] / 1e6:.1f} million" in str(cost)


def test_text_tasks_without_data_are_named_and_a_bad_rate_refused():
    parameters = icl.stage_parameters(model="internlm/internlm2-20b", tasks=["repetition"])
    assert "boolq" in costs.estimate_cost(parameters).uncounted
    assert "estimate" in str(costs.estimate_cost(parameters))
    with pytest.raises(icl.InputError, match="positive"):
        costs.estimate_cost(parameters, tokens_per_second=0)


def test_table_of_the_book_has_a_row_for_every_recipe_of_the_papers_models():
    rows = recipe_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [
        path.name for path in RECIPES if "llama-3" in path.name or "internlm2" in path.name
    ]
    assert all(row.count("|") == 9 for row in rows)


def test_stages_together_take_the_tokens_of_the_whole_run_without_text_tasks():
    parameters = icl.stage_parameters(model="meta-llama/Meta-Llama-3-8B", nlp_tasks=[])
    stages = costs.stage_tokens(parameters)
    assert stages[1] == 1005
    cost = costs.estimate_cost(parameters)
    whole = cost.tokens + stages[1]
    assert sum(stages.values()) + sum(cost.closer.values()) == pytest.approx(whole, abs=5)
    # Two shares of heads: induction heads and three random sets by either control, by mean and zero.
    assert stages[4] == pytest.approx(2 * 2 * (1 + 2 * 3) * stages[3], abs=20)
    assert stages[5] == pytest.approx(2 * stages[3], abs=20)
    rows = stage_table(parameters).splitlines()
    assert [row.split(",")[0].strip("| ") for row in rows[2:]] == [
        *"12345", *map(str, cost.closer)
    ]  # fmt: skip


def test_internlm2_directory_is_estimated_as_the_llama_it_becomes(tmp_path):
    from tests.models.test_internlm2 import write_checkpoint

    model = make_llama()
    write_checkpoint(tmp_path, model, layout="safetensors")
    parameters = icl.stage_parameters(
        model=str(tmp_path), dtype="float32", tasks=["repetition"], nlp_tasks=[]
    )
    cost = costs.estimate_cost(parameters)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.weights_bytes == 4 * cost.parameters
