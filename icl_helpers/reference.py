"""Reference text for the means, and the condition of a single evaluation (paper, section 4)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers._paths import embedded_dir, user_path
from icl_helpers.condition import FULL, Condition, conditions
from icl_helpers.errors import InputError, MissingArtefactError
from icl_helpers.hub import use_cache_where_hub_is_silent
from icl_helpers.means import mean_head_outputs, reference_ids
from icl_helpers.models import context_length, embedded_models
from icl_helpers.prefix_matching import prefix_matching_scores, random_sequences

__all__ = [
    "PAPER_POSITIONS",
    "PAPER_SAMPLES",
    "reference_samples",
    "reference_texts",
    "single_condition",
]

PAPER_SAMPLES = 500
PAPER_POSITIONS = 3000
MNLI = "nyu-mll/multi_nli"


def reference_texts(model_name: str, *, reference: str | None = None) -> Iterable[str]:
    """Texts for the means: a file's lines, an embedded model's own, or premises of MNLI.

    Raises :class:`MissingArtefactError` when the file is absent or MNLI cannot be loaded.
    """
    if reference is None and model_name in embedded_models():
        reference = str(embedded_dir() / model_name / "reference.txt")
    if reference is not None:
        path = user_path(reference)
        if not path.is_file():
            raise MissingArtefactError(f"reference text {path} does not exist; give a text file")
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    import datasets

    use_cache_where_hub_is_silent()
    try:
        return datasets.load_dataset(MNLI, split="train")["premise"]
    # The hub's client raises errors of several libraries; each means the same to the user.
    except Exception as error:
        raise MissingArtefactError(
            f"the reference text {MNLI} (premises of MNLI's training split) is not in the cache "
            f"and cannot be fetched; connect to the hub once, or give a text file with one text a "
            f"line as reference"
        ) from error


def reference_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    n_samples: int | None = None,
    n_positions: int | None = None,
) -> torch.Tensor:
    """Reference samples: 500 of 3,000 tokens, fewer positions where the context is shorter."""
    return reference_ids(
        tokenizer,
        texts,
        n_samples=n_samples or PAPER_SAMPLES,
        n_positions=n_positions or min(PAPER_POSITIONS, context_length(model)),
    )


def samples_key(ids: torch.Tensor) -> str:
    """Hash of reference samples."""
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]


def single_condition(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
    *,
    ablate: str,
    ablation: str,
    fraction: float,
    seed: int,
    control: str,
    reference: str | None,
) -> Condition:
    """One condition from scratch: scores and, where they are needed, means are computed here."""
    names = {
        "induction": "induction_heads",
        "random": "random_heads",
        "pattern": "induction_pattern",
    }
    if ablate == "none":
        return FULL
    if ablate not in names or ablation not in ("mean", "zero"):
        raise InputError(
            f"ablate must be none, {', '.join(names)} and ablation mean or zero, got {ablate!r} "
            f"and {ablation!r}"
        )
    scores = prefix_matching_scores(model, random_sequences(tokenizer)).mean(0)
    kind = "knockout" if ablate == "pattern" else ablation
    means = None
    if kind == "mean":
        texts = reference_texts(model_name, reference=reference)
        means = mean_head_outputs(model, reference_samples(model, tokenizer, texts))
    which: Any = control
    found = conditions(
        scores, fractions=[fraction], ablations=[kind], head_outputs=means,
        ablation_seeds=[seed], control=which, full=False,
    )  # fmt: skip
    return next(condition for condition in found if condition.name == names[ablate])
