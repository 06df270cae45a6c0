"""The stage of text tasks: what it evaluates, where its rows come from, how it is shown."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter
from nbformat.v4 import new_code_cell, new_notebook, new_output

import icl_helpers as icl
from icl_helpers.book import build as book
from icl_helpers.cli import _parameters, _parser
from icl_helpers.results import notebook as reporting
from icl_helpers.run.plan import Plan
from icl_helpers.run.stages import execute_stages
from icl_helpers.tasks.specs import NLP_TASKS, task_names


def run(tmp_path, **changes) -> icl.Run:
    return icl.Run(icl.stage_parameters(run_dir=str(tmp_path / "run"), **changes))


def test_embedded_model_has_stand_ins_and_any_other_the_papers_tasks(tmp_path):
    assert run(tmp_path).plan.tasks("nlp_tasks") == task_names("stand_in")
    assert run(tmp_path, model="EleutherAI/pythia-410m").plan.tasks("nlp_tasks") == list(NLP_TASKS)
    assert run(tmp_path, nlp_tasks=["sst2"]).plan.tasks("nlp_tasks") == ["sst2"]
    assert run(tmp_path, nlp_tasks=[]).plan.tasks("nlp_tasks") == []
    assert run(tmp_path).plan.tasks() == task_names("abstract")


def test_text_is_evaluated_with_both_label_sets_apart_from_the_abstract_tasks(tmp_path):
    found = run(
        tmp_path, limit=2, seeds=[42], tasks=["repetition"], nlp_tasks=["fact_opinion"]
    )  # fmt: skip
    found.evaluate("full")
    text = found.evaluate("full", group="nlp_tasks")
    shots = text.groupby("labels")["shots"].agg(list).to_dict()
    assert shots == {"semantic": [0, 5, 10], "unrelated": [0, 10]}
    assert set(found.results()["task"]) == {"repetition"}
    assert len(found.results("nlp_tasks")) == len(text) == 5
    assert set(found.documents("nlp_tasks")["task"]) == {"fact_opinion"}
    assert len(found.documents("nlp_tasks")) == 2 * len(text)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [("semantic", {"semantic"}), ("unrelated", {"unrelated"}), ("both", {"semantic", "unrelated"})],
)
def test_labels_restrict_the_stage(tmp_path, labels, expected):
    found = run(tmp_path, labels=labels, limit=1, seeds=[42], shots=[0], nlp_tasks=["fact_opinion"])
    assert set(found.evaluate("full", group="nlp_tasks")["labels"]) == expected


def test_stage_without_tasks_gives_an_empty_frame(tmp_path):
    found = run(tmp_path, nlp_tasks=[]).evaluate("full", group="nlp_tasks")
    assert found.empty
    assert {"task", "labels", "accuracy"} <= set(found.columns)


def write(folder, text: str, n: int) -> None:
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        rows = [{"sentence": f"{text} {split} {i}", "label": i % 2} for i in range(n)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_rows_come_from_the_data_directory(tmp_path):
    write(tmp_path / "data" / "sst2", "my own sentence", 12)
    found = run(tmp_path, data_dir=str(tmp_path / "data"), nlp_tasks=["sst2"])
    data = found.plan.data("sst2")
    prompt = icl.build_prompts("sst2", shots=2, seed=42, labels="unrelated", data=data)[0]
    assert prompt.context.endswith("Review: my own sentence validation 0\n\nSentiment:")
    assert prompt.choices == (" Bar", " Foo")
    assert found.plan.data("fact_opinion") == "synthetic"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "random"}, "'labels' must be one of None, semantic, unrelated, both"),
        ({"nlp_tasks": ["repetition"]}, "'repetition' is an abstract task"),
        ({"nlp_tasks": "sst2"}, "'nlp_tasks' must be list"),
        ({"data_dir": "/nowhere"}, "data_dir must be a directory.*nowhere"),
    ],
)
def test_bad_parameter_of_the_stage_is_explained(change, message):
    with pytest.raises(icl.InputError, match=message):
        icl.stage_parameters(**change)


def test_missing_local_file_is_named_before_anything_runs(tmp_path):
    with pytest.raises(icl.MissingArtefactError, match=r"rte/train\.jsonl is missing"):
        icl.stage_parameters(data_dir=str(tmp_path), nlp_tasks=["rte"])


def test_a_text_task_among_those_of_the_knockout_is_refused_before_the_first_stage(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "icl_helpers.run.stages.execute_notebook", lambda *a: pytest.fail("executed")
    )
    values = {"run_dir": str(tmp_path / "run"), "nlp_tasks": ["review_sentiment"]}
    parameters = icl.stage_parameters(tasks=["repetition", "fact_opinion"], **values)
    message = r"'fact_opinion' is a text task.*name it in nlp_tasks, or leave out stage 5"
    for only in (None, [5], [4, 5]):
        with pytest.raises(icl.InputError, match=message):
            execute_stages(parameters, only=only, progress=False)
    plan = Plan(parameters)
    plan.check_data(["prefix_matching_scores", "full_model", "head_ablation", "nlp_tasks"])
    with pytest.raises(icl.InputError, match=message):
        plan.check_data()
    alone = icl.stage_parameters(tasks=["repetition"], limit=1, **values)
    Plan(alone).check_data()
    with pytest.raises(icl.InputError, match="limit of at least 2, or leave out stage 8"):
        execute_stages(alone, progress=False)
    assert not (tmp_path / "run").exists()


def test_unreachable_rows_are_named_before_the_first_stage(tmp_path, monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(
        "icl_helpers.run.stages.execute_notebook", lambda *a: pytest.fail("executed")
    )
    parameters = icl.stage_parameters(run_dir=str(tmp_path / "run"), nlp_tasks=["wic"])
    with pytest.raises(icl.MissingArtefactError, match=r"data_dir=.*nlp_tasks=\[\]"):
        execute_stages(parameters, progress=False)


def test_command_line_has_the_parameters_of_the_stage(tmp_path):
    arguments = ["run", "--nlp-tasks", "", "--labels", "both", "--data-dir", str(tmp_path)]
    parameters = _parameters(_parser().parse_args(arguments))
    assert parameters.nlp_tasks == []
    assert parameters.labels == "both"
    assert parameters.data_dir == str(tmp_path)


@pytest.fixture
def shown(monkeypatch) -> list:
    """What was displayed, as (object, metadata)."""
    found: list = []
    monkeypatch.setattr(
        reporting, "display", lambda thing, metadata=None: found.append((thing, metadata))
    )
    return found


def test_table_scrolls_and_leads_to_its_files(tmp_path, shown):
    frame = pd.DataFrame({"a & b": ["<1>"]}, index=["x"])
    reporting.show_table(frame, label='table "1"', directory=tmp_path / "tables", name="table-1")
    page = DisplayFormatter().format(shown[0][0])[0]["text/html"]
    assert 'tabindex="0"' in page
    assert "overflow-x: auto" in page
    assert 'aria-label="Table &quot;1&quot;"' in page
    assert "&lt;1&gt;" in page
    assert (tmp_path / "tables" / "table-1.csv").is_file()
    assert (tmp_path / "tables" / "table-1.tex").is_file()
    assert "[CSV](tables/table-1.csv)" in shown[1][0].data
    assert "[LaTeX](tables/table-1.tex)" in shown[1][0].data


def test_book_puts_the_computed_description_in_place_of_the_cells_own(tmp_path):
    output = new_output(
        "display_data", metadata={reporting.DESCRIPTION: {"alt": "bars 12", "caption": "New."}}
    )
    figure = {"figure": {"name": "fig", "caption": "Old."}, "image": {"alt": "old"}}
    cell = new_code_cell("", metadata={"mystnb": figure}, outputs=[output])
    book._make_static(new_notebook(cells=[cell]), "-slug", tmp_path)
    assert cell.metadata["mystnb"]["figure"] == {"name": "fig-slug", "caption": "New."}
    assert cell.metadata["mystnb"]["image"]["alt"] == "bars 12"


def test_stand_ins_are_named_as_such(tmp_path):
    text = reporting.describe_text_tasks(task_names("stand_in"))
    assert "Stand-ins." in text
    assert "review_sentiment" in text
    assert "tand-in" not in reporting.describe_text_tasks(["sst2", "rte"])
    assert "no text tasks" in reporting.describe_text_tasks([])
    table = reporting.text_task_table(dict.fromkeys(task_names("stand_in"), "synthetic"))
    assert table["data"].str.contains("stand-in").all()
