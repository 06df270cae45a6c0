"""The tasks by name: data, prompts, labels and sampler (paper, sections 6 to 8).

A text task renders a document from a row in its data set's own schema; its prompt is the
description, the demonstrations (drawn balanced from the training split) and the document, separated
by blank lines, with one space before each label. Adding a task is one entry here and its YAML files
in ``tasks/``.

Example
-------
>>> NLP_TASKS["sst2"].render({"sentence": "a fine film", "label": 1})
'Review: a fine film\\n\\nSentiment:'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from icl_helpers.errors import InputError

__all__ = [
    "DEMONSTRATION_SEEDS",
    "DESCRIPTION",
    "NLP_TASKS",
    "STAND_IN_TASKS",
    "HubSource",
    "Sampler",
    "TaskSpec",
    "TextTaskSpec",
    "get_task_spec",
    "pattern_spec",
    "task_names",
    "text_spec",
]


Row = Mapping[str, Any]


@dataclass(frozen=True)
class HubSource:
    """Where a data set lies on the Hugging Face hub, as parquet files (no dataset script).

    ``validation`` is None where the data set has a training split only: a fifth of it, drawn by a
    fixed seed, is then held out (see :func:`icl_helpers.tasks.data.hold_out`).
    """

    path: str
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    validation: str | None = "validation"


@dataclass(frozen=True)
class TextTaskSpec:
    """One text classification task.

    ``columns`` maps the columns that ``render`` reads to their type. ``label_names`` are the data
    set's own names of labels 0 and 1, which a local file may use instead of the numbers.
    ``semantic`` and ``unrelated`` are the words shown for labels 0 and 1. ``hub`` is None for a
    stand-in, whose rows travel with this project.
    """

    name: str
    description: str
    columns: tuple[tuple[str, type], ...]
    render: Callable[[Row], str]
    semantic: tuple[str, str]
    unrelated: tuple[str, str]
    label_names: tuple[str, str]
    hub: HubSource | None = None
    default_shots: tuple[int, ...] = (0, 5, 10)
    default_labels: Literal["semantic", "unrelated"] = "semantic"
    sampler: Literal["balanced"] = "balanced"

    @property
    def choices(self) -> tuple[str, str]:
        """Words of the default labels, without the space before them."""
        return self.semantic

    def labels(self, label_set: str | None) -> tuple[str, str]:
        """Words of labels 0 and 1; None: the default set. Raises :class:`InputError`."""
        if label_set not in (None, "semantic", "unrelated"):
            raise InputError(
                f"labels of task {self.name} are 'semantic' or 'unrelated', got {label_set!r}"
            )
        return self.unrelated if label_set == "unrelated" else self.semantic


def _boolq(row: Row) -> str:
    question = row["question"][:1].upper() + row["question"][1:]
    return f"Input: {row['passage']}\n\n{question}?\n\nOutput:"


def _input(row: Row) -> str:
    return f"Input: {row['text']}\n\nOutput:"


def _rte(row: Row) -> str:
    return f"Premise: {row['premise']}\nHypothesis: {row['hypothesis']}\n\nAnswer:"


def _sst2(row: Row) -> str:
    return f"Review: {row['sentence']}\n\nSentiment:"


def _review(row: Row) -> str:
    return f"Review: {row['text']}\n\nSentiment:"


def _wic(row: Row) -> str:
    word = row["sentence1"][row["start1"] : row["end1"]]
    return (
        f"Word: {word}\nSentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}\n\nAnswer:"
    )


def _wsc(row: Row) -> str:
    return (
        f"Sentence: {row['text']}\nPronoun: {row['span2_text']}\nNoun: {row['span1_text']}"
        f"\n\nAnswer:"
    )


def _strings(*names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, str) for name in names)


_NO_YES = ("No", "Yes")
_BAR_FOO = ("Bar", "Foo")
_FALSE_TRUE = ("False", "True")
_OPINION = "Does the input contain personal opinions, feelings, or beliefs?"
_SENTIMENT = "Classify the review according to its sentiment."

NLP_TASKS = {
    spec.name: spec
    for spec in (
        TextTaskSpec(
            "boolq", "Read the passage and answer the question.", _strings("question", "passage"),
            _boolq, _NO_YES, _BAR_FOO, _FALSE_TRUE, HubSource("aps/super_glue", "boolq"),
        ),
        TextTaskSpec(
            "ethos", "Does the input contain hate speech?", _strings("text"), _input, _NO_YES,
            _BAR_FOO, ("no_hate_speech", "hate_speech"),
            HubSource("iamollas/ethos", "binary", "refs/convert/parquet", validation=None),
        ),
        TextTaskSpec(
            "rte",
            "You are given a premise and a hypothesis. Given the premise, tell me if the "
            "hypothesis is correct.",
            _strings("premise", "hypothesis"), _rte, ("Yes", "No"), ("Foo", "Bar"),
            ("entailment", "not_entailment"), HubSource("aps/super_glue", "rte"),
        ),
        TextTaskSpec(
            "sst2", _SENTIMENT, _strings("sentence"), _sst2, ("Negative", "Positive"), _BAR_FOO,
            ("negative", "positive"), HubSource("stanfordnlp/sst2"),
        ),
        TextTaskSpec(
            "subj", _OPINION, _strings("text"), _input, _NO_YES, _BAR_FOO,
            ("objective", "subjective"), HubSource("SetFit/subj", validation="test"),
        ),
        TextTaskSpec(
            "wic",
            "You are given two sentences and a word. Tell me whether the word has the same meaning "
            "in both sentences.",
            (*_strings("sentence1", "sentence2"), ("start1", int), ("end1", int)), _wic, _NO_YES,
            _BAR_FOO, _FALSE_TRUE, HubSource("aps/super_glue", "wic"),
        ),
        TextTaskSpec(
            "wsc",
            # The misspelt word is the published prompt's.
            "You are given a sentence, a prounoun and a noun. Tell me whether the specified "
            "pronoun and the noun phrase refer to the same entity in the sentence.",
            _strings("text", "span1_text", "span2_text"), _wsc, _NO_YES, _BAR_FOO, _FALSE_TRUE,
            HubSource("aps/super_glue", "wsc.fixed"),
        ),
    )
}  # fmt: skip

STAND_IN_TASKS = {
    spec.name: spec
    for spec in (
        TextTaskSpec(
            "review_sentiment", _SENTIMENT, _strings("text"), _review, ("Negative", "Positive"),
            _BAR_FOO, ("negative", "positive"),
        ),
        TextTaskSpec(
            "fact_opinion", _OPINION, _strings("text"), _input, _NO_YES, _BAR_FOO,
            ("fact", "opinion"),
        ),
    )
}  # fmt: skip

Sampler = Literal["balanced", "disjoint_words"]

DEMONSTRATION_SEEDS = (42, 43, 44)
DESCRIPTION = (
    "Below is a list of various sequences. Your task is to classify each sequence. Use the "
    "examples provided to understand how to classify each sequence correctly."
)


@dataclass(frozen=True)
class TaskSpec:
    """One task.

    ``field`` names the text of a row, ``original_file`` its file in the published repository.
    ``sampler`` is balanced, or disjoint_words: demonstrations share no word with the query in its
    place (the published "synthetic" sampler).
    """

    name: str
    field: str
    choices: tuple[str, ...]
    sampler: Sampler
    default_shots: tuple[int, ...]
    original_file: str
    original_name: str
    default_labels: str = "unrelated"
    description: str = DESCRIPTION


def _letters(name: str) -> TaskSpec:
    return TaskSpec(
        name, "sequence", ("Foo", "Bar"), "balanced", (0, 5, 10), f"{name}_dataset_500.json", name
    )


_TASKS = {
    spec.name: spec
    for spec in (
        _letters("repetition"),
        _letters("recursion"),
        _letters("centre_embedding"),
        TaskSpec(
            "wordseq1_binary", "text", ("Foo", "Bar"), "disjoint_words", (0, 5, 10),
            "fruit-animal_furniture-profession_500.json", "f_a_f_p",
        ),
        TaskSpec(
            "wordseq2_binary", "text", ("Foo", "Bar"), "disjoint_words", (0, 5, 10),
            "vegetable-vehicle_body-instrument_500.json", "v_v_b_i",
        ),
        TaskSpec(
            "wordseq1_4way", "text", ("Foo", "Bar", "Mur", "Res"), "disjoint_words", (0, 20),
            "f_a_f_p_four_way.json", "f_a_f_p_4way",
        ),
        TaskSpec(
            "wordseq2_4way", "text", ("Foo", "Bar", "Mur", "Res"), "disjoint_words", (0, 20),
            "v_v_b_i_four_way.json", "v_v_b_i_4way",
        ),
    )
}  # fmt: skip


_GROUPS: dict[str, tuple[str, ...]] = {
    "abstract": tuple(_TASKS),
    "nlp": tuple(NLP_TASKS),
    "stand_in": tuple(STAND_IN_TASKS),
}


def task_names(group: str = "abstract") -> list[str]:
    """Names of a group's tasks.

    ``abstract``: the pattern tasks; ``nlp``: the paper's NLP tasks, whose data come from the hub;
    ``stand_in``: the embedded text tasks in their place; ``all``: every task.
    """
    if group == "all":
        return [name for names in _GROUPS.values() for name in names]
    if group not in _GROUPS:
        raise InputError(f"unknown group {group!r}; the groups are {', '.join(_GROUPS)} and all")
    return list(_GROUPS[group])


def get_task_spec(name: str) -> TaskSpec | TextTaskSpec:
    """The task of that name; raises :class:`InputError` naming the tasks there are."""
    spec = _TASKS.get(name) or NLP_TASKS.get(name) or STAND_IN_TASKS.get(name)
    if spec is None:
        raise InputError(f"unknown task {name!r}; the tasks are {', '.join(task_names('all'))}")
    return spec


def pattern_spec(name: str) -> TaskSpec:
    """The abstract task of that name; raises :class:`InputError` for any other."""
    spec = get_task_spec(name)
    if not isinstance(spec, TaskSpec):
        raise InputError(f"task {name!r} is a text task; needed: one of {', '.join(_TASKS)}")
    return spec


def text_spec(name: str) -> TextTaskSpec:
    """The text task of that name; raises :class:`InputError` for any other."""
    spec = get_task_spec(name)
    if not isinstance(spec, TextTaskSpec):
        names = ", ".join([*NLP_TASKS, *STAND_IN_TASKS])
        raise InputError(f"task {name!r} is an abstract task; needed: one of {names}")
    return spec
