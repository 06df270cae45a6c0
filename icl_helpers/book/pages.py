"""Pages of the book that are made from the runs: what they say is computed, never typed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open

from icl_helpers.attention.heads import heads_in_words
from icl_helpers.attention.induction_pattern import (
    CATEGORIES,
    elements_pattern,
    induction_pattern,
    prompt_elements,
)
from icl_helpers.book.claims import VERDICTS, Evidence, claims
from icl_helpers.files import (
    SMOLLM2,
    assets_dir,
    book_dir,
    embedded_dir,
    embedded_models,
    imported_dir,
    notebooks_dir,
    project_root,
)
from icl_helpers.models.loading import load_tokenizer
from icl_helpers.parameters import StageParameters, read_parameters, stage_parameters
from icl_helpers.results.comparison import compare_runs, overlay, published_name
from icl_helpers.results.figures import accuracy_bars, bars_alt
from icl_helpers.results.outcomes import (
    headline,
    kind_lines,
    kind_outcomes,
    listed,
    removal_caption,
    seed_doubts,
)
from icl_helpers.results.tables import abstract_results, markdown_table
from icl_helpers.run.costs import PAPER_CONFIGS, estimate_cost, stage_tokens
from icl_helpers.run.plan import Plan, run_heads, run_info, run_table, shown_name
from icl_helpers.run.stages import RESULTS, stage_notebooks
from icl_helpers.tasks.prompts import build_prompts

__all__ = [
    "architecture_table", "chapter_notebooks", "citation_page", "claims_page", "comparison_page",
    "drawing", "front_page", "model_card", "notebooks_page", "overlay_page", "recipe_table",
    "report_page", "run_slug", "run_titles", "runs_page", "stage_table", "verification_page",
]  # fmt: skip

_FACTS = (
    "model", "model_type", "dtype", "device", "machine", "python", "fingerprint", "updated",
)  # fmt: skip
_CHOICES = ("limit", "seeds", "ablation_seeds", "control", "average", "data", "quantization")
# Their prose stands in Markdown files of the package; autoescaping would spoil Markdown.
_PAGES = Environment(
    loader=FileSystemLoader(assets_dir() / "pages"), trim_blocks=True, undefined=StrictUndefined
)


def run_slug(run: Path) -> str:
    """A run's name as it stands in addresses of the book."""
    return re.sub(r"[^a-z0-9-]+", "-", run.name.lower()).strip("-")


def chapter_notebooks() -> list[Path]:
    """Notebooks that are chapters of the book and no stage of a run: those without a number."""
    stages = set(stage_notebooks())
    return [path for path in sorted(notebooks_dir().glob("*.ipynb")) if path not in stages]


def _page(name: str, **values: Any) -> str:
    """Fill the page template of that name."""
    return _PAGES.get_template(f"{name}.md").render(values).strip()


def run_titles(runs: Sequence[Path]) -> dict[Path, str]:
    """What each run is called: by its model, and by its own name where others are of that model."""
    names = {run: shown_name(run_info(run)["model"]) for run in runs}
    several = {name for name in names.values() if list(names.values()).count(name) > 1}
    titles = {}
    for run, name in names.items():
        remarks = ["instruct, 4-bit weights"] if name == SMOLLM2 else []
        remarks += ["trained on these puzzles"] if name in embedded_models() else []
        remarks += [run.name] if name in several and run.name != name else []
        titles[run] = f"{name} ({'; '.join(remarks)})" if remarks else name
    return titles


def claims_page(runs: Sequence[Path]) -> tuple[str, str]:
    """Every claim of the paper with each run's verdict; and the count of verdicts in a line."""
    titles = run_titles(runs)
    evidence = {run: Evidence.of_run(run) for run in runs}
    judged = [(claim, {run: claim.judge(evidence[run]) for run in runs}) for claim in claims()]
    rows = [
        [f"[{claim.text}](#claim-{claim.name})", *(found[run].verdict for run in runs)]
        for claim, found in judged
    ]
    counts = {}
    for run in runs:
        verdicts = [found[run].verdict for _, found in judged]
        counts[run] = listed([f"{verdicts.count(it)} {it}" for it in VERDICTS if it in verdicts])
    page = _page(
        "claims", judged=judged, runs=runs, titles=titles, counts=counts, stages=_stage_pages(),
        slugs={run: run_slug(run) for run in runs},
        table=markdown_table(["claim", *titles.values()], rows),
    )  # fmt: skip
    return page, f"Of {len(judged)} claims of the paper, {titles[runs[0]]}: {counts[runs[0]]}"


def _stage_pages() -> dict[int, str]:
    """The name of each stage's page, by its number."""
    return {int(path.name[:2]): path.stem for path in stage_notebooks()}


def report_page(runs: Sequence[Path], verdicts: str) -> str:
    """The reproduction on one page: scope, method, cost, and where each claim is computed."""
    infos, titles = {run: run_info(run) for run in runs}, run_titles(runs)
    first = infos[runs[0]]
    tokens = stage_tokens(Plan.of_run(first).parameters)
    pages = _stage_pages()
    rows = [
        {
            "text": claim.text, "name": claim.name, "place": claim.place, "stage": claim.stage,
            "page": pages[claim.stage],
            "tokens": f"{tokens[claim.stage] / 1e6:.1f}" if claim.stage in tokens else "",
        }
        for claim in claims()
    ]  # fmt: skip
    costs = [
        f"{titles[run]}: {sum(info.get('seconds', {}).values()) / 60:.0f} minutes on "
        f"{info.get('device', '?')} when its stages last ran ({info.get('machine', '?')})"
        for run, info in infos.items()
    ]
    return _page(
        "report", models=listed(list(titles.values())), verdicts=verdicts, rows=rows,
        costs=". ".join(costs) + ". A run that was resumed shows less than the whole.",
        slug=run_slug(runs[0]), model=shown_name(first["model"]), title=titles[runs[0]],
        hardware=f"{first.get('device', '?')}, {first.get('machine', '?')}",
    )  # fmt: skip


def verification_page(runs: Sequence[Path]) -> str | None:
    """What the verification of each imported run said; None where none was imported."""
    found = []
    for run, title in run_titles(runs).items():
        if "imported" not in run_info(run):
            continue
        path = run / "verification.json"
        report = {"reason": "nobody asked for it"}
        if path.is_file():
            report = json.loads(path.read_text(encoding="utf-8"))
        bundle = run_slug(run) if imported_dir(run) is not None else None
        found.append({**report, "title": title, "bundle": bundle, "table": _report_table(report)})
    return _page("verification", runs=found) if found else None


def _report_table(report: Mapping[str, Any]) -> str:
    if "reason" in report:
        return ""
    rows = [
        ("documents computed again", f"{report['documents']:,} of {report['of_documents']:,}"),
        ("in cells", f"{report['cells']:,} of {report['of_cells']:,}"),
        ("equal answers", f"{report['equal_answers']:.2%}"),
        ("largest difference of a log-probability", _nats(report["largest"])),
        ("99 % of the documents differ by at most", _nats(report["percentile_99"])),
        ("largest difference of a prefix-matching score", f"{report['scores_largest']:.1e}"),
        ("made on", _stated(report["made"])),
        ("computed again on", _stated(report["here"])),
        ("seconds", f"{report['seconds']:.0f}"),
    ]
    return markdown_table(["what", "found"], rows)


def _stated(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _nats(value: float | None) -> str:
    return "one has a value, the other none" if value is None else f"{value:.1e} nats"


def runs_page(runs: Sequence[Path]) -> str:
    """Say how every run was made: parameters, versions, and how long its stages took."""
    infos = {run.name: run_info(run) for run in runs}
    for info in infos.values():
        info["model"] = shown_name(info["model"])
    made = {
        name: {fact.replace("_", " "): info.get(fact) for fact in _FACTS}
        | {key.replace("_", " "): _parameter(key, info["parameters"].get(key)) for key in _CHOICES}
        for name, info in infos.items()
    }
    seconds = {name: dict(info.get("seconds", {})) for name, info in infos.items()}
    for stages in seconds.values():
        stages["**together**"] = round(sum(stages.values()), 1)
    versions = {name: info.get("versions", {}) for name, info in infos.items()}
    return _page(
        "runs", made=_beside(made, "what"), versions=_beside(versions, "package"),
        seconds=_beside(seconds, "stage"),
    )  # fmt: skip


def _parameter(name: str, value: Any) -> Any:
    if name == "limit":
        return "all documents" if value is None else f"{value} documents a task"
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _beside(columns: Mapping[str, Mapping[str, Any]], corner: str) -> str:
    """One column per run, one row per key that any of them has."""
    keys = list(dict.fromkeys(key for values in columns.values() for key in values))
    # The sum comes last, whichever run names the most stages.
    keys.sort(key=lambda key: key.startswith("**"))
    rows = [[key, *(values.get(key) for values in columns.values())] for key in keys]
    return markdown_table([corner, *columns], rows)


def comparison_page(runs: Sequence[Path], folder: Path) -> str:
    """Runs side by side at each run's larger share of heads; the whole as CSV in ``folder``."""
    frame = compare_runs(
        {
            run.name: (
                shown_name(run_info(run)["model"]),
                run_table(run, "results", None),
                run_heads(run),
            )
            for run in runs
        }
    )
    frame.to_csv(folder / "comparison.csv", index=False)
    shown = frame[
        frame["share"].isin(["", "larger"]) & frame["ablation"].isin(["none", "mean", "knockout"])
    ]
    tables = {
        " ".join(filter(None, key)): _pivot(rows, runs)
        for key, rows in shown.groupby(["condition", "control"], sort=False)
    }
    return _page("comparison", tables=tables)


def _pivot(rows: pd.DataFrame, runs: Sequence[Path]) -> str:
    cells = {
        (row["task"], row["labels"], row["shots"], row["run"]): f"{row['accuracy']:.1f}"
        + (f" ({row['change']:+.1f})" if row["condition"] != "full" else "")
        for row in rows.to_dict("records")
    }
    names = [run.name for run in runs]
    heads = rows.groupby("run")["heads"].first()
    titles = [", ".join(filter(None, [name, heads.get(name)])) for name in names]
    keys = list(dict.fromkeys(key[:3] for key in cells))
    lines = [[*key, *(cells.get((*key, name)) for name in names)] for key in keys]
    return markdown_table(["task", "labels", "shots", *titles], lines)


def overlay_page(run: Path, folder: Path) -> str | None:
    """A run of one of the paper's models over the published values; None for any other model."""
    model = run_info(run)["model"]
    if published_name(model) is None:
        return None
    frame = overlay(model, run_table(run, "documents", None))
    if frame is None or frame.empty:
        return None
    frame.to_csv(folder / "overlay.csv", index=False)
    rows = [
        [
            row["table"], row["task"], row["labels"], row["shots"],
            row["condition"].replace("_", " "), row["ablation"],
            row["heads"],
            f"{row['published']:.1f}", f"{row['accuracy']:.1f}",
            f"{row['low']:.1f} to {row['high']:.1f}", f"{row['difference']:+.1f}",
            "yes" if row["inside"] else "no",
        ]
        for row in frame.to_dict("records")
    ]  # fmt: skip
    header = [
        "table", "task", "labels", "shots", "condition", "ablation", "heads", "published",
        "this run", "95 % interval", "difference", "inside",
    ]  # fmt: skip
    difference = frame["difference"]
    return _page(
        "overlay", model=shown_name(model), inside=int(frame["inside"].sum()), count=len(frame),
        low=difference.min(), high=difference.max(), table=markdown_table(header, rows),
    )  # fmt: skip


def notebooks_page(staged: Path, runs: Sequence[Path]) -> str:
    """Links to every notebook as it is kept and as it was executed.

    Expects clean copies in ``staged/notebooks`` and the executed ones where the book shows them.
    """
    stages = [
        [
            _title(path),
            f"{{download}}`clean <notebooks/{path.name}>`",
            *(f"{{download}}`executed <run/{run_slug(run)}/{path.name}>`" for run in runs),
        ]
        for path in stage_notebooks()
    ]
    chapters = [
        [_title(path), *(f"{{download}}`{kind} <{path.name}>`" for kind in ("clean", "executed"))]
        for path in chapter_notebooks()
        if (staged / path.name).is_file()
    ]
    for row in chapters:
        row[1] = row[1].replace("<", "<notebooks/")
    return _page(
        "notebooks",
        stages=markdown_table(["stage", "notebook", *(run.name for run in runs)], stages),
        chapters=chapters and markdown_table(["chapter", "notebook", "in this book"], chapters),
    )


def _title(path: Path) -> str:
    import nbformat  # of the extra 'book'

    first = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0]
    return first.removeprefix("# ")


def citation_page(runs: Sequence[Path]) -> str:
    """How to cite the paper, this software, and each run by its ``run.json`` and bundle."""
    references = (book_dir() / "references.bib").read_text()
    (paper,) = re.findall(
        r"^@\w+\{crosbie2025induction,.*?^\}", references, re.DOTALL | re.MULTILINE
    )
    text = (project_root() / "CITATION.cff").read_text()
    software = yaml.safe_load(text)
    authors = " and ".join("{" + author["name"] + "}" for author in software["authors"])
    cited = {title: _run_entry(run) for run, title in run_titles(runs).items()}
    return _page(
        "cite", paper=paper, software=software, authors=authors, cff=text.strip(), runs=cited
    )


def _run_entry(run: Path) -> str:
    """A run's BibTeX entry: only what its ``run.json`` states. Who made it is not stated there."""
    info = run_info(run)
    parameters, plan = info["parameters"], Plan.of_run(info)
    model, version = shown_name(info["model"]), info.get("versions", {}).get("icl_helpers")
    tasks = [*plan.tasks(), *plan.tasks("nlp_tasks")]
    weights = [f"revision {parameters['revision']}"] if parameters.get("revision") else []
    weights += [f"fingerprint {info['fingerprint']}"] if info.get("fingerprint") else []
    updated, bundle = info.get("updated", ""), info.get("imported")
    told = [
        f"Model {model}" + (f" ({', '.join(weights)})" if weights else ""),
        f"{', '.join(tasks)} ({_parameter('limit', parameters.get('limit'))})",
        f"demonstration seeds {_parameter('seeds', parameters['seeds'])}",
        *([f"last updated {updated[:10]}"] if updated else []),
        f"SHA-256 of the bundle's manifest: {bundle}" if bundle else "not exported as a bundle",
    ]
    fields = {
        "title": f"Run {run.name}: induction heads of {model} removed and blocked",
        "year": updated[:4],
        "howpublished": f"Run of icl-helpers {version}" if version else "Run of icl-helpers",
        "note": "; ".join(told),
    }
    escaped = {name: re.sub(r"([_%&#$])", r"\\\1", value) for name, value in fields.items()}
    lines = [f"  {name} = {{{value}}}" for name, value in escaped.items() if value]
    return f"@misc{{run-{run_slug(run)},\n" + ",\n".join(lines) + "\n}"


_SHIPPED = "computed beforehand and shipped with it (see [](verification))"
_FIGURE = ("mean", "knockout")
_VIEWER = "07_attention_patterns"


def front_page(staged: Path, runs: Sequence[Path]) -> dict[str, str]:
    """Draw the front page's figure into ``staged/_static``; return what is inserted into prose.

    Its numbers are those of the first run. Keys: model, model_described, size, origin, answer,
    figure, runs_here, stages, viewer, about_model.
    """
    run = runs[0]
    info, titles, sizes = run_info(run), run_titles(runs), {run: _size(run) for run in runs}
    name, parameters = shown_name(info["model"]), info["parameters"]
    results = abstract_results(run_table(run, "results", "tasks"))
    documents = run_table(run, "documents", None)
    outcomes = kind_outcomes(documents)
    n_heads = sizes[run][0]
    heads = heads_in_words(max(it.fraction for it in outcomes) or 1.0, n_heads)
    (staged / "_static" / "narrow").mkdir(parents=True, exist_ok=True)
    for narrow, place in ((False, "front.png"), (True, "narrow/fig-front.png")):
        figure = accuracy_bars(results, ablations=list(_FIGURE), n_heads=n_heads, narrow=narrow)
        figure.savefig(staged / "_static" / place, dpi=160)
    left = removal_caption(documents[documents["task"].isin(results["task"])])
    alt = f"{bars_alt(results, ablations=list(_FIGURE), n_heads=n_heads)} {left}".strip()
    embedded = [name for name in embedded_models() if name in map(_model, runs)]
    return {
        "model": name,
        "model_described": titles[run],
        "size": sizes[run][1],
        "origin": "computed when the book was built" if "imported" not in info else _SHIPPED,
        "answer": _page(
            "answer", title=titles[run], headline=headline(outcomes, heads=heads),
            doubts=seed_doubts(outcomes, model=name), kinds=kind_lines(outcomes),
            results=f"run/{run_slug(run)}/{RESULTS}",
        ),
        "figure": _page("figure", **parameters | {"model": name}, alt=alt, heads=heads, left=left),
        "runs_here": "\n".join(
            f"- [{titles[it]}](run/{run_slug(it)}/{RESULTS}), {sizes[it][1]}" for it in runs
        ),
        "stages": str(len(stage_notebooks())),
        "viewer": f"[attention viewer](run/{run_slug(run)}/{_VIEWER})",
        "about_model": "\n\n".join(
            [_page("real")] * (name not in embedded)
            + [_page("embedded", model=it) for it in embedded]
        ),
    }  # fmt: skip


def _model(run: Path) -> str:
    return shown_name(run_info(run)["model"])


def _size(run: Path) -> tuple[int, str]:
    """Number of the model's heads, and its size in words; an embedded model's parameters too."""
    scores = json.loads((run / "heads.json").read_text(encoding="utf-8"))["scores"]
    layers, heads, name = len(scores), len(scores[0]), _model(run)
    size = f"{layers} layers of {heads} heads"
    if name in embedded_models():
        with safe_open(embedded_dir() / name / "model.safetensors", "pt") as weights:
            shapes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118
        size += f", {sum(map(math.prod, shapes)) / 1e6:.1f} million parameters"
    return layers * heads, size


def model_card(model: str) -> str:
    """The model card of an embedded model as a page of the book."""
    text = (embedded_dir() / model / "README.md").read_text(encoding="utf-8")
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return body.replace(f"# {model}", f"# Model card of {model}", 1).strip()


def drawing(*, model: str = "icl-tiny", task: str = "wordseq1_binary", shots: int = 2) -> str:
    """Draw what an induction head attends to, and the pairs that a knockout blocks, on a prompt.

    Pairs are those of :func:`icl_helpers.induction_pattern` by the model's tokenizer; the prompt is
    the task's first whose query shares a word's category with a demonstration.
    """
    copied = list("KRT") * 2
    ideal = {
        (at, k + 1): "words"
        for at in range(len(copied))
        for k in range(at)
        if copied[k] == copied[at]
    }
    tokenizer = load_tokenizer(model)
    for prompt in build_prompts(task, shots=shots, seed=42):
        encoded = tokenizer(prompt.context, add_special_tokens=False, return_offsets_mapping=True)
        spans, elements = encoded["offset_mapping"], prompt_elements(prompt.context)
        kinds = {name: elements_pattern(elements, spans, categories=(name,)) for name in CATEGORIES}
        query = next(i for i, (_, end) in enumerate(spans) if end > elements[-3].start)
        if kinds["words"][query].any():
            break
    first = next(i for i, (_, end) in enumerate(spans) if end > elements[0].start)
    whole = induction_pattern(prompt.context, tokenizer)
    pairs = {
        (at - first, key - first): next(kind for kind in CATEGORIES if kinds[kind][at, key])
        for at, key in whole.nonzero().tolist()
    }
    shown = [prompt.context[start:end].strip() or "blank line" for start, end in spans[first:]]
    return _page(
        "drawing", figures=[(copied, ideal, 0), (shown, pairs, query - first)], arcs=_arcs,
        say=_say_pairs,
    )  # fmt: skip


def _arcs(pairs: Mapping[tuple[int, int], str], loud: int) -> list[dict[str, Any]]:
    """Where each arc of a drawing runs, and whether it starts in the query (from ``loud`` on)."""
    return [
        {"start": 22 * at + 11, "end": 22 * key + 11, "out": 12 * (at - key) + 14, "kind": kind,
         "quiet": at < loud}
        for (at, key), kind in sorted(pairs.items())
    ]  # fmt: skip


def _say_pairs(tokens: Sequence[str], pairs: Mapping[tuple[int, int], str], loud: int) -> str:
    """Say which pairs start in the query, for readers who do not see the drawing."""
    looks: dict[int, list[str]] = {}
    for at, key in sorted(pairs):
        if at >= loud:
            looks.setdefault(at, []).append(f"{tokens[key]} (token {key + 1})")
    return "; ".join(
        f"from {tokens[at]} (token {at + 1}) to {listed(keys)}" for at, keys in looks.items()
    )


def architecture_table() -> str:
    """What a sweep over all causal-LM types of transformers found, as Markdown for the book.

    ``book/_static/architectures.json`` is written by ``tests/sweep_causal_lm_types.py``.
    """
    found = json.loads((book_dir() / "_static" / "architectures.json").read_text(encoding="utf-8"))
    types = found["types"]
    rows = []
    for name, kind in types.items():
        cached = kind.get("cached", "")
        worst = max(cached.values()) if isinstance(cached, dict) else cached
        parts = [kind.get("hooked"), worst, kind.get("zero_against_projection")]
        shown = [f"{part:.0e}" if isinstance(part, float) else part or "" for part in parts]
        why = kind.get("reason", "").replace("|", ", ")
        rows.append([f"`{name}`", kind["result"], *shown, why])
    results = [kind["result"] for kind in types.values()]
    counts = ", ".join(f"{results.count(r)} {r}" for r in dict.fromkeys(sorted(results)))
    header = ["type", "result", "hook", "cache", "zero ablation", "why not"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"Of {len(types)} types: {counts} ({found['date']}; {versions}).\n\n"
        f"````{{admonition}} All types\n:class: dropdown\n\n{markdown_table(header, rows)}\n````"
    )


# Tokens per second taken for a recipe that is meant for a smaller GPU than the default's.
_RECIPE_RATES = {"llama-3-8b-4bit.yaml": 900.0}


def recipe_table(folder: Path | None = None) -> str:
    """The ready recipes with their estimates, as a Markdown table for the book.

    Recipes of models whose configuration is not at hand are left out.
    """
    rows = []
    for path in sorted((folder or notebooks_dir() / "parameters").glob("*.yaml")):
        p = stage_parameters(**read_parameters(path))
        if p.model not in PAPER_CONFIGS:
            continue
        kind = p.dtype if p.quantization is None else f"{p.quantization}, {p.dtype}"
        documents = "all" if p.limit is None else f"{p.limit} a task"
        cost = estimate_cost(p, tokens_per_second=_RECIPE_RATES.get(path.name))
        rows.append(
            (
                f"`{path.name}`", kind, p.batch_size, documents,
                f"{cost.weights_bytes / 1e9:.0f} GB", f"{cost.working_bytes / 1e9:.0f} GB",
                f"{cost.tokens / 1e6:.0f} million",
                f"{cost.hours:.1f} at {cost.rate:,.0f} tokens/s",
            )
        )  # fmt: skip
    header = ["recipe", "dtype", "batch size", "documents", "weights", "work", "tokens"]
    return markdown_table([*header, "GPU hours"], rows)


_OUTCOMES = {
    1: ("prefix-matching scores", "the heat map of Figure 2, every head's score, the head sets"),
    2: ("mean activations", "what each head gives on average text"),
    3: ("full model", "accuracy with and without examples"),
    4: ("heads removed", "Tables 1 and 4, all but the knockout"),
    5: ("pattern blocked", "the knockout's part of Table 1"),
    9: ("which heads, how many, how removed", "dose and response, single heads, kinds of removal"),
    10: ("function vectors", "function vectors beside induction, circuits, blocked text"),
}


def stage_table(p: StageParameters) -> str:
    """What each stage of a run costs and leaves, as a Markdown table for the book."""
    cost = estimate_cost(p)
    rows = []
    for stage, tokens in {**stage_tokens(p), **cost.closer}.items():
        name, outcome = _OUTCOMES[stage]
        minutes = tokens / cost.rate / 60
        time = "under a minute" if minutes < 1 else f"{minutes:.0f} minutes"
        rows.append((f"{stage}, {name}", f"{tokens / 1e6:.3f} million", time, outcome))
    return markdown_table(["stage", "tokens", "GPU time", "what comes out"], rows)
