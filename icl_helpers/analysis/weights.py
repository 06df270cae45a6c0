"""What each head reads and writes, as matrices read off the running model.

A projection is linear, so a model tells its matrices itself: each attention block is fed basis
vectors at position 0, and the hook sees query, key and value come out; heads are made to give basis
vectors, and the block's output shows what they write. This needs no code per architecture: fused
and grouped projections, biases and partial rotary embeddings are the model's own business.
Rotary embeddings turn nothing at position 0. A norm is linear but for dividing by its input's size:
its gain is multiplied into the matrices, and the division is left out.

Example
-------
>>> weights = head_weights(model)
>>> ov = weights.value[layer, head] @ weights.output[layer, head]   # what is copied, as rows
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from icl_helpers.attention.hook import (
    AttentionCall,
    attention_layout,
    edited_attention,
    equal_but_for_rounding,
)
from icl_helpers.attention.means import replaced_inputs
from icl_helpers.errors import UnsupportedArchitectureError

__all__ = ["HeadWeights", "Norm", "Norms", "head_weights", "model_norms"]

# Far above any norm's epsilon, and exact in every floating-point format.
_LARGE = 1024.0


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm, and its parts that do not depend on the size of what it is given."""

    module: torch.nn.Module
    gain: Float[torch.Tensor, " hidden"]
    bias: Float[torch.Tensor, " hidden"]
    centred: bool

    @classmethod
    def of(cls, module: torch.nn.Module, like: torch.Tensor) -> Norm:
        """Found out by feeding it vectors of the width, type and device of ``like``."""
        ones = torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
        # Half of them -1: the mean is zero, and what comes out is plus or minus the gain.
        signs = ones - 2 * (torch.arange(len(ones), device=like.device) % 2)
        # Past the hooks, one of which may be asking.
        zero, alternating, constant = (
            module.forward(x[None])[0] for x in (0 * ones, _LARGE * signs, _LARGE * ones)
        )
        gain = (alternating - zero) * signs
        centred = bool((constant - zero).abs().max() < 0.5 * gain.abs().max())
        return cls(module, gain.float().cpu(), zero.float().cpu(), centred)

    def linear(self, x: Float[torch.Tensor, "... hidden"]) -> Float[torch.Tensor, "... hidden"]:
        """The norm of ``x``, in float32 on the CPU, but for the division and the bias."""
        x = x.float().cpu()
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.gain


@dataclass(frozen=True)
class Norms:
    """The norms in front of each attention block, behind it, and before the logits, or None."""

    before: tuple[Norm | None, ...]
    after: tuple[Norm | None, ...]
    final: Norm


@dataclass(frozen=True)
class HeadWeights:
    """Matrices of every head, float32 on the CPU; vectors are rows: ``x @ value[layer, head]``.

    Grouped queries: each head has its group's key and value. The gains of the norms in front of the
    attention block, on queries and keys, and behind the block are multiplied in. What a LayerNorm
    in front takes off as the mean is not.
    """

    query: Float[torch.Tensor, "layers heads hidden d_query"]
    key: Float[torch.Tensor, "layers heads hidden d_query"]
    value: Float[torch.Tensor, "layers heads hidden d_head"]
    output: Float[torch.Tensor, "layers heads d_head hidden"]


@torch.no_grad()
def head_weights(model: PreTrainedModel) -> HeadWeights:
    """Read the matrices of every head off the model.

    Takes one forward pass over about as many one-token rows as the model is wide, and the memory of
    the attention's weights in float32.

    Raises
    ------
    UnsupportedArchitectureError
        The model does not go through transformers' attention interface, or its projections are not
        linear (a gate on the heads' output, for instance).
    """
    layout = attention_layout(model)
    norms = model_norms(model)
    width = int(model.config.get_text_config().hidden_size)
    n_outputs = layout.n_heads * layout.d_head
    # Basis vectors, a row of zeros, and one of anything to check that the rest was linear.
    n_rows = max(width, n_outputs) + 2
    inputs, outputs = _probes(n_rows, width), _probes(n_rows, n_outputs)
    read: dict[str, list[torch.Tensor]] = {"query": [], "key": [], "value": []}
    written: list[torch.Tensor] = []

    def record(call: AttentionCall) -> torch.Tensor:
        for name, rows in read.items():
            states = getattr(call, name)[:, :, 0]
            rows.append(states.repeat_interleave(layout.n_heads // states.shape[1], dim=1))
        return outputs.view(n_rows, 1, layout.n_heads, layout.d_head).to(call.output)

    def note(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        written.append(_first(output)[:, 0])

    def reduce(module: torch.nn.Module, args: tuple[Any, ...], _output: Any) -> torch.Tensor:
        return args[0] * Norm.of(module, args[0]).gain.to(args[0])

    with ExitStack() as stack:
        # Norms inside the attention blocks, on queries and keys, are reduced to their gains.
        for inner in [m for block in layout.modules for m in block.modules() if _is_norm(m)]:
            stack.callback(inner.register_forward_hook(reduce).remove)
        for module in layout.modules:
            stack.callback(module.register_forward_hook(note).remove)
        stack.enter_context(replaced_inputs(layout, lambda _, current: inputs[:, None].to(current)))
        edits = {layer: [record] for layer in range(layout.n_layers)}
        stack.enter_context(edited_attention(model, edits))
        ids = torch.zeros(n_rows, 1, dtype=torch.long, device=model.device)
        model.base_model(input_ids=ids, use_cache=False)

    reads = {
        name: torch.stack([_matrix(model, images, inputs) for images in rows]).transpose(1, 2)
        for name, rows in read.items()
    }
    for matrices in reads.values():
        for layer, norm in enumerate(norms.before):
            matrices[layer] *= 1.0 if norm is None else norm.gain[:, None]
    writes = [_matrix(model, images, outputs) for images in written]
    behind = zip(norms.after, writes, strict=True)
    output = torch.stack([rows if norm is None else norm.linear(rows) for norm, rows in behind])
    return HeadWeights(
        **reads, output=output.view(layout.n_layers, layout.n_heads, layout.d_head, width)
    )


def _probes(n_rows: int, width: int) -> Float[torch.Tensor, "rows width"]:
    probes = torch.zeros(n_rows, width)
    probes[:width] = torch.eye(width)
    probes[-1] = torch.arange(width).cos()
    return probes


def _matrix(
    model: PreTrainedModel, images: Float[torch.Tensor, "rows ..."], probes: torch.Tensor
) -> Float[torch.Tensor, "width ..."]:
    """The matrix of a map from what it made of the probes."""
    made = images.float().cpu()
    made = made - made[-2]
    matrix = made[: probes.shape[1]]
    expected = torch.tensordot(probes[-1], matrix, dims=1)
    # To the precision of what was computed.
    if not equal_but_for_rounding(expected.to(images.dtype), made[-1].to(images.dtype)):
        raise _refuse(model, "its heads read or write otherwise than by a matrix")
    return matrix


def _refuse(model: PreTrainedModel, why: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"the weights of single heads of {model.config.model_type!r} cannot be read: {why}. "
        f"Scores that need no weights (prefix_matching_scores, previous_token_scores, "
        f"function_vector_scores) can be had"
    )


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _is_norm(module: torch.nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


@torch.no_grad()
def model_norms(model: PreTrainedModel) -> Norms:
    """Find the norms around each attention block and before the logits, by what goes through them.

    Raises :class:`UnsupportedArchitectureError` where something else than a norm stands there.
    """
    layout = attention_layout(model)
    parents = {child: module for module in model.modules() for child in module.children()}
    inner = {norm for block in layout.modules for norm in block.modules()}
    norms = [m for m in model.modules() if _is_norm(m) and m not in inner]
    seen: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        states = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(states, torch.Tensor):
            seen[module] = states.flatten(), _first(output).flatten()

    # Padding may be a vector of zeros, which goes through everything unchanged.
    token = int(getattr(model.get_input_embeddings(), "padding_idx", None) == 0)
    projection = model.get_output_embeddings()
    blocks = [parents[module] for module in layout.modules]
    watched = [*norms, *layout.modules, *blocks, projection]
    with ExitStack() as stack:
        for module in dict.fromkeys(watched):
            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        model(input_ids=torch.tensor([[token]], device=model.device), use_cache=False)

    def norm_where(end: int, tensor: torch.Tensor) -> Norm | None:
        for norm in norms:
            if norm in seen and torch.equal(seen[norm][end].to(tensor), tensor):
                return Norm.of(norm, seen[norm][0])
        return None

    before = []
    for attention, block in zip(layout.modules, blocks, strict=True):
        entering = seen[attention][0]
        before.append(norm_where(1, entering))
        if before[-1] is None and not torch.equal(entering, seen[block][0]):
            raise _refuse(model, "something else than a norm stands before its attention")
    final = norm_where(1, seen[projection][0])
    if final is None:
        raise _refuse(model, "something else than a norm stands before its logits")
    after = tuple(norm_where(0, seen[attention][1]) for attention in layout.modules)
    return Norms(tuple(before), after, final)
