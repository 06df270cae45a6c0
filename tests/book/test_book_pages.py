"""Pages made from runs: they say what the runs' files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from icl_helpers.book import build as book
from icl_helpers.book import pages as book_pages
from icl_helpers.files import notebooks_dir, project_root
from icl_helpers.results.tables import markdown_table
from icl_helpers.run.plan import Plan


def row(condition: str, accuracy: float, *, fraction: float = 0.06) -> dict[str, object]:
    ablation = {"full": "none", "induction_pattern": "knockout"}.get(condition, "mean")
    return {
        "task": "repetition", "labels": "unrelated", "shots": 10, "demonstration_seed": 42,
        "ablation_seed": 42, "condition": condition, "ablation": ablation, "n": 10,
        "fraction": 0.0 if condition == "full" else fraction, "accuracy": accuracy,
    }  # fmt: skip


def make_run(folder: Path, name: str, *, model: str = "icl-tiny", full: float = 0.9) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    info = {
        "model": model, "model_type": "llama", "versions": {"torch": "9.8.7"}, "python": "3.10",
        "seconds": {"full model": 1.5, "zero ablation": 2.25},
        "parameters": {
            "run_dir": str(run), "limit": 7, "seeds": [42], "ablation_seeds": [42], "tasks": None,
            "shots": None, "labels": None, "model": model,
        },
    }  # fmt: skip
    info["identity"] = {"key": {"fingerprint": "abc"}}
    info["parameters"]["fractions"] = [0.06]
    (run / "run.json").write_text(json.dumps(info))
    rows = [row("full", full), row("induction_heads", full - 0.4), row("random_heads", full - 0.1)]
    plan, key = Plan.of_run(info), info["identity"]["key"]
    for entry in rows:
        at = (entry["task"], entry["condition"], entry["ablation"])
        entry["setting"] = plan.row_key(*at, model_key=key)
    pd.DataFrame(rows).to_parquet(run / "results.parquet")
    return run


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_markdown_table_escapes_bars_and_leaves_missing_values_empty():
    text = markdown_table(["a", "b"], [["x|y", None]])
    assert text.splitlines()[-1] == r"| x\|y |  |"


def test_page_on_runs_shows_versions_and_seconds_of_each(tmp_path):
    runs = [make_run(tmp_path, "one"), make_run(tmp_path, "two")]
    rows = table_rows(book_pages.runs_page(runs))
    assert ["torch", "9.8.7", "9.8.7"] in rows
    assert ["zero ablation", "2.25", "2.25"] in rows
    assert ["**together**", "3.8", "3.8"] in rows
    assert ["limit", "7 documents a task", "7 documents a task"] in rows


def test_page_on_runs_does_not_tell_where_they_lay(tmp_path):
    assert str(tmp_path) not in book_pages.runs_page([make_run(tmp_path, "one")])


def test_comparison_shows_each_runs_accuracy_and_its_change(tmp_path):
    runs = [make_run(tmp_path, "one"), make_run(tmp_path, "two", full=0.7)]
    rows = table_rows(book_pages.comparison_page(runs, tmp_path))
    assert ["repetition", "unrelated", "10", "90.0", "70.0"] in rows
    assert ["repetition", "unrelated", "10", "50.0 (-40.0)", "30.0 (-40.0)"] in rows
    assert len(pd.read_csv(tmp_path / "comparison.csv")) == 6


def test_only_runs_of_the_papers_models_have_an_overlay(tmp_path):
    assert book_pages.overlay_page(make_run(tmp_path, "one"), tmp_path) is None


def test_chapters_are_the_notebooks_without_a_number():
    names = {path.name for path in notebooks_dir().glob("*.ipynb")}
    chapters = {path.name for path in book_pages.chapter_notebooks()}
    assert chapters == {name for name in names if not name[0].isdigit()}


def test_every_stage_can_be_downloaded_clean_and_executed(tmp_path):
    text = book_pages.notebooks_page(tmp_path, [make_run(tmp_path, "My Run")])
    for name in {path.name for path in notebooks_dir().glob("[0-9]*.ipynb")}:
        assert f"`clean <notebooks/{name}>`" in text
        assert f"`executed <run/my-run/{name}>`" in text


def test_citation_holds_the_paper_and_the_software():
    text = book_pages.citation_page()
    assert "@inproceedings{crosbie2025induction" in text
    assert (project_root() / "CITATION.cff").read_text().strip() in text
    blocks = re.findall(r"```bibtex\n(.*?)\n```", text, re.DOTALL)
    assert [block.count("{") - block.count("}") for block in blocks] == [0, 0]


def test_front_page_words_its_numbers_from_results(tmp_path):
    found = book_pages.front_page(tmp_path, make_run(tmp_path, "one"))
    assert "it labels 90 % of the two-label sequences" in found["answer"]
    assert "50 % (-40 points)" in found["answer"]
    assert "80 % (-10 points)" in found["answer"]
    # Neither was evaluated, so nothing is said about them.
    assert "pattern blocked" not in found["answer"]
    assert "Without examples" not in found["answer"]
    assert found["accuracies"] == "repetition 90 % (chance 50 %)"
    assert (tmp_path / "_static" / "front.png").is_file()


def test_front_page_calls_only_an_embedded_model_embedded(tmp_path):
    embedded = book_pages.front_page(tmp_path, make_run(tmp_path, "one"))
    other = book_pages.front_page(tmp_path, make_run(tmp_path, "two", model="some/model"))
    assert "travels with it" in embedded["model_described"]
    assert other["model_described"] == "some/model"
    assert "no general sentence" in other["about_model"]


def chapter(folder: Path, source: str) -> Path:
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# A chapter"), nbformat.v4.new_code_cell(source)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    path = folder / "a_chapter.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.mark.slow
def test_chapter_is_executed_afresh_and_takes_the_place_of_its_page(tmp_path, monkeypatch):
    path = chapter(tmp_path, "print(6 * 7)")
    monkeypatch.setattr(book_pages, "chapter_notebooks", lambda: [path])
    staged = tmp_path / "staged"
    staged.mkdir()
    (staged / "a_chapter.md").write_text("# Written")
    assert list(book._stage_chapters(staged)) == ["a_chapter"]
    executed = nbformat.read(staged / "a_chapter.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "42\n"
    assert str(tmp_path) not in (staged / "a_chapter.ipynb").read_text()
    assert not (staged / "a_chapter.md").exists()


@pytest.mark.slow
def test_failing_chapter_fails_the_build(tmp_path, monkeypatch):
    path = chapter(tmp_path, "1 / 0")
    monkeypatch.setattr(book_pages, "chapter_notebooks", lambda: [path])
    (tmp_path / "staged").mkdir()
    with pytest.raises(book.BookError, match="a_chapter failed: ZeroDivisionError"):
        list(book._stage_chapters(tmp_path / "staged"))


def test_table_of_architectures_holds_every_type_of_the_sweep():
    found = json.loads((project_root() / "book" / "_static" / "architectures.json").read_text())[
        "types"
    ]
    shown = book_pages.architecture_table()
    assert f"Of {len(found)} types" in shown
    for name, kind in found.items():
        (row,) = [line for line in shown.splitlines() if line.startswith(f"| `{name}` |")]
        assert kind["result"] in row
        assert kind["result"] == "accepted" or kind["reason"].split("|")[0] in row
