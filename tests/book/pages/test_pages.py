"""Pages made from runs: they say what the runs' files say."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from pybtex.database import parse_file, parse_string

from icl_helpers.book import build as book
from icl_helpers.book.pages import front, guide
from icl_helpers.book.pages import runs as run_pages
from icl_helpers.book.pages.names import chapter_notebooks, shown_stages
from icl_helpers.evaluation.store import KEYS
from icl_helpers.files import assets_dir, book_dir, notebooks_dir, project_root
from icl_helpers.results.outcomes import kind_outcomes
from icl_helpers.results.tables import markdown_table
from icl_helpers.run.plan import Plan
from tests.results.test_outcomes import run as made_up_run

HEADS = "4 of 64 heads (6.3 %)"


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
    documents = pd.DataFrame(
        [entry | {"doc_id": doc, "correct": doc < entry["accuracy"] * 10}
         for entry in rows for doc in range(10)]
    )  # fmt: skip
    documents.to_parquet(run / "documents.parquet")
    (run / "heads.json").write_text(json.dumps({"scores": [[0.0] * 16] * 4}))
    return run


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_markdown_table_escapes_bars_and_leaves_missing_values_empty():
    text = markdown_table(["a", "b"], [["x|y", None]])
    assert text.splitlines()[-1] == r"| x\|y |  |"


def test_page_on_runs_shows_versions_and_seconds_of_each(tmp_path):
    runs = [make_run(tmp_path, "one"), make_run(tmp_path, "two")]
    rows = table_rows(run_pages.runs_page(runs))
    assert ["torch", "9.8.7", "9.8.7"] in rows
    assert ["zero ablation", "2.25", "2.25"] in rows
    assert ["**together**", "3.8", "3.8"] in rows
    assert ["control", "", ""] in rows


def test_page_on_runs_says_in_words_what_was_evaluated(tmp_path):
    page = run_pages.runs_page([make_run(tmp_path, "one")])
    assert (
        "- At most 7 documents of each task, drawn as evenly over the labels as there are documents (the paper: all)"
        in page
    )
    assert "demonstration seeds: 42.\n" in page
    assert "0, 5 and 10 on repetition" in page
    assert "0 and 20 on four-way word sequences 1 and four-way word sequences 2.\n" in page


def test_page_on_runs_does_not_tell_where_they_lay(tmp_path):
    assert str(tmp_path) not in run_pages.runs_page([make_run(tmp_path, "one")])


def test_comparison_shows_each_runs_accuracy_and_its_change(tmp_path):
    runs = [make_run(tmp_path, "one"), make_run(tmp_path, "two", full=0.7)]
    rows = table_rows(run_pages.comparison_page(runs, tmp_path))
    assert ["repetition", "unrelated", "10", "90.0", "70.0"] in rows
    assert ["repetition", "unrelated", "10", "50.0 (-40.0)", "30.0 (-40.0)"] in rows
    assert len(pd.read_csv(tmp_path / "comparison.csv")) == 6


def test_only_runs_of_the_papers_models_have_an_overlay(tmp_path):
    assert run_pages.overlay_page(make_run(tmp_path, "one"), tmp_path) is None


def test_chapters_are_the_notebooks_without_a_number():
    names = {path.name for path in notebooks_dir().glob("*.ipynb")}
    chapters = {path.name for path in chapter_notebooks()}
    assert chapters == {name for name in names if not name[0].isdigit()}


def test_every_stage_can_be_downloaded_clean_and_executed(tmp_path):
    text = run_pages.notebooks_page(tmp_path, [make_run(tmp_path, "My Run")])
    for name in {path.name for path in notebooks_dir().glob("[0-9]*.ipynb")}:
        assert f"`clean <notebooks/{name}>`" in text
        assert f"`executed <run/my-run/{name}>`" in text


def test_stages_with_nothing_to_show_are_left_out(tmp_path):
    run = make_run(tmp_path, "one")
    names = [path.stem for path in shown_stages(run)]
    assert names == [path.stem for path in sorted(notebooks_dir().glob("[0-9]*.ipynb"))]
    info = json.loads((run / "run.json").read_text())
    info["parameters"]["nlp_tasks"] = []
    (run / "run.json").write_text(json.dumps(info))
    (run / "notebooks").mkdir()
    for stage, missing in (("09_which_heads", 2), ("10_function_vectors", 3)):
        cells = "said_where_not_measured() " * 3 + "**Not measured.** " * missing
        (run / "notebooks" / f"{stage}.ipynb").write_text(cells)
    shown = [path.stem for path in shown_stages(run)]
    assert [name for name in names if name not in shown] == ["06_nlp_tasks", "10_function_vectors"]
    link = "`executed <run/one/{}.ipynb>`"
    page = run_pages.notebooks_page(tmp_path, [run])
    assert link.format("09_which_heads") in page
    assert link.format("10_function_vectors") not in page
    claims, _ = run_pages.claims_page([run])
    assert "(run/one/04_head_ablation)" in claims
    assert "(run/one/06_nlp_tasks)" not in claims


def test_citation_holds_the_paper_and_the_software(tmp_path):
    text = run_pages.citation_page([make_run(tmp_path, "one")])
    assert "@inproceedings{crosbie2025induction" in text
    assert (project_root() / "CITATION.cff").read_text().strip() in text
    blocks = re.findall(r"```bibtex\n(.*?)\n```", text, re.DOTALL)
    assert [block.count("{") - block.count("}") for block in blocks] == [0, 0, 0]


def test_each_run_is_cited_by_what_it_states_and_by_the_digest_of_its_bundle(tmp_path):
    """Read back with a parser: what ``run.json`` and the manifest state, and no person."""
    shipped = sorted((book_dir() / "runs").iterdir())
    runs = [make_run(tmp_path, "computed here")]
    for bundle in shipped:
        info = json.loads((bundle / "run.json").read_text())
        info["imported"] = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
        (tmp_path / bundle.name).mkdir()
        (tmp_path / bundle.name / "run.json").write_text(json.dumps(info))
        runs.append(tmp_path / bundle.name)
    text = run_pages.citation_page(runs)
    blocks = re.findall(r"```bibtex\n(@misc.*?)\n```", text, re.DOTALL)
    entries = parse_string("\n".join(blocks), "bibtex").entries
    assert list(entries) == ["run-computed-here", *(f"run-{bundle.name}" for bundle in shipped)]
    assert not any(entry.persons for entry in entries.values())
    assert not re.search("https?:|@[a-z]+[.]|" + re.escape(str(tmp_path)), "\n".join(blocks))
    own, *imported = entries.values()
    assert "not exported as a bundle" in own.fields["note"]
    assert "year" not in own.fields
    for bundle, entry in zip(shipped, imported, strict=True):
        info = json.loads((bundle / "run.json").read_text())
        note = entry.fields["note"].replace(r"\_", "_")
        digest = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
        for stated in (info["model"], info["fingerprint"], info["updated"][:10], digest):
            assert stated in note
        assert all(task in note for task in info["parameters"]["tasks"])
        assert f"{info['parameters']['limit']} documents a task" in note
        assert entry.fields["year"] == info["updated"][:4]
        assert info["versions"]["icl_helpers"] in entry.fields["howpublished"]


def test_a_revision_is_part_of_the_citation(tmp_path):
    run = make_run(tmp_path, "one", model="some/model")
    info = json.loads((run / "run.json").read_text())
    info["parameters"]["revision"] = "main_2"
    (run / "run.json").write_text(json.dumps(info))
    assert r"Model some/model (revision main\_2)" in run_pages.citation_page([run])


def test_every_work_of_the_bibliography_is_cited_where_the_book_argues_with_it():
    pages = [
        *book_dir().glob("*.md"),
        *assets_dir().glob("pages/*.md"),
        assets_dir() / "claims.yaml",
    ]
    text = "".join(path.read_text() for path in [*pages, *notebooks_dir().glob("*.ipynb")])
    cited = {
        key for keys in re.findall(r"\{cite(?::t)?\}`([^`]+)`", text) for key in keys.split(",")
    }
    assert cited == set(parse_file(str(book_dir() / "references.bib")).entries)


def test_front_page_quotes_what_became_of_the_predictions_on_the_highest_scores(tmp_path):
    run = make_run(tmp_path, "one")
    lines = ["- *Without the 8 highest scores \"more\" is lost than without any*: **held**.\n",
             "- *Without the heads the model is less able*: **held**."]  # fmt: skip
    output = {"output_type": "display_data", "data": {"text/markdown": lines}}
    (run / "notebooks").mkdir()
    (run / "notebooks" / "09_which_heads.ipynb").write_text(
        json.dumps({"cells": [{"cell_type": "code", "outputs": [output]}]})
    )
    _, in_short = run_pages.claims_page([run])
    assert lines[0].strip() in in_short
    assert "less able" not in in_short
    (run / "notebooks" / "09_which_heads.ipynb").unlink()
    assert "which heads?" not in run_pages.claims_page([run])[1]


def test_front_page_says_what_came_out_by_kind_and_counts_heads_first(tmp_path):
    found = front.front_page(tmp_path, [make_run(tmp_path, "one", model="some/model")])
    assert f"removed or blocked are {HEADS}" in found["answer"]
    assert "| repetition (chance 50) | 90" in found["answer"]
    # Neither was evaluated, so nothing is said about them.
    assert "pattern blocked" not in found["answer"]
    assert HEADS in found["figure"]
    assert "4 layers of 16 heads" in found["size"]
    assert (tmp_path / "_static" / "front.png").is_file()


def opposite_run(folder: Path, name: str, **options) -> Path:
    """A run on tasks that go opposite ways, at the accuracies that are written here."""
    run = make_run(folder, name, **options)
    info = json.loads((run / "run.json").read_text())
    info["parameters"] |= {"fractions": [0.0625], "ablation_seeds": [42, 43, 44]}
    info["parameters"]["seeds"] = [42, 43, 44]
    (run / "run.json").write_text(json.dumps(info))
    documents = made_up_run(
        {"repetition": (99, 92, 50, 99), "recursion": (99, 40, 50, 99),
         "wordseq1_binary": (99, 6, 50, 99), "wordseq2_binary": (99, 1, 50, 99)},
        blocked_is_zero_shot=True,
    )  # fmt: skip
    plan, key = Plan.of_run(info), info["identity"]["key"]
    # The paper's control keeps its plain name in a run's tables.
    drawn = documents["condition"] == "random_heads"
    documents["control"] = drawn.map({True: "published", False: ""})
    documents["setting"] = [
        plan.row_key(it.task, it.condition, it.ablation, model_key=key)
        for it in documents.itertuples()
    ]
    documents.to_parquet(run / "documents.parquet")
    key = [name for name in KEYS if name in documents] + ["setting"]
    results = documents.groupby(key, dropna=False, as_index=False)["correct"].agg(["size", "mean"])
    results = results.rename(columns={"size": "n", "mean": "accuracy"})
    results.to_parquet(run / "results.parquet")
    return run


def test_front_page_caption_and_alternative_text_have_no_average_over_opposite_tasks(tmp_path):
    found = front.front_page(tmp_path, [opposite_run(tmp_path, "one", model="some/model")])
    alt = re.search(r":alt: (.*)", found["figure"]).group(1)
    caption = found["figure"].split("\n\n")[1]
    assert "1 to 6 %" in alt
    assert "repetition 92 %, recursion 40 %" in alt
    assert "below chance" in alt
    for text in (found["answer"], alt, caption):
        # The means over all four tasks and over the letters.
        assert not re.search(r"\b(35|34|66)\b", text)
    for task, removed in (
        ("repetition (chance 50)", "92"), ("recursion (chance 50)", "40"),
        ("word sequences 1 (chance 50)", "6"), ("word sequences 2 (chance 50)", "1"),
    ):  # fmt: skip
        cells = next(line for line in found["answer"].splitlines() if task in line).split(" | ")
        assert re.fullmatch(rf"{removed}(\\\*†?)?(, below chance)?", cells[2])
        assert ("below chance" in cells[2]) == (removed != "92")
        assert cells[3].endswith("one label")


def test_front_page_keeps_the_two_sets_of_labels_of_a_text_task_apart():
    parts = [
        made_up_run({"sst2": (full, 50, 50, full)}).assign(labels=labels)
        for labels, full in (("semantic", 90), ("unrelated", 70))
    ]
    outcomes = kind_outcomes(pd.concat(parts, ignore_index=True))
    rows = table_rows(front._task_table(outcomes))
    assert [row[0] for row in rows[2:]] == [
        "SST-2 (semantic labels, chance 50)", "SST-2 (unrelated labels, chance 50)",
    ]  # fmt: skip
    assert [row[1] for row in rows[2:]] == ["90", "70"]


def test_front_page_says_first_where_training_seeds_disagree(tmp_path):
    found = front.front_page(tmp_path, [make_run(tmp_path, "one")])["doubts"]
    assert "Training seeds, on all documents, disagree on repetition (heads removed): 86" in found
    page = (book_dir() / "index.md").read_text()
    assert page.index("{{ doubts }}") < page.index("{{ claims_in_short }}")


def test_real_model_leads_and_the_embedded_one_is_called_an_instrument(tmp_path):
    tiny = make_run(tmp_path, "icl-tiny")
    real = opposite_run(tmp_path, "smollm2-135m", model="smollm2-135m")
    found = front.front_page(tmp_path, [real, tiny])
    assert found["model_described"] == "smollm2-135m (instruct, 4-bit weights)"
    assert "smollm2-135m (instruct, 4-bit weights), with the most examples" in found["answer"]
    assert "Training seeds" not in found["doubts"]
    assert "No general claim" in found["about_model"]
    assert "icl-tiny is the test case for the tools" in found["about_model"]
    assert "(run/smollm2-135m/08_results)" in found["runs_here"].splitlines()[0]
    assert "icl-tiny (trained on these puzzles)" in found["runs_here"].splitlines()[1]
    assert "0.9 million parameters" in found["runs_here"]


def test_model_card_is_a_page_without_its_front_matter():
    text = guide.model_card("icl-tiny")
    assert text.startswith("# Model card of icl-tiny")
    assert "far below chance" in text


def test_drawing_shows_the_pairs_that_are_read_off_the_prompt():
    text = front.drawing()
    first, second = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for svg in (first, second):
        tokens = re.findall(r'<text x="180" y="\d+">(.*?)</text>', svg)
        arcs = [
            (int(begin) // 22, int(end) // 22)
            for begin, end in re.findall(r"M170 (\d+) .* 170 (\d+)\"", svg)
        ]
        if svg is first:
            assert {(tokens[at], tokens[key]) for at, key in arcs} == {
                ("K", "R"), ("R", "T"), ("T", "K"),
            }  # fmt: skip
            continue
        last = len(tokens) - 1
        # By hand: the last colon is kept from both labels, each of which follows a colon.
        assert tokens[last] == ":"
        labels = [at for at, token in enumerate(tokens) if token in ("Foo", "Bar")]
        assert sorted(key for at, key in arcs if at == last) == labels
        assert all(key < at for at, key in arcs)


def chapter(folder: Path, source: str) -> Path:
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# A chapter"), nbformat.v4.new_code_cell(source)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    path = folder / "a_chapter.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def light_kernels(monkeypatch):
    """Kernels as Jupyter starts them, for notebooks that import nothing of what others share."""
    monkeypatch.setattr("icl_helpers.kernels._GPUS", ("/",))


@pytest.mark.slow
def test_chapter_is_executed_afresh_and_takes_the_place_of_its_page(
    tmp_path, monkeypatch, light_kernels
):
    path = chapter(tmp_path, "print(6 * 7)")
    monkeypatch.setattr(book, "chapter_notebooks", lambda: [path])
    staged = tmp_path / "staged"
    staged.mkdir()
    (staged / "a_chapter.md").write_text("# Written")
    assert list(book._stage_chapters(staged)) == ["a_chapter"]
    executed = nbformat.read(staged / "a_chapter.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "42\n"
    assert str(tmp_path) not in (staged / "a_chapter.ipynb").read_text()
    assert not (staged / "a_chapter.md").exists()


@pytest.mark.slow
def test_failing_chapter_fails_the_build(tmp_path, monkeypatch, light_kernels):
    path = chapter(tmp_path, "1 / 0")
    monkeypatch.setattr(book, "chapter_notebooks", lambda: [path])
    (tmp_path / "staged").mkdir()
    with pytest.raises(book.BookError, match="a_chapter failed: ZeroDivisionError"):
        list(book._stage_chapters(tmp_path / "staged"))


def test_table_of_architectures_holds_every_type_of_the_sweep():
    found = json.loads((project_root() / "book" / "_static" / "architectures.json").read_text())[
        "types"
    ]
    shown = guide.architecture_table()
    assert f"Of {len(found)} types" in shown
    for name, kind in found.items():
        (row,) = [line for line in shown.splitlines() if line.startswith(f"| `{name}` |")]
        assert kind["result"] in row
        assert kind["result"] == "accepted" or kind["reason"].split("|")[0] in row
