"""The book's chapter on cost, made from the measurements that ``make bench`` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from icl_helpers.results.tables import markdown_table

__all__ = ["write_benchmark_page"]

_MARK = "<!-- measurements -->"
_FIGURE = "benchmark_growth.svg"


def write_benchmark_page(staged: Path) -> None:
    """Put what ``_static/benchmark.json`` holds into a staged book's ``performance.md``.

    Without that file the page says that nothing was measured.
    """
    page = staged / "performance.md"
    source = staged / "_static" / "benchmark.json"
    if source.is_file():
        found = json.loads(source.read_text())
        _draw_growth(found["growth"]["points"], staged / "_static" / _FIGURE)
        shown = "\n\n".join(
            [
                _ratios(found), "## How it grows", _growth(found["growth"]), "## Floor",
                _floor(found["floor"]), "## GPU", _gpu(found["gpu"]), "## Machine",
                markdown_table(["", ""], list(found["machine"].items())),
            ]
        )  # fmt: skip
    else:
        shown = "Nothing was measured for this copy of the book: run `make bench`, then build it."
    page.write_text(page.read_text().replace(_MARK, shown))


def _ratios(found: dict[str, Any]) -> str:
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
    missed = [row for row in found["rows"] if not row["met"]]
    outcome = (
        f"{len(missed)} of {len(found['rows'])} bars are missed."
        if missed
        else f"All {len(found['rows'])} bars are met."
    )
    return f"{outcome} Medians of at least {found['rounds']} alternating runs.\n\n{rows}"


def _growth(growth: dict[str, Any]) -> str:
    worst = max(
        (p for p in growth["points"] if p["axis"] != "conditions"), key=lambda point: point["cost"]
    )
    most = max(p["at"] for p in growth["points"] if p["axis"] == "conditions")
    ends = {p["kind"]: p["cost"] for p in growth["points"] if p["at"] == most}
    shared = "; ".join(f"{kind}: {cost:.2g}" for kind, cost in ends.items() if "heads" in kind)
    return (
        f"```{{figure}} _static/{_FIGURE}\n"
        f":alt: Four panels of cost ratios against tokens per prompt, prompts per batch, share of "
        f"heads, and number of conditions.\n"
        f"Cost on the {growth['model']} model. First three panels: a forward pass with the "
        f"intervention over a plain one. Last panel: an evaluation under several conditions over "
        f"one of the full model alone, with a line for what as many separate runs would cost.\n"
        f"```\n\n"
        f"The highest ratio of the first three panels is {worst['cost']:.2f} ({worst['kind']}, "
        f"{worst['axis']} {worst['at']:g}). {most} conditions cost, in evaluations of the full "
        f"model: {shared}. They share the prompts, the description's keys and values, and all "
        f"layers below the first head that any of them touches."
    )


def _draw_growth(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    axes_names = list(dict.fromkeys(point["axis"] for point in points))
    rows = -(-len(axes_names) // 2)
    figure, grid = plt.subplots(rows, 2, figsize=(8, 3 * rows), layout="constrained")
    for axis, name in zip(grid.flat, axes_names, strict=False):
        mine = [point for point in points if point["axis"] == name]
        for kind in dict.fromkeys(point["kind"] for point in mine):
            line = [(point["at"], point["cost"]) for point in mine if point["kind"] == kind]
            axis.plot(*zip(*line, strict=True), marker="o", label=kind)
        if name == "conditions":
            most = max(point["at"] for point in mine)
            axis.plot([1, most], [1, most], linestyle=":", color="gray", label="separate runs")
        else:
            axis.axhline(1, linestyle=":", color="gray", label="plain forward")
        highest = 1.1 * max(point["cost"] for point in mine)
        axis.set(xlabel=name, ylabel="cost ratio", ylim=(0, highest))
        axis.legend(fontsize="x-small")
    figure.savefig(path)
    plt.close(figure)


def _floor(floors: list[dict[str, Any]]) -> str:
    return markdown_table(
        ["model", "parameters", "tokens", "operations", "weight bytes", "share of matmul rate"],
        [
            (
                row["model"], f"{row['parameters']:,}", row["tokens"], f"{row['operations']:.3g}",
                f"{row['bytes']:,}", f"{row['share']:.0%}",
            )
            for row in floors
        ],
    )  # fmt: skip


def _gpu(gpu: dict[str, Any] | None) -> str:
    if gpu is None:
        return (
            "Not measured: the machine had no GPU. On one that has, `make bench` fills this "
            "section from an 8B-shaped Llama with random bfloat16 weights."
        )
    rates = markdown_table(
        ["what", "tokens per second"],
        [(name, f"{rate:,.0f}") for name, rate in gpu["tokens_per_second"].items()],
    )
    rate = gpu["tokens_per_second"]["icl.evaluate, zero ablation"]
    return (
        f"{gpu['device']}: a Llama of {gpu['layers']} layers and hidden size {gpu['hidden']} with "
        f"random bfloat16 weights, {gpu['documents']} prompts of {gpu['prompt_tokens']} tokens."
        f"\n\n{rates}\n\nThe grid of Table 1 with its means is {gpu['table_1_tokens']:,} tokens; "
        f"at {rate:,.0f} tokens per second that is {gpu['table_1_hours']:.2f} hours. Peak memory: "
        f"{gpu['peak_bytes']} bytes."
    )
