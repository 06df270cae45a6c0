"""What must not be published: taken out of what a run writes, and looked for in finished pages.

Access tokens, by their form and by the values in this machine's environment; in what is about to be
published also the home directory and the user's name.
"""

from __future__ import annotations

import getpass
import json
import os
import re
from contextlib import suppress
from pathlib import Path

from icl_helpers.errors import ICLError

__all__ = ["SECRET", "LeakError", "check_leaks", "redact"]

# Forms of Hugging Face, OpenAI-style and GitHub tokens; those with a prefix as short as "sk-" must
# hold a digit, which long hyphenated names do not. Before one may stand a line break as JSON writes
# it, or the end of a terminal's colour, which tracebacks in notebooks are full of.
# What it begins with comes first, for that is soon looked for.
SECRET = re.compile(
    "|".join(
        rf"{start}(?:(?<![A-Za-z0-9_-]{start})|(?<=\\[nrt]{start})|(?<=\dm{start})){rest}"
        for start, rest in (
            ("hf_", "[A-Za-z0-9]{20,}"),
            ("sk-", r"(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}"),
            ("gh[pousr]_", "[A-Za-z0-9]{20,}"),
        )
    )
)
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)
_REMOVED = "[removed: access token]"
# Shorter values, and user names such as these, are ordinary words.
_SHORTEST_SECRET = 12
_SHORTEST_NAME = 4
_COMMON_NAMES = {"admin", "guest", "home", "jovyan", "nobody", "root", "runner", "user", "ubuntu"}


class LeakError(ICLError, RuntimeError):
    """A file that is about to be published holds a token, the home directory or the user's name."""


def check_leaks(directory: Path) -> None:
    """Read every file below a directory; raise :class:`LeakError` naming those that tell too much.

    The message says what kind of thing was found, never the thing itself.
    """
    # What to look for on this machine, by the words that the message uses for it.
    patterns = {"an access token": SECRET.pattern.encode()}
    for name, value in _environment_secrets().items():
        patterns[f"the value of {name}"] = re.escape(value).encode()
    if home := str(Path.home()).rstrip("/"):
        patterns["the home directory"] = _apart(home, "A-Za-z0-9_.-", "A-Za-z0-9_-")
    user = ""
    with suppress(KeyError, OSError):
        user = getpass.getuser()
    if len(user) >= _SHORTEST_NAME and user.lower() not in _COMMON_NAMES:
        patterns["the user's name"] = _apart(user, "A-Za-z0-9", "A-Za-z0-9")
    leaks = [
        f"{path.relative_to(directory)}: {kind}"
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        for kind, pattern in patterns.items()
        if re.search(pattern, path.read_bytes())
    ]
    if leaks:
        more = f" and {len(leaks) - 10} more" if len(leaks) > 10 else ""
        raise LeakError(
            f"not to be published as it is; remove this from the notebooks or pages and build "
            f"again: {'; '.join(leaks[:10])}{more}"
        )


def _apart(value: str, before: str, after: str) -> bytes:
    """Pattern of a value beside which none of these characters stand; the value comes first."""
    escaped = re.escape(value)
    return rf"{escaped}(?<![{before}]{escaped})(?![{after}])".encode()


def redact(text: str) -> str:
    """A text, plain or JSON, without access tokens, whoever printed them: a word in their place."""
    for value in _environment_secrets().values():
        for form in (value, json.dumps(value)[1:-1]):
            text = text.replace(form, _REMOVED)
    return SECRET.sub(_REMOVED, text)


def _environment_secrets() -> dict[str, str]:
    """Values of the environment that are secret by their name, and long enough to be."""
    return {
        name: value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET
    }
