"""The paper's published accuracies, as data (Tables 1, 3, 4 and 5)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

__all__ = ["PAPER_MODELS", "published_accuracy"]

# Published name of each of the paper's models, by the last part of its hub id.
PAPER_MODELS = {"meta-llama-3-8b": "Llama-3-8B", "internlm2-20b": "InternLM2-20B"}


def published_accuracy() -> pd.DataFrame:
    """Every published accuracy, in percent, one row each; columns as in ``published/README.md``."""
    return pd.read_csv(Path(__file__).parent / "published" / "accuracy.csv")
