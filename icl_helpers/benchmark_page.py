"""The book's chapter on cost, made from the measurements that ``icl bench`` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from icl_helpers.book_pages import markdown_table

__all__ = ["write_benchmark_page"]

_MARK = "<!-- measurements -->"


def write_benchmark_page(staged: Path) -> None:
    """Put tables of ``_static/benchmark.json`` into a staged book's ``performance.md``.

    Without that file the page says that nothing was measured.
    """
    page = staged / "performance.md"
    source = staged / "_static" / "benchmark.json"
    if source.is_file():
        shown = _tables(json.loads(source.read_text()))
    else:
        shown = "Nothing was measured for this copy of the book: run `make bench`, then build it."
    page.write_text(page.read_text().replace(_MARK, shown))


def _tables(found: dict[str, Any]) -> str:
    machine = markdown_table(["", ""], [(key, value) for key, value in found["machine"].items()])
    rows = markdown_table(
        ["what", "model", "bar", "measured", "lowest to highest", "met"],
        [
            (
                row["what"], row["model"], f"at {row['at']} {row['bar']:g}",
                f"{row['median']:.3g}" + (" s" if row["unit"] == "seconds" else ""),
                f"{row['low']:.3g} to {row['high']:.3g}", "yes" if row["met"] else "no",
            )
            for row in found["rows"]
        ],
    )  # fmt: skip
    floor = markdown_table(
        ["model", "parameters", "tokens", "operations", "weight bytes", "share of matmul rate"],
        [
            (
                row["model"], f"{row['parameters']:,}", row["tokens"], f"{row['operations']:.3g}",
                f"{row['bytes']:,}", f"{row['share']:.0%}",
            )
            for row in found["floor"]
        ],
    )  # fmt: skip
    return (
        f"Medians of {found['rounds']} alternating runs.\n\n{rows}\n\n## Floor\n\n{floor}\n\n"
        f"## Machine\n\n{machine}"
    )
