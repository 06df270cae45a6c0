"""Several continuations of one context in one forward pass.

A row holds its context's tokens and after them those of its branches, one branch after another. A
branch token stands at the position that it would have right after the context, and sees the
context and its own branch only, so its logits are those of a sequence of its own. Sliding windows
and chunks are measured in positions. Since the mask is changed where transformers builds it, this
needs no code per architecture; whether a model takes it is found out by
:func:`icl_helpers.evaluation.shared_work.shares_context`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int

__all__ = ["Branches", "branching_mask"]

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
            starts = [*range(context)]
            positions.append(
                torch.tensor([*starts, *(context + i for n in branches for i in range(n))])
            )
            owners.append(
                torch.tensor(
                    [0] * context + [k for k, n in enumerate(branches, 1) for _ in range(n)]
                )
            )
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
            own = (owner == 0) | (owner == owners[batch, query])
            return own & mask_function(batch, head, positions[batch, query], positions[batch, key])

        return allowed


_APPLIED: ContextVar[Branches | None] = ContextVar("branches", default=None)


def branching_mask(*, base: Callable[..., Any], **kwargs: Any) -> torch.Tensor | None:
    """A mask function of transformers' mask interface that knows of branches."""
    branches = _APPLIED.get()
    if branches is not None:
        kwargs["mask_function"] = branches.over(kwargs["mask_function"])
        # No mask at all would mean plain causality over the columns.
        kwargs["allow_is_causal_skip"] = False
    mask: torch.Tensor | None = base(**kwargs)
    return mask
