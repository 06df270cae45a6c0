"""An lm-eval language model that scores prompts under a condition.

:class:`InterventionLM` subclasses lm-eval's own Hugging Face model and replaces only the scoring of
tokenised requests: a prompt is run once for all its labels, logits are computed only at the scored
positions, the interventions of the current condition are applied around every batch, and what
labels, prompts and conditions share is computed once (:mod:`icl_helpers.evaluation.shared_work`).
:class:`HFICL` is the same model for lm-eval's command line, registered as ``hf-icl``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.hook import attention_layout
from icl_helpers.attention.induction_pattern import induction_patterns
from icl_helpers.attention.interventions import intervene
from icl_helpers.attention.means import mean_head_outputs
from icl_helpers.attention.passes import Branches, context_length
from icl_helpers.attention.scores import prefix_matching_scores, random_sequences
from icl_helpers.errors import InputError
from icl_helpers.evaluation.conditions import FULL, Condition, conditions
from icl_helpers.evaluation.shared_work import (
    Encoded,
    LayerReuse,
    SharedStart,
    common_start,
    scored_logits,
    shares_context,
    shares_start,
)
from icl_helpers.models.fingerprint import model_fractions
from icl_helpers.models.loading import load_model
from icl_helpers.models.reference_text import (
    PAPER_POSITIONS,
    PAPER_SAMPLES,
    reference_ids,
    reference_texts,
)

__all__ = ["HFICL", "InterventionLM", "reference_samples", "single_condition"]

# A shorter common start is not worth a forward pass of its own.
_MIN_START = 4

# Tokens per batch under batch_size="auto"; halved whenever an accelerator runs out of memory.
_AUTO_TOKENS = {"cpu": 4_096, "cuda": 65_536}


@dataclass
class _Row:
    """One context to run, the branches behind it, and the requests that are scored on them.

    ``ids`` are the tokens of the context and then those of the branches: of each label all tokens
    but the last, which nothing follows. ``branches`` says at which of ``ids`` each begins.
    """

    context: str
    ids: list[int]
    n_context: int
    branches: dict[tuple[int, ...], int] = field(default_factory=dict)
    requests: list[int] = field(default_factory=list)

    def add(self, request: int, label: Sequence[int]) -> None:
        """Score a label on this row."""
        self.requests.append(request)
        branch = tuple(label[:-1])
        if branch and branch not in self.branches:
            self.branches[branch] = len(self.ids)
            self.ids += branch

    @property
    def scored(self) -> range:
        """Where among ``ids`` something is scored: the context's end, and all of the branches."""
        return range(self.n_context - 1, len(self.ids))

    def places(self, label: Sequence[int]) -> list[int]:
        """Which of ``scored`` come before each of the label's tokens."""
        branch = tuple(label[:-1])
        first = self.branches.get(branch, 0) - self.scored.start
        return [0, *range(first, first + len(branch))]


@contextmanager
def _without_notices() -> Iterator[None]:
    """Keep to errors what lm-eval logs: its warnings about a model that is loaded fit none here."""
    logger = logging.getLogger(HFLM.__module__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class InterventionLM(HFLM):
    """lm-eval's Hugging Face model with a condition applied to every forward pass.

    Parameters
    ----------
    model, tokenizer
        From :func:`icl_helpers.load_model`.
    batch_size
        Prompts per forward pass, or ``"auto"``: as many as fit a token budget.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | str = "auto",
        **kwargs: Any,
    ) -> None:
        if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
            raise InputError(
                f"batch_size must be 'auto' or a whole number >= 1, got {batch_size!r}"
            )
        kwargs.setdefault("max_length", context_length(model))
        # The published runs put no BOS before a prompt, whatever the tokenizer's default is.
        with _without_notices():
            super().__init__(
                pretrained=model, tokenizer=tokenizer, batch_size=1, add_bos_token=False, **kwargs
            )
        self.condition: Condition = FULL
        self._batch_size_wanted = batch_size
        self._patterns: dict[tuple[str, tuple[str, ...]], torch.Tensor] = {}
        self._reuse = LayerReuse(model)

    @contextmanager
    def under(self, condition: Condition) -> Iterator[InterventionLM]:
        """Score under ``condition`` inside the block."""
        before, self.condition = self.condition, condition
        try:
            yield self
        finally:
            self.condition = before

    def share(self, conditions: Sequence[Condition]) -> None:
        """Say that the same prompts will be scored under these conditions, until :meth:`forget`.

        What they share is kept meanwhile: the blocked pairs of every prompt, and hidden states
        below the first head of each condition.
        """
        self.forget()
        first = {min(head.layer for head in c.heads) for c in conditions if c.heads}
        self._reuse.want(first if len(conditions) > 1 else ())

    def forget(self) -> None:
        """Drop what is kept for prompts seen so far."""
        self._patterns.clear()
        self._reuse.forget()

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Tokenise (context, label) pairs as lm-eval does, in two calls of the tokenizer.

        Raises :class:`InputError` for an empty context, a label without tokens, or a sequence
        longer than the model's context.
        """
        # As in lm-eval: spaces at a context's end belong to the label.
        moved = [_move_spaces(context, label) for context, label in pairs]
        contexts = list(dict.fromkeys(context for context, _ in moved))
        context_ids = dict(zip(contexts, self._ids(contexts), strict=True))
        whole_ids = self._ids([context + label for context, label in moved])
        encoded: list[Encoded] = []
        for pair, (context, _), whole in zip(pairs, moved, whole_ids, strict=True):
            ids = context_ids[context]
            self._check_encoded(pair, ids, whole)
            encoded.append((pair, ids, whole[len(ids) :]))
        return encoded

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids

    def _check_encoded(self, pair: tuple[str, str], ids: list[int], whole: list[int]) -> None:
        if not ids:
            raise InputError("a prompt without any token cannot be scored")
        if len(whole) <= len(ids):
            raise InputError(f"label {pair[1]!r} has no tokens of its own after the prompt")
        if len(whole) - 1 > self.max_length:
            raise InputError(
                f"a prompt of {len(whole)} tokens is longer than the model's context of "
                f"{self.max_length} tokens; use fewer shots or a model with a longer context. The "
                f"prompt ends in {pair[0][-60:]!r}"
            )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Encoded],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Log-probability and greediness of each label, in the order of the requests."""
        rows = _rows(requests, together=True)
        if _branched(rows) and not shares_context(self.model, self.condition.ablation):
            rows = _rows(requests, together=False)
        self._prepare_patterns([row.context for row in rows])
        scored: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        shown: dict[str, Any] = {"unit": "prompt", "leave": False, "desc": self._description()}
        with tqdm(total=len(rows), disable=disable_tqdm, **shown) as progress:
            # Long prompts first, so that running out of memory shows at once; equal lengths meet.
            rows.sort(key=lambda row: len(row.ids), reverse=True)
            budget = _AUTO_TOKENS.get(self.device.type, _AUTO_TOKENS["cuda"])
            shared = self._shared_start(rows)
            start = 0
            while start < len(rows):
                size = override_bs or self._batch_rows(rows[start], budget)
                batch = rows[start : start + size]
                try:
                    self._score_batch(batch, requests, scored, shared)
                except torch.cuda.OutOfMemoryError:
                    if size == 1 or self._batch_size_wanted != "auto":
                        raise
                    self._reuse.forget()
                    torch.cuda.empty_cache()
                    budget = len(rows[start].ids) * (size // 2)
                    continue
                start += len(batch)
                progress.update(len(batch))
        return scored

    def _description(self) -> str:
        condition = self.condition
        seed = "" if condition.ablation_seed is None else f" seed {condition.ablation_seed}"
        share = f" {condition.fraction:.3g}" if condition.fraction else ""
        return f"{condition.name}{share}{seed}"

    def _batch_rows(self, longest: _Row, budget: int) -> int:
        if self._batch_size_wanted != "auto":
            return int(self._batch_size_wanted)
        return max(1, budget // len(longest.ids))

    def _prepare_patterns(self, contexts: Sequence[str]) -> None:
        if self.condition.ablation != "knockout":
            return
        categories = self.condition.categories
        new = [c for c in dict.fromkeys(contexts) if (c, categories) not in self._patterns]
        patterns = induction_patterns(new, self.tokenizer, categories=categories) if new else []
        for context, pattern in zip(new, patterns, strict=True):
            self._patterns[context, categories] = pattern

    def _blocked(self, batch: Sequence[_Row], width: int) -> torch.Tensor | None:
        if self.condition.ablation != "knockout":
            return None
        blocked = torch.zeros(len(batch), width, width, dtype=torch.bool)
        for index, row in enumerate(batch):
            pattern = self._patterns[row.context, self.condition.categories]
            blocked[index, : len(pattern), : len(pattern)] = pattern
        return blocked.to(self.device)

    @torch.inference_mode()
    def _shared_start(self, rows: Sequence[_Row]) -> SharedStart | None:
        """Keys and values of the tokens before which no prompt is scored or blocked."""
        if len(rows) < 2:
            return None
        length = common_start([row.ids for row in rows])
        length = min(length, *(row.n_context - 1 for row in rows))
        if self.condition.ablation == "knockout":
            blocked = [
                self._patterns[row.context, self.condition.categories][:length].any(dim=1)
                for row in rows
            ]
            length = min(length, *(int(b.int().argmax()) for b in blocked if b.any()), length)
        if length < _MIN_START or not shares_start(self.model):
            return None
        # Nothing is blocked in these tokens, so a knockout leaves them as they are.
        edits = [] if self.condition.ablation == "knockout" else self.condition.interventions()
        with intervene(self.model, *edits):
            return SharedStart(self.model, torch.tensor([rows[0].ids[:length]]))

    @torch.inference_mode()
    def _score_batch(
        self,
        batch: Sequence[_Row],
        requests: Sequence[Encoded],
        scored: list[tuple[float, bool]],
        shared: SharedStart | None,
    ) -> None:
        width = max(len(row.ids) for row in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for index, row in enumerate(batch):
            ids[index, : len(row.ids)] = torch.tensor(row.ids)
        branches = self._branches(batch)
        # Rows with less to score repeat their last column.
        places = range(max(len(row.scored) for row in batch))
        columns = torch.tensor(
            [[row.scored[min(p, len(row.scored) - 1)] for p in places] for row in batch]
        )
        interventions = self.condition.interventions(self._blocked(batch, width))
        layers = [head.layer for head in self.condition.heads]
        first = min(layers) if interventions else attention_layout(self.model).n_layers - 1
        with ExitStack() as stack:
            if interventions or branches is not None:
                stack.enter_context(intervene(self.model, *interventions))
            stack.enter_context(self._reuse.around(_batch_key(ids, branches, shared), first))
            logits = scored_logits(self.model, ids, columns, start=shared, branches=branches)
        self._note(batch, requests, logits, scored)

    def _branches(self, batch: Sequence[_Row]) -> Branches | None:
        if not _branched(batch):
            return None
        shapes = [(row.n_context, [len(branch) for branch in row.branches]) for row in batch]
        return Branches.of(shapes, self.device)

    def _note(
        self,
        batch: Sequence[_Row],
        requests: Sequence[Encoded],
        logits: Float[torch.Tensor, "batch scored vocabulary"],
        scored: list[tuple[float, bool]],
    ) -> None:
        """Write down the log-probability and greediness of the batch's labels."""
        log_probabilities = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
        labels = [(index, request) for index, row in enumerate(batch) for request in row.requests]
        tokens = [
            (index, place, token)
            for index, request in labels
            for place, token in zip(
                batch[index].places(requests[request][2]), requests[request][2], strict=True
            )
        ]
        rows, places, token_ids = torch.tensor(tokens, device=logits.device).T
        lengths = [len(requests[request][2]) for _, request in labels]
        taken = log_probabilities[rows, places, token_ids].cpu().split(lengths)
        greedy = (logits.argmax(dim=-1)[rows, places] == token_ids).cpu().split(lengths)
        for (_, request), values, hits in zip(labels, taken, greedy, strict=True):
            scored[request] = (float(values.sum()), bool(hits.all()))


def _move_spaces(context: str, label: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + label


def _rows(requests: Sequence[Encoded], *, together: bool) -> list[_Row]:
    """Rows to run: one per context, or one per context and branch where a model needs that."""
    rows: dict[Any, _Row] = {}
    for index, (pair, context, label) in enumerate(requests):
        key = tuple(context), None if together else tuple(label[:-1])
        row = rows.setdefault(key, _Row(pair[0].rstrip(), list(context), len(context)))
        row.add(index, label)
    return list(rows.values())


def _batch_key(ids: torch.Tensor, branches: Branches | None, start: SharedStart | None) -> bytes:
    """Everything but the edits that decides a batch's hidden states."""
    parts = [ids] if branches is None else [ids, branches.positions, branches.owners]
    skipped = 0 if start is None else start.length
    heading = f"{skipped} {tuple(ids.shape)} ".encode()
    return heading + b"".join(part.cpu().numpy().tobytes() for part in parts)


def _branched(rows: Sequence[_Row]) -> bool:
    """Whether any row is more than a sequence: a single branch continues its context."""
    return any(len(row.branches) > 1 for row in rows)


@register_model("hf-icl")
class HFICL(InterventionLM):
    """``hf-icl`` for lm-eval's command line.

    Model arguments: ``pretrained``, ``revision``, ``dtype``, ``device``, ``quantization``,
    ``trust_remote_code``, and ``ablate`` (none, induction, random, pattern), ``ablation`` (mean or
    zero), ``fraction``, ``seed`` (random heads), ``control`` (published, strict or any_layer),
    ``reference`` (a text file for the means, one text a line; default: the embedded model's, or
    MNLI premises).
    """

    def __init__(
        self,
        pretrained: str = "icl-tiny",
        *,
        ablate: str = "none",
        ablation: str = "mean",
        fraction: float | None = None,
        seed: int = 42,
        control: str = "published",
        reference: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        quantization: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            # lm-eval's command line names a GPU when the user names no device.
            device = None

        model, tokenizer = load_model(
            pretrained, revision=revision, dtype=dtype, device=device,
            quantization=quantization, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        size = batch_size if batch_size == "auto" else int(batch_size)
        super().__init__(model, tokenizer, batch_size=size, **kwargs)
        self.condition = single_condition(
            model, tokenizer, pretrained, ablate=ablate, ablation=ablation,
            fraction=model_fractions(pretrained)[-1] if fraction is None else float(fraction),
            seed=int(seed), control=control, reference=reference,
        )  # fmt: skip


def reference_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    n_samples: int | None = None,
    n_positions: int | None = None,
) -> torch.Tensor:
    """Reference samples: 500 of 3,000 tokens, fewer positions where the context is shorter."""
    return reference_ids(
        tokenizer,
        texts,
        n_samples=n_samples or PAPER_SAMPLES,
        n_positions=n_positions or min(PAPER_POSITIONS, context_length(model)),
    )


def single_condition(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
    *,
    ablate: str,
    ablation: str,
    fraction: float,
    seed: int,
    control: str,
    reference: str | None,
) -> Condition:
    """One condition from scratch: scores and, where they are needed, means are computed here."""
    names = {
        "induction": "induction_heads",
        "random": "random_heads",
        "pattern": "induction_pattern",
    }
    if ablate == "none":
        return FULL
    if ablate not in names or ablation not in ("mean", "zero"):
        raise InputError(
            f"ablate must be none, {', '.join(names)} and ablation mean or zero, got {ablate!r} "
            f"and {ablation!r}"
        )
    scores = prefix_matching_scores(model, random_sequences(tokenizer)).mean(0)
    kind = "knockout" if ablate == "pattern" else ablation
    means = None
    if kind == "mean":
        texts = reference_texts(model_name, reference=reference)
        means = mean_head_outputs(model, reference_samples(model, tokenizer, texts))
    found = conditions(
        scores, fractions=[fraction], ablations=[kind], head_outputs=means,
        ablation_seeds=[seed], control=control, full=False,
    )  # fmt: skip
    return next(condition for condition in found if condition.name == names[ablate])
