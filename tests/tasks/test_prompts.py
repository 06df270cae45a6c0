"""Data sets, demonstrations, prompts, induction patterns, lm-eval tasks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_helpers as icl
from icl_helpers.attention.induction_pattern import prompt_elements
from icl_helpers.files import synthetic_dir, tasks_dir
from icl_helpers.tasks import data as task_data
from icl_helpers.tasks.data import fetch_original, is_published, load_rows, rows_digest
from icl_helpers.tasks.lm_eval_task import load_task
from icl_helpers.tasks.prompts import resolve_sampling
from icl_helpers.tasks.specs import get_task_spec, task_names
from tests.conftest import SHARED, make_tokenizer
from tests.tasks.test_demonstrations import slow_draw

ORIGINAL = SHARED / "original_data"
HASHES = SHARED / "reference" / "prompt_hashes_seed42.json"
LETTERS = {"repetition": "0101", "recursion": "0111", "centre_embedding": "01210"}


@pytest.mark.slow
def test_regenerating_gives_the_same_bytes(tmp_path):
    script = synthetic_dir() / "generate.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, capture_output=True)
    made = sorted(tmp_path.glob("*.json"))
    assert len(made) == 7
    for path in made:
        assert path.read_bytes() == (synthetic_dir() / path.name).read_bytes()


@pytest.mark.parametrize("task", task_names())
def test_rows_are_distinct_and_labels_balanced(task):
    rows = load_rows(task)
    assert len(set(rows)) == len(rows)
    counts = set(Counter(label for _, label in rows).values())
    assert counts == ({250} if task in LETTERS else {256})


@pytest.mark.parametrize(("task", "shape"), LETTERS.items())
def test_letter_rows_follow_their_pattern(task, shape):
    for text, label in load_rows(task):
        letters = text.split()
        order = list(dict.fromkeys(letters))
        found = "".join(str(order.index(letter)) for letter in letters)
        expected = shape if label == "Foo" else "01234"[: len(shape)]
        assert found == expected


@pytest.mark.parametrize("task", [t for t in task_names() if t.startswith("wordseq")])
def test_word_rows_are_all_pairs_of_their_categories(task):
    words = json.loads((synthetic_dir() / "words.json").read_text())
    category = {w: c for c, members in words.items() for w in members}
    one, two = {}, {}
    for text, label in load_rows(task):
        first, second = text.split()
        one.setdefault(label, set()).add(category[first])
        two.setdefault(label, set()).add(category[second])
    assert all(len(found) == 1 for found in [*one.values(), *two.values()])
    fruit = task.startswith("wordseq1")
    assert one["Foo"] == {"fruits" if fruit else "vegetables"}
    assert two["Foo"] == {"animals" if fruit else "vehicles"}
    assert two["Bar"] == {"professions" if fruit else "instruments"}
    if task.endswith("4way"):
        assert two["Mur"] == {"animals" if fruit else "instruments"}
        assert one["Res"] == {"fruits" if fruit else "body_parts"}


def slow_contexts(task: str, shots: int, seed: int) -> list[str]:
    """The published prompts from the draw that is written out with lists."""
    spec, rows = get_task_spec(task), load_rows(task)
    sampler = "disjoint_words" if task.startswith("wordseq") else "balanced"
    drawn = slow_draw(rows, rows, shots=shots, seed=seed, sampler=sampler, same_split=True)
    contexts = []
    for (query, _), demonstrations in zip(rows, drawn, strict=True):
        body = "\n\n".join([f"{text}:{label}" for text, label in demonstrations] + [f"{query}:"])
        contexts.append(f"{spec.description}\n\n{body}")
    return contexts


@pytest.mark.parametrize(
    ("task", "shots"), [("repetition", 5), ("centre_embedding", 10), ("wordseq2_binary", 10)]
)
def test_prompts_equal_a_slow_draw(task, shots):
    found = [prompt.context for prompt in icl.build_prompts(task, shots=shots, seed=44)]
    assert found == slow_contexts(task, shots, 44)


def test_zero_shot_prompt_is_description_and_query():
    prompt = icl.build_prompts("repetition", shots=0, seed=1)[3]
    text, label = load_rows("repetition")[3]
    assert prompt.context == f"{get_task_spec('repetition').description}\n\n{text}:"
    assert prompt.choices[prompt.target] == label
    assert prompt.doc_id == 3


def test_every_prompt_has_its_shots_and_no_query_among_them():
    for prompt in icl.build_prompts("wordseq1_4way", shots=20, seed=42):
        blocks = prompt.context.split("\n\n")[1:]
        assert len(blocks) == 21
        assert blocks[-1] not in [block.rpartition(":")[0] + ":" for block in blocks[:-1]]


@pytest.mark.skipif(not HASHES.is_file(), reason="the published code's prompts are not here")
def test_prompts_on_the_published_data_equal_the_published_ones():
    words = {"f_a_f_p": "wordseq1", "v_v_b_i": "wordseq2"}
    names = {name: name for name in task_names()}
    names |= {theirs: f"{ours}_binary" for theirs, ours in words.items()}
    names |= {f"{theirs}_4way": f"{ours}_4way" for theirs, ours in words.items()}
    for key, hashes in json.loads(HASHES.read_text()).items():
        task, seed, shots = key.split("|")
        prompts = icl.build_prompts(
            names[task], shots=int(shots), seed=int(seed), data=str(ORIGINAL)
        )
        found = [
            hashlib.sha256("\0".join([p.context, *p.choices]).encode()).hexdigest()[:16]
            for p in prompts
        ]
        assert found == hashes, key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "repitition"}, "repitition.*repetition, recursion"),
        ({"shots": 500}, "500 shots.*499"),
        ({"shots": -1}, "shots.*-1"),
        ({"seed": "42"}, "seed.*'42'"),
        ({"labels": "semantic"}, "labels"),
        ({"data": "/nowhere"}, "data must be.*nowhere"),
    ],
)
def test_bad_prompt_request_is_explained(change, message):
    request = {"task": "repetition", "shots": 5, "seed": 42, **change}
    with pytest.raises(icl.InputError, match=message):
        icl.build_prompts(request.pop("task"), **request)


@pytest.mark.parametrize(
    "content", ["[", "[]", '[{"sequence": "A B A B"}]', '[{"sequence": "A", "label": "Baz"}]', "{}"]
)
def test_malformed_data_file_is_named(tmp_path, content):
    path = tmp_path / "repetition_dataset_500.json"
    path.write_text(content)
    with pytest.raises(icl.InputError, match=path.name):
        icl.build_prompts("repetition", shots=5, seed=42, data=str(tmp_path))


def test_single_class_is_refused(tmp_path):
    rows = [{"sequence": f"A B A {c}", "label": "Foo"} for c in "CDEFG"]
    (tmp_path / "repetition_dataset_500.json").write_text(json.dumps(rows))
    with pytest.raises(icl.InputError, match="single class"):
        icl.build_prompts("repetition", shots=2, seed=42, data=str(tmp_path))


@pytest.mark.skipif(not ORIGINAL.is_dir(), reason="the published data files are not here")
def test_original_data_are_copied_checked_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("ICL_CACHE_DIR", str(tmp_path / "cache"))
    target = fetch_original(source=ORIGINAL)
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in ORIGINAL.iterdir())
    prompts = icl.build_prompts("repetition", shots=5, seed=42, data="original")
    assert prompts == icl.build_prompts("repetition", shots=5, seed=42, data=str(ORIGINAL))
    damaged = tmp_path / "clone"
    damaged.mkdir()
    for path in ORIGINAL.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes() + b" ")
    (target / "repetition_dataset_500.json").unlink()
    with pytest.raises(icl.MissingArtefactError, match="SHA-256"):
        fetch_original(source=damaged)
    assert not (target / "repetition_dataset_500.json").exists()


@pytest.mark.parametrize("own", [False, True])
def test_published_files_are_told_by_their_content_for_rows_and_demonstrations(
    own, tmp_path, monkeypatch
):
    """By no name of a folder: a row changed in them makes them a user's own."""
    path = tmp_path / "repetition_dataset_500.json"
    rows = [{"sequence": f"A {i} B", "label": "Foo" if i < 28 else "Bar"} for i in range(30)]
    path.write_text(json.dumps(rows))
    published = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(task_data.HASHES, path.name, published)
    if own:
        path.write_text(json.dumps([*rows[:-1], {**rows[-1], "sequence": "A 29 C"}]))
    request = {"shots": 8, "seed": 42, "data": str(tmp_path)}
    assert resolve_sampling("repetition", rows_digest("repetition", data=str(tmp_path)), None) == (
        "balanced" if own else "first"
    )
    if own:
        with pytest.raises(icl.InputError, match="class 'Bar' has"):
            icl.build_prompts("repetition", **request)
    else:
        shown = icl.build_prompts("repetition", **request)
        assert min(prompt.n_demonstrations for prompt in shown) < 8
        assert shown == icl.build_prompts("repetition", **request, demonstrations="published")
    # Another task's published rows are none of this one's.
    assert not is_published("recursion", published)
    assert not is_published("fact_opinion", published)
    assert rows_digest("repetition") is rows_digest("sst2", data="original") is None


def test_an_edited_file_is_read_anew_whatever_its_date_says(tmp_path):
    path = tmp_path / "repetition_dataset_500.json"
    texts = []
    for letter in "XYZ":
        rows = [
            {"sequence": f"{letter} {i % 7}", "label": ("Foo", "Bar")[i % 2]} for i in range(30)
        ]
        path.write_text(json.dumps(rows))
        os.utime(path, ns=(10**18, 10**18))
        prompts = icl.build_prompts("repetition", shots=1, seed=1, data=str(tmp_path))
        task = load_task("repetition", shots=1, seed=1, data=str(tmp_path))
        assert task.prompts(1) == prompts
        texts.append(prompts[0].context.rpartition("\n\n")[2])
    assert texts == ["X 0:", "Y 0:", "Z 0:"]


def test_missing_original_data_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ICL_CACHE_DIR", str(tmp_path))
    with pytest.raises(icl.MissingArtefactError):
        icl.build_prompts("repetition", shots=5, seed=42, data="original")


def slow_pattern(prompt: str, tokenizer, categories=("words", "labels", "colons", "blank_lines")):
    """The blocked pairs by triple loops over elements and tokens."""
    words = json.loads((synthetic_dir() / "words.json").read_text())
    category = {w: c for c, members in words.items() for w in members}
    offsets = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    position = prompt.index("\n\n") + 2
    items = []  # (kind, start, end, follower start, follower end)
    blocks = prompt[position:].split("\n\n")
    for number, block in enumerate(blocks):
        body, label = block.split(":")
        colon = position + len(body)
        end = colon + 1 + len(label)
        parts = body.split(" ")
        if len(parts) == 2 and all(p in category for p in parts) and "words" in categories:
            middle = position + len(parts[0])
            items.append((category[parts[0]], position, middle, middle, colon))
            items.append((category[parts[1]], middle, colon, colon, colon + 1))
        last = number == len(blocks) - 1
        if "colons" in categories:
            items.append((":", colon, colon + 1, colon + 1, end if label else None))
        if not last and "labels" in categories:
            items.append(("label", colon + 1, end, end, end + 2))
        if not last and "blank_lines" in categories:
            items.append(("blank", end, end + 2, end + 2, end + 3))
        position = end + 2

    def touched(start, end):
        return [t for t, (a, b) in enumerate(offsets) if b > start and a < end]

    blocked = torch.zeros(len(offsets), len(offsets), dtype=torch.bool)
    for kind, start, end, _, _ in items:
        for other, _, _, follower_start, follower_end in items:
            if other != kind or follower_end is None:
                continue
            follower = touched(follower_start, follower_end)
            own = touched(start, end)
            if kind == "blank":
                follower = follower[:1]
            if follower[0] < own[0]:
                for query in own:
                    for key in follower:
                        if key < query:
                            blocked[query, key] = True
    return blocked


def test_pattern_of_a_small_prompt_by_hand():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    prompt = "Go.\n\nfig cat:Foo\n\nbed nurse:Bar\n\ndate fox:"
    pieces = ["Go", ".", "\n\n", "fig", " cat", ":", "Foo", "bed", " nurse", "Bar", "date", " fox"]
    backend = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="Go"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n| ?[A-Za-z]+|[:.]"), "isolated")
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="Go")
    # 0 Go 1 . 2 \n\n 3 fig 4 _cat 5 : 6 Foo 7 \n\n 8 bed 9 _nurse 10 : 11 Bar 12 \n\n 13 date 14 _fox 15 :
    expected = {
        (10, 6), (15, 6), (15, 11),  # colon -> label after an earlier colon
        (11, 7),  # label -> blank line after an earlier label
        (12, 8),  # blank line -> first token after an earlier blank line
        (13, 4),  # fruit -> what followed an earlier fruit
        (14, 5),  # animal -> the colon after an earlier animal
    }  # fmt: skip
    found = {tuple(pair) for pair in icl.induction_pattern(prompt, words).nonzero().tolist()}
    assert found == expected


@pytest.mark.parametrize("task", ["wordseq1_4way", "centre_embedding"])
@pytest.mark.parametrize("categories", [("words", "labels", "colons", "blank_lines"), ("colons",)])
def test_pattern_equals_slow_loops(task, categories, tokenizer):
    for prompt in icl.build_prompts(task, shots=6, seed=1)[:8]:
        found = icl.induction_pattern(prompt.context, tokenizer, categories=categories)
        assert torch.equal(found, slow_pattern(prompt.context, tokenizer, categories))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(260, 700), st.sampled_from(task_names()))
def test_pattern_equals_slow_loops_for_random_tokenizers(seed, vocab_size, task):
    prompts = icl.build_prompts(task, shots=4, seed=seed)
    texts = [p.context.replace("\n\n", "\n\n" if seed % 2 else "\n") for p in prompts[:40]]
    tokenizer = make_tokenizer(texts, vocab_size)
    prompt = prompts[seed % len(prompts)].context
    assert torch.equal(icl.induction_pattern(prompt, tokenizer), slow_pattern(prompt, tokenizer))


@given(st.text(max_size=80))
def test_any_text_gives_a_pattern_or_an_input_error(text):
    tokenizer = make_tokenizer(["a b c"], 260)
    try:
        found = icl.induction_pattern(text, tokenizer)
    except icl.InputError:
        return
    assert found.shape == (len(tokenizer(text).input_ids),) * 2
    assert not found.triu().any()


def test_last_colon_has_no_follower():
    assert prompt_elements("D.\n\nA B:Foo\n\nC D:")[-1].follower is None


@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (3, 1)])
def test_lm_eval_task_has_the_same_prompts_whatever_its_rank(world_size, rank):
    task = load_task("repetition", shots=5, seed=43)
    task.build_all_requests(rank=rank, world_size=world_size)
    prompts = icl.build_prompts("repetition", shots=5, seed=43)
    by_query = {p.context.rpartition("\n\n")[2]: p for p in prompts}
    assert len(task.instances) in (2 * (500 // world_size), 2 * (500 // world_size + 1))
    for instance in task.instances:
        context, choice = instance.args
        prompt = by_query[context.rpartition("\n\n")[2]]
        assert context == prompt.context
        assert choice == prompt.choices[instance.idx]
        assert task.doc_to_target(instance.doc) == prompt.target


def test_lm_eval_finds_all_tasks_and_seed_groups_by_include_path():
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks_dir()), include_defaults=False)
    wanted = {*task_names(), *(f"{name}_seeds" for name in task_names()), "abstract"}
    assert wanted <= set(manager.all_tasks)


def test_prompts_of_one_task_and_three_seeds_take_under_a_second(tokenizer):
    import time

    from icl_helpers.attention.induction_pattern import induction_patterns

    began = time.process_time()
    for seed in (42, 43, 44):
        contexts = [p.context for p in icl.build_prompts("wordseq1_binary", shots=10, seed=seed)]
    induction_patterns(contexts, tokenizer)
    assert time.process_time() - began < 3
    assert np.all([len(c) > 0 for c in contexts])
