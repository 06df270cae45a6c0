"""What a run evaluates: tasks x labels x shots x data x conditions x seeds, said in one place.

A run's evaluation, its cost, and the rows of its tables all follow from the plan, so that they
cannot disagree.

Example
-------
>>> plan = Plan(icl.stage_parameters(model="icl-tiny"))
>>> plan.prompt_sets("tasks")[0]
PromptSet(task='repetition', labels='unrelated', shots=0, seeds=(42, 43, 44), data='synthetic',
          demonstrations=None, sampling='balanced')
>>> plan.selected(icl.document_results("runs/icl-tiny"), "tasks", model_key)
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from icl_helpers.errors import InputError
from icl_helpers.evaluation.store import KEYS, keyed, read_frame
from icl_helpers.files import (
    check_run_dir,
    content_key,
    embedded_models,
    file_name,
    files_digest,
    user_path,
)
from icl_helpers.models.fingerprint import model_fractions
from icl_helpers.models.reference_text import reference_texts
from icl_helpers.parameters import StageParameters, about
from icl_helpers.tasks.data import check_rows, rows_digest
from icl_helpers.tasks.prompts import PromptSet, prompt_sets, resolve_sampling, resolve_shots
from icl_helpers.tasks.specs import TextTaskSpec, get_task_spec, task_names

__all__ = [
    "GROUPS", "KINDS", "Group", "Plan", "bundle_name", "check_same_model", "run_heads", "run_info",
    "run_table", "shown_name", "stated_parameters",
]  # fmt: skip

# Kinds of conditions; the second is evaluated beside the first wherever it is evaluated at all.
KINDS = ("full", "mean", "zero", "knockout")
# The parameter that names the tasks: those of stages 3 to 5, or of the stage on text.
Group = Literal["tasks", "nlp_tasks"]
GROUPS: tuple[Group, ...] = ("tasks", "nlp_tasks")
_STAGES: Mapping[str, tuple[Group, tuple[str, ...]]] = {
    "full_model": ("tasks", ("full",)),
    "head_ablation": ("tasks", ("full", "mean", "zero")),
    "attention_knockout": ("tasks", ("full", "mean", "knockout")),
    "nlp_tasks": ("nlp_tasks", ("full", "mean", "zero")),
}


@dataclass(frozen=True, eq=False)
class Plan:
    """The plan that follows from a run's parameters; loads no model.

    ``held`` is what :meth:`contents` was, where the user's files need not be here any more.
    """

    parameters: StageParameters
    held: Mapping[str, str] | None = None

    @property
    def fractions(self) -> list[float]:
        """Fractions of heads that the run intervenes on, smallest first."""
        return sorted(self.parameters.fractions or model_fractions(self.parameters.model))

    def tasks(self, group: Group = "tasks") -> list[str]:
        """Tasks of a group; those of an embedded model's stage on text are the stand-ins."""
        p = self.parameters
        if group == "tasks":
            return list(dict.fromkeys(p.tasks or task_names()))
        usual = task_names("stand_in" if p.model in embedded_models() else "nlp")
        named = usual if p.nlp_tasks is None else p.nlp_tasks
        # A task counts once, however often it is named.
        return [task for task in dict.fromkeys(named) if task not in (p.tasks or ())]

    def data(self, task: str) -> str:
        """The ``data`` of :func:`icl_helpers.build_prompts` with which the run reads a task."""
        if task in task_names("nlp"):
            return self.parameters.data_dir or "synthetic"
        return "synthetic" if task in task_names("stand_in") else self.parameters.data

    def contents(self) -> dict[str, str]:
        """Digests of the user's files, by the task whose rows they hold, or ``reference``."""
        tasks = [task for group in GROUPS for task in self.tasks(group)]
        names = [*tasks, *(self.parameters.analysis_tasks or ()), "reference"]
        return {name: digest for name in names if (digest := self._digest(name)) is not None}

    def _digest(self, name: str) -> str | None:
        where = self.parameters.reference if name == "reference" else self.data(name)
        if where is None or where == "synthetic":
            return None
        if self.held is not None:
            return self.held.get(name)
        if name != "reference":
            return rows_digest(name, data=where)
        path = user_path(where)
        return files_digest(path) if path.is_file() else None

    def prompt_sets(self, group: Group = "tasks") -> list[PromptSet]:
        """Sets of prompts of a group's tasks, in order."""
        p: Any = self.parameters
        sets = []
        for task in self.tasks(group):
            of_labels = [get_task_spec(task).default_labels]
            if isinstance(get_task_spec(task), TextTaskSpec):
                asked = p.labels or ("both" if group == "nlp_tasks" else of_labels[0])
                of_labels = ["semantic", "unrelated"] if asked == "both" else [asked]
            for labels in of_labels:
                sets += prompt_sets(
                    task, labels, self._shots(task, labels), p.seeds, self.data(task),
                    p.demonstrations, self.sampling(task),
                )  # fmt: skip
        return sets

    def analysis_sets(self) -> list[PromptSet]:
        """Prompts that are looked at closely (stages 9 and 10), one set a task.

        With each task's most examples and the first demonstration seed. Of the abstract tasks the
        first of each kind: letters, words with two labels, words with four.
        """
        p: Any = self.parameters
        kinds: dict[Any, str] = {}
        for task in self.tasks():
            spec = get_task_spec(task)
            kinds.setdefault((spec.sampler, len(spec.choices)), task)
        sets = []
        for task in p.analysis_tasks or kinds.values():
            labels, data = get_task_spec(task).default_labels, self.data(task)
            most = [max(self._shots(task, labels))]
            sets += prompt_sets(
                task, labels, most, p.seeds[:1], data, p.demonstrations, self.sampling(task)
            )
        return sets

    def sampling(self, task: str) -> str:
        """How the run takes documents of a task where there is a limit."""
        return resolve_sampling(task, self._digest(task), self.parameters.sampling)

    def _shots(self, task: str, labels: str) -> list[int]:
        """Numbers of demonstrations; unrelated labels on text only with none and with the most.

        The paper has them with the most only; without any there is a benefit to compute.
        """
        shots = resolve_shots(task, self.parameters.shots)
        if self.parameters.shots is None and labels != get_task_spec(task).default_labels:
            return [min(shots), max(shots)]
        return shots

    def kinds(self, group: Group) -> list[str]:
        """Kinds of conditions that the stages evaluate on a group's tasks."""
        kinds = {kind for of, several in _STAGES.values() if of == group for kind in several}
        return [kind for kind in KINDS if kind in kinds]

    def condition_count(self, kind: str) -> int:
        """Number of conditions of a kind: per fraction the induction heads, and their controls."""
        if kind == "full":
            return 1
        p = self.parameters
        controls = 0 if kind == "knockout" else len(set(p.ablation_seeds)) * len(set(p.control))
        return len(set(self.fractions)) * (1 + controls)

    def row_key(
        self, task: str, condition: str, ablation: str, *, model_key: Mapping[str, Any]
    ) -> str:
        """A row's ``setting``: a hash of all that decides it beside its keys.

        That is the model, the rows and how many, parameters and files that decide such a condition.
        """
        values = self.parameters.as_dict() | {"data": self.data(task), "data_dir": None}
        values |= {name: file_name(values[name]) for name, *_, it in about() if it.path}
        decisive = {
            name: values[name]
            for name, _, default, it in about()
            if it.decides in ("prompts", condition, ablation)
            and not (it.later and values[name] == default)
        }
        files = [task, "reference"] if ablation == "mean" else [task]
        held = {name: digest for name in files if (digest := self._digest(name)) is not None}
        return content_key([decisive, dict(model_key), *([held] if held else [])])

    def means_parameters(self) -> dict[str, Any]:
        """The parameters that decide the means, as they are in a bundle."""
        values = self.parameters.as_dict()
        decisive = {name: it.path for name, *_, it in about() if it.decides == "mean"}
        return {n: file_name(values[n]) if path else values[n] for n, path in decisive.items()}

    def selected(
        self, frame: pd.DataFrame, group: Group, model_key: Mapping[str, Any]
    ) -> pd.DataFrame:
        """The rows of a run's table that belong to the plan; a directory may hold others too."""
        wanted = {
            (prompts.task, prompts.labels, prompts.shots, seed)
            for prompts in self.prompt_sets(group)
            for seed in prompts.seeds
        }
        setting = functools.cache(functools.partial(self.row_key, model_key=model_key))

        def belongs(row: Any) -> bool:
            return (
                (row.task, row.labels, row.shots, row.demonstration_seed) in wanted
                and (row.condition == "full" or row.fraction in self.fractions)
                and (pd.isna(row.ablation_seed) or row.ablation_seed in p.ablation_seeds)
                and (row.control == "" or row.control in p.control)
                and row.setting == setting(row.task, row.condition, row.ablation)
            )

        p = self.parameters
        if "setting" not in frame:
            frame = frame.assign(setting="")
        frame = keyed(frame)
        keys = frame[[*KEYS, "setting"]].drop_duplicates()
        return frame.merge(keys[[belongs(row) for row in keys.itertuples(index=False)]])

    @classmethod
    def of_run(cls, info: Mapping[str, Any]) -> Plan:
        """The plan of the run whose ``run.json`` says this."""
        # Checked when the run was made; what was a path there need not be one here.
        values = StageParameters().as_dict() | info["parameters"]
        return cls(StageParameters.model_construct(**values), info.get("contents", {}))

    def check_data(self, stages: Iterable[str] = tuple(_STAGES)) -> None:
        """Read the rows that these stages will need, so that what is missing is known before.

        :class:`InputError`, too, for a text task to be blocked and for results of one document.
        """
        stages = tuple(stages)
        if "results" in stages and self.parameters.limit == 1:
            raise InputError(
                "limit is 1, and of a single document no interval can be computed: use a limit of "
                "at least 2, or leave out stage 8"
            )
        groups = {_STAGES[stage][0] for stage in stages if stage in _STAGES}
        for task in dict.fromkeys(task for group in groups for task in self.tasks(group)):
            text = isinstance(get_task_spec(task), TextTaskSpec)
            if text and "attention_knockout" in stages and task in self.tasks():
                raise InputError(
                    f"task {task!r} is a text task, for whose prompts the paper defines no "
                    f"induction pattern: name it in nlp_tasks, or leave out stage 5"
                )
            check_rows(task, data=self.data(task))
        if self.parameters.reference is not None:
            reference_texts(self.parameters.model, reference=self.parameters.reference)


def check_same_model(info: Mapping[str, Any], parameters: StageParameters) -> None:
    """Raise :class:`InputError` when the run that says this is of another model."""
    stored = info.get("model", parameters.model)
    if stored not in (parameters.model, "imported" in info and bundle_name(parameters.model)):
        raise InputError(
            f"run directory {parameters.run_dir} holds the run of model {stored!r}, not of "
            f"{parameters.model!r}; choose another run_dir"
        )


def shown_name(model: str) -> str:
    """Return a model's name as it is published: of a folder its last part."""
    return Path(model).name if Path(model).is_absolute() else model


def bundle_name(model: str) -> str:
    """Return a model's name in a bundle; that of a GGUF file without its ending, as no file."""
    name = shown_name(model)
    return name if name == model else name.removesuffix(".gguf")


def run_info(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``run.json`` says of a run; raises :class:`InputError` for another directory."""
    path = check_run_dir(run_dir) / "run.json"
    if not path.is_file():
        raise InputError(f"{path} does not exist; {run_dir} is not the directory of a run")
    return json.loads(path.read_text(encoding="utf-8"))


def stated_parameters(run_dir: str | os.PathLike[str]) -> StageParameters:
    """The parameters that a run's ``run.json`` states, there; raises as :func:`run_info` does."""
    return StageParameters(**run_info(run_dir)["parameters"] | {"run_dir": os.fspath(run_dir)})


def run_heads(run_dir: str | os.PathLike[str]) -> int:
    """How many attention heads a run's model has, of those with scores in ``heads.json``."""
    scores = json.loads((Path(run_dir) / "heads.json").read_text(encoding="utf-8"))["scores"]
    return sum(map(len, scores))


def run_table(
    run_dir: str | os.PathLike[str], name: Literal["results", "documents"], group: Group | None
) -> pd.DataFrame:
    """Rows of a run's table that belong to the plan of its last parameters; None: both groups."""
    info = run_info(run_dir)
    frame = read_frame(check_run_dir(run_dir) / f"{name}.parquet")
    plan, key = Plan.of_run(info), info["identity"]["key"]
    groups = GROUPS if group is None else (group,)
    return pd.concat([plan.selected(frame, of, key) for of in groups], ignore_index=True)
