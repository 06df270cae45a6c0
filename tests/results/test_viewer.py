"""The attention viewer: its data against eager attention, its markup against what it must offer."""

from __future__ import annotations

import html.parser
import json
import re

import jsonschema
import pytest
import torch

import icl_helpers as icl
from icl_helpers.results.viewer import attention_in_words, viewer_data, viewer_html, viewer_prompts
from tests.conftest import make_llama

NATURAL = {"type": "integer", "minimum": 0}
SHARES = {"type": "array", "items": NATURAL | {"maximum": 1000}, "minItems": 1}
TRIANGLES = {"type": "array", "items": {"type": "array", "items": SHARES}}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["unit", "heads", "prompts"],
    "properties": {
        "unit": {"const": 1000},
        "heads": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["layer", "head", "score"],
                "properties": {
                    "layer": NATURAL,
                    "head": NATURAL,
                    "score": {"type": ["number", "null"]},
                },
            },
        },
        "prompts": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "tokens", "blocked", "attention"],
                "properties": {
                    "name": {"type": "string"},
                    "tokens": {"type": "array", "items": {"type": "string"}},
                    "blocked": {"type": "array", "items": {"type": "array", "items": NATURAL}},
                    "attention": {
                        "type": "object",
                        "required": ["plain", "blocked"],
                        "properties": {"plain": TRIANGLES, "blocked": TRIANGLES},
                    },
                },
            },
        },
    },
}
HEADS = [(1, 3), (2, 0)]


@pytest.fixture(scope="module")
def prompts():
    return viewer_prompts(["wordseq1_binary", "repetition"], shots=3)


@pytest.fixture(scope="module")
def model():
    return make_llama()


@pytest.fixture(scope="module")
def data(model, tokenizer, prompts):
    return viewer_data(model, tokenizer, HEADS, prompts, scores=torch.full((3, 4), 0.25))


def eager(tokenizer, prompt) -> tuple[torch.Tensor, ...]:
    """Attention of every layer by transformers' own eager implementation, [head, query, key]."""
    model = make_llama()
    model.set_attn_implementation("eager")
    ids = tokenizer(prompt.context, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return tuple(a[0] for a in model(ids, output_attentions=True).attentions)


def square(rows: list[list[int]]) -> torch.Tensor:
    whole = torch.zeros(len(rows), len(rows))
    for query, row in enumerate(rows):
        whole[query, : len(row)] = torch.tensor(row) / 1000
    return whole


def test_data_follow_their_schema(data):
    jsonschema.validate(json.loads(json.dumps(data)), SCHEMA)
    for prompt in data["prompts"]:
        size = len(prompt["tokens"])
        assert len(prompt["blocked"]) == size
        for triangles in prompt["attention"].values():
            assert [len(rows) for rows in triangles] == [size] * len(HEADS)
            assert all([len(row) for row in rows] == list(range(1, size + 1)) for rows in triangles)


def test_tokens_put_together_are_the_prompt(data, prompts):
    found = ["".join(prompt["tokens"]) for prompt in data["prompts"]]
    assert found == [prompt.context for prompt in prompts.values()]


def test_plain_attention_equals_eager_attention(data, tokenizer, prompts):
    for shown, prompt in zip(data["prompts"], prompts.values(), strict=True):
        attention = eager(tokenizer, prompt)
        for index, (layer, head) in enumerate(HEADS):
            found = square(shown["attention"]["plain"][index])
            assert torch.allclose(found, attention[layer][head], atol=6e-4)


def test_blocked_attention_of_the_first_knocked_out_layer_is_eager_attention_shared_anew(
    data, tokenizer, prompts
):
    """Nothing before that layer is altered, so forbidding keys only rescales the other shares."""
    for shown, prompt in zip(data["prompts"], prompts.values(), strict=True):
        layer, head = HEADS[0]
        left = eager(tokenizer, prompt)[layer][head].clone()
        for query, keys in enumerate(shown["blocked"]):
            left[query, keys] = 0
        left = left / left.sum(dim=-1, keepdim=True)
        assert any(shown["blocked"])
        assert torch.allclose(square(shown["attention"]["blocked"][0]), left, atol=6e-4)


def test_blocked_attention_of_a_later_layer_sees_the_earlier_knockout(data, model, tokenizer):
    """What is blocked earlier reaches later layers: the head alone would look elsewhere."""
    prompts = viewer_prompts(["wordseq1_binary"], shots=3)
    alone = viewer_data(model, tokenizer, HEADS[1:], prompts)["prompts"][0]["attention"]["blocked"]
    together = data["prompts"][0]["attention"]["blocked"]
    assert alone[0] != together[1]


def test_blocked_pairs_are_the_induction_pattern(data, tokenizer, prompts):
    for shown, prompt in zip(data["prompts"], prompts.values(), strict=True):
        pattern = icl.induction_pattern(prompt.context, tokenizer)
        pairs = {(q, k) for q, keys in enumerate(shown["blocked"]) for k in keys}
        assert pairs == {(int(q), int(k)) for q, k in pattern.nonzero()}


def test_scores_stand_beside_the_heads(data):
    assert data["heads"] == [{"layer": a, "head": b, "score": 0.25} for a, b in HEADS]


def test_viewer_without_heads_is_refused(model, tokenizer, prompts):
    with pytest.raises(icl.InputError, match="at least one head"):
        viewer_data(model, tokenizer, [], prompts)


def test_prompts_are_named_and_have_the_first_label_as_answer(prompts):
    assert list(prompts) == ["wordseq1 binary, 3 examples", "repetition, 3 examples"]
    assert {prompt.target for prompt in prompts.values()} == {0}


class Page(html.parser.HTMLParser):
    """Tags of a piece of HTML and the text of its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.json = ""
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "script" and dict(attrs).get("type") == "application/json"

    def handle_data(self, text):
        if self._inside:
            self.json += text
            self._inside = False


def test_page_holds_its_data_and_fetches_nothing(data):
    text = viewer_html(data)
    page = Page(text)
    assert json.loads(page.json) == json.loads(json.dumps(data))
    assert not [attrs for _, attrs in page.tags if "src" in attrs or "href" in attrs]
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|eval\(", text)
    assert "\n\n" not in text


def test_text_of_a_prompt_cannot_end_the_data():
    hostile = {"name": "</script><img src=x>", "tokens": ["<!--"], "blocked": [[]],
               "attention": {"plain": [[[1000]]], "blocked": [[[1000]]]}}  # fmt: skip
    data = {"unit": 1000, "heads": [{"layer": 0, "head": 0, "score": None}], "prompts": [hostile]}
    page = Page(viewer_html(data))
    assert json.loads(page.json) == data
    assert "img" not in [tag for tag, _ in page.tags]


def test_section_is_labelled_and_has_a_word_for_readers_without_scripts(data):
    page = Page(viewer_html(data))
    section = page.tags[0]
    assert section[0] == "section"
    label = section[1]["aria-labelledby"]
    assert label in [attrs.get("id") for _, attrs in page.tags]
    assert "noscript" in [tag for tag, _ in page.tags]


def test_two_viewers_of_one_page_have_names_of_their_own(data):
    other = {**data, "prompts": data["prompts"][:1]}
    ids = [Page(viewer_html(d)).tags[0][1]["id"] for d in (data, other)]
    assert ids[0] != ids[1]


def test_style_shows_shares_not_by_colour_alone_and_respects_the_reader(data):
    text = viewer_html(data)
    for wanted in (
        "prefers-reduced-motion", "forced-colors", "@media print", 'data-theme="dark"', "dashed"
    ):  # fmt: skip
        assert wanted in text
    for role in ('"listbox"', '"option"', '"switch"', '"status"', "aria-label", "aria-selected"):
        assert role in text


def test_words_for_a_figure_name_the_largest_shares():
    rows = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
    heads = [icl.Head(0, 1), icl.Head(2, 3)]
    text = attention_in_words(rows, ["a", " Foo", "\n\n"], heads, named=2)
    assert "layer 0 head 1: 70% on 'Foo', 20% on 'a blank line'" in text
    assert "layer 2 head 3: 50% on 'a', 30% on 'Foo'" in text
