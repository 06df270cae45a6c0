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
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from tqdm import tqdm
from transformers import PreTrainedModel

from icl_helpers.attention.hook import (
    AttentionCall,
    AttentionLayout,
    attention_layout,
    edited_attention,
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
    if average == "head_output":
        return _mean_outputs(model, layout, input_ids, batch_size)
    means = _mean_inputs(model, layout, input_ids, batch_size)
    return _replay(model, layout, input_ids[:1], means)


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
    layout = attention_layout(model)
    check_ids(model, input_ids, way_out="use shorter prompts")
    rows = torch.arange(len(input_ids))[:, None]
    outputs: dict[int, torch.Tensor] = {}

    def record(layer: int, call: AttentionCall) -> torch.Tensor:
        kept = call.output if positions is None else call.output[rows, positions]
        outputs[layer] = kept.float().cpu()
        return call.output

    with edited_attention(model, _per_layer(layout, record)):
        model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    return torch.stack([outputs[layer] for layer in range(layout.n_layers)], dim=1)


class _RunningMeans:
    """Mean over samples for every layer: one float32 tensor, updated in place batch by batch."""

    def __init__(self, n_layers: int) -> None:
        self._counts = [0] * n_layers
        self._means: torch.Tensor | None = None

    def update(self, layer: int, values: Float[torch.Tensor, "batch ..."]) -> None:
        if self._means is None:
            shape = (len(self._counts), *values.shape[1:])
            self._means = torch.zeros(shape, device=values.device)
        difference = values.float().mean(dim=0).to(self._means.device) - self._means[layer]
        self._counts[layer] += len(values)
        self._means[layer] += difference.mul_(len(values) / self._counts[layer])

    def all(self) -> Float[torch.Tensor, "layers ..."]:
        assert self._means is not None
        return self._means


def _batches(
    input_ids: torch.Tensor, batch_size: int, device: torch.device
) -> Iterator[torch.Tensor]:
    batches = input_ids.split(batch_size)
    for batch in tqdm(batches, desc="mean activations", unit="batch", disable=len(batches) < 8):
        yield batch.to(device)


def _mean_outputs(
    model: PreTrainedModel, layout: AttentionLayout, input_ids: torch.Tensor, batch_size: int
) -> torch.Tensor:
    running = _RunningMeans(layout.n_layers)

    def record(layer: int, call: AttentionCall) -> torch.Tensor:
        running.update(layer, call.output)
        return call.output

    with edited_attention(model, _per_layer(layout, record)):
        for batch in _batches(input_ids, batch_size, model.device):
            model.base_model(input_ids=batch, use_cache=False)
    return running.all().cpu()


def _mean_inputs(
    model: PreTrainedModel, layout: AttentionLayout, input_ids: torch.Tensor, batch_size: int
) -> Float[torch.Tensor, "layers positions hidden"]:
    running = _RunningMeans(layout.n_layers)

    def record(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.update(layer, _block_input(layout.modules[layer], args, kwargs))

    with input_hooks(layout.modules, record):
        for batch in _batches(input_ids, batch_size, model.device):
            model.base_model(input_ids=batch, use_cache=False)
    return running.all()


def _replay(
    model: PreTrainedModel,
    layout: AttentionLayout,
    any_ids: torch.Tensor,
    means: Float[torch.Tensor, "layers positions hidden"],
) -> Float[torch.Tensor, "layers positions heads d_head"]:
    """One forward pass in which every attention block is fed its mean input.

    The tokens do not matter: whatever the residual stream holds, each block sees its own mean, with
    the positions, masks and cache handling that the model itself sets up.
    """
    shape = (layout.n_layers, any_ids.shape[1], layout.n_heads, layout.d_head)
    # A layer's outputs take the place of its mean, which is not needed any more by then.
    fits = means.numel() == math.prod(shape)
    outputs = means.view(shape) if fits else torch.empty(shape, device=means.device)

    def mean(layer: int, current: torch.Tensor) -> torch.Tensor:
        return means[layer].to(device=current.device, dtype=current.dtype, copy=True)[None]

    def record(layer: int, call: AttentionCall) -> torch.Tensor:
        outputs[layer] = call.output[0]
        return call.output

    with replaced_inputs(layout, mean), edited_attention(model, _per_layer(layout, record)):
        model.base_model(input_ids=any_ids.to(model.device), use_cache=False)
    return outputs.cpu()


def _per_layer(layout: AttentionLayout, function: Any) -> dict[int, list[Any]]:
    return {
        layer: [lambda call, layer=layer: function(layer, call)] for layer in range(layout.n_layers)
    }


def _block_input(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    found = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(found, torch.Tensor) or found.ndim != 3:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} does not take its input as hidden states [batch, position, "
            f"hidden]; use average='head_output' for this architecture"
        )
    return found


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

    The function returns None, or the arguments to put in place of these. All hooks are removed
    whatever way the block is left.
    """
    handles = []
    try:
        for index, module in enumerate(modules):
            hook = lambda _, args, kwargs, index=index: function(index, args, kwargs)  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
