"""Measuring what the differences between the paper's text, its code and this package change.

Every difference has a switch; these functions put both sides of one next to each other on a model.

Example
-------
>>> prompts = {"repetition": icl.build_prompts("repetition", shots=10, seed=42)[:100]}
>>> ask = functools.partial(answers, model, tokenizer)
>>> compare(prompts, {"no BOS": ask, "BOS": functools.partial(ask, bos=True)})
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.condition import FULL, Condition
from icl_helpers.errors import InputError
from icl_helpers.heads import Head, top_heads
from icl_helpers.interventions import intervene
from icl_helpers.patterns import induction_patterns
from icl_helpers.prefix_matching import prefix_matching_scores
from icl_helpers.prompts import Prompt

__all__ = ["Answers", "answers", "compare", "control_overlap", "in_words", "score_term"]


@dataclass(frozen=True, eq=False)
class Answers:
    """A model's answers to prompts: the label it prefers, whether that is right, by how much.

    ``margin`` is the log-probability of the right label minus that of the best wrong one, in nats.
    """

    chosen: Int[torch.Tensor, " prompts"]
    correct: Bool[torch.Tensor, " prompts"]
    margin: Float[torch.Tensor, " prompts"]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.correct.double().mean())


Asked = Callable[[Sequence[Prompt]], Answers]


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    condition: Condition = FULL,
    patterns: Sequence[Bool[torch.Tensor, "tokens tokens"]] | None = None,
    bos: bool = False,
    batch_size: int = 25,
) -> Answers:
    """Answers to prompts under one condition, by the first token of each label.

    Parameters
    ----------
    condition
        The full model, or heads removed or blocked.
    patterns
        What a knockout blocks, one [tokens, tokens] per prompt; None: the condition's categories.
    bos
        Put the model's beginning-of-sequence token in front, which the published runs did not.

    Raises
    ------
    InputError
        No prompts, labels that begin with the same token, or a model without such a token.
    """
    if not prompts:
        raise InputError("prompts must hold at least one prompt")
    first = _bos(model) if bos else []
    contexts = [prompt.context for prompt in prompts]
    ids = [first + found for found in tokenizer(contexts, add_special_tokens=False).input_ids]
    if condition.ablation == "knockout" and patterns is None:
        patterns = induction_patterns(contexts, tokenizer, categories=condition.categories)
    # Prompts of about the same length meet in a batch: less padding to compute.
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    scores: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        blocked = None if patterns is None else [patterns[index] for index in batch]
        last = _last_logits(model, [ids[index] for index in batch], condition, blocked, len(first))
        for index, logits in zip(batch, last, strict=True):
            labels = _label_tokens(tokenizer, prompts[index], len(ids[index]) - len(first))
            scores[index] = logits.log_softmax(-1)[labels]
    return _judge(prompts, [scores[index] for index in range(len(prompts))])


def _judge(prompts: Sequence[Prompt], scores: Sequence[torch.Tensor]) -> Answers:
    chosen = torch.stack([found.argmax() for found in scores])
    targets = torch.tensor([prompt.target for prompt in prompts])
    margins = []
    for found, target in zip(scores, targets.tolist(), strict=True):
        wrong = torch.cat([found[:target], found[target + 1 :]])
        margins.append(found[target] - wrong.max())
    return Answers(chosen, chosen == targets, torch.stack(margins))


def _bos(model: PreTrainedModel) -> list[int]:
    token = model.config.get_text_config().bos_token_id
    if token is None:
        raise InputError("bos=True needs a model whose configuration names a BOS token")
    return [token[0] if isinstance(token, (list, tuple)) else token]


def _label_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, n_context: int) -> list[int]:
    whole = tokenizer(
        [prompt.context + choice for choice in prompt.choices], add_special_tokens=False
    ).input_ids
    found = [ids[n_context] for ids in whole]
    if len(set(found)) < len(found):
        raise InputError(
            f"the labels {', '.join(prompt.choices)} begin with the same token in this tokenizer; "
            f"use evaluate(), which scores whole labels"
        )
    return found


def _last_logits(
    model: PreTrainedModel,
    ids: Sequence[list[int]],
    condition: Condition,
    patterns: Sequence[torch.Tensor] | None,
    shift: int,
) -> Float[torch.Tensor, "batch vocabulary"]:
    """Logits after the last token of each sequence; padding lies to the right, unseen."""
    width = max(map(len, ids))
    batch = torch.zeros(len(ids), width, dtype=torch.long)
    blocked = torch.zeros(len(ids), width, width, dtype=torch.bool)
    for row, found in enumerate(ids):
        batch[row, : len(found)] = torch.tensor(found)
        if patterns is not None:
            blocked[row, shift : len(found), shift : len(found)] = patterns[row]
    ends = [len(found) - 1 for found in ids]
    kept = sorted(set(ends))
    with ExitStack() as stack:
        chosen = condition.interventions(blocked.to(model.device))
        if chosen:
            stack.enter_context(intervene(model, *chosen))
        logits = model(
            input_ids=batch.to(model.device),
            use_cache=False,
            logits_to_keep=torch.tensor(kept, device=model.device),
        ).logits
    places = [kept.index(end) for end in ends]
    return logits[range(len(ids)), places].float().cpu()


def compare(
    prompts: Mapping[str, Sequence[Prompt]], sides: Mapping[str, Asked | Sequence[Asked]]
) -> pd.DataFrame:
    """Put two or more sides next to each other on the prompts of every task.

    Parameters
    ----------
    sides
        What asks the model under each side, for example ``functools.partial(answers, model,
        tokenizer, condition=...)``. Several of them, one per seed, are averaged.

    Returns
    -------
    DataFrame
        Columns task, side, accuracy (percent), changed (percent of the answers that are not those
        of the first side) and margin (mean absolute change of the margin against the first side, in
        nats). Against a side with another number of seeds every pair of seeds counts.
    """
    rows = []
    for task, asked in prompts.items():
        first: list[Answers] = []
        for side, functions in sides.items():
            several = functions if isinstance(functions, Sequence) else [functions]
            found = [function(asked) for function in several]
            first = first or found
            pairs = (
                list(zip(first, found, strict=True))
                if len(first) == len(found)
                else list(itertools.product(first, found))
            )
            changed = [float((a.chosen != b.chosen).double().mean()) for a, b in pairs]
            margin = [float((a.margin - b.margin).abs().mean()) for a, b in pairs]
            accuracy = [answer.accuracy for answer in found]
            rows.append((task, side, 100 * fmean(accuracy), 100 * fmean(changed), fmean(margin)))
    return pd.DataFrame(rows, columns=["task", "side", "accuracy", "changed", "margin"])


def in_words(frame: pd.DataFrame) -> str:
    """One line for what :func:`compare` found, averaged over tasks."""
    sides = frame.groupby("side", sort=False)[["accuracy", "changed"]].mean()
    accuracies = ", ".join(f"{row.accuracy:.1f} % {side}" for side, row in sides.iterrows())
    changed = " and ".join(f"{share:.1f} %" for share in sides["changed"].iloc[1:])
    return f"accuracy {accuracies}; {changed} of the answers changed"


def score_term(
    model: PreTrainedModel, sequences: Int[torch.Tensor, "n_sequences length"]
) -> pd.DataFrame:
    """Every head's prefix-matching score with and without the published code's extra term.

    Columns: layer, head, published, corrected, difference, rank and corrected_rank (1 is highest).
    """
    both = {
        name: prefix_matching_scores(model, sequences, published_formula=formula).mean(0)
        for name, formula in (("published", True), ("corrected", False))
    }
    n_layers, n_heads = both["published"].shape
    frame = pd.DataFrame(
        [(layer, head) for layer in range(n_layers) for head in range(n_heads)],
        columns=["layer", "head"],
    )
    for name, scores in both.items():
        frame[name] = scores.flatten().double().numpy()
    frame["difference"] = frame["published"] - frame["corrected"]
    for name, column in (("rank", "published"), ("corrected_rank", "corrected")):
        ranked = top_heads(both[column], 1.0)
        places = {head: place for place, head in enumerate(ranked, start=1)}
        frame[name] = [places[Head(layer, head)] for layer, head in _pairs(frame)]
    return frame.sort_values("rank", ignore_index=True)


def _pairs(frame: pd.DataFrame) -> list[tuple[int, int]]:
    return list(zip(frame["layer"].tolist(), frame["head"].tolist(), strict=True))


def control_overlap(
    induction: Sequence[Head], drawn: Sequence[Sequence[Head]], n_heads: int
) -> dict[str, Any]:
    """How many induction heads the published random control draws again.

    ``expected``: by calculation; in a layer of ``n_heads`` heads with k induction heads, k drawn at
    random hold k * k / n_heads of them. ``drawn``: in each control given. ``any``: share of
    controls with at least one.
    """
    per_layer = pd.Series([head.layer for head in induction]).value_counts()
    found = [len(set(control) & set(induction)) for control in drawn]
    return {
        "heads": len(induction),
        "expected": float((per_layer**2).sum() / n_heads),
        "drawn": found,
        "any": sum(count > 0 for count in found) / len(found),
    }
