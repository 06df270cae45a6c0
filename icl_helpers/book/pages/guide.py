"""What the pages on one's own model say of models, recipes and costs."""

from __future__ import annotations

import json
import re
from collections import Counter

from icl_helpers.files import book_dir, embedded_dir, notebooks_dir
from icl_helpers.parameters import StageParameters, read_parameters, stage_parameters
from icl_helpers.results.tables import markdown_table
from icl_helpers.run.costs import PAPER_CONFIGS, estimate_cost, stage_tokens

__all__ = ["architecture_table", "model_card", "recipe_table", "stage_table"]


def model_card(model: str) -> str:
    """Return the model card of an embedded model as a page of the book."""
    text = (embedded_dir() / model / "README.md").read_text(encoding="utf-8")
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return body.replace(f"# {model}", f"# Model card of {model}", 1).strip()


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
        rows.append({
            "recipe": f"`{path.name}`",
            "dtype": p.dtype if p.quantization is None else f"{p.quantization}, {p.dtype}",
            "batch size": p.batch_size,
            "documents": "all" if p.limit is None else f"{p.limit} a task",
            "weights": f"{cost.weights_bytes / 1e9:.0f} GB",
            "work": f"{cost.working_bytes / 1e9:.0f} GB",
            "tokens": f"{cost.tokens / 1e6:.0f} million",
            "GPU hours": f"{cost.hours:.1f} at {cost.rate:,.0f} tokens/s",
        })  # fmt: skip
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows])


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
