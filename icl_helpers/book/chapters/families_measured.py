"""What stage 10 measures of a run, kept part by part as in stage 9, and what came out.

Example
-------
>>> run = icl.run_at("runs/icl-tiny")
>>> vectors = function_vectors(run)             # [layers, heads]
>>> Markdown(what_came_out(run))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from tqdm import tqdm

from icl_helpers.analysis.circuits import (
    causal_composition,
    composition_scores,
    copying_scores,
    direct_logit_effects,
    direct_removal,
    previous_token_scores,
)
from icl_helpers.analysis.dose_response import ChosenHeads, judged
from icl_helpers.analysis.function_vectors import function_vector_scores
from icl_helpers.analysis.measured import analysis_group, analysis_groups, prompts_of, removals
from icl_helpers.analysis.removals import score_prompts, sequence_losses
from icl_helpers.attention.heads import SCORE_THRESHOLD, Head, doses, layer_matched_heads, top_heads
from icl_helpers.attention.induction_pattern import (
    control_pattern,
    repeated_token_pattern,
    repeated_word_pattern,
    token_segments,
)
from icl_helpers.attention.interventions import (
    AttentionKnockout,
    Intervention,
    MeanAblation,
    ZeroAblation,
    intervene,
)
from icl_helpers.attention.scores import prefix_matching_scores, random_sequences
from icl_helpers.book.came_out import measured_section, not_above_chance
from icl_helpers.book.chapters import families
from icl_helpers.book.chapters.families import CONTROL, EXCLUDED, FAMILIES, PATTERNS
from icl_helpers.evaluation.cells import CellGroup
from icl_helpers.files import file_name
from icl_helpers.models.reference_text import reference_ids, reference_texts
from icl_helpers.tasks.prompts import Prompt, demonstration_spans, prompt_sets, resolve_shots

__all__ = [
    "circuits", "family_removals", "family_sets", "function_vectors", "natural_text", "repair",
    "token_losses", "what_came_out",
]  # fmt: skip

# Demonstrations and documents of each task that function vectors are taken from.
_SHOTS, _PROMPTS = 10, 25
# Tokens of running text, and which of them are early and late; texts.
_TEXT_TOKENS, _EARLY, _LATE, _TEXTS = 400, slice(40, 60), slice(-100, None), 8
# Earlier heads that are removed one by one: those that attend to the token before most.
_EARLIER = 5


def function_vectors(run: Any) -> Float[torch.Tensor, "layers heads"]:
    """Measure every head's function-vector score, the mean over the tasks looked at closely."""
    seed = run.parameters.seeds[0]

    def compute(task: str) -> Any:
        scores = function_vector_scores(
            run.model, run.tokenizer, tasks=[task], shots=_SHOTS, n_prompts=_PROMPTS, seed=seed,
            data=run.plan.data(task),
        )  # fmt: skip
        return scores.double().round(decimals=6).tolist()

    scores = []
    for task in (prompts.task for prompts in run.plan.analysis_sets()):
        of = [task, _SHOTS, _PROMPTS, seed, file_name(run.plan.data(task))]
        values = run.measurement("function vectors", of, compute, task)
        scores.append(torch.tensor(values))
    return torch.stack(scores).mean(0)


def family_sets(
    prefix: Float[torch.Tensor, "layers heads"],
    vectors: Float[torch.Tensor, "layers heads"],
    counts: Sequence[int],
) -> list[ChosenHeads]:
    """Select heads of each family at each number, none of them among the best of the other."""
    sets = []
    for family, scores, other in zip(FAMILIES, (prefix, vectors), (vectors, prefix), strict=True):
        excluded = set(top_heads(other, EXCLUDED))
        ranked = [head for head in top_heads(scores, 1.0) if head not in excluded]
        sets += [ChosenHeads(tuple(ranked[:count]), family) for count in counts]
    return sets


def _kept(run: Any) -> list[Head]:
    """Induction heads of the run that are among the best of the other family."""
    best = top_heads(function_vectors(run), EXCLUDED)
    return [head for head in run.induction_heads() if head in best]


def _sets(run: Any) -> list[ChosenHeads]:
    counts = doses(len(run.induction_heads()), run.n_heads)
    return [
        ChosenHeads((), "none"),
        *family_sets(run.prefix_scores().mean(0), function_vectors(run), counts),
    ]


def family_removals(run: Any) -> pd.DataFrame:
    """Measure what removing more and more heads of each family costs.

    Columns as of :func:`icl_helpers.analysis.measured.dose_response`; ``chosen_by`` is a family.
    """
    return removals(run, "two families", _sets(run))


def token_losses(run: Any) -> pd.DataFrame:
    """Measure how much better late tokens of a text are predicted than early ones, per set.

    Columns: heads (how many), chosen_by, and ``values``, the difference of each text in nats: mean
    loss of tokens 40 to 60 less that of the last hundred of 400, or of what the context holds.
    """
    p = run.parameters
    length = min(_TEXT_TOKENS, run.identity["context"], p.positions or _TEXT_TOKENS)

    @functools.cache
    def samples() -> torch.Tensor:
        texts = reference_texts(p.model, reference=p.reference)
        return reference_ids(run.tokenizer, texts, n_samples=_TEXTS, n_positions=length)

    def compute(heads: Sequence[Head]) -> Any:
        edits = [MeanAblation(heads, run.mean_head_outputs())] if heads else []
        losses = sequence_losses(run.model, samples(), edits)
        return (losses[:, _EARLY].mean(1) - losses[:, _LATE].mean(1)).tolist()

    rows = []
    for removed in tqdm(_sets(run), desc="loss on text", unit="set", leave=False):
        of = [run.plan.means_parameters(), removed.heads, _TEXTS, length]
        values = run.measurement("token losses", of, compute, removed.heads)
        rows.append((len(removed.heads), removed.chosen_by, np.array(values)))
    return pd.DataFrame(rows, columns=["heads", "chosen_by", "values"])


def circuits(run: Any) -> pd.DataFrame:
    """Measure what each induction head of the run does in a circuit, a row a head, best first.

    Columns: layer, head, ``prefix`` (its prefix-matching score), ``vector`` (function-vector
    score), ``copying``, ``logit`` (direct logit effect on repeats), and how far its prefix score
    falls: ``alone`` without the one earlier head, ``earlier``, whose removal lowers it most of the
    five that attend to the token before most; ``together`` without all earlier heads that attend to
    the token before (score of 0.3 or more, ``n`` of them), and ``control`` without as many others
    of the same layers. ``composition`` is the largest K-composition from weights with one of those
    heads, at ``rank`` among all ``of`` earlier heads.
    """
    heads = run.induction_heads()
    values = run.measurement("circuits", [heads, _EARLIER], _circuits, run, heads)
    prefix, vectors = run.prefix_scores().mean(0), function_vectors(run)
    alone, composition = torch.tensor(values["alone"]), torch.tensor(values["composition"])
    rows = []
    for number, head in enumerate(heads):
        best = int(alone[:, number].argmax())
        group = [tuple(other) for other in values["previous"] if other[0] < head.layer]
        before = composition[number, : head.layer]
        largest = max((float(before[other]) for other in group), default=0.0)
        rows.append(
            {
                **head._asdict(), "prefix": float(prefix[head]), "vector": float(vectors[head]),
                "copying": values["copying"][number], "logit": values["logit"][number],
                "earlier": str(Head(*values["earlier"][best])), "alone": float(alone[best, number]),
                "together": values["together"][number], "control": values["control"][number],
                "n": len(group), "composition": largest,
                "rank": int((before > largest).sum()) + 1, "of": before.numel(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _circuits(run: Any, heads: Sequence[Head]) -> dict[str, Any]:
    model, sequences = run.model, random_sequences(run.tokenizer)
    scores = previous_token_scores(model, sequences)
    earlier = top_heads(scores, 1.0)[:_EARLIER]
    last = max(head.layer for head in heads)
    previous = [
        head
        for head in top_heads(scores, 1.0)
        if scores[head] >= SCORE_THRESHOLD and head.layer < last and head not in heads
    ]
    others, _ = layer_matched_heads(
        previous, scores.shape[1], len(scores), seed=0, exclude=[*previous, *heads]
    )
    whole = run.prefix_scores().mean(0)
    at = [head.layer for head in heads], [head.head for head in heads]

    def fall(removed: Sequence[Head]) -> torch.Tensor:
        with intervene(model, ZeroAblation(removed)):
            return (whole - prefix_matching_scores(model, sequences).mean(0))[at]

    values = {
        "alone": causal_composition(model, sequences, earlier)[:, at[0], at[1]],
        "together": fall(previous), "control": fall(others),
        "composition": composition_scores(model)[:, :, at[0], at[1]].permute(2, 0, 1),
        "copying": copying_scores(model)[at],
        "logit": direct_logit_effects(model, sequences)[at],
    }  # fmt: skip
    rounded = {name: value.double().round(decimals=5).tolist() for name, value in values.items()}
    return {**rounded, "earlier": earlier, "previous": previous}


def natural_text(run: Any) -> pd.DataFrame:
    """Measure what blocking an induction pattern of any text costs on the text tasks.

    Columns: task, ``pattern`` (of :data:`PATTERNS`, each also as ``..., control`` with as many
    other earlier positions, or ``none``), ``pairs`` blocked in a prompt in the mean, accuracy
    (percent) and ``margins`` of the documents in nats.
    """
    p, heads = run.parameters, run.induction_heads()
    rows = []
    for task in tqdm(run.plan.tasks("nlp_tasks"), desc="text", unit="task", leave=False):
        most, rule = [max(resolve_shots(task, p.shots))], cast(Any, p.demonstrations)
        (prompts,) = prompt_sets(
            task, "semantic", most, p.seeds[:1], run.plan.data(task), rule, run.plan.sampling(task)
        )
        group = analysis_group(run, prompts)
        for name in ("none", *(kind + end for kind in PATTERNS for end in ("", CONTROL))):
            of = [name, group.spec(), group.seed, heads]
            blocked = run.measurement("natural text", of, _blocked_margins, run, group, heads, name)
            margins = np.array(blocked["margins"], dtype=np.float64)
            rows.append((task, name, blocked["pairs"], 100 * np.mean(margins > 0), margins))
    return pd.DataFrame(rows, columns=["task", "pattern", "pairs", "accuracy", "margins"])


def _blocked_margins(
    run: Any, group: CellGroup, heads: Sequence[Head], name: str
) -> dict[str, Any]:
    prompts = prompts_of(group)
    if name == "none":
        return {"margins": _margins(run, prompts, lambda _: []), "pairs": 0.0}
    patterns = [_pattern(run, prompt, name.removesuffix(CONTROL)) for prompt in prompts]
    if name.endswith(CONTROL):
        patterns = [control_pattern(each, seed=number) for number, each in enumerate(patterns)]
    margins = _margins(run, prompts, lambda number: [AttentionKnockout(heads, patterns[number])])
    return {"margins": margins, "pairs": float(np.mean([int(each.sum()) for each in patterns]))}


def _pattern(run: Any, prompt: Prompt, name: str) -> torch.Tensor:
    if name == "same word":
        return repeated_word_pattern(prompt.context, run.tokenizer)
    ids = torch.tensor(run.tokenizer(prompt.context, add_special_tokens=False).input_ids)
    if name == "same token":
        return repeated_token_pattern(ids)
    segments = token_segments(prompt.context, run.tokenizer, demonstration_spans(prompt))
    return repeated_token_pattern(ids, segments=segments)


def _margins(
    run: Any, prompts: Sequence[Prompt], edits: Callable[[int], Sequence[Intervention]]
) -> list[float | None]:
    scores = score_prompts(run.model, run.tokenizer, prompts, edits)
    return judged(scores, [prompt.target for prompt in prompts]).margins


def repair(run: Any) -> pd.DataFrame:
    """Measure the removal's direct effect, with later layers as they were, beside its total one.

    A row a task: ``direct`` and ``total``, margins lost by each document, in nats, when the run's
    induction heads give their means.
    """
    heads = run.induction_heads()

    def compute(group: CellGroup) -> dict[str, list[float | None]]:
        prompts, removal = prompts_of(group), MeanAblation(heads, run.mean_head_outputs())
        total = _margins(run, prompts, lambda _: [removal])
        with direct_removal(run.model, removal):
            direct = _margins(run, prompts, lambda _: [])
        whole = _margins(run, prompts, lambda _: [])
        return {"whole": whole, "direct": direct, "total": total}

    rows = []
    for group in tqdm(analysis_groups(run), desc="direct effects", unit="task", leave=False):
        decided = [group.spec(), group.seed, run.plan.means_parameters(), heads]
        margins = run.measurement("direct effects", decided, compute, group)
        whole, *left = (np.array(margins[name], float) for name in ("whole", "direct", "total"))
        rows.append((group.task, *(whole - each for each in left)))
    return pd.DataFrame(rows, columns=["task", "direct", "total"])


_PAPER = [
    "The paper ranks heads by prefix matching alone, and names two limits: no check of the heads' "
    "mechanism, and no knockout on natural text.",
    "Yin & Steinhardt (arXiv 2502.14010) report of twelve models that few-shot accuracy depends "
    "primarily on function-vector heads, and that the two families are largely distinct.",
]


def what_came_out(run: Any) -> str:
    """Say what came out of the stage, as Markdown; ``run`` is an :class:`icl_helpers.Run`.

    Of an imported run whose bundle lacks a measurement it says that in its place.
    """
    removed = len(run.induction_heads())
    parts = [
        lambda: families.overlap_said(
            families.overlap_table(
                run.prefix_scores().mean(0), function_vectors(run), run.plan.fractions
            )
        ),
        lambda: families.family_said(
            families.family_table(family_removals(run)), removed, _kept(run)
        ),
        lambda: families.loss_said(families.loss_table(token_losses(run)), removed),
        lambda: families.circuit_said(families.circuit_table(circuits(run), run.n_heads)),
        lambda: families.text_said(families.text_table(natural_text(run))),
        lambda: families.repair_said(families.repair_table(repair(run))),
    ]
    tasks = [prompts.task for prompts in run.plan.analysis_sets()]
    sure = [
        *not_above_chance(run, [*tasks, *run.plan.tasks("nlp_tasks")]),
        f"At most {run.parameters.analysis_limit} documents a task and one demonstration seed: "
        f"intervals are over documents (or texts) alone. In the comparison of families the best "
        f"{100 * EXCLUDED:.0f} % of either are kept out of the other.",
        "Weights show what a head could do: content alone, without positions, and without the MLPs "
        "between. A head that fails one of these tests may still do induction in another way.",
    ]
    return measured_section(_PAPER, parts, sure)
