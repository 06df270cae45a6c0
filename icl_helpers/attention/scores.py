"""Prefix-matching scores: which heads look at what followed an earlier copy (paper, section 2).

Other scores of the same kind, attention that a head pays to a set of pairs, build on
:func:`mean_attention`.

Example
-------
>>> sequences = icl.random_sequences(tokenizer, seed=0)
>>> scores = icl.prefix_matching_scores(model, sequences)   # [5, layers, heads]
>>> scores.mean(0)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.heads import Head
from icl_helpers.attention.hook import (
    AttentionCall,
    attention_layout,
    attention_probabilities,
    check_heads,
    watched_attention,
)
from icl_helpers.attention.passes import check_ids, measuring
from icl_helpers.errors import InputError

__all__ = [
    "attention_patterns", "mean_attention", "prefix_matching_scores", "random_sequences",
    "repeated_ids", "token_pool",
]  # fmt: skip

# No word in angle or square brackets is ordinary text to a tokenizer that has it as one token.
_RESERVED = re.compile(r"<[^<>\s]+>|\[\w+\]")


def token_pool(
    tokenizer: PreTrainedTokenizerBase, *, exclude_ratio: float = 0.04
) -> tuple[list[int], str]:
    """Token ids that random sequences are drawn from, and how they were ranked.

    Tokens made by BPE merges in merge order, without the earliest and the latest ``exclude_ratio``
    of them (paper, section 2). A tokenizer without merges is ranked by token id among its ordinary
    tokens: none that was added to it, nor that its name shows to be reserved (``[unused7]``,
    ``<extra_id_0>``) or a byte (``<0x0A>``). Returns ``(ids, "merges" or "token ids")``.
    """
    if not 0 <= exclude_ratio < 0.5:
        raise InputError(f"exclude_ratio must lie in [0, 0.5), got {exclude_ratio}")
    special = set(tokenizer.all_special_ids)
    vocabulary = tokenizer.get_vocab()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = [] if backend is None else json.loads(backend.to_str())["model"].get("merges") or []
    # Older files write a merge as "a b", newer ones as a pair.
    merged = ["".join(m.split(" ", 1)) if isinstance(m, str) else "".join(m) for m in merges]
    ranked = [vocabulary[token] for token in merged if token in vocabulary]
    ranking = "merges"
    if not ranked:
        special |= set(tokenizer.added_tokens_decoder)
        special |= {number for token, number in vocabulary.items() if _RESERVED.fullmatch(token)}
        ranked, ranking = sorted(vocabulary.values()), "token ids"
    ranked = [token for token in dict.fromkeys(ranked) if token not in special]
    cut = int(len(ranked) * exclude_ratio)
    return ranked[cut : len(ranked) - cut], ranking


def random_sequences(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_sequences: int = 5,
    length: int = 50,
    exclude_ratio: float = 0.04,
    seed: int = 0,
) -> Int[torch.Tensor, "n_sequences length"]:
    """Sequences of distinct random tokens, without BOS (paper, section 2).

    Sequence ``i`` is drawn by its own generator, seeded with ``seed + i``, so that more sequences
    never change the first ones. Raises :class:`InputError` when the tokenizer has too few tokens.
    """
    if n_sequences < 1 or length < 2:
        raise InputError(
            f"n_sequences must be at least 1 and length at least 2, got {n_sequences} and {length}"
        )
    pool = torch.tensor(token_pool(tokenizer, exclude_ratio=exclude_ratio)[0])
    if len(pool) < length:
        raise InputError(
            f"length is {length}, but the tokenizer has only {len(pool)} tokens to draw from; use "
            f"a shorter length or a smaller exclude_ratio"
        )
    rows = []
    for index in range(n_sequences):
        generator = torch.Generator().manual_seed(seed + index)
        rows.append(pool[torch.randperm(len(pool), generator=generator)[:length]])
    return torch.stack(rows)


@measuring
def prefix_matching_scores(
    model: PreTrainedModel,
    sequences: Int[torch.Tensor, "n_sequences length"],
    *,
    repeats: int = 4,
    bos_token_id: int | None = None,
    batch_size: int | None = None,
    published_formula: bool = True,
) -> Float[torch.Tensor, "n_sequences layers heads"]:
    """Prefix-matching score of every head on every sequence, in [0, 1] (paper, section 2).

    Each sequence is repeated ``repeats`` times with BOS in front. The score of a head is the
    attention it pays, averaged over all positions from the second copy on, to the tokens that
    directly followed the earlier occurrences of the position's own token. Attention is reduced
    layer by layer inside the hook, so no more than one layer's attentions exist at a time.

    Raises :class:`InputError` for tokens or a BOS that the model has not, and where the repeated
    sequence is longer than its context.

    Parameters
    ----------
    bos_token_id
        Default: the model's own. A model without one gets no BOS.
    batch_size
        Sequences per forward pass; default all.
    published_formula
        True also counts attention to the position after BOS from the last token of each later copy
        (3 of 150 positions), as the published code does; False leaves that term out.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    ids, start = repeated_ids(model, sequences, repeats=repeats, bos_token_id=bos_token_id)
    length = sequences.shape[1]
    query = torch.arange(ids.shape[1])[:, None] - start
    # Index of the token before the key: the earlier copy of the query's token.
    key = torch.arange(ids.shape[1])[None, :] - start - 1
    followers = (query % length == key % length) & (key >= 0) & (key < query) & (query >= length)
    if published_formula and start == 1:
        # The published sum runs from r = 0 with targets 50 r + (i mod 50) + 1, so for the last
        # token of each later copy it also counts the position that follows BOS.
        last = (query >= 2 * length - 1) & ((query + 1) % length == 0)
        followers |= last & (key == -1)
    n_positions = length * (repeats - 1)
    return mean_attention(model, ids, followers, n_positions=n_positions, batch_size=batch_size)


def repeated_ids(
    model: PreTrainedModel,
    sequences: Int[torch.Tensor, "n_sequences length"],
    *,
    repeats: int = 4,
    bos_token_id: int | None = None,
) -> tuple[Int[torch.Tensor, "n_sequences tokens"], int]:
    """Each sequence ``repeats`` times behind BOS, and the place where its first copy begins."""
    attention_layout(model)  # what has no such attention is refused before its ids are
    if sequences.ndim != 2 or repeats < 2:
        raise InputError(
            f"sequences must have shape [n_sequences, length] and repeats be at least 2, got "
            f"{list(sequences.shape)} and {repeats}"
        )
    bos = model.config.get_text_config().bos_token_id if bos_token_id is None else bos_token_id
    if isinstance(bos, (list, tuple)):
        bos = bos[0]
    ids = sequences.repeat(1, repeats)
    if bos is not None:
        ids = torch.cat([torch.full((len(ids), 1), bos, dtype=ids.dtype), ids], dim=1)
    check_ids(model, ids, way_out="use shorter sequences or fewer repeats")
    return ids, int(bos is not None)


@measuring
def mean_attention(
    model: PreTrainedModel,
    input_ids: Int[torch.Tensor, "batch tokens"],
    pairs: Bool[torch.Tensor, "tokens tokens"],
    *,
    n_positions: int,
    batch_size: int | None = None,
) -> Float[torch.Tensor, "batch layers heads"]:
    """Attention that each head pays to these (query, key) pairs in all, over ``n_positions``."""
    layout = attention_layout(model)
    query, key = pairs.nonzero(as_tuple=True)
    parts = []
    for batch in input_ids.split(batch_size or len(input_ids)):
        scores = torch.zeros(len(batch), layout.n_layers, layout.n_heads)

        def reduce(layer: int, call: AttentionCall, scores: torch.Tensor = scores) -> None:
            total = attention_probabilities(call)[:, :, query, key].sum(dim=-1)
            scores[:, layer] = total / n_positions

        with watched_attention(model, reduce):
            # The decoder alone: the output projection's logits are not needed.
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
        parts.append(scores)
    return torch.cat(parts)


@measuring
def attention_patterns(
    model: PreTrainedModel,
    input_ids: Int[torch.Tensor, "batch tokens"],
    heads: Iterable[Head | tuple[int, int]],
    *,
    blocked: Bool[torch.Tensor, "... tokens tokens"] | None = None,
) -> dict[Head, Float[torch.Tensor, "batch tokens tokens"]]:
    """Attention of a few heads over a prompt, [batch, query, key] each (paper, Figures 6 and 7).

    ``blocked`` shows the pattern that a head is left with when these pairs are forbidden to it.
    Inside :func:`icl_helpers.intervene` the attentions are those on the altered residual stream.
    """
    asked = list(dict.fromkeys(Head(*head) for head in heads))
    check_heads(asked, attention_layout(model))
    check_ids(model, input_ids, way_out="use a shorter prompt")
    patterns: dict[Head, torch.Tensor] = {}

    def record(layer: int, call: AttentionCall) -> None:
        of_layer = [head.head for head in asked if head.layer == layer]
        probabilities = attention_probabilities(call, heads=of_layer, blocked=blocked)
        for index, head in enumerate(of_layer):
            patterns[Head(layer, head)] = probabilities[:, index].cpu()

    with watched_attention(model, record, {head.layer for head in asked}):
        model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    return {head: patterns[head] for head in asked}
