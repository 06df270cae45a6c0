"""What a model is evaluated under: the full model, or heads removed or blocked.

Example
-------
>>> scores = icl.prefix_matching_scores(model, icl.random_sequences(tokenizer)).mean(0)
>>> icl.conditions(scores, fractions=(0.01, 0.03), ablations=("zero", "knockout"))
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float

from icl_helpers.attention.heads import (
    CONTROLS,
    Head,
    any_layer_heads,
    check_fraction,
    layer_matched_heads,
    random_heads,
    top_heads,
)
from icl_helpers.attention.induction_pattern import CATEGORIES, check_categories
from icl_helpers.attention.interventions import (
    AttentionKnockout,
    Intervention,
    MeanAblation,
    ZeroAblation,
)
from icl_helpers.errors import InputError

__all__ = [
    "ABLATIONS", "CATEGORIES", "FULL", "PAPER_ABLATION_SEEDS", "Condition", "conditions",
    "drawn_again",
]  # fmt: skip

ABLATIONS = ("mean", "zero", "knockout")
PAPER_ABLATION_SEEDS = (42, 43, 44)

ConditionName = Literal["full", "induction_heads", "random_heads", "induction_pattern"]


@dataclass(frozen=True, eq=False)
class Condition:
    """One column of the paper's tables (paper, sections 3 to 5).

    ``name`` is full, induction_heads, random_heads or induction_pattern; ``ablation`` is none,
    mean, zero or knockout. ``categories`` matter to knockout only; ``ablation_seed`` and
    ``control``, how they were drawn, to random heads only. ``borrowed`` lists random heads taken
    from neighbouring layers. ``means_key`` stands for the means in the identity where
    ``head_outputs`` is only a part of them.
    """

    name: ConditionName
    ablation: Literal["none", "mean", "zero", "knockout"] = "none"
    fraction: float = 0.0
    ablation_seed: int | None = None
    heads: tuple[Head, ...] = ()
    head_outputs: Float[torch.Tensor, "layers positions heads d_head"] | None = field(
        default=None, repr=False
    )
    categories: tuple[str, ...] = CATEGORIES
    borrowed: tuple[Head, ...] = ()
    control: str = ""
    means_key: str | None = None

    @classmethod
    def of_spec(cls, spec: Mapping[str, Any], means: torch.Tensor | None = None) -> Condition:
        """The condition of a finished cell, whose spec holds :meth:`identity`."""
        values = {f.name: spec[f.name] for f in fields(cls) if f.name in spec}
        values |= {"name": spec["condition"], "heads": tuple(Head(*h) for h in spec["heads"])}
        if "categories" in values:
            values["categories"] = tuple(values["categories"])
        return cls(**values, head_outputs=means, means_key=spec.get("means"))

    @property
    def row(self) -> tuple[Any, ...]:
        """What tells its rows in the results from those of others."""
        return self.name, self.ablation, self.fraction, self.control, self.ablation_seed

    def interventions(self, blocked: torch.Tensor | None = None) -> list[Intervention]:
        """Interventions for one batch; knockout needs ``blocked`` [batch, query, key]."""
        if self.ablation == "none":
            return []
        if self.ablation == "zero":
            return [ZeroAblation(self.heads)]
        if self.ablation == "mean":
            if self.head_outputs is None:
                raise InputError("mean ablation needs head_outputs; see mean_head_outputs()")
            return [MeanAblation(self.heads, self.head_outputs)]
        if blocked is None:
            raise InputError("attention knockout needs the blocked pairs of the batch")
        return [AttentionKnockout(self.heads, blocked)]

    def identity(self) -> dict[str, Any]:
        """Everything about the condition that decides a result, as JSON values."""
        identity: dict[str, Any] = {
            "condition": self.name,
            "ablation": self.ablation,
            "fraction": self.fraction,
            "ablation_seed": self.ablation_seed,
            "heads": sorted([head.layer, head.head] for head in self.heads),
        }
        if self.control:
            identity["control"] = self.control
        if self.ablation == "knockout":
            identity["categories"] = sorted(self.categories)
        if self.ablation == "mean" and self.means_key is not None:
            identity["means"] = self.means_key
        elif self.ablation == "mean" and self.head_outputs is not None:
            means = torch.stack([self.head_outputs[h.layer, :, h.head] for h in self.heads])
            raw = means.float().contiguous().cpu().numpy().tobytes()
            identity["means"] = hashlib.sha256(raw).hexdigest()[:16]
        return identity


FULL = Condition("full")


def conditions(
    scores: Float[torch.Tensor, "layers heads"],
    *,
    fractions: Sequence[float] = (0.01, 0.03),
    ablations: Sequence[str] = ("mean", "knockout"),
    head_outputs: Float[torch.Tensor, "layers positions heads d_head"] | None = None,
    ablation_seeds: Sequence[int] = PAPER_ABLATION_SEEDS,
    control: str | Sequence[str] = "published",
    categories: Sequence[str] = CATEGORIES,
    full: bool = True,
) -> list[Condition]:
    """All conditions of the paper's tables for these ablations and fractions.

    Parameters
    ----------
    scores
        Prefix-matching scores averaged over the sequences.
    ablations
        Any of ``mean``, ``zero`` (induction heads and random heads) and ``knockout`` (induction
        pattern).
    control
        ``published``: random heads may be induction heads again; ``strict``: they may not, and
        where a layer has too few others they come from the nearest layers (paper, section 3).
        ``any_layer``: heads of any layer but the last, as the paper's appendix A.5 has it for the
        zero ablation. Several are drawn side by side.
    categories
        What a knockout blocks; see :func:`icl_helpers.induction_pattern` (paper, section 5).
    full
        Put the full model first.
    """
    controls = dict.fromkeys([control] if isinstance(control, str) else control)
    for fraction in fractions:
        check_fraction(fraction)
    for ablation in ablations:
        if ablation not in ABLATIONS:
            raise InputError(f"ablations must be among {', '.join(ABLATIONS)}, got {ablation!r}")
    check_categories(categories)
    for seed in ablation_seeds:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InputError(f"ablation_seeds must be whole numbers, got {seed!r}")
    for way in controls:
        if way not in CONTROLS:
            raise InputError(f"control must be one of {', '.join(CONTROLS)}, got {way!r}")
    if "mean" in ablations and head_outputs is None:
        raise InputError(
            "mean ablation needs head_outputs: compute them with mean_head_outputs(model, "
            "reference_ids(...)), or leave 'mean' out of ablations"
        )
    built = [FULL] if full else []
    for ablation, fraction in itertools.product(dict.fromkeys(ablations), dict.fromkeys(fractions)):
        induction = tuple(top_heads(scores, fraction))
        kind: Any = ablation
        of_kind = functools.partial(Condition, ablation=kind, fraction=fraction)
        if ablation == "knockout":
            of = tuple(categories)
            built.append(of_kind("induction_pattern", heads=induction, categories=of))
            continue
        means = head_outputs if ablation == "mean" else None
        built.append(of_kind("induction_heads", heads=induction, head_outputs=means))
        for way, seed in itertools.product(controls, dict.fromkeys(ablation_seeds)):
            drawn, borrowed = _control(induction, scores, seed, way)
            random: Any = {"heads": tuple(drawn), "borrowed": tuple(borrowed), "control": way}
            built.append(of_kind("random_heads", ablation_seed=seed, head_outputs=means, **random))
    return built


def _control(
    induction: tuple[Head, ...], scores: torch.Tensor, seed: int, control: str
) -> tuple[list[Head], list[Head]]:
    n_layers, n_heads = scores.shape
    if control == "any_layer":
        return any_layer_heads(len(induction), n_layers, n_heads, seed=seed), []
    if control == "published":
        return random_heads(induction, n_heads, seed=seed), []
    return layer_matched_heads(induction, n_heads, n_layers, seed=seed, exclude=induction)


def drawn_again(frame: pd.DataFrame, scores: Float[torch.Tensor, "layers heads"]) -> pd.Series:
    """Count each row's random heads that are induction heads; missing for what is no draw."""
    keys = ["condition", "fraction", "control", "ablation_seed"]

    @functools.cache
    def count(name: str, fraction: float, control: str, seed: Any) -> Any:
        if name != "random_heads" or control not in CONTROLS or pd.isna(seed):
            return pd.NA
        induction = tuple(top_heads(scores, fraction))
        return len(set(_control(induction, scores, int(seed), control)[0]) & set(induction))

    counts = [count(*key) for key in frame[keys].itertuples(index=False, name=None)]
    return pd.Series(counts, index=frame.index, dtype="Int64")
