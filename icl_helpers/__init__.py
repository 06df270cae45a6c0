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
    "AttentionKnockout": "interventions",
    "BookError": "book",
    "Condition": "condition",
    "FailedCellsError": "scheduling",
    "Head": "heads",
    "ICLError": "errors",
    "InputError": "errors",
    "InterventionError": "errors",
    "LeakError": "leaks",
    "MeanAblation": "interventions",
    "MissingArtefactError": "errors",
    "ModelSource": "worker",
    "Prompt": "prompts",
    "Run": "run",
    "StageError": "pipeline",
    "StorageError": "store",
    "UnsupportedArchitectureError": "errors",
    "ZeroAblation": "interventions",
    "attention_patterns": "prefix_matching",
    "attention_viewer": "viewer",
    "build_prompts": "prompts",
    "conditions": "condition",
    "dask_workers": "scheduling",
    "document_results": "documents",
    "estimate_cost": "costs",
    "evaluate": "evaluation",
    "induction_pattern": "patterns",
    "intervene": "interventions",
    "layer_matched_heads": "heads",
    "load_model": "models",
    "mean_head_outputs": "means",
    "prefix_matching_scores": "prefix_matching",
    "process_workers": "scheduling",
    "published_accuracy": "published",
    "random_heads": "heads",
    "random_sequences": "prefix_matching",
    "reference_ids": "means",
    "stage_parameters": "parameters",
    "task_names": "task_registry",
    "top_heads": "heads",
    "viewer_prompts": "viewer",
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
