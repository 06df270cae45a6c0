"""The induction pattern of a prompt: which attention a knockout forbids (paper, section 5).

An element of a prompt (a word of a category, a label, a colon, a blank line) may not attend to what
directly followed an earlier element of its kind. Elements are found by character offsets in the
text, so any fast tokenizer works: a token belongs to every element whose characters it overlaps.
For any other text the elements are its tokens (:func:`repeated_token_pattern`) or its words
(:func:`repeated_word_pattern`); :func:`control_pattern` blocks as many pairs elsewhere.

Example
-------
>>> blocked = icl.induction_pattern(prompt.context, tokenizer)
>>> with icl.intervene(model, icl.AttentionKnockout(heads, blocked)):
...     model(**tokenizer(prompt.context, add_special_tokens=False, return_tensors="pt"))
"""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from icl_helpers.errors import InputError
from icl_helpers.files import synthetic_dir

__all__ = [
    "CATEGORIES", "CATEGORY_NAMES", "Element", "check_categories", "control_pattern",
    "elements_pattern", "induction_pattern", "induction_patterns", "prompt_elements",
    "repeated_token_pattern", "repeated_word_pattern", "token_segments", "word_categories",
]  # fmt: skip

CATEGORIES = ("words", "labels", "colons", "blank_lines")
# The blank line that ends the description is no element of the list unless it is asked for.
CATEGORY_NAMES = (*CATEGORIES, "opening_blank_line")
_BLANK_LINE = "\n\n"


class Element(NamedTuple):
    """One element of a prompt, in characters.

    ``kind`` is labels, colons, blank_lines, or a word category; ``follower`` is the span of what
    directly follows it, None for the prompt's last colon. A blank line is followed by the first
    token of the next sequence, so its follower is that sequence's first character.
    """

    kind: str
    start: int
    end: int
    follower: tuple[int, int] | None


@functools.cache
def word_categories() -> dict[str, str]:
    """The category of every word of the word sequences."""
    words = json.loads((synthetic_dir() / "words.json").read_text())
    return {word: category for category, members in words.items() for word in members}


def prompt_elements(prompt: str, *, opening: bool = False) -> list[Element]:
    """Elements of a prompt after its description, in the order of the text.

    The description ends with the first blank line, itself an element with ``opening``. Every block
    after it is ``sequence:label``, the last one ``sequence:``; raises :class:`InputError` for any
    other prompt, for which the paper defines no induction pattern: without a blank line, with a
    block that holds no colon or several, or a label that does not directly follow its colon.
    """
    description, separator, body = prompt.partition(_BLANK_LINE)
    if not separator:
        raise _no_pattern(f"the prompt {prompt[:60]!r} holds no blank line")
    start = len(description) + len(separator)
    first = Element("blank_lines", len(description), start, (start, start + 1))
    elements: list[Element] = [first] if opening else []
    blocks = body.split(_BLANK_LINE)
    for number, block in enumerate(blocks):
        sequence, separator, label = block.rpartition(":")
        last = number == len(blocks) - 1
        if not separator:
            raise _no_pattern(f"the prompt's block {block[:60]!r} holds no colon")
        misplaced = bool(label) == last or label[:1] == " "
        if not sequence or ":" in sequence or "\n" in block or misplaced:
            raise _no_pattern(f"the prompt's block {block[:60]!r} is no labelled sequence")
        colon, end = start + len(sequence), start + len(block)
        words = sequence.split(" ")
        # A letter sequence has no words; the space between two belongs to the second one.
        if len(words) == 2 and all(word in word_categories() for word in words):
            middle = start + len(words[0])
            kinds = [word_categories()[word] for word in words]
            elements.append(Element(kinds[0], start, middle, (middle, colon)))
            elements.append(Element(kinds[1], middle, colon, (colon, colon + 1)))
        elements.append(Element("colons", colon, colon + 1, None if last else (colon + 1, end)))
        if not last:
            following = end + len(_BLANK_LINE)
            elements.append(Element("labels", colon + 1, end, (end, following)))
            elements.append(Element("blank_lines", end, following, (following, following + 1)))
            start = following
    return elements


def _no_pattern(why: str) -> InputError:
    return InputError(
        f"{why}, so no induction pattern is defined for it; a knockout needs 'sequence:label' "
        f"blocks behind a description, separated by blank lines, and 'sequence:' at the end"
    )


def check_categories(categories: Sequence[str]) -> None:
    """Raise :class:`InputError` for a category that a knockout does not know."""
    for category in categories:
        if category not in CATEGORY_NAMES:
            raise InputError(
                f"categories must be among {', '.join(CATEGORY_NAMES)}, got {category!r}"
            )
    if "opening_blank_line" in categories and "blank_lines" not in categories:
        raise InputError(
            f"categories names opening_blank_line without blank_lines, got {list(categories)}; "
            f"add blank_lines"
        )


def induction_pattern(
    prompt: str, tokenizer: PreTrainedTokenizerBase, *, categories: Sequence[str] = CATEGORIES
) -> Bool[torch.Tensor, "tokens tokens"]:
    """True where a knockout forbids a query (row) to attend to a key (column).

    An element's tokens are kept from the tokens that follow an earlier element of its kind when the
    first of those lies before the element's first token.

    Parameters
    ----------
    prompt
        Description, labelled sequences and a query ending in a colon, as
        :func:`icl_helpers.build_prompts` makes them. Tokens are those of
        ``tokenizer(prompt, add_special_tokens=False)``.
    categories
        Which elements are blocked: any of words, labels, colons, blank_lines. The paper's text
        blocks all; the published runs on Llama 3 left out the blank lines. With
        ``opening_blank_line`` the blank line that ends the description is one of the blank lines.
    """
    return induction_patterns([prompt], tokenizer, categories=categories)[0]


def induction_patterns(
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    categories: Sequence[str] = CATEGORIES,
) -> list[Bool[torch.Tensor, "tokens tokens"]]:
    """:func:`induction_pattern` for many prompts, tokenised in one call."""
    check_categories(categories)
    opening = "opening_blank_line" in categories
    offsets = _offsets(prompts, tokenizer)
    return [
        elements_pattern(prompt_elements(prompt, opening=opening), spans, categories=categories)
        for prompt, spans in zip(prompts, offsets, strict=True)
    ]


def _offsets(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Sequence[tuple[int, int]]]:
    """The characters [start, end) of every token of each prompt."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets; load the fast version of the "
            f"tokenizer"
        )
    if not prompts:
        return []
    encoded = tokenizer(
        list(prompts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return encoded["offset_mapping"]


def elements_pattern(
    elements: Iterable[Element],
    offsets: Sequence[tuple[int, int]],
    *,
    categories: Collection[str] = CATEGORIES,
) -> Bool[torch.Tensor, "tokens tokens"]:
    """The pairs that :func:`induction_pattern` blocks, for these elements.

    ``offsets`` are the characters [start, end) of every token.
    """
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = np.ascontiguousarray(spans[:, 0]), np.ascontiguousarray(spans[:, 1])
    blocked = np.zeros((len(spans), len(spans)), dtype=bool)
    by_kind: defaultdict[str, list[Element]] = defaultdict(list)
    for element in elements:
        if (element.kind if element.kind in CATEGORIES else "words") in categories:
            by_kind[element.kind].append(element)
    for kind, alike in by_kind.items():
        # Of every token: where the last element begins that it is part of, or -1; and where the
        # first follower begins that it is part of, or beyond the last token.
        element_at, follower_at = np.full(len(spans), -1), np.full(len(spans), len(spans))
        first, last = _tokens(starts, ends, [(e.start, e.end) for e in alike])
        for begin, end in zip(first, last, strict=True):
            element_at[begin:end] = np.maximum(element_at[begin:end], begin)
        first, last = _tokens(starts, ends, [e.follower for e in alike if e.follower is not None])
        last = np.minimum(first + 1, last) if kind == "blank_lines" else last
        for begin, end in zip(first, last, strict=True):
            follower_at[begin:end] = np.minimum(follower_at[begin:end], begin)
        rows = element_at >= 0
        blocked[rows] |= follower_at < element_at[rows, None]
    # A token that is part of an element and of what follows an earlier one still sees itself.
    return torch.from_numpy(np.tril(blocked, k=-1))


def repeated_token_pattern(
    input_ids: Int[torch.Tensor, "*batch tokens"],
    *,
    segments: Int[torch.Tensor, "*batch tokens"] | None = None,
) -> Bool[torch.Tensor, "*batch tokens tokens"]:
    """The induction pattern of any text: True where row i may not attend to column j.

    Column j directly follows an earlier occurrence of row i's token: ``input_ids[j - 1] ==
    input_ids[i]`` and j <= i. A token that follows its like is thus kept from itself too; column 0
    follows nothing, so that something is left to attend to.

    Parameters
    ----------
    input_ids
        One prompt, or a batch of them.
    segments
        Number of the segment that each token is part of, -1 for none
        (:func:`token_segments`): only pairs whose occurrences lie in two different segments are
        blocked, for instance in two demonstrations. Default: the whole prompt.

    Raises
    ------
    InputError
        Ids that are no whole numbers of shape [tokens] or [batch, tokens].
    """
    ids = torch.as_tensor(input_ids)
    if ids.ndim not in (1, 2) or ids.is_floating_point():
        raise InputError(
            f"input_ids must be whole numbers of shape [tokens] or [batch, tokens], got "
            f"{ids.dtype} of shape {list(ids.shape)}"
        )
    blocked = torch.zeros(*ids.shape, ids.shape[-1], dtype=torch.bool, device=ids.device)
    blocked[..., 1:] = ids[..., :, None] == ids[..., None, :-1]
    return _between(blocked.tril(), segments)


def repeated_word_pattern(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    segments: Int[torch.Tensor, " tokens"] | None = None,
) -> Bool[torch.Tensor, "tokens tokens"]:
    """:func:`repeated_token_pattern` for whole words, whatever their tokens and capitals.

    All tokens of a word are kept from the token that directly follows an earlier occurrence of the
    word. Words are runs of letters, digits and underscores; tokens are those of
    ``tokenizer(prompt, add_special_tokens=False)``.
    """
    starts, ends = np.asarray(_offsets([prompt], tokenizer)[0]).reshape(-1, 2).T
    words = list(re.finditer(r"\w+", prompt))
    first, last = _tokens(starts, ends, [word.span() for word in words])
    kinds = {text: kind for kind, text in enumerate({w[0].casefold(): None for w in words})}
    # Of every token: the word that it is part of, where that begins, and the word that it follows.
    part, start, after = (np.full(len(starts) + 1, -1) for _ in range(3))
    for word, begin, end in zip(words, first, last, strict=True):
        part[begin:end] = kinds[word[0].casefold()]
        start[begin:end] = begin
        after[end] = kinds[word[0].casefold()]
    part, start, after = part[:-1], start[:-1], after[:-1]
    same = (part[:, None] == after[None]) & (part >= 0)[:, None]
    blocked = same & (np.arange(len(part))[None] <= start[:, None])
    return _between(torch.from_numpy(blocked), segments)


def _between(
    blocked: Bool[torch.Tensor, "*batch tokens tokens"], segments: torch.Tensor | None
) -> Bool[torch.Tensor, "*batch tokens tokens"]:
    """Those of the pairs whose query and earlier occurrence lie in two different segments."""
    if segments is None:
        return blocked
    query, key = segments[..., :, None], segments.roll(1, -1)[..., None, :]
    return blocked & (query != key) & (query >= 0) & (key >= 0)


def token_segments(
    prompt: str, tokenizer: PreTrainedTokenizerBase, spans: Sequence[tuple[int, int]]
) -> Int[torch.Tensor, " tokens"]:
    """Number of the span of characters that each token's last character lies in, or -1.

    ``spans`` may be a prompt's demonstrations:
    :func:`icl_helpers.tasks.prompts.demonstration_spans`.
    """
    numbers = []
    for _, end in _offsets([prompt], tokenizer)[0]:
        of = (number for number, (first, last) in enumerate(spans) if first < end <= last)
        numbers.append(next(of, -1))
    return torch.tensor(numbers)


def control_pattern(
    blocked: Bool[torch.Tensor, "*batch tokens tokens"], *, seed: int
) -> Bool[torch.Tensor, "*batch tokens tokens"]:
    """As many random earlier keys for every query as ``blocked`` forbids it, but none of those.

    The control of a knockout: is it these positions that matter, or any loss of attention? Where a
    query has fewer other keys before it than are blocked, all of them are; itself it always sees.
    """
    free = ~blocked & torch.ones_like(blocked).tril(-1)
    drawn = torch.rand(blocked.shape, generator=torch.Generator().manual_seed(seed))
    place = drawn.to(blocked.device).masked_fill(~free, 2.0).argsort(-1).argsort(-1)
    return free & (place < blocked.sum(-1, keepdim=True))


def _tokens(
    starts: np.ndarray, ends: np.ndarray, spans: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each character span the first token that it overlaps, and the one after the last."""
    edges = np.asarray(spans).reshape(-1, 2)
    first = np.searchsorted(ends, edges[:, 0], side="right")
    return first, np.searchsorted(starts, edges[:, 1], side="left")
