"""Generate the abstract pattern tasks' and the stand-in text tasks' data, always the same bytes.

Usage::

    python synthetic/generate.py [--out DIRECTORY]

Letter rows use distinct letters and every row occurs once; word rows are all ordered pairs of their
two categories. Each data set is drawn by its own generator, so that changing one leaves the others.
Text rows are distinct template sentences, half of each label; those of ``validation.jsonl`` are
kept out of the embedded model's training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import string
from pathlib import Path

from synthetic.training.corpus import (
    TEXT_TASKS,
    WORD_TASKS,
    evaluation_rows,
    letters,
    word_categories,
)

HERE = Path(__file__).resolve().parent
ROWS_PER_LABEL = 250

# Name: pattern of the Foo rows; Bar rows are as many distinct letters.
LETTER_TASKS = {"repetition": "ABAB", "recursion": "ABBB", "centre_embedding": "ABCBA"}

# Name: rows a split. The templates hold few facts: a quarter of them, 63, is kept for validation.
TEXT_TASKS_ROWS = {"review_sentiment": 400, "fact_opinion": 120}

Row = dict[str, str]


def letter_rows(name: str, pattern: str, *, seed: int = 0) -> list[Row]:
    """Distinct rows of a letter task, half with the pattern (Foo), half without (Bar), shuffled."""
    rng = random.Random(f"{name}-{seed}")
    rows: list[Row] = []
    for label, shape in (("Foo", pattern), ("Bar", string.ascii_uppercase[: len(pattern)])):
        seen: dict[str, None] = {}
        while len(seen) < ROWS_PER_LABEL:
            seen.setdefault(letters(rng, shape))
        rows += [{"sequence": sequence, "label": label} for sequence in seen]
    rng.shuffle(rows)
    return rows


def word_rows(name: str, classes: dict[str, list[str]], *, seed: int = 0) -> list[Row]:
    """Every pair of words of each class, shuffled."""
    rng = random.Random(f"{name}-{seed}")
    rows = [
        {"text": f"{first} {second}", "label": label}
        for label, pair in classes.items()
        for first, second in itertools.product(*(word_categories()[category] for category in pair))
    ]
    rng.shuffle(rows)
    return rows


def generate(out: Path) -> list[Path]:
    """Write every data set below ``out`` and return the files."""
    data = {name: letter_rows(name, pattern) for name, pattern in LETTER_TASKS.items()}
    data |= {name: word_rows(name, classes) for name, classes in WORD_TASKS.items()}
    texts = {}
    for name, rows in data.items():
        lines = ",\n".join(json.dumps(row) for row in rows)
        texts[out / f"{name}.json"] = f"[\n{lines}\n]\n"
    for task in TEXT_TASKS:
        for split, sentences in evaluation_rows(task, n=TEXT_TASKS_ROWS[task.name]).items():
            path = out / "text" / task.name / f"{split}.jsonl"
            texts[path] = "".join(json.dumps(row) + "\n" for row in sentences)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(texts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="directory to write to")
    for path in generate(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
