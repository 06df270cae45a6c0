"""The book as one page: its parts and links, and the PDF that a browser makes of it."""

from __future__ import annotations

import re
import subprocess

import pytest

from icl_helpers.book.html import write_print_view
from tests.book.test_book import Links
from tests.book.test_browser import chromium

PAGE = """<html><head><title>The book</title>
<link rel="stylesheet" type="text/css" href="_static/book.css" />
<script src="_static/other.js"></script>
<script>window.MathJax = {"a": 1}</script>
<script defer="defer" src="_static/mathjax/tex-chtml.js"></script>
</head><body><nav><a href="x.html">x</a></nav>
<article class="bd-article">%s</article></body></html>"""


@pytest.fixture
def printed(tmp_path) -> str:
    (tmp_path / "run" / "a").mkdir(parents=True)
    (tmp_path / "index.html").write_text(
        PAGE % '<h1 id="top">One</h1><a href="run/a/02.html#what">two</a>'
    )
    (tmp_path / "run" / "a" / "02.html").write_text(
        PAGE % '<h1 id="what" aria-labelledby="what other">Two</h1><a href="#what">here</a><a href="../../index.html">one</a>'
        '<a href="../../genindex.html#A">index</a><a href="https://x.org/#y">x</a><img src="../../_images/i.png" alt="i">'
        '<section class="icl-viewer" id="v"><script>1</script></section><script>2</script>'
    )  # fmt: skip
    write_print_view(tmp_path, ["index", "run/a/02"])
    return (tmp_path / "print.html").read_text()


def test_links_between_pages_become_links_within_the_one_page(printed):
    found = Links(printed)
    assert found.links == [
        "#run-a-02--what", "#run-a-02--what", "#index", "genindex.html#A", "https://x.org/#y",
    ]  # fmt: skip
    assert found.anchors == {"index", "index--top", "run-a-02", "run-a-02--what"}
    assert 'aria-labelledby="run-a-02--what run-a-02--other"' in printed


def test_one_page_has_styles_formulas_and_images_but_no_other_script(printed):
    assert Links(printed).sources == [
        "_static/book.css", "_static/mathjax/tex-chtml.js", "_images/i.png",
    ]  # fmt: skip
    assert printed.count("<script") == 2
    assert "icl-viewer" not in printed
    assert "<title>The book</title>" in printed


@pytest.mark.slow
@pytest.mark.of_run
def test_book_prints_to_a_pdf_of_as_many_pages_as_a_book_has(request, tmp_path):
    browser = chromium()
    if browser is None:
        pytest.skip("Chromium is not on PATH and ICL_CHROMIUM is not set")
    built = request.getfixturevalue("book_pages")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    pdf = tmp_path / "book.pdf"
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
         "--no-pdf-header-footer", f"--print-to-pdf={pdf}", (built / "print.html").as_uri()],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert pdf.is_file(), done.stderr
    pages = len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf.read_bytes()))
    chapters = (built / "print.html").read_text().count('<article id="')
    # Each chapter begins on a page of its own, and none takes dozens.
    assert chapters <= pages <= 12 * chapters
