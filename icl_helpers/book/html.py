"""Finishing the pages that Sphinx has built: for phones, for paper, and for voice control."""

from __future__ import annotations

import posixpath
import re
import string
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from icl_helpers.files import assets_dir

__all__ = ["NARROW", "finish_pages", "write_print_view"]

# Drawings for narrow screens, by the names of their figures.
NARROW = Path("_static") / "narrow"
_FIGURE = re.compile(
    r'(?P<before><figure [^>]*id="(?P<name>[^"]+)"[^>]*>\s*(?:<a [^>]*>)?)(?P<image><img [^>]*>)'
)
# The theme takes a page's place in the book for its place in the repository, where runs are not.
_SOURCE = re.compile(r"(/(?:blob|edit|tree)/[^\"]*?)/book/run/[a-z0-9-]+/")
# The theme's controls whose names lack words that they show, and a role that does not fit. The
# controls get their names from what they show; the icon of the colour mode, which says nothing of
# its own, keeps the button's name.
_MISNAMED = (
    (r'(<summary) aria-label="Toggle hidden content"', r"\1"),
    (r'(<button class="[^"]*search-button-field[^"]*"[^>]*?) aria-label="[^"]*"', r"\1"),
    (r'(<i class="theme-switch [^>]*?) +title="[^"]*"', r"\1"),
    # A list in name only: its entries have the role of a bibliography's, which no list takes.
    (r'(<div) role="list"( class="citation-list">)', r"\1\2"),
)


def finish_pages(html: Path) -> None:
    """Mend every page: small drawings, names of controls, and links to notebooks' sources.

    A figure's image is its narrow drawing on a narrow screen, where it has one. The theme's
    controls are called by what they show. The buttons of a run's pages lead to the notebooks as the
    repository keeps them.
    """
    for page in html.rglob("*.html"):
        up = "../" * (len(page.relative_to(html).parts) - 1)
        text = _FIGURE.sub(partial(_picture, html, up), page.read_text(encoding="utf-8"))
        for pattern, replacement in _MISNAMED:
            text = re.sub(pattern, replacement, text)
        page.write_text(_SOURCE.sub(r"\1/notebooks/", text), encoding="utf-8")


_NOT_ON_PAPER = re.compile(
    r'<section class="icl-(?:viewer|playground)".*?</section>|<script.*?</script>', re.DOTALL
)


def _picture(html: Path, up: str, found: re.Match[str]) -> str:
    drawing = NARROW / f"{found['name']}.png"
    if not (html / drawing).is_file():
        return found[0]
    source = f'<source media="(max-width: 600px)" srcset="{up}{drawing.as_posix()}">'
    return f"{found['before']}<picture>{source}{found['image']}</picture>"


def write_print_view(html: Path, names: Sequence[str]) -> None:
    """Write ``print.html``: the articles of these pages on one page, for paper or a PDF.

    Anchors get the name of their page in front, links between the pages lead to them. What needs
    a reader's hand, the viewers and their like, is left out.
    """
    articles = []
    for name in names:
        text = (html / f"{name}.html").read_text(encoding="utf-8")
        article = text[text.index('<article class="bd-article">') : text.rindex("</article>")]
        article = _NOT_ON_PAPER.sub("", article)
        articles.append(_as_part(article, name, names) + "</article>")
    head = (html / "index.html").read_text(encoding="utf-8").partition("</head>")[0]
    styles = re.findall(r'<link [^>]*rel="stylesheet"[^>]*>', head)
    formulas = re.findall(
        r"<script>window\.MathJax.*?</script>|<script[^>]*/mathjax/.*?</script>", head
    )
    template = string.Template((assets_dir() / "print.html").read_text(encoding="utf-8"))
    title = re.findall(r"<title>(.*?)</title>", head, re.DOTALL)[0]
    page = template.substitute(
        title=title, head="\n".join([*styles, *formulas]), articles="\n".join(articles)
    )
    (html / "print.html").write_text(page, encoding="utf-8")


def _as_part(article: str, name: str, names: Sequence[str]) -> str:
    """Make a page's article fit for a page at the top of the book that holds others too."""

    def anchor(page: str, fragment: str) -> str:
        return "--".join(filter(None, (page.replace("/", "-"), fragment)))

    def own(found: re.Match[str]) -> str:
        return f'{found[1]}="{" ".join(anchor(name, it) for it in found[2].split())}"'

    def place(found: re.Match[str]) -> str:
        path, _, fragment = found[2].partition("#")
        path = path or f"{posixpath.basename(name)}.html"
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        page = path.removesuffix(".html")
        if page in names:
            return f'{found[1]}="#{anchor(page, fragment)}"'
        return f'{found[1]}="{path}{fragment and "#"}{fragment}"'

    article = article.replace("<article", f'<article id="{anchor(name, "")}"', 1)
    start, end = article.split(">", 1)
    end = re.sub(r'\b(id|for|aria-[a-z]+by|aria-controls)="([^"]+)"', own, end)
    # The theme's script lets the keyboard scroll wide tables; here it does not run.
    for scrolls in ('class="pst-scrollable-table-container"', 'class="output text_html"'):
        end = end.replace(scrolls, f'{scrolls} tabindex="0"')
    end = re.sub(r'\b(href|src|srcset)="(?![a-z]+:|//)([^"]+)"', place, end)
    return f"{start}>{end}"
