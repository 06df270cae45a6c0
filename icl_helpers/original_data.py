"""The published repository's data files: fetched, checked against their hashes, cached.

They are not part of this project. ``icl data original`` downloads them from the commit that the
published results belong to; ``--from`` takes them from a local clone instead.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from icl_helpers._paths import cache_dir, user_path
from icl_helpers.errors import MissingArtefactError
from icl_helpers.store import atomic_path

__all__ = ["COMMIT", "HASHES", "fetch_original", "original_data_dir"]

COMMIT = "dbd3743"
_FOLDER = "lm-evaluation-harness/synthetic"
_URL = f"https://raw.githubusercontent.com/JoyC177/Induction_Heads_ICL/{COMMIT}/{_FOLDER}"
_TIMEOUT = 20

HASHES = {
    "centre_embedding_dataset_500.json": (
        "2dfaee255aab6f14673809e6144f0d3dcf9bdacd73a0358e4ab01e0b812c331e"
    ),
    "f_a_f_p_four_way.json": ("f0117ce7cbca3768de435b30afd3f595bb61c70c27ab552e6ca0845bdb8e2a30"),
    "fruit-animal_furniture-profession_500.json": (
        "519f298f447d0b54847e148dfa55151ef25d79916db80bca54e0cc0acaa2111c"
    ),
    "recursion_dataset_500.json": (
        "a9fc3eb2807e659e0517a4c71a985aac757ee52201b1f795eb639a2f0d7baa15"
    ),
    "repetition_dataset_500.json": (
        "abcf0810b1a72deb83c9f52487f293c06d19996ad84880208addc81af0114f5c"
    ),
    "v_v_b_i_four_way.json": ("00c5bd31c0551155f4df93741260222d367cd547067339b6bf55893ca744bf5a"),
    "vegetable-vehicle_body-instrument_500.json": (
        "433bef0dc6fd35b0216e6c32d6a8c1b92535efac2bbbaf731288de1741405fa7"
    ),
}


def original_data_dir() -> Path:
    """The cache: ``$ICL_CACHE_DIR/original`` or ``~/.cache/icl_helpers/original``."""
    return cache_dir() / "original"


def fetch_original(
    *,
    source: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Put the seven files into a directory and return it; None: :func:`original_data_dir`.

    Files that are there already and match their SHA-256 are kept. ``source`` is a clone of the
    published repository, or the directory of the files. Raises :class:`MissingArtefactError`,
    naming the file and where to put it by hand, when one cannot be had or does not match; a file is
    written only when it is whole.
    """
    target = original_data_dir() if cache_dir is None else user_path(cache_dir)
    if source is not None:
        # A wrong source is an error even if nothing is missing any more.
        found = {name: _find(Path(source), name) for name in HASHES}
    for name in tqdm(HASHES, desc="original data", unit="file"):
        path = target / name
        if path.is_file() and _digest(path.read_bytes()) == HASHES[name]:
            continue
        content = _download(name, target) if source is None else found[name].read_bytes()
        if _digest(content) != HASHES[name]:
            raise MissingArtefactError(
                f"{name} does not match its SHA-256 ({HASHES[name][:12]}...): not the file of "
                f"commit {COMMIT}. {_by_hand(name, target)}"
            )
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return target


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _by_hand(name: str, target: Path) -> str:
    return (
        f"Get {_FOLDER}/{name} of github.com/JoyC177/Induction_Heads_ICL at commit {COMMIT} and "
        f"put it into {target}, or run: icl data original --from CLONE"
    )


def _download(name: str, target: Path) -> bytes:
    try:
        with urllib.request.urlopen(f"{_URL}/{name}", timeout=_TIMEOUT) as response:
            content: bytes = response.read()
            return content
    except (urllib.error.URLError, OSError) as error:
        raise MissingArtefactError(
            f"{name} cannot be downloaded ({error}). {_by_hand(name, target)}"
        ) from error


def _find(source: Path, name: str) -> Path:
    for folder in (user_path(source), user_path(source) / _FOLDER):
        if (folder / name).is_file():
            return folder / name
    raise MissingArtefactError(f"{name} is neither in {source} nor in {source / _FOLDER}")
