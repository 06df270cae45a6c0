"""The tasks by name: data, prompts, labels and sampler (paper, sections 6 to 8).

They are listed in ``specs.yaml`` beside this file. A text task renders a document from a row in its
data set's own schema; its prompt is the description, the demonstrations (drawn balanced from the
training split) and the document, separated by blank lines, with one space before each label.

Example
-------
>>> NLP_TASKS["sst2"].render({"sentence": "a fine film", "label": 1})
'Review: a fine film\\n\\nSentiment:'
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic.dataclasses import dataclass

from icl_helpers.errors import InputError

__all__ = [
    "DESCRIPTION", "NLP_TASKS", "SAMPLINGS", "STAND_IN_TASKS", "HubSource", "Sampler", "TaskSpec",
    "TextTaskSpec", "chance_level", "get_task_spec", "pattern_spec", "task_kind", "task_name",
    "task_names", "task_title", "text_spec",
]  # fmt: skip

DESCRIPTION = (
    "Below is a list of various sequences. Your task is to classify each sequence. Use the "
    "examples provided to understand how to classify each sequence correctly."
)
Sampler = Literal["balanced", "disjoint_words"]
# How a limit takes documents of a task.
SAMPLINGS = ("balanced", "first")


@dataclass(frozen=True)
class HubSource:
    """Where a data set lies on the Hugging Face hub.

    ``validation`` None: it has a training split only, of which a fifth is held out (``hold_out``).
    """

    path: str
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    validation: str | None = "validation"


@dataclass(frozen=True)
class TaskSpec:
    """One abstract pattern task; ``specs.yaml`` says what its fields mean."""

    name: str
    field: str
    choices: tuple[str, ...]
    sampler: Sampler
    default_shots: tuple[int, ...]
    original_file: str
    default_labels: str = "unrelated"
    description: str = DESCRIPTION


@dataclass(frozen=True)
class TextTaskSpec:
    """One text classification task; ``columns`` are those that :meth:`render` reads, with types.

    ``hub`` is None for a stand-in. ``specs.yaml`` says what the other fields mean.
    """

    name: str
    description: str
    columns: tuple[tuple[str, type], ...]
    template: str
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
        """Return the words of labels 0 and 1; None: the default set. Raises :class:`InputError`."""
        if label_set not in (None, "semantic", "unrelated"):
            raise InputError(
                f"labels of task {self.name} are 'semantic' or 'unrelated', got {label_set!r}"
            )
        return self.unrelated if label_set == "unrelated" else self.semantic

    def render(self, row: Mapping[str, Any]) -> str:
        """Return the document of a row, up to where its label stands."""
        values = dict(row)
        if "{Question}" in self.template:
            values["Question"] = row["question"][:1].upper() + row["question"][1:]
        if "{word}" in self.template:
            values["word"] = row["sentence1"][row["start1"] : row["end1"]]
        return self.template.format_map(values)


def _text_spec(name: str, entry: dict[str, Any]) -> TextTaskSpec:
    kinds = {"str": str, "int": int}
    columns = tuple((column, kinds[kind]) for column, kind in entry["columns"].items())
    return TextTaskSpec(name=name, **entry | {"columns": columns})


_LISTED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
_TASKS = {name: TaskSpec(name=name, **entry) for name, entry in _LISTED["abstract"].items()}
NLP_TASKS = {name: _text_spec(name, entry) for name, entry in _LISTED["nlp"].items()}
STAND_IN_TASKS = {name: _text_spec(name, entry) for name, entry in _LISTED["stand_in"].items()}


def task_names(group: str = "abstract") -> list[str]:
    """Return the names of a group's tasks.

    ``abstract``: the pattern tasks; ``nlp``: the paper's NLP tasks, whose data come from the hub;
    ``stand_in``: the embedded text tasks in their place; ``all``: every task.
    """
    if group == "all":
        return [name for tasks in _LISTED.values() for name in tasks]
    if group not in _LISTED:
        raise InputError(f"unknown group {group!r}; the groups are {', '.join(_LISTED)} and all")
    return list(_LISTED[group])


def get_task_spec(name: str) -> TaskSpec | TextTaskSpec:
    """Return the task of that name; raises :class:`InputError` naming the tasks there are."""
    spec = _TASKS.get(name) or NLP_TASKS.get(name) or STAND_IN_TASKS.get(name)
    if spec is None:
        raise InputError(f"unknown task {name!r}; the tasks are {', '.join(task_names('all'))}")
    return spec


def pattern_spec(name: str) -> TaskSpec:
    """Return the abstract task of that name; raises :class:`InputError` for any other."""
    spec = get_task_spec(name)
    if not isinstance(spec, TaskSpec):
        raise InputError(f"task {name!r} is a text task; needed: one of {', '.join(_TASKS)}")
    return spec


def text_spec(name: str) -> TextTaskSpec:
    """Return the text task of that name; raises :class:`InputError` for any other."""
    spec = get_task_spec(name)
    if not isinstance(spec, TextTaskSpec):
        names = ", ".join([*NLP_TASKS, *STAND_IN_TASKS])
        raise InputError(f"task {name!r} is an abstract task; needed: one of {names}")
    return spec


def chance_level(task: object) -> float:
    """Return the accuracy of guessing in a task, in percent."""
    return 100 / len(get_task_spec(str(task)).choices)


def task_kind(task: str, labels: str) -> str:
    """Return the kind whose tasks may be summed up together.

    ``letters``, ``words, two labels``, ``words, four labels``, ``text, semantic labels`` or
    ``text, unrelated labels``.
    """
    spec = get_task_spec(task)
    if isinstance(spec, TextTaskSpec):
        return f"text, {labels} labels"
    if spec.sampler == "balanced":
        return "letters"
    return f"words, {'four' if len(spec.choices) > 2 else 'two'} labels"


_TASK_NAMES = {
    "wordseq1_binary": "word sequences 1", "wordseq2_binary": "word sequences 2",
    "wordseq1_4way": "four-way word sequences 1", "wordseq2_4way": "four-way word sequences 2",
    "sst2": "SST-2", "subj": "Subj", "wic": "WiC", "rte": "RTE", "ethos": "ETHOS", "wsc": "WSC",
    "boolq": "BoolQ",
}  # fmt: skip


def task_name(task: str) -> str:
    """Name a task in a sentence, as on the page on the method."""
    return _TASK_NAMES.get(task, task.replace("_", " "))


def task_title(task: str) -> str:
    """Name a task where a sentence begins."""
    name = task_name(task)
    return name[:1].upper() + name[1:]
