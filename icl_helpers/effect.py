"""Does the finding hold for a trained embedded model? Full data sets, every seed, with intervals.

The measurement is the same for every training seed and is shipped with the embedded model, since
all documents of all tasks take longer than a reader wants to wait.

Example
-------
>>> frame = measure_effect("runs/training-0/release", training_seed=0)
>>> effect_summary(frame)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from icl_helpers._paths import embedded_dir
from icl_helpers.condition import conditions
from icl_helpers.dynamics import measure_training
from icl_helpers.errors import MissingArtefactError
from icl_helpers.evaluation import evaluate
from icl_helpers.means import mean_head_outputs
from icl_helpers.models import load_model
from icl_helpers.prefix_matching import prefix_matching_scores, random_sequences
from icl_helpers.reference import reference_samples, reference_texts
from icl_helpers.release import head_fractions, release_model
from icl_helpers.statistics import accuracy_intervals
from icl_helpers.store import atomic_path
from icl_helpers.task_registry import get_task_spec, task_names
from icl_helpers.train import read_progress

__all__ = ["effect_summary", "measure_effect", "measure_trainings", "read_measurements"]


def read_measurements(name: str, *, model: str = "icl-tiny") -> pd.DataFrame:
    """Shipped measurements of an embedded model: ``effect`` or ``dynamics``.

    Raises :class:`MissingArtefactError` when the model has none.
    """
    path = embedded_dir() / model / f"{name}.parquet"
    if not path.is_file():
        raise MissingArtefactError(
            f"{model!r} has no measurements {name!r}: only an embedded model's training is known; "
            f"the measurements come from `icl measure`"
        )
    return pd.read_parquet(path)


def measure_effect(
    folder: str | os.PathLike[str],
    *,
    training_seed: int,
    run_dir: str | os.PathLike[str] | None = None,
    limit: int | None = None,
) -> pd.DataFrame:
    """Accuracy of a released model under every condition, all documents and demonstration seeds.

    The larger set of induction heads is removed by mean ablation or its pattern blocked; the random
    control is the strict one, from the same layers without the induction heads.

    Parameters
    ----------
    folder
        What :func:`icl_helpers.release.release_model` wrote.
    run_dir
        Keeps finished cells, so that an interrupted measurement goes on.
    limit
        Only the first documents of each task; None: all.

    Returns
    -------
    DataFrame
        Columns training_seed, task, labels, shots, condition, ablation, fraction, accuracy, low,
        high (percent, 95 % interval), documents, runs.
    """
    model, tokenizer = load_model(str(folder))
    scores = prefix_matching_scores(model, random_sequences(tokenizer)).mean(0)
    texts = reference_texts(str(folder), reference=str(Path(folder) / "reference.txt"))
    chosen = conditions(
        scores, fractions=[head_fractions(scores)["larger"]], ablations=["mean", "knockout"],
        head_outputs=mean_head_outputs(model, reference_samples(model, tokenizer, texts)),
        control="strict",
    )  # fmt: skip
    results = evaluate(
        model, tokenizer, tasks=task_names("abstract"), conditions=chosen, limit=limit,
        run_dir=run_dir,
    )  # fmt: skip
    frame = accuracy_intervals(results.documents)
    frame.insert(0, "training_seed", training_seed)
    return frame


def effect_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The finding in a few numbers, in percent or percentage points, one row a training seed.

    Averages are over the two-label tasks at ten shots, but for the four-way accuracy (twenty
    shots). ``furthest from chance`` and ``moved at zero shots`` are the worst task's. The share of
    the pattern is the loss under knockout in percent of the loss under removal, averaged over the
    tasks where removal costs 10 points or more (NaN where there is none).
    """
    return pd.DataFrame(
        [_summary(part) | {"training_seed": seed} for seed, part in frame.groupby("training_seed")]
    ).set_index("training_seed")


def _summary(part: pd.DataFrame) -> dict[str, float]:
    wide = part.pivot_table("accuracy", ["task", "shots"], "condition").reset_index()
    chance = 100 / wide["task"].map(lambda task: len(get_task_spec(task).choices))
    few = wide["shots"] == wide.groupby("task")["shots"].transform("max")
    binary = wide[few & (chance == 50)]
    zero = wide["shots"] == 0
    removed = wide["full"] - wide["induction_heads"]
    blocked = wide["full"] - wide["induction_pattern"]
    costly = few & (removed >= 10)
    return {
        "full, two labels": binary["full"].mean(),
        "full, four labels": wide.loc[few & (chance == 25), "full"].mean(),
        "zero-shot, furthest from chance": (wide["full"] - chance)[zero].abs().max(),
        "loss without induction heads": removed[binary.index].mean(),
        "loss without random heads": (binary["full"] - binary["random_heads"]).mean(),
        "share of the pattern": 100 * (blocked[costly] / removed[costly]).mean(),
        "moved at zero shots": removed[zero].abs().max(),
    }


def measure_trainings(
    output_dirs: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    limit: int | None = None,
) -> list[Path]:
    """Release and measure finished trainings; write ``effect`` and ``dynamics`` into ``target``.

    Parameters
    ----------
    output_dirs
        Output directories of :func:`icl_helpers.train.train`, one for each training seed. The
        released model is left in their ``release/``; finished measurements are kept in ``effect/``.
    limit
        Documents of each task for the final effect; None: all.
    """
    effects, dynamics = [], []
    for output in map(Path, output_dirs):
        frame = measure_training(output)
        seed = read_progress(output)[2].seed
        frame.insert(0, "training_seed", seed)
        dynamics.append(frame)
        release_model(output, output / "release")
        effects.append(
            measure_effect(
                output / "release", training_seed=seed, run_dir=output / "effect", limit=limit
            )
        )
    written = []
    for name, frames in (("effect", effects), ("dynamics", dynamics)):
        path = Path(target) / f"{name}.parquet"
        with atomic_path(path) as temporary:
            pd.concat(frames, ignore_index=True).to_parquet(temporary, index=False)
        written.append(path)
    return written
