"""The package's excerpts of what others published, cut from the whole that they were given as.

``head_scores.parquet`` is an excerpt of the scores of Feucht et al. (2025), and
``knockout_readings.csv`` one of what the published code gives on SmolLM2-135M. The package's
``published/README.md`` says what they hold.

Example
-------
$ python -m tests.published_data ../shared
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

import icl_helpers
from icl_helpers.evaluation.store import write_parquet
from icl_helpers.files import atomic_path

PUBLISHED = Path(icl_helpers.__file__).parent / "published"


def head_scores(whole: pd.DataFrame) -> pd.DataFrame:
    """Attention from a random token to the one after its earlier copy, of every head."""
    rows = whole[(whole["measure"] == "next_tok_attn") & (whole["text"] == "random_tokens")]
    rows = rows[["model", "checkpoint", "layer", "head", "score"]]
    plain = rows.astype({"model": str, "checkpoint": str})
    return plain.sort_values(["model", "checkpoint", "layer", "head"], ignore_index=True)


def knockout_readings(reference: dict) -> pd.DataFrame:
    """Log-probabilities of both labels under two readings of the knockout, a row a document."""
    task = reference["tasks"]["wordseq1_binary"]
    scores = {name: given["logprobs"] for name, given in task["conditions"].items()}
    rows = [
        [fraction, document, reading, *scores[f"{name}_{fraction}"][document]]
        for fraction in ("0.01", "0.03")
        for reading, name in (("first token", "knock"), ("whole blank line", "knockfix"))
        for document in range(len(task["targets"]))
    ]
    columns = ["fraction", "doc_id", "blocked", *task["choices"]]
    return pd.DataFrame(rows, columns=columns).astype({"fraction": float})


def main() -> None:
    """Write both files into the package."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shared", type=Path, help="folder that holds published/ and reference/")
    shared = parser.parse_args().shared
    scores = head_scores(pd.read_parquet(shared / "published" / "head_scores.parquet"))
    write_parquet(PUBLISHED / "head_scores.parquet", scores)
    reference = json.loads((shared / "reference" / "smollm2.json").read_text())
    with atomic_path(PUBLISHED / "knockout_readings.csv") as temporary:
        knockout_readings(reference).to_csv(temporary, index=False)


if __name__ == "__main__":
    main()
