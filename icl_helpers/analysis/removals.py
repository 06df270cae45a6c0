"""Kinds of removal on the same prompts, their controls, and what else a removal breaks.

A head is silenced by zero, by one of two means, or by what it gives on another prompt of the task;
or it stays, and only its induction pattern is blocked. What each kind costs is held against the
same kind done to random heads, and the pattern also against as many random earlier positions.

Example
-------
>>> prompts = icl.build_prompts("repetition", shots=5, seed=42)[:8]
>>> found = score_prompts(model, tokenizer, prompts, lambda n: [icl.ZeroAblation(heads)])
>>> found[0]  # log-probability of each label of the first prompt, in nats
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.heads import Head
from icl_helpers.attention.induction_pattern import control_pattern, induction_patterns
from icl_helpers.attention.interventions import (
    AttentionKnockout,
    Intervention,
    MeanAblation,
    ResampleAblation,
    ZeroAblation,
    intervene,
)
from icl_helpers.attention.means import prompt_head_outputs
from icl_helpers.attention.passes import measuring
from icl_helpers.attention.scores import attention_patterns
from icl_helpers.errors import InputError
from icl_helpers.tasks.prompts import Prompt

__all__ = [
    "KINDS", "Removals", "aligned_outputs", "blocked_attention", "score_prompts", "sequence_losses",
]  # fmt: skip

# Kinds of removal, by name; those with "random" are controls and depend on a draw.
KINDS = (
    "zero", "mean of inputs", "mean of outputs", "resample", "knockout",
    "zero, random heads", "mean of inputs, random heads", "knockout, random positions",
    "knockout, random heads",
)  # fmt: skip


@measuring
def score_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    interventions: Callable[[int], Sequence[Intervention]] = lambda number: (),
) -> list[list[float]]:
    """Log-probability of each choice of each prompt, in nats, under interventions of its own.

    ``interventions`` gives those of the prompt of that number, which have to fit a batch of any
    size: the prompt with each choice, all but the last token, and once only where that is the same.
    Nothing is added before a prompt.
    """
    of_prompts = []
    for number, prompt in enumerate(prompts):
        wholes = [_ids(tokenizer, prompt.context + choice) for choice in prompt.choices]
        start = len(_ids(tokenizer, prompt.context))
        rows = list(dict.fromkeys(tuple(ids[:-1]) for ids in wholes))
        batch = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True)
        with intervene(model, *interventions(number)):
            logits = model(input_ids=batch.to(model.device), use_cache=False).logits
        scores = logits[:, start - 1 :].float().log_softmax(-1).cpu()
        of_choices = []
        for ids in wholes:
            row, label = rows.index(tuple(ids[:-1])), ids[start:]
            of_choices.append(float(scores[row, range(len(label)), label].sum()))
        of_prompts.append(of_choices)
    return of_prompts


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def aligned_outputs(
    outputs: Float[torch.Tensor, "layers tokens heads d_head"], length: int, *, more: int = 0
) -> Float[torch.Tensor, "layers positions heads d_head"]:
    """Another prompt's head outputs, laid out for a prompt of ``length`` tokens and ``more``.

    The ends are aligned, where the question stands: position ``length - 1`` gets the other prompt's
    last. A position before its first token gets the first's output, one after the last the last's.
    """
    n_tokens = outputs.shape[1]
    positions = torch.arange(length + more) + n_tokens - length
    return outputs[:, positions.clamp(0, n_tokens - 1)]


@dataclass(frozen=True)
class Removals:
    """Interventions of every kind in :data:`KINDS` on a set of prompts.

    ``heads`` are silenced or blocked, ``random`` are sets of as many others, one a draw; both means
    are [layers, positions, heads, d_head]; a knockout blocks elements of these ``categories``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    heads: Sequence[Head]
    random: Sequence[Sequence[Head]]
    means_of_inputs: torch.Tensor
    means_of_outputs: torch.Tensor
    categories: Sequence[str]

    @functools.cached_property
    def patterns(self) -> list[Bool[torch.Tensor, "tokens tokens"]]:
        """The prompts' induction patterns; raises as :func:`icl_helpers.induction_pattern` does."""
        contexts = [prompt.context for prompt in self.prompts]
        return induction_patterns(contexts, self.tokenizer, categories=self.categories)

    @functools.cached_property
    def outputs(self) -> list[Float[torch.Tensor, "layers tokens heads d_head"]]:
        """Head outputs on each prompt."""
        ids = [torch.tensor([_ids(self.tokenizer, prompt.context)]) for prompt in self.prompts]
        return [prompt_head_outputs(self.model, of_prompt)[0] for of_prompt in ids]

    def scores(self, kind: str, draw: int = 0) -> list[list[float]]:
        """:func:`score_prompts` under a kind of removal, at one draw of what it draws."""
        if kind not in KINDS:
            raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        what, _, control = kind.partition(", ")
        heads = self.random[draw % len(self.random)] if control == "random heads" else self.heads

        def interventions(number: int) -> list[Intervention]:
            if what == "zero":
                return [ZeroAblation(heads)]
            if what == "mean of inputs":
                return [MeanAblation(heads, self.means_of_inputs)]
            if what == "mean of outputs":
                return [MeanAblation(heads, self.means_of_outputs)]
            if what == "resample":
                # Of another of the prompts: the one ``draw + 1`` places further on.
                other = (number + 1 + draw % (len(self.prompts) - 1)) % len(self.prompts)
                prompt = self.prompts[number]
                length = len(_ids(self.tokenizer, prompt.context))
                wholes = [_ids(self.tokenizer, prompt.context + c) for c in prompt.choices]
                more = max(map(len, wholes)) - length
                return [
                    ResampleAblation(heads, aligned_outputs(self.outputs[other], length, more=more))
                ]
            blocked = self.patterns[number]
            if control == "random positions":
                blocked = control_pattern(blocked, seed=draw)
            return [AttentionKnockout(heads, blocked)]

        return score_prompts(self.model, self.tokenizer, self.prompts, interventions)


def blocked_attention(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    heads: Sequence[Head],
    patterns: Sequence[Bool[torch.Tensor, "tokens tokens"]],
) -> dict[str, float]:
    """Where the attention goes that a knockout takes from the blocked pairs.

    Means over the heads and all tokens from which something is blocked, on the full model's other
    layers: ``blocked`` is the attention that lay on the blocked pairs; ``first token``, ``itself``
    and ``rest`` are how much more lies there once they are blocked, which adds up to it.
    """
    totals = {"blocked": 0.0, "first token": 0.0, "itself": 0.0, "rest": 0.0}
    count = 0
    for prompt, blocked in zip(prompts, patterns, strict=True):
        rows = blocked.any(-1).nonzero()[:, 0]
        ids = torch.tensor([_ids(tokenizer, prompt.context)])
        before = attention_patterns(model, ids, heads)
        after = attention_patterns(model, ids, heads, blocked=blocked)
        for head in before:
            old, new = (pattern[head][0].float() for pattern in (before, after))
            gained = (new - old).masked_fill(blocked, 0.0)[rows]
            first, itself = gained[:, 0], gained[torch.arange(len(rows)), rows]
            itself = itself.masked_fill(rows == 0, 0.0)
            sums = {
                "blocked": (old * blocked)[rows].sum(), "first token": first.sum(),
                "itself": itself.sum(), "rest": gained.sum() - first.sum() - itself.sum(),
            }  # fmt: skip
            for name, value in sums.items():
                totals[name] += float(value)
            count += len(rows)
    return {name: value / max(count, 1) for name, value in totals.items()}


@measuring
def sequence_losses(
    model: PreTrainedModel,
    input_ids: Int[torch.Tensor, "sequences tokens"],
    interventions: Sequence[Intervention] = (),
) -> Float[torch.Tensor, "sequences predicted"]:
    """Loss of every token but the first, in nats; perplexity is the exponential of a mean of it."""
    with intervene(model, *interventions):
        logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits
    scores = logits[:, :-1].float().log_softmax(-1).cpu()
    return -scores.gather(-1, input_ids[:, 1:, None])[..., 0]
