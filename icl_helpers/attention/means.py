"""Mean head outputs: what a head gives when it sees the average input (paper, section 4).

Two readings of "mean ablation" are offered. ``attention_input`` averages the input of each
attention block over reference samples, per position, and computes every head's output from that
average: the published code's reading. ``head_output`` averages the heads' outputs themselves.

Example
-------
>>> means = icl.mean_head_outputs(model, icl.reference_ids(tokenizer, texts))
>>> means.shape   # [layers, positions, heads, d_head]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from tqdm import tqdm
from transformers import PreTrainedModel

from icl_helpers.attention.hook import (
    AttentionCall,
    AttentionLayout,
    attention_layout,
    watched_attention,
)
from icl_helpers.attention.passes import check_ids, forget_lengths, measuring, one_angle_length
from icl_helpers.errors import InputError, UnsupportedArchitectureError

__all__ = ["input_hooks", "mean_head_outputs", "prompt_head_outputs", "replaced_inputs"]


@measuring
def mean_head_outputs(
    model: PreTrainedModel,
    input_ids: Int[torch.Tensor, "samples positions"],
    *,
    average: Literal["attention_input", "head_output"] = "attention_input",
    batch_size: int = 1,
) -> Float[torch.Tensor, "layers positions heads d_head"]:
    """Output of every head at every position under the average over the samples.

    Samples stream through the model: the only memory beyond it is one accumulator, [layers,
    positions, hidden] in float32 (or [layers, positions, heads, d_head]), kept on the model's
    device; nothing is written to disk. The result is float32, on the CPU.

    Raises :class:`InputError` for an unknown ``average``, and for ``input_ids`` that are empty,
    misshapen or not the model's, longer than its context, or than sequences whose rotary angles are
    those of short ones.
    """
    if average not in ("attention_input", "head_output"):
        raise InputError(
            f"average must be 'attention_input' (the published code's reading) or 'head_output', "
            f"got {average!r}"
        )
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    layout = attention_layout(model)
    check_ids(model, input_ids, way_out="use shorter reference samples")
    if input_ids.shape[1] > one_angle_length(model):
        raise InputError(
            f"reference samples of {input_ids.shape[1]} tokens are beyond the model's trained "
            f"{one_angle_length(model)}, where it turns all positions otherwise than in shorter "
            f"prompts; cut them to that length"
        )
    forget_lengths(model)
    # One float32 tensor for all layers, updated in place batch by batch.
    means = torch.empty(0)
    counts = [0] * layout.n_layers

    def update(layer: int, values: Float[torch.Tensor, "batch ..."]) -> None:
        nonlocal means
        if not means.numel():
            means = torch.zeros(layout.n_layers, *values.shape[1:], device=values.device)
        difference = values.float().mean(dim=0).to(means.device) - means[layer]
        counts[layer] += len(values)
        means[layer] += difference.mul_(len(values) / counts[layer])

    def note(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        update(layer, _block_input(layout.modules[layer], args, kwargs))

    watching: AbstractContextManager[Any] = (
        input_hooks(layout.modules, note)
        if average == "attention_input"
        else watched_attention(model, lambda layer, call: update(layer, call.output))
    )
    batches = input_ids.split(batch_size)
    bar = tqdm(batches, desc="mean activations", unit="batch", disable=len(batches) < 8)
    with watching:
        for batch in bar:
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    return means.cpu() if average == "head_output" else _replay(model, input_ids[:1], means)


@measuring
def prompt_head_outputs(
    model: PreTrainedModel,
    input_ids: Int[torch.Tensor, "batch tokens"],
    *,
    positions: Int[torch.Tensor, "batch chosen"] | None = None,
) -> Float[torch.Tensor, "batch layers chosen heads d_head"]:
    """Output of every head on each prompt, at every position or at chosen ones.

    This is what enters the output projection; float32, on the CPU. Inside
    :func:`icl_helpers.intervene` the outputs are those of the altered model. Rows are padded on the
    right: padding changes nothing to its left. Raises :class:`InputError` for ids that are not the
    model's.
    """
    attention_layout(model)  # what has no such attention is refused before its ids are
    check_ids(model, input_ids, way_out="use shorter prompts")
    rows = torch.arange(len(input_ids))[:, None]
    outputs: dict[int, torch.Tensor] = {}

    def record(layer: int, call: AttentionCall) -> None:
        asked = call.output if positions is None else call.output[rows, positions]
        outputs[layer] = asked.float().cpu()

    with watched_attention(model, record) as layout:
        model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    return torch.stack([outputs[layer] for layer in range(layout.n_layers)], dim=1)


def _replay(
    model: PreTrainedModel,
    any_ids: torch.Tensor,
    means: Float[torch.Tensor, "layers positions hidden"],
) -> Float[torch.Tensor, "layers positions heads d_head"]:
    """One pass, whatever its tokens are, in which every attention block is fed its mean input."""
    layout = attention_layout(model)
    shape = (layout.n_layers, any_ids.shape[1], layout.n_heads, layout.d_head)
    # A layer's outputs take the place of its mean, which is not needed any more by then.
    fits = means.numel() == math.prod(shape)
    outputs = means.view(shape) if fits else torch.empty(shape, device=means.device)

    def mean(layer: int, current: torch.Tensor) -> torch.Tensor:
        return means[layer].to(device=current.device, dtype=current.dtype, copy=True)[None]

    def record(layer: int, call: AttentionCall) -> None:
        outputs[layer] = call.output[0]

    with replaced_inputs(layout, mean), watched_attention(model, record):
        model.base_model(input_ids=any_ids.to(model.device), use_cache=False)
    return outputs.cpu()


def _block_input(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    states = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(states, torch.Tensor) or states.ndim != 3:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} does not take its input as hidden states [batch, position, "
            f"hidden]; use average='head_output' for this architecture"
        )
    return states


@contextmanager
def replaced_inputs(
    layout: AttentionLayout, function: Callable[[int, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Feed each attention block ``function(layer, input)`` in place of its input."""

    def replace(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        new = function(layer, _block_input(layout.modules[layer], args, kwargs))
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": new}
        return (new, *args[1:]), kwargs

    with input_hooks(layout.modules, replace):
        yield


@contextmanager
def input_hooks(modules: Iterable[torch.nn.Module], function: Any) -> Iterator[None]:
    """Call ``function(index, args, kwargs)`` before each module, for example of every layer.

    It returns None, or the arguments to put in place of these.
    """
    with ExitStack() as stack:
        for index, module in enumerate(modules):
            hook = lambda _, args, kwargs, index=index: function(index, args, kwargs)  # noqa: E731
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
