"""How often the interval of an accuracy holds the true value, by simulation.

Example
-------
>>> simulate_coverage(seeds=3, documents=100, seed_spread=0.02)
0.96
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from icl_helpers.errors import InputError
from icl_helpers.statistics import bootstrap_interval

__all__ = ["coverage_table", "simulate_coverage"]

_ACCURACY = 0.6


def simulate_coverage(
    *,
    seeds: int,
    documents: int,
    seed_spread: float,
    document_spread: float = 0.25,
    trials: int = 500,
    resamples: int = 400,
    level: float = 0.95,
    seed: int = 0,
) -> float:
    """Share of simulated runs whose interval holds the true accuracy, 0.6.

    A document's chance of a right answer is 0.6, plus its own difficulty, uniform between minus and
    plus ``document_spread``, plus the effect of the demonstration seed, normal with standard
    deviation ``seed_spread``; documents and seeds are drawn anew in every trial.
    """
    if trials < 1 or seeds < 1 or min(document_spread, seed_spread) < 0:
        raise InputError(
            f"trials and seeds must be >= 1 and spreads >= 0, got {trials}, {seeds}, "
            f"{document_spread}, {seed_spread}"
        )
    held = 0
    for trial in range(trials):
        rng = np.random.default_rng([seed, trial])
        difficulty = rng.uniform(-document_spread, document_spread, (documents, 1))
        chance = _ACCURACY + difficulty + rng.normal(0, seed_spread, (1, seeds))
        right = (rng.random((documents, seeds)) < chance).astype(np.int64)
        found = bootstrap_interval(right, level=level, resamples=resamples, seed=trial)
        held += found.low <= _ACCURACY <= found.high
    return held / trials


def coverage_table(
    *, documents: int, seeds: int = 3, spreads: tuple[float, ...] = (0.0, 0.02, 0.05)
) -> pd.DataFrame:
    """Coverage in percent over 500 simulations for several spreads over seeds, in points."""
    rows = [
        {
            "spread over seeds, points": 100 * spread,
            "95 % interval holds the truth, %": 100
            * simulate_coverage(seeds=seeds, documents=documents, seed_spread=spread),
        }
        for spread in spreads
    ]
    return pd.DataFrame(rows).set_index("spread over seeds, points")
