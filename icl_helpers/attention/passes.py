"""One forward pass as the hook sees it: ids and positions, its calls, and branches of a context.

Positions come from the arguments of the pass itself, noted wherever a model can be entered: the
model, its base model, its decoder (OPT's base model, for one, is bypassed). A pass that would make
a number out of unedited heads or of wrong positions ends in an :class:`InterventionError`, and
token ids and positions that a model has not are refused before it.

Branches are several continuations of one context in one pass. A row holds its context's tokens and
after them those of its branches, one branch after another. A branch token stands at the position
that it would have right after the context, and sees the context and its own branch only, so its
logits are those of a sequence of its own. Sliding windows and chunks are measured in positions.
Since the mask is changed where transformers builds it, this needs no code per architecture; whether
a model takes it is found out by :func:`icl_helpers.evaluation.shared_work.shares_context`.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedModel

from icl_helpers.errors import InputError, InterventionError, UnsupportedArchitectureError

__all__ = [
    "SUPPORTED_ARCHITECTURES", "AttentionCall", "AttentionLayout", "Branches", "Passes",
    "attention_probabilities", "branching_mask", "check_ids", "check_tokens", "check_usable",
    "context_length", "forget_lengths", "learned_positions", "measuring", "one_angle_length",
    "position_limit",
    "rope_switch",
]  # fmt: skip

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def measuring(measure: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate what measures a model, its first argument: no gradients and no dropout.

    The model's modules that were in training mode are so again afterwards.
    """

    @functools.wraps(measure)
    @torch.no_grad()
    def measured(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        model: Any = args[0] if args else kwargs.get("model")
        modules = model.modules() if isinstance(model, torch.nn.Module) else ()
        in_training = [module for module in modules if module.training]
        for module in in_training:
            module.training = False
        try:
            return measure(*args, **kwargs)
        finally:
            for module in in_training:
                module.training = True

    return measured


@dataclass(frozen=True)
class AttentionLayout:
    """The attention modules of a model, layer by layer, and the shape of their heads.

    ``cacheable``: the model attends from a cache as it does in one pass. ``max_positions`` is the
    length of its table of positions, None without one; ``rope_switch`` as in :func:`rope_switch`.
    """

    modules: tuple[torch.nn.Module, ...]
    n_heads: int
    d_head: int
    cacheable: bool = True
    max_positions: int | None = None
    rope_switch: tuple[int, bool] | None = None

    @property
    def n_layers(self) -> int:
        """Number of attention layers."""
        return len(self.modules)


class Passes:
    """The edits of a model, and the forward pass that is under way in this thread.

    ``edits`` says what is done to the output of each attention module; ``required`` are the modules
    that must be called exactly once per pass.
    """

    def __init__(self, layout: AttentionLayout) -> None:
        self.edits: Mapping[torch.nn.Module, list[Callable[..., torch.Tensor]]] = {}
        self.required: frozenset[torch.nn.Module] = frozenset()
        self.thread = threading.get_ident()
        self.completed = 0
        self._layout = layout
        self._depth = 0
        self._arguments: dict[str, Any] = {}
        self._offset = 0
        self._fired: set[torch.nn.Module] = set()
        self._ordered = False
        self._positions: tuple[Int[torch.Tensor, "batch query"], int] | None = None

    @contextmanager
    def watching(self, parts: Iterable[PreTrainedModel]) -> Iterator[None]:
        """Note every pass of a model inside the block, whichever of these parts is called."""
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.register_forward_pre_hook(self._begin, with_kwargs=True))
                stack.enter_context(part.register_forward_hook(self._end, always_call=True))
            yield

    def check_thread(self) -> None:
        """Raise :class:`InterventionError` in any thread but the one that installed the edits."""
        if threading.get_ident() != self.thread:
            raise InterventionError(
                "another thread has interventions installed on this model; use one thread at a "
                "time, or load a model for each thread"
            )

    def _begin(self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: Any) -> None:
        self.check_thread()
        self._depth += 1
        if self._depth == 1:
            self._arguments, self._offset, self._ordered, self._positions = {}, 0, False, None
            self._fired.clear()
        # Reading a signature takes longer than anything else here, and few calls need it.
        names = list(inspect.signature(module.forward).parameters) if args else []
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        self._arguments |= {name: value for name, value in named.items() if value is not None}
        cache = named.get("past_key_values")
        if cache is not None and hasattr(cache, "get_seq_length"):
            self._offset = int(cache.get_seq_length())
        if self._depth == 1 and self.required:
            self._check_pass(module)

    def _check_pass(self, module: PreTrainedModel) -> None:
        layout, switch = self._layout, self._layout.rope_switch
        repeats = module.training and torch.is_grad_enabled()
        if repeats and any(getattr(m, "gradient_checkpointing", False) for m in module.modules()):
            raise InterventionError(
                "gradient checkpointing runs layers a second time, when interventions may be gone; "
                "call model.gradient_checkpointing_disable() or model.eval() first"
            )
        if self._offset and not layout.cacheable:
            raise InterventionError(
                f"{type(module).__name__} gives other attention from a cache than in one pass; "
                f"pass whole sequences with use_cache=False"
            )
        ids = self._arguments.get("input_ids", self._arguments.get("inputs_embeds"))
        if "input_ids" in self._arguments:
            check_tokens(module, self._arguments["input_ids"])
        end = self._offset + (0 if ids is None else ids.shape[1])
        if switch is not None and not self._offset:
            forget_lengths(module)
        branches = _APPLIED.get()
        if branches is not None:  # side by side in columns, but not in positions
            end = int(branches.positions.max()) + 1
        if self._offset and switch is not None:
            trained, grows = switch
            if end > trained and (grows or self._offset <= trained):
                raise InterventionError(
                    f"keys in the cache were turned for {self._offset} tokens, and the model turns "
                    f"them otherwise in sequences of {end}, beyond its trained {trained}; pass "
                    f"whole sequences with use_cache=False"
                )
        if layout.max_positions is not None and end > layout.max_positions:
            raise InputError(
                f"the pass reaches position {end - 1}, but the model has positions "
                f"0..{layout.max_positions - 1}; use shorter prompts or generate fewer tokens"
            )

    def _end(self, module: torch.nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self._depth -= 1
        if self._depth:
            return
        self._arguments = {}
        if output is None:  # the pass ended in an exception
            return
        missed = len(self.required - self._fired)
        if missed:
            raise InterventionError(
                f"{missed} of {len(self.required)} edited layers of {type(module).__name__} were "
                f"not reached in a forward pass; compiled, replaced and skipped layers, or another "
                f"attention implementation set meanwhile, cannot be edited"
            )
        self.completed += 1

    def at(
        self, module: torch.nn.Module, n_query: int, n_key: int
    ) -> list[Callable[..., torch.Tensor]]:
        """The edits of this module, which is being called; it sees so many queries and keys."""
        self.check_thread()
        if module in self.required:
            if not self._depth or module in self._fired:
                raise InterventionError(
                    f"{type(module).__name__} was called outside of a forward pass of the model, "
                    f"or twice in one; call the model itself, and switch gradient checkpointing off"
                )
            # Moshi's cache keeps a window of keys, its attention in one pass does not.
            file = sys.modules.get(type(module).__module__)
            windows = any(hasattr(file, f"create_{kind}_causal_mask") for kind in _WINDOWS)
            if n_key < self._offset + n_query and not windows:
                raise InterventionError(
                    f"the cache has dropped keys that {type(module).__name__} sees in one pass; "
                    f"pass whole sequences with use_cache=False"
                )
            self._fired.add(module)
        return self.edits.get(module, [])

    def offset(self, n_query: int, n_key: int) -> int:
        """Position of the pass's first token, given the lengths that the attention sees.

        Raises :class:`InterventionError` unless token i of every prompt stands at position i.
        """
        if not self._ordered and _APPLIED.get() is None:  # branches have positions of their own
            self._check_order(n_query)
        self._ordered = True
        # Only a cache of fixed size holds more keys than there were tokens.
        fixed = getattr(self._arguments.get("past_key_values"), "is_compileable", False)
        if n_key > self._offset + n_query and not fixed:
            raise InterventionError(
                f"the attention sees {n_key} keys, but the pass has {n_query} tokens after "
                f"{self._offset} in its cache; pass whole sequences with use_cache=False"
            )
        return self._offset

    def positions(self, n_query: int, n_key: int) -> tuple[Int[torch.Tensor, "batch query"], int]:
        """Each prompt's positions, and the last of them; raises as :meth:`offset` does."""
        offset = self.offset(n_query, n_key)
        if self._positions is None:
            branches = _APPLIED.get()
            if branches is None:
                where = torch.arange(offset, offset + n_query)[None]
            else:
                where = branches.positions[:, offset : offset + n_query]
            self._positions = where, int(where.max())
        return self._positions

    def _check_order(self, n_query: int) -> None:
        mask, ids = self._arguments.get("attention_mask"), self._arguments.get("position_ids")
        end = self._offset + n_query
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            mask = None
        wrong = mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any())
        if ids is not None and not wrong:
            differs = ids != torch.arange(self._offset, end, device=ids.device)
            if mask is not None and mask.shape[1] == end:
                differs = differs & mask[:, self._offset :].bool().to(ids.device)
            wrong = bool(differs.any())
        if wrong:
            raise InterventionError(
                "padding on the left, gaps in attention_mask and position_ids other than 0, 1, 2, "
                "... cannot be combined with mean ablation or knockout, which go by the place of a "
                "token in its prompt; pad on the right and generate for prompts of one length, or "
                "one at a time"
            )


# Of masks that end where such a cache does; the file of an attention imports their functions.
_WINDOWS = ("sliding_window", "chunked")
_WAYS_OUT = {
    "PeftModel": "pass model.merge_and_unload(), or model.get_base_model() with its adapter active",
    "OptimizedModule": "pass the model that was compiled, model._orig_mod",
    "DataParallel": "pass the model inside, model.module",
    "DistributedDataParallel": "pass the model inside, model.module",
    "FullyShardedDataParallel": "pass a model that is loaded whole",
}


def check_usable(model: PreTrainedModel) -> None:
    """Raise :class:`UnsupportedArchitectureError` where edits might not reach the model's heads.

    It is wrapped, compiled, spread over processes, or without weights.
    """
    if not isinstance(model, PreTrainedModel):
        kinds = [kind.__name__ for kind in type(model).__mro__]
        ways = [_WAYS_OUT[kind] for kind in kinds if kind in _WAYS_OUT]
        raise UnsupportedArchitectureError(
            f"expected a transformers model, got {kinds[0]}; "
            + (ways[0] if ways else "load it with load_model or transformers' AutoModelForCausalLM")
        )
    if model.device.type == "meta":
        raise UnsupportedArchitectureError(
            "the model is on the meta device, its first weights are elsewhere or have no values; "
            "load it again with a device_map that keeps its embedding on a device"
        )
    processes = getattr(model, "_tp_size", None) or 1
    if processes > 1:
        raise UnsupportedArchitectureError(
            f"the model's heads are spread over {processes} processes (tensor parallel), each "
            f"of which sees only its own; load it without tp_plan, or with device_map='auto'"
        )
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if (
            module._compiled_call_impl is not None
            or "_orig_mod" in module._modules
            or (forward is not None and hasattr(forward, "_torchdynamo_orig_callable"))
        ):
            name = next(name for name, other in model.named_modules() if other is module)
            raise UnsupportedArchitectureError(
                f"{name or 'the model'} ({type(module).__name__}) is compiled, and a compiled "
                f"layer may leave edits out; load the model again and do not compile it"
            )


SUPPORTED_ARCHITECTURES = (
    "llama, internlm2, mistral, mixtral, qwen2, qwen3, gemma2, gemma3, phi3, gpt2, gpt_neox, opt, "
    "olmo2, gpt_oss and other decoders that transformers sends through its AttentionInterface"
)


@dataclass
class AttentionCall:
    """What one layer's attention was called with, and what it returned.

    ``query`` is [batch, heads, query, d_head]; ``key`` and ``value`` are [batch, kv_heads, key,
    d_head]; ``mask`` is None (causal), boolean (True = may attend) or additive, broadcastable to
    [batch, heads, query, key]; ``output`` is [batch, query, heads, d_head].
    """

    module: torch.nn.Module
    query: Float[torch.Tensor, "batch heads query d_head"]
    key: Float[torch.Tensor, "batch kv_heads key d_head"]
    value: Float[torch.Tensor, "batch kv_heads key d_value"]
    mask: torch.Tensor | None
    kwargs: dict[str, Any]
    output: Float[torch.Tensor, "batch query heads d_value"]
    passes: Passes

    @property
    def offset(self) -> int:
        """Number of tokens before this pass, in the cache: the first query token's position."""
        return self.passes.offset(self.query.shape[2], self.key.shape[2])

    @property
    def positions(self) -> tuple[Int[torch.Tensor, "batch query"], int]:
        """Where each prompt's tokens stand (one row for all alike), and the last position."""
        return self.passes.positions(self.query.shape[2], self.key.shape[2])


def attention_probabilities(
    call: AttentionCall,
    *,
    heads: Sequence[int] | None = None,
    blocked: Bool[torch.Tensor, "... query key"] | None = None,
) -> Float[torch.Tensor, "batch chosen query key"]:
    """Attention of the chosen heads (default: all) in float32, from the call's query and key.

    Honours the call's mask, scaling, logit soft-capping and attention sinks. ``blocked`` forbids
    further query-key pairs; a query with nothing left to attend to gets a row of zeros.
    """
    if call.kwargs.get("position_bias") is not None:
        raise UnsupportedArchitectureError(
            f"{type(call.module).__name__} adds a position bias to its attention, which is not "
            f"supported here; supported: {SUPPORTED_ARCHITECTURES}"
        )
    (_, n_heads, n_query, _), (_, n_kv, n_key, _) = call.query.shape, call.key.shape
    indices = torch.arange(n_heads) if heads is None else torch.as_tensor(heads)
    indices = indices.to(call.query.device)
    query = call.query[:, indices]
    # Grouped queries share keys: head h reads key-value head h // (n_heads // n_kv).
    key = call.key[:, indices // (n_heads // n_kv)]
    scaling = call.kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = (torch.matmul(query, key.transpose(2, 3)) * scaling).float()
    softcap = call.kwargs.get("softcap")
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    mask, is_causal = call.mask, call.kwargs.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and n_query > 1 and causal:
        # What SDPA applies by itself when it is handed none.
        mask = torch.ones(n_query, n_key, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = mask[..., :n_key]
        mask = mask[:, indices] if mask.ndim == 4 and mask.shape[1] > 1 else mask
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, -torch.inf)
        else:
            # An additive mask forbids with the lowest finite number; minus infinity is certain.
            lowest = torch.finfo(mask.dtype).min
            logits = logits + mask.float().masked_fill(mask <= lowest, -torch.inf)
    empty = None
    if blocked is not None:
        logits = logits.masked_fill(blocked.unsqueeze(-3).to(logits.device), -torch.inf)
        # Softmax of a row of minus infinities would be NaN: such a query attends to nothing.
        empty = torch.isneginf(logits).all(dim=-1, keepdim=True)
    sinks = call.kwargs.get("s_aux")
    if sinks is not None:
        column = sinks[indices].float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.softmax(torch.cat([logits, column], dim=-1), dim=-1)[..., :-1]
    probabilities = torch.softmax(logits, dim=-1)
    return probabilities if empty is None else probabilities.masked_fill(empty, 0.0)


# Like any index into a tensor, these take whole numbers or tensors of them.
_MaskFunction = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class Branches:
    """The columns of a batch: where each token stands, and to whom it belongs.

    ``owners`` is 0 for a context's tokens, 1, 2, ... for those of its branches, -1 for padding.
    """

    positions: Int[torch.Tensor, "batch columns"]
    owners: Int[torch.Tensor, "batch columns"]

    @classmethod
    def of(
        cls, shapes: Sequence[tuple[int, Sequence[int]]], device: torch.device | str
    ) -> Branches:
        """For rows of (tokens of the context, tokens of each branch), padded on the right."""
        positions, owners = [], []
        for context, branches in shapes:
            behind = [context + i for n in branches for i in range(n)]
            positions.append(torch.tensor([*range(context), *behind]))
            theirs = [branch for branch, n in enumerate(branches, 1) for _ in range(n)]
            owners.append(torch.tensor([0] * context + theirs))
        pad = torch.nn.utils.rnn.pad_sequence
        # Padding stands at position 0, which every model and every table of means has.
        return cls(
            pad(positions, batch_first=True).to(device),
            pad(owners, batch_first=True, padding_value=-1).to(device),
        )

    def arguments(self, first: int) -> dict[str, torch.Tensor]:
        """Arguments for a forward pass over the columns from ``first`` on, the others cached."""
        # Without any mask transformers takes positions that go back for packed sequences.
        return {
            "position_ids": self.positions[:, first:],
            "attention_mask": torch.ones_like(self.owners),
        }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Shape the masks of forward passes inside the block, which run the hooked attention."""
        token = _APPLIED.set(self)
        try:
            yield
        finally:
            _APPLIED.reset(token)

    def over(self, mask_function: _MaskFunction) -> _MaskFunction:
        """A model's own mask function, kept from one branch to another."""

        def allowed(batch: Any, head: Any, query: Any, key: Any) -> Any:
            positions, owners = self.positions.to(key.device), self.owners.to(key.device)
            owner = owners[batch, key]
            seen = (owner == 0) | (owner == owners[batch, query])
            return seen & mask_function(batch, head, positions[batch, query], positions[batch, key])

        return allowed


_APPLIED: ContextVar[Branches | None] = ContextVar("branches", default=None)


def branching_mask(*, base: Callable[..., Any], **kwargs: Any) -> torch.Tensor | None:
    """A mask function of transformers' mask interface that knows of branches."""
    branches = _APPLIED.get()
    if branches is not None:
        kwargs["mask_function"] = branches.over(kwargs["mask_function"])
        # No mask at all would mean plain causality over the columns.
        kwargs["allow_is_causal_skip"] = False
    return base(**kwargs)


_POSITION_TABLE = re.compile(r"(?!.*(vision|visual|image|audio|rel)).*(pos|wpe)[^.]*$")


def learned_positions(model: PreTrainedModel) -> int | None:
    """Rows of the model's table of positions that tokens can reach; None: it has no table."""
    lengths = []
    for name, table in model.named_modules():
        if isinstance(table, torch.nn.Embedding) and _POSITION_TABLE.match(name):
            # Position 0 of OPT and Bart is in row 2, of RoBERTa behind the padding.
            behind = None if table.padding_idx is None else table.padding_idx + 1
            lengths.append(table.num_embeddings - (behind or int(getattr(table, "offset", 0))))
    return min(lengths, default=None)


def position_limit(model: PreTrainedModel) -> int | None:
    """Most tokens that configuration and table of positions allow; None: neither says."""
    config = model.config.get_text_config()
    fields = ("max_position_embeddings", "n_positions", "n_ctx")
    stated = [v for v in (getattr(config, f, None) for f in fields) if isinstance(v, int) and v > 0]
    known = [*stated[:1], learned_positions(model)]
    return min((limit for limit in known if limit is not None), default=None)


def rope_switch(model: PreTrainedModel) -> tuple[int, bool] | None:
    """Length beyond which rotary angles follow a sequence's, and whether at every token."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if part.get("rope_type") in ("longrope", "dynamic"):
            trained = part.get("original_max_position_embeddings", config.max_position_embeddings)
            return int(trained), part["rope_type"] == "dynamic"
    return None


def forget_lengths(model: PreTrainedModel) -> None:
    """Set dynamic rotary angles, which stay those of the longest sequence so far, to the start."""
    switch = rope_switch(model)
    for module in model.modules() if switch is not None and switch[1] else ():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            trained = getattr(module, f"{prefix}original_inv_freq", None)
            if trained is not None:
                module.register_buffer(
                    f"{prefix}inv_freq", trained.to(model.device), persistent=False
                )
                setattr(module, name, module.original_max_seq_len)


def one_angle_length(model: PreTrainedModel) -> int:
    """Most tokens in a sequence whose rotary angles are those of a shorter one."""
    switch = rope_switch(model)
    return context_length(model) if switch is None else min(context_length(model), switch[0])


def check_tokens(model: PreTrainedModel, ids: Int[torch.Tensor, ...]) -> None:
    """Raise :class:`InputError` for token ids that the model has not."""
    rows = model.get_input_embeddings().num_embeddings
    for worst in (int(ids.min()), int(ids.max())) if ids.numel() else ():
        if not 0 <= worst < rows:
            raise InputError(
                f"token id {worst} is not one of the model's 0..{rows - 1}; use the model's own "
                f"tokenizer, and a BOS token that it has (bos_token_id)"
            )


def check_ids(model: PreTrainedModel, ids: torch.Tensor, *, way_out: str) -> None:
    """Raise :class:`InputError` for ids that are not [batch, tokens] of this model's tokens."""
    if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point() or ids.is_complex():
        raise InputError(
            f"token ids must be whole numbers of shape [batch, tokens], at least one, got "
            f"{ids.dtype} of shape {list(ids.shape)}"
        )
    check_tokens(model, ids)
    limit = position_limit(model)
    if limit is not None and ids.shape[1] > limit:
        raise InputError(
            f"sequences of {ids.shape[1]} tokens are longer than the model's context of {limit}; "
            f"{way_out}"
        )


def context_length(model: PreTrainedModel) -> int:
    """Most tokens that the model allows in one sequence; 2,048 where nothing in it says."""
    return position_limit(model) or 2048
