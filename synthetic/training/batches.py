"""Batches for training the embedded model: tokens, loss weights, and where induction would look."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from synthetic.training.corpus import (
    LETTER_LENGTHS,
    TEXT_TASKS,
    episode,
    label_pool,
    naming_episode,
    reference_text,
    text_episode,
    word_categories,
)

__all__ = ["Batch", "build_tokenizer", "episode_batch", "repeat_batch"]


_BOS, _EOS = "<|begin_of_text|>", "<|end_of_text|>"
# Words with their space, punctuation, and whole runs of line breaks: a label after a colon is a
# token of its own, and a blank line is one token.
_SPLIT = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Batch:
    """One forward pass of training.

    ``weights`` is the loss weight of predicting each token (0 at position 0); ``induction`` is True
    where a query attending to a key is the induction pattern, for the first rows of the batch.
    ``names`` holds the token of a row's pattern name where its label stands, 0 elsewhere.
    """

    ids: Int[torch.Tensor, "rows tokens"]
    weights: Float[torch.Tensor, "rows tokens"]
    induction: Bool[torch.Tensor, "watched tokens tokens"]
    names: Int[torch.Tensor, "rows tokens"]


def build_tokenizer(*, seed: int = 0, vocab_size: int = 1500) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on generated text; adds no BOS by itself."""
    rng = random.Random(f"tokenizer-{seed}")
    texts = [episode(rng, fresh=1.0).text for _ in range(4000)]
    texts += [text_episode(rng, n_shots=5).text for _ in range(1500)]
    texts += [reference_text(rng) for _ in range(1000)]
    words = [word for category in word_categories().values() for word in category]
    # Words and labels are met at the start of a line and after a space, often enough to be tokens.
    labels = [*label_pool(), *(label for task in TEXT_TASKS for label in task.labels)]
    texts += [f"{word} {word}\n\n" for word in [*words, *labels] for _ in range(60)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_BOS, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=_BOS, eos_token=_EOS, pad_token=_EOS
    )


def repeat_batch(
    rng: random.Random, *, vocab_size: int, rows: int, length: int, pool: int, watched: int
) -> Batch:
    """Repeated random sequences, each drawn from a small pool of tokens of its own.

    The pool makes tokens recur within a sequence's neighbours across the batch, which is what lets
    induction form quickly; only positions with an earlier copy are scored.
    """
    ids = torch.empty(rows, length, dtype=torch.long)
    weights = torch.zeros(rows, length)
    induction = torch.zeros(min(watched, rows), length, length, dtype=torch.bool)
    positions = torch.arange(length)
    for row in range(rows):
        tokens = rng.sample(range(2, vocab_size), min(pool, vocab_size - 2))
        period = rng.randint(3, length // 2 - 1)
        sequence = [rng.choice(tokens) for _ in range(period)]
        ids[row] = torch.tensor(sequence)[positions % period]
        weights[row, period + 1 :] = 1.0
        if row < watched:
            earlier = positions[:, None] - (positions - 1)
            induction[row] = (earlier > 0) & (earlier % period == 0) & (positions > 0)
    return Batch(ids, weights / weights.sum(), induction, torch.zeros_like(ids))


def episode_batch(
    rng: random.Random,
    tokenizer: PreTrainedTokenizerFast,
    *,
    rows: int,
    fresh: float,
    text_share: float,
    watched: int,
    max_tokens: int,
    naming_share: float = 0.0,
    word_share: float = 0.4,
    unseen_weight: float = 0.0,
    named_lengths: Sequence[int] = LETTER_LENGTHS,
) -> list[Batch]:
    """Episodes in two batches by length, each padded to its own longest row.

    Loss falls on the labels that can be known, and with ``unseen_weight`` on those that cannot: for
    them the best answer is how often a label occurs, whatever the instance. The induction pattern
    is attention from the token before a label (the colon) to the earlier labels.
    """
    episodes = []
    for _ in range(rows):
        kind = rng.random()
        if kind < text_share:
            episodes.append(text_episode(rng))
        elif kind < text_share + naming_share:
            episodes.append(naming_episode(rng, lengths=named_lengths))
        else:
            episodes.append(episode(rng, fresh=fresh, word_share=word_share))
    encoded = tokenizer([e.text for e in episodes], add_special_tokens=False)
    names = {name for e in episodes for name in e.names}
    token_of = {name: tokenizer(name, add_special_tokens=False).input_ids[0] for name in names}
    marked: list[tuple[list[int], list[_Label]]] = []
    for row, item in enumerate(episodes):
        # Rows other than letters have no names.
        tokens = [token_of[name] for name in item.names] or [0] * len(item.labels)
        labels = [
            _Label(encoded.char_to_token(row, start), weight or unseen_weight, token)
            for (start, weight), token in zip(item.labels, tokens, strict=True)
        ]
        marked.append((encoded.input_ids[row], labels))
    total = sum(sum(label.weight for label in labels) for _, labels in marked) or 1.0
    marked.sort(key=lambda row: len(row[0]))
    halves = (marked[: rows // 2], marked[rows // 2 :])
    return [_padded(half, total, watched, max_tokens) for half in halves]


class _Label(NamedTuple):
    """A label's place among the tokens of its row, its loss weight and the token of its name."""

    position: int
    weight: float
    name: int


def _padded(
    rows: Sequence[tuple[list[int], list[_Label]]], total: float, watched: int, max_tokens: int
) -> Batch:
    """Rows of (ids, labels) padded on the right with zeros and cut to ``max_tokens``."""
    ids = pad_sequence([torch.tensor(row[:max_tokens]) for row, _ in rows], batch_first=True)
    width = ids.shape[1]
    weights, names = torch.zeros(ids.shape), torch.zeros_like(ids)
    induction = torch.zeros(min(watched, len(rows)), width, width, dtype=torch.bool)
    for row, (_, labels) in enumerate(rows):
        inside = [label for label in labels if label.position < max_tokens]
        for number, (position, weight, name) in enumerate(inside):
            weights[row, position] = weight
            names[row, position] = name
            if row < watched:
                induction[row, position - 1, [label.position for label in inside[:number]]] = True
    return Batch(ids, weights / total, induction, names)
