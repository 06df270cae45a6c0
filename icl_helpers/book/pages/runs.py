"""Pages about the runs: what they say is computed, never typed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from icl_helpers.book.claims import VERDICTS, Evidence, claims
from icl_helpers.book.pages.names import (
    chapter_notebooks,
    filled_page,
    model_of,
    run_slug,
    run_titles,
    shown_stages,
    stage_pages,
)
from icl_helpers.evaluation.store import ROW
from icl_helpers.files import SMOLLM2, book_dir, imported_dir, project_root, stage_notebooks
from icl_helpers.models.reference_text import PAPER_POSITIONS
from icl_helpers.results.comparison import compare_runs, overlay, published_name
from icl_helpers.results.outcomes import listed
from icl_helpers.results.tables import markdown_table
from icl_helpers.run.costs import stage_tokens
from icl_helpers.run.plan import GROUPS, Plan, run_heads, run_info, run_table, shown_name
from icl_helpers.tasks.specs import task_name

__all__ = [
    "citation_page", "claims_page", "comparison_page", "notebooks_page", "overlay_page",
    "report_page", "runs_page", "verification_page",
]  # fmt: skip

_FACTS = (
    "model", "model_type", "dtype", "device", "machine", "python", "fingerprint", "updated",
)  # fmt: skip
_CHOICES = ("ablation_seeds", "control", "average", "data", "quantization")
# What decides whether the paper's finding holds, by the names of the claims.
_CENTRAL = ("three-percent", "random-control", "strict-control", "knockout")


def claims_page(runs: Sequence[Path]) -> tuple[str, str]:
    """Judge every claim by each run; and say in short what the first run makes of them."""
    titles = run_titles(runs)
    evidence = {run: Evidence.of_run(run) for run in runs}
    sizes = {run: evidence[run].size for run in runs}
    stages = {run: stage_pages(run) for run in runs}
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
    page = filled_page(
        "claims", judged=judged, runs=runs, titles=titles, counts=counts, stages=stages,
        sizes=sizes, slugs={run: run_slug(run) for run in runs},
        table=markdown_table(["claim", *titles.values()], rows),
    )  # fmt: skip
    first = [(claim, findings[runs[0]]) for claim, findings in judged]
    central = [(claim, finding) for claim, finding in first if claim.name in _CENTRAL]
    return page, filled_page(
        "in_short", title=titles[runs[0]], size=sizes[runs[0]], central=central,
        number=len(judged), counts=counts[runs[0]], closer=_predictions(runs[0]),
        page=f"run/{run_slug(runs[0])}/{stages[runs[0]].get(9)}",
    )  # fmt: skip


def _predictions(run: Path) -> list[str]:
    """Quote from a run's stage 9 what became of its predictions on the highest scores."""
    path = run / "notebooks" / "09_which_heads.ipynb"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    claims = r"(?:Without the (?:\d+ )?highest|A head with a higher)"
    quoted = re.findall(rf'"- \*{claims}(?:[^"\\]|\\.)*"', text)
    return [json.loads(line).strip() for line in quoted]


def report_page(runs: Sequence[Path], verdicts: str) -> str:
    """Report on one page: scope, method, cost, and where each claim is computed."""
    infos, titles = {run: run_info(run) for run in runs}, run_titles(runs)
    tokens = {run: stage_tokens(Plan.of_run(info).parameters) for run, info in infos.items()}
    pages = {run: stage_pages(run) for run in runs}
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
    return filled_page(
        "report", models=listed(list(titles.values())), verdicts=verdicts, rows=rows, infos=infos,
        titles=titles, tokens=tokens, title=titles[runs[0]],
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
        reports.append({**report, "title": title, "bundle": bundle})
    return filled_page("verification", runs=reports) if reports else None


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
    return filled_page(
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
        "drawn": list({plan.sampling(task) for task in shots}),
        "instruct": model_of(run) == SMOLLM2,
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
        {run.name: (model_of(run), run_table(run, "results", None), run_heads(run)) for run in runs}
    )
    frame.to_csv(folder / "comparison.csv", index=False)
    shown = frame[
        frame["share"].isin(["", "larger"]) & frame["ablation"].isin(["none", "mean", "knockout"])
    ]
    tables = {
        " ".join(filter(None, key)): _pivot(rows, runs)
        for key, rows in shown.groupby(["condition", "control"], sort=False)
    }
    return filled_page("comparison", tables=tables)


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
    return filled_page(
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
    return filled_page(
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
    return filled_page(
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
