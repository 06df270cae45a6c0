"""The house: how high it is, how full its rooms are, and that every room can be entered.

That imports point down, and that the package stands without what stands outside it, are contracts
of import-linter in ``pyproject.toml``.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import icl_helpers

PACKAGE = Path(icl_helpers.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_bundle" not in path.parts)


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


MODULES = {module(path): path for path in FILES if path.name != "__init__.py"}


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, in functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in MODULES)
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                if inner in MODULES or node.module in MODULES:
                    yield inner if inner in MODULES else node.module


@cache
def below(name: str) -> frozenset[str]:
    return frozenset(imported(MODULES[name])) - {name}


def longest_chain(name: str, above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The longest chain of imports from a module down; no circle may be in it."""
    assert name not in above, f"a circle of imports: {' > '.join([*above, name])}"
    chains = [longest_chain(other, (*above, name)) for other in sorted(below(name))]
    return (name, *max(chains, key=len, default=()))


def test_longest_chain_of_imports_has_at_most_nine_floors_and_no_circle():
    longest = max(map(longest_chain, MODULES), key=len)
    assert len(longest) <= 9, " > ".join(longest)


def test_top_has_at_most_nine_files_and_a_folder_at_most_seven():
    for folder in {path.parent for path in MODULES.values()}:
        names = sorted(path.name for path in MODULES.values() if path.parent == folder)
        assert len(names) <= (9 if folder == PACKAGE else 7), (folder.name, names)


def test_package_grows_no_further():
    # The goal is 8,600 lines and what new features take; this is how far it has come.
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= 19_754


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported_and_has_the_names_that_it_gives(name):
    loaded = importlib.import_module(name)
    assert [public for public in loaded.__all__ if not hasattr(loaded, public)] == []


def test_every_public_name_of_the_package_is_where_it_says():
    assert [name for name in icl_helpers.__all__ if not hasattr(icl_helpers, name)] == []


def test_names_in_the_examples_of_docstrings_are_public():
    used = {
        name
        for path in FILES
        for line in path.read_text().splitlines()
        if line.lstrip().startswith((">>>", "..."))
        for name in re.findall(r"\bicl\.(\w+)", line)
    }
    assert used - set(icl_helpers.__all__) == set()
