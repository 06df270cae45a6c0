"""An lm-eval language model that scores prompts under a condition.

:class:`InterventionLM` subclasses lm-eval's own Hugging Face model and replaces only the scoring of
tokenised requests: a prompt is run once for all its labels, logits are computed only at the scored
positions, the interventions of the current condition are applied around every batch, and what
labels, prompts and conditions share is computed once (:mod:`icl_helpers.evaluation.shared_work`).
What lm-eval itself asks for beside that (rolling log-likelihoods, generation) runs under the
condition too, or is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.hook import attention_layout
from icl_helpers.attention.induction_pattern import induction_patterns
from icl_helpers.attention.interventions import intervene
from icl_helpers.attention.passes import (
    Branches,
    check_tokens,
    context_length,
    one_angle_length,
    rope_switch,
)
from icl_helpers.errors import InputError, InterventionError
from icl_helpers.evaluation.conditions import FULL, Condition
from icl_helpers.evaluation.shared_work import (
    Encoded,
    LayerReuse,
    SharedStart,
    common_start,
    scored_logits,
    shares_context,
    shares_start,
)
from icl_helpers.models.reference_text import PAPER_POSITIONS, PAPER_SAMPLES, reference_ids

__all__ = ["InterventionLM", "reference_samples"]

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


class InterventionLM(HFLM):
    """lm-eval's Hugging Face model with a condition applied to every forward pass.

    Parameters
    ----------
    model, tokenizer
        From :func:`icl_helpers.load_model`.
    batch_size
        Prompts per forward pass, or ``"auto"``: as many as fit a token budget.
    add_bos_token
        Of the requests that lm-eval encodes: the published runs put no BOS before a prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | str = "auto",
        add_bos_token: bool = False,
        **kwargs: Any,
    ) -> None:
        if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
            raise InputError(
                f"batch_size must be 'auto' or a whole number >= 1, got {batch_size!r}"
            )
        kwargs.setdefault("max_length", context_length(model))
        # What lm-eval warns of when it is given a loaded model fits none here.
        logger = logging.getLogger(HFLM.__module__)
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            super().__init__(
                pretrained=model, tokenizer=tokenizer, batch_size=1, add_bos_token=add_bos_token,
                **kwargs,
            )  # fmt: skip
        finally:
            logger.setLevel(level)
        self.condition: Condition = FULL
        # How many BOS stand before a prompt, and shift its induction pattern.
        self.n_bos = int(add_bos_token)
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
        """Keep, until :meth:`forget`, what prompts share under these conditions.

        These are the blocked pairs of every prompt, and hidden states below each condition's heads.
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

        Raises :class:`InputError` for an empty context, a label without tokens, two labels of the
        same tokens, or a sequence longer than the model's context.
        """
        # As in lm-eval: spaces at a context's end belong to the label.
        bare = [context.rstrip() for context, _ in pairs]
        moved = [(c, pair[0][len(c) :] + pair[1]) for c, pair in zip(bare, pairs, strict=True)]
        contexts = list(dict.fromkeys(bare))
        context_ids = dict(zip(contexts, self._ids(contexts), strict=True))
        whole_ids = self._ids([context + label for context, label in moved])
        encoded: list[Encoded] = []
        labels: dict[tuple[str, tuple[int, ...]], str] = {}
        for pair, (context, label), whole in zip(pairs, moved, whole_ids, strict=True):
            ids = context_ids[context]
            if not ids:
                raise InputError("a prompt without any token cannot be scored")
            if len(whole) <= len(ids):
                raise InputError(f"label {pair[1]!r} has no tokens of its own after the prompt")
            self._check_length(pair[0], len(whole) - 1)
            other = labels.setdefault((context, tuple(whole[len(ids) :])), label)
            if other != label:
                raise InputError(
                    f"labels {other!r} and {label!r} are the same tokens to this tokenizer "
                    f"({whole[len(ids) :]}), so they cannot be told apart; use other labels or the "
                    f"model's own tokenizer"
                )
            encoded.append((pair, ids, whole[len(ids) :]))
        return encoded

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids

    def _check_length(self, text: str, length: int) -> None:
        if length > self.max_length:
            raise InputError(
                f"a prompt of {length + 1} tokens is longer than the model's context of "
                f"{self.max_length} tokens; use fewer shots or a model with a longer context. The "
                f"prompt ends in {text[-60:]!r}"
            )

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False,
        override_bs: int | None = None, **kwargs: Any,
    ) -> list[tuple[float, bool]]:  # fmt: skip
        """Log-probability and greediness of each label, in the order of the requests."""
        for pair, context, label in requests:
            self._check_length(pair[0] if pair else "", len(context) + len(label) - 1)
        rows = _rows(requests, together=True)
        tokens = {token for row in rows for token in row.ids} | {it[-1] for *_, it in requests}
        check_tokens(self.model, torch.tensor(list(tokens)))
        # Where the angles of all tokens depend on the sequence's length, only equals go together.
        switch = rope_switch(self.model)
        turned = switch is not None and max(len(row.ids) for row in rows) > switch[0]
        if _branched(rows) and (turned or not shares_context(self.model, self.condition.ablation)):
            rows = _rows(requests, together=False)
        condition = self.condition
        of = condition.categories
        if condition.ablation == "knockout" and not any(self.blocked_pairs(requests, of)):
            raise InputError(
                f"a knockout of {', '.join(of)} blocks nothing in any of these prompts; it needs "
                f"demonstrations (shots, in lm-eval --num_fewshot), and categories that the "
                f"prompts have"
            )
        scored: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        share = f" {condition.fraction:.3g}" if condition.fraction else ""
        seed = "" if condition.ablation_seed is None else f" seed {condition.ablation_seed}"
        shown: dict[str, Any] = {"unit": "prompt", "leave": False, "disable": disable_tqdm}
        with tqdm(total=len(rows), desc=f"{condition.name}{share}{seed}", **shown) as progress:
            # Long prompts first, so that running out of memory shows at once; equal lengths meet.
            rows.sort(key=lambda row: len(row.ids), reverse=True)
            budget = _AUTO_TOKENS.get(self.device.type, _AUTO_TOKENS["cuda"])
            shared = None if turned else self._shared_start(rows)
            start = 0
            while start < len(rows):
                fitting = max(1, budget // len(rows[start].ids))
                wanted = self._batch_size_wanted
                size = override_bs or (fitting if wanted == "auto" else int(wanted))
                batch = rows[start : start + size]
                if turned:
                    batch = [row for row in batch if len(row.ids) == len(batch[0].ids)]
                try:
                    self._score_batch(batch, requests, scored, shared)
                except torch.cuda.OutOfMemoryError:
                    if size == 1 or wanted != "auto":
                        raise
                    self._reuse.forget()
                    torch.cuda.empty_cache()
                    budget = len(rows[start].ids) * (size // 2)
                    continue
                start += len(batch)
                progress.update(len(batch))
        return scored

    def blocked_pairs(self, requests: Sequence[Encoded], of: tuple[str, ...]) -> list[int]:
        """How many query-key pairs a knockout of these categories blocks in each prompt."""
        contexts = [pair[0].rstrip() for pair, *_ in requests]
        new = [c for c in dict.fromkeys(contexts) if (c, of) not in self._patterns]
        patterns = induction_patterns(new, self.tokenizer, categories=of)
        self._patterns |= {(c, of): p for c, p in zip(new, patterns, strict=True)}
        return [int(self._patterns[context, of].sum()) for context in contexts]

    def block(self, patterns: Mapping[str, torch.Tensor], of: tuple[str, ...]) -> None:
        """Have a knockout of these categories block these pairs of prompts, in place of theirs."""
        self._patterns |= {(context.rstrip(), of): pairs for context, pairs in patterns.items()}

    def _pattern(self, row: _Row) -> torch.Tensor:
        """The blocked pairs of a row's context, behind its BOS."""
        pattern = self._patterns[row.context, self.condition.categories]
        if (more := row.n_context - len(pattern)) not in (0, self.n_bos):
            raise InterventionError(
                f"the prompt has {row.n_context} tokens, its induction pattern {len(pattern)}; it "
                f"cannot be blocked with this tokenizer"
            )
        return torch.nn.functional.pad(pattern, (more, 0, more, 0))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """As lm-eval's, under the condition; there is no induction pattern in running text."""
        self._refuse_knockout("rolling log-likelihoods")
        if self.prefix_token_id is None:
            raise InputError(
                "rolling log-likelihoods begin with a BOS or EOS token, and this tokenizer has "
                "neither; name one with prefix_token_id"
            )
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _refuse_knockout(self, what: str) -> None:
        if self.condition.ablation == "knockout":
            raise InputError(
                f"{what} cannot be run under the paper's knockout: no induction pattern is defined "
                f"for them; remove heads instead (ablate=induction or random)"
            )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's, under the condition, a prompt at a time; prompts are never cut."""
        self._refuse_knockout("generated answers")
        for request in requests:
            text, options = request.args
            room = int(options.get("max_gen_toks", self.max_gen_toks))
            ids = self.tok_encode(text)
            self._check_length(text, len(ids) + room - 1)
            check_tokens(self.model, torch.tensor(ids))
        with intervene(self.model, *self.condition.interventions()):
            return super().generate_until(requests, disable_tqdm)

    @torch.inference_mode()
    def _shared_start(self, rows: Sequence[_Row]) -> SharedStart | None:
        """Keys and values of the tokens before which no prompt is scored or blocked."""
        if len(rows) < 2:
            return None
        length = common_start([row.ids for row in rows])
        length = min(length, *(row.n_context - 1 for row in rows))
        if self.condition.ablation == "knockout":
            blocked = [self._pattern(row)[:length].any(dim=1) for row in rows]
            length = min(length, *(int(b.int().argmax()) for b in blocked if b.any()), length)
        if length < _MIN_START or not shares_start(self.model):
            return None
        # Nothing is blocked in these tokens, so a knockout leaves them as they are.
        edits = [] if self.condition.ablation == "knockout" else self.condition.interventions()
        with intervene(self.model, *edits):
            return SharedStart(self.model, torch.tensor([rows[0].ids[:length]]))

    @torch.inference_mode()
    def _score_batch(
        self, batch: Sequence[_Row], requests: Sequence[Encoded],
        scored: list[tuple[float, bool]], shared: SharedStart | None,
    ) -> None:  # fmt: skip
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([torch.tensor(row.ids) for row in batch], batch_first=True)
        branches = None
        if _branched(batch):
            shapes = [(row.n_context, [len(branch) for branch in row.branches]) for row in batch]
            branches = Branches.of(shapes, self.device)
        # Rows with less to score repeat their last column.
        places = range(max(len(row.scored) for row in batch))
        columns = torch.tensor(
            [[row.scored[min(p, len(row.scored) - 1)] for p in places] for row in batch]
        )
        blocked = None
        if self.condition.ablation == "knockout":
            blocked = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.bool)
            for index, row in enumerate(batch):
                blocked[index, : row.n_context, : row.n_context] = self._pattern(row)
            blocked = blocked.to(self.device)
        interventions = self.condition.interventions(blocked)
        layers = [head.layer for head in self.condition.heads]
        first = min(layers) if interventions else attention_layout(self.model).n_layers - 1
        with ExitStack() as stack:
            if interventions or branches is not None:
                stack.enter_context(intervene(self.model, *interventions))
            # Everything but the edits that decides the batch's hidden states.
            parts = [ids] if branches is None else [ids, branches.positions, branches.owners]
            heading = f"{0 if shared is None else shared.length} {tuple(ids.shape)} ".encode()
            key = heading + b"".join(part.cpu().numpy().tobytes() for part in parts)
            stack.enter_context(self._reuse.around(key, first))
            logits = scored_logits(self.model, ids, columns, start=shared, branches=branches)
        self._note(batch, requests, logits, scored)

    def _note(
        self, batch: Sequence[_Row], requests: Sequence[Encoded],
        logits: Float[torch.Tensor, "batch scored vocabulary"], scored: list[tuple[float, bool]],
    ) -> None:  # fmt: skip
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


def _rows(requests: Sequence[Encoded], *, together: bool) -> list[_Row]:
    """Rows to run: one per context, or one per context and branch where a model needs that."""
    rows: dict[Any, _Row] = {}
    for index, (pair, context, label) in enumerate(requests):
        key = tuple(context), None if together else tuple(label[:-1])
        # lm-eval's rolling windows are tokens without a text.
        text = pair[0].rstrip() if pair else ""
        row = rows.setdefault(key, _Row(text, list(context), len(context)))
        row.add(index, label)
    return list(rows.values())


def _branched(rows: Sequence[_Row]) -> bool:
    """Whether any row is more than a sequence: a single branch continues its context."""
    return any(len(row.branches) > 1 for row in rows)


def reference_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *,
    n_samples: int = PAPER_SAMPLES,
) -> torch.Tensor:  # fmt: skip
    """Reference samples: 500 of 3,000 tokens, fewer positions where the context is shorter."""
    n_positions = min(PAPER_POSITIONS, one_angle_length(model))
    return reference_ids(tokenizer, texts, n_samples=n_samples, n_positions=n_positions)
