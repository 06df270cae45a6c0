"""What came out of a run and of each of its stages, in words: every sentence follows by rule.

A stage's section says, after what is in doubt, what the paper reports, what this model does, which
of the paper's claims hold and where they do not, and how sure that is. What may be said of a
task is decided in :mod:`icl_helpers.results.outcomes`.

Example
-------
>>> run = icl.run_at("runs/icl-tiny")
>>> Markdown(what_came_out(run, 4))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch

from icl_helpers.attention.heads import SCORE_THRESHOLD, Head, heads_in_words, top_heads
from icl_helpers.book.claims import Evidence, judged_lines
from icl_helpers.errors import NotMeasuredError
from icl_helpers.results import tables
from icl_helpers.results.outcomes import (
    KindOutcome,
    Said,
    Span,
    counted,
    headline,
    kind_lines,
    kind_outcomes,
    listed,
    outcome_sentence,
    range_in_words,
    seed_doubts,
    tasks_under,
)
from icl_helpers.results.viewer import PromptView, looks_in_words, query_followers, query_word
from icl_helpers.run.plan import GROUPS
from icl_helpers.tasks.specs import get_task_spec, task_kind, task_name

__all__ = ["in_short", "measured_section", "not_above_chance", "section", "what_came_out"]


class _Parts(NamedTuple):
    """What a stage's section says, one sentence an entry."""

    paper: Sequence[str]
    model: Sequence[str]
    sure: Sequence[str]
    doubts: Sequence[str] = ()


def what_came_out(run: Any, stage: int) -> str:
    """Say what came out of a stage, as Markdown; ``run`` is an :class:`icl_helpers.Run`.

    Which of the paper's claims hold is judged as on the page on them
    (:mod:`icl_helpers.book.claims`), from what the stage has measured.
    """
    parts, evidence = _stage(run, stage)
    # The results sum up the stages on removal and knockout.
    judged = judged_lines(evidence, (4, 5) if stage == 8 else (stage,))
    return section(*parts, judged=judged)


def _stage(run: Any, stage: int) -> tuple[_Parts, Evidence]:
    """Say what a stage's section says, and what its claims are judged by."""
    model = str(run.parameters.model)
    if stage == 1:
        scores = run.prefix_scores()
        evidence = Evidence(scores=scores.mean(0).numpy())
        return score_parts(scores, run.plan.fractions), evidence
    if stage == 2:
        return mean_parts(run.mean_norms(), run.induction_heads()), Evidence()
    if stage == 3:
        documents = _only(run.documents())
        return full_parts(documents), Evidence(documents)
    if stage == 4:
        documents = _only(run.documents(), "mean", "zero")
        return removal_parts(documents, run.n_heads, model), Evidence(documents)
    if stage == 5:
        documents = _only(run.documents(), "mean", "knockout")
        return knockout_parts(documents, run.n_heads, model), Evidence(documents)
    if stage == 6:
        documents = run.documents("nlp_tasks")
        return text_parts(documents, run.n_heads), Evidence(text=documents)
    if stage == 7:
        view = run.first_view()
        return pattern_parts(view), Evidence(followers=run.followers())
    return _result_parts(run), Evidence(run.documents())


def section(
    paper: Sequence[str], model: Sequence[str], sure: Sequence[str], doubted: Sequence[str] = (), *,
    judged: Sequence[str] = (), predictions: Sequence[str] = (),
) -> str:  # fmt: skip
    """Write a section from its sentences; what is in doubt comes first."""
    parts = {
        "Seeds or draws disagree": list(dict.fromkeys(doubted)),
        "What the paper says": paper, "What this model does": model,
        "Predictions": predictions, "Which claims hold": judged, "How sure": sure,
    }  # fmt: skip
    blocks = [
        f"**{title}**\n\n" + "\n".join(f"- {line}" for line in lines)
        for title, lines in parts.items()
        if lines
    ]
    return tables.unsigned_zeros("\n\n".join(blocks))


def measured_section(
    paper: Sequence[str], parts: Sequence[Callable[[], Said]], sure: Sequence[str]
) -> str:
    """Write the section of a stage whose parts were measured one by one.

    A part gives what was found and what became of its predictions. Of an imported run whose bundle
    lacks a part's measurement the section says that in its place.
    """
    said, predictions, missing = [], [], []
    for part in parts:
        try:
            sentences, verdicts = part()
        except NotMeasuredError as error:
            missing.append(str(error))
            continue
        said += sentences
        predictions += verdicts
    return section(paper, said, [*sure, *dict.fromkeys(missing)], predictions=predictions)


def not_above_chance(run: Any, tasks: Sequence[str]) -> list[str]:
    """Say on which of these tasks the full model is not above chance, with the most examples."""
    documents = _both_groups(run)
    full = documents[(documents["condition"] == "full") & documents["task"].isin(list(tasks))]
    low = [
        task_name(it.task)
        for it in tasks_under(_outcomes(full), "full")
        if it.level != "above chance" and it.labels == get_task_spec(it.task).default_labels
    ]
    if not low:
        return []
    return [
        f"With the most examples the full model is not shown to be above chance, in accuracy, on "
        f"{listed(low)}: what removal changes there is no loss of few-shot accuracy."
    ]


def in_short(run: Any) -> str:
    """Say of a whole run what came out, as Markdown: doubts, the headline, and each kind."""
    parts = _result_parts(run)
    return section([], parts.model, [], parts.doubts)


def _published(number: int, conditions: Mapping[str, str]) -> str:
    """Word the paper's changes on Llama-3-8B at the most examples and 3 % of the heads, by kind."""
    said = []
    for condition, name in conditions.items():
        gaps = tables.published_gaps(number, condition).query("model == 'Llama-3-8B'")
        ranges = tables.range_of_gaps(gaps["gap"], _kinds(gaps)).items()
        said.append(f"{name}: {'; '.join(f'{kind} {of}' for kind, of in ranges)} points")
    return (
        f"Llama-3-8B with the most examples, change to the full model with 3 % of the heads "
        f"(Table {number}, published, not measured here). {'. '.join(said)}."
    )


def _kinds(rows: pd.DataFrame) -> pd.Series:
    kinds = [task_kind(*pair) for pair in zip(rows["task"], rows["labels"], strict=True)]
    return pd.Series(kinds, rows.index, dtype=object)


def _published_levels(number: int) -> str:
    """Word the paper's accuracies of the full Llama-3-8B, without and with the most examples."""
    without, most = (
        rows.groupby(_kinds(rows), sort=False)["accuracy"].agg(list)
        for rows in (
            tables.published_rows(number, "full", shots=shots).query("model == 'Llama-3-8B'")
            for shots in ("none", "most")
        )
    )
    said = []
    for kind, accuracies in most.items():
        none = f"{range_in_words(Span.of(without[kind]))} % without, " if kind in without else ""
        said.append(f"{kind} {none}{range_in_words(Span.of(accuracies))} % with the most")
    return (
        f"Llama-3-8B's accuracy without and with examples (Table {number}, published, not measured "
        f"here): {'; '.join(said)}."
    )


def _sure(outcomes: Sequence[KindOutcome], model: str = "") -> list[str]:
    tasks = [task for outcome in outcomes for task in outcome.tasks]
    if not tasks:
        return []
    documents = Span.of([task.documents for task in tasks])
    seeds = max(len(task.by_seed) for task in tasks)
    draws = max(len(task.by_draw) for task in tasks)
    drawn = f" and {counted(draws, 'draw')} of random heads" if draws else ""
    return [
        f"{range_in_words(documents)} documents a task, {counted(seeds, 'demonstration seed')}"
        f"{drawn}. A difference is called distinguishable where the exact paired test, corrected "
        f"for this stage's comparisons, and the interval over documents, seeds and draws both say "
        f"so; that one is missing is said where it is not distinguishable, which is weak evidence.",
        *seed_doubts(outcomes, model=model, disagreements=False),
    ]


def _only(documents: pd.DataFrame, *ablations: str) -> pd.DataFrame:
    return documents[documents["ablation"].isin(["none", *ablations])]


def _outcomes(
    documents: pd.DataFrame, ablation: str = "mean", shots: str = "most"
) -> list[KindOutcome]:
    """Compute outcomes; none where nothing was evaluated."""
    if documents.empty or (shots == "none" and not (documents["shots"] == 0).any()):
        return []
    return kind_outcomes(documents, ablation=ablation, shots=shots)


def _sentences(outcomes: Iterable[KindOutcome], n_heads: int, *conditions: str) -> list[str]:
    return [
        outcome_sentence(it, heads=heads_in_words(it.fraction, n_heads) if it.fraction else "")
        for it in outcomes
        if it.condition in conditions
    ]


def score_parts(scores: torch.Tensor, fractions: Sequence[float]) -> _Parts:
    """Say of stage 1 how many heads do induction, and whether each sequence names the same ones."""
    mean = scores.mean(0)
    total, count = mean.numel(), int((mean >= SCORE_THRESHOLD).sum())
    best = top_heads(mean, 1 / total)[0]
    heads = set(top_heads(mean, max(fractions)))
    same = [len(heads & set(top_heads(sequence, max(fractions)))) for sequence in scores]
    always = same.count(len(heads))
    return _Parts(
        ["About 3 % of the heads of Llama-3-8B score 0.3 or more; the best, layer 15 head 30, has "
         "0.98 (Figure 2)."],
        [f"{heads_in_words(count / total, total) if count else f'None of {total:,} heads'} score "
         f"0.3 or more; the best, "
         f"layer {best.layer} head {best.head}, has {float(mean[best]):.2f}. Removed in the later "
         f"stages: {listed([heads_in_words(f, total) for f in fractions])}."],
        [f"The {len(heads)} heads with the highest mean are also the highest on {always} of "
         f"{len(scores)} sequences taken alone"
         + (f"; at least {min(same)} of them on every one" if always < len(scores) else "") + ". "
         "A score says what a head does on random tokens, not what the model needs it for."],
    )  # fmt: skip


def mean_parts(norms: torch.Tensor, heads: Sequence[Head]) -> _Parts:
    """Say of stage 2 how large the constants are that take the removed heads' places."""
    removed, median = [float(norms[head]) for head in heads], float(norms.median())
    return _Parts(
        ["A removed head gives one fixed vector at each position; no sizes of these vectors are "
         "published."],
        [f"The vectors' norms are {float(norms.min()):.2f} to {float(norms.max()):.2f}, with a "
         f"median of {median:.2f}; those of the {len(heads)} induction heads that are removed are "
         f"{range_in_words(Span.of(removed), 2)}, above the median for "
         f"{sum(norm > median for norm in removed)} of {len(removed)}."],
        ["The means depend on the reference text. What a constant of this size does to accuracy is "
         "measured in the next stages, beside zero ablation, which has none."],
    )  # fmt: skip


def full_parts(documents: pd.DataFrame, number: int = 1) -> _Parts:
    """Say of stage 3 where the full model stands without examples and with the most."""
    some, none = (_outcomes(documents, shots=shots) for shots in ("most", "none"))
    guess = ["Without examples accuracy is about 50 % on the abstract tasks with two labels."]
    return _Parts(
        [_published_levels(number), *(guess if number == 1 else [])],
        _sentences([*none, *some], 0, "full"),
        _sure(some),
        seed_doubts(some),
    )  # fmt: skip


def removal_parts(
    documents: pd.DataFrame, n_heads: int, model: str = "", numbers: Sequence[int] = (1, 4)
) -> _Parts:
    """Say of stages 4 and 6 what removal costs, beside random heads."""
    paper, said, all_outcomes = [], [], []
    names = {"induction_heads": "Induction heads", "random_heads": "Random heads"}
    for number, ablation in zip(numbers, ("mean", "zero"), strict=True):
        share = "3 % of the heads"
        paper.append(_published(number, names).replace(share, f"{share} under {ablation} ablation"))
        some = _outcomes(_only(documents, ablation), ablation)
        said += [f"{ablation.capitalize()} ablation. {line}" for line in
                 _sentences(some, n_heads, *names)]  # fmt: skip
        all_outcomes += some
    return _Parts(paper, said, _sure(all_outcomes), seed_doubts(all_outcomes, model=model))


def knockout_parts(documents: pd.DataFrame, n_heads: int, model: str = "") -> _Parts:
    """Say of stage 5 whether blocking the pattern costs what removing the heads does."""
    names = {"induction_heads": "Heads removed", "induction_pattern": "Pattern blocked"}
    some = _outcomes(documents)
    blocked = tasks_under(some, "induction_pattern")
    shares = [it.zero_shot_answers for it in blocked if it.zero_shot_answers is not None]
    answers = (
        [f"With the pattern blocked, {range_in_words(Span.of(shares))} % of the answers of a "
         f"task are those that the full model gives without examples."] if shares else []
    )  # fmt: skip
    return _Parts(
        [_published(1, names)],
        [*_sentences(some, n_heads, *names), *answers],
        _sure(some),
        seed_doubts(some, model=model),
    )  # fmt: skip


def text_parts(documents: pd.DataFrame, n_heads: int) -> _Parts:
    """Say of stage 6 what the full model and the removal give on text, by kind of labels."""
    if documents.empty:
        return _Parts([], ["No text task was evaluated in this run."], [])
    full = full_parts(_only(documents), number=3)
    removal = removal_parts(_only(documents, "mean", "zero"), n_heads, numbers=(3, 5))
    return _Parts(
        [*full.paper, *removal.paper],
        [*full.model, *removal.model],
        removal.sure,
        [*full.doubts, *removal.doubts],
    )


_FOLLOWERS = {
    "colons": "earlier labels, from the final colon",
    "words": "what followed earlier words of its category, from the query's first word",
}


def pattern_parts(view: PromptView) -> _Parts:
    """Say of stage 7 where the heads look from the last colon and the query's first word."""
    (word, position), last = query_word(view), len(view.spans) - 1
    said = [
        f"From the final colon: {looks_in_words(view, last)}.",
        f"From the end of *{word}*, the query's first word: {looks_in_words(view, position)}.",
    ]
    for category, followers in query_followers(view).items():
        shares, what = [100 * share for share in followers], _FOLLOWERS[category]
        if not shares:
            said.append(f"No number for {what}: the prompt has none.")
            continue
        count = sum(share > 50 for share in shares)
        said.append(
            f"{count} of {len(shares)} heads put more than half of their attention on {what} "
            f"({range_in_words(Span.of(shares))} %)."
        )
    return _Parts(
        ["In Llama-3-8B the best induction head looks from the final colon at the labels, and from "
         "a fruit at the words that followed other fruits (Figures 6 and 7)."],
        said,
        ["One prompt of one task is described, and claims are judged by the few that are shown: "
         "examples, not a measurement."],
    )  # fmt: skip


def _result_parts(run: Any) -> _Parts:
    return result_parts(_both_groups(run), run.n_heads, str(run.parameters.model))


def _both_groups(run: Any) -> pd.DataFrame:
    return pd.concat([run.documents(group) for group in GROUPS], ignore_index=True)


def result_parts(documents: pd.DataFrame, n_heads: int, model: str = "") -> _Parts:
    """Say of stage 8 what the whole run gives, kind by kind."""
    some = _outcomes(_only(documents, "mean", "knockout"))
    heads = heads_in_words(documents["fraction"].max() or 1.0, n_heads)
    names = {"induction_heads": "Induction heads", "induction_pattern": "Pattern blocked",
             "random_heads": "Random heads"}  # fmt: skip
    return _Parts(
        [_published(1, names)],
        [headline(some, heads=heads), *kind_lines(some)],
        _sure(some, model),
        seed_doubts(some, model=model),
    )
