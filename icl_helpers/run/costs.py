"""What a run will need: memory for the weights and the work, tokens, hours. Estimates, no promise.

Tokens are those of the prompts that the run will score, counted on a sample of each kind. Hours
follow from a rate of tokens per second, which the caller should measure with a small ``limit``.

Example
-------
>>> cost = estimate_cost(icl.stage_parameters(model="meta-llama/Meta-Llama-3-8B"))
>>> cost.weights_bytes / 1e9, cost.hours
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from icl_helpers.attention.heads import DRAWS, doses, head_count
from icl_helpers.errors import InputError
from icl_helpers.models.loading import load_config, load_tokenizer
from icl_helpers.models.reference_text import PAPER_POSITIONS, PAPER_SAMPLES
from icl_helpers.parameters import StageParameters
from icl_helpers.run.plan import GROUPS, Plan
from icl_helpers.tasks.prompts import PromptSet, build_prompts
from icl_helpers.tasks.specs import TextTaskSpec, get_task_spec

__all__ = [
    "PAPER_CONFIGS", "Cost", "estimate_cost", "parameter_counts", "stage_tokens", "weights_bytes",
]  # fmt: skip

# The paper's models' configurations, so that nobody needs the hub or a licence for an estimate.
PAPER_CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "internlm/internlm2-20b": {
        "vocab_size": 92_544, "hidden_size": 6144, "intermediate_size": 16_384,
        "num_hidden_layers": 48, "num_attention_heads": 48, "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
    },
}  # fmt: skip
# One multiplication and one addition a weight and token, at what a data-centre GPU of 300 TFLOP/s
# sustains on short prompts; small models are held back by all that is not arithmetic.
_FLOPS_PER_SECOND = 1e14
_MOST_TOKENS_PER_SECOND = 50_000
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bits a weight, scales included; embeddings and output are left as they are.
_BITS = {"4bit": 4.13, "8bit": 8.02}
# Tokens of one forward pass on a GPU under batch_size="auto".
_BATCH_TOKENS = 65_536
_SAMPLE = 40
# Five sequences of 50 tokens four times, with BOS (paper, section 2).
_SCORE_TOKENS = 5 * 201
# Passes of stage 9 for the full model, the kinds of removal with their draws, and side effects.
_KINDS_PASSES = 45


@dataclass(frozen=True)
class Cost:
    """An estimate for one run; memory in bytes, ``rate`` in tokens per second.

    ``working_bytes`` is the larger of a batch's activations and what the means need. ``uncounted``
    are tasks whose data have to be fetched first. ``closer`` has, of the tokens, those of each
    stage that looks closer at a few documents.
    """

    parameters: int
    weights_bytes: int
    working_bytes: int
    tokens: int
    rate: float
    uncounted: tuple[str, ...]
    closer: Mapping[int, int]

    @property
    def hours(self) -> float:
        """Hours on one GPU."""
        return self.tokens / self.rate / 3600

    def __str__(self) -> str:
        lines = [
            "estimates, not measurements:",
            f"  parameters       {self.parameters / 1e9:.2f} billion",
            f"  weights          {self.weights_bytes / 1e9:.1f} GB",
            f"  work             {self.working_bytes / 1e9:.1f} GB (shrinks with batch_size)",
            f"  tokens to score  {self.tokens / 1e6:.1f} million",
            f"  hours            {self.hours:.1f} at {self.rate:,.0f} tokens per second",
        ]
        for stage, tokens in self.closer.items():
            hours = tokens / self.rate / 3600
            lines.append(f"  of them stage {stage:<3}{tokens / 1e6:.1f} million, {hours:.2f} hours")
        if self.uncounted:
            lines.append(f"  not counted      {', '.join(self.uncounted)} (data not here)")
        return "\n".join(lines)


def parameter_counts(config: PreTrainedConfig) -> tuple[int, int]:
    """Parameters of a model, and those of its embeddings and output; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = {id(end.weight): end.weight.numel() for end in ends if end is not None}
    return total, sum(tables.values())


def weights_bytes(
    config: PreTrainedConfig, *, dtype: str = "bfloat16", quantization: str | None = None
) -> int:
    """Memory of the weights; under a quantisation all but embeddings and output shrink."""
    total, tables = parameter_counts(config)
    if dtype == "auto":
        dtype = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    size = _BYTES[dtype]
    if quantization is None:
        return total * size
    return int((total - tables) * _BITS[quantization] / 8) + tables * size


def estimate_cost(
    parameters: StageParameters,
    *,
    tokens_per_second: float | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Cost:
    """Memory, tokens and hours of all stages of a run.

    Parameters
    ----------
    tokens_per_second
        Rate of the machine; None: that of a GPU which sustains 100 TFLOP/s on this model, and no
        more than 50,000 tokens.
    tokenizer
        Counts the tokens; None: the embedded model's.

    Raises
    ------
    InputError
        A rate that is not positive.
    MissingArtefactError
        A model whose configuration is neither here nor on the hub.
    """
    if tokens_per_second is not None and not tokens_per_second > 0:
        raise InputError(f"tokens_per_second must be positive, got {tokens_per_second!r}")
    p = parameters
    if (known := PAPER_CONFIGS.get(p.model)) is None:
        config = load_config(p.model, revision=p.revision, trust_remote_code=p.trust_remote_code)
    else:
        config = LlamaConfig(**known, dtype=torch.bfloat16)
    total, _ = parameter_counts(config)
    plan, tokenizer = Plan(p), tokenizer or _embedded_tokenizer()
    tokens, longest, uncounted = _grid_tokens(plan, tokenizer)
    closer = _closer_tokens(plan, config, tokenizer)
    context = config.get_text_config().max_position_embeddings
    positions = min(p.positions or PAPER_POSITIONS, context)
    return Cost(
        parameters=total,
        weights_bytes=weights_bytes(config, dtype=p.dtype, quantization=p.quantization),
        working_bytes=_working_bytes(config, p, positions, longest),
        tokens=tokens + PAPER_SAMPLES * positions + sum(closer.values()),
        rate=tokens_per_second or min(_FLOPS_PER_SECOND / (2 * total), _MOST_TOKENS_PER_SECOND),
        uncounted=uncounted,
        closer=closer,
    )


def _closer_tokens(
    plan: Plan, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[int, int]:
    """Tokens of the stages that look closer, without text tasks and Shapley values."""
    p = plan.parameters.model_copy(update={"limit": plan.parameters.analysis_limit})
    tokens = sum(
        _set_tokens(prompts, p, tokenizer)[0]
        for prompts in plan.analysis_sets()
        if not isinstance(get_task_spec(prompts.task), TextTaskSpec)
    )
    text = config.get_text_config()
    n_heads = text.num_hidden_layers * text.num_attention_heads
    counts = doses(head_count(n_heads, plan.fractions[-1]), n_heads)
    # Function vectors take 25 documents a task, each some three times; the rest the same documents
    # without either family, and the removal's direct effect.
    vectors = 3 * 25 / plan.parameters.analysis_limit
    return {
        9: round(tokens * (len(counts) * (2 + DRAWS) + n_heads + _KINDS_PASSES)),
        10: round(tokens * (2 * len(counts) + 4 + vectors)),
    }


def _working_bytes(
    config: PreTrainedConfig, parameters: StageParameters, positions: int, longest: int
) -> int:
    """Activations of one layer for a batch, or the means' accumulators and their batch of four."""
    text = config.get_text_config()
    size = 4 if parameters.dtype == "float32" else 2
    # About six vectors of the hidden size and three of the inner size live at a time.
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    a_token = (6 * text.hidden_size + 3 * inner) * size
    batch = parameters.batch_size
    evaluated = _BATCH_TOKENS if batch == "auto" else int(batch) * longest
    accumulators = text.num_hidden_layers * positions * text.hidden_size * 4
    return max(evaluated * a_token, accumulators + 4 * positions * a_token)


def _grid_tokens(
    plan: Plan, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int, tuple[str, ...]]:
    """Tokens of all prompts under all conditions, of the longest prompt, and tasks left out."""
    total, longest = 0.0, 0
    uncounted: dict[str, None] = {}
    for group in GROUPS:
        n_conditions = sum(map(plan.condition_count, plan.kinds(group)))
        for prompts in plan.prompt_sets(group):
            spec = get_task_spec(prompts.task)
            if isinstance(spec, TextTaskSpec) and spec.hub and plan.parameters.data_dir is None:
                uncounted[prompts.task] = None
                continue
            tokens, most = _set_tokens(prompts, plan.parameters, tokenizer)
            total += tokens * n_conditions
            longest = max(longest, most)
    return round(total), longest, tuple(uncounted)


def _set_tokens(
    prompts: PromptSet, p: StageParameters, tokenizer: PreTrainedTokenizerBase
) -> tuple[float, int]:
    """Tokens of a set of prompts, and of the longest one."""
    abstract = not isinstance(get_task_spec(prompts.task), TextTaskSpec)
    # A draw of demonstrations hardly changes the length: every seed is counted as the first. The
    # abstract tasks' own rows stand for the published ones, which have to be fetched.
    data = "synthetic" if abstract else prompts.data
    counted = replace(prompts, seeds=tuple(p.seeds[:1]), data=data)
    documents, mean, most = _prompt_tokens(counted, tokenizer)
    return mean * min(p.limit or documents, documents), most


@functools.lru_cache(maxsize=128)
def _prompt_tokens(of: PromptSet, tokenizer: PreTrainedTokenizerBase) -> tuple[int, float, int]:
    """Documents of a task, and tokens of its prompts, mean and most, by a sample of them."""
    prompts = build_prompts(
        of.task, shots=of.shots, seed=of.seeds[0], labels=of.labels, data=of.data,
        demonstrations=of.demonstrations,
    )  # fmt: skip
    texts = [prompt.context for prompt in prompts[:_SAMPLE]]
    counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    return len(prompts), sum(counts) / len(counts), max(counts)


@functools.cache
def _embedded_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("icl-tiny")


def stage_tokens(p: StageParameters) -> dict[int, int]:
    """Tokens that each of the first five stages is the first to run; means at 3,000 positions.

    Text tasks, stage 6, are left out. Stages 7 and 8 take a few prompts and none; of those that
    look closer :class:`Cost` has the tokens.
    """
    plan = Plan(p)
    each = sum(_set_tokens(prompts, p, _embedded_tokenizer())[0] for prompts in plan.prompt_sets())
    tokens = {1: _SCORE_TOKENS, 2: PAPER_SAMPLES * PAPER_POSITIONS}
    for stage, kinds in {3: ("full",), 4: ("mean", "zero"), 5: ("knockout",)}.items():
        tokens[stage] = round(each * sum(map(plan.condition_count, kinds)))
    return tokens
