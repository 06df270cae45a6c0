"""Measuring what the differences between the paper's text, its code and this package change.

Every difference has a switch; these functions put both sides of one next to each other on a model,
and count what the published data and the published search for words do to prompts. Letter files as
published are drawn here again by their rule, for counting without the files.

Example
-------
>>> prompts = {"repetition": icl.build_prompts("repetition", shots=10, seed=42)[:100]}
>>> ask = functools.partial(answers, model, tokenizer)
>>> compare(prompts, {"no BOS": ask, "BOS": functools.partial(ask, bos=1)})
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import random
import string
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from icl_helpers.attention.heads import Head, top_heads
from icl_helpers.attention.induction_pattern import (
    Element,
    elements_pattern,
    prompt_elements,
    word_categories,
)
from icl_helpers.attention.passes import measuring
from icl_helpers.attention.scores import prefix_matching_scores
from icl_helpers.errors import InputError
from icl_helpers.evaluation.conditions import FULL, Condition
from icl_helpers.evaluation.scorer import InterventionLM
from icl_helpers.results.comparison import read_published
from icl_helpers.results.outcomes import Span, range_in_words
from icl_helpers.tasks.data import load_rows, original_data_dir
from icl_helpers.tasks.prompts import Prompt, build_prompts
from icl_helpers.tasks.specs import pattern_spec

__all__ = [
    "Answers", "WordMatch", "answers", "blank_line_sentence", "compare", "control_overlap",
    "published_letters", "published_rule_rows", "resampled_accuracy", "row_audit", "score_term",
    "search_audit", "small_tokenizer", "string_matched_pattern", "string_matches",
    "summary_sentence", "task_audit",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Answers:
    """A model's answers to prompts: the label it prefers, whether that is right, by how much.

    ``log_probability`` is that of the right label, and ``margin`` how much it is above that of the
    best wrong one, in nats.
    """

    chosen: Int[torch.Tensor, " prompts"]
    correct: Bool[torch.Tensor, " prompts"]
    margin: Float[torch.Tensor, " prompts"]
    log_probability: Float[torch.Tensor, " prompts"]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.correct.double().mean())


Asked = Callable[[Sequence[Prompt]], Answers]


@measuring
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *,
    condition: Condition = FULL,
    patterns: Sequence[Bool[torch.Tensor, "tokens tokens"]] | None = None,
    bos: int = 0, batch_size: int = 25,
) -> Answers:  # fmt: skip
    """Ask for answers to prompts under one condition.

    Parameters
    ----------
    condition
        The full model, or heads removed or blocked.
    patterns
        What a knockout blocks, one [tokens, tokens] per prompt; None: the condition's categories.
    bos
        Put the model's beginning-of-sequence token in front so many times, which the published runs
        did not; ``patterns`` leave it out.

    Raises
    ------
    InputError
        No prompts, labels of the same tokens, or a model without such a token.
    """
    if not prompts:
        raise InputError("prompts must hold at least one prompt")
    lm = InterventionLM(model, tokenizer, batch_size=batch_size)
    lm.n_bos, first = int(bos), _bos(model) * bos if bos else []
    if patterns is not None:
        contexts = [prompt.context for prompt in prompts]
        lm.block(dict(zip(contexts, patterns, strict=True)), condition.categories)
    pairs = [(prompt.context, choice) for prompt in prompts for choice in prompt.choices]
    encoded = [(pair, first + ids, label) for pair, ids, label in lm.encode(pairs)]
    with lm.under(condition):
        scored = iter(lm._loglikelihood_tokens(encoded, disable_tqdm=True))
    scores = [torch.tensor([next(scored)[0] for _ in prompt.choices]) for prompt in prompts]
    targets = [prompt.target for prompt in prompts]
    chosen = torch.stack([values.argmax() for values in scores])
    judged = list(zip(scores, targets, strict=True))
    right = torch.stack([values[target] for values, target in judged])
    others = (torch.cat([values[:target], values[target + 1 :]]) for values, target in judged)
    wrong = torch.stack([values.max() for values in others])
    return Answers(chosen, chosen == torch.tensor(targets), right - wrong, right)


def _bos(model: PreTrainedModel) -> list[int]:
    token = model.config.get_text_config().bos_token_id
    if token is None:
        raise InputError("bos needs a model whose configuration names a BOS token")
    return [token[0] if isinstance(token, (list, tuple)) else token]


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
            seeds = [function(asked) for function in several]
            first = first or seeds
            equal = len(first) == len(seeds)
            pairs = list(
                zip(first, seeds, strict=True) if equal else itertools.product(first, seeds)
            )
            changed = fmean(float((a.chosen != b.chosen).double().mean()) for a, b in pairs)
            margin = fmean(float((a.margin - b.margin).abs().mean()) for a, b in pairs)
            accuracy = fmean(seed.accuracy for seed in seeds)
            rows.append((task, side, 100 * accuracy, 100 * changed, margin))
    return pd.DataFrame(rows, columns=["task", "side", "accuracy", "changed", "margin"])


def summary_sentence(frame: pd.DataFrame) -> str:
    """Say in a line what :func:`compare` found: ranges over tasks, which may differ."""
    sides = frame.groupby("side", sort=False)
    accuracy, changed = (
        {str(side): range_in_words(Span.of(list(values)), 1) for side, values in sides[column]}
        for column in ("accuracy", "changed")
    )
    accuracies = ", ".join(f"{percent} % {side}" for side, percent in accuracy.items())
    others = " and ".join(f"{percent} %" for percent in list(changed.values())[1:])
    tasks = frame["task"].nunique()
    over = f" over {tasks} tasks" if tasks > 1 else ""
    return f"accuracy {accuracies}{over}; {others} of a task's answers changed"


def blank_line_sentence() -> str:
    """Say what blocking the second token of a blank line changes, where the tokenizer has two.

    By what the published code gives on a model whose tokenizer does; see ``published/README.md``.
    """
    rows = read_published("knockout_readings.csv").set_index(["blocked", "fraction", "doc_id"])
    first, both = rows.loc["first token"], rows.loc["whole blank line"]
    difference = (both - first).abs().to_numpy()
    changed = int((both.idxmax(axis=1) != first.idxmax(axis=1)).sum())
    return (
        f"on SmolLM2-135M (instruct, 4-bit weights) log-probabilities differ by up to "
        f"{difference.max():.2f} nats, {difference.mean():.3f} on average, and {changed} of "
        f"{len(first)} answers change"
    )


def score_term(
    model: PreTrainedModel, sequences: Int[torch.Tensor, "n_sequences length"]
) -> pd.DataFrame:
    """Compute every head's prefix-matching score with and without the published extra term.

    Columns: layer, head, published, corrected, difference, rank and corrected_rank (1 is highest).
    """
    both = {
        name: prefix_matching_scores(model, sequences, published_formula=formula).mean(0)
        for name, formula in (("published", True), ("corrected", False))
    }
    heads = [Head(*head) for head in np.ndindex(*both["published"].shape)]
    frame = pd.DataFrame(heads)
    for name, scores in both.items():
        frame[name] = scores.flatten().double().numpy()
    frame["difference"] = frame["published"] - frame["corrected"]
    for name, column in (("rank", "published"), ("corrected_rank", "corrected")):
        ranks = dict(zip(top_heads(both[column], 1.0), itertools.count(1), strict=False))
        frame[name] = [ranks[head] for head in heads]
    return frame.sort_values("rank", ignore_index=True)


def control_overlap(
    induction: Sequence[Head], drawn: Sequence[Sequence[Head]], n_heads: int
) -> dict[str, Any]:
    """Count how many induction heads the published random control draws again.

    ``expected``: by calculation; in a layer of ``n_heads`` heads with k induction heads, k drawn at
    random hold k * k / n_heads of them. ``drawn``: in each control given. ``any``: share of
    controls with at least one.
    """
    per_layer = pd.Series([head.layer for head in induction]).value_counts()
    again = [len(set(control) & set(induction)) for control in drawn]
    return {
        "heads": len(induction),
        "expected": float((per_layer**2).sum() / n_heads),
        "drawn": again,
        "any": sum(count > 0 for count in again) / len(again),
    }


_PATTERNS = {"repetition": "0101", "recursion": "0111", "centre_embedding": "01210"}
_FIRST_WORDS = ("fruits", "furniture", "vegetables", "body_parts")


def published_rule_rows(task: str, *, seed: int = 0) -> list[tuple[str, str]]:
    """Draw rows of (text, label) by the rule behind the published files (paper, section 6).

    Letter tasks: 250 patterned rows whose letters are independent, so that some are equal, and 250
    of distinct letters. Four-way tasks: 250 rows of each label, drawn with repetition.
    """
    rng = random.Random(f"{task}-{seed}")
    if task in _PATTERNS:
        shape = _PATTERNS[task]
        rows = []
        for _ in range(250):
            letters = rng.choices(string.ascii_uppercase, k=len(set(shape)))
            rows.append((" ".join(letters[int(digit)] for digit in shape), "Foo"))
            rows.append((" ".join(rng.sample(string.ascii_uppercase, len(shape))), "Bar"))
    elif task.endswith("_4way"):
        by_label: dict[str, list[tuple[str, str]]] = {}
        for row in load_rows(task):
            by_label.setdefault(row[1], []).append(row)
        rows = [row for same in by_label.values() for row in rng.choices(same, k=250)]
    else:
        raise InputError(
            f"the published file of {task} holds every pair once; tasks drawn at random: "
            f"{', '.join(_PATTERNS)}, wordseq1_4way, wordseq2_4way"
        )
    rng.shuffle(rows)
    return rows


def row_audit(rows: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Count rows (``documents``), duplicates, and degenerate rows.

    A patterned letter row is degenerate when letters that its pattern keeps apart are equal.
    """
    patterned = [text.split() for text, label in rows if label == "Foo"]
    sizes = [len(set(parts)) for parts in patterned if all(len(part) == 1 for part in parts)]
    return {
        "documents": len(rows),
        "duplicates": len(rows) - len(set(rows)),
        "degenerate": sum(size < max(sizes) for size in sizes),
    }


def task_audit(task: str, *, data: str, seeds: Sequence[int]) -> dict[str, int]:
    """Count as :func:`row_audit`, and prompts with fewer demonstrations than 5 or 10 as asked.

    Copies of the query are dropped after the draw, so that a repeated row may cost one.
    """
    short = [
        prompt.context.count("\n\n") - 1 < number
        for number in (5, 10)
        for seed in seeds
        for prompt in build_prompts(task, shots=number, seed=seed, data=data)
    ]
    audit = row_audit(load_rows(task, data=data))
    return {**audit, "prompts": len(short), "prompts short of a demonstration": sum(short)}


class WordMatch(NamedTuple):
    """A word found by comparing token strings: its category, characters, and whether it is one."""

    word: str
    category: str
    start: int
    end: int
    right: bool


def string_matches(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[WordMatch]:
    """Find words of the categories by a comparison of token strings, in order of the text.

    A word is found wherever its tokens stand in a row, written with or without a space before it,
    also inside a longer word: the published code's search (paper, section 5).
    """
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = encoded.tokens(), encoded["offset_mapping"]
    right = {
        (prompt[e.start : e.end].strip(), e.end) for e in prompt_elements(prompt) if _is_word(e)
    }
    body = prompt.index("\n\n")
    matches: dict[tuple[str, int], WordMatch] = {}
    for word, category in word_categories().items():
        for text in (word, f" {word}"):
            wanted = tokenizer(text, add_special_tokens=False).tokens()
            for first in range(len(tokens) - len(wanted) + 1):
                if tokens[first : first + len(wanted)] == wanted and offsets[first][0] > body:
                    start, end = offsets[first][0], offsets[first + len(wanted) - 1][1]
                    # With the space before it and without, it is the same word.
                    is_word = (word, end) in right
                    matches[word, end] = WordMatch(word, category, start, end, is_word)
    return sorted(matches.values(), key=lambda match: (match.start, match.end))


def _is_word(element: Element) -> bool:
    return element.kind not in ("labels", "colons", "blank_lines")


def string_matched_pattern(
    prompt: str, tokenizer: PreTrainedTokenizerBase, *,
    search: PreTrainedTokenizerBase | None = None,
) -> Bool[torch.Tensor, "tokens tokens"]:  # fmt: skip
    """Return the pairs a knockout blocks when words are found by :func:`string_matches`.

    Give it to :class:`icl_helpers.AttentionKnockout` to have the published search. ``search`` finds
    the words with another tokenizer than the model's, whose tokens are then blocked.
    """
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    elements = [element for element in prompt_elements(prompt) if not _is_word(element)]
    for match in string_matches(prompt, search or tokenizer):
        colon = prompt.index(":", match.end - 1)
        first = match.category in _FIRST_WORDS
        follower = (match.end, colon) if first else (colon, colon + 1)
        elements.append(Element(match.category, match.start, match.end, follower))
    elements.sort(key=lambda element: element.start)
    return elements_pattern(elements, encoded["offset_mapping"])


def small_tokenizer(
    texts: Iterable[str], *, vocab_size: int, split_words: bool = True
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of few tokens on texts: it splits words into pieces.

    ``split_words`` keeps words, spaces and punctuation apart before merging; without it a token may
    reach across them, such as ``:Foo``.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=split_words
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def search_audit(
    contexts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, int | float]:
    """Count what the published search finds in prompts against the words that are there.

    Also the share of labels that share a token with their colon, which that search misses, and
    the tokens of a blank line, of which it expects one.
    """
    words, right, joined = 0, [], []
    for context in contexts:
        elements = prompt_elements(context)
        words += sum(_is_word(element) for element in elements)
        right += [match.right for match in string_matches(context, tokenizer)]
        offsets = tokenizer(context, return_offsets_mapping=True, add_special_tokens=False)
        starts = {start for start, _ in offsets["offset_mapping"]}
        joined += [element.start not in starts for element in elements if element.kind == "labels"]
    return {
        "tokens": len(tokenizer),
        "words": words,
        "found": sum(right),
        "found wrongly": len(right) - sum(right),
        "labels joined to their colon": fmean(joined),
        "tokens of a blank line": len(tokenizer("A\n\nA", add_special_tokens=False).input_ids) - 2,
    }


def published_letters(data: str = "synthetic") -> tuple[dict[str, str], str]:
    """Say where each letter task's published rows lie, and what they are.

    A folder given as ``data``; or the published files where ``icl data original`` has put them;
    else rows drawn by their rule, in a temporary folder that lasts as long as the process.
    """
    original = [original_data_dir() / pattern_spec(task).original_file for task in _PATTERNS]
    if data not in ("synthetic", "original"):
        return dict.fromkeys(_PATTERNS, data), "the files given"
    if data == "original" or all(path.is_file() for path in original):
        return dict.fromkeys(_PATTERNS, "original"), "the published files"
    for task in _PATTERNS:
        spec = pattern_spec(task)
        rows = [{spec.field: text, "label": label} for text, label in published_rule_rows(task)]
        (_scratch() / spec.original_file).write_text(json.dumps(rows))
    return dict.fromkeys(_PATTERNS, str(_scratch())), "rows drawn by the published rule"


@functools.cache
def _scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="icl-letters-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def resampled_accuracy(
    correct: Float[torch.Tensor, " rows"], size: int, *, draws: int = 1000, seed: int = 0
) -> np.ndarray:
    """Compute accuracies over ``size`` rows drawn with repetition, ``draws`` times."""
    rng = np.random.default_rng(seed)
    return rng.choice(correct.numpy(), size=(draws, size)).mean(axis=1)
