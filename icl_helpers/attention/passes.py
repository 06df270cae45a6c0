"""The forward passes that run while a model is edited: where each starts, that each ran whole.

Positions come from the arguments of the pass itself, noted wherever a model can be entered: the
model, its base model, its decoder (OPT's base model, for one, is bypassed). A pass that would make
a number out of unedited heads or of wrong positions ends in an :class:`InterventionError`.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from icl_helpers.errors import InputError, InterventionError, UnsupportedArchitectureError

__all__ = ["Passes", "check_usable"]


class Passes:
    """The edits of a model, and the forward pass that is under way in this thread.

    ``edits`` says what is done to the output of each attention module; ``required`` are the modules
    that must be called exactly once per pass. The rest is what
    :class:`icl_helpers.attention.hook.AttentionLayout` says of the model.
    """

    def __init__(
        self,
        *,
        cacheable: bool = True,
        max_positions: int | None = None,
        rope_switch: tuple[int, bool] | None = None,
    ) -> None:
        self.edits: Mapping[torch.nn.Module, list[Callable[..., torch.Tensor]]] = {}
        self.required: frozenset[torch.nn.Module] = frozenset()
        self.thread = threading.get_ident()
        self.completed = 0
        self._cacheable, self._max_positions = cacheable, max_positions
        self._rope_switch = rope_switch
        self._depth = 0
        self._given: dict[str, Any] = {}
        self._offset = 0
        self._fired: set[torch.nn.Module] = set()
        self._ordered = False

    @contextmanager
    def watching(self, parts: Iterable[PreTrainedModel]) -> Iterator[None]:
        """Note every pass of a model inside the block, whichever of these parts is called."""
        handles = []
        try:
            for part in parts:
                handles.append(part.register_forward_pre_hook(self._begin, with_kwargs=True))
                handles.append(part.register_forward_hook(self._end, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

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
            self._given, self._offset, self._ordered = {}, 0, False
            self._fired.clear()
        # Reading a signature takes longer than anything else here, and few calls need it.
        names = list(inspect.signature(module.forward).parameters) if args else []
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self._given |= {name: value for name, value in given.items() if value is not None}
        cache = given.get("past_key_values")
        if cache is not None and hasattr(cache, "get_seq_length"):
            self._offset = int(cache.get_seq_length())
        if self._depth == 1 and self.required:
            self._check_pass(module)

    def _check_pass(self, module: PreTrainedModel) -> None:
        if module.training and torch.is_grad_enabled() and _checkpoints(module):
            raise InterventionError(
                "gradient checkpointing runs layers a second time, when interventions may be gone; "
                "call model.gradient_checkpointing_disable() or model.eval() first"
            )
        if self._offset and not self._cacheable:
            raise InterventionError(
                f"{type(module).__name__} gives other attention from a cache than in one pass; "
                f"pass whole sequences with use_cache=False"
            )
        ids = self._given.get("input_ids", self._given.get("inputs_embeds"))
        end = self._offset + (0 if ids is None else ids.shape[1])
        if self._offset and self._rope_switch is not None:
            trained, grows = self._rope_switch
            if end > trained and (grows or self._offset <= trained):
                raise InterventionError(
                    f"keys in the cache were turned for {self._offset} tokens, and the model turns "
                    f"them otherwise in sequences of {end}, beyond its trained {trained}; pass "
                    f"whole sequences with use_cache=False"
                )
        if self._max_positions is not None and end > self._max_positions:
            raise InputError(
                f"the pass reaches position {end - 1}, but the model has positions "
                f"0..{self._max_positions - 1}; use shorter prompts or generate fewer tokens"
            )

    def _end(self, module: torch.nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self._depth -= 1
        if self._depth:
            return
        self._given = {}
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
            if n_key < self._offset + n_query and not _windows(module):
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
        if not self._ordered:
            self._check_order(n_query)
            self._ordered = True
        # Only a cache of fixed size holds more keys than there were tokens.
        fixed = getattr(self._given.get("past_key_values"), "is_compileable", False)
        if n_key > self._offset + n_query and not fixed:
            raise InterventionError(
                f"the attention sees {n_key} keys, but the pass has {n_query} tokens after "
                f"{self._offset} in its cache; pass whole sequences with use_cache=False"
            )
        return self._offset

    def _check_order(self, n_query: int) -> None:
        mask, ids = self._given.get("attention_mask"), self._given.get("position_ids")
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


def _checkpoints(model: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _windows(attention: torch.nn.Module) -> bool:
    """Whether the file of this attention makes masks that end where such a cache does."""
    file = sys.modules.get(type(attention).__module__)
    names = ("create_sliding_window_causal_mask", "create_chunked_causal_mask")
    return any(hasattr(file, name) for name in names)


_WAYS_OUT = {
    "PeftModel": "pass model.merge_and_unload(), or model.get_base_model() with its adapter active",
    "OptimizedModule": "pass the model that was compiled, model._orig_mod",
    "DataParallel": "pass the model inside, model.module",
    "DistributedDataParallel": "pass the model inside, model.module",
    "FullyShardedDataParallel": "pass a model that is loaded whole",
}


def check_usable(model: PreTrainedModel) -> None:
    """Raise :class:`UnsupportedArchitectureError` where edits might not reach the model's heads.

    Wrapped models, models or layers that are compiled, and models whose heads are spread over
    several processes.
    """
    if not isinstance(model, PreTrainedModel):
        kinds = [kind.__name__ for kind in type(model).__mro__]
        ways = [_WAYS_OUT[kind] for kind in kinds if kind in _WAYS_OUT]
        raise UnsupportedArchitectureError(
            f"expected a transformers model, got {kinds[0]}; "
            + (ways[0] if ways else "load it with load_model or transformers' AutoModelForCausalLM")
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
