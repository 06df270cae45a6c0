"""Exercises of the book: each has one hidden solution, and what a solution says comes out.

Every chapter has a few, and begins with what it teaches and two questions on the one before.
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
import symtable
from pathlib import Path

import nbformat
import pytest
import torch

import icl_helpers as icl
from icl_helpers.book.deviations import answers
from icl_helpers.evaluation.conditions import Condition
from icl_helpers.files import book_dir, notebooks_dir

PAGES = sorted(book_dir().glob("*.md"))
NOTEBOOKS = sorted(notebooks_dir().glob("*.ipynb"))
CHAPTERS = [*NOTEBOOKS, *(book_dir() / name for name in ("method.md", "playground.md"))]
WRITTEN = re.compile(
    r"^::::\{solution\} (\S+)\n:class: dropdown\n(.*?)^::::$", re.DOTALL | re.MULTILINE
)


def source(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text()
    cells = nbformat.read(path, as_version=4).cells
    marked = [c.source if c.cell_type == "markdown" else f"<code>{c.source}</code>" for c in cells]
    return "\n".join(marked)


def solutions(path: Path) -> list[tuple[str, str]]:
    """Labels and bodies of a page's hidden solutions."""
    if path.suffix == ".md":
        return WRITTEN.findall(source(path))
    gates = r"```\{solution-start\} (\S+)\n:class: dropdown\n```(.*?)```\{solution-end\}"
    return re.findall(gates, source(path), re.DOTALL)


def test_every_exercise_has_one_hidden_solution_with_code():
    exercises: list[str] = []
    solved: list[str] = []
    for path in [*PAGES, *NOTEBOOKS]:
        text = source(path)
        exercises += re.findall(r"\{exercise(?:-start)?\}\n:label: (\S+)", text)
        found = solutions(path)
        assert len(found) == len(re.findall(r"\{solution(?:-start)?\}", text)), path.name
        assert all("```python" in body or "<code>" in body for _, body in found), path.name
        solved += [label for label, _ in found]
    assert len(set(exercises)) == len(exercises)
    assert sorted(exercises) == sorted(solved)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_chapter_has_two_or_three_exercises(path):
    assert len(solutions(path)) in (2, 3)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_begins_with_objectives_and_two_questions_on_what_came_before(path):
    head = source(path).split("\n## ")[0].split("\n<section")[0]
    aims, box = (
        re.search(rf"^({fence}){{admonition}} {title}\n(.*?)^\1$", head, re.DOTALL | re.MULTILINE)[
            2
        ]
        for fence, title in ((":::", "Objectives"), ("::::", "Recall"))
    )
    assert re.fullmatch(r"After this page you can [^;]*(;[^;]*){1,2}\.\n", aims)
    asked, answered = box.split(":::{admonition} Answers\n:class: dropdown\n")
    for told in (asked, answered):
        assert re.findall(r"^(\d)\. ", told, re.MULTILINE) == ["1", "2"]
    assert asked.count("?\n") == 2
    # The chapter's own question comes first, the boxes take less than a screen.
    assert len(aims + asked) < 700


def solution_cells(path: Path) -> tuple[list[str], list[str]]:
    """Code of the solutions' cells, and of a notebook's other cells."""
    inside, found, others = False, [], []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            (found if inside else others).append(cell.source)
        else:
            for gate in re.findall(r"\{solution-(start|end)\}", cell.source):
                inside = gate == "start"
    return found, others


# What the solutions on removing a head compute with is what their chapter has so far: see below.
ALONE = [path for path in NOTEBOOKS if path.stem != "removing_a_head"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
def test_solutions_of_a_notebook_run_on_icl_tiny_and_hold(path):
    names: dict = {"icl": icl}
    for code in solution_cells(path)[0]:
        assert re.search("^assert ", code, re.MULTILINE)
        exec(code, names)


def global_names(code: str) -> tuple[set[str], set[str]]:
    """Names that a cell binds, imports apart, and those that it reads anywhere."""
    top = symtable.symtable(code, "cell", "exec")
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() and not s.is_imported()}
    read = {s.get_name() for s in top.get_symbols() if s.is_referenced()}
    scopes = list(top.get_children())
    while scopes:
        scope = scopes.pop()
        read |= {s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced()}
        scopes += scope.get_children()
    return bound, read


@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
def test_a_solution_takes_no_name_away_from_its_notebook(path):
    """Whoever leaves a solution out, or runs it twice, has the same notebook."""
    found, others = solution_cells(path)
    bound = set().union(*(global_names(code)[0] for code in found))
    read = set().union(*(global_names(code)[1] for code in others))
    assert bound & read == set()


CODE = [(path, label, body) for path in PAGES for label, body in solutions(path)]


@pytest.mark.parametrize(("path", "label", "body"), CODE, ids=[label for _, label, _ in CODE])
def test_written_solution_prints_what_the_page_says(path, label, body):
    code, said = re.fullmatch(
        r"\s*```python\n(.*?)```\s*```text\n(.*?)```.*", body, re.DOTALL
    ).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == said


@pytest.fixture(scope="module")
def chapter():
    """What the chapter on removing a head leaves, run in this process, and what it prints."""
    cells = nbformat.read(notebooks_dir() / "removing_a_head.ipynb", as_version=4).cells
    names: dict = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in cells:
            tags = cell.metadata.get("tags", [])
            if cell.cell_type == "code" and "remove-cell" not in tags:
                exec(cell.source, names)
            if "parameters" in tags:
                names["limit"] = 12
    return names, printed.getvalue()


def answered(chapter, model, **options) -> dict[str, list[float]]:
    names, _ = chapter
    found = {}
    for task, asked in names["prompts"].items():
        told = answers(model, names["tokenizer"], asked, **options)
        found[task] = [100 * told.accuracy, float(told.log_probability.mean())]
    return found


def same(chapter, name: str, expected: dict[str, list[float]]) -> bool:
    measured = chapter[0]["measured"][name]
    return all(measured.loc[task].tolist() == pytest.approx(it, abs=1e-3) for task, it in expected.items())  # fmt: skip


@pytest.mark.slow
def test_a_slice_of_the_projections_output_is_rows_of_its_weights(chapter):
    model = copy.deepcopy(chapter[0]["lm"])
    for head in chapter[0]["heads"]:
        model.model.layers[head.layer].self_attn.o_proj.weight.data[
            8 * head.head : 8 * head.head + 8
        ] = 0
    assert same(chapter, "output sliced", answered(chapter, model))
    assert "touched: 16 of 16 heads" in chapter[1]


@pytest.mark.slow
def test_zeroed_values_of_a_group_are_all_its_heads_removed(chapter):
    names, printed = chapter
    whole = {(head.layer, 4 * (head.head // 4) + i) for head in names["heads"] for i in range(4)}
    for name, heads in (("shared values zeroed", whole), ("removed rightly", names["heads"])):
        condition = Condition("induction_heads", "zero", heads=tuple(icl.Head(*h) for h in heads))
        assert same(chapter, name, answered(chapter, names["lm"], condition=condition))
    assert f"removed: {len(whole)} heads, not {len(names['heads'])}" in printed


@pytest.mark.slow
def test_pairs_blocked_too_early_are_those_of_the_text_in_ids_with_one_bos_more(chapter):
    """By hand, one prompt: pairs counted from the first BOS on, in ids with two."""
    names, _ = chapter
    task = names["P"].tasks[0]
    prompt = names["prompts"][task][0]
    text = names["tokenizer"](prompt.context, add_special_tokens=False).input_ids
    pairs = icl.induction_pattern(prompt.context, names["tokenizer"])
    blocked = torch.zeros(len(text) + 2, len(text) + 2, dtype=torch.bool)
    blocked[1:-1, 1:-1] = pairs
    with (
        torch.no_grad(),
        icl.intervene(names["lm"], icl.AttentionKnockout(names["heads"], blocked)),
    ):
        logits = names["lm"](torch.tensor([[0, 0, *text]])).logits[0, -1]
    told = answers(
        names["lm"], names["tokenizer"], [prompt], condition=names["induction"], bos=2,
        patterns=[names["patterns"](task, 1)[0]],
    )  # fmt: skip
    whole = names["tokenizer"](
        prompt.context + prompt.choices[prompt.target], add_special_tokens=False
    )
    right = logits.log_softmax(-1)[whole.input_ids[len(text)]]
    assert float(told.log_probability[0]) == pytest.approx(float(right), abs=1e-4)


@pytest.mark.slow
def test_sentences_of_the_chapter_follow_from_its_table(chapter):
    names, printed = chapter
    table = names["table"]
    assert len(table) == 3 * len(names["P"].tasks)
    gaps = [
        abs(row["points, mistaken"] - row["points, rightly"]) for row in table.to_dict("records")
    ]
    shown = sum(gap >= 1 for gap in gaps)
    assert f"In {shown} of {len(gaps)} comparisons" in names["lines"][0]
    assert f"by {max(gaps):.0f} points" in names["lines"][0]
    assert names["told"]("removed rightly").count("By accuracy the mistake does not show") == 2
    assert "FAIL" not in printed
    assert "13 pass" in printed
