"""Text tasks: rendered prompts on rows in each data set's schema, splits, labels, lm-eval tasks."""

from __future__ import annotations

import json
import random
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_helpers as icl
from icl_helpers.files import synthetic_dir, tasks_dir
from icl_helpers.tasks.data import hold_out, load_splits
from icl_helpers.tasks.lm_eval_task import load_task
from icl_helpers.tasks.specs import NLP_TASKS, STAND_IN_TASKS, get_task_spec, task_names
from synthetic.training.corpus import TEXT_TASKS, held_out

# One row in the schema of each data set on the hub, its prompt without demonstrations, and the
# words for label 0 and 1 with semantic and with unrelated labels.
NO_YES, YES_NO, BAR_FOO, FOO_BAR = ("No", "Yes"), ("Yes", "No"), ("Bar", "Foo"), ("Foo", "Bar")
EXAMPLES = {
    "boolq": (
        {
            "question": "is Mount Etna in sicily",
            "passage": "Mount Etna -- A volcano.\nIt is in Sicily.",
            "idx": 0,
            "label": 1,
        },
        "Read the passage and answer the question.\n\nInput: Mount Etna -- A volcano.\nIt is in "
        "Sicily.\n\nIs Mount Etna in sicily?\n\nOutput:",
        NO_YES,
        BAR_FOO,
    ),
    "ethos": (
        {"text": "You are all fine people ", "label": 0},
        "Does the input contain hate speech?\n\nInput: You are all fine people \n\nOutput:",
        NO_YES,
        BAR_FOO,
    ),
    "rte": (
        {"premise": "It rained.", "hypothesis": "It was wet.", "idx": 3, "label": 0},
        "You are given a premise and a hypothesis. Given the premise, tell me if the hypothesis is "
        "correct.\n\nPremise: It rained.\nHypothesis: It was wet.\n\nAnswer:",
        YES_NO,
        FOO_BAR,
    ),
    "sst2": (
        {"idx": 5, "sentence": "a gem of a film ", "label": 1},
        "Classify the review according to its sentiment.\n\nReview: a gem of a film \n\nSentiment:",
        ("Negative", "Positive"),
        BAR_FOO,
    ),
    "subj": (
        {"text": "the plot is thin .", "label": 1, "label_text": "subjective"},
        "Does the input contain personal opinions, feelings, or beliefs?\n\nInput: the plot is "
        "thin .\n\nOutput:",
        NO_YES,
        BAR_FOO,
    ),
    "wic": (
        {
            "word": "place",
            "sentence1": "Do you want to come over to my places later?",
            "sentence2": "A political system with no place for the less prominent groups.",
            "start1": 31,
            "start2": 27,
            "end1": 37,
            "end2": 32,
            "idx": 0,
            "label": 0,
        },
        "You are given two sentences and a word. Tell me whether the word has the same meaning in "
        "both sentences.\n\nWord: places\nSentence 1: Do you want to come over to my places later?"
        "\nSentence 2: A political system with no place for the less prominent groups.\n\nAnswer:",
        NO_YES,
        BAR_FOO,
    ),
    "wsc": (
        {
            "text": "Mark told Pete lies about himself.",
            "span1_index": 0,
            "span2_index": 5,
            "span1_text": "Mark",
            "span2_text": "himself",
            "idx": 0,
            "label": 1,
        },
        "You are given a sentence, a prounoun and a noun. Tell me whether the specified pronoun and "
        "the noun phrase refer to the same entity in the sentence.\n\nSentence: Mark told Pete lies "
        "about himself.\nPronoun: himself\nNoun: Mark\n\nAnswer:",
        NO_YES,
        BAR_FOO,
    ),
}


def variants(row: dict, n: int) -> list[dict]:
    """Rows that differ in a text column, with both labels."""
    column = next(c for c in ("question", "premise", "sentence", "sentence2", "text") if c in row)
    return [{**row, column: f"{row[column]} {i}", "label": i % 3 % 2} for i in range(n)]


def write(folder, rows_by_split: dict[str, list[dict]]) -> None:
    folder.mkdir(parents=True)
    for split, rows in rows_by_split.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def local(tmp_path):
    """A directory with both splits of every NLP task: 20 training rows, 6 to evaluate."""
    for task, (row, *_) in EXAMPLES.items():
        write(
            tmp_path / task,
            {"train": variants(row, 20), "validation": [row] * 1 + variants(row, 5)},
        )
    return tmp_path


def test_every_nlp_task_has_an_example_here():
    assert set(EXAMPLES) == set(NLP_TASKS) == set(task_names("nlp"))


@pytest.mark.parametrize("task", EXAMPLES)
@pytest.mark.parametrize("labels", ["semantic", "unrelated"])
def test_zero_shot_prompt_equals_the_template(task, labels, local):
    row, context, semantic, unrelated = EXAMPLES[task]
    prompt = icl.build_prompts(task, shots=0, seed=42, labels=labels, data=str(local))[0]
    words = semantic if labels == "semantic" else unrelated
    assert prompt.context == context
    assert prompt.choices == tuple(" " + word for word in words)
    assert prompt.target == row["label"]


def slow_contexts(task: str, shots: int, seed: int, words, train, validation) -> list[str]:
    """The draw of section 7 on lists of rows, demonstrations from the training split."""
    description, _, _ = EXAMPLES[task][1].partition("\n\n")
    render = NLP_TASKS[task].render
    rng = random.Random(seed)
    classes = list(dict.fromkeys(row["label"] for row in train))
    contexts = []
    for query in validation:
        counts = [(label, shots // 2) for label in classes]
        more = [label for label, _ in rng.sample(counts, shots % 2)]
        drawn = []
        for label, count in counts:
            rows = [row for row in train if row["label"] == label]
            drawn += rng.sample(rows, min(count + (label in more), len(rows)))
        rng.shuffle(drawn)
        kept = [row for row in drawn if row != query][:shots]
        parts = [f"{render(row)} {words[row['label']]}" for row in kept]
        contexts.append("\n\n".join([description, *parts, render(query)]))
    return contexts


@pytest.mark.parametrize("task", EXAMPLES)
@pytest.mark.parametrize("shots", [5, 10])
def test_few_shot_prompts_equal_a_slow_draw_from_the_training_split(task, shots, local):
    row, _, semantic, unrelated = EXAMPLES[task]
    train, validation = variants(row, 20), [row, *variants(row, 5)]
    for labels, words in (("semantic", semantic), ("unrelated", unrelated)):
        request = {"shots": shots, "seed": 43, "labels": labels, "data": str(local)}
        found = icl.build_prompts(task, **request, demonstrations="published")
        expected = slow_contexts(task, shots, 43, words, train, validation)
        assert [prompt.context for prompt in found] == expected
        # By default a row that was drawn for itself is replaced, the others are as published.
        render = NLP_TASKS[task].render
        for prompt, published, query in zip(
            icl.build_prompts(task, **request), expected, validation, strict=True
        ):
            last = " " + words[query["label"]]
            blocks = prompt.context.removesuffix(render(query))
            assert render(query) + last not in blocks
            assert sum(blocks.count(f" {word}\n\n") for word in words) == shots
            assert prompt.n_demonstrations == shots
            assert prompt.n_dropped == shots - sum(
                published.removesuffix(render(query)).count(f" {word}\n\n") for word in words
            )
            assert prompt.n_dropped or prompt.context == published


@pytest.mark.parametrize("rule", [None, "fewer", "published"])
def test_a_documents_copy_under_another_id_is_left_out_unless_as_published(rule, tmp_path):
    row = EXAMPLES["sst2"][0]
    rows = [{"idx": i, "sentence": f"film {i % 10} ", "label": i % 2} for i in range(20)]
    asked = [{**row, "idx": 100, "sentence": "film  3 "}, {**row, "idx": 101}]
    write(tmp_path / "sst2", {"train": rows, "validation": asked})
    request = {"shots": 16, "seed": 42, "data": str(tmp_path)}
    leaky, clean = icl.build_prompts("sst2", **request, demonstrations=rule)
    copies = leaky.context.count("Review: film 3 ") + leaky.context.count("Review: film  3 ") - 1
    assert leaky.context.count("Sentiment:") == 17
    assert (copies > 0) == (rule == "published")
    assert (leaky.n_leaked, leaky.n_leaked + leaky.n_dropped > 0) == (copies, True)
    assert (clean.n_leaked, clean.n_dropped, clean.n_demonstrations) == (0, 0, 16)
    if rule != "published":
        # Ten rows of the class and two of them the document's: eight are no nine.
        with pytest.raises(icl.InputError, match=r"sst2, training split \(.*class '1' has 8 rows"):
            icl.build_prompts("sst2", **{**request, "shots": 18})
        found = icl.build_prompts("sst2", **{**request, "shots": 18}, demonstrations="fewer")
        assert [prompt.n_demonstrations for prompt in found] == [17, 18]
        assert [p.context.count("Sentiment:") - 1 for p in found] == [17, 18]


def test_demonstrations_are_the_same_for_both_label_sets(local):
    both = [
        icl.build_prompts("sst2", shots=10, seed=42, labels=labels, data=str(local))
        for labels in ("semantic", "unrelated")
    ]
    for semantic, unrelated in zip(*both, strict=True):
        swapped = semantic.context.replace(": Negative", ": Bar").replace(": Positive", ": Foo")
        assert swapped == unrelated.context


@pytest.mark.parametrize(
    ("name", "label"), [("boolq", True), ("rte", "entailment"), ("wic", "False")]
)
def test_labels_may_be_the_data_sets_own_names(name, label, local):
    row = {**EXAMPLES[name][0], "label": label}
    (local / name / "validation.jsonl").write_text(json.dumps(row))
    prompt = icl.build_prompts(name, shots=0, seed=42, data=str(local))[0]
    assert prompt.target == {"boolq": 1, "rte": 0, "wic": 0}[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": -1}, "label must be 0.*got -1"),
        ({"label": None}, "label must be 0.*got None"),
        ({"sentence": None}, r"validation.jsonl, row 0: expected the columns sentence \(str\)"),
    ],
)
def test_malformed_row_is_named(change, message, local):
    (local / "sst2" / "validation.jsonl").write_text(
        json.dumps({**EXAMPLES["sst2"][0], **change}) + "\n"
    )
    with pytest.raises(icl.InputError, match=message):
        icl.build_prompts("sst2", shots=0, seed=42, data=str(local))


def test_line_that_is_not_json_is_named(local):
    with (local / "rte" / "train.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(icl.InputError, match=r"train.jsonl, line 21"):
        icl.build_prompts("rte", shots=0, seed=42, data=str(local))


def test_line_separators_inside_a_text_are_kept(local):
    row = {"text": "one\u2028two\x85three", "label": 0}
    (local / "subj" / "validation.jsonl").write_text(
        json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    prompt = icl.build_prompts("subj", shots=0, seed=42, data=str(local))[0]
    assert "Input: one\u2028two\x85three\n\nOutput:" in prompt.context


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "random"}, "semantic.*unrelated.*random"),
        ({"shots": 21}, "21 shots.*at most 20"),
        ({"data": "/nowhere"}, "sst2/train.jsonl.*nowhere"),
    ],
)
def test_bad_request_is_explained(change, message, local):
    request = {"shots": 5, "seed": 42, "data": str(local), **change}
    with pytest.raises(icl.InputError, match=message):
        icl.build_prompts("sst2", **request)


def test_missing_local_file_is_named(local):
    (local / "wic" / "validation.jsonl").unlink()
    with pytest.raises(icl.MissingArtefactError, match=r"wic/validation.jsonl is missing"):
        icl.build_prompts("wic", shots=0, seed=42, data=str(local))


def test_test_split_serves_as_validation_where_the_task_says_so(local):
    folder = local / "subj"
    (folder / "validation.jsonl").rename(folder / "test.jsonl")
    assert len(icl.build_prompts("subj", shots=0, seed=42, data=str(local))) == 6


@settings(deadline=None)
@given(st.integers(2, 400), st.integers(0, 5))
def test_hold_out_parts_the_rows_four_to_one_and_is_reproducible(n, seed):
    rows = [{"text": str(i), "label": i % 2} for i in range(n)]
    train, validation = hold_out(rows, seed=seed)
    assert len(train) == n * 4 // 5
    assert sorted([*train, *validation], key=lambda row: int(row["text"])) == rows
    assert (train, validation) == hold_out(rows, seed=seed)


def test_ethos_without_a_validation_file_is_split_by_the_fixed_seed(local):
    (local / "ethos" / "validation.jsonl").unlink()
    splits = load_splits(get_task_spec("ethos"), data=str(local))
    assert (len(splits.train), len(splits.validation)) == (16, 4)
    order = list(range(20))
    random.Random(42).shuffle(order)
    rows = variants(EXAMPLES["ethos"][0], 20)
    assert list(splits.validation) == [rows[i] for i in sorted(order[16:])]


class FakeHub:
    """Stands in for ``datasets.load_dataset``; remembers what was asked for."""

    def __init__(self, splits):
        self.splits, self.asked = splits, []

    def __call__(self, path, config=None, *, split, revision=None):
        self.asked.append((path, config, split, revision))
        if split not in self.splits:
            raise ConnectionError("offline")
        return types.SimpleNamespace(to_list=lambda: list(self.splits[split]))


@pytest.mark.parametrize("task", EXAMPLES)
def test_rows_from_the_hub_give_the_prompts_of_local_files(task, local, monkeypatch):
    import datasets

    row = EXAMPLES[task][0]
    hub = NLP_TASKS[task].hub
    train, validation = variants(row, 20), [row, *variants(row, 5)]
    fake = FakeHub({"train": train, hub.validation: validation})
    monkeypatch.setattr(datasets, "load_dataset", fake)
    sys.modules["icl_helpers.tasks.data"]._from_hub.cache_clear()
    if hub.validation is None:
        (local / task / "validation.jsonl").unlink()
    found = icl.build_prompts(task, shots=4, seed=42)
    sys.modules["icl_helpers.tasks.data"]._from_hub.cache_clear()
    assert found == icl.build_prompts(task, shots=4, seed=42, data=str(local))
    assert {asked[0] for asked in fake.asked} == {hub.path}


def test_unreachable_hub_says_where_to_put_files(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", FakeHub({}))
    with pytest.raises(icl.MissingArtefactError, match=r"rte/train.jsonl"):
        icl.build_prompts("rte", shots=5, seed=42)


@pytest.mark.parametrize("task", STAND_IN_TASKS)
def test_stand_in_documents_are_held_out_of_training(task):
    splits = load_splits(get_task_spec(task))
    validation = {row["text"] for row in splits.validation}
    train = {row["text"] for row in splits.train}
    assert all(held_out(text) for text in validation)
    assert not any(held_out(text) for text in train)
    assert len(validation) == len(splits.validation)
    for rows in (splits.train, splits.validation):
        assert sum(row["label"] for row in rows) * 2 == len(rows)


@pytest.mark.parametrize("source", TEXT_TASKS, ids=lambda task: task.name)
def test_stand_in_prompt_has_the_form_the_model_was_trained_on(source):
    spec = get_task_spec(source.name)
    row = load_splits(spec).validation[0]
    prompt = icl.build_prompts(source.name, shots=0, seed=42)[0]
    assert prompt.context == f"{source.description}\n\n{source.block(row['text'])}"
    assert prompt.choices == tuple(" " + label for label in source.labels)


@pytest.mark.slow
def test_text_rows_are_regenerated_to_the_same_bytes(tmp_path):
    import subprocess

    script = synthetic_dir() / "generate.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, capture_output=True)
    made = sorted((tmp_path / "text").rglob("*.jsonl"))
    assert len(made) == 4
    for path in made:
        assert path.read_bytes() == (synthetic_dir() / path.relative_to(tmp_path)).read_bytes()


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_lm_eval_task_has_the_prompts_of_build_prompts(rank, world_size, local):
    task = load_task("wsc", shots=5, seed=43, labels="unrelated", data=str(local))
    task.build_all_requests(rank=rank, world_size=world_size)
    prompts = icl.build_prompts("wsc", shots=5, seed=43, labels="unrelated", data=str(local))
    assert len(task.instances) == 2 * len(prompts[rank::world_size])
    for instance in task.instances:
        prompt = prompts[instance.doc["doc_id"]]
        assert instance.args == (prompt.context, prompt.choices[instance.idx])
        assert task.doc_to_target(instance.doc) == prompt.target


def test_lm_eval_loads_every_nlp_variant_and_group_by_include_path(local):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(tasks_dir()), include_defaults=False, metadata={"data": str(local)}
    )
    names = [f"{task}{suffix}" for task in task_names("nlp") for suffix in ("", "_sul")]
    loaded = manager.load([*names, "nlp_seeds", "nlp_sul_seeds"])["tasks"]
    assert len(loaded) == 14 * 4
    for name, task in loaded.items():
        base, _, seed = name.partition("_seed")
        task.set_config("num_fewshot", 5)
        task.set_fewshot_seed(7)
        task.build_all_requests()
        prompts = icl.build_prompts(
            base.removesuffix("_sul"),
            shots=5,
            seed=int(seed or 7),
            labels="unrelated" if base.endswith("_sul") else "semantic",
            data=str(local),
        )
        expected = [(p.context, choice) for p in prompts for choice in p.choices]
        assert [instance.args for instance in task.instances] == expected


def test_stand_in_groups_load_without_any_download():
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks_dir()), include_defaults=False)
    loaded = manager.load(["stand_in", "stand_in_sul", "stand_in_sul_seeds"])["tasks"]
    assert len(loaded) == 2 * (1 + 1 + 3)
