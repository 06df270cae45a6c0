"""What stage 10 measures of a run: part by part, kept as those of stage 9 are.

Example
-------
>>> run = icl.run_at("runs/icl-tiny")
>>> vectors = function_vectors(run)             # [layers, heads]
>>> family_removals(run).groupby(["task", "heads", "chosen_by"])["margin"].mean()
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from icl_helpers.analysis.dose_response import ChosenHeads
from icl_helpers.analysis.function_vectors import function_vector_scores
from icl_helpers.attention.heads import (
    SCORE_THRESHOLD,
    Head,
    doses,
    layer_matched_heads,
    top_heads,
)
from icl_helpers.attention.induction_pattern import (
    control_pattern,
    repeated_token_pattern,
    repeated_word_pattern,
    token_segments,
)
from icl_helpers.attention.interventions import (
    AttentionKnockout,
    MeanAblation,
    ZeroAblation,
    intervene,
)
from icl_helpers.attention.scores import prefix_matching_scores, random_sequences
from icl_helpers.files import file_name
from icl_helpers.models.reference_text import reference_ids, reference_texts
from icl_helpers.run.measured import removals
from icl_helpers.tasks.prompts import (
    Prompt,
    PromptSet,
    build_prompts,
    demonstration_spans,
    prompt_sets,
    resolve_sampling,
    resolve_shots,
    sample_documents,
)

__all__ = [
    "EXCLUDED", "FAMILIES", "PATTERNS", "circuits", "family_removals", "family_sets",
    "function_vectors", "margins", "natural_text", "repair", "token_losses",
]  # fmt: skip

FAMILIES = ("induction", "function vectors")
# Share of the heads, the best of one family, that the other may not have.
EXCLUDED = 0.02
# Demonstrations and documents of each task that function vectors are taken from.
_SHOTS, _PROMPTS = 10, 25
# Tokens of running text, and which of them are early and late; texts.
_TEXT_TOKENS, _EARLY, _LATE, _TEXTS = 400, slice(40, 60), slice(-100, None), 8
# Earlier heads that are removed one by one: those that attend to the token before most.
_EARLIER = 5
# What is blocked in text: an induction pattern of any prompt, by name.
PATTERNS = ("same token", "same word", "same token of another demonstration")
_CONTROL = ", control"


def function_vectors(run: Any) -> Float[torch.Tensor, "layers heads"]:
    """Function-vector score of every head, the mean over the tasks that are looked at closely."""
    found = []
    for prompts in run.plan.analysis_sets():
        task, seed, data = prompts.task, run.parameters.seeds[0], run.plan.data(prompts.task)
        compute = functools.partial(_vectors, run, task, seed, data)
        of = [task, _SHOTS, _PROMPTS, seed, file_name(data)]
        found.append(torch.tensor(run.measurement("function vectors", of, compute)))
    return torch.stack(found).mean(0)


def _vectors(run: Any, task: str, seed: int, data: str) -> list[list[float]]:
    scores = function_vector_scores(
        run.model, run.tokenizer, tasks=[task], shots=_SHOTS, n_prompts=_PROMPTS, seed=seed,
        data=data,
    )  # fmt: skip
    rounded: list[list[float]] = scores.double().round(decimals=6).tolist()
    return rounded


def family_sets(
    prefix: Float[torch.Tensor, "layers heads"],
    vectors: Float[torch.Tensor, "layers heads"],
    counts: Sequence[int],
) -> list[ChosenHeads]:
    """Heads of each family at each number, none of them among the best of the other."""
    found = []
    for family, own, other in zip(FAMILIES, (prefix, vectors), (vectors, prefix), strict=True):
        excluded = set(top_heads(other, EXCLUDED))
        ranked = [head for head in top_heads(own, 1.0) if head not in excluded]
        found += [ChosenHeads(tuple(ranked[:count]), family) for count in counts]
    return found


def _sets(run: Any) -> list[ChosenHeads]:
    counts = doses(len(run.induction_heads()), run.n_heads)
    return [
        ChosenHeads((), "none"),
        *family_sets(run.prefix_scores().mean(0), function_vectors(run), counts),
    ]


def family_removals(run: Any) -> pd.DataFrame:
    """Measure what removing more and more heads of each family costs.

    Columns as of :func:`icl_helpers.run.measured.dose_response`; ``chosen_by`` is a family.
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

    @torch.no_grad()
    def compute(heads: Sequence[Head]) -> list[float]:
        ids = samples()
        edits = [MeanAblation(heads, run.mean_head_outputs())] if heads else []
        with intervene(run.model, *edits):
            logits = run.model(ids.to(run.model.device), use_cache=False).logits
        said = logits[:, :-1].float().log_softmax(-1).cpu()
        losses = -said.gather(-1, ids[:, 1:, None])[..., 0]
        found: list[float] = (losses[:, _EARLY].mean(1) - losses[:, _LATE].mean(1)).tolist()
        return found

    rows = []
    for one in tqdm(_sets(run), desc="loss on text", unit="set", leave=False):
        of = [run.plan.means_parameters(), one.heads, _TEXTS, length]
        values = run.measurement("token losses", of, functools.partial(compute, one.heads))
        rows.append((len(one.heads), one.chosen_by, np.array(values)))
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
    kept = run.measurement("circuits", [heads, _EARLIER], functools.partial(_circuits, run, heads))
    prefix, vectors = run.prefix_scores().mean(0), function_vectors(run)
    alone, composition = torch.tensor(kept["alone"]), torch.tensor(kept["composition"])
    rows = []
    for number, head in enumerate(heads):
        best = int(alone[:, number].argmax())
        group = [Head(*one) for one in kept["previous"] if one[0] < head.layer]
        before = composition[number, : head.layer]
        largest = max((float(before[one]) for one in group), default=0.0)
        rows.append(
            {
                "layer": head.layer, "head": head.head, "prefix": float(prefix[head]),
                "vector": float(vectors[head]), "copying": kept["copying"][number],
                "logit": kept["logit"][number], "earlier": str(Head(*kept["earlier"][best])),
                "alone": float(alone[best, number]), "together": kept["together"][number],
                "control": kept["control"][number], "n": len(group), "composition": largest,
                "rank": int((before > largest).sum()) + 1, "of": before.numel(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _circuits(run: Any, heads: Sequence[Head]) -> dict[str, Any]:
    model, sequences = run.model, random_sequences(run.tokenizer)
    scores = previous_token_scores(model, sequences)
    earlier = top_heads(scores, 1.0)[:_EARLIER]
    last = max(head.layer for head in heads)
    previous = [h for h in top_heads(scores, 1.0) if scores[h] >= SCORE_THRESHOLD]
    previous = [h for h in previous if h.layer < last and h not in heads]
    n_layers, n_heads = scores.shape
    others, _ = layer_matched_heads(previous, n_heads, n_layers, seed=0, exclude=previous + heads)
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
        (of,) = prompt_sets(task, "semantic", most, p.seeds[:1], run.plan.data(task), rule)
        for name in ("none", *(f"{one}{of_}" for one in PATTERNS for of_ in ("", _CONTROL))):
            kept = run.measurement(
                "natural text", [name, *_decided(run, of), heads],
                functools.partial(_blocked_margins, run, of, heads, name),
            )  # fmt: skip
            margins = np.array(kept["margins"], dtype=np.float64)
            rows.append(
                {
                    "task": task, "pattern": name, "pairs": kept["pairs"],
                    "accuracy": 100 * np.mean(margins > 0), "margins": margins,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _decided(run: Any, prompts: PromptSet) -> list[Any]:
    values = prompts._replace(data=file_name(prompts.data) or "")
    return [*values, run.parameters.analysis_limit, run.parameters.sampling]


@functools.lru_cache(maxsize=8)
def _prompts(of: PromptSet, limit: int, sampling: str | None) -> list[Prompt]:
    prompts = build_prompts(
        of.task, shots=of.shots, seed=of.seeds[0], labels=of.labels, data=of.data,
        demonstrations=of.demonstrations,
    )  # fmt: skip
    targets = [prompt.target for prompt in prompts]
    way = resolve_sampling(of.task, of.data, sampling)
    return [prompts[place] for place in sample_documents(targets, limit, sampling=way)]


def _prompts_of(run: Any, of: PromptSet) -> list[Prompt]:
    return _prompts(of, run.parameters.analysis_limit, run.parameters.sampling)


def _blocked_margins(run: Any, of: PromptSet, heads: Sequence[Head], name: str) -> dict[str, Any]:
    prompts = _prompts_of(run, of)
    if name == "none":
        return {"margins": margins(run, prompts, lambda _: nullcontext()), "pairs": 0.0}
    blocked = [_pattern(run, prompt, name.removesuffix(_CONTROL)) for prompt in prompts]
    if name.endswith(_CONTROL):
        blocked = [control_pattern(one, seed=number) for number, one in enumerate(blocked)]
    found = margins(
        run, prompts, lambda n: intervene(run.model, AttentionKnockout(heads, blocked[n]))
    )
    return {"margins": found, "pairs": float(np.mean([int(one.sum()) for one in blocked]))}


def _pattern(run: Any, prompt: Prompt, name: str) -> torch.Tensor:
    if name == "same word":
        return repeated_word_pattern(prompt.context, run.tokenizer)
    ids = run.tokenizer(prompt.context, add_special_tokens=False).input_ids
    if name == "same token":
        return repeated_token_pattern(torch.tensor(ids))
    spans = demonstration_spans(prompt)
    segments = token_segments(prompt.context, run.tokenizer, spans)
    return repeated_token_pattern(torch.tensor(ids), segments=segments)


def margins(
    run: Any, prompts: Sequence[Prompt], under: Callable[[int], AbstractContextManager[Any]]
) -> list[float]:
    """Margin of each prompt's right label in nats, each prompt in a context of its own."""
    lm, found = run.scorer(), []
    for number, prompt in enumerate(prompts):
        with under(number):
            # One label at a time: a row is then one sequence, whatever it is run under.
            scores = [
                lm._loglikelihood_tokens(lm.encode([(prompt.context, choice)]), disable_tqdm=True)
                for choice in prompt.choices
            ]
        values = [score[0][0] for score in scores]
        right = values.pop(prompt.target)
        found.append(round(right - max(values), 5))
    return found


def repair(run: Any) -> pd.DataFrame:
    """Measure the removal's direct effect, with later layers as they were, beside its total one.

    A row a task: ``direct`` and ``total``, margins lost by each document, in nats, when the run's
    induction heads give their means.
    """
    heads = run.induction_heads()

    def compute(of: PromptSet) -> dict[str, list[float]]:
        prompts, removal = _prompts_of(run, of), MeanAblation(heads, run.mean_head_outputs())
        total = margins(run, prompts, lambda _: intervene(run.model, removal))
        with direct_removal(run.model, removal):
            direct = margins(run, prompts, lambda _: nullcontext())
        whole = margins(run, prompts, lambda _: nullcontext())
        return {"whole": whole, "direct": direct, "total": total}

    rows = []
    for of in tqdm(run.plan.analysis_sets(), desc="direct effects", unit="task", leave=False):
        decided = [*_decided(run, of), run.plan.means_parameters(), heads]
        kept = run.measurement("direct effects", decided, functools.partial(compute, of))
        whole, direct, total = (np.array(kept[name]) for name in ("whole", "direct", "total"))
        rows.append({"task": of.task, "direct": whole - direct, "total": whole - total})
    return pd.DataFrame(rows)
