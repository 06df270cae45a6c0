"""What is done to the pages that Sphinx has built."""

from __future__ import annotations

from icl_helpers.book.html import finish_pages
from tests.book.test_book import Links


def test_buttons_of_a_run_lead_to_the_notebooks_in_the_repository(tmp_path):
    page = tmp_path / "run" / "icl-tiny" / "01_x.html"
    page.parent.mkdir(parents=True)
    page.write_text(
        '<a href="https://host/github/o/r/blob/main/book/run/icl-tiny/01_x.ipynb">'
        '<a href="../other-run/01_x.html">'
    )
    finish_pages(tmp_path)
    assert Links(page.read_text()).links == [
        "https://host/github/o/r/blob/main/notebooks/01_x.ipynb",
        "../other-run/01_x.html",
    ]


def test_controls_are_named_by_what_they_show_and_icons_keep_their_names(tmp_path):
    (tmp_path / "run").mkdir()
    page = tmp_path / "run" / "a.html"
    page.write_text(
        '<summary aria-label="Toggle hidden content"><p>Show code</p></summary>'
        '<button class="btn search-button-field" title="Search" aria-label="Search">Search</button>'
        '<button class="btn search-button" title="Search" aria-label="Search"><i></i></button>'
        '<button class="theme-switch-button" aria-label="Color mode">'
        '<i class="theme-switch fa-moon" data-mode="dark"  title="Dark"></i></button>'
    )
    finish_pages(tmp_path)
    assert page.read_text() == (
        "<summary><p>Show code</p></summary>"
        '<button class="btn search-button-field" title="Search">Search</button>'
        '<button class="btn search-button" title="Search" aria-label="Search"><i></i></button>'
        '<button class="theme-switch-button" aria-label="Color mode">'
        '<i class="theme-switch fa-moon" data-mode="dark"></i></button>'
    )


def test_a_page_takes_the_narrow_drawing_of_a_figure_that_has_one(tmp_path):
    drawings = tmp_path / "_static" / "narrow"
    drawings.mkdir(parents=True)
    (drawings / "fig-a.png").touch()
    page = tmp_path / "run" / "x" / "page.html"
    page.parent.mkdir(parents=True)
    figure = '<figure class="align-default" id="{}">\n<img alt="A" src="a.png" />\n</figure>'
    page.write_text(figure.format("fig-a") + figure.format("fig-b"))
    finish_pages(tmp_path)
    source = '<source media="(max-width: 600px)" srcset="../../_static/narrow/fig-a.png">'
    image = '<img alt="A" src="a.png" />'
    with_drawing = figure.format("fig-a").replace(image, f"<picture>{source}{image}</picture>")
    assert page.read_text() == with_drawing + figure.format("fig-b")
