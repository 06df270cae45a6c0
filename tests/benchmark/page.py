"""The book's chapter on cost: what was measured, put into ``book/performance.md``.

The page's measured part stands between two marks and is made from ``book/_static/benchmark.json``
alone, so that a test can hold the one to the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from icl_helpers.files import atomic_path
from icl_helpers.results.tables import markdown_table

BEGIN, END = "<!-- measured: `make bench` writes this part -->", "<!-- end of what was measured -->"
_GROWTH, _LIBRARIES = "benchmark_growth.svg", "benchmark_libraries.svg"
_CONDITIONS = {
    "full": "full model", "zero": "zero ablation", "mean": "mean ablation",
    "seven": "seven conditions",
}  # fmt: skip


def write_page(book: Path) -> None:
    """Write the measured part of ``performance.md`` and its figures from the book's measurements."""
    page, static = book / "performance.md", book / "_static"
    measured = json.loads((static / "benchmark.json").read_text())
    draw_growth(measured["growth"]["points"], static / _GROWTH)
    if measured.get("side_by_side"):
        draw_libraries(measured["side_by_side"]["cells"], static / _LIBRARIES)
    text = with_measurements(page.read_text(), measured)
    with atomic_path(page) as temporary:
        temporary.write_text(text)


def with_measurements(page: str, measured: dict[str, Any]) -> str:
    """The page's text with the measured part made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    shown = "\n\n".join(
        [
            _outcome(measured["rows"], measured["rounds"]), "## Beside other libraries",
            _side_by_side(measured.get("side_by_side")), "## How it grows",
            _growth(measured["growth"]), "## Floor", _floor(measured["floor"]), "## GPU",
            _gpu(measured["gpu"]), "## Machine",
            "All but the sections on other libraries and on a GPU, which name their own:",
            _facts(measured["machine"]),
        ]
    )  # fmt: skip
    return f"{before}{BEGIN}\n\n{shown}\n\n{END}{after}"


def _facts(machine: dict[str, Any]) -> str:
    return markdown_table(["", ""], list(machine.items()))


def _outcome(bars: list[dict[str, Any]], rounds: int) -> str:
    """The bars, and how many of them are met."""
    rows = markdown_table(
        ["what", "model or prompts", "bar", "measured", "lowest to highest", "met"],
        [
            (
                row["what"], row["model"], f"at {row['at']} {row['bar']:g}",
                f"{row['median']:.3g}" + (" s" if row["unit"] == "seconds" else ""),
                f"{row['low']:.3g} to {row['high']:.3g}", "yes" if row["met"] else "no",
            )
            for row in bars
        ],
    )  # fmt: skip
    missed = sum(not row["met"] for row in bars)
    outcome = (
        f"{missed} of {len(bars)} bars are missed" if missed else f"All {len(bars)} bars are met"
    )
    return f"{outcome}. Medians of at least {rounds} alternating runs.\n\n{rows}"


def _side_by_side(found: dict[str, Any] | None) -> str:
    if found is None:
        return (
            "Not measured yet. `make bench PEERS=1` installs TransformerLens and nnsight into an "
            "environment of their own and fills this section."
        )
    cells = found["cells"]
    machine = found["machine"]
    trial = (
        "**A trial run, with fewer rounds or documents than the bars ask for: it shows that the "
        "comparison runs, and its times are not to be quoted.** "
        if found["trial"]
        else ""
    )
    compared = [
        cell
        for cell in cells
        if cell["library"] != "plain forward" and cell["condition"] != "seven"
    ]
    return "\n\n".join(
        [
            f"{trial}{found['model']}; {found['documents']} documents in batches of "
            f"{found['batch']}, {found['heads']} heads ablated, {machine['threads']} thread; medians "
            f"of {found['rounds']} rounds in which the libraries take turns, each in a process of its "
            f"own; measured on {machine['date']}.",
            _outcome(found["rows"], found["rounds"]),
            "### Do they agree?",
            "Largest difference of any label's log-probability from that of transformers with "
            "hooks of torch's own before the output projections, one sequence a label. The bar is "
            "0.0001.",
            _by_library(compared, lambda cell: f"{cell['difference']:.1e}"),
            "### Documents per second",
            "In brackets the time over that of a plain forward pass of the same prompts, which "
            "computes all logits and scores no label. Seven conditions count each document seven "
            "times.",
            _by_library(
                cells,
                lambda cell: f"{cell['documents_per_second']:.2f} ({cell['over_plain']:.2f})",
            ),
            f"```{{figure}} _static/{_LIBRARIES}\n:alt: Bars of documents per second by library and "
            f"condition, one panel for each kind of prompts.\nDocuments per second of each library; "
            f"where a bar lacks, the table says why.\n```",
            _sequences(cells),
            "### Peak memory",
            "Of the library's whole process, weights included, in GB.",
            _by_library(
                cells,
                lambda cell: (
                    "not told by this system"
                    if cell["peak_bytes"] is None
                    else f"{cell['peak_bytes'] / 1e9:.2f}"
                ),
            ),
            "### With what",
            _versions(found["versions"]),
            _facts(machine),
        ]
    )


def _by_library(cells: list[dict[str, Any]], shown: Any) -> str:
    """A row for each kind of prompts and condition, a column for each library."""
    libraries = list(dict.fromkeys(cell["library"] for cell in cells))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for cell in cells:
        row = rows.setdefault((cell["case"], _CONDITIONS[cell["condition"]]), {})
        row[cell["library"]] = f"no: {cell['cannot']}" if "cannot" in cell else shown(cell)
    return markdown_table(
        ["prompts", "condition", *libraries],
        [(*key, *(row.get(name, "") for name in libraries)) for key, row in rows.items()],
    )


def _sequences(cells: list[dict[str, Any]]) -> str:
    """How many sequences each library runs, and what one costs."""
    full = [cell for cell in cells if cell["condition"] == "full" and "cannot" not in cell]
    return (
        "Sequences that each runs for a document, and in brackets the time of one over that of a "
        "plain forward pass. TransformerLens and nnsight give logits: they run one sequence a label, "
        "the straightforward way, and equal ones are not merged by hand. Stock lm-eval "
        "merges those of labels that are one token; here labels are branches of their prompt's "
        "sequence.\n\n"
        + _by_library(
            full,
            lambda cell: f"{cell['sequences']:g} ({cell['over_plain'] / cell['sequences']:.2f})",
        )
    )


def _versions(versions: dict[str, dict[str, str]]) -> str:
    common = ("python", "torch", "transformers")
    return markdown_table(
        ["library", "version", *common],
        [
            (name, next((v for k, v in found.items() if k not in common), found["transformers"]),
             *(found[key] for key in common))
            for name, found in versions.items()
        ],
    )  # fmt: skip


def draw_libraries(cells: list[dict[str, Any]], path: Path) -> None:
    """Bars of documents per second: a panel for each kind of prompts."""
    cases = list(dict.fromkeys(cell["case"] for cell in cells))
    libraries = list(dict.fromkeys(cell["library"] for cell in cells))
    figure, grid = plt.subplots(1, len(cases), figsize=(9, 3.5), layout="constrained")
    for axis, case in zip(grid, cases, strict=True):
        for index, library in enumerate(libraries):
            mine = [c for c in cells if (c["case"], c["library"]) == (case, library)]
            drawn = [
                (place, cell["documents_per_second"])
                for place, cell in enumerate(mine)
                if "cannot" not in cell
            ]
            offset = (index - (len(libraries) - 1) / 2) * 0.16
            axis.bar(
                [place + offset for place, _ in drawn], [rate for _, rate in drawn], width=0.16,
                label=library,
            )  # fmt: skip
        axis.set_xticks(range(len(_CONDITIONS)), list(_CONDITIONS.values()), fontsize="x-small")
        axis.set(title=case, ylabel="documents per second")
    grid[0].legend(fontsize="x-small")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    # The same measurements make the same file.
    with plt.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _growth(growth: dict[str, Any]) -> str:
    worst = max(
        (p for p in growth["points"] if p["axis"] != "conditions"), key=lambda point: point["cost"]
    )
    most = max(p["at"] for p in growth["points"] if p["axis"] == "conditions")
    ends = {p["kind"]: p["cost"] for p in growth["points"] if p["at"] == most}
    shared = "; ".join(f"{kind}: {cost:.2g}" for kind, cost in ends.items() if "heads" in kind)
    return (
        f"```{{figure}} _static/{_GROWTH}\n"
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


def draw_growth(points: list[dict[str, Any]], path: Path) -> None:
    """A panel for each axis, a line for each kind."""
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
    _save(figure, path)


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
            "Not measured: no GPU was at hand. On a machine that has one, `make bench-gpu` fills this "
            "section from an 8B-shaped Llama with random bfloat16 weights; it needs no network, and "
            "is made to fit nine minutes on one H100."
        )

    def memory(peak: int | None) -> str:
        return "not told off a GPU" if peak is None else f"{peak / 1e9:.1f} GB"

    rates = markdown_table(
        ["what", "tokens per second", "peak memory"],
        [(row["what"], f"{row['rate']:,.0f}", memory(row["peak_bytes"])) for row in gpu["rates"]],
    )
    return (
        f"{gpu['device']}: a Llama of {gpu['layers']} layers and hidden size {gpu['hidden']} with "
        f"random bfloat16 weights, {gpu['documents']} prompts of {gpu['prompt_tokens']} tokens, "
        f"{gpu['heads']} heads ablated; the fastest of up to {gpu['rounds']} runs, in "
        f"{gpu['minutes']:.1f} minutes altogether."
        f"\n\n{rates}\n\nThe plain forward pass reaches {gpu['share']:.0%} of the rate of a large "
        f"matrix product on the same device, {gpu['matmul_per_second']:.3g} operations per second. "
        f"The grid of Table 1 with its means is {gpu['table_1_tokens']:,} tokens; at the rate of "
        f"`icl.evaluate` under zero ablation that is {gpu['table_1_hours']:.2f} hours, by "
        f"extrapolation.\n\n{_facts(gpu['machine'])}"
    )
