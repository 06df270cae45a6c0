"""What the results page shows: a run's tables with their files, published values where they belong."""

from __future__ import annotations

import base64
import itertools
import re

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from icl_helpers.errors import InputError
from icl_helpers.evaluation.store import accuracies, document_results
from icl_helpers.results import notebook as reporting
from icl_helpers.results.figures import accuracy_bars, benefit_bars, margin_alt, margin_bars
from icl_helpers.results.statistics import benefit_changes
from icl_helpers.tasks.specs import task_names
from tests.results.test_comparison import write_run
from tests.results.test_statistics import documents_frame

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
    written = ("table-1", "table-1-gaps", "table-1-tests")
    assert names == {f"{name}.{kind}" for name in written for kind in ("csv", "tex")}
    assert all(f"tables/{name}" in page for name in names)


def test_table_without_rows_says_so(tmp_path, shown):
    documents = document_results(write_run(tmp_path / "a", "icl-tiny", fraction=0.06, right=RIGHT))
    reporting.show_paper_table(documents, 3, tmp_path / "tables", n_heads=64)
    assert "Nothing to show" in shown[0]
    assert "text classification" in shown[0]


@pytest.mark.parametrize("shots", [[5], [0], [0, 5]])
def test_without_a_task_both_with_and_without_examples_there_is_no_benefit(
    shots, tmp_path, monkeypatch
):
    shown: list = []
    monkeypatch.setattr(reporting, "display", lambda thing, metadata=None: shown.append(thing))
    few = documents_frame().assign(shots=5, labels="semantic", task="fact_opinion")
    documents = pd.concat(
        [few if n else few.assign(shots=0, correct=few["doc_id"] % 2 == 0) for n in shots],
        ignore_index=True,
    )
    results = accuracies(documents)
    changes = reporting.benefit_or_none(results, documents)
    if len(shots) == 2:
        pd.testing.assert_frame_equal(changes, benefit_changes(results, documents))
        assert changes["benefit"].notna().all()
        assert not shown
        return
    assert changes.empty
    assert "No task was evaluated both with and without examples" in shown[0].data
    with pytest.raises(InputError, match="both with and without examples"):
        benefit_changes(results, documents)
    # What the page shows next has the columns that it needs.
    for ablation in ("mean", "zero"):
        reporting.show_benefit(changes, ablation=ablation, n_heads=64)
    reporting.show_benefit_table(changes, n_heads=64, directory=tmp_path)
    assert (tmp_path / "benefit.csv").is_file()


def test_caption_of_a_knockout_says_how_many_pairs_it_blocks(monkeypatch):
    shown: list = []
    monkeypatch.setattr(reporting, "display", lambda thing, metadata=None: shown.append(metadata))
    rows = documents_frame()
    blocked = rows[rows["condition"] == "induction_heads"].assign(
        condition="induction_pattern", ablation="knockout", n_blocked=1000
    )
    few = blocked.assign(task="recursion", n_blocked=blocked["doc_id"] % 2 * 40)
    none = blocked.assign(shots=0, n_blocked=0)
    given = {"caption": "Bars.", "n_heads": 64}
    for frame in (pd.concat([rows, blocked, few, none]), rows):
        results = accuracies(frame.reset_index(drop=True))
        reporting.show_bars(results, ablations=["mean", "knockout"], **given)
    reporting.show_bars(results, ablations=["mean"], **given)
    said = [metadata[reporting.DESCRIPTION]["caption"] for metadata in shown]
    assert "The knockout blocks 20 to 1,000 pairs of a query and a key in a prompt" in said[0]
    assert not any("blocks" in caption for caption in said[1:])


def test_published_values_stand_alone_beside_another_model(tmp_path, shown):
    documents = document_results(write_run(tmp_path / "a", "icl-tiny", fraction=0.06, right=RIGHT))
    reporting.show_published("icl-tiny", documents, 1, tmp_path / "tables")
    page = "\n".join(shown)
    assert "<caption>Table 1, Llama-3-8B, mean ablation, published</caption>" in page
    assert "<caption>Table 1, InternLM2-20B, mean ablation, published</caption>" in page
    assert "difference" not in page
    assert "95.0" not in page


def test_published_values_stand_beside_a_run_of_the_same_model(tmp_path, shown):
    model = "meta-llama/Meta-Llama-3-8B"
    documents = document_results(write_run(tmp_path / "a", model, fraction=0.03, right=RIGHT))
    reporting.show_published(model, documents, 1, tmp_path / "tables")
    page = "\n".join(shown)
    assert "<th>difference</th>" in page
    assert "<td>95.0<br>[" in page
    assert "InternLM2" not in page


def both_controls() -> pd.DataFrame:
    """Documents at two numbers of heads with both controls; 4 heads lose all but every fourth."""
    rows = []
    for condition, control, fraction, draw in (
        ("full", "", None, None),
        *(("induction_heads", "", share, None) for share in (0.02, 0.06)),
        *(
            ("random_heads", control, share, draw)
            for share in (0.02, 0.06)
            for control in ("published", "strict")
            for draw in (42, 43)
        ),
    ):
        for shots, seed, doc in itertools.product((0, 10), (42, 43), range(40)):
            rows.append(
                {"task": "repetition", "labels": "unrelated", "shots": shots,
                 "condition": condition, "ablation": "none" if fraction is None else "mean",
                 "fraction": fraction, "control": control, "ablation_seed": draw,
                 "demonstration_seed": seed, "doc_id": doc, "margin": 0.0, "valid": True,
                 "correct": doc % 2 == 0 if shots == 0 else
                 doc % 4 == 0 if condition == "induction_heads" else doc % 20 > 0}
            )  # fmt: skip
    return pd.DataFrame(rows).astype({"ablation_seed": "Int64"})


def test_a_table_each_number_of_heads_and_one_of_induction_minus_either_control(tmp_path, shown):
    reporting.show_paper_table(both_controls(), 1, tmp_path, n_heads=64)
    small, large, _, gaps = shown[:4]
    titles = [re.search("<caption>(.*?)</caption>", text)[1] for text in (small, large, gaps)]
    assert titles == [
        "Table 1, mean ablation, 2 of 64 heads (3.1 %) removed or blocked",
        "Table 1, mean ablation, 4 of 64 heads (6.3 %) removed or blocked",
        "Table 1, mean ablation: induction heads minus random heads, points",
    ]
    heads = re.findall("<th>(.*?)</th>", large.split("<tbody>")[0])
    assert heads == [
        "task, shots", "full model", "induction heads", "random heads", "random heads, strict"
    ]  # fmt: skip
    # A row has one head, which stays in sight on a phone.
    assert re.findall("<th>(.*?)</th>", large.split("<tbody>")[1]) == [
        "repetition, 0", "repetition, 10"
    ]  # fmt: skip
    assert "25.0 (-70.0)*<br>[" in large
    assert gaps.count("-70.0*<br>[") == 4
    assert "induction minus random heads, strict" in gaps


def test_benefit_stands_in_few_columns_beside_the_number_of_heads(tmp_path, shown):
    documents = both_controls()
    changes = benefit_changes(accuracies(documents), documents)
    reporting.show_benefit_table(changes, n_heads=64, directory=tmp_path)
    assert "4 of 64 heads (6.3 %)" in shown[0]
    # 45 points are gained, and 25 lost without the heads: 1 - (-25 / 45).
    assert "-156<br>[" in shown[0]
    assert len(re.findall("<th>", shown[0].split("<tbody>")[0])) <= 8
    written = pd.read_csv(tmp_path / "benefit.csv")
    assert set(written["heads"].dropna()) == {"2 of 64 heads (3.1 %)", "4 of 64 heads (6.3 %)"}


def test_a_drawing_for_narrow_screens_lies_beside_the_figure(monkeypatch):
    kept = {}
    monkeypatch.setattr(reporting, "display", lambda figure, metadata: kept.update(metadata))
    documents = both_controls()
    results = accuracies(documents)
    reporting.show_bars(results, ablations=["mean"], n_heads=64, caption="A.")
    described = kept[reporting.DESCRIPTION]
    image = base64.b64decode(described["narrow"])
    assert image.startswith(b"\x89PNG")
    assert int.from_bytes(image[16:20], "big") < 800  # pixels wide
    assert "random heads, strict 95" in described["alt"]


def test_both_controls_have_bars_of_their_own_and_no_interval_is_cut():
    documents = both_controls()
    results = accuracies(documents)
    changes = benefit_changes(results, documents)
    reach = changes[changes["ablation"] == "mean"]
    for narrow in (False, True):
        axes = accuracy_bars(results, ablations=["mean"], n_heads=64, narrow=narrow).axes[0]
        bars = [found for found in axes.containers if isinstance(found, BarContainer)]
        colours = {found[0].get_facecolor() for found in bars}
        assert len(colours) == 4
        for axes in benefit_bars(changes, ablation="mean", n_heads=64, narrow=narrow).axes:
            low, high = axes.get_xlim() if narrow else axes.get_ylim()
            assert low <= reach["low"].min()
            assert high >= reach["high"].max()


@pytest.mark.parametrize("narrow", [False, True])
def test_chance_is_marked_at_each_tasks_own(narrow):
    documents = both_controls()
    four = documents.assign(task="wordseq1_4way")
    results = accuracies(pd.concat([documents, four], ignore_index=True))
    axes = accuracy_bars(results, ablations=["mean"], n_heads=64, narrow=narrow).axes[0]
    along, across = (1, 0) if narrow else (0, 1)
    dotted = [lines for lines in axes.collections if lines.get_linestyle()[0][1] is not None]
    (segments,) = [lines.get_segments() for lines in dotted]
    levels = [segment[:, across].tolist() for segment in segments]
    assert levels == [[50, 50], [25, 25]]
    assert [segment[:, along].tolist() for segment in segments] == [[-0.5, 0.5], [0.5, 1.5]]
    ticks = axes.get_yticklabels() if narrow else axes.get_xticklabels()
    names = [" ".join(tick.get_text().split()) for tick in ticks]
    assert names == ["repetition", "four-way word sequences 1"]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("count", [4, 7])
def test_names_of_tasks_do_not_overlap(count, narrow):
    tasks = task_names("abstract")[-count:]
    documents = pd.concat([both_controls().assign(task=task) for task in tasks], ignore_index=True)
    figure = accuracy_bars(accuracies(documents), ablations=["mean"], n_heads=64, narrow=narrow)
    axes, canvas = figure.axes[0], FigureCanvasAgg(figure)
    canvas.draw()
    ticks = axes.get_yticklabels() if narrow else axes.get_xticklabels()
    boxes = [tick.get_window_extent(canvas.get_renderer()) for tick in ticks]
    assert len(boxes) == count
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_margins_are_drawn_with_median_and_quartiles_and_said():
    cell = {
        "task": "repetition", "labels": "unrelated", "shots": 10, "demonstration_seed": 42,
        "ablation_seed": None, "control": "", "correct": True, "valid": True,
    }  # fmt: skip
    full = {**cell, "condition": "full", "ablation": "none", "fraction": None}
    removed = {**cell, "condition": "induction_heads", "ablation": "mean", "fraction": 0.0625}
    documents = pd.DataFrame(
        [{**full, "doc_id": i, "margin": float(i)} for i in range(5)]
        + [{**removed, "doc_id": i, "margin": -2.0 * i} for i in range(5)]
        + [{**full, "shots": 0, "doc_id": i, "margin": 99.0} for i in range(5)]
    )
    options = {"ablations": ["mean"], "n_heads": 64}
    alt = margin_alt(documents, **options)
    assert "4 of 64 heads (6.3 %)" in alt
    assert alt.endswith("repetition: full +2.0, induction heads -4.0.")
    (axes,) = margin_bars(documents, **options).axes
    assert sorted(patch.get_height() for patch in axes.patches) == [-4.0, 2.0]
    lines = [segment[:, 1].tolist() for segment in axes.collections[0].get_segments()]
    assert lines == [[1.0, 3.0]]


def test_bars_without_results_say_so_in_place_of_empty_axes(shown):
    reporting.show_bars(pd.DataFrame(), ablations=["mean"], n_heads=64, caption="Text tasks.")
    assert shown == ["*Nothing to show. Text tasks.*"]


def test_a_shown_table_has_no_minus_before_what_rounds_to_nothing(shown):
    reporting.show_table(pd.DataFrame({"change": ["-0.0 [-0.0, +0.1]"]}), label="Changes")
    assert "+0.0<br>[+0.0, +0.1]" in shown[0]


def test_what_is_said_of_a_figure_has_no_minus_before_what_rounds_to_nothing(monkeypatch):
    said = {}
    monkeypatch.setattr(reporting, "display", lambda thing, metadata: said.update(metadata))
    reporting.show_figure(Figure(), alt="removed -0.0; blocked -1.0", caption="By -0 points.")
    (described,) = said.values()
    assert described == {"alt": "removed +0.0; blocked -1.0", "caption": "By +0 points."}
