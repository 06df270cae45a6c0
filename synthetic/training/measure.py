"""What a finished training is: its dynamics at each checkpoint, and its effect on all documents.

The measurements are shipped with the embedded model, since all documents of all tasks take longer
than a reader wants to wait.

Example
-------
>>> frame = measure_training("runs/training")   # the output_dir of synthetic.training.train.train
>>> frame[frame.measure == "prefix_score"].pivot_table("value", "step", ["layer", "head"])
>>> measure_effect("runs/training/release", training_seed=0)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from safetensors.torch import load_model as load_weights
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM

from icl_helpers.attention.heads import head_fractions
from icl_helpers.attention.means import mean_head_outputs
from icl_helpers.attention.scores import prefix_matching_scores, random_sequences
from icl_helpers.errors import MissingArtefactError
from icl_helpers.evaluation.conditions import conditions
from icl_helpers.evaluation.evaluate import evaluate
from icl_helpers.evaluation.scorer import reference_samples
from icl_helpers.evaluation.store import write_parquet
from icl_helpers.models.loading import load_model
from icl_helpers.models.reference_text import reference_texts
from icl_helpers.results.statistics import accuracy_intervals
from icl_helpers.tasks.specs import task_names
from synthetic.training.recipe import Recipe, phase_at
from synthetic.training.train import build_model, read_progress, release_model

__all__ = [
    "COLUMNS",
    "load_checkpoint",
    "measure_effect",
    "measure_training",
    "measure_trainings",
    "repeat_losses",
]


COLUMNS = ["step", "measure", "layer", "head", "task", "value"]
_TASKS = ("repetition", "recursion", "centre_embedding", "wordseq1_binary", "wordseq2_binary")
# What the accuracy under a condition is called.
_ACCURACIES = {
    "full": "accuracy",
    "induction_heads": "accuracy_without_induction_heads",
    "random_heads": "accuracy_without_random_heads",
}


def load_checkpoint(path: str | os.PathLike[str], recipe: Recipe) -> LlamaForCausalLM:
    """The model as it was at a checkpoint of :func:`synthetic.training.train.train`."""
    model = build_model(recipe).eval()
    load_weights(model, path)
    return model


@torch.no_grad()
def repeat_losses(
    model: LlamaForCausalLM, sequences: Int[torch.Tensor, "sequences length"], *, repeats: int = 4
) -> tuple[float, float]:
    """Mean loss (nats per token) in the first copy of repeated sequences, and in the last.

    A model that copies from context has a low loss in the last copy; the first cannot be predicted.
    """
    ids = sequences.repeat(1, repeats).to(model.device)
    logits = model(ids).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    length = sequences.shape[1]
    return float(losses[:, : length - 1].mean()), float(losses[:, -length:].mean())


def measure_training(
    output_dir: str | os.PathLike[str],
    *,
    tasks: Sequence[str] = _TASKS,
    shots: int = 10,
    limit: int | None = 100,
) -> pd.DataFrame:
    """Measure every checkpoint of a finished training run.

    The heads removed at every checkpoint are those that score 0.3 or more in the finished model
    (zero ablation); the control is as many others of the same layers.

    Parameters
    ----------
    output_dir
        What :func:`synthetic.training.train.train` wrote.
    shots, limit
        Demonstrations, drawn by seed 42, and the documents of each task.

    Returns
    -------
    DataFrame
        Tidy, columns step, measure, layer, head, task, value. Measures: ``prefix_score`` (one row
        a head), ``phase_begins`` (the step itself), ``loss_first_copy`` and ``loss_last_copy``
        (nats per token), and ``accuracy``, ``accuracy_without_induction_heads``,
        ``accuracy_without_random_heads`` (one row a task).

    Raises
    ------
    MissingArtefactError
        The directory holds no finished training.
    """
    output = Path(output_dir)
    step, formed, recipe = read_progress(output)
    if phase_at(recipe, step, formed).name != "end" or not (output / "model").is_dir():
        raise MissingArtefactError(
            f"the training in {output} is not finished; run `synthetic.training train` on it "
            f"again to go on"
        )
    patterns = step - recipe.pattern_steps
    files = sorted((output / "checkpoints").glob("step-*.safetensors"))
    final, _ = load_model(str(output / "model"), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    sequences = random_sequences(tokenizer)
    scores = prefix_matching_scores(final, sequences).mean(0)
    chosen = conditions(
        scores, fractions=[head_fractions(scores)["larger"]], ablations=["zero"],
        ablation_seeds=[42], control="strict",
    )  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"step": begin, "measure": "phase_begins", "value": begin}
        for begin in (patterns - recipe.episode_steps, patterns)
    ]
    for path in tqdm(files, unit="checkpoint"):
        model = load_checkpoint(path, recipe)
        step = int(path.stem.removeprefix("step-"))
        rows += [{"step": step, **row} for row in _scores_and_losses(model, sequences)]
        results = evaluate(
            model, tokenizer, tasks=tasks, shots=shots, seeds=[42], limit=limit,
            conditions=chosen,
        )  # fmt: skip
        rows += (
            results.assign(step=step, measure=results["condition"].map(_ACCURACIES))
            .rename(columns={"accuracy": "value"})[["step", "measure", "task", "value"]]
            .to_dict("records")
        )
    return pd.DataFrame(rows, columns=COLUMNS).astype({"layer": "Int64", "head": "Int64"})


def _scores_and_losses(
    model: LlamaForCausalLM, sequences: Int[torch.Tensor, "sequences length"]
) -> Iterator[dict[str, Any]]:
    scores = prefix_matching_scores(model, sequences).mean(0)
    for layer, row in enumerate(scores.tolist()):
        for head, value in enumerate(row):
            yield {"measure": "prefix_score", "layer": layer, "head": head, "value": value}
    first, last = repeat_losses(model, sequences)
    yield {"measure": "loss_first_copy", "value": first}
    yield {"measure": "loss_last_copy", "value": last}


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
        What :func:`synthetic.training.train.release_model` wrote.
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
        Output directories of :func:`train`, one for each training seed. The released model is left
        in their ``release/``; finished measurements are kept in ``effect/``.
    limit
        Documents of each task for the final effect; None: all.
    """
    frames: dict[str, list[pd.DataFrame]] = {"effect": [], "dynamics": []}
    for output in map(Path, output_dirs):
        dynamics = measure_training(output)
        seed = read_progress(output)[2].seed
        dynamics.insert(0, "training_seed", seed)
        frames["dynamics"].append(dynamics)
        released = output / "release"
        release_model(output, released)
        frames["effect"].append(
            measure_effect(released, training_seed=seed, run_dir=output / "effect", limit=limit)
        )
    written = []
    for name, parts in frames.items():
        path = Path(target) / f"{name}.parquet"
        write_parquet(path, pd.concat(parts, ignore_index=True))
        written.append(path)
    return written
