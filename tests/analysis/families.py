"""Tiny random models of five families, and their weights taken apart by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.attention.test_hook import FAMILIES, SMALL, projections

FIVE = ["llama", "gpt2", "gpt_neox", "gemma3_text", "qwen3"]
N_HEADS, D_HEAD, HIDDEN = 4, 8, 32


def make(family: str, **changes: object) -> torch.nn.Module:
    """Large weights, and gains and biases that are neither one nor zero."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


class Weights(NamedTuple):
    """Of one head, as rows: hidden by 8, and the output 8 by hidden."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


def gain(norm: torch.nn.Module, family: str) -> torch.Tensor:
    return norm.weight + 1 if family == "gemma3_text" else norm.weight


def final_norm(model, family: str) -> torch.nn.Module:
    where = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}
    return model.get_submodule(where.get(family, "model.norm"))


@torch.no_grad()
def weights_by_hand(model, family: str, layer: int, head: int) -> Weights:
    """What the checkpoint's own matrices say, with the gains of the norms around them."""
    if family == "gpt2":
        block = model.transformer.h[layer]
        q, k, v = block.attn.c_attn.weight.split(HIDDEN, dim=1)
        o, norm = block.attn.c_proj.weight, block.ln_1
    elif family == "gpt_neox":
        block = model.gpt_neox.layers[layer]
        fused = block.attention.query_key_value.weight.T.reshape(HIDDEN, N_HEADS, 3, D_HEAD)
        q, k, v = (fused[:, :, i].reshape(HIDDEN, -1) for i in range(3))
        o, norm = block.attention.dense.weight.T, block.input_layernorm
    else:
        block = model.model.layers[layer]
        q, k, v, o = (getattr(block.self_attn, f"{n}_proj").weight.T for n in "qkvo")
        norm = block.input_layernorm
    n_groups = N_HEADS * D_HEAD // k.shape[1]
    query, output = (part(m, head) for part, m in ((columns, q), (rows, o)))
    key, value = (columns(m, head // n_groups) for m in (k, v))
    before = gain(norm, family)[:, None]
    query, key, value = before * query, before * key, before * value
    if family in ("gemma3_text", "qwen3"):
        query = query * gain(block.self_attn.q_norm, family)
        key = key * gain(block.self_attn.k_norm, family)
    if family == "gemma3_text":
        output = output * gain(block.post_attention_layernorm, family)
    return Weights(query, key, value, output)


def columns(matrix: torch.Tensor, head: int) -> torch.Tensor:
    return matrix[:, head * D_HEAD : (head + 1) * D_HEAD]


def rows(matrix: torch.Tensor, head: int) -> torch.Tensor:
    return matrix[head * D_HEAD : (head + 1) * D_HEAD]


@contextmanager
def replaced(model, family: str, layer: int, head: int, value, position=slice(None)) -> Iterator:
    """One head's output overwritten where it enters the output projection."""

    def hook(_, args):
        merged = args[0].clone()
        merged[:, position, head * D_HEAD : (head + 1) * D_HEAD] = value
        return (merged, *args[1:])

    handle = projections(model, family)[layer].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def entering(modules) -> Iterator[dict]:
    """What enters each of these modules, by its place in the list."""
    seen: dict = {}
    handles = [
        module.register_forward_pre_hook(lambda _, a, place=place: seen.update({place: a[0]}))
        for place, module in enumerate(modules)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
