"""The page on which heads are switched off: what the browser computes, against PyTorch."""

from __future__ import annotations

import base64
import json
import math
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import icl_helpers as icl
from icl_helpers.book.playground import TASKS, quantized_rows, write_playground
from icl_helpers.files import book_dir, embedded_dir
from icl_helpers.tasks.specs import get_task_spec
from tests.book.test_browser import SCRIPT, chromium, missing_tool

INDUCTION = [[3, 8], [3, 9], [3, 12], [3, 13]]  # As the model's card says.
ODD = [
    "", " ", "  ", "\n", "\n\n\n", " \n \n", "a  b", "a\tb \t", "\r\n\r\nx", "nbsp\u00a0nbsp", "\u0085next",
    "\ufeffmark", "zero\u200bwidth", "line\u2028end\u2029", "wide\u3000space", "café", "cafe\u0301", "ß Ǆ ﬁ",
    "٣٤ Ⅷ ² ½", "日本語 テキスト", "שלום עולם", "👩\u200d👩\u200d👧 🇩🇪", "𝔘𝔫𝔦 𝟘", "\x00\x1f\x7f", "'s don't 10,000.5",
    "<|end_of_text|>", "!!<|begin_of_text|>x <|end_of_text|>", "<|end_of_text", "a<|end_of_text|> \n",
    "V V A A:Foo\n\n", "__init__(*args)", "\u1680\u2000\u180e",
]  # fmt: skip


def odd_texts(count: int) -> list[str]:
    """Random characters of many kinds, spaces and line breaks among them."""
    rng = random.Random(0)
    kinds = [
        "VFA:",
        " \n\t\r",
        "éß",
        "0٣²",
        "\u00a0\u2028\u3000\ufeff\u0301",
        "日🙂𝔘",
        "<|>_'.",
        "abcde",
    ]
    pick = lambda: rng.choice(rng.choice(kinds))  # noqa: E731
    return ["".join(pick() for _ in range(rng.randint(1, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The page as the book has it, in a theme of two colours."""
    root = tmp_path_factory.mktemp("playground")
    write_playground(root / "_static" / "playground")
    text = (book_dir() / "playground.md").read_text(encoding="utf-8")
    (part,) = re.findall(r"^<section.*?</section>\n(?:<[^\n]*\n)+", text, re.DOTALL | re.MULTILINE)
    (root / "page.html").write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Page</title>'
        '<meta name="viewport" content="width=device-width"><style>'
        "html { --pst-color-background: #fff; --pst-color-text-base: #222832; color-scheme: light }"
        "html[data-theme=dark] { --pst-color-background: #14181e; --pst-color-text-base: #ced6dd; color-scheme: dark }"
        "body { background: var(--pst-color-background); color: var(--pst-color-text-base) }"
        f"</style></head><body><main><h1>Page</h1>{part}</main></body></html>",
        encoding="utf-8",
    )
    return root


@pytest.fixture(scope="module")
def stored(folder) -> dict:
    text = (folder / "_static" / "playground" / "icl-tiny.js").read_text(encoding="utf-8")
    return json.loads(text.removeprefix("window.iclTinyData = ").removesuffix(";\n"))


@pytest.fixture(scope="module")
def tokenizer():
    return icl.load_model("icl-tiny")[1]


@pytest.fixture(scope="module")
def rounded(stored) -> LlamaForCausalLM:
    """The model of the page, from the bytes that the browser reads."""
    model = LlamaForCausalLM.from_pretrained(
        embedded_dir() / "icl-tiny", attn_implementation="eager"
    )
    for name, weight in model.named_parameters():
        read = {
            part: np.frombuffer(base64.b64decode(text), "<i1" if weight.ndim == 2 and part == "values" else "<f4")
            for part, text in stored["tensors"][name].items()
        }  # fmt: skip
        values = torch.from_numpy(read["values"].copy()).float().view(weight.shape)
        if weight.ndim == 2:
            values = values * torch.from_numpy(read["scales"].copy())[:, None]
        weight.data.copy_(values)
    return model.eval()


def test_rows_are_rounded_to_the_nearest_of_255_steps():
    weight = torch.tensor([[0.5, -1.27, 0.004, 1.0], [0.0, 0.0, 0.0, 0.0], [254.0, 1.0, -3.0, 2.9]])
    values, scales = quantized_rows(weight)
    assert values.tolist() == [[50, -127, 0, 100], [0, 0, 0, 0], [127, 0, -2, 1]]
    assert scales[[0, 2]].tolist() == pytest.approx([0.01, 2.0])
    assert values.dtype == torch.int8


def test_file_is_small_and_names_the_heads_of_the_models_card(stored, folder):
    assert (folder / "_static" / "playground" / "icl-tiny.js").stat().st_size < 1.6e6
    assert sorted(stored["induction"]) == INDUCTION
    control = [tuple(head) for head in stored["control"]]
    assert [layer for layer, _ in control] == [3] * 4
    assert not {*control} & {tuple(head) for head in INDUCTION}
    scores = {(it["layer"], it["head"]): it["score"] for it in stored["heads"]}
    assert len(scores) == 64
    assert min(scores[layer, head] for layer, head in INDUCTION) > 0.5


def test_prompts_are_the_packages_own(stored):
    found = {prompt["task"].partition(",")[0] for prompt in stored["prompts"]}
    assert found == {task.replace("_", " ") for task in TASKS}
    for task, shots in (("wordseq1_4way", 20), ("review_sentiment", 10)):
        built = {prompt.context: prompt for prompt in icl.build_prompts(task, shots=shots, seed=42)}
        mine = [p for p in stored["prompts"] if p["task"].startswith(task.replace("_", " "))]
        assert len(mine) == 3
        for prompt in mine:
            assert built[prompt["context"]].target == prompt["target"]
            assert built[prompt["context"]].choices == tuple(prompt["choices"])


def log_probabilities(
    model: LlamaForCausalLM, tokenizer, context: str, labels: Sequence[str], *,
    heads: Sequence[Sequence[int]] = (), blocked: torch.Tensor | None = None,
) -> list[float]:  # fmt: skip
    """Of each label, one label at a time, by eager attention and hooks that know nothing of icl.

    Heads are removed from the input of the output projection or, with ``blocked``, given a mask of
    their own.
    """
    size, logs = model.config.head_dim, []
    before = tokenizer(context, add_special_tokens=False).input_ids
    for label in labels:
        ids = tokenizer(context + label, add_special_tokens=False).input_ids
        after = ids[len(before) :]
        ids = torch.tensor([before + after])
        masks = torch.full((ids.shape[1], ids.shape[1]), -math.inf).triu(1).repeat(64, 1, 1)
        masks = masks.view(4, 16, *masks.shape[1:])
        with ExitStack() as stack:
            for layer, head in heads:
                attention = model.model.layers[layer].self_attn
                if blocked is None:

                    def remove(_module, args, start=head * size):
                        args[0][..., start : start + size] = 0

                    handle = attention.o_proj.register_forward_pre_hook(remove)
                    stack.callback(handle.remove)
                else:
                    masks[layer, head, : len(before), : len(before)].masked_fill_(
                        blocked, -math.inf
                    )
            for layer, block in enumerate(model.model.layers):

                def mask(_module, args, kwargs, own=masks[layer][None]):
                    return args, kwargs | {"attention_mask": own}

                handle = block.self_attn.register_forward_pre_hook(mask, with_kwargs=True)
                stack.callback(handle.remove)
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[0]
        found = torch.log_softmax(logits, dim=-1)
        logs.append(sum(float(found[len(before) - 1 + i, token]) for i, token in enumerate(after)))
    return logs


def cases(stored: dict) -> list[dict]:
    """Prompts of several tasks, their labels and one of two tokens, under every intervention."""
    prompts = [stored["prompts"][index] for index in range(0, len(stored["prompts"]), 3)]
    early = [[0, 0], [1, 5], [2, 15], *INDUCTION]
    made = []
    for prompt in prompts:
        labels = [*prompt["choices"], " Foo Bar"]
        # Documents of text tasks hold blank lines, for which no pattern is defined.
        text = prompt["task"].startswith(("review", "fact"))
        made += [
            {"context": prompt["context"], "labels": labels, "heads": heads, "blocked": blocked}
            for heads in (INDUCTION, stored["control"], early)
            for blocked in ((False,) if text else (False, True))
        ]
    return made


def patterned(prompts: int = 3) -> list[str]:
    """Prompts with an induction pattern, and some with none."""
    made = [
        prompt.context
        for task in icl.task_names("abstract")
        for prompt in icl.build_prompts(task, shots=max(get_task_spec(task).default_shots), seed=43)[:prompts]
    ]  # fmt: skip
    made += [
        "Do.\n\nV V:Foo\n\nV 日本:café 🙂\n\n🙂🙂 x:Foo\n\nV V:",
        "Do.\n\nV V:",
        "Do.\n\napple dog:A\n\nfig cat:",
    ]
    return [
        *made,
        "none",
        "Do.\n\nV",
        "Do.\n\nV:Foo",
        "Do.\n\nV: Foo\n\nV:",
        "Do.\n\na:b:c\n\nV:",
        "Do.\n\na\nb:c\n\nV:",
    ]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    every = [
        prompt.context
        for task in TASKS
        for prompt in icl.build_prompts(task, shots=max(get_task_spec(task).default_shots), seed=42)
    ]
    return [*every, *ODD, *odd_texts(300)]


@pytest.fixture(scope="module")
def report(folder, stored, texts, tmp_path_factory) -> dict:
    reason = missing_tool()
    if reason is not None:
        pytest.skip(reason)
    scratch = tmp_path_factory.mktemp("browser")
    settings = {
        "chromium": chromium(), "profile": str(scratch / "profile"), "root": str(folder),
        "page": "page.html", "widths": [1300, 390], "texts": texts, "patterns": patterned(),
        "cases": cases(stored),
    }  # fmt: skip
    (scratch / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    script = SCRIPT.with_name("playground.cjs")
    done = subprocess.run(
        [shutil.which("node") or "node", str(script), str(scratch / "settings.json")],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_browser_tokenises_as_the_models_tokenizer(report, texts, tokenizer):
    wanted = tokenizer(texts, add_special_tokens=False).input_ids
    found = report["steps"]["computed"]["tokens"]
    wrong = [text for text, a, b in zip(texts, wanted, found, strict=True) if a != b]
    assert wrong == []


@pytest.mark.slow
def test_browser_finds_the_same_induction_pattern(report, tokenizer):
    for prompt, found in zip(patterned(), report["steps"]["computed"]["patterns"], strict=True):
        try:
            pattern = icl.induction_pattern(prompt, tokenizer)
        except icl.InputError:
            assert isinstance(found, str), prompt
            assert found.startswith("No induction pattern")
            continue
        assert found == [row.nonzero().flatten().tolist() for row in pattern], prompt


@pytest.mark.slow
def test_browser_computes_the_log_probabilities_of_torch(report, stored, rounded, tokenizer):
    """With and without each intervention, on the same rounded weights."""
    moved = []
    for case, found in zip(cases(stored), report["steps"]["computed"]["cases"], strict=True):
        context, labels = case["context"], case["labels"]
        plain = log_probabilities(rounded, tokenizer, context, labels)
        blocked = icl.induction_pattern(context, tokenizer) if case["blocked"] else None
        changed = log_probabilities(
            rounded, tokenizer, context, labels, heads=case["heads"], blocked=blocked
        )
        assert found["plain"] == pytest.approx(plain, abs=1e-4)
        assert found["changed"] == pytest.approx(changed, abs=1e-4)
        assert found["reused"]
        moved.append(max(abs(a - b) for a, b in zip(plain, changed, strict=True)))
    # The interventions are no empty ones.
    assert sorted(moved)[len(moved) // 2] > 0.1


@pytest.mark.slow
def test_browser_draws_the_attention_of_torch(report, stored, rounded, tokenizer):
    case, found = cases(stored)[0], report["steps"]["computed"]["cases"][0]
    ids = tokenizer(case["context"], add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        attention = rounded(ids, output_attentions=True).attentions[3][0]
    # Nothing below layer 3 is edited here, so what its heads look at is as it was.
    wanted = torch.cat([row[: query + 1] for head in attention for query, row in enumerate(head)])
    assert found["attention"] == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.slow
def test_rounding_changes_no_answer(stored, rounded, tokenizer):
    exact = LlamaForCausalLM.from_pretrained(
        embedded_dir() / "icl-tiny", attn_implementation="eager"
    )
    for prompt in stored["prompts"]:
        answers = [
            int(
                np.argmax(log_probabilities(model, tokenizer, prompt["context"], prompt["choices"]))
            )
            for model in (exact.eval(), rounded)
        ]
        assert answers[0] == answers[1]


@pytest.mark.slow
def test_page_has_no_complaint_in_any_width_and_theme(report):
    assert report["console"] == []
    assert report["foreign"] == []
    assert report["wide"] == []
    assert report["violations"] == []


def shown(stored: dict, model, tokenizer, prompt: dict, **changes) -> list[str]:
    """A column of the page's table, by PyTorch."""
    logs = log_probabilities(model, tokenizer, prompt["context"], prompt["choices"], **changes)
    shares = [100 * math.exp(log) for log in logs]
    return [f"{share:.1f}\u00a0%" if share >= 0.1 else "under 0.1\u00a0%" for share in shares]


@pytest.mark.slow
def test_checked_heads_are_removed_at_once_and_stand_beside_the_full_model(
    report, stored, rounded, tokenizer
):
    steps, prompt = report["steps"], stored["prompts"][0]
    full = shown(stored, rounded, tokenizer, prompt)
    assert steps["start"]["checked"] == []
    assert [row[1] for row in steps["start"]["answers"][1:]] == full
    assert steps["start"]["answers"][0] == ["Label", "Full model", "Nothing changed"]
    right = [row[0] for row in steps["start"]["answers"][1:] if "(right)" in row[0]]
    assert right == [f"{prompt['choices'][prompt['target']]} (right)"]
    for step, heads in (("induction", INDUCTION), ("control", stored["control"])):
        found = steps[step]
        assert sorted(found["checked"]) == sorted(f"{layer}.{head}" for layer, head in heads)
        assert [row[1] for row in found["answers"][1:]] == full
        changed = shown(stored, rounded, tokenizer, prompt, heads=heads)
        assert [row[2] for row in found["answers"][1:]] == changed
        assert found["status"].startswith("Full model: ")
        assert "Without 3." in found["status"]
    assert steps["none"]["checked"] == []
    assert steps["none"]["answers"] == steps["start"]["answers"]


@pytest.mark.slow
def test_keyboard_reaches_and_works_every_control(report):
    steps = report["steps"]
    assert steps["start"]["unnamed"] == 0
    assert steps["onButton"]["focused"] == "Check the 4 induction heads"
    assert steps["onPattern"]["focused"].startswith("Keep the checked heads and block")
    assert steps["onFirstHead"]["focused"] == "0.0"
    assert steps["firstHead"]["checked"] == ["0.0"]
    assert "Without 0.0" in steps["firstHead"]["status"]


@pytest.mark.slow
def test_attention_is_drawn_as_it_changes(report, tokenizer, stored):
    steps = report["steps"]
    start, blocked = steps["start"], steps["blocked"]
    assert blocked["blocked"]
    assert "Induction pattern blocked in 3." in blocked["status"]
    assert start["current"] == blocked["current"] == len(start["numbers"]) - 1
    assert [first for first, _ in start["numbers"]] == [first for first, _ in blocked["numbers"]]
    assert {second for _, second in start["numbers"]} == {""}
    pattern = icl.induction_pattern(stored["prompts"][0]["context"], tokenizer)[-1]
    forbidden = pattern.nonzero().flatten().tolist()
    assert any(blocked["numbers"][key][0] for key in forbidden)
    assert not any(blocked["numbers"][key][1] for key in forbidden)
    assert any(second for _, second in blocked["numbers"])
    assert "changed model: 0\u00a0%" in blocked["report"]


@pytest.mark.slow
def test_ones_own_prompt_is_taken_and_a_wrong_one_explained(report):
    steps = report["steps"]
    assert "(right)" in json.dumps(steps["another"]["answers"])
    assert len(steps["own"]["numbers"]) > len(steps["another"]["numbers"])
    assert steps["own"]["canBlock"]
    assert not steps["noPattern"]["canBlock"]
    assert not steps["noPattern"]["blocked"]
    assert "no blank line after its description" in steps["noPattern"]["status"]
    assert "Checked heads are removed, not blocked." in steps["noPattern"]["status"]
    assert steps["empty"]["status"] == "The prompt is empty."
    assert steps["empty"]["answers"] == []
    assert steps["tooLong"]["status"] == "The prompt is longer than 512 tokens."
    assert steps["again"]["canBlock"]
    assert steps["again"]["status"].startswith("Full model: ")


@pytest.mark.slow
def test_touch_checks_a_head_and_chooses_a_token_without_scrolling_sideways(report):
    tapped = report["steps"]["tapped"]
    assert tapped["checked"] == ["3.8"]
    assert tapped["current"] == 20
    assert tapped["report"].startswith("From token 21,")
    assert tapped["width"][0] <= tapped["width"][1]
