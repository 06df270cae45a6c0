"""The Hugging Face hub: asked once whether it answers, before anything is fetched from it.

A hub that accepts connections and says nothing would otherwise hold a load for many minutes: every
one of its requests waits, and is tried again.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings

__all__ = ["go_offline", "go_offline_if_hub_unreachable"]

# Seconds for a connection and for an answer; the hub's own client allows as long for a header.
_PATIENCE = 10.0


@functools.lru_cache(maxsize=1)
def go_offline_if_hub_unreachable() -> None:
    """Put this process offline, with a warning, where the hub answers nothing within ten seconds.

    The hub's libraries then use the cache alone and say at once what it lacks. Any answer counts,
    a refusal too. Asked once in a process, and not at all where ``HF_HUB_OFFLINE`` is set.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    # Which HTTP library the client uses, and so which errors it raises, depends on its version.
    except Exception as error:
        warnings.warn(
            f"{constants.ENDPOINT} does not answer ({type(error).__name__}); only the Hugging Face "
            f"cache is used until this process ends",
            stacklevel=3,
        )
        go_offline()


def go_offline() -> None:
    """Have the hub's libraries use the cache alone, in this process and those it starts."""
    from huggingface_hub import constants

    # They read the variable when they are imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
