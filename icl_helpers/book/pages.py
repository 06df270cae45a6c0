"""Pages of the book that are made from the runs: what they say is computed, never typed."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
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
from icl_helpers.evaluation.store import ROW
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
from icl_helpers.models.reference_text import PAPER_POSITIONS
from icl_helpers.parameters import StageParameters, read_parameters, stage_parameters
from icl_helpers.results.comparison import compare_runs, overlay, published_name
from icl_helpers.results.figures import accuracy_bars, bars_alt
from icl_helpers.results.outcomes import (
    KindOutcome,
    headline,
    kind_outcomes,
    listed,
    removal_caption,
    seed_doubts,
    task_kind,
    task_name,
)
from icl_helpers.results.tables import abstract_results, markdown_table, unsigned_zeros
from icl_helpers.run.costs import PAPER_CONFIGS, estimate_cost, stage_tokens
from icl_helpers.run.plan import GROUPS, Plan, run_heads, run_info, run_table, shown_name
from icl_helpers.run.stages import RESULTS, TEXT, stage_notebooks
from icl_helpers.tasks.prompts import build_prompts

__all__ = [
    "architecture_table", "chapter_notebooks", "citation_page", "claims_page", "comparison_page",
    "drawing", "front_page", "model_card", "notebooks_page", "overlay_page", "recipe_table",
    "report_page", "run_slug", "run_titles", "runs_page", "shown_stages", "stage_table",
    "verification_page",
]  # fmt: skip

_FACTS = (
    "model", "model_type", "dtype", "device", "machine", "python", "fingerprint", "updated",
)  # fmt: skip
_CHOICES = ("ablation_seeds", "control", "average", "data", "quantization")
# Their prose stands in Markdown files of the package; autoescaping would spoil Markdown.
_PAGES = Environment(
    loader=FileSystemLoader(assets_dir() / "pages"), trim_blocks=True, undefined=StrictUndefined
)


def run_slug(run: Path) -> str:
    """Return a run's name as it stands in addresses of the book."""
    return re.sub(r"[^a-z0-9-]+", "-", run.name.lower()).strip("-")


def chapter_notebooks() -> list[Path]:
    """List notebooks that are chapters of the book and no stage of a run: those without number."""
    stages = set(stage_notebooks())
    return [path for path in sorted(notebooks_dir().glob("*.ipynb")) if path not in stages]


def shown_stages(run: Path) -> list[Path]:
    """List the stage notebooks that have something to show of a run, in order.

    A stage on text without text tasks has nothing, nor has one whose measurements are all missing.
    """
    plan = Plan.of_run(run_info(run))
    shown = []
    for stage in stage_notebooks():
        executed = run / "notebooks" / stage.name
        text = executed.read_text(encoding="utf-8") if executed.is_file() else ""
        measured, missing = text.count("said_where_not_measured()"), text.count("**Not measured.**")
        empty = stage.stem == TEXT and not plan.tasks("nlp_tasks")
        if not empty and (missing < measured or not measured):
            shown.append(stage)
    return shown


def _page(name: str, **values: Any) -> str:
    """Fill the page template of that name."""
    return unsigned_zeros(_PAGES.get_template(f"{name}.md").render(values).strip())


def run_titles(runs: Sequence[Path]) -> dict[Path, str]:
    """Name each run by its model, and by its tasks where others are of that model."""
    titles = {}
    for run in runs:
        titles[run] = described = _described(run)
        others = [_kinds(other) for other in runs if other != run and _model(other) == _model(run)]
        if others:
            titles[run] = f"{described}: {run.name if _kinds(run) in others else _kinds(run)}"
    return titles


def _described(run: Path) -> str:
    """Name a run's model with what has to stand wherever its numbers do."""
    name = _model(run)
    remarks = ["instruct, 4-bit weights"] if name == SMOLLM2 else []
    remarks += ["trained on these puzzles"] if name in embedded_models() else []
    return f"{name} ({'; '.join(remarks)})" if remarks else name


def _kinds(run: Path) -> str:
    """Say what a run's tasks are made of: letters, words, text."""
    plan = Plan.of_run(run_info(run))
    tasks = [*plan.tasks(), *plan.tasks("nlp_tasks")]
    return listed(list(dict.fromkeys(task_kind(task, "").split(",")[0] for task in tasks)))


# What decides whether the paper's finding holds, by the names of the claims.
_CENTRAL = ("three-percent", "random-control", "strict-control", "knockout")


def claims_page(runs: Sequence[Path]) -> tuple[str, str]:
    """Judge every claim by each run; and say in short what the first run makes of them."""
    titles = run_titles(runs)
    evidence = {run: Evidence.of_run(run) for run in runs}
    judged = [(claim, {run: claim.judge(evidence[run]) for run in runs}) for claim in claims()]
    rows = [
        [f"[{claim.text}](#claim-{claim.name})", *(findings[run].verdict for run in runs)]
        for claim, findings in judged
    ]
    counts, weights = {}, [run_info(run).get("fingerprint") for run in runs]
    for run, model in zip(runs, weights, strict=True):
        # What an earlier run of the same weights says of the scores counts once.
        known = weights.index(model) < runs.index(run) and model is not None
        of_run = [found[run].verdict for claim, found in judged if claim.stage > 1 or not known]
        counts[run] = listed([f"{of_run.count(it)} {it}" for it in VERDICTS if it in of_run])
        counts[run] += " (the scores of the heads are those of the run before)" * known
    page = _page(
        "claims", judged=judged, runs=runs, titles=titles, counts=counts,
        stages={run: _stage_pages(shown_stages(run)) for run in runs},
        sizes={run: evidence[run].size for run in runs},
        slugs={run: run_slug(run) for run in runs},
        table=markdown_table(["claim", *titles.values()], rows),
    )  # fmt: skip
    first = [(claim, findings[runs[0]]) for claim, findings in judged]
    central = [(claim, finding) for claim, finding in first if claim.name in _CENTRAL]
    return page, _page(
        "in_short", title=titles[runs[0]], size=evidence[runs[0]].size, central=central,
        number=len(judged), counts=counts[runs[0]], closer=_predictions(runs[0]),
        page=f"run/{run_slug(runs[0])}/{_stage_pages(shown_stages(runs[0])).get(9)}",
    )  # fmt: skip


def _predictions(run: Path) -> list[str]:
    """Quote from a run's stage 9 what became of its predictions on the highest scores."""
    path = run / "notebooks" / "09_which_heads.ipynb"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    claims = r"(?:Without the (?:\d+ )?highest|A head with a higher)"
    quoted = re.findall(rf'"- \*{claims}(?:[^"\\]|\\.)*"', text)
    return [json.loads(line).strip() for line in quoted]


def _stage_pages(stages: Sequence[Path]) -> dict[int, str]:
    return {int(path.name[:2]): path.stem for path in stages}


def report_page(runs: Sequence[Path], verdicts: str) -> str:
    """Report on one page: scope, method, cost, and where each claim is computed."""
    infos, titles = {run: run_info(run) for run in runs}, run_titles(runs)
    tokens = {run: stage_tokens(Plan.of_run(info).parameters) for run, info in infos.items()}
    pages = {run: _stage_pages(shown_stages(run)) for run in runs}
    rows = []
    for claim in claims():
        run = next((it for it in runs if claim.stage in pages[it]), runs[0])
        amount = tokens[run].get(claim.stage)
        file = f"notebooks/parameters/{run.name}.yaml"
        known = (project_root() / file).is_file()
        rows.append({
            **vars(claim), "page": pages[run].get(claim.stage), "slug": run_slug(run),
            "tokens": "" if amount is None else f"{amount / 1e6:.1f}",
            "options": f"-f {file}" if known else f"--model {shown_name(infos[run]['model'])}",
            "hardware": infos[run].get("device", "?"),
        })  # fmt: skip
    costs = []
    for run, info in infos.items():
        where = f"{info.get('device', '?')} ({info.get('machine', '?')})"
        whole = sum(tokens[run].values()) / 1e6
        costs.append(f"{titles[run]}: about {whole:.0f} million tokens, made on {where}")
    return _page(
        "report", models=listed(list(titles.values())), verdicts=verdicts, rows=rows,
        costs=". ".join(costs) + ". Tokens are an estimate of stages 1 to 5, from nothing; text "
        "tasks and the closer looks of stages 9 and 10 come on top.",
        title=titles[runs[0]],
    )  # fmt: skip


def verification_page(runs: Sequence[Path]) -> str | None:
    """Say what the verification of each imported run said; None where none was imported."""
    reports = []
    for run, title in run_titles(runs).items():
        if "imported" not in run_info(run):
            continue
        path = run / "verification.json"
        report = {"reason": "nobody asked for it"}
        if path.is_file():
            report = json.loads(path.read_text(encoding="utf-8"))
        bundle = run_slug(run) if imported_dir(run) is not None else None
        table = "" if "reason" in report else _report_table(report)
        reports.append({**report, "title": title, "bundle": bundle, "table": table})
    return _page("verification", runs=reports) if reports else None


def _report_table(report: Mapping[str, Any]) -> str:
    worst, most = (
        "one has a value, the other none" if value is None else f"{value:.1e} nats"
        for value in (report["largest"], report["percentile_99"])
    )
    made, here = (
        ", ".join(f"{name} {value}" for name, value in report[side].items())
        for side in ("made", "here")
    )
    rows = [
        ("documents computed again", f"{report['documents']:,} of {report['of_documents']:,}"),
        ("in cells", f"{report['cells']:,} of {report['of_cells']:,}"),
        ("equal answers", f"{report['equal_answers']:.2%}"),
        ("largest difference of a log-probability", worst),
        ("99 % of the documents differ by at most", most),
        ("largest difference of a prefix-matching score", f"{report['scores_largest']:.1e}"),
        ("made on", made),
        ("computed again on", here),
        ("seconds", f"{report['seconds']:.0f}"),
    ]
    return markdown_table(["what", "found"], rows)


def runs_page(runs: Sequence[Path]) -> str:
    """Say how every run was made: parameters, versions, and how long its stages took."""
    infos = {run.name: run_info(run) for run in runs}
    made, seconds, versions = {}, {}, {}
    for name, info in infos.items():
        info["model"] = shown_name(info["model"])
        facts = {fact: info.get(fact) for fact in _FACTS}
        facts |= {key: _parameter(info["parameters"].get(key)) for key in _CHOICES}
        made[name] = {key.replace("_", " "): value for key, value in facts.items()}
        stages = info.get("seconds", {})
        seconds[name] = {**stages, "**together**": round(sum(stages.values()), 1)}
        versions[name] = info.get("versions", {})
    return _page(
        "runs", made=_beside(made, "what"), versions=_beside(versions, "package"),
        seconds=_beside(seconds, "stage"),
        set_up={title: _set_up(run) for run, title in run_titles(runs).items()},
    )  # fmt: skip


def _set_up(run: Path) -> dict[str, Any]:
    """Find what a run evaluates: its tasks by their numbers of examples, documents, means."""
    info = run_info(run)
    plan = Plan.of_run(info)
    shots: dict[str, list[str]] = {}
    for prompts in (it for group in GROUPS for it in plan.prompt_sets(group)):
        shots.setdefault(prompts.task, []).append(str(prompts.shots))
    tasks: dict[str, list[str]] = {}
    for task, numbers in shots.items():
        tasks.setdefault(listed(list(dict.fromkeys(numbers))), []).append(task_name(task))
    context = info.get("identity", {}).get("context", PAPER_POSITIONS)
    return {
        **vars(plan.parameters), "tasks": {it: listed(names) for it, names in tasks.items()},
        "drawn": list({plan.sampling(task) for task in shots}), "instruct": _model(run) == SMOLLM2,
        "positions": min(plan.parameters.positions or PAPER_POSITIONS, context),
        "text": plan.tasks("nlp_tasks"),
        "closely": listed([task_name(prompts.task) for prompts in plan.analysis_sets()]),
        "seeds": listed(list(map(str, plan.parameters.seeds))),
    }  # fmt: skip


def _parameter(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _beside(columns: Mapping[str, Mapping[str, Any]], corner: str) -> str:
    """Lay out a column per run, a row per key that any of them has."""
    keys = list(dict.fromkeys(key for values in columns.values() for key in values))
    # The sum comes last, whichever run names the most stages.
    keys.sort(key=lambda key: key.startswith("**"))
    rows = [[key, *(values.get(key) for values in columns.values())] for key in keys]
    return markdown_table([corner, *columns], rows)


def comparison_page(runs: Sequence[Path], folder: Path) -> str:
    """Lay runs side by side at each one's larger share of heads; all of it as CSV in ``folder``."""
    frame = compare_runs(
        {run.name: (_model(run), run_table(run, "results", None), run_heads(run)) for run in runs}
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
    change = rows["change"].map(" ({:+.1f})".format).mask(rows["condition"] == "full", "")
    cells = rows.assign(text=rows["accuracy"].map("{:.1f}".format) + change)
    names = [run.name for run in runs]
    wide = cells.pivot(index=ROW, columns="run", values="text").reindex(columns=names).fillna("")
    heads = rows.groupby("run")["heads"].first()
    wide.columns = pd.Index([", ".join(filter(None, [it, heads.get(it)])) for it in names])
    return _markdown(wide.loc[cells.set_index(ROW).index.unique()].reset_index())


def _markdown(frame: pd.DataFrame) -> str:
    return markdown_table(list(frame.columns), frame.itertuples(index=False, name=None))


def overlay_page(run: Path, folder: Path) -> str | None:
    """Lay a run of a paper's model over the published values; None for any other model."""
    model = run_info(run)["model"]
    if published_name(model) is None:
        return None
    frame = overlay(model, run_table(run, "documents", None))
    if frame is None or frame.empty:
        return None
    frame.to_csv(folder / "overlay.csv", index=False)
    percent, difference = "{:.1f}".format, frame["difference"]
    shown = frame[["table", *ROW, "condition", "ablation", "heads"]].assign(
        condition=frame["condition"].str.replace("_", " "),
        published=frame["published"].map(percent),
        **{
            "this run": frame["accuracy"].map(percent),
            "95 % interval": frame["low"].map(percent) + " to " + frame["high"].map(percent),
        },
        difference=difference.map("{:+.1f}".format),
        inside=frame["inside"].map({True: "yes", False: "no"}),
    )
    return _page(
        "overlay", model=shown_name(model), inside=int(frame["inside"].sum()), count=len(frame),
        low=difference.min(), high=difference.max(), table=_markdown(shown),
    )  # fmt: skip


def notebooks_page(staged: Path, runs: Sequence[Path]) -> str:
    """Link to every notebook as it is kept and as it was executed.

    Expects clean copies in ``staged/notebooks`` and the executed ones where the book shows them.
    """
    shown = {run: shown_stages(run) for run in runs}
    stages = [
        [
            _title(path),
            f"{{download}}`clean <notebooks/{path.name}>`",
            *(
                f"{{download}}`executed <run/{run_slug(run)}/{path.name}>`" * (path in shown[run])
                for run in runs
            ),
        ]
        for path in stage_notebooks()
    ]
    chapters = [
        [_title(path), f"{{download}}`clean <notebooks/{path.name}>`",
         f"{{download}}`executed <{path.name}>`"]
        for path in chapter_notebooks() if (staged / path.name).is_file()
    ]  # fmt: skip
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
    """Say how to cite paper, software, and each run by its ``run.json`` and bundle."""
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
        f"{', '.join(tasks)} ({parameters.get('limit') or 'all'} documents a task)",
        f"demonstration seeds {_parameter(parameters['seeds'])}",
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
    outcome, doubts, figure, runs_here, stages, viewer, about_model.
    """
    run = runs[0]
    info, titles, sizes = run_info(run), run_titles(runs), {run: _size(run) for run in runs}
    name, parameters = _model(run), info["parameters"]
    results = abstract_results(run_table(run, "results", "tasks"))
    documents = run_table(run, "documents", None)
    outcomes = kind_outcomes(documents)
    n_heads, heads = sizes[run][0], _removed(run, outcomes)
    others = {it: kind_outcomes(run_table(it, "documents", None)) for it in runs[1:]}
    said = {
        it: headline(of, heads=_removed(it, of)) for it, of in ({run: outcomes} | others).items()
    }
    (staged / "_static" / "narrow").mkdir(parents=True, exist_ok=True)
    for narrow, file in ((False, "front.png"), (True, "narrow/fig-front.png")):
        figure = accuracy_bars(results, ablations=_FIGURE, n_heads=n_heads, narrow=narrow)
        figure.savefig(staged / "_static" / file, dpi=160)
    left = removal_caption(documents[documents["task"].isin(results["task"])])
    alt = f"{bars_alt(results, ablations=_FIGURE, n_heads=n_heads)} {left}".strip()
    embedded = [name for name in embedded_models() if name in map(_model, runs)]
    return {
        "model": name,
        "model_described": _described(run),
        "size": sizes[run][1],
        "origin": "computed when the book was built" if "imported" not in info else _SHIPPED,
        "answer": _page(
            "answer", title=titles[run], heads=heads, table=_task_table(outcomes),
            results=f"run/{run_slug(run)}/{RESULTS}",
        ),
        "doubts": _page("doubts", doubts=seed_doubts(outcomes, model=name)),
        "figure": _page("figure", **parameters | {"model": name}, alt=alt, heads=heads),
        "outcome": said[run],
        "runs_here": "\n".join(
            f"- [{titles[it]}](run/{run_slug(it)}/{RESULTS}), {sizes[it][1]}. {said[it]}"
            for it in runs
        ),
        "stages": str(len(stage_notebooks())),
        "viewer": f"[attention viewer](run/{run_slug(run)}/{_VIEWER})",
        "about_model": "\n\n".join(
            [_page("real")] * (name not in embedded)
            + [_page("embedded", model=it) for it in embedded]
        ),
    }  # fmt: skip


def _removed(run: Path, outcomes: Sequence[KindOutcome]) -> str:
    return heads_in_words(max(it.fraction for it in outcomes) or 1.0, _size(run)[0])


_COLUMNS = {
    "full": "full model", "induction_heads": "induction heads removed",
    "induction_pattern": "their pattern blocked", "random_heads": "random heads removed",
}  # fmt: skip


def _task_table(outcomes: Sequence[KindOutcome]) -> str:
    """Accuracy of each task under each condition, marked where it is told apart from another."""
    cells: dict[str, dict[str, str]] = {}
    for outcome in outcomes:
        control = f" ({outcome.control})" if outcome.control else ""
        for task in outcome.tasks:
            # Of text there are two sets of labels.
            labels = f"{task.labels} labels, " if outcome.kind.startswith("text") else ""
            name = f"{task_name(task.task)} ({labels}chance {task.chance:.0f})"
            row = cells.setdefault(name, {})
            marks = "\\*" * bool(task.to_full and task.to_full.sign)
            marks += "".join(
                _MARKS[gap.control]
                for gap in task.differences
                if gap.against == "random_heads" and gap.sign < 0
            )
            level = f", {task.level}" if task.level in ("below chance", "one label") else ""
            row[_COLUMNS[outcome.condition] + control] = f"{task.accuracy.mean:.0f}{marks}{level}"
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    rows = [[task, *(row.get(name, "") for name in columns)] for task, row in cells.items()]
    return markdown_table(["accuracy in percent", *columns], rows)


# Marks of a removal that costs distinguishably more than that of a control's heads.
# The paper's has no name in results that were made without a run.
_MARKS = {"": "†", "published": "†", "strict": "‡", "any_layer": "§"}


def _model(run: Path) -> str:
    return shown_name(run_info(run)["model"])


def _size(run: Path) -> tuple[int, str]:
    """Count the model's heads, and word its size; an embedded model's parameters too."""
    scores = json.loads((run / "heads.json").read_text(encoding="utf-8"))["scores"]
    layers, heads, name = len(scores), len(scores[0]), _model(run)
    size = f"{layers} layers of {heads} heads"
    if name in embedded_models():
        with safe_open(embedded_dir() / name / "model.safetensors", "pt") as weights:
            shapes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118
        size += f", {sum(map(math.prod, shapes)) / 1e6:.1f} million parameters"
    return layers * heads, size


def model_card(model: str) -> str:
    """Return the model card of an embedded model as a page of the book."""
    text = (embedded_dir() / model / "README.md").read_text(encoding="utf-8")
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return body.replace(f"# {model}", f"# Model card of {model}", 1).strip()


def drawing() -> str:
    """Draw what an induction head attends to, and the pairs that a knockout blocks, on a prompt.

    Pairs are those of :func:`icl_helpers.induction_pattern` by icl-tiny's tokenizer; the prompt is
    the task's first whose query shares a word's category with a demonstration.
    """
    copied = list("KRT") * 2
    ideal = {
        (at, key + 1): "words"
        for at, key in itertools.product(range(len(copied)), repeat=2)
        if key < at and copied[key] == copied[at]
    }
    tokenizer = load_tokenizer("icl-tiny")
    for prompt in build_prompts("wordseq1_binary", shots=2, seed=42):
        encoded = tokenizer(prompt.context, add_special_tokens=False, return_offsets_mapping=True)
        spans, elements = encoded["offset_mapping"], prompt_elements(prompt.context)
        kinds = {name: elements_pattern(elements, spans, categories=(name,)) for name in CATEGORIES}
        first, query = (
            next(at for at, (_, end) in enumerate(spans) if end > element.start)
            for element in (elements[0], elements[-3])
        )
        if kinds["words"][query].any():
            break
    pairs = {
        (at - first, key - first): next(kind for kind in CATEGORIES if kinds[kind][at, key])
        for at, key in induction_pattern(prompt.context, tokenizer).nonzero().tolist()
    }
    shown = [prompt.context[start:end].strip() or "blank line" for start, end in spans[first:]]
    figures = [(copied, ideal, 0), (shown, pairs, query - first)]
    return _page("drawing", figures=figures, arcs=_arcs, say=_say_pairs)


def _arcs(pairs: Mapping[tuple[int, int], str], loud: int) -> list[dict[str, Any]]:
    """Say where each arc of a drawing runs, and whether it starts in the query (from ``loud``)."""
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
    """Say what a sweep over all causal-LM types of transformers found, as Markdown.

    ``book/_static/architectures.json`` is written by ``tests/sweep_causal_lm_types.py``.
    """
    sweep = json.loads((book_dir() / "_static" / "architectures.json").read_text(encoding="utf-8"))
    rows = []
    for name, kind in sweep["types"].items():
        cached = kind.get("cached", "")
        worst = max(cached.values()) if isinstance(cached, dict) else cached
        parts = [kind.get("hooked"), worst, kind.get("zero_against_projection")]
        shown = [f"{part:.0e}" if isinstance(part, float) else part or "" for part in parts]
        rows.append(
            [f"`{name}`", kind["result"], *shown, kind.get("reason", "").replace("|", ", ")]
        )
    results = Counter(sorted(kind["result"] for kind in sweep["types"].values()))
    counts = ", ".join(f"{count} {result}" for result, count in results.items())
    header = ["type", "result", "hook", "cache", "zero ablation", "why not"]
    versions = ", ".join(f"{name} {version}" for name, version in sweep["versions"].items())
    return (
        f"Of {len(rows)} types: {counts} ({sweep['date']}; {versions}).\n\n"
        f"````{{admonition}} All types\n:class: dropdown\n\n{markdown_table(header, rows)}\n````"
    )


# Tokens per second taken for a recipe that is meant for a smaller GPU than the default's.
_RECIPE_RATES = {"llama-3-8b-4bit.yaml": 900.0}


def recipe_table() -> str:
    """List the ready recipes with their estimates, as a Markdown table for the book.

    Recipes of models whose configuration is not at hand are left out.
    """
    rows = []
    for path in sorted((notebooks_dir() / "parameters").glob("*.yaml")):
        p = stage_parameters(**read_parameters(path))
        if p.model not in PAPER_CONFIGS:
            continue
        cost = estimate_cost(p, tokens_per_second=_RECIPE_RATES.get(path.name))
        rows.append(
            {
                "recipe": f"`{path.name}`",
                "dtype": p.dtype if p.quantization is None else f"{p.quantization}, {p.dtype}",
                "batch size": p.batch_size,
                "documents": "all" if p.limit is None else f"{p.limit} a task",
                "weights": f"{cost.weights_bytes / 1e9:.0f} GB",
                "work": f"{cost.working_bytes / 1e9:.0f} GB",
                "tokens": f"{cost.tokens / 1e6:.0f} million",
                "GPU hours": f"{cost.hours:.1f} at {cost.rate:,.0f} tokens/s",
            }
        )
    return _markdown(pd.DataFrame(rows))


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
    """Say what each stage of a run costs and leaves, as a Markdown table for the book."""
    cost = estimate_cost(p)
    rows = []
    for stage, tokens in {**stage_tokens(p), **cost.closer}.items():
        name, outcome = _OUTCOMES[stage]
        minutes = tokens / cost.rate / 60
        time = "under a minute" if minutes < 1 else f"{minutes:.0f} minutes"
        rows.append((f"{stage}, {name}", f"{tokens / 1e6:.3f} million", time, outcome))
    return markdown_table(["stage", "tokens", "GPU time", "what comes out"], rows)
