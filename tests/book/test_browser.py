"""The built book in a browser: accessibility, width, console, and the viewer in use.

Needs tools that are no Python packages, and is skipped where they are missing: Chromium (``chromium``
on PATH, or its path in ICL_CHROMIUM), node, and two npm packages (``npm install --prefix
tests/browser``). The book is the one in ICL_BOOK, or one that the tests build.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "browser" / "check.cjs"
MAIN_PAGES = (
    "index", "claims", "method", "playground", "model-card", "your-model", "scale-out", "performance",
    "deviations", "removing_a_head", "report", "training_dynamics", "comparison", "runs",
    "notebooks", "cite", "api", "glossary",
    "bibliography", "search", "genindex", "print",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.of_run, pytest.mark.timeout(1800)]


def missing_tool() -> str | None:
    """What this machine lacks, as the reason to skip."""
    if chromium() is None:
        return "Chromium is not on PATH and ICL_CHROMIUM is not set"
    if shutil.which("node") is None:
        return "node is not on PATH"
    if not (SCRIPT.parent / "node_modules").is_dir():
        return "the npm packages are missing: npm install --prefix tests/browser"
    return None


def chromium() -> str | None:
    return os.environ.get("ICL_CHROMIUM") or shutil.which("chromium") or shutil.which("chrome")


@pytest.fixture(scope="module")
def report(request, tmp_path_factory):
    reason = missing_tool()
    if reason is not None:
        pytest.skip(reason)
    book = request.getfixturevalue("book_pages")
    (run,) = sorted(path.name for path in (book / "run").iterdir())[:1]
    # Runs are compared where there are several; every other page has to be there.
    pages = [f"{name}.html" for name in MAIN_PAGES]
    if not (book / "comparison.html").is_file():
        pages.remove("comparison.html")
    pages += [f"run/{run}/{path.name}" for path in sorted((book / "run" / run).glob("*.html"))]
    settings = {
        "chromium": chromium(),
        "profile": str(tmp_path_factory.mktemp("profile")),
        "root": str(book),
        "pages": pages,
        "printed": "print.html",
        "widths": [1300, 390],
        "viewer": f"run/{run}/07_attention_patterns.html",
    }
    done = subprocess.run(
        ["node", str(SCRIPT), json.dumps(settings)], capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_page_writes_errors_to_the_console(report):
    assert report["console"] == []


def test_no_page_asks_for_anything_from_elsewhere(report):
    assert report["foreign"] == []


def test_no_page_scrolls_sideways(report):
    assert report["wide"] == []


def test_no_page_has_a_serious_accessibility_violation(report):
    assert report["violations"] == []


def expected(viewer, step: str, *, prompt: int = 0) -> list[str]:
    """The numbers that the data say must stand under the tokens at a step."""
    state, shown = viewer[step], viewer["data"]["prompts"][prompt]
    kind = "blocked" if state["blocked"] else "plain"
    row = shown["attention"][kind][state["choices"][1]][state["current"]]
    numbers = [str(int(value / 10 + 0.5)) if value >= 10 else "" for value in row]
    return numbers + [""] * (len(shown["tokens"]) - len(row))


def test_viewer_shows_where_the_final_colon_looks_to_begin_with(report):
    viewer = report["viewer"]
    assert viewer["start"]["current"] == len(viewer["data"]["prompts"][0]["tokens"]) - 1
    assert viewer["start"]["numbers"] == expected(viewer, "start")


@pytest.mark.parametrize(("step", "token"), [("hovered", 20), ("clicked", 30), ("tapped", 25)])
def test_pointer_shows_where_a_token_looks(report, step, token):
    viewer = report["viewer"]
    assert viewer[step]["current"] == token
    assert viewer[step]["numbers"] == expected(viewer, step)
    assert viewer[step]["report"].startswith(f"From token {token + 1},")


def test_only_what_is_chosen_is_announced(report):
    viewer = report["viewer"]
    assert viewer["hovered"]["announced"] == ""
    assert viewer["clicked"]["announced"] == viewer["clicked"]["report"]


def test_switch_and_choice_of_prompt_change_what_is_shown(report):
    viewer = report["viewer"]
    assert viewer["switched"]["blocked"]
    assert viewer["switched"]["current"] == 30
    assert viewer["switched"]["numbers"] == expected(viewer, "switched")
    assert viewer["promptChosen"]["choices"][0] == 1
    assert viewer["promptChosen"]["numbers"] == expected(viewer, "promptChosen", prompt=1)


def test_keyboard_reaches_tokens_and_moves_among_them(report):
    viewer = report["viewer"]
    last = len(viewer["data"]["prompts"][1]["tokens"]) - 1
    assert viewer["tabbed"]["focused"] == last
    found = {
        step: viewer[step]["focused"]
        for step in ("ArrowLeft", "ArrowLeftAgain", "Home", "ArrowRight", "End")
    }
    assert found == {
        "ArrowLeft": last - 1, "ArrowLeftAgain": last - 2, "Home": 0, "ArrowRight": 1, "End": last
    }  # fmt: skip
    for step in found:
        assert viewer[step]["current"] == found[step]
        assert viewer[step]["numbers"] == expected(viewer, step, prompt=1)
    # Where it looks is not the same from everywhere, so moving changes what is shown.
    shown = [viewer[step]["numbers"] for step in ("tabbed", "ArrowLeft", "Home", "ArrowRight")]
    assert all(before != after for before, after in itertools.pairwise(shown))
    above = viewer["ArrowUp"]
    assert above["focused"] < last - 2
    assert above["numbers"] == expected(viewer, "ArrowUp", prompt=1)
    assert above["announced"] == above["report"]


def test_keyboard_works_the_switch_and_does_not_turn_the_page(report):
    viewer = report["viewer"]
    assert viewer["switchedByKey"]["tagged"] == "INPUTswitch"
    assert not viewer["switchedByKey"]["blocked"]
    assert viewer["stillThere"]


def test_without_scripts_and_in_print_a_figure_stands_for_the_viewer(report):
    assert report["fallback"]["withoutScripts"] == {"viewer": False, "figure": True}
    assert report["fallback"]["printed"] == {"viewer": False, "figure": True}
