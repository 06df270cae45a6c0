"""What the published data and the published search for words do to prompts, counted.

Letter files as published are drawn here again by their rule, for counting without the files.

Example
-------
>>> rows = published_rule_rows("repetition")
>>> row_audit(rows)
"""

from __future__ import annotations

import atexit
import functools
import json
import random
import string
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from icl_helpers.errors import InputError
from icl_helpers.original_data import original_data_dir
from icl_helpers.patterns import Element, elements_pattern, prompt_elements, word_categories
from icl_helpers.prompts import Prompt, build_prompts, load_rows
from icl_helpers.task_registry import pattern_spec

__all__ = [
    "WordMatch",
    "lost_demonstrations",
    "published_letters",
    "published_rule_rows",
    "resampled_accuracy",
    "row_audit",
    "search_audit",
    "small_tokenizer",
    "string_matched_pattern",
    "string_matches",
    "task_audit",
]

_PATTERNS = {"repetition": "0101", "recursion": "0111", "centre_embedding": "01210"}
_FIRST_WORDS = ("fruits", "furniture", "vegetables", "body_parts")


def published_rule_rows(task: str, *, seed: int = 0) -> list[tuple[str, str]]:
    """Rows of (text, label) drawn by the rule behind the published files (paper, section 6).

    Letter tasks: 250 patterned rows whose letters are independent, so that some are equal, and 250
    of distinct letters. Four-way tasks: 250 rows of each label, drawn with repetition.
    """
    rng = random.Random(f"{task}-{seed}")
    if task in _PATTERNS:
        shape = _PATTERNS[task]
        rows = []
        for _ in range(250):
            letters = rng.choices(string.ascii_uppercase, k=len(set(shape)))
            rows.append((" ".join(letters[int(place)] for place in shape), "Foo"))
            rows.append((" ".join(rng.sample(string.ascii_uppercase, len(shape))), "Bar"))
    elif task.endswith("_4way"):
        every = load_rows(task)
        labels = dict.fromkeys(label for _, label in every)
        rows = [
            row
            for label in labels
            for row in rng.choices([row for row in every if row[1] == label], k=250)
        ]
    else:
        raise InputError(
            f"the published file of {task} holds every pair once; tasks drawn at random: "
            f"{', '.join(_PATTERNS)}, wordseq1_4way, wordseq2_4way"
        )
    rng.shuffle(rows)
    return rows


def row_audit(rows: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Number of rows (``documents``), of duplicates, and of degenerate rows.

    A patterned letter row is degenerate when letters that its pattern keeps apart are equal.
    """
    patterned = [text.split() for text, label in rows if label == "Foo"]
    sizes = [len(set(parts)) for parts in patterned if all(len(part) == 1 for part in parts)]
    return {
        "documents": len(rows),
        "duplicates": len(rows) - len(set(rows)),
        "degenerate": sum(size < max(sizes) for size in sizes),
    }


def lost_demonstrations(prompts: Iterable[Prompt], shots: int) -> int:
    """Number of prompts with fewer demonstrations than asked for.

    Copies of the query are dropped after the draw, so that a repeated row may cost one.
    """
    return sum(prompt.context.count("\n\n") - 1 < shots for prompt in prompts)


def task_audit(
    task: str, *, data: str, seeds: Sequence[int], shots: Sequence[int] = (5, 10)
) -> dict[str, int]:
    """:func:`row_audit` of a task's rows and :func:`lost_demonstrations` of its prompts."""
    audit = {**row_audit(load_rows(task, data=data)), "prompts": 0}
    short = 0
    for number in shots:
        for seed in seeds:
            prompts = build_prompts(task, shots=number, seed=seed, data=data)
            audit["prompts"] += len(prompts)
            short += lost_demonstrations(prompts, number)
    return {**audit, "prompts short of a demonstration": short}


class WordMatch(NamedTuple):
    """A word found by comparing token strings: its category, characters, and whether it is one."""

    word: str
    category: str
    start: int
    end: int
    right: bool


def string_matches(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[WordMatch]:
    """Words of the categories as a comparison of token strings finds them, in order of the text.

    A word is found wherever its tokens stand in a row, written with or without a space before it,
    also inside a longer word: the published code's search (paper, section 5).
    """
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = encoded.tokens(), encoded["offset_mapping"]
    right = {
        (prompt[e.start : e.end].strip(), e.end) for e in prompt_elements(prompt) if _is_word(e)
    }
    body = prompt.index("\n\n")
    found: dict[tuple[str, int], WordMatch] = {}
    for word, category in word_categories().items():
        for text in (word, f" {word}"):
            wanted = tokenizer(text, add_special_tokens=False).tokens()
            for first in range(len(tokens) - len(wanted) + 1):
                if tokens[first : first + len(wanted)] == wanted and offsets[first][0] > body:
                    start, end = offsets[first][0], offsets[first + len(wanted) - 1][1]
                    match = WordMatch(word, category, start, end, (word, end) in right)
                    # With the space before it and without, it is the same word.
                    found[word, end] = match
    return sorted(found.values(), key=lambda match: (match.start, match.end))


def _is_word(element: Element) -> bool:
    return element.kind not in ("labels", "colons", "blank_lines")


def string_matched_pattern(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    search: PreTrainedTokenizerBase | None = None,
) -> Bool[torch.Tensor, "tokens tokens"]:
    """The pairs a knockout blocks when words are found by :func:`string_matches`.

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
    """A byte-level BPE of few tokens, trained on texts: it splits words into pieces.

    ``split_words`` keeps words, spaces and punctuation apart before merging; without it a token may
    reach across them, such as ``:Foo``.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=split_words
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def search_audit(
    contexts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, int | float]:
    """What the published search finds in prompts, counted against the words that are there.

    Also the share of labels that share a token with their colon, which that search misses, and
    the tokens of a blank line, of which it expects one.
    """
    words = wrong = found = labels = joined = 0
    for context in contexts:
        matches = string_matches(context, tokenizer)
        elements = prompt_elements(context)
        words += sum(_is_word(element) for element in elements)
        found += sum(match.right for match in matches)
        wrong += sum(not match.right for match in matches)
        offsets = tokenizer(context, return_offsets_mapping=True, add_special_tokens=False)
        starts = {start for start, _ in offsets["offset_mapping"]}
        for element in elements:
            if element.kind == "labels":
                labels += 1
                joined += element.start not in starts
    blank = len(tokenizer("A\n\nA", add_special_tokens=False).input_ids) - 2
    return {
        "tokens": len(tokenizer),
        "words": words,
        "found": found,
        "found wrongly": wrong,
        "labels joined to their colon": joined / labels,
        "tokens of a blank line": blank,
    }


def published_letters(data: str = "synthetic") -> tuple[dict[str, str], str]:
    """Where each letter task's published rows lie, and what they are.

    A folder given as ``data``; or the published files where ``icl data original`` has put them;
    else rows drawn by their rule, in a temporary folder that lasts as long as the process.
    """
    cached = [original_data_dir() / pattern_spec(task).original_file for task in _PATTERNS]
    if data not in ("synthetic", "original"):
        return dict.fromkeys(_PATTERNS, data), "the files given"
    if data == "original" or all(path.is_file() for path in cached):
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
    """Accuracies over ``size`` rows drawn with repetition, ``draws`` times."""
    rng = np.random.default_rng(seed)
    return rng.choice(correct.numpy(), size=(draws, size)).mean(axis=1)
