"""What the embedded model never saw, that its training repeats and resumes, and what it can do."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import random
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

import icl_helpers as icl
from icl_helpers.attention.heads import head_fractions
from icl_helpers.files import embedded_dir, synthetic_dir
from icl_helpers.tasks.specs import get_task_spec
from synthetic.training.__main__ import main
from synthetic.training.batches import build_tokenizer, episode_batch, repeat_batch
from synthetic.training.corpus import (
    DESCRIPTION,
    HELD_OUT_LABELS,
    NAMING_DESCRIPTION,
    TEXT_TASKS,
    draw_labels,
    episode,
    evaluation_rows,
    label_pool,
    naming_episode,
    pattern_names,
    patterns,
    reference_text,
    text_episode,
)
from synthetic.training.measure import COLUMNS, measure_training, repeat_losses
from synthetic.training.recipe import Phase, checkpoint_due, phase_at
from synthetic.training.train import Recipe, read_progress, train

SMALL = Recipe(
    vocab_size=600, hidden_size=16, intermediate_size=16, n_layers=2, n_heads=4, n_kv_heads=2,
    head_dim=4, repeat_steps=4, widening_steps=1, episode_steps=6, pattern_steps=2, episode_rows=4,
    repeat_vocab=200,
)  # fmt: skip


def parsed(text: str) -> list[tuple[list[str], str]]:
    """(elements, label) of every block of an abstract episode."""
    body = text.removeprefix(DESCRIPTION + "\n\n").strip("\n")
    return [
        (block.rpartition(":")[0].split(), block.rpartition(":")[2]) for block in body.split("\n\n")
    ]


def canonical(elements: list[str]) -> str:
    order = list(dict.fromkeys(elements))
    return "".join("ABCDE"[order.index(e)] for e in elements)


def test_description_is_that_of_the_tasks():
    assert get_task_spec("repetition").description == DESCRIPTION


def test_held_out_labels_pairs_and_patterns_never_occur():
    words = json.loads((synthetic_dir() / "words.json").read_text())
    category = {w: c for c, members in words.items() for w in members}
    tasks = [
        ("fruits", "animals"), ("furniture", "professions"), ("furniture", "animals"),
        ("fruits", "professions"), ("vegetables", "vehicles"), ("body_parts", "instruments"),
        ("vegetables", "instruments"), ("body_parts", "vehicles"),
    ]  # fmt: skip
    rng = random.Random(0)
    pairs, shapes, seen_labels, seen_words = Counter(), Counter(), Counter(), set()
    for _ in range(6000):
        blocks = parsed(episode(rng, fresh=rng.random()).text)
        labels = {label for _, label in blocks}
        seen_labels.update(labels)
        assert len(labels & set(HELD_OUT_LABELS)) <= 1
        if len(blocks[0][0]) == 2:
            pairs.update((category.get(a), category.get(b)) for (a, b), _ in blocks)
            seen_words.update(word for elements, _ in blocks for word in elements)
        else:
            found = {canonical(elements) for elements, _ in blocks}
            shapes.update(found)
            assert not {"ABAB", "ABCD"} <= found
            assert not {"ABCBA", "ABCDE"} <= found
    assert not set(tasks) & set(pairs)
    assert "ABBB" not in shapes
    # The rest is there: every word, the held-out labels one at a time, the patterns elsewhere.
    assert set(category) <= seen_words
    assert all(seen_labels[label] for label in HELD_OUT_LABELS)
    assert shapes["ABAB"]
    assert shapes["ABCBA"]
    assert shapes["ABCD"]
    assert shapes["ABCDE"]


def test_named_patterns_keep_the_held_out_pattern_pairings_and_labels_away():
    rng = random.Random(5)
    names = pattern_names()
    assert len(set(names.values())) == len(names) == 2 + 5 + 14 + 52
    assert not set(names.values()) & set(label_pool())
    for _ in range(2000):
        text = naming_episode(rng).text
        assert text.startswith(NAMING_DESCRIPTION + "\n\n")
        blocks = parsed(text.removeprefix(NAMING_DESCRIPTION + "\n\n"))
        found = {canonical(elements) for elements, _ in blocks}
        assert all(names[canonical(elements)] == label for elements, label in blocks)
        assert "ABBB" not in found
        assert not {"ABAB", "ABCD"} <= found
        assert not {"ABCBA", "ABCDE"} <= found


def test_patterns_are_all_equality_patterns_but_the_held_out_one():
    assert len(patterns(3)) == 5
    assert len(patterns(4)) == 15 - 1
    assert len(patterns(5)) == 52


def test_labels_differ_in_frequency_as_words_do():
    rng = random.Random(8)
    counts = Counter(label for _ in range(30000) for label in draw_labels(rng, 2))
    expected = [1 / (rank + 6) for rank in range(len(label_pool()))]
    share = [counts[label] / counts.total() for label in label_pool()]
    assert share[0] / share[9] == pytest.approx(expected[0] / expected[9], rel=0.15)
    held_out = [counts[label] for label in HELD_OUT_LABELS]
    assert held_out == sorted(held_out, reverse=True)
    assert all(a > 2 * b for a, b in itertools.pairwise(held_out))


def test_episode_weights_fall_on_labels_that_were_seen():
    rng = random.Random(1)
    for make in (lambda: episode(rng, fresh=0.5), lambda: text_episode(rng)):
        for _ in range(200):
            item = make()
            seen: set[str] = set()
            for start, weight in item.labels:
                label = item.text[start:].split("\n\n")[0]
                assert label.strip().isalpha()
                assert weight == 1.0 or label not in seen
                seen.add(label)


@pytest.mark.parametrize("task", TEXT_TASKS, ids=lambda t: t.name)
def test_evaluation_sentences_never_occur_in_training_text(task):
    rows = evaluation_rows(task)
    held = {row["text"] for row in rows["validation"]}
    assert Counter(row["label"] for row in rows["validation"]) == {0: 50, 1: 50}
    assert not held & {row["text"] for row in rows["train"]}
    rng = random.Random(2)
    for _ in range(3000):
        text = text_episode(rng, n_shots=5).text
        found = {
            line.partition(": ")[2] for line in text.split("\n\n") if line.startswith(task.field)
        }
        assert not held & found
    assert not any(
        s[0].upper() + s[1:] + "." in reference_text(rng) for s in held for _ in range(3)
    )


def test_repeated_sequences_repeat_and_mark_what_followed():
    batch = repeat_batch(random.Random(3), vocab_size=100, rows=6, length=24, pool=20, watched=6)
    for row, ids in enumerate(batch.ids.tolist()):
        scored = batch.weights[row].nonzero().flatten().tolist()
        period = scored[0] - 1
        assert all(ids[i] == ids[i - period] for i in range(period, 24))
        for query, key in batch.induction[row].nonzero().tolist():
            assert (query - (key - 1)) % period == 0
            assert key - 1 < query


def test_episode_batches_weigh_the_label_tokens():
    tokenizer = build_tokenizer(vocab_size=1500)
    batches = episode_batch(
        random.Random(4), tokenizer, rows=10, fresh=1.0, text_share=0.0, watched=5, max_tokens=256
    )
    assert float(sum(batch.weights.sum() for batch in batches)) == pytest.approx(1.0)
    colon = tokenizer.convert_tokens_to_ids(":")
    for batch in batches:
        rows, columns = batch.weights.nonzero(as_tuple=True)
        assert (batch.ids[rows, columns - 1] == colon).all()
        query = batch.induction.nonzero()
        assert (batch.ids[query[:, 0], query[:, 1]] == colon).all()
        assert (batch.ids[query[:, 0], query[:, 2] - 1] == colon).all()


def test_labels_that_cannot_be_known_weigh_as_told():
    tokenizer = build_tokenizer(vocab_size=1500)
    options = {"rows": 6, "fresh": 1.0, "text_share": 0.0, "watched": 1, "max_tokens": 256}
    known = episode_batch(random.Random(9), tokenizer, **options)
    every = episode_batch(random.Random(9), tokenizer, unseen_weight=0.25, **options)
    ratios = []
    for plain, with_unseen in zip(known, every, strict=True):
        extra = (with_unseen.weights > 0) & (plain.weights == 0)
        seen = plain.weights > 0
        assert extra.any()
        # The first label of every row can never be known.
        first = with_unseen.weights.gt(0).float().argmax(dim=1)
        assert extra[torch.arange(len(first)), first].all()
        ratios.append(with_unseen.weights[extra].mean() / with_unseen.weights[seen].mean())
    assert ratios == pytest.approx([0.25, 0.25])


def test_episodes_begin_once_induction_heads_have_formed():
    recipe = Recipe(repeat_steps=100, widening_steps=10, episode_steps=40, pattern_steps=10)
    assert phase_at(recipe, 70, None) == Phase("repeats", 70)
    names = [phase_at(recipe, step, 60).name for step in range(121)]
    assert names == ["repeats"] * 60 + ["widening"] * 10 + ["episodes"] * 40 + ["patterns"] * 10 + [
        "end"
    ]
    assert phase_at(recipe, 110, 100) == Phase("episodes", 0)
    due = [step for step in range(121) if checkpoint_due(recipe, phase_at(recipe, step, 60))]
    assert {0, 60, 70, 120} <= set(due)
    assert 10 < len(due) < 40


@pytest.mark.slow
def test_a_letter_after_a_space_starts_the_second_phase_as_the_letter_alone(tmp_path):
    output = train(tmp_path, recipe=SMALL, device="cpu").parent
    recipe = Recipe(
        **{**SMALL.__dict__, "episode_learning_rate": 0.0, "pattern_learning_rate": 0.0}
    )
    still = train(tmp_path / "still", recipe=recipe, device="cpu").parent
    vocabulary = build_tokenizer(vocab_size=SMALL.vocab_size).get_vocab()
    spaced, plain = vocabulary["\u0120A"], vocabulary["A"]
    name = "model.embed_tokens.weight"
    begin = SMALL.repeat_steps + SMALL.widening_steps
    before = load_file(still / "checkpoints" / f"step-{begin:06d}.safetensors")[name]
    after = load_file(still / "model" / "model.safetensors")[name]
    assert not torch.equal(before[spaced], before[plain])
    assert torch.equal(after[spaced], after[plain])
    assert torch.equal(after[plain], before[plain])
    trained = load_file(output / "model" / "model.safetensors")[name]
    assert not torch.equal(trained[spaced], trained[plain])


def test_letter_rows_carry_the_name_of_their_pattern():
    tokenizer = build_tokenizer(vocab_size=1500)
    batches = episode_batch(
        random.Random(11), tokenizer, rows=12, fresh=1.0, text_share=0.0, word_share=0.5,
        watched=1, max_tokens=256, unseen_weight=0.1,
    )  # fmt: skip
    named = 0
    for batch in batches:
        for ids, names, weights in zip(batch.ids, batch.names, batch.weights, strict=True):
            labels = weights.nonzero().flatten().tolist()
            text = tokenizer.decode(ids.tolist()).split("<|begin_of_text|>")[0]
            rows = [block for block in text.split("\n\n") if block.count(":") == 1]
            elements = [row.split(":")[0].split() for row in rows]
            found = names[labels].tolist()
            if not any(len(word) > 1 for row in elements for word in row):
                expected = [pattern_names()[canonical(row)] for row in elements]
                assert tokenizer.convert_ids_to_tokens(found) == expected[: len(found)]
                named += 1
            else:
                assert not any(found)
    assert named > 2


@pytest.mark.slow
def test_training_resumed_half_way_gives_the_same_weights(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", recipe=SMALL, device="cpu")
    calls = []
    module = importlib.import_module("synthetic.training.train")
    step = module._step

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(module, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", recipe=SMALL, device="cpu", save_every=2)
    monkeypatch.setattr(module, "_step", step)
    parts = train(tmp_path / "parts", recipe=SMALL, device="cpu", save_every=2)
    first, second = (load_file(path / "model.safetensors") for path in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_progress(tmp_path / "parts") == (13, 4, SMALL)
    other = Recipe(**{**SMALL.__dict__, "seed": 1})
    with pytest.raises(icl.InputError, match="another recipe"):
        train(tmp_path / "parts", recipe=other, device="cpu")


def test_repeat_losses_are_those_of_a_model_that_copies_perfectly():
    class Copier(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, ids):
            logits = torch.zeros(*ids.shape, 20)
            for position in range(5, ids.shape[1]):
                logits[torch.arange(len(ids)), position, ids[:, position - 4]] = 50.0
            return type("Output", (), {"logits": logits})

    sequences = torch.stack([torch.randperm(20)[:5] for _ in range(3)])
    first, last = repeat_losses(Copier(), sequences)
    assert first == pytest.approx(math.log(20))
    assert last == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_dynamics_measure_every_checkpoint_of_a_run(tmp_path, monkeypatch):
    train(tmp_path, recipe=SMALL, device="cpu")
    module = importlib.import_module("synthetic.training.measure")
    monkeypatch.setattr(module, "head_fractions", lambda scores: {"larger": 1 / 8})
    frame = measure_training(tmp_path, tasks=["repetition"], shots=2, limit=4)
    assert list(frame.columns) == COLUMNS
    saved = sorted(path.stem for path in (tmp_path / "checkpoints").iterdir())
    assert [f"step-{step:06d}" for step in sorted(frame.step.unique())] == saved
    counts = frame.groupby("measure").size() / len(saved)
    assert counts["prefix_score"] == 8
    assert counts["accuracy"] == counts["accuracy_without_induction_heads"] == 1
    assert frame.set_index("measure").value["phase_begins"].tolist() == [4 + 1, 4 + 1 + 6]
    assert frame.value.notna().all()
    with pytest.raises(icl.MissingArtefactError, match="no training"):
        measure_training(tmp_path / "nothing")


def test_fractions_follow_the_rule_of_the_threshold():
    scores = torch.tensor([[0.9, 0.3, 0.29, 0.1], [0.0, 0.0, 0.5, 0.2]])
    assert head_fractions(scores) == {"larger": 3 / 8, "smaller": 1 / 8}
    with pytest.raises(icl.InputError, match="no induction heads"):
        head_fractions(torch.zeros(2, 2))


class TestEmbeddedModel:
    @pytest.fixture(scope="class")
    def loaded(self):
        return icl.load_model("icl-tiny")

    @pytest.fixture(scope="class")
    def scores(self, loaded):
        model, tokenizer = loaded
        return icl.prefix_matching_scores(model, icl.random_sequences(tokenizer)).mean(0)

    def test_it_loads_like_any_checkpoint_and_is_small(self):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = embedded_dir() / "icl-tiny"
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.config.model_type == "llama"
        assert model.config.num_key_value_heads < model.config.num_attention_heads
        assert tokenizer("A B").input_ids == tokenizer("A B", add_special_tokens=False).input_ids
        assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6

    def test_some_heads_are_induction_heads_and_most_are_not(self, scores):
        assert float(scores.max()) > 0.5
        assert float((scores < 0.1).float().mean()) > 0.5

    def test_stated_fractions_are_those_of_the_rule(self, scores):
        stated = json.loads((embedded_dir() / "icl-tiny" / "fractions.json").read_text())
        assert stated == pytest.approx(head_fractions(scores))

    def test_word_tasks_are_solved_and_lost_without_the_induction_heads(self, loaded, scores):
        model, tokenizer = loaded
        stated = json.loads((embedded_dir() / "icl-tiny" / "fractions.json").read_text())
        conditions = icl.conditions(
            scores, fractions=[stated["larger"]], ablations=["zero"], control="strict"
        )
        results = icl.evaluate(
            model,
            tokenizer,
            tasks=["wordseq1_binary"],
            shots=10,
            seeds=[42],
            limit=100,
            conditions=conditions,
        )
        full, removed, *control = results["accuracy"]
        assert full > 0.9
        assert removed < full - 0.3
        assert all(full - accuracy < (full - removed) / 3 for accuracy in control)

    def test_letter_patterns_are_solved_and_lost_when_the_pattern_is_blocked(self, loaded, scores):
        model, tokenizer = loaded
        stated = json.loads((embedded_dir() / "icl-tiny" / "fractions.json").read_text())
        conditions = icl.conditions(
            scores, fractions=[stated["larger"]], ablations=["knockout"], full=True
        )
        results = icl.evaluate(
            model,
            tokenizer,
            tasks=["repetition", "recursion", "centre_embedding"],
            shots=10,
            seeds=[42],
            limit=100,
            conditions=conditions,
        )
        accuracy = results.pivot(index="task", columns="condition", values="accuracy")
        assert (accuracy["full"] > 0.85).all()
        assert (accuracy["induction_pattern"] < 0.7).all()


@pytest.mark.parametrize(
    ("command", "message"),
    [(["train", "a-file"], "cannot write a-file/"), (["measure", "a-file"], "a-file")],
)
def test_file_in_place_of_a_training_is_named(command, message, refuses_a_file):
    refuses_a_file(main, command, message)
