"""An attention viewer for a static page: choose a head, a prompt and a token, see where it looks.

:func:`attention_viewer` computes the attention of a few heads over a few prompts, as they are and
with the induction pattern blocked, and returns one piece of HTML that holds data, style and script
and fetches nothing. It works in a notebook, in the book and from a file.

Example
-------
>>> from IPython.display import HTML
>>> prompts = viewer_prompts(["wordseq1_binary", "repetition"], shots=5)
>>> HTML(attention_viewer(model, tokenizer, heads, prompts))
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.heads import Head
from icl_helpers.attention.induction_pattern import (
    CATEGORIES,
    elements_pattern,
    induction_pattern,
    prompt_elements,
)
from icl_helpers.attention.interventions import AttentionKnockout, intervene
from icl_helpers.attention.scores import attention_patterns
from icl_helpers.errors import InputError
from icl_helpers.files import assets_dir
from icl_helpers.tasks.prompts import Prompt, build_prompts
from icl_helpers.tasks.specs import get_task_spec

__all__ = [
    "PromptView", "attention_in_words", "attention_viewer", "looks_in_words",
    "prompt_view", "query_followers", "query_word", "view_data", "view_name", "viewer_data",
    "viewer_html", "viewer_prompts",
]  # fmt: skip

# Shares of attention are whole thousandths in the page: short, and exact enough to be read.
UNIT = 1000


@dataclass(frozen=True)
class PromptView:
    """Where heads look in one prompt, as they are and once their induction pattern is blocked.

    ``spans`` are the tokens' places in ``text``, ``pattern`` what the knockout forbids. ``plain``
    and ``blocked`` hold heads' attention, the latter of all its heads knocked out together, in
    order.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    pattern: Bool[torch.Tensor, "query key"]
    plain: Mapping[Head, Float[torch.Tensor, "query key"]]
    blocked: Mapping[Head, Float[torch.Tensor, "query key"]]

    @property
    def tokens(self) -> list[str]:
        """The text of each token."""
        return [self.text[start:end] for start, end in self.spans]


def viewer_prompts(
    tasks: Iterable[str], *, shots: int = 5, seed: int = 42, data: str = "synthetic"
) -> dict[str, Prompt]:
    """Build for each task its first prompt with the first label as answer, by a readable name."""
    prompts = {}
    for task in tasks:
        built = build_prompts(task, shots=shots, seed=seed, data=data)
        first = next((prompt for prompt in built if prompt.target == 0), built[0])
        prompts[view_name(task, shots=shots)] = first
    return prompts


def view_name(task: str, *, shots: int = 5) -> str:
    """Name a task's prompt in the viewer."""
    return f"{get_task_spec(task).name.replace('_', ' ')}, {shots} examples"


def viewer_data(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    heads: Sequence[Head | tuple[int, int]], prompts: Mapping[str, Prompt | str], *,
    scores: Float[torch.Tensor, "layers heads"] | None = None,
    categories: Sequence[str] = CATEGORIES,
) -> dict[str, Any]:  # fmt: skip
    """Compute what the viewer shows, as plain JSON values.

    Returns ``heads`` (layer, head and prefix-matching score, None without ``scores``) and
    ``prompts``, each with ``name``, ``tokens`` (their text), ``blocked`` (for every query the keys
    that the knockout forbids) and ``attention``: ``plain`` and ``blocked``, for every head the
    lower triangle of its attention, row by row, in thousandths. ``blocked`` is what the heads do
    when all of them are knocked out together (paper, section 5), as in the run's evaluation.

    Raises :class:`InputError` without heads or prompts.
    """
    shown_heads = list(dict.fromkeys(Head(*head) for head in heads))
    if not shown_heads or not prompts:
        raise InputError(
            f"the viewer needs at least one head and one prompt, got {len(shown_heads)} and "
            f"{len(prompts)}"
        )
    views = {
        name: prompt_view(model, tokenizer, shown_heads, prompt, categories=categories)
        for name, prompt in prompts.items()
    }
    return view_data(views, scores=scores)


def view_data(
    views: Mapping[str, PromptView], *, scores: Float[torch.Tensor, "layers heads"] | None = None
) -> dict[str, Any]:
    """Return :func:`viewer_data` of prompts whose attention is known, for the blocked heads."""
    heads = list(next(iter(views.values())).blocked)
    return {
        "unit": UNIT,
        "heads": [
            head._asdict() | {"score": None if scores is None else round(float(scores[head]), 3)}
            for head in heads
        ],
        "prompts": [
            {
                "name": name,
                "tokens": view.tokens,
                "blocked": [row.nonzero().flatten().tolist() for row in view.pattern],
                "attention": {
                    "plain": [_triangle(view.plain[head]) for head in heads],
                    "blocked": [_triangle(view.blocked[head]) for head in heads],
                },
            }
            for name, view in views.items()
        ],
    }


def prompt_view(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heads: Sequence[Head],
    prompt: Prompt | str, *, categories: Sequence[str] = CATEGORIES, also: Sequence[Head] = (),
) -> PromptView:  # fmt: skip
    """Compute where ``heads`` look in a prompt, and as they are where ``also`` do."""
    text = prompt if isinstance(prompt, str) else prompt.context
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]])
    pattern = induction_pattern(text, tokenizer, categories=categories)
    plain = attention_patterns(model, ids, [*heads, *also])
    # A knocked-out head of an early layer changes what later layers see.
    with intervene(model, AttentionKnockout(heads, pattern)):
        blocked = attention_patterns(model, ids, heads, blocked=pattern)
    return PromptView(
        text,
        tuple((start, end) for start, end in encoded["offset_mapping"]),
        pattern,
        {head: attention[0] for head, attention in plain.items()},
        {head: blocked[head][0] for head in heads},
    )


def _triangle(attention: Float[torch.Tensor, "query key"]) -> list[list[int]]:
    """Return the rows of the lower triangle in thousandths."""
    rows = (attention.float() * UNIT).round().int().tolist()
    return [row[: query + 1] for query, row in enumerate(rows)]


def attention_in_words(
    attention: Float[torch.Tensor, "heads tokens"], tokens: Sequence[str], heads: Sequence[Head], *,
    named: int = 3,
) -> str:  # fmt: skip
    """Say where heads look, for readers who do not see the figure: each head's largest shares."""
    parts = []
    for head, row in zip(heads, attention, strict=True):
        shares, keys = row.topk(min(named, len(tokens)))
        looks = ", ".join(
            f"{share:.0%} on {tokens[key].strip() or 'a blank line'!r}"
            for share, key in zip(shares.tolist(), keys.tolist(), strict=True)
        )
        parts.append(f"layer {head.layer} head {head.head}: {looks}")
    return f"Attention by head and token. {'; '.join(parts)}."


def looks_in_words(view: PromptView, position: int) -> str:
    """Say on which token each head puts most from a position, and how much, heads alike together.

    A token is named with the one after which it came.
    """
    groups: dict[int, list[float]] = {}
    for head in view.blocked:
        most, at = view.plain[head][position, : position + 1].float().max(dim=0)
        groups.setdefault(int(at), []).append(100 * float(most))
    names = [f"*{token.strip()}*" if token.strip() else "a blank line" for token in view.tokens]
    parts = []
    for key, shares in sorted(groups.items(), key=lambda group: -len(group[1])):
        ends = dict.fromkeys(f"{share:.0f}" for share in (min(shares), max(shares)))
        after = f", after {names[key - 1]}" if key else ""
        parts.append(
            f"{len(shares)} of {len(view.blocked)} heads put most, {' to '.join(ends)} %, on "
            f"{names[key]} (token {key + 1}{after})"
        )
    return "; ".join(parts)


def query_followers(view: PromptView) -> dict[str, list[float]]:
    """Say how much each head pays to what followed earlier elements; empty without any.

    From the prompt's last token (``colons``: earlier labels), and from the end of the query's
    first word (``words``).
    """
    elements, shares = prompt_elements(view.text), {}
    for category, position in (("colons", len(view.spans) - 1), ("words", query_word(view)[1])):
        pattern = elements_pattern(elements, view.spans, categories=(category,))
        followers = pattern[position]
        heads = view.blocked if followers.any() else ()
        shares[category] = [float(view.plain[head][position][followers].sum()) for head in heads]
    return shares


def query_word(view: PromptView) -> tuple[str, int]:
    """Return the query's first word, and the position of its last token: it is known from there."""
    begin = view.text.rindex("\n\n") + 2
    word = re.split(r"[\s:]", view.text[begin:], maxsplit=1)[0]
    end = begin + len(word)
    return word, max(index for index, (start, _) in enumerate(view.spans) if start < end)


def viewer_html(data: Mapping[str, Any]) -> str:
    """Write the viewer for :func:`viewer_data`'s data: a ``section`` with style and script."""
    # "<" would let a token such as "</script>" end the data; JSON reads its escape as the same.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    # Blank lines would end the block for Markdown readers.
    style, script, page = (
        "\n".join(filter(str.strip, (assets_dir() / name).read_text(encoding="utf-8").splitlines()))
        for name in ("viewer.css", "viewer.js", "viewer.html")
    )
    name = f"icl-viewer-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    return string.Template(page).substitute(name=name, style=style, script=script, data=text)


def attention_viewer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    heads: Sequence[Head | tuple[int, int]], prompts: Mapping[str, Prompt | str], *,
    scores: Float[torch.Tensor, "layers heads"] | None = None,
    categories: Sequence[str] = CATEGORIES,
) -> str:  # fmt: skip
    """Return the viewer's HTML; the arguments are those of :func:`viewer_data`."""
    data = viewer_data(model, tokenizer, heads, prompts, scores=scores, categories=categories)
    return viewer_html(data)
