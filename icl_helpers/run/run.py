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
import time
from collections.abc import Iterator
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
from icl_helpers.attention.passes import one_angle_length
from icl_helpers.attention.scores import prefix_matching_scores, random_sequences, token_pool
from icl_helpers.errors import InputError
from icl_helpers.evaluation.conditions import FULL, Condition, conditions
from icl_helpers.evaluation.evaluate import ModelSource, evaluate_request, plan_request
from icl_helpers.evaluation.scorer import InterventionLM
from icl_helpers.evaluation.store import KEYS, read_frame
from icl_helpers.evaluation.workers import workers_from_environment
from icl_helpers.files import cached_tensor, check_run_dir, content_key, quarantine, write_json
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
from icl_helpers.run.plan import KINDS, Group, Plan, check_same_model, run_info

__all__ = ["Run", "source_of"]


class Run:
    """The artifacts of one model in one directory.

    Raises :class:`InputError` when the directory holds another model's run.
    """

    def __init__(self, parameters: StageParameters) -> None:
        self.parameters = parameters
        self.plan = Plan(parameters)
        self.directory = check_run_dir(parameters.run_dir)
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._identity: dict[str, Any] | None = None
        check_same_model(self.info, parameters)

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

        The model's key, its context in tokens (up to where rotary angles change), and the state of
        its files, as JSON values.
        """
        if self._identity is None:
            kept = self.info.get("identity") or {}
            if kept.get("state") and kept["state"] == self._checkpoint_state():
                self._identity = kept
                self._record()
            else:
                self._load()
        if self._identity is None:
            self._identity = self._identify()
        return self._identity

    def _identify(self) -> dict[str, Any]:
        """Describe the loaded model and note it in ``run.json``."""
        identity: dict[str, Any] = {
            "key": model_key(self.model, self.tokenizer, self.parameters.revision),
            "context": one_angle_length(self.model),
            "state": self._checkpoint_state(),
        }
        self._record(
            **model_facts(self.model),
            fingerprint=identity["key"]["fingerprint"],
            identity=identity,
        )
        return identity

    def _checkpoint_state(self) -> str | None:
        p = self.parameters
        return checkpoint_state(
            resolve_model(p.model), revision=p.revision, dtype=p.dtype, device=p.device,
            quantization=p.quantization, trust_remote_code=p.trust_remote_code,
        )  # fmt: skip

    def prefix_scores(self) -> torch.Tensor:
        """Prefix-matching scores, [sequences, layers, heads]; computed once."""
        key = content_key(["prefix scores", self._model_parts(), icl_helpers.__version__])

        def compute() -> torch.Tensor:
            sequences = random_sequences(self.tokenizer)
            scores = prefix_matching_scores(self.model, sequences)
            ranking = token_pool(self.tokenizer)[1]
            write_json(self.directory / "heads.json", self._heads_json(scores, ranking))
            return scores

        return cached_tensor(self.directory / "prefix_scores.safetensors", key, compute)

    def _heads_json(self, scores: torch.Tensor, ranking: str) -> dict[str, Any]:
        mean = scores.mean(0)
        chosen = {
            f"{f:g}": [list(head) for head in top_heads(mean, f)] for f in self.plan.fractions
        }
        return {"tokens_ranked_by": ranking, "induction_heads": chosen, "scores": mean.tolist()}

    def induction_heads(self, fraction: float | None = None) -> list[Head]:
        """The top heads at a fraction; default the largest of the run."""
        return top_heads(self.prefix_scores().mean(0), fraction or self.plan.fractions[-1])

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

        return cached_tensor(self.directory / "mean_head_outputs.safetensors", key, compute)

    def conditions(self, kind: str) -> list[Condition]:
        """Conditions of one kind: full, mean, zero or knockout."""
        if kind not in KINDS:
            raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "full":
            return [FULL]
        p = self.parameters
        control: Any = p.control
        return conditions(
            self.prefix_scores().mean(0), fractions=self.plan.fractions, ablations=[kind],
            head_outputs=self.mean_head_outputs() if kind == "mean" else None,
            ablation_seeds=p.ablation_seeds, control=control, categories=p.categories, full=False,
        )  # fmt: skip

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
        request = plan_request(
            sets, conditions=conditions, limit=p.limit, run_dir=self.directory,
            setting=functools.partial(self.plan.row_key, model_key=key),
        )  # fmt: skip
        with workers_from_environment() as workers:
            if workers is not None:
                self._release()
            load = functools.cache(self._scorer)
            results = evaluate_request(
                request, key, load=load, executor=workers, source=source_of(p)
            )
        return pd.DataFrame(results)

    def _scorer(self) -> InterventionLM:
        return InterventionLM(self.model, self.tokenizer, batch_size=self.parameters.batch_size)

    def results(self, group: Group = "tasks") -> pd.DataFrame:
        """Accuracies of a group's tasks that belong to the run's plan.

        Empty for the text tasks before their stage has run.
        """
        return self._table("results", group)

    def documents(self, group: Group = "tasks") -> pd.DataFrame:
        """Per-document results behind :meth:`results`."""
        return self._table("documents", group)

    def _table(self, name: str, group: Group) -> pd.DataFrame:
        path = self.directory / f"{name}.parquet"
        rows = self.plan.selected(read_frame(path), group, self.identity["key"])
        if rows.empty and group == "tasks":
            raise InputError(
                f"{path} holds no results of this model with these parameters: run the evaluation "
                f"stages with them first (notebooks 3 to 5); finished cells are used again"
            )
        return rows

    @contextmanager
    def stage(self, name: str) -> Iterator[Run]:
        """Note in ``run.json`` how long a stage took, once it has succeeded."""
        began = time.perf_counter()
        yield self
        seconds = {**self.info.get("seconds", {}), name: round(time.perf_counter() - began, 2)}
        self._record(seconds=seconds)

    def _model_parts(self) -> list[str]:
        return [str(value) for _, value in sorted(self.identity["key"].items())]

    def _record(self, **values: Any) -> None:
        content = {
            **self.info,
            "model": self.parameters.model,
            "parameters": self.info.get("parameters", StageParameters().as_dict())
            | self.parameters.as_dict(stated=True),
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
