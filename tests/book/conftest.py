"""The book that tests in a browser read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def book_pages(request) -> Path:
    """Folder of the pages: the book in ICL_BOOK, or one that the tests build."""
    given = os.environ.get("ICL_BOOK")
    return Path(given).resolve() if given else request.getfixturevalue("built")
