"""Shared fixtures: tiny random models and an attention oracle that knows nothing of the package."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from icl_helpers.kernels import NEEDLESS

# What takes long to import is imported where it is used: the process that hands out the tests to
# others runs none of them.
if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Before torch is imported, and for every process that a test starts: the tests share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Until the tests are collected.
gc.disable()
sys.modules.setdefault(NEEDLESS, None)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

DESCRIPTION = "Classify each sequence."


def make_tokenizer(texts: list[str], vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_llama(**changes: object) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention; large weights, so that edits show."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, object] = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order tests for processes that begin with an equal share each, and take from others then.

    What needs the run of all stages comes first in one share, so that no process waits for another
    to make it; the other shares begin with what is slow by itself.
    """
    modules: dict[Path, list[pytest.Item]] = {}
    for item in items:
        modules.setdefault(item.path, []).append(item)
    shared, slow, fast = [], [], []
    for tests in modules.values():
        of_run = any(
            test.get_closest_marker("of_run") or "offline_run" in getattr(test, "fixturenames", ())
            for test in tests
        )
        is_slow = any(test.get_closest_marker("slow") for test in tests)
        (shared if of_run else slow if is_slow else fast).extend(tests)
    others = max(1, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) - 1)
    of_each = -(-len(slow) // others)
    shares = [shared, *(slow[i * of_each : (i + 1) * of_each] for i in range(others))]
    for share in shares:
        rest = max(0, len(items) // len(shares) - len(share))
        share += fast[:rest]
        del fast[:rest]
    items[:] = [*itertools.chain(*shares), *fast]
    # What is there by now is never given back: no collection, and there are many, need look at it.
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache neither helps nor hurts: a test that needs one fills it itself."""
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_process_for_kernels() -> Iterator[None]:
    """Notebooks' kernels are forked from one process, not from one for each test."""
    from icl_helpers import kernels
    from tests.commands import Kernels

    with pytest.MonkeyPatch.context() as patch:
        ahead = Kernels()
        patch.setattr(kernels, "_ahead", ahead)
        yield
        ahead.end()


# Any connection that is opened or name that is looked up is an error.
NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError(f"the network was used: {args}")
allowed = ("127.0.0.1", "localhost", "0.0.0.0", "::1", None, "")
connect, lookup = socket.socket.connect, socket.getaddrinfo
def guarded_connect(self, address):
    host = address[0] if isinstance(address, tuple) else None
    return connect(self, address) if host in allowed else refuse(address)
def guarded_lookup(host, *rest, **named):
    return lookup(host, *rest, **named) if host in allowed else refuse(host)
socket.socket.connect, socket.getaddrinfo = guarded_connect, guarded_lookup
"""


def offline(folder: Path) -> dict[str, str]:
    """An environment with an empty cache, no hub, and a Python that refuses the network."""
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    (folder / "empty").mkdir()
    path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "ICL_CACHE_DIR")}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "empty"),
        "ICL_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": path.rstrip(os.pathsep),
        "OMP_NUM_THREADS": "1",
    }


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first process of this session that wants it makes; others wait for it."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, finished = base / name, base / f"{name}.finished"
    with FileLock(base / f"{name}.lock"):
        if not finished.exists():
            # Of another process, which failed; its error need not be this one's.
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            finished.touch()
    return folder


@pytest.fixture(scope="session")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all stages of a few documents, run by the command, without a network.

    The run is in ``runs/icl-tiny``, what the command printed in ``stdout`` and ``stderr``.
    """

    def make(folder: Path) -> None:
        command = [
            sys.executable, "-m", "icl_helpers.cli", "run", "--limit", "4", "--tasks",
            "repetition,wordseq1_binary", "--shots", "0,5", "--seeds", "42", "--ablation-seeds",
            "42", "--analysis-limit", "2", "--analysis-tasks", "repetition", "--run-dir", str(folder / "runs" / "icl-tiny"),
        ]  # fmt: skip
        environment = offline(folder)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        (folder / "stdout").write_bytes(done.stdout)
        (folder / "stderr").write_bytes(done.stderr)

    return made_once(tmp_path_factory, "offline-run", make)


@pytest.fixture(scope="session")
def run_dir(offline_run: Path) -> Path:
    """All stages on a few documents, by papermill. Not to be changed: copy it."""
    return offline_run / "runs" / "icl-tiny"


@pytest.fixture(scope="session")
def built(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book of that run and of a second one."""
    from tests.commands import Command

    def make(folder: Path) -> None:
        for name in ("icl-tiny", "second-model"):
            shutil.copytree(run_dir, folder / "runs" / name)
        command = ("book", "--runs", str(folder / "runs"), "--out", str(folder / "out"))
        begun = Command(*command, errors=folder / "errors")
        assert begun.wait() == 0, begun.errors[-3000:]

    return made_once(tmp_path_factory, "book", make) / "out" / "html"


@pytest.fixture
def refuses_a_file(tmp_path, monkeypatch, capfd) -> Callable[..., None]:
    """Check that a command in whose way the file ``a-file`` lies says so and leaves it alone."""

    def check(main: Callable[[list[str]], int], command: list[str], message: str) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a-file").write_text("mine")
        assert main(command) == 2
        printed = capfd.readouterr().err
        assert message in printed
        assert "Traceback" not in printed
        assert os.listdir(tmp_path) == ["a-file"]

    return check


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    import icl_helpers as icl

    texts = [p.context for p in icl.build_prompts("wordseq1_binary", shots=5, seed=1)[:100]]
    texts += [p.context for p in icl.build_prompts("repetition", shots=5, seed=1)[:50]]
    return make_tokenizer(texts)
