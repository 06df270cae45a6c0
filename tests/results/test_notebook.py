"""What the results page shows: a run's tables with their files, published values where they belong."""

from __future__ import annotations

import pandas as pd
import pytest

from icl_helpers.evaluation.store import document_results
from icl_helpers.results import notebook as reporting
from tests.results.test_comparison import write_run

RIGHT = {"full": 19, "induction_heads": 4, "random_heads": 19}


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """Text of what was displayed, in order."""
    found: list[str] = []
    monkeypatch.setattr(reporting, "display", lambda thing, metadata=None: found.append(thing.data))
    return found


def test_table_of_a_run_is_shown_with_its_tests_and_both_are_written(tmp_path, shown):
    documents = document_results(write_run(tmp_path / "a", "icl-tiny", fraction=0.06, right=RIGHT))
    reporting.show_paper_table(documents, 1, tmp_path / "tables", n_heads=64)
    page = "\n".join(shown)
    assert "95.0" in page
    assert "20.0 (-75.0)*<br>[" in page
    assert "labels" not in shown[0].split("<tbody>")[0].replace("aria-label", "")
    assert "2 of 3 comparisons are distinguishable" in page
    tests = pd.read_csv(tmp_path / "tables" / "table-1-tests.csv", dtype=str)
    assert set(tests["heads"]) == {"4 of 64 heads (6.3 %)"}
    # 20 documents of which 15 are lost in every run: 2 / 2 ** 15, and never 0.0.
    assert tests["p"].tolist()[0] == "6.1e-05"
    names = {path.name for path in (tmp_path / "tables").iterdir()}
    assert names == {"table-1.csv", "table-1.tex", "table-1-tests.csv", "table-1-tests.tex"}
    assert all(f"tables/{name}" in page for name in names)


def test_table_without_rows_says_so(tmp_path, shown):
    documents = document_results(write_run(tmp_path / "a", "icl-tiny", fraction=0.06, right=RIGHT))
    reporting.show_paper_table(documents, 3, tmp_path / "tables", n_heads=64)
    assert "Nothing to show" in shown[0]
    assert "text classification" in shown[0]


def test_published_values_stand_alone_beside_another_model(tmp_path, shown):
    documents = document_results(write_run(tmp_path / "a", "icl-tiny", fraction=0.06, right=RIGHT))
    reporting.show_published("icl-tiny", documents, 1, tmp_path / "tables")
    page = "\n".join(shown)
    assert "**Published, Llama-3-8B**" in page
    assert "**Published, InternLM2-20B**" in page
    assert "difference" not in page
    assert "95.0" not in page


def test_published_values_stand_beside_a_run_of_the_same_model(tmp_path, shown):
    model = "meta-llama/Meta-Llama-3-8B"
    documents = document_results(write_run(tmp_path / "a", model, fraction=0.03, right=RIGHT))
    reporting.show_published(model, documents, 1, tmp_path / "tables")
    page = "\n".join(shown)
    assert "<th>difference</th>" in page
    assert "<td>95.0</td>" in page
    assert "InternLM2" not in page
