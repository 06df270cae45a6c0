"""The same on a GPU: an 8B-shaped Llama with random bfloat16 weights, made on the machine.

Nothing comes from the network: the tokenizer and the texts of the means are the embedded model's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from icl_helpers.attention.interventions import AttentionKnockout, MeanAblation, ZeroAblation
from icl_helpers.attention.means import mean_head_outputs
from icl_helpers.parameters import stage_parameters
from icl_helpers.run.costs import estimate_cost
from icl_helpers.tasks.specs import task_names
from tests.benchmark.evaluation import our_evaluation, stock_evaluation, zero_ablation
from tests.benchmark.process import seconds
from tests.benchmark.tools import forward, machine, operations, prompt_batch, spread_heads

LLAMA_8B = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, bos_token_id=0,
)  # fmt: skip
_BATCH, _DOCUMENTS, _SQUARE, _ROUNDS = 64, 512, 8192, 5
# Seconds after which nothing is repeated, of nine minutes in all.
_BUDGET = 360.0
EVALUATED = "icl.evaluate, zero ablation"


def measure_gpu(
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: LlamaConfig = LLAMA_8B,
    device: str = "cuda",
    documents: int = _DOCUMENTS,
    rounds: int = _ROUNDS,
    square: int = _SQUARE,
) -> dict[str, Any]:
    """Tokens per second plain, ablated, knocked out, by ``evaluate`` and by stock lm-eval.

    ``share`` is that of the plain pass in the rate of one matrix product of ``square`` rows and
    columns. ``table_1_hours`` extrapolates the grid of Table 1 from the rate of ``evaluate``: its
    prompts' tokens, counted by :func:`icl_helpers.run.costs.estimate_cost`, over that rate. A
    ``peak_bytes`` is None off an accelerator. Tokens are those of the prompts given, whatever was
    computed of them.
    """
    start = time.monotonic()
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        factor = torch.randn(square, square, dtype=torch.bfloat16)
    on_gpu = torch.device(device).type == "cuda"

    def fastest(call: Callable[[], Any]) -> tuple[float, int | None]:
        """Seconds of the fastest of some calls after one uncounted, and the peak of memory."""

        def finished() -> None:
            call()
            if on_gpu:
                # Kernels are waited for.
                torch.cuda.synchronize()

        finished()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        taken = [seconds(finished)]
        while len(taken) < rounds and time.monotonic() - start < _BUDGET:
            taken.append(seconds(finished))
        return min(taken), torch.cuda.max_memory_allocated() if on_gpu else None

    prompts, blocked = prompt_batch(tokenizer, size=min(_BATCH, documents))
    ids, heads = prompts.to(device), spread_heads(model)
    means = mean_head_outputs(model, ids[:2], batch_size=2)
    passes = {
        "plain forward": (),
        "zero ablation": (ZeroAblation(heads),),
        "mean ablation": (MeanAblation(heads, means),),
        "knockout": (AttentionKnockout(heads, blocked.to(device)),),
    }
    n_tokens = documents * ids.shape[1]
    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        **{
            name: (ids.numel(), forward(model, ids, *edits, logits_to_keep=1))
            for name, edits in passes.items()
        },
        EVALUATED: (
            n_tokens,
            our_evaluation(model, tokenizer, conditions=[zero_ablation(model)], limit=documents),
        ),
        "stock lm-eval, full model": (
            n_tokens,
            stock_evaluation(model, tokenizer, limit=documents, batch_size=len(ids)),
        ),
    }
    with torch.inference_mode():
        matmul = 2 * square**3 / fastest(lambda: factor @ factor)[0]
        taken = {name: (tokens, *fastest(run)) for name, (tokens, run) in runs.items()}
    rates = {name: tokens / took for name, (tokens, took, _) in taken.items()}
    needed = operations(model, ids, scored=len(ids))
    cost = estimate_cost(
        stage_parameters(model="meta-llama/Meta-Llama-3-8B", tasks=task_names(), nlp_tasks=[])
    )
    return {
        "machine": machine(),
        "device": torch.cuda.get_device_name() if on_gpu else device,
        "layers": config.num_hidden_layers, "hidden": config.hidden_size, "heads": len(heads),
        "prompt_tokens": ids.shape[1], "documents": documents, "rounds": rounds,
        "rates": [
            {"what": name, "rate": rates[name], "peak_bytes": peak}
            for name, (_, _, peak) in taken.items()
        ],
        "matmul_per_second": matmul,
        "share": needed / taken["plain forward"][1] / matmul,
        "table_1_tokens": cost.tokens,
        "table_1_hours": cost.tokens / rates[EVALUATED] / 3600,
        "minutes": (time.monotonic() - start) / 60,
    }  # fmt: skip
