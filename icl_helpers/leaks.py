"""A scan of files that will be published for what must not be in them.

Access tokens, by their form and by the values in this machine's environment; the home directory;
and the user's name.
"""

from __future__ import annotations

import getpass
import os
import re
from pathlib import Path

from icl_helpers.errors import ICLError

__all__ = ["SECRET", "LeakError", "check_leaks"]

# Forms of Hugging Face, OpenAI-style and GitHub tokens; those with a prefix as short as "sk-" must
# hold a digit, which long hyphenated names do not.
SECRET = re.compile(
    r"(?<![A-Za-z0-9_-])(?:hf_[A-Za-z0-9]{20,}|sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,})"
)
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)
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
    kinds = _forbidden()
    found = [
        f"{path.relative_to(directory)}: {kind}"
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        for kind, pattern in kinds.items()
        if pattern.search(path.read_bytes())
    ]
    if found:
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        raise LeakError(
            f"not to be published as it is; remove this from the notebooks or pages and build "
            f"again: {'; '.join(found[:10])}{more}"
        )


def _forbidden() -> dict[str, re.Pattern[bytes]]:
    """What to look for on this machine, by the words that a message uses for it."""
    found = {"an access token": re.compile(SECRET.pattern.encode())}
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET:
            found[f"the value of {name}"] = re.compile(re.escape(value).encode())
    home = str(Path.home()).rstrip("/")
    if home:
        found["the home directory"] = re.compile(
            rb"(?<![A-Za-z0-9_.-])" + re.escape(home).encode() + rb"(?![A-Za-z0-9_-])"
        )
    user = _user()
    if len(user) >= _SHORTEST_NAME and user.lower() not in _COMMON_NAMES:
        found["the user's name"] = re.compile(
            rb"(?<![A-Za-z0-9])" + re.escape(user).encode() + rb"(?![A-Za-z0-9])"
        )
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
