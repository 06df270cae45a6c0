"""What a process took: seconds and peak memory. Needs nothing but the standard library."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seconds(function: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], Any]) -> int | None:
    """Most memory that this process held during one call; None where the system does not tell.

    Linux keeps the peak of a process's memory, and sets it back when asked to.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        function()
        return None
    function()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def processor() -> str:
    """The processor's name, or what the system calls its kind."""
    import platform

    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0].split(":")[1].strip()
    return platform.machine()
