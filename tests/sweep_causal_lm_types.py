"""Every causal language model of transformers, tiny and random: accepted or refused, and how exact.

For each type the largest difference of logits, relative to the largest logit: with the hook
installed but nothing edited, with a sequence run from a cache instead of whole (for the untouched
model and under each intervention), and between zero ablation and overwriting the head where it
enters the output projection. Takes some minutes on one thread.

Example
-------
$ python -m tests.sweep_causal_lm_types --out book/_static/architectures.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import icl_helpers as icl
from icl_helpers.attention.hook import AttentionLayout, attention_layout

SECONDS_PER_TYPE, MOST_PARAMETERS = 300, 30_000_000
LENGTH, START = 12, 7
HEADS = [icl.Head(0, 1), icl.Head(1, 0)]
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "o", "proj", "linear_proj")
NORMS = ("attn_sub_norm", "inner_attn_ln")

# What a configuration calls its sizes; set where it has a field of that name.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "embed_dim", "word_embed_proj_dim", "ple_embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp", "shared_intermediate_size", "n_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_head_dim", "swa_head_dim", "kv_channels", "global_head_dim", "kv_lora_rank", "q_lora_rank", "hidden_size_per_layer_input", "attention_hidden_size", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts", "rotary_dim"), 4),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_kv_shared_layers"), 1),
    "sliding_window": 5, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
# Tried in turn where a type does not take all of them together.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_kv_shared_layers": 0, "first_k_dense_replace": 0},
    {"num_key_value_heads": 4, "swa_num_key_value_heads": 4},
    {"head_dim": None, "kv_channels": None, "v_head_dim": None, "qk_head_dim": None},
    {"head_dim": 4, "num_key_value_heads": 4},
    {"head_dim": None, "num_key_value_heads": 4, "v_head_dim": 8},
    {"sliding_window": None, "n_group": None, "topk_group": None},
    {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32},
)


def shrunk(config_class: type[PreTrainedConfig], sizes: dict[str, Any]) -> PreTrainedConfig:
    """A configuration with these sizes where it has such fields, and its parts likewise."""
    usual = config_class()
    known = {**usual.to_dict(), **dict.fromkeys(usual.attribute_map)}
    kwargs: dict[str, Any] = {k: v for k, v in sizes.items() if k in known and v is not None}
    for name in config_class.sub_configs:
        part = getattr(usual, name, None)
        if isinstance(part, PreTrainedConfig):
            kwargs[name] = shrunk(type(part), sizes)
    return config_class(**kwargs)


def build(model_type: str) -> PreTrainedModel:
    """A tiny model of this type with large random weights; raises what it raises.

    The first that can be run, from a cache too where there is one such.
    """
    errors: list[Exception] = []
    uncached: list[PreTrainedModel] = []
    for variant in VARIANTS:
        try:
            config = shrunk(type(AutoConfig.for_model(model_type)), {**SIZES, **variant})
            if hasattr(config, "is_decoder"):
                config.is_decoder = True
            with torch.device("meta"):
                count = AutoModelForCausalLM.from_config(config).num_parameters()
            if count > MOST_PARAMETERS:
                raise ValueError(f"{count:,} parameters are too many for a tiny model")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).float().eval()
            for name, parameter in model.named_parameters():
                if "sinks" in name or parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.3)
            with torch.no_grad():
                model(input_ids=torch.tensor([[2, 3, 2]]), use_cache=False)
                uncached.append(model)
                first = model(input_ids=torch.tensor([[2, 3]]), use_cache=True)
                model(input_ids=torch.tensor([[2, 3]]), past_key_values=first.past_key_values)
            return model
        except Exception as error:
            errors.append(error)
    if uncached:
        return uncached[0]
    raise errors[0]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def logits(
    model: PreTrainedModel, *interventions: Any, cached: bool, ids: torch.Tensor
) -> torch.Tensor:
    with icl.intervene(model, *interventions):
        if not cached:
            return model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :START], use_cache=True)
        rest = model(
            input_ids=ids[:, START:], past_key_values=first.past_key_values, use_cache=True
        )
        return torch.cat([first.logits, rest.logits], dim=1)


def cuts(model: PreTrainedModel, layout: AttentionLayout) -> list[torch.nn.Module] | None:
    """Where the heads of each layer enter their projection, or the norm before it."""
    parents = {child: module for module in model.modules() for child in module.children()}
    found = []
    for attention in layout.modules:
        near = [*attention.named_modules(), *parents[attention].named_modules()]
        names = {name.rpartition(".")[2]: module for name, module in reversed(near)}
        wanted = [names[name] for name in (*NORMS, *PROJECTIONS) if name in names]
        found += wanted[:1]
    return found if len(found) == layout.n_layers else None


@torch.no_grad()
def zeroed_at_the_cut(
    model: PreTrainedModel, layout: AttentionLayout, ids: torch.Tensor
) -> torch.Tensor | None:
    places = cuts(model, layout)
    if places is None:
        return None
    handles = []

    def hook(head: int, args: Any) -> Any:
        merged = args[0].clone()
        heads = merged.reshape(*merged.shape[:-1], layout.n_heads, layout.d_head)
        heads[..., head, :] = 0
        return (heads.reshape(merged.shape), *args[1:])

    try:
        for layer, head in heads_of(layout):
            handles.append(
                places[layer].register_forward_pre_hook(lambda _, args, head=head: hook(head, args))
            )
        return model(input_ids=ids, use_cache=False).logits
    except (RuntimeError, TypeError):  # the heads do not enter it as they are
        return None
    finally:
        for handle in handles:
            handle.remove()


def heads_of(layout: AttentionLayout) -> list[icl.Head]:
    return [head for head in HEADS if head.layer < layout.n_layers and head.head < layout.n_heads]


def measure(model: PreTrainedModel) -> dict[str, Any]:
    """What an accepted model gives."""
    layout = attention_layout(model)
    torch.manual_seed(1)
    ids = torch.randint(2, 60, (2, LENGTH))
    heads = heads_of(layout)
    blocked = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    blocked[3:, 1:3] = True
    interventions = {
        "full": [],
        "zero": [icl.ZeroAblation(heads)],
        "mean": [icl.MeanAblation(heads, torch.randn(layout.n_layers, 20, layout.n_heads, layout.d_head))],
        "knockout": [icl.AttentionKnockout(heads, blocked)],
    }  # fmt: skip
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
    whole = {
        name: logits(model, *chosen, cached=False, ids=ids)
        for name, chosen in interventions.items()
    }
    result: dict[str, Any] = {
        "hooked": difference(whole["full"], plain),
        "effect": difference(whole["zero"], plain),
    }
    try:
        result["cached"] = {
            name: difference(logits(model, *chosen, cached=True, ids=ids), whole[name])
            for name, chosen in interventions.items()
        }
    except TimeoutError:
        raise
    except Exception as error:
        result["cached"] = f"{type(error).__name__}: {first_line(error)}"
    oracle = zeroed_at_the_cut(model, layout, ids)
    result["zero_against_projection"] = (
        None if oracle is None else difference(whole["zero"], oracle)
    )
    return result


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [repr(error)]
    # transformers' validation of configurations says what is wrong in the second line.
    return (
        lines[1].strip() if "Class validation error" in lines[0] and len(lines) > 1 else lines[0]
    )[:200]


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def examine(model_type: str) -> dict[str, Any]:
    """One row of the table."""
    try:
        with time_limit(SECONDS_PER_TYPE):
            model = build(model_type)
            try:
                return {"result": "accepted", **measure(model)}
            except icl.ICLError as error:
                return {"result": "refused", "reason": first_line(error).split(". Supported")[0]}
            except TimeoutError:
                raise
            except Exception as error:
                return {
                    "result": "failed",
                    "reason": f"{type(error).__name__}: {first_line(error)}",
                }
    except Exception as error:
        return {
            "result": "not constructed",
            "reason": f"{type(error).__name__}: {first_line(error)}",
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the table goes, as JSON")
    parser.add_argument("types", nargs="*", help="default: all")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = {}
    for model_type in asked.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows[model_type] = examine(model_type)
        print(model_type, json.dumps(rows[model_type]), flush=True)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "icl_helpers": icl.__version__,
    }
    table = {"date": datetime.date.today().isoformat(), "versions": versions, "types": rows}
    if asked.out:
        asked.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for result in sorted({row["result"] for row in rows.values()}):
        print(result, sum(row["result"] == result for row in rows.values()))


if __name__ == "__main__":
    main()
