"""The tasks by name; the abstract pattern tasks' rows, labels and sampler (paper, section 6).

Adding an abstract task is one entry here and one YAML file in ``tasks/``; text tasks are listed in
:mod:`icl_helpers.nlp_tasks`.
"""

from __future__ import annotations

from dataclasses import dataclass

from icl_helpers.errors import InputError
from icl_helpers.nlp_tasks import NLP_TASKS, STAND_IN_TASKS, TextTaskSpec
from icl_helpers.sampling import Sampler

__all__ = [
    "DEMONSTRATION_SEEDS",
    "DESCRIPTION",
    "TaskSpec",
    "get_task_spec",
    "pattern_spec",
    "task_names",
    "text_spec",
]

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
