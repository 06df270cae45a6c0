"""A run: one model's scores, means and results below one directory, computed once and reused.

Example
-------
>>> run = icl.Run(icl.stage_parameters(model="icl-tiny", run_dir="runs/icl-tiny"))
>>> run.prefix_scores().mean(0)
>>> run.evaluate("mean")
"""

from __future__ import annotations

import functools
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.heads import Head, top_heads
from icl_helpers.attention.hook import attention_layout
from icl_helpers.attention.induction_pattern import induction_pattern
from icl_helpers.attention.means import mean_head_outputs
from icl_helpers.attention.passes import one_angle_length
from icl_helpers.attention.scores import prefix_matching_scores, random_sequences, token_pool
from icl_helpers.errors import ICLError, InputError, NotMeasuredError
from icl_helpers.evaluation.cells import CellGroup, build
from icl_helpers.evaluation.conditions import FULL, Condition, conditions, drawn_again
from icl_helpers.evaluation.evaluate import ModelSource, evaluate_groups, plan_groups
from icl_helpers.evaluation.scorer import InterventionLM
from icl_helpers.evaluation.store import KEYS, read_frame
from icl_helpers.evaluation.workers import workers_from_environment
from icl_helpers.files import (
    cached_json,
    cached_tensor,
    check_run_dir,
    content_key,
    file_name,
    imported_dir,
    locked,
    quarantine,
    write_json,
)
from icl_helpers.models.fingerprint import (
    checkpoint_state,
    model_facts,
    model_key,
    resolve_model,
)
from icl_helpers.models.loading import load_model, load_tokenizer
from icl_helpers.models.reference_text import (
    PAPER_POSITIONS,
    PAPER_SAMPLES,
    reference_ids,
    reference_texts,
    samples_key,
)
from icl_helpers.parameters import StageParameters
from icl_helpers.results.viewer import (
    PromptView,
    prompt_view,
    query_followers,
    view_name,
    viewer_prompts,
)
from icl_helpers.run.bundle import Bundle
from icl_helpers.run.plan import KINDS, Group, Plan, check_same_model, run_info, stated_parameters
from icl_helpers.tasks.prompts import Prompt, build_prompts

__all__ = ["Run", "run_at", "source_of"]

# What is noted of the machines that a run was made on.
_MACHINE = ("device", "machine", "python", "versions")


class Run:
    """The artifacts of one model in one directory.

    An imported run has them from its bundle and loads its model for nothing but what is missing.
    Raises :class:`InputError` when the directory holds another model's run.
    """

    def __init__(self, parameters: StageParameters) -> None:
        self.parameters = parameters
        self.directory = check_run_dir(parameters.run_dir)
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._identity: dict[str, Any] | None = None
        imported = imported_dir(self.directory)
        self._bundle = None if imported is None else Bundle(imported)
        self._values: dict[str, Any] = {}
        self._views: dict[bool, dict[str, PromptView]] = {}
        check_same_model(self.info, parameters)
        self.plan = Plan(parameters, None if imported is None else self.info.get("contents", {}))

    @property
    def info(self) -> dict[str, Any]:
        """What ``run.json`` says: model, fingerprint, versions, parameters, seconds per stage."""
        path = self.directory / "run.json"
        try:
            return run_info(self.directory) if path.exists() else {}
        except ValueError:
            quarantine(path, "is damaged")
            return {}

    @property
    def model(self) -> PreTrainedModel:
        """The model, loaded on first use."""
        return self._load()[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded without the model where that is not here."""
        return self._tokenizer_alone if self._loaded is None else self._loaded[1]

    @functools.cached_property
    def _tokenizer_alone(self) -> PreTrainedTokenizerBase:
        p = self.parameters
        return load_tokenizer(p.model, revision=p.revision, trust_remote_code=p.trust_remote_code)

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._loaded is None:
            p = self.parameters
            self._loaded = load_model(p.model, **p.loading())
            attention_layout(self._loaded[0])
            self._identity = self._identify()
        return self._loaded

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the model's results; remembered while the checkpoint's files are as before.

        The model's key, its context in tokens (up to where rotary angles change), and the state of
        its files, as JSON values.
        """
        if self._identity is None:
            noted = self.info.get("identity") or {}
            state = noted.get("state")
            if self._bundle is not None or (state and state == self._checkpoint_state()):
                self._identity = noted
                self._record()
            else:
                self._load()
        if self._identity is None:
            self._identity = self._identify()
        return self._identity

    def _identify(self) -> dict[str, Any]:
        """Describe the loaded model and note it in ``run.json``.

        Raises :class:`InputError` where it is not the model that an imported run is of.
        """
        key = model_key(self.model, self.tokenizer, self.parameters.revision)
        if self._bundle is not None:
            noted: dict[str, Any] = self.info["identity"]
            other = sorted(name for name in key if key[name] != noted["key"].get(name))
            if other:
                raise InputError(
                    f"{self.directory} was imported, and the model here differs from its model in "
                    f"{', '.join(other)}; evaluate this one in another run_dir"
                )
            return noted
        identity: dict[str, Any] = {
            "key": key, "context": one_angle_length(self.model), "state": self._checkpoint_state()
        }  # fmt: skip
        # A run may be made on several machines: what earlier ones were stands first.
        facts = model_facts(self.model)
        facts |= _beside(self.info, {name: facts[name] for name in _MACHINE})
        self._record(**facts, fingerprint=key["fingerprint"], identity=identity)
        return identity

    def _checkpoint_state(self) -> str | None:
        p = self.parameters
        return checkpoint_state(resolve_model(p.model), **p.loading())

    def prefix_scores(self) -> torch.Tensor:
        """Prefix-matching scores, [sequences, layers, heads]; computed once."""
        key = content_key(["prefix scores", self._model_parts()])

        def compute() -> torch.Tensor:
            sequences = random_sequences(self.tokenizer)
            scores = prefix_matching_scores(self.model, sequences)
            mean = scores.mean(0)
            content = {
                "tokens_ranked_by": token_pool(self.tokenizer)[1],
                "induction_heads": {f"{f:g}": top_heads(mean, f) for f in self.plan.fractions},
                "scores": mean.tolist(),
            }
            write_json(self.directory / "heads.json", content)
            return scores

        return cached_tensor(self.directory / "prefix_scores.safetensors", key, compute)

    @property
    def n_heads(self) -> int:
        """How many attention heads the model has."""
        return self.prefix_scores()[0].numel()

    def induction_heads(self, fraction: float | None = None) -> list[Head]:
        """The top heads at a fraction; default the largest of the run."""
        return top_heads(self.prefix_scores().mean(0), fraction or self.plan.fractions[-1])

    def mean_head_outputs(self) -> torch.Tensor:
        """Mean head outputs, [layers, positions, heads, d_head]; computed once."""
        return self._means

    @functools.cached_property
    def _means(self) -> torch.Tensor:
        # To look whether they are there takes the reference text, and stages ask many times.
        p = self.parameters
        texts = reference_texts(p.model, reference=p.reference)
        positions = min(p.positions or PAPER_POSITIONS, self.identity["context"])
        ids = reference_ids(self.tokenizer, texts, n_samples=PAPER_SAMPLES, n_positions=positions)
        key = content_key(["means", self._model_parts(), samples_key(ids), p.average])

        def compute() -> torch.Tensor:
            average: Any = p.average
            return mean_head_outputs(self.model, ids, average=average, batch_size=4)

        return cached_tensor(self.directory / "mean_head_outputs.safetensors", key, compute)

    def conditions(self, kind: str) -> list[Condition]:
        """Conditions of one kind: full, mean, zero or knockout."""
        if kind not in KINDS:
            raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "full":
            return [FULL]
        p = self.parameters
        of_kind = conditions(
            self.prefix_scores().mean(0), fractions=self.plan.fractions, ablations=[kind],
            head_outputs=torch.empty(0), ablation_seeds=p.ablation_seeds, control=p.control,
            categories=p.categories, full=False,
        )  # fmt: skip
        if kind != "mean":
            return of_kind
        # The bundle's means of these heads, where they are those that are asked for.
        bundle, filled = self._bundle, []
        usable = bundle is not None and bundle.shown["means"]["of"] == self.plan.means_parameters()
        for condition in of_kind:
            brought = bundle.means(condition.heads) if bundle is not None and usable else None
            outputs, key = brought or (self.mean_head_outputs(), None)
            filled.append(replace(condition, head_outputs=outputs, means_key=key))
        return filled

    def evaluate(self, *kinds: str, group: Group = "tasks") -> pd.DataFrame:
        """Accuracies of a group's tasks under the conditions of these kinds.

        Finished cells are reused. Kinds are those of :meth:`conditions`; groups those of
        :class:`icl_helpers.run.plan.Plan`.
        """
        p = self.parameters
        conditions = [condition for kind in kinds for condition in self.conditions(kind)]
        key = self.identity["key"]
        sets = self.plan.prompt_sets(group)
        if not sets:
            return pd.DataFrame(columns=[*KEYS, "n", "n_invalid", "accuracy"])
        groups = plan_groups(sets, conditions=conditions, limit=p.limit)
        setting = functools.partial(self.plan.row_key, model_key=key)
        with workers_from_environment() as workers:
            if workers is not None:
                # They load the model themselves, and memory may not hold it twice.
                self._loaded = None
                gc.collect()
                torch.cuda.empty_cache()
            load = functools.cache(self.scorer)
            results = evaluate_groups(
                groups, key, self.directory, load, setting=setting, executor=workers,
                source=source_of(p),
            )  # fmt: skip
        return pd.DataFrame(results)

    def scorer(self) -> InterventionLM:
        """What scores the run's prompts, on its model."""
        return InterventionLM(self.model, self.tokenizer, batch_size=self.parameters.batch_size)

    def results(self, group: Group = "tasks") -> pd.DataFrame:
        """Accuracies of a group's tasks that belong to the run's plan.

        Empty for the text tasks before their stage has run.
        """
        return self._table("results", group)

    def documents(self, group: Group = "tasks") -> pd.DataFrame:
        """Per-document results behind :meth:`results`.

        With ``drawn_again``, how many heads of a row's random draw are induction heads.
        """
        rows = self._table("documents", group)
        return rows.assign(drawn_again=drawn_again(rows, self.prefix_scores().mean(0)))

    def _table(self, name: str, group: Group) -> pd.DataFrame:
        path = self.directory / f"{name}.parquet"
        rows = self.plan.selected(read_frame(path), group, self.identity["key"])
        if rows.empty and group == "tasks":
            raise InputError(
                f"{path} holds no results of this model with these parameters: run the evaluation "
                f"stages with them first (notebooks 3 to 5); finished cells are used again"
            )
        return rows

    def mean_norms(self) -> torch.Tensor:
        """Norm of each head's mean output, averaged over positions, [layers, heads]."""
        norms = self._shown(
            "mean norms", [self.plan.means_parameters()],
            lambda: self.mean_head_outputs().norm(dim=-1).mean(dim=1).tolist(),
        )  # fmt: skip
        return torch.tensor(norms)

    def example(self, task: str, *, shots: int, labels: str | None = None) -> Prompt:
        """The first prompt of a task, at the first demonstration seed."""
        rule: Any = self.parameters.demonstrations
        seed, data = self.parameters.seeds[0], self.plan.data(task)

        def compute() -> Any:
            prompts = build_prompts(
                task, shots=shots, seed=seed, labels=labels, data=data, demonstrations=rule
            )
            return asdict(prompts[0])

        of = [task, shots, seed, labels, file_name(data), rule]
        values = self._shown("example", of, compute)
        return Prompt(**values | {"choices": tuple(values["choices"])})

    def knockout_example(self) -> dict[str, int]:
        """Tokens of a prompt with two demonstrations, and the pairs that a knockout blocks."""
        prompt = self.example(self.plan.tasks()[0], shots=2)
        categories = self.parameters.categories

        def compute() -> Any:
            blocked = induction_pattern(prompt.context, self.tokenizer, categories=categories)
            return {"tokens": len(blocked), "blocked pairs": int(blocked.sum())}

        return self._shown("knockout", [prompt.context, categories], compute)

    def text_tasks(self) -> pd.DataFrame:
        """Data, sizes and labels of the run's text tasks."""
        # A notebook's module: what it draws with is loaded where it is used.
        from icl_helpers.results.notebook import text_task_table

        data = {task: self.plan.data(task) for task in self.plan.tasks("nlp_tasks")}
        of = [[task, file_name(source)] for task, source in data.items()]
        table = self._shown("text tasks", of, lambda: text_task_table(data).to_dict("index"))
        return pd.DataFrame.from_dict(table, orient="index")

    def showcase(self) -> dict[str, Any]:
        """What stages show that an imported run can have from its bundle only, as JSON values."""
        self.mean_norms()
        self.example(self.plan.tasks()[0], shots=5)
        self.knockout_example()
        self.text_tasks()
        for task in self.plan.tasks("nlp_tasks")[:1]:
            for labels in ("semantic", "unrelated"):
                self.example(task, shots=2, labels=labels)
        return {"values": {**self._values, **self.measurements()}, "viewed": self._viewed()}

    def measurement(self, name: str, of: Any, compute: Callable[..., Any], *args: Any) -> Any:
        """A JSON value that was measured on the model; computed once, and kept as soon as it is.

        ``of`` is all that decides ``compute(*args)`` beside the model. It travels in the run's
        bundle. Raises :class:`NotMeasuredError` where an imported run's bundle lacks it and
        ``measure`` is unset.
        """
        key = f"{name} {content_key([of, self.identity['key']])}"
        brought = {} if self._bundle is None else self._bundle.shown["values"]
        if key in brought:
            return brought[key]
        path = self._measurements_dir() / f"{key.replace(' ', '-')}.json"
        if self._bundle is not None and not (self.parameters.measure or path.is_file()):
            raise NotMeasuredError(
                f"The run's bundle lacks it ({name}). With the model at hand, `icl run --run-dir "
                f"{self.parameters.run_dir} --measure` measures it."
            )
        return cached_json(path, key, functools.partial(compute, *args))

    def measurements(self) -> dict[str, Any]:
        """Every measurement of the model that was made here, by what it is kept under."""
        files = sorted(self._measurements_dir().glob("*.json"))
        measured = (json.loads(path.read_bytes()) for path in files)
        return {stored["key"]: stored["value"] for stored in measured}

    def _measurements_dir(self) -> Path:
        return self.directory / "measurements" / content_key(self.identity["key"])

    def _shown(self, what: str, of: list[Any], compute: Callable[[], Any]) -> Any:
        """A JSON value that follows from ``of``: the bundle's, or computed."""
        if self._bundle is not None:
            self._values = self._bundle.shown["values"]
        key = f"{what} {content_key(of)}"
        if key not in self._values:
            self._values[key] = compute()
        return self._values[key]

    def views(self, *, every: bool = False) -> dict[str, PromptView]:
        """Where the five best heads, or every head, look in the viewer's prompts (stage 7).

        The prompts are of the first word-sequence task and the three first others. Blocked are the
        five best together.
        """
        if every in self._views:
            return self._views[every]
        if self._bundle is not None and self._bundle.shown["viewed"] == self._viewed():
            kept = self._bundle.views()
            self._views[every] = {n: kept[n] for n in map(view_name, self._viewed_tasks())}
            return self._views[every]
        p, views = self.parameters, {}
        heads = [Head(*head) for head in np.ndindex(*self.prefix_scores().shape[1:])]
        options: dict[str, Any] = {"categories": p.categories, "also": heads if every else []}
        best = self.induction_heads()[:5]
        for task in self._viewed_tasks():
            prompts = viewer_prompts([task], seed=p.seeds[0], data=self.plan.data(task))
            for name, prompt in prompts.items():
                views[name] = prompt_view(self.model, self.tokenizer, best, prompt, **options)
        self._views[every] = views
        return views

    def first_view(self) -> PromptView:
        """The first of :meth:`views`."""
        return next(iter(self.views().values()))

    def followers(self) -> dict[str, dict[str, list[float]]]:
        """What the heads pay to followers in each of :meth:`views`.

        As :func:`icl_helpers.results.viewer.query_followers`. ``run.json`` notes it, for whoever
        reads the run without its model.
        """
        found = {name: query_followers(view) for name, view in self.views().items()}
        self._record(query_followers=found)
        return found

    def _viewed_tasks(self) -> list[str]:
        tasks = self.plan.tasks()
        first = next((task for task in tasks if task.startswith("wordseq")), tasks[0])
        return list(dict.fromkeys([first, *tasks]))[:4]

    def _viewed(self) -> str:
        """What decides the views."""
        p = self.parameters
        data = {task: file_name(self.plan.data(task)) for task in self._viewed_tasks()}
        return content_key([data, p.seeds[0], p.categories, self.induction_heads()[:5]])

    def seeds_of(
        self, spec: Mapping[str, Any], seeds: Sequence[int]
    ) -> tuple[dict[str, int], int | None]:
        """The seeds that give a finished cell's prompts, and the longest of these in tokens.

        Seeds by the name of their group of cells; none where the data are not here any more.
        """
        sources = [self.plan.data(spec["task"]), spec["data"]]
        data = next(source for source in sources if file_name(source) == spec["data"])
        groups = [CellGroup.of_spec(spec, seed=seed, data=data) for seed in seeds]
        for group in groups:
            try:
                prompts = build(group)
            except ICLError:
                break
            if prompts.key == spec["prompts"]:
                texts = [context + label for context, label in prompts.pairs]
                ids = self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
                # Without demonstrations every seed gives the same.
                equal = groups if group.shots == 0 else [group]
                return {g.prompts_name(): g.seed for g in equal}, max(map(len, ids))
        return {}, None

    @contextmanager
    def stage(self, name: str) -> Iterator[Run]:
        """Note in ``run.json`` how long a stage took, once it has succeeded, at its longest.

        A repeated stage finds what it computed before, and says nothing of what that took.
        """
        began = time.perf_counter()
        yield self
        if not self._untouched:
            self._record(took={name: round(time.perf_counter() - began, 2)})

    @property
    def _untouched(self) -> bool:
        """Whether everything is as it was imported: no model has been loaded."""
        return self._bundle is not None and self._loaded is None

    def _model_parts(self) -> list[str]:
        return [str(value) for _, value in sorted(self.identity["key"].items())]

    def _record(self, *, took: Mapping[str, float] | None = None, **values: Any) -> None:
        # Stages may run side by side, and each leaves what the others noted.
        with locked(self.directory):
            info = self.info
            parameters = info.get("parameters", StageParameters().as_dict())
            content = info | {
                "model": info.get("model", self.parameters.model),
                "parameters": parameters | self.parameters.as_dict(stated=True),
                "contents": info.get("contents", {}) | self.plan.contents(),
            }
            if not self._untouched:
                content["updated"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
            for name, seconds in (took or {}).items():
                known = content.get("seconds", {})
                content["seconds"] = known | {name: max(seconds, known.get(name, 0.0))}
            write_json(self.directory / "run.json", content | values)


def _beside(noted: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """What is here, behind what was noted of the same name, where that says something else."""
    both: dict[str, Any] = {}
    for name, value in here.items():
        if isinstance(value, dict):
            both[name] = _beside(noted.get(name, {}), value)
        else:
            several = [*str(noted.get(name, value)).split(", "), str(value)]
            both[name] = ", ".join(dict.fromkeys(several))
    return both


def run_at(directory: str | os.PathLike[str]) -> Run:
    """The run in a directory, with its parameters; raises :class:`InputError` where none is."""
    return Run(stated_parameters(directory))


def source_of(parameters: StageParameters) -> ModelSource:
    """Where workers get the model of a run."""
    p = parameters
    return ModelSource(p.model, batch_size=p.batch_size, **p.loading())
