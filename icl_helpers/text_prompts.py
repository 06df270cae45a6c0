"""Contexts of the text tasks: description, demonstrations of the training split, document.

:func:`icl_helpers.build_prompts` is the public way in.
"""

from __future__ import annotations

import functools
import json
import os

from icl_helpers.nlp_tasks import TextTaskSpec
from icl_helpers.sampling import Pool, draw_demonstrations
from icl_helpers.text_data import load_splits

__all__ = ["text_contexts"]


def text_contexts(
    spec: TextTaskSpec, *, shots: int, seed: int, labels: str | None, data: str | os.PathLike[str]
) -> list[tuple[str, int]]:
    """(context, right label) of every row of the validation split, in order.

    A demonstration equal to the document in every column is dropped, as in the published code.
    """
    words = spec.labels(labels)
    splits = load_splits(spec, data=data)
    train, validation = splits.train, splits.validation
    pool: Pool[str] = Pool(
        [_key(row) for row in train], [str(row["label"]) for row in train], sampler=spec.sampler
    )
    queries = [(_key(row), str(row["label"])) for row in validation]
    drawn = draw_demonstrations(pool, queries, shots=shots, seed=seed, same_split=False)

    @functools.cache
    def block(index: int) -> str:
        row = train[index]
        return f"{spec.render(row)} {words[row['label']]}\n\n"

    return [
        (
            f"{spec.description}\n\n{''.join(map(block, chosen))}{spec.render(row)}",
            row["label"],
        )
        for row, chosen in zip(validation, drawn, strict=True)
    ]


def _key(row: dict[str, object]) -> str:
    """A row's content as text: equal for equal rows."""
    return json.dumps(row, sort_keys=True, default=str)
