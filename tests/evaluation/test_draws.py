"""How many heads of a random draw are induction heads: against a draw by hand."""

from __future__ import annotations

import random

import pandas as pd
import torch

from icl_helpers.evaluation.conditions import drawn_again
from icl_helpers.results.tables import annotated_table


def test_heads_drawn_again_are_counted_as_the_published_code_draws():
    # Layer 0 has the best two heads of four, layer 1 the third.
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.7, 0.2, 0.1, 0.0]])
    seeds = range(40)
    rows = pd.DataFrame(
        {"condition": "random_heads", "fraction": 3 / 8, "control": "published",
         "ablation_seed": pd.array(list(seeds), dtype="Int64")}
    )  # fmt: skip
    expected = []
    for seed in seeds:
        generator = random.Random(seed)
        first, second = generator.sample(range(4), 2), generator.sample(range(4), 1)
        expected.append(len({0, 1} & set(first)) + len({0} & set(second)))
    assert drawn_again(rows, scores).tolist() == expected
    assert len(set(expected)) == 4
    assert set(drawn_again(rows.assign(control="strict"), scores)) == {0}
    for nothing in ({"condition": "induction_heads"}, {"control": ""}, {"ablation_seed": pd.NA}):
        assert drawn_again(rows.assign(**nothing), scores).isna().all()


def test_tests_of_a_table_say_how_many_heads_of_each_draw_are_induction_heads():
    rows = [
        {"task": "repetition", "labels": "unrelated", "shots": 10, "condition": condition,
         "ablation": ablation, "fraction": fraction, "control": control, "ablation_seed": draw,
         "demonstration_seed": 42, "doc_id": doc, "correct": doc < right, "margin": 0.0,
         "valid": True, "drawn_again": again}
        for condition, ablation, fraction, control, draw, right, again in (
            ("full", "none", None, "", None, 19, None),
            ("induction_heads", "mean", 0.06, "", None, 4, None),
            ("random_heads", "mean", 0.06, "published", 43, 9, 2),
            ("random_heads", "mean", 0.06, "published", 42, 19, 0),
            ("random_heads", "mean", 0.06, "strict", 42, 19, 0),
        )
        for doc in range(20)
    ]  # fmt: skip
    documents = pd.DataFrame(rows).astype({"ablation_seed": "Int64", "drawn_again": "Int64"})
    tests = annotated_table(documents, 1, n_heads=64).tests
    found = {
        (
            row.condition,
            row.against,
            row.control or row.against_control,
        ): row.induction_heads_in_draws
        for row in tests.itertuples()
    }
    assert found == {
        ("induction_heads", "full", ""): "",
        ("induction_heads", "random_heads", "published"): "0, 2",
        ("induction_heads", "random_heads", "strict"): "0",
        ("random_heads", "full", "published"): "0, 2",
        ("random_heads", "full", "strict"): "0",
    }
