"""Are they induction heads? What heads do in a circuit, from their weights and causally.

An induction circuit takes two heads (Elhage et al. 2021; Olsson et al. 2022): one that attends to
the token before, and in a later layer one whose keys read what the first has written
(K-composition), so that it finds the token that followed an earlier copy, and whose output raises
that token's logit (copying). Each of these steps has a score of every head here.

Example
-------
>>> earlier = icl.previous_token_scores(model, sequences)
>>> copying = icl.copying_scores(model)
>>> composition = icl.composition_scores(model, kind="K")   # [layer, head, later layer, head]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from transformers import PreTrainedModel

from icl_helpers.analysis.weights import Norm, head_weights, model_norms
from icl_helpers.attention.heads import Head
from icl_helpers.attention.hook import (
    AttentionCall,
    AttentionEdit,
    attention_layout,
    check_heads,
    edited_attention,
)
from icl_helpers.attention.interventions import Intervention, ZeroAblation, intervene
from icl_helpers.attention.means import prompt_head_outputs
from icl_helpers.attention.passes import check_ids, measuring
from icl_helpers.attention.scores import mean_attention, prefix_matching_scores, repeated_ids
from icl_helpers.errors import InputError

__all__ = [
    "causal_composition", "composition_scores", "copying_scores", "direct_logit_effects",
    "direct_removal", "previous_token_scores",
]  # fmt: skip

# Smaller eigenvalues than this part of a head's largest are those of directions it does not use.
_NO_EIGENVALUE = 1e-6


def previous_token_scores(
    model: PreTrainedModel, input_ids: Int[torch.Tensor, "batch tokens"]
) -> Float[torch.Tensor, "layers heads"]:
    """Attention that each head pays from a token to the one before, in [0, 1].

    The mean over all tokens but the first of each row, and over the rows. Raises
    :class:`InputError` for rows of fewer than two tokens, or ids that the model has not.
    """
    attention_layout(model)
    check_ids(model, input_ids, way_out="use a shorter text")
    n_tokens = input_ids.shape[1]
    if n_tokens < 2:
        raise InputError("rows of one token have none before it; use longer ones")
    pairs = torch.ones(n_tokens - 1, dtype=torch.bool).diag(-1)
    return mean_attention(model, input_ids, pairs, n_positions=n_tokens - 1).mean(0)


@torch.no_grad()
def copying_scores(
    model: PreTrainedModel, *, weighted: bool = False
) -> Float[torch.Tensor, "layers heads"]:
    """Share of the eigenvalues of each head's full OV circuit whose real part is positive.

    The full OV circuit, W_U W_O W_V W_E, says how much attention to a token raises each token's
    logit (Elhage et al. 2021). It copies where its eigenvalues are positive: 1 says that all are,
    one half is what random weights give. It is [vocabulary, vocabulary], but the eigenvalues that
    are not zero, at most d_head, are those of a [d_head, d_head] product. Those below a millionth
    of the head's largest count as zero, and are left out; a head with none scores 0.

    The gains of the norms before and behind the attention and before the logits are part of the
    circuit; their centring and division, biases, position embeddings and MLPs are not. Grouped
    queries: each head has its group's W_V. Attention and rotary embeddings play no part in it.

    Parameters
    ----------
    weighted
        True: the sum of the eigenvalues over the sum of their absolute values instead, in [-1, 1],
        which is the measure of Elhage et al.

    Raises
    ------
    UnsupportedArchitectureError
        The weights of single heads cannot be read: see
        :func:`icl_helpers.analysis.weights.head_weights`.
    """
    weights, norms = head_weights(model), model_norms(model)
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings().weight
    n_tokens = min(embedding.num_embeddings, len(unembedding))
    through = torch.zeros(unembedding.shape[1], unembedding.shape[1], dtype=torch.double)
    for tokens in torch.arange(n_tokens, device=model.device).split(8_192):
        # The module itself: some scale what they look up.
        through += unembedding[tokens].cpu().double().T @ embedding(tokens).cpu().double()
    through *= norms.final.gain[:, None]
    circuits = weights.output.double() @ through @ weights.value.double()
    eigenvalues = torch.linalg.eigvals(circuits)
    sizes = eigenvalues.abs()
    sizes = sizes.masked_fill(sizes <= _NO_EIGENVALUE * sizes.amax(-1, keepdim=True), 0.0)
    if weighted:
        signed, whole = torch.where(sizes > 0, eigenvalues.real, 0.0), sizes
    else:
        signed, whole = (sizes > 0) & (eigenvalues.real > 0), sizes > 0
    return (signed.sum(-1) / whole.sum(-1)).nan_to_num(0.0).float()


def composition_scores(
    model: PreTrainedModel, kind: Literal["Q", "K", "V"] = "K"
) -> Float[torch.Tensor, "layers heads layers heads"]:
    """How much of what each later head reads could be what each earlier head writes, from weights.

    [layer, head, later layer, head]; zero unless the second layer is later. With vectors as rows,
    and the earlier head's W_V W_O called OV (Elhage et al. 2021):
    ``|OV W_K W_Q^T| / (|OV| |W_K W_Q^T|)`` for ``"K"``,
    ``|OV W_Q W_K^T| / (|OV| |W_Q W_K^T|)`` for ``"Q"``, ``|OV W_V W_O| / (|OV| |W_V W_O|)`` for
    ``"V"``, where ``|.|`` is the Frobenius norm. In [0, 1]; nothing is subtracted, and random
    weights do not give zero but about 1 / sqrt(hidden size).

    Queries and keys are those of position 0, where rotary embeddings turn nothing: the content
    part alone. Grouped queries: each head has its group's W_K and W_V. The gains of the norms
    before and behind the attention, and on queries and keys, are multiplied in; centring and
    division are left out, as are biases and the MLPs between.

    Raises :class:`InputError` for another kind, and as :func:`copying_scores` does.
    """
    if kind not in ("Q", "K", "V"):
        raise InputError(f"kind must be 'Q', 'K' or 'V', got {kind!r}")
    weights = head_weights(model)
    query, key = weights.query.flatten(0, 1), weights.key.flatten(0, 1)
    value, written = weights.value.flatten(0, 1), weights.output.flatten(0, 1)
    # A later head reads by the first of these, and the second takes it from there.
    circuits = {"K": (key, query.mT), "Q": (query, key.mT), "V": (value, written)}
    reads, goes_on = circuits[kind]
    # |A B C|^2 is the trace of (A^T A) B (C C^T) B^T, and the two outer ones are small.
    inner, outer = value.mT @ value, goes_on @ goes_on.mT
    size = (inner * (written @ written.mT)).sum((-2, -1)).sqrt()
    size_later = ((reads.mT @ reads) * outer).sum((-2, -1)).sqrt()
    n_layers, n_heads = weights.output.shape[:2]
    scores = torch.zeros(len(written), len(reads))
    for head, matrix in enumerate(written):
        later = slice((head // n_heads + 1) * n_heads, None)
        middle = matrix @ reads[later]
        squares = ((inner[head] @ middle @ outer[later]) * middle).sum((-2, -1))
        scores[head, later] = squares.clamp(min=0).sqrt() / (size[head] * size_later[later])
    # A head without weights composes with none.
    return scores.nan_to_num(0.0).view(n_layers, n_heads, n_layers, n_heads)


def causal_composition(
    model: PreTrainedModel,
    sequences: Int[torch.Tensor, "n_sequences length"],
    heads: Iterable[Head | tuple[int, int]],
    *,
    repeats: int = 4,
    bos_token_id: int | None = None,
) -> Float[torch.Tensor, "chosen layers heads"]:
    """How far every head's prefix-matching score falls when one earlier head is zeroed.

    For each of ``heads`` the score of every head on the full model less that with this head
    removed, averaged over the sequences; zero in its own layer and before it. What
    :func:`composition_scores` with ``"K"`` suggests from weights, measured. The options are those
    of :func:`icl_helpers.prefix_matching_scores`.
    """
    zeroed = [Head(*head) for head in heads]
    check_heads(zeroed, attention_layout(model))
    options: dict[str, Any] = {"repeats": repeats, "bos_token_id": bos_token_id}
    whole = prefix_matching_scores(model, sequences, **options).mean(0)
    falls = torch.zeros(len(zeroed), *whole.shape)
    for index, head in enumerate(zeroed):
        with intervene(model, ZeroAblation([head])):
            falls[index] = whole - prefix_matching_scores(model, sequences, **options).mean(0)
    return falls


@measuring
def direct_logit_effects(
    model: PreTrainedModel,
    sequences: Int[torch.Tensor, "n_sequences length"],
    *,
    repeats: int = 4,
    bos_token_id: int | None = None,
) -> Float[torch.Tensor, "layers heads"]:
    """What each head's output itself adds to the logit of the right next token on repeats.

    On sequences repeated as for :func:`icl_helpers.prefix_matching_scores`, at every position from
    the second copy on: the head's part of the logit of the token that followed the earlier copies,
    less its mean part of all logits, averaged. In logits, before any soft-capping. Norms divide by
    what they divide by in the full model (Elhage et al. 2021, direct path); their biases are no
    head's. Raises as :func:`copying_scores` does.
    """
    weights, norms = head_weights(model), model_norms(model)
    ids, start = repeated_ids(model, sequences, repeats=repeats, bos_token_id=bos_token_id)
    length = sequences.shape[1]
    places = torch.arange(start + length, ids.shape[1])
    with _scales(*norms.after, norms.final) as scales:
        outputs = prompt_head_outputs(model, ids, positions=places.expand(len(ids), -1))
    unembedding = model.get_output_embeddings().weight.float().cpu()
    target = (unembedding[ids[:, places - length + 1]] - unembedding.mean(0)) * norms.final.gain
    if norms.final.centred:
        target = target - target.mean(-1, keepdim=True)
    target = target * scales[norms.final][:, places, None]
    effects = []
    for layer, behind in enumerate(norms.after):
        effect = torch.einsum("bpn,hdn,bphd->bph", target, weights.output[layer], outputs[:, layer])
        effect = effect if behind is None else effect * scales[behind][:, places, None]
        effects.append(effect.mean((0, 1)))
    return torch.stack(effects)


@contextmanager
def _scales(*norms: Norm | None) -> Iterator[dict[Norm, Float[torch.Tensor, "batch tokens"]]]:
    """Note by how much each norm multiplies its linear part, for every token of a pass."""
    scales: dict[Norm, torch.Tensor] = {}

    def note(norm: Norm, args: tuple[Any, ...], output: torch.Tensor) -> None:
        linear, made = norm.linear(args[0]), output.float().cpu() - norm.bias
        scales[norm] = (made * linear).sum(-1) / linear.square().sum(-1).clamp(min=1e-30)

    with ExitStack() as stack:
        for norm in [norm for norm in norms if norm is not None]:
            hook = lambda _m, args, output, norm=norm: note(norm, args, output)  # noqa: E731
            stack.callback(norm.module.register_forward_hook(hook).remove)
        yield scales


@contextmanager
def direct_removal(model: PreTrainedModel, intervention: Intervention) -> Iterator[PreTrainedModel]:
    """Apply an intervention on the direct path alone: all that comes later stays as it was.

    Inside the block the residual stream before the last norm is that of the full model, but for
    what the intervention changes in the heads' own outputs. Its effect there is the direct effect;
    what :func:`icl_helpers.intervene` has beyond it, later layers made: they repair the loss, or
    add to it (McGrath et al. 2023; Rushing & Nanda 2024). A norm behind the attention divides by
    what it does in the full model; the last norm by what the changed stream has.

    Raises as :func:`copying_scores` and :func:`icl_helpers.intervene` do.
    """
    weights, norms = head_weights(model), model_norms(model)
    changes: dict[int, torch.Tensor] = {}

    def watching(layer: int, edit: AttentionEdit) -> AttentionEdit:
        def note(call: AttentionCall) -> torch.Tensor:
            changes[layer] = (edit(call) - call.output).float().cpu()
            return call.output

        return note

    def add_changes(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        stream = args[0]
        for layer, change in changes.items():
            written = torch.einsum("bthd,hdn->btn", change, weights.output[layer])
            if (norm := norms.after[layer]) is not None:
                written = written * scales[norm][..., None]
            stream = stream + written.to(stream)
        return (stream, *args[1:])

    edits = intervention.edits(attention_layout(model))
    with ExitStack() as stack:
        scales = stack.enter_context(_scales(*norms.after))
        stack.callback(norms.final.module.register_forward_pre_hook(add_changes).remove)
        watched = {layer: [watching(layer, edit)] for layer, edit in edits.items()}
        stack.enter_context(edited_attention(model, watched))
        yield model
