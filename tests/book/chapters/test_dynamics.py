"""What the chapter on training dynamics says, on measurements made up for the purpose and shipped."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pandas as pd
import pyarrow.parquet
import pytest

import icl_helpers as icl
from icl_helpers.book.chapters import dynamics
from icl_helpers.files import embedded_dir
from icl_helpers.results.outcomes import read_measurements
from synthetic.training.batches import repeat_batch
from synthetic.training.recipe import Recipe

NOTEBOOK = Path(__file__).parents[3] / "notebooks" / "training_dynamics.ipynb"


def counts(**models: list[tuple[int | None, int, float]]) -> pd.DataFrame:
    """Rows of (step, heads at 0.3 or more, highest score) of models of 64 heads."""
    rows = [
        {"model": model, "step": step, "heads": 64, "induction": n, "score": score}
        for model, steps in models.items()
        for step, n, score in steps
    ]
    return pd.DataFrame(rows).astype({"step": "Int64"})


def measured(*rows: tuple[int, str, float]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["step", "measure", "value"])
    return frame.assign(training_seed=5, layer=0, head=range(len(rows)))


def test_rise_names_the_checkpoints_on_both_sides_and_what_became_of_the_heads():
    found = dynamics.rise_sentences(
        counts(
            steady=[(10, 0, 0.1), (2000, 8, 0.8), (None, 4, 0.9)],
            relapse=[(10, 2, 0.4), (20, 0, 0.2), (30, 1, 0.5)],
            never=[(10, 0, 0.1), (20, 0, 0.22)],
            lost=[(10, 3, 0.6), (20, 0, 0.2)],
            always=[(10, 3, 0.6), (20, 2, 0.5)],
        )
    )
    said = dict(line.removeprefix("- **").split("**: ") for line in found.splitlines())
    assert "0.3 or more at step 10, 8 of 64 at the next checkpoint, step 2,000;" in said["steady"]
    assert "8 at most (step 2,000), 4 of 64 heads (6.3 %) at the end" in said["steady"]
    assert "best has 0.90" in said["steady"]
    assert "so before" not in said["steady"]
    assert "at step 20, 1 of 64 at the next" in said["relapse"]
    assert "(up to 2 did so before, and no longer)" in said["relapse"]
    for name, score in (("never", "0.22"), ("lost", "0.20")):
        assert said[name] == f"no head scores 0.3 or more at the end; the best has {score}."
    assert "at every checkpoint" in said["always"]


def test_heads_at_the_beginning_of_the_episodes_are_those_measured_there():
    none = measured((40, "phase_begins", 40), (90, "phase_begins", 90), (40, "prefix_score", 0.02))
    assert "begin at step 40; there no head scores 0.3" in dynamics.episode_sentences(none)
    some = measured(
        (40, "phase_begins", 40), (40, "prefix_score", 0.3), (40, "prefix_score", 0.7),
        (50, "prefix_score", 0.9),
    )  # fmt: skip
    assert "there 2 of 2 heads score 0.3 or more" in dynamics.episode_sentences(some)
    assert "the best has 0.70" in dynamics.episode_sentences(some)


@pytest.mark.parametrize(("worst", "side"), [(34.0, "costs more than that"), (4.0, "no more than")])
def test_loss_is_compared_with_an_even_guess(worst, side):
    frame = measured(
        (0, "loss_first_copy", 3), (0, "loss_last_copy", 3), (9, "loss_first_copy", 5),
        (9, "loss_last_copy", worst), (20, "loss_first_copy", 6), (20, "loss_last_copy", 0.5),
    )  # fmt: skip
    found = dynamics.loss_sentences(frame, 100)
    assert f"costs {math.log(100):.1f} nats" in found
    assert side in found
    assert f"{worst:.1f} nats at step 9, where the first costs 5.0" in found
    assert "at the end the last costs 0.50 and the first 6.0" in found


def test_removal_is_told_of_the_steps_where_the_full_model_is_good_and_by_kind():
    measures = ("accuracy", "accuracy_without_induction_heads", "accuracy_without_random_heads")
    tables = {
        "repetition": {1: (0.5, 0.4, 0.5), 2: (0.8, 0.6, 0.7), 3: (0.9, 0.3, 0.85)},
        "wordseq1_binary": {1: (0.5, 0.5, 0.5), 2: (0.6, 0.1, 0.6), 3: (0.9, 0.02, 0.9)},
        "wordseq2_binary": {1: (0.5, 0.5, 0.5), 2: (0.9, 0.1, 0.6), 3: (0.9, 0.05, 0.8)},
    }
    frame = pd.concat(
        measured(*[(step, name, value) for step, values in table.items()
                   for name, value in zip(measures, values, strict=True)]).assign(task=task)
        for task, table in tables.items()
    )  # fmt: skip
    letters, words = dynamics.removal_sentences(frame).splitlines()
    assert "75 % or more on every task at 2 of 3 saved steps, the first of them 2" in letters
    assert "30 to 60 % remain without its induction heads and 70 to 85 % without" in letters
    assert "on words, two labels, " in words
    assert "at 1 of 3 saved steps, the first of them 3" in words
    assert "2 to 5 % remain without its induction heads and 80 to 90 % without" in words
    assert "no step has 95 % or more" in dynamics.removal_sentences(frame, level=0.95)


def test_shipped_measurements_are_told_as_counting_gives():
    path = embedded_dir() / "icl-tiny" / "dynamics.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    frame = read_measurements("dynamics")
    said = dynamics.episode_sentences(frame) + dynamics.loss_sentences(frame, 1500)
    for seed in {row["training_seed"] for row in rows}:
        mine = [row for row in rows if row["training_seed"] == seed]
        begin = min(row["step"] for row in mine if row["measure"] == "phase_begins")
        scores = [r["value"] for r in mine if (r["measure"], r["step"]) == ("prefix_score", begin)]
        assert len(scores) == 64
        # The page once said that induction heads had formed by then.
        assert max(scores) < 0.05
        assert f"begin at step {begin:,}; there no head scores 0.3 or more" in said
        losses = [row["value"] for row in mine if row["measure"] == "loss_last_copy"]
        assert f"more than that at its worst, {max(losses):.1f} nats" in said


def test_published_models_stand_beside_both_training_seeds():
    found = dynamics.rise_counts(read_measurements("dynamics"), "icl-tiny")
    assert set(found["model"]) == {
        "icl-tiny, seed 0 (here)", "icl-tiny, seed 1 (here)", "OLMo-2-1124-7B (Feucht et al.)",
        "pythia-6.9b (Feucht et al.)",
    }  # fmt: skip
    assert found.groupby("model").size().filter(like="Feucht").tolist() == [8, 8]


def test_sentences_of_the_page_on_what_training_shows_hold():
    text = "".join(
        line
        for cell in json.loads(NOTEBOOK.read_text())["cells"]
        for line in [*cell["source"], "\n"]
    )
    assert "lasted until induction heads had formed" not in text
    assert "3 to 23 tokens out of 300" in text
    recipe = Recipe()
    assert recipe.repeat_vocab == 300
    assert recipe.repeat_length // 2 - 1 == 23
    # "until four heads did induction on those very sequences": not until the steps ran out.
    begins = read_measurements("dynamics").query("measure == 'phase_begins'")
    first = begins.groupby("training_seed")["step"].min() - recipe.widening_steps
    assert (first < recipe.repeat_steps).all()
    assert recipe.induction_heads == 4
    # "none of them among those 300"
    _, tokenizer = icl.load_model("icl-tiny")
    sequences = icl.random_sequences(tokenizer)
    assert int(sequences.min()) >= recipe.repeat_vocab
    assert sequences.shape[1] == 50
    # "no phase asks for the tokens of a first copy": what is scored has occurred before.
    batch = repeat_batch(
        random.Random(0), vocab_size=recipe.repeat_vocab, rows=50, length=recipe.repeat_length,
        pool=64, watched=1,
    )  # fmt: skip
    for ids, weights in zip(batch.ids.tolist(), batch.weights.tolist(), strict=True):
        for place, weight in enumerate(weights):
            assert weight == 0 or ids[place] in ids[:place]


def test_effect_of_training_is_summed_up_by_kind_and_never_over_opposite_tasks():
    rows = [
        {"training_seed": 0, "task": task, "labels": "unrelated", "shots": shots,
         "condition": condition, "accuracy": accuracy}
        for task, few in (("repetition", 92), ("recursion", 72), ("wordseq1_binary", 6),
                          ("wordseq2_binary", 1))
        for shots, by_condition in (
            (10, {"full": 99, "induction_heads": few, "induction_pattern": 50, "random_heads": 98}),
            (0, {"full": 50, "induction_heads": 46.5, "induction_pattern": 50, "random_heads": 50}),
        )
        for condition, accuracy in by_condition.items()
    ]  # fmt: skip
    found = dynamics.effect_summary(pd.DataFrame(rows))[0]
    assert found["letters, without induction heads"] == "72 to 92"
    assert found["words, two labels, without induction heads"] == "1 to 6"
    assert found["words, two labels, pattern blocked"] == "50"
    assert found["no examples, moved by removal at most"] == "3.5"


def test_model_card_says_how_many_induction_heads_there_are_without_the_penalty():
    measured = read_measurements("no-penalty-dynamics")
    said, prediction = dynamics.penalty_sentences({"Without it": measured})
    assert said.startswith("Without it 7 of 64 heads end at 0.3 or more, the best at 0.96: ")
    assert said.endswith(": 7 of the 16 of layer 3.")
    assert prediction.endswith("**did not hold**: layer 3 (44 % of its heads).")
    card = (embedded_dir() / "icl-tiny" / "README.md").read_text()
    assert "seven of the last layer's sixteen\nend at 0.3 or more, in place of four" in card
    assert f"(at {measured['step'].nunique()} saved steps)" in card


def test_prediction_on_the_penalty_holds_where_most_heads_of_a_layer_do_induction():
    measured = pd.DataFrame(
        {"measure": "prefix_score", "step": [0] * 4 + [9] * 4, "layer": [0, 0, 1, 1] * 2,
         "head": [0, 1] * 4, "value": [0.0] * 4 + [0.1, 0.1, 0.9, 0.5]}
    )  # fmt: skip
    said, prediction = dynamics.penalty_sentences({"Without it": measured})
    assert said == (
        "Without it 2 of 4 heads end at 0.3 or more, the best at 0.90: 2 of the 2 of layer 1."
    )
    assert prediction.endswith("become induction heads*: **held**.")
