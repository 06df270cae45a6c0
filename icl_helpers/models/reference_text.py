"""Reference text for the means, and samples of it (paper, section 4)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from icl_helpers.errors import InputError, MissingArtefactError
from icl_helpers.files import embedded_dir, embedded_models, read_text, user_path
from icl_helpers.models.hub import go_offline_if_hub_unreachable

__all__ = ["PAPER_POSITIONS", "PAPER_SAMPLES", "reference_ids", "reference_texts", "samples_key"]

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
        return [line for line in read_text(path).splitlines() if line.strip()]
    import datasets

    go_offline_if_hub_unreachable()
    try:
        return datasets.load_dataset(MNLI, split="train")["premise"]
    # The hub's client raises errors of several libraries; each means the same to the user.
    except Exception as error:
        raise MissingArtefactError(
            f"the reference text {MNLI} (premises of MNLI's training split) is not in the cache "
            f"and cannot be fetched; connect to the hub once, or give a text file with one text a "
            f"line as reference"
        ) from error


def samples_key(ids: torch.Tensor) -> str:
    """Hash of reference samples."""
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]


def reference_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, n_samples: int = PAPER_SAMPLES,
    n_positions: int = PAPER_POSITIONS,
) -> Int[torch.Tensor, "samples positions"]:  # fmt: skip
    """Reference samples for the means: texts joined by spaces and cut (paper, section 4).

    Texts are taken in order; a sample is complete once it has more than ``n_positions`` tokens, is
    cut to ``n_positions``, and the next sample starts with the next text. No BOS. Fewer samples
    than asked for are returned when the texts run out; raises :class:`InputError` when they do not
    fill even one.
    """
    if n_samples < 1 or n_positions < 1:
        raise InputError(
            f"n_samples and n_positions must be at least 1, got {n_samples} and {n_positions}"
        )
    samples: list[list[int]] = []
    parts: list[str] = []
    n_tokens = 0
    for text in texts:
        parts.append(text)
        # Joined text may tokenise to fewer tokens than its parts: count parts first, then check.
        n_tokens += len(tokenizer(" " + text, add_special_tokens=False).input_ids)
        if n_tokens <= n_positions:
            continue
        ids = tokenizer(" ".join(parts), add_special_tokens=False, verbose=False).input_ids
        n_tokens = len(ids)
        if n_tokens > n_positions:
            samples.append(ids[:n_positions])
            parts, n_tokens = [], 0
        if len(samples) == n_samples:
            break
    if not samples:
        raise InputError(
            f"the reference texts hold fewer than {n_positions + 1} tokens, so not even one "
            f"sample of {n_positions} positions; give more text or ask for fewer positions"
        )
    return torch.tensor(samples)
