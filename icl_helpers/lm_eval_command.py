"""lm-eval's own command line with the model ``hf-icl`` and this project's tasks.

Every request is run under the condition that the model arguments name, or refused: log-likelihoods
and multiple choice under all, rolling log-likelihoods and generation under all but the knockout.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.heads import CONTROLS, check_fraction
from icl_helpers.attention.means import mean_head_outputs
from icl_helpers.attention.passes import context_length
from icl_helpers.attention.scores import prefix_matching_scores, random_sequences
from icl_helpers.errors import InputError
from icl_helpers.evaluation.conditions import FULL, Condition, conditions
from icl_helpers.evaluation.scorer import InterventionLM, reference_samples
from icl_helpers.files import tasks_dir, user_path
from icl_helpers.models.fingerprint import model_fractions
from icl_helpers.models.loading import load_model
from icl_helpers.models.reference_text import reference_texts
from icl_helpers.parameters import read_parameters

__all__ = ["HFICL", "run_lm_eval"]

_LOADING = (
    "revision", "dtype", "device", "device_map", "quantization", "trust_remote_code", "gguf_file",
)  # fmt: skip
_CONDITION = ("ablate", "ablation", "fraction", "seed", "control", "reference")
_SCORING = ("add_bos_token", "max_length", "prefix_token_id", "softmax_dtype")
# What lm-eval hands over beside the model arguments.
_BATCHES = ("batch_size", "max_batch_size")

_MERGE = "merge it into the model, save that, and give its folder as pretrained"
_INSTEAD = {
    "peft": f"of an adapter, {_MERGE} (peft: model.merge_and_unload())",
    "delta": f"of a delta, {_MERGE}",
    "load_in_4bit": "use quantization=4bit",
    "load_in_8bit": "use quantization=8bit",
    "parallelize": "use device_map=auto",
    "tokenizer": "the model's own tokenizer is used; save another one into its folder",
    "truncation": "prompts are never cut: one longer than the context is an error",
}

_NAMES = {
    "induction": "induction_heads",
    "random": "random_heads",
    "pattern": "induction_pattern",
}


@register_model("hf-icl")
class HFICL(InterventionLM):
    """``hf-icl`` for lm-eval's command line.

    Model arguments: ``pretrained``, those of :func:`icl_helpers.load_model`, and ``ablate`` (none,
    induction, random, pattern), ``ablation`` (mean or zero), ``fraction``, ``seed`` (random heads),
    ``control`` (published, strict or any_layer), ``reference`` (a text file for the means, one text
    a line; default: the embedded model's, or MNLI premises); ``add_bos_token``, ``max_length``,
    ``prefix_token_id`` and ``softmax_dtype`` as in lm-eval. Raises :class:`InputError` for any
    other, before a model is loaded.
    """

    def __init__(self, pretrained: str = "icl-tiny", **arguments: Any) -> None:
        known = (*_LOADING, *_CONDITION, *_SCORING)
        for name in arguments:
            if name not in (*known, *_BATCHES):
                way_out = _INSTEAD.get(name, f"they are pretrained, {', '.join(known)}")
                raise InputError(f"{name!r} is no model argument of hf-icl; {way_out}")
        size = arguments.get("batch_size", "auto")
        # lm-eval's auto:N looks for the size N times; here it follows from the prompts each time.
        auto = re.fullmatch(r"auto(:\d+(\.\d+)?)?", str(size))
        size = "auto" if auto else _number(int, "batch_size", size)
        condition = {name: arguments[name] for name in _CONDITION if name in arguments}
        _check_condition(condition)
        loading = {name: arguments[name] for name in _LOADING if name in arguments}
        named = str(loading.get("device", "")).startswith("cuda")
        if loading.get("device_map") or (named and not torch.cuda.is_available()):
            # lm-eval's command line names a GPU when the user names no device.
            loading.pop("device", None)
        model, tokenizer = load_model(pretrained, **loading)
        scoring = {name: arguments[name] for name in _SCORING if name in arguments}
        _check_scoring(scoring, model, tokenizer)
        super().__init__(model, tokenizer, batch_size=size, **scoring)
        self.condition = _condition(model, tokenizer, pretrained, **condition)


def _number(kind: Callable[[Any], Any], name: str, value: Any) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a number, got {value!r}") from None


def _check_condition(values: dict[str, Any]) -> None:
    """Check the arguments of a condition, and make numbers of those that are."""
    ablate, ablation = values.get("ablate", "none"), values.get("ablation", "mean")
    if ablate not in ("none", *_NAMES) or ablation not in ("mean", "zero"):
        raise InputError(
            f"ablate must be none, {', '.join(_NAMES)} and ablation mean or zero, got {ablate!r} "
            f"and {ablation!r}"
        )
    if values.get("control", "published") not in CONTROLS:
        raise InputError(f"control must be one of {', '.join(CONTROLS)}, got {values['control']!r}")
    for name, kind in (("fraction", float), ("seed", int)):
        if name in values:
            values[name] = _number(kind, name, values[name])
    if "fraction" in values:
        check_fraction(values["fraction"])


def _check_scoring(
    values: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    if "max_length" in values:
        values["max_length"] = _number(int, "max_length", values["max_length"])
        if not 1 <= values["max_length"] <= context_length(model):
            raise InputError(
                f"max_length must be from 1 to the model's context of {context_length(model)} "
                f"tokens, got {values['max_length']}"
            )
    if values.get("add_bos_token", False) not in (True, False):
        raise InputError(f"add_bos_token must be True or False, got {values['add_bos_token']!r}")
    if values.get("add_bos_token"):
        bare = tokenizer("a", add_special_tokens=False).input_ids
        if tokenizer("a").input_ids != [tokenizer.bos_token_id, *bare]:
            raise InputError(
                "add_bos_token=True was asked for, but this model's tokenizer does not put a BOS "
                "token, and nothing else, around a text; leave it out, as the published runs do"
            )


def _condition(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
    *,
    ablate: str = "none",
    ablation: str = "mean",
    fraction: float | None = None,
    seed: int = 42,
    control: Any = "published",
    reference: str | None = None,
) -> Condition:
    """One condition from scratch: scores and, where they are needed, means are computed here."""
    if ablate == "none":
        return FULL
    scores = prefix_matching_scores(model, random_sequences(tokenizer)).mean(0)
    kind = "knockout" if ablate == "pattern" else ablation
    means = None
    if kind == "mean":
        texts = reference_texts(model_name, reference=reference)
        means = mean_head_outputs(model, reference_samples(model, tokenizer, texts))
    share = model_fractions(model_name)[-1] if fraction is None else fraction
    of_kind = conditions(
        scores, fractions=[share], ablations=[kind], head_outputs=means, ablation_seeds=[seed],
        control=control, full=False,
    )  # fmt: skip
    return next(condition for condition in of_kind if condition.name == _NAMES[ablate])


def run_lm_eval(arguments: Sequence[str]) -> int:
    """lm-eval's command line with our tasks; :class:`InputError` for what it finds wrong."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    command_given = arguments[:1] and arguments[0] in ("ls", "validate", "run")
    sys.argv = ["lm-eval", *([] if command_given else ["run"]), *arguments]
    setup_logging()
    command = HarnessCLI()
    args = command.parse_args()
    stated = read_parameters(user_path(args.config)) if getattr(args, "config", None) else {}
    options = {**stated, **{name: value for name, value in vars(args).items() if value}}
    for name in ("use_cache", "cache_requests"):
        if options.get(name):
            raise InputError(
                f"lm-eval's --{name} knows neither conditions nor demonstration seeds and would "
                f"serve the numbers of others; leave it out"
            )
    paths = str(options.get("include_path") or "").split(os.pathsep)
    folders = [user_path(path) for path in paths if path]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"include_path must be a directory of task files, got {str(folder)!r}")
    # Later folders go before earlier ones.
    args.include_path = [str(folder) for folder in (tasks_dir(), *folders)]
    try:
        command.execute(args)
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] == "lm_eval":
            raise InputError(f"lm-eval: {type(error).__name__}: {error}") from error
        raise
    return 0
