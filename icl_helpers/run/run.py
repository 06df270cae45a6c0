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
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime, timezone
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import icl_helpers
from icl_helpers.attention.heads import Head, top_heads
from icl_helpers.attention.hook import attention_layout
from icl_helpers.attention.means import mean_head_outputs
from icl_helpers.attention.scores import prefix_matching_scores, random_sequences, token_pool
from icl_helpers.errors import InputError
from icl_helpers.evaluation.cells import ModelSource
from icl_helpers.evaluation.conditions import FULL, Condition, conditions
from icl_helpers.evaluation.evaluate import evaluate_request, plan_request, resolve_shots
from icl_helpers.evaluation.scorer import InterventionLM
from icl_helpers.evaluation.store import KEYS, document_results, read_frame
from icl_helpers.evaluation.workers import workers_from_environment
from icl_helpers.files import check_run_dir, content_key, kept_tensor, set_aside, write_json
from icl_helpers.models.fingerprint import checkpoint_state, model_facts, model_key
from icl_helpers.models.loading import (
    context_length,
    embedded_models,
    load_model,
    load_tokenizer,
    model_fractions,
    resolve_model,
)
from icl_helpers.models.reference_text import (
    PAPER_POSITIONS,
    PAPER_SAMPLES,
    reference_ids,
    reference_texts,
    samples_key,
)
from icl_helpers.parameters import StageParameters
from icl_helpers.tasks.data import load_rows, load_splits
from icl_helpers.tasks.prompts import Prompt, build_prompts
from icl_helpers.tasks.specs import TextTaskSpec, get_task_spec, task_names

__all__ = ["Run", "source_of"]


KINDS = ("full", "mean", "zero", "knockout")


class Run:
    """The artifacts of one model in one directory.

    Raises :class:`InputError` when the directory holds another model's run.
    """

    def __init__(self, parameters: StageParameters) -> None:
        self.parameters = parameters
        self.directory = check_run_dir(parameters.run_dir)
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._identity: dict[str, Any] | None = None
        stored = self.info.get("model")
        if stored not in (None, parameters.model):
            raise InputError(
                f"run directory {self.directory} holds the run of model {stored!r}, not of "
                f"{parameters.model!r}; choose another run_dir"
            )

    @property
    def info(self) -> dict[str, Any]:
        """What ``run.json`` says: model, fingerprint, versions, parameters, seconds per stage."""
        path = self.directory / "run.json"
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            set_aside(path, "is damaged")
            return {}
        return content

    @property
    def model(self) -> PreTrainedModel:
        """The model, loaded on first use."""
        return self._load()[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded without the model where that is not here."""
        if self._loaded is not None:
            return self._loaded[1]
        if self._tokenizer is None:
            p = self.parameters
            self._tokenizer = load_tokenizer(
                p.model, revision=p.revision, trust_remote_code=p.trust_remote_code
            )
        return self._tokenizer

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._loaded is None:
            p = self.parameters
            self._loaded = load_model(
                p.model, revision=p.revision, dtype=p.dtype, device=p.device,
                quantization=p.quantization, trust_remote_code=p.trust_remote_code,
            )  # fmt: skip
            attention_layout(self._loaded[0])
            self._identity = self._identify()
        return self._loaded

    def _release(self) -> None:
        """Let go of the model: workers load it themselves, and memory may not hold it twice."""
        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the model's results; remembered while the checkpoint's files are as before.

        The model's key, its context in tokens, and the state of its files, as JSON values.
        """
        if self._identity is None:
            kept = self.info.get("identity") or {}
            if kept.get("state") and kept["state"] == self._checkpoint_state():
                self._identity = kept
                self._record(parameters=self.parameters.as_dict())
            else:
                self._load()
        if self._identity is None:
            self._identity = self._identify()
        return self._identity

    def _identify(self) -> dict[str, Any]:
        """Describe the loaded model and note it in ``run.json``."""
        identity: dict[str, Any] = {
            "key": model_key(self.model, self.tokenizer, self.parameters.revision),
            "context": context_length(self.model),
            "state": self._checkpoint_state(),
        }
        self._record(
            **model_facts(self.model),
            fingerprint=identity["key"]["fingerprint"],
            identity=identity,
            parameters=self.parameters.as_dict(),
        )
        return identity

    def _checkpoint_state(self) -> str | None:
        p = self.parameters
        return checkpoint_state(
            resolve_model(p.model), revision=p.revision, dtype=p.dtype, device=p.device,
            quantization=p.quantization, trust_remote_code=p.trust_remote_code,
        )  # fmt: skip

    @property
    def tasks(self) -> list[str]:
        """Tasks of the run."""
        return list(self.parameters.tasks or task_names())

    @property
    def nlp_tasks(self) -> list[str]:
        """Tasks of the stage on text; an embedded model's are stand-ins for the paper's."""
        if self.parameters.nlp_tasks is not None:
            return list(self.parameters.nlp_tasks)
        return task_names("stand_in" if self.parameters.model in embedded_models() else "nlp")

    @property
    def fractions(self) -> list[float]:
        """Fractions of heads that the run intervenes on, smallest first."""
        return sorted(self.parameters.fractions or model_fractions(self.parameters.model))

    def prefix_scores(self) -> torch.Tensor:
        """Prefix-matching scores, [sequences, layers, heads]; computed once."""
        key = content_key(["prefix scores", self._model_parts(), icl_helpers.__version__])

        def compute() -> torch.Tensor:
            sequences = random_sequences(self.tokenizer)
            scores = prefix_matching_scores(self.model, sequences)
            ranking = token_pool(self.tokenizer)[1]
            write_json(self.directory / "heads.json", self._heads_json(scores, ranking))
            return scores

        return kept_tensor(self.directory / "prefix_scores.safetensors", key, compute)

    def _heads_json(self, scores: torch.Tensor, ranking: str) -> dict[str, Any]:
        mean = scores.mean(0)
        chosen = {f"{f:g}": [list(head) for head in top_heads(mean, f)] for f in self.fractions}
        return {"tokens_ranked_by": ranking, "induction_heads": chosen, "scores": mean.tolist()}

    def induction_heads(self, fraction: float | None = None) -> list[Head]:
        """The top heads at a fraction; default the largest of the run."""
        return top_heads(self.prefix_scores().mean(0), fraction or self.fractions[-1])

    def mean_head_outputs(self) -> torch.Tensor:
        """Mean head outputs, [layers, positions, heads, d_head]; computed once."""
        p = self.parameters
        texts = reference_texts(p.model, reference=p.reference)
        positions = min(PAPER_POSITIONS, self.identity["context"])
        ids = reference_ids(self.tokenizer, texts, n_samples=PAPER_SAMPLES, n_positions=positions)
        key = content_key(["means", self._model_parts(), samples_key(ids), p.average])

        def compute() -> torch.Tensor:
            average: Any = p.average
            return mean_head_outputs(self.model, ids, average=average, batch_size=4)

        return kept_tensor(self.directory / "mean_head_outputs.safetensors", key, compute)

    def conditions(self, kind: str) -> list[Condition]:
        """Conditions of one kind: full, mean, zero or knockout."""
        if kind not in KINDS:
            raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "full":
            return [FULL]
        p = self.parameters
        control: Any = p.control
        return conditions(
            self.prefix_scores().mean(0), fractions=self.fractions, ablations=[kind],
            head_outputs=self.mean_head_outputs() if kind == "mean" else None,
            ablation_seeds=p.ablation_seeds, control=control, categories=p.categories, full=False,
        )  # fmt: skip

    def evaluate(self, *kinds: str) -> pd.DataFrame:
        """Accuracies of the run's tasks under the conditions of these kinds.

        Finished cells are reused. Kinds are those of :meth:`conditions`.
        """
        return self._evaluate(self.tasks, kinds)

    def evaluate_nlp(self, *kinds: str) -> pd.DataFrame:
        """The same for the tasks of the stage on text, with each set of labels."""
        return self._evaluate(self.nlp_tasks, kinds, nlp=True)

    def _evaluate(
        self, tasks: Sequence[str], kinds: Sequence[str], *, nlp: bool = False
    ) -> pd.DataFrame:
        p = self.parameters
        chosen = [condition for kind in kinds for condition in self.conditions(kind)]
        key, load = self.identity["key"], functools.cache(self._scorer)
        with workers_from_environment() as workers:
            if workers is not None:
                self._release()
            frames = []
            for (labels, data), group in self._groups(tasks, nlp=nlp).items():
                request = plan_request(
                    tasks=group, labels=labels, data=data, conditions=chosen, seeds=p.seeds,
                    shots={task: self._shots(task, labels) for task in group}, limit=p.limit,
                    run_dir=self.directory,
                )  # fmt: skip
                frames.append(
                    evaluate_request(request, key, load=load, executor=workers, source=source_of(p))
                )
        if not frames:
            return pd.DataFrame(columns=[*KEYS, "n", "n_invalid", "accuracy"])
        return pd.concat(map(pd.DataFrame, frames), ignore_index=True)

    def _scorer(self) -> InterventionLM:
        return InterventionLM(self.model, self.tokenizer, batch_size=self.parameters.batch_size)

    def _groups(self, tasks: Sequence[str], *, nlp: bool) -> dict[tuple[str, str], list[str]]:
        """Tasks by the label set and the data that they are evaluated with."""
        groups: dict[tuple[str, str], list[str]] = {}
        for task in tasks:
            for labels in self._label_sets(task, nlp=nlp):
                groups.setdefault((labels, self.task_data(task)), []).append(task)
        return groups

    def _label_sets(self, task: str, *, nlp: bool) -> list[str]:
        spec = get_task_spec(task)
        chosen = self.parameters.labels or ("both" if nlp else spec.default_labels)
        if not isinstance(spec, TextTaskSpec):
            return [spec.default_labels]
        return ["semantic", "unrelated"] if chosen == "both" else [chosen]

    def _shots(self, task: str, labels: str) -> list[int]:
        """Numbers of demonstrations; unrelated labels on text only with none and with the most.

        The paper has them with the most only; without any there is a benefit to compute.
        """
        shots = resolve_shots(task, self.parameters.shots)
        if self.parameters.shots is None and labels != get_task_spec(task).default_labels:
            return [min(shots), max(shots)]
        return shots

    def task_data(self, task: str) -> str:
        """The ``data`` of :func:`icl_helpers.build_prompts` with which the run reads a task."""
        if task in task_names("nlp"):
            return self.parameters.data_dir or "synthetic"
        return "synthetic" if task in task_names("stand_in") else self.parameters.data

    def nlp_prompts(self, task: str, *, shots: int, labels: str) -> list[Prompt]:
        """Prompts of a text task as the run evaluates it, at its first demonstration seed."""
        seed = self.parameters.seeds[0]
        return build_prompts(task, shots=shots, seed=seed, labels=labels, data=self.task_data(task))

    def results(self) -> pd.DataFrame:
        """Accuracies of the run's tasks evaluated so far, with its shots, fractions and seeds."""
        return self._selected(self._read_results(), self.tasks, nlp=False)

    def nlp_results(self) -> pd.DataFrame:
        """The same for the tasks of the stage on text; empty before that stage has run."""
        return self._selected(self._read_results(), self.nlp_tasks, nlp=True)

    def _read_results(self) -> pd.DataFrame:
        return read_frame(self.directory / "results.parquet")

    def documents(self) -> pd.DataFrame:
        """Per-document results behind :meth:`results`."""
        return self._selected(document_results(self.directory), self.tasks, nlp=False)

    def nlp_documents(self) -> pd.DataFrame:
        """Per-document results behind :meth:`nlp_results`."""
        return self._selected(document_results(self.directory), self.nlp_tasks, nlp=True)

    def _selected(self, frame: pd.DataFrame, tasks: Sequence[str], *, nlp: bool) -> pd.DataFrame:
        wanted = {
            (task, labels, shots)
            for task in tasks
            for labels in self._label_sets(task, nlp=nlp)
            for shots in self._shots(task, labels)
        }
        rows = zip(frame["task"], frame["labels"], frame["shots"], strict=True)
        kept = pd.Series([row in wanted for row in rows], index=frame.index, dtype=bool)
        return frame[
            kept
            & frame["fraction"].isin([0.0, *self.fractions])
            & frame["demonstration_seed"].isin(self.parameters.seeds)
        ].reset_index(drop=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[Run]:
        """Note in ``run.json`` how long a stage took, once it has succeeded."""
        began = time.perf_counter()
        yield self
        seconds = {**self.info.get("seconds", {}), name: round(time.perf_counter() - began, 2)}
        self._record(seconds=seconds)

    def _model_parts(self) -> list[str]:
        key = self.identity["key"]
        return [key["fingerprint"], key["dtype"], str(key["revision"])]

    def _record(self, **values: Any) -> None:
        content = {
            **self.info,
            "model": self.parameters.model,
            "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **values,
        }
        write_json(self.directory / "run.json", content)


def source_of(parameters: StageParameters) -> ModelSource:
    """Where workers get the model of a run."""
    values = parameters.as_dict()
    return ModelSource(
        values.pop("model"),
        **{f.name: values[f.name] for f in fields(ModelSource) if f.name in values},
    )


def _read_data(parameters: StageParameters, stages: Sequence[str]) -> None:
    """Read what the stages will need, so that what is missing is known before the first one."""
    # MOVED

    run = Run(parameters)
    evaluated = {"full_model", "head_ablation", "attention_knockout"} & set(stages)
    tasks = run.tasks if evaluated else []
    for task in [*tasks, *(run.nlp_tasks if "nlp_tasks" in stages else [])]:
        spec, data = get_task_spec(task), run.task_data(task)
        if isinstance(spec, TextTaskSpec):
            load_splits(spec, data=data)
        else:
            load_rows(task, data=data)
    if parameters.reference is not None:
        reference_texts(parameters.model, reference=parameters.reference)
