"""The same on a GPU: an 8B-shaped Llama with random bfloat16 weights, made on the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from icl_helpers.attention.interventions import AttentionKnockout, ZeroAblation
from icl_helpers.parameters import stage_parameters
from icl_helpers.run.costs import estimate_cost
from icl_helpers.tasks.specs import task_names
from tests.benchmark.evaluation import our_evaluation, stock_evaluation, zero_ablation
from tests.benchmark.tools import forward, prompt_batch, seconds, spread_heads

LLAMA_8B = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, bos_token_id=0,
)  # fmt: skip
_BATCH = 64
_DOCUMENTS = 512


def measure_gpu(
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: LlamaConfig = LLAMA_8B,
    device: str = "cuda",
    documents: int = _DOCUMENTS,
    rounds: int = 5,
) -> dict[str, Any]:
    """Tokens per second plain, ablated, knocked out, by ``evaluate`` and by stock lm-eval.

    ``table_1_hours`` extrapolates the grid of Table 1 from the rate of ``evaluate``: its prompts'
    tokens, counted by :func:`icl_helpers.run.costs.estimate_cost`, over that rate. ``peak_bytes`` is
    None off an accelerator. Tokens are those of the prompts given, whatever was computed of them.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    on_gpu = torch.device(device).type == "cuda"
    prompts, blocked = prompt_batch(tokenizer, size=min(_BATCH, documents))
    ids, heads = prompts.to(device), spread_heads(model)
    knockout = AttentionKnockout(heads, blocked.to(device))
    passes = {
        "plain forward": forward(model, ids, logits_to_keep=1),
        "zero ablation": forward(model, ids, ZeroAblation(heads), logits_to_keep=1),
        "knockout": forward(model, ids, knockout, logits_to_keep=1),
    }
    with torch.inference_mode():
        rates = {name: ids.numel() / _fastest(run, on_gpu, rounds) for name, run in passes.items()}
    n_tokens = documents * ids.shape[1]
    ours = our_evaluation(model, tokenizer, conditions=[zero_ablation(model)], limit=documents)
    rates["icl.evaluate, zero ablation"] = n_tokens / _fastest(ours, on_gpu, rounds)
    stock = stock_evaluation(model, tokenizer, limit=documents, batch_size=_BATCH)
    rates["stock lm-eval, full model"] = n_tokens / _fastest(stock, on_gpu, 1)
    cost = estimate_cost(
        stage_parameters(model="meta-llama/Meta-Llama-3-8B", tasks=task_names(), nlp_tasks=[])
    )
    return {
        "device": torch.cuda.get_device_name() if on_gpu else device,
        "layers": config.num_hidden_layers, "hidden": config.hidden_size,
        "prompt_tokens": ids.shape[1], "documents": documents,
        "tokens_per_second": rates,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "table_1_tokens": cost.tokens,
        "table_1_hours": cost.tokens / rates["icl.evaluate, zero ablation"] / 3600,
    }  # fmt: skip


def _fastest(call: Callable[[], Any], on_gpu: bool, rounds: int) -> float:
    """Seconds of the fastest of some calls after one uncounted; kernels are waited for."""

    def finished() -> None:
        call()
        if on_gpu:
            torch.cuda.synchronize()

    finished()
    return min(seconds(finished) for _ in range(rounds))
