"""Checks of this package on a model, each against a computation that does not use its hook.

The other side of a comparison is the model's own eager attention with plain PyTorch hooks: heads
are overwritten in the input of the module that comes after them, and a knockout is an additive mask
given to the attention module. That module is found by what it sees, not by its name.

Example
-------
>>> print(icl.check_model("icl-tiny"))
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from icl_helpers.attention.heads import Head
from icl_helpers.attention.hook import (
    AttentionCall,
    attention_layout,
    equal_but_for_rounding,
    watched_attention,
)
from icl_helpers.attention.interventions import (
    AttentionKnockout,
    Intervention,
    MeanAblation,
    ZeroAblation,
    intervene,
)
from icl_helpers.attention.means import input_hooks, mean_head_outputs
from icl_helpers.attention.passes import context_length, measuring
from icl_helpers.errors import InterventionError, UnsupportedArchitectureError
from icl_helpers.models.loading import check_dtype, load_model
from icl_helpers.run.plan import shown_name

__all__ = ["Check", "ModelCheck", "check_model"]

# Tokens of a prompt, and tokens generated after it.
_LENGTH, _NEW = 16, 5
# What moves logits by fewer units of rounding than this could be rounding itself.
_LEAST_UNITS = 8
# Installs the hook and edits nothing.
_NOTHING = ZeroAblation(())


@dataclass(frozen=True)
class Check:
    """One check with weights of one kind.

    ``difference`` is the largest one, relative to the largest value of what is compared, and may
    reach ``bound``. Where there is no bound the check does not apply, and ``reason`` says why.
    """

    name: str
    weights: str
    difference: float | None = None
    bound: float | None = None
    reason: str = ""

    @property
    def verdict(self) -> Literal["pass", "FAIL", "not applicable"]:
        """Whether the difference is within the bound; one that is not a number is not."""
        if self.difference is None or self.bound is None:
            return "not applicable"
        return "pass" if self.difference <= self.bound else "FAIL"


@dataclass(frozen=True)
class ModelCheck:
    """What the checks of a model found."""

    model: str
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passes(self) -> bool:
        """Whether no check fails."""
        return all(check.verdict != "FAIL" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """JSON values; a difference that is not finite is None."""
        rows = [asdict(check) | {"verdict": check.verdict} for check in self.checks]
        for row in rows:
            if row["difference"] is not None and not math.isfinite(row["difference"]):
                row["difference"] = None
        return {"model": self.model, "passes": self.passes, "seconds": self.seconds, "checks": rows}

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "" if value is None else f"{value:.1e}" if value else "0"

        rows = [("weights", "check", "difference", "bound", "verdict")]
        for it in self.checks:
            verdict = ": ".join(filter(None, [it.verdict, it.reason]))
            rows.append((it.weights, it.name, number(it.difference), number(it.bound), verdict))
        widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
        lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows]
        verdicts = Counter(sorted(check.verdict for check in self.checks))
        counts = [f"{count} {verdict}" for verdict, count in verdicts.items()]
        return "\n".join([self.model, *lines, f"{', '.join(counts)} ({self.seconds:.0f} s)"])


def check_model(
    model: str | PreTrainedModel, *, dtypes: Sequence[str] = ("float32", "bfloat16"),
    quantization: str | None = None, revision: str | None = None, device: str | None = None,
    trust_remote_code: bool = False,
) -> ModelCheck:  # fmt: skip
    """Check interventions, padded batches and generation on a model.

    Parameters
    ----------
    model
        What :func:`icl_helpers.load_model` takes, which is loaded once per dtype; or a loaded
        model, which is checked as it is.
    dtypes
        Any of ``auto``, ``float32``, ``bfloat16``, ``float16``. Single precision shows the
        smallest mistakes, and takes twice the memory.
    quantization
        ``"4bit"`` or ``"8bit"`` weights.

    Raises
    ------
    InputError
        Raised by :func:`icl_helpers.load_model`, before any check.
    UnsupportedArchitectureError
        A model that this package refuses.
    """
    began = time.monotonic()
    checks: list[Check] = []
    if isinstance(model, PreTrainedModel):
        name = model.config._name_or_path or model.config.model_type
        checks += _checks(model, None)
    else:
        name = model
        for dtype in dtypes:
            check_dtype(dtype)
        for dtype in dict.fromkeys(dtypes):
            loaded, _ = load_model(
                name, dtype=dtype, quantization=quantization, revision=revision, device=device,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
            checks += _checks(loaded, quantization)
            del loaded  # before the next one takes memory
    return ModelCheck(shown_name(name), tuple(checks), round(time.monotonic() - began, 1))


@measuring
def _checks(model: PreTrainedModel, quantization: str | None) -> list[Check]:
    """Make every check of one loaded model."""
    weights = ", ".join(filter(None, [quantization, str(model.dtype).removeprefix("torch.")]))
    attention_layout(model)  # a model that is refused is refused here
    subject = _Subject(model)
    measures: dict[str, Callable[[], _Measured]] = {
        "no intervention": subject.untouched,
        "zero ablation": lambda: subject.against(subject.overwritten(None), "zero"),
        "mean ablation": subject.averaged, "knockout": subject.knocked_out,
        "grouped queries": subject.grouped,
    }  # fmt: skip
    for edit in ("full model", "zero", "mean", "knockout"):
        measures[f"padded batch, {edit}"] = functools.partial(subject.padded, edit)
        measures[f"generation, {edit}"] = functools.partial(subject.generated, edit)
    checks = []
    for name, measure in measures.items():
        try:
            checks.append(Check(name, weights, *measure()))
        except (_DoesNotApplyError, InterventionError, UnsupportedArchitectureError) as why:
            checks.append(Check(name, weights, reason=str(why)))
    return checks


class _DoesNotApplyError(Exception):
    """A check does not apply; the message says why."""


# A difference, its bound, and a reason where there is none.
_Measured = tuple[float, float] | tuple[float, None, str]


class _Subject:
    """A model with what it is checked on: three rows of random tokens, and half of its heads.

    ``mask`` pads the rows on the right; ``blocked`` are random pairs [row, query, key] before the
    diagonal, so that every query keeps itself. Many layers make much of one rounding in 16 bits or
    with quantised weights, as another kernel or batch does it: there (``coarse``) both sides run
    over eager attention, and batches and generation are judged by what they change in the full
    model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.layout = model, attention_layout(model)
        length = min(_LENGTH, context_length(model) - _NEW)
        draw = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().num_embeddings
        long = torch.randint(2, vocabulary, (3, length + _NEW), generator=draw)
        self.long = long.to(model.device)
        self.ids = self.long[:, :length]
        self.lengths = [length, length - 2, length - 4]
        self.mask = (torch.arange(length) < torch.tensor(self.lengths)[:, None]).to(model.device)
        blocked = (torch.rand(3, length, length, generator=draw) < 0.4).tril(-1)
        self.blocked = blocked.to(model.device) & self.mask[:, None] & self.mask[..., None]
        n_heads, n_layers = self.layout.n_heads, self.layout.n_layers
        # Of each layer every second head.
        self.edited = [list(range(layer % 2, n_heads, 2)) for layer in range(n_layers)]
        self.heads = [Head(layer, head) for layer, of in enumerate(self.edited) for head in of]
        self.eps = torch.finfo(model.dtype).eps
        self.rounding = self.eps**0.5
        # Quantised weights are multiplied otherwise for one token than for many.
        self.coarse = self.eps > 1e-5 or getattr(model, "is_quantized", False)
        self.full_model: dict[str, float] = {}

    def logits(
        self, *interventions: Intervention, ids: torch.Tensor | None = None
    ) -> Float[torch.Tensor, "batch tokens vocabulary"]:
        """Logits of these ids, or of the padded batch; without interventions no hook is there."""
        inputs = {"attention_mask": self.mask.long()} if ids is None else {}
        inputs["input_ids"] = self.ids if ids is None else ids
        with intervene(self.model, *interventions) if interventions else nullcontext():
            return self.model(**inputs, use_cache=False).logits.float()

    def interventions(self, name: str, rows: slice) -> list[Intervention]:
        """What is done to these rows of the batch; to the full model nothing, with the hook."""
        if name == "mean":
            return [MeanAblation(self.heads, self.reference)]
        if name == "knockout":
            return [AttentionKnockout(self.heads, self.blocked[rows])]
        return [ZeroAblation(self.heads) if name == "zero" else _NOTHING]

    def untouched(self) -> _Measured:
        """With nothing edited not a bit may change, where the model's own attention is called."""
        exact = self.model.config._attn_implementation in ("sdpa", "eager")
        return _relative(self.logits(_NOTHING), self.logits()), 0.0 if exact else self.rounding

    def averaged(self) -> _Measured:
        """Means against replayed ones, and mean ablation against heads overwritten by them."""
        if not equal_but_for_rounding(self.call.output, self.entering(_NOTHING)):
            raise _DoesNotApplyError("a gate stands between the heads and what comes after them")
        means = self.reference[:, : self.ids.shape[1]].to(self.model.device)
        difference, *bound = self.against(self.overwritten(means), "mean")
        return max(difference, _relative(means, self.means())), *bound

    def knocked_out(self) -> _Measured:
        """Knockout against an additive mask per head, in eager attention."""

        def forbid(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            mask = kwargs.get("attention_mask")
            if not isinstance(mask, torch.Tensor) or not mask.is_floating_point():
                raise _DoesNotApplyError("its attention is handed no additive mask")
            mask = mask.expand(-1, self.layout.n_heads, -1, -1).clone()
            for head in self.edited[layer]:
                mask[:, head].masked_fill_(self.blocked, torch.finfo(mask.dtype).min)
            return args, kwargs | {"attention_mask": mask}

        with _eager(self.model), input_hooks(self.layout.modules, forbid):
            expected = self.logits()
        return self.against(expected, "knockout")

    def against(self, expected: torch.Tensor, name: str) -> _Measured:
        """Compare an intervention on the padded batch with what it should give."""
        with self.base():
            plain = self.logits()[self.mask]
            edited = self.logits(*self.interventions(name, slice(0, 3)))[self.mask]
        effect = _relative(expected[self.mask], plain)
        if effect < _LEAST_UNITS * self.eps:
            raise _DoesNotApplyError(f"its effect on the logits, {effect:.0e}, is rounding here")
        # With no more than a quarter of its effect, or a hook that does nothing might pass.
        return _relative(edited, expected[self.mask]), min(self.rounding, effect / 4)

    def grouped(self) -> _Measured:
        """One of the heads that share keys is knocked out: not a bit of the others may change."""
        if self.call.key.shape[1] == self.layout.n_heads:
            raise _DoesNotApplyError("every head has keys and values of its own")
        before = self.entering(_NOTHING)[self.mask]
        after = self.entering(AttentionKnockout([(0, 0)], self.blocked))[self.mask]
        changed = not torch.equal(after[:, 0], before[:, 0])
        return _relative(after[:, 1:], before[:, 1:]) if changed else math.inf, 0.0

    def padded(self, name: str) -> _Measured:
        """A batch that is padded on the right against its rows, one at a time."""
        together = self.logits(*self.interventions(name, slice(0, 3)))[self.mask]
        alone = []
        for row, length in enumerate(self.lengths):
            only = slice(row, row + 1)
            edits = self.interventions(name, only)
            alone.append(self.logits(*edits, ids=self.ids[only, :length])[0])
        return self.judged("padded batch", name, _relative(together, torch.cat(alone)))

    def generated(self, name: str) -> _Measured:
        """Tokens generated with the cache against one pass over all of them."""
        ids, edits = self.ids[:1], self.interventions(name, slice(0, 1))
        with intervene(self.model, *edits):
            made = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
                min_new_tokens=_NEW, max_new_tokens=_NEW, pad_token_id=0, use_cache=True,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        whole = self.logits(*edits, ids=made.sequences)[:, ids.shape[1] - 1 : -1]
        made_logits = torch.stack(made.logits, dim=1).float()
        return self.judged("generation", name, _relative(made_logits, whole))

    def judged(self, kind: str, name: str, difference: float) -> _Measured:
        """Give what is done otherwise its bound: rounding, or thrice the full model's."""
        if not self.coarse:
            return difference, self.rounding
        rounding = self.full_model.setdefault(kind, difference)
        if name == "full model":
            return difference, None, "the model's own rounding, by which the others are judged"
        return difference, max(self.rounding, 3 * rounding)

    def base(self) -> AbstractContextManager[None]:
        """The attention that an intervention and what it is compared with have in common."""
        return _eager(self.model) if self.coarse else nullcontext()

    @functools.cached_property
    def reference(self) -> Float[torch.Tensor, "layers positions heads d_head"]:
        """The package's means over the long rows."""
        with self.base():
            return mean_head_outputs(self.model, self.long)

    @functools.cached_property
    def call(self) -> AttentionCall:
        """The first layer's attention on the padded batch."""
        calls: list[AttentionCall] = []
        with watched_attention(self.model, lambda _, call: calls.append(call), [0]):
            self.model(input_ids=self.ids, attention_mask=self.mask.long(), use_cache=False)
        return calls[0]

    @functools.cached_property
    def after(self) -> list[torch.nn.Module]:
        """The first module of every layer that sees what the heads give."""
        # Two rows differ in every token but the last. There, queries, keys and values of the first
        # layer are alike in both rows, and what heads made of the tokens before is not.
        first = self.layout.modules[0]
        names, inside = zip(*list(first.named_modules())[1:], strict=True)
        ids = self.ids[:2].clone()
        ids[1, -1] = ids[0, -1]
        seen: list[str] = []

        def look(index: int, args: tuple[Any, ...], kwargs: Any) -> None:
            states = args[0] if args else None
            if isinstance(states, torch.Tensor) and states.shape[:-1] == ids.shape:
                alike = equal_but_for_rounding(states[0, -1], states[1, -1])
                seen.extend([] if alike else [names[index]])

        with _eager(self.model), input_hooks(inside, look):
            self.model(input_ids=ids, use_cache=False)
        if not seen:
            raise _DoesNotApplyError(
                f"no module inside {type(first).__name__} comes after its heads"
            )
        return [module.get_submodule(seen[0]) for module in self.layout.modules]

    def split(self, merged: torch.Tensor) -> Float[torch.Tensor, "batch tokens heads d_head"]:
        """The heads in what enters the module after them."""
        shape = (self.layout.n_heads, self.layout.d_head)
        if merged.shape[-1] != math.prod(shape):
            raise _DoesNotApplyError(f"{merged.shape[-1]} values come after {shape} of the heads")
        return merged.unflatten(-1, shape)

    def entering(self, edit: Intervention) -> Float[torch.Tensor, "batch tokens heads d_head"]:
        """What enters the module after the first layer's heads under an intervention."""
        seen: list[torch.Tensor] = []
        with input_hooks(self.after[:1], lambda _, args, kwargs: seen.append(args[0])):
            self.logits(edit)
        return self.split(seen[0])

    def overwritten(self, values: Float[torch.Tensor, "layers tokens heads d"] | None) -> Any:
        """Logits of the padded batch with heads overwritten by these values, or by zero."""

        def overwrite(layer: int, args: tuple[Any, ...], kwargs: Any) -> tuple[Any, Any]:
            heads, edited = self.split(args[0]).clone(), self.edited[layer]
            heads[:, :, edited] = 0 if values is None else values[layer][:, edited].to(heads)
            return (heads.flatten(-2), *args[1:]), kwargs

        with _eager(self.model), input_hooks(self.after, overwrite):
            return self.logits()

    def means(self) -> Float[torch.Tensor, "layers tokens heads d_head"]:
        """What heads give when every attention is fed its mean input over the long rows."""
        inputs: dict[int, torch.Tensor] = {}
        outputs: dict[int, torch.Tensor] = {}

        def average(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            inputs[layer] = states.float().mean(0)

        def feed(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            mean = inputs[layer][None].to(self.model.dtype)
            if "hidden_states" in kwargs:
                return args, kwargs | {"hidden_states": mean}
            return (mean, *args[1:]), kwargs

        def record(layer: int, args: tuple[Any, ...], kwargs: Any) -> None:
            outputs[layer] = self.split(args[0])[0, : self.ids.shape[1]].float()

        modules = self.layout.modules
        with _eager(self.model), input_hooks(modules, average):
            self.logits(ids=self.long)
        with _eager(self.model), input_hooks(modules, feed), input_hooks(self.after, record):
            self.logits(ids=self.long[:1])
        return torch.stack([outputs[layer] for layer in range(self.layout.n_layers)])


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest value; NaN where either is not a number."""
    return float((found - expected).abs().max() / expected.abs().max())


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Run the model's own eager attention, in which the package's hook has no part."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
