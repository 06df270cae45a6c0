"""Helpers to find, remove and block induction heads, and to measure what few-shot accuracy loses.

Example
-------
>>> import icl_helpers as icl
>>> model, tokenizer = icl.load_model("icl-tiny")
>>> sequences = icl.random_sequences(tokenizer)
>>> scores = icl.prefix_matching_scores(model, sequences).mean(0)
>>> heads = icl.top_heads(scores, 0.03)
>>> with icl.intervene(model, icl.ZeroAblation(heads)):
...     logits = model(**tokenizer("A B A", return_tensors="pt")).logits

Names are imported on first use, so that ``import icl_helpers`` and ``icl --help`` stay fast.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS: dict[str, str] = {
    "AttentionKnockout": "attention.interventions",
    "BookError": "book.build",
    "Condition": "evaluation.conditions",
    "FailedCellsError": "evaluation.workers",
    "Head": "attention.heads",
    "ICLError": "errors",
    "InputError": "errors",
    "InterventionError": "errors",
    "LeakError": "redaction",
    "MeanAblation": "attention.interventions",
    "MissingArtefactError": "errors",
    "ModelSource": "evaluation.evaluate",
    "NotMeasuredError": "errors",
    "Prompt": "tasks.prompts",
    "ResampleAblation": "attention.interventions",
    "Run": "run.run",
    "StageError": "run.stages",
    "StorageError": "files",
    "UnsupportedArchitectureError": "errors",
    "ZeroAblation": "attention.interventions",
    "attention_patterns": "attention.scores",
    "attention_viewer": "results.viewer",
    "build_prompts": "tasks.prompts",
    "causal_composition": "analysis.circuits",
    "composition_scores": "analysis.circuits",
    "check_model": "run.check",
    "compare_logs": "results.comparison",
    "conditions": "evaluation.conditions",
    "control_pattern": "attention.induction_pattern",
    "copying_scores": "analysis.circuits",
    "dask_workers": "evaluation.workers",
    "direct_logit_effects": "analysis.circuits",
    "direct_removal": "analysis.circuits",
    "document_results": "evaluation.store",
    "estimate_cost": "run.costs",
    "evaluate": "evaluation.evaluate",
    "export_run": "run.bundle",
    "function_vector_scores": "analysis.function_vectors",
    "import_bundle": "run.bundle",
    "induction_pattern": "attention.induction_pattern",
    "intervene": "attention.interventions",
    "layer_matched_heads": "attention.heads",
    "load_model": "models.loading",
    "mean_head_outputs": "attention.means",
    "prefix_matching_scores": "attention.scores",
    "previous_token_scores": "analysis.circuits",
    "process_workers": "evaluation.workers",
    "prompt_head_outputs": "attention.means",
    "published_accuracy": "results.comparison",
    "random_heads": "attention.heads",
    "random_sequences": "attention.scores",
    "reference_ids": "models.reference_text",
    "repeated_token_pattern": "attention.induction_pattern",
    "repeated_word_pattern": "attention.induction_pattern",
    "run_at": "run.run",
    "stage_parameters": "parameters",
    "task_names": "tasks.specs",
    "top_heads": "attention.heads",
    "verify_bundle": "run.verify",
    "viewer_prompts": "results.viewer",
}

__all__ = sorted([*_EXPORTS, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"icl_helpers.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'icl_helpers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
