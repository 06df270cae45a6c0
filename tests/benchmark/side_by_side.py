"""Other libraries beside ours, on a real model: first whether they agree, then what they cost.

Each library stands in a process of its own (:mod:`tests.benchmark.libraries`) and waits while
another works, so that they alternate and the peak of memory is each one's own. What a process has
measured it keeps in its file; a run that was stopped goes on from there.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.means import mean_head_outputs
from icl_helpers.attention.scores import prefix_matching_scores, random_sequences
from icl_helpers.errors import InputError, MissingArtefactError
from icl_helpers.evaluation.conditions import conditions
from icl_helpers.files import SMOLLM2, project_root, smollm2_dir
from icl_helpers.models.loading import load_model
from icl_helpers.models.reference_text import reference_ids, reference_texts
from icl_helpers.tasks.prompts import build_prompts
from tests.benchmark.libraries import LIBRARIES
from tests.benchmark.tools import FRACTION, machine, ratio_row, spread_heads

# The shape of SmolLM2-135M, for where its weights are not at hand.
SMOLLM2_SHAPE = LlamaConfig(
    vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
    tie_word_embeddings=True, bos_token_id=0,
)  # fmt: skip
# Task, shots, and the bars: ours over a plain forward pass (at most), stock lm-eval over ours, and
# each other library over ours with heads set to zero (at least).
CASES = {
    "ten shots, two labels": ("wordseq1_binary", 10, 1.0, 2.5, 2.5),
    "twenty shots, four labels": ("wordseq1_4way", 20, 1.1, 2.4, 4.5),
}
CONDITIONS = ("full", "zero", "mean", "seven")
ROUNDS, DOCUMENTS = 5, 4
_SEVEN_BAR, _DIFFERENCE_BAR = 0.75, 1e-4
# Documents whose log-probabilities are compared; the run that compares is the uncounted first one.
_CHECKED = 2
_BATCH, _HEADS, _MEAN_SAMPLES, _MEAN_POSITIONS = 8, 9, 2, 256
_OURS, _PLAIN, _STOCK, _PEERS = (
    "icl_helpers", "plain forward", "stock lm-eval", ("TransformerLens", "nnsight"),
)  # fmt: skip


def measure_side_by_side(
    work: Path,
    *,
    peers_python: Path | None = None,
    rounds: int = ROUNDS,
    documents: int = DOCUMENTS,
    shape: LlamaConfig | None = None,
) -> dict[str, Any]:
    """Check and time every library under every condition; JSON values, and bars as rows.

    ``work`` keeps what is measured until all of it is; ``peers_python`` is the interpreter of the
    environment that holds TransformerLens and nnsight, whose cells say so where there is none.
    ``shape``: random weights of this shape in place of the real model. Raises :class:`InputError`
    for less than one round or document.
    """
    if rounds < 1 or documents < 1:
        raise InputError(f"rounds and documents must be at least 1, got {rounds} and {documents}")
    work.mkdir(parents=True, exist_ok=True)
    plan_path = work / "plan.json"
    plan = _plan(work, documents, shape)
    plan_path.write_text(json.dumps(plan))
    absent: dict[str, str] = {}
    parts: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        workers = {}
        for name in LIBRARIES:
            python = peers_python if name in _PEERS else Path(sys.executable)
            if python is None:
                absent[name] = "not installed for this run"
            else:
                workers[name] = stack.enter_context(_worker(name, python, plan_path, work))
        for name in list(workers):
            _read(workers, name, parts, absent, work)
        for asked in _requests(list(workers), rounds):
            name, cell = asked.pop("library"), f"{asked['case']}/{asked['condition']}"
            found = parts.get(name, {}).get("cells", {}).get(cell, {})
            done = len(found.get("check" if asked["what"] == "check" else "seconds", []))
            if name in absent or done > asked.pop("round"):
                continue
            print(f"{name}: {cell}, {asked['what']} {done + 1}", file=sys.stderr)
            _send(workers[name], asked)
            _read(workers, name, parts, absent, work)
            if name in absent and name not in _PEERS:
                raise RuntimeError(f"{name} {absent[name]}")
    measured = _section(plan, parts, absent, rounds)
    shutil.rmtree(work)
    return measured


def _plan(work: Path, documents: int, shape: LlamaConfig | None) -> dict[str, Any]:
    """What all processes score, and the tensors they need beside it."""
    model, tokenizer, directory, weights = _model(work, shape)
    scores = prefix_matching_scores(model, random_sequences(tokenizer, n_sequences=2)).mean(0)
    at_one, at_three = (
        conditions(scores, fractions=(fraction,), ablations=("zero", "knockout"), full=full)
        for fraction, full in ((0.01, False), (FRACTION, True))
    )
    ids = reference_ids(
        tokenizer, reference_texts("icl-tiny"), n_samples=_MEAN_SAMPLES,
        n_positions=_MEAN_POSITIONS,
    )  # fmt: skip
    means = mean_head_outputs(model, ids)
    save_file({"means": means.contiguous()}, work / "means.safetensors")
    cases = {}
    for name, (task, shots, *_) in CASES.items():
        prompts = build_prompts(task, shots=shots, seed=42)[:documents]
        pairs = [(prompt.context, label) for prompt in prompts for label in prompt.choices]
        cases[name] = {"pairs": pairs, "checked": _CHECKED * len(prompts[0].choices)}
    return {
        "model": weights, "directory": str(directory), "means": str(work / "means.safetensors"),
        "threads": 1, "batch": _BATCH, "documents": documents, "code": _code(), "cases": cases,
        "heads": [list(head) for head in spread_heads(model, _HEADS)],
        # Full, the best heads at 3 %, three random draws, the induction pattern, 1 %.
        "seven": [(c.ablation, [list(head) for head in c.heads]) for c in [*at_three, at_one[0]]],
    }  # fmt: skip


def _model(
    work: Path, shape: LlamaConfig | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path, str]:
    """The real model where it is at hand, else random weights of its shape, and which it is."""
    if shape is None:
        try:
            model, tokenizer = load_model(SMOLLM2, dtype="float32", device="cpu")
        except MissingArtefactError:
            shape = SMOLLM2_SHAPE
        else:
            return model, tokenizer, smollm2_dir(), "SmolLM2-135M, real weights"
    _, tokenizer = load_model("icl-tiny")
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape).eval()
    for part in (model, tokenizer):
        part.save_pretrained(work / "model")
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    return model, tokenizer, work / "model", f"random weights, {layers} layers of {hidden}"


def _code() -> str:
    """Hash of the code that is measured and of the code that measures it."""
    root = project_root()
    files = sorted([*root.glob("icl_helpers/**/*.py"), *root.glob("tests/benchmark/*.py")])
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:24]


def _requests(names: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """The check of every cell, then round by round every cell of one library after the other."""
    for turn in range(-1, rounds):
        for case in CASES:
            for condition in CONDITIONS if turn >= 0 else CONDITIONS[:-1]:
                for name in names:
                    # The plain model is the check's oracle under every condition.
                    oracle = turn < 0 and name == _PLAIN
                    if oracle or condition not in LIBRARIES[name].cannot:
                        yield {
                            "library": name, "case": case, "condition": condition,
                            "what": "time" if turn >= 0 else "check", "round": max(turn, 0),
                        }  # fmt: skip


@contextmanager
def _worker(name: str, python: Path, plan: Path, work: Path) -> Iterator[subprocess.Popen[str]]:
    """One library's process, which ends with the block."""
    command = [python, "-m", "tests.benchmark.libraries", name, plan, work / f"{name}.json"]
    # One thread; nothing is asked of the hub.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (work / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=project_root(), env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _send(process: subprocess.Popen[str], asked: dict[str, Any]) -> None:
    print(json.dumps(asked), file=process.stdin, flush=True)


def _read(
    workers: dict[str, subprocess.Popen[str]],
    name: str,
    parts: dict[str, dict[str, Any]],
    absent: dict[str, str],
    work: Path,
) -> None:
    """Take the library's answer: all it has measured, or why its process ended."""
    line = workers[name].stdout.readline()
    if line:
        parts[name] = json.loads(line)
        return
    said = (work / f"{name}.log").read_text().splitlines()
    absent[name] = f"failed: {said[-1] if said else 'its process ended'}"
    print(f"{name} {absent[name]}", file=sys.stderr)


def _section(
    plan: dict[str, Any], parts: dict[str, Any], absent: dict[str, str], rounds: int
) -> dict[str, Any]:
    """What the page shows: every cell, the check, and the bars."""
    cells = [
        _cell(plan, parts, absent, name, case, condition)
        for case in CASES
        for condition in CONDITIONS
        for name in LIBRARIES
    ]
    return {
        "machine": machine(threads=plan["threads"]), "model": plan["model"], "rounds": rounds,
        "documents": plan["documents"], "batch": plan["batch"], "heads": len(plan["heads"]),
        "trial": rounds < ROUNDS or plan["documents"] < DOCUMENTS,
        "versions": {name: part["versions"] for name, part in parts.items()},
        "cells": cells, "rows": [*_differences(cells), *_bars(parts, absent)],
    }  # fmt: skip


def _cell(
    plan: dict[str, Any],
    parts: dict[str, Any],
    absent: dict[str, str],
    name: str,
    case: str,
    condition: str,
) -> dict[str, Any]:
    cell: dict[str, Any] = {"case": case, "condition": condition, "library": name}
    why = absent.get(name) or LIBRARIES[name].cannot.get(condition)
    if why:
        return {**cell, "cannot": why}
    found = parts[name]["cells"][f"{case}/{condition}"]
    scored = plan["documents"] * (len(plan["seven"]) if condition == "seven" else 1)
    plain = _seconds(parts, _PLAIN, case, "full")
    over = [b / a for a, b in zip(plain, found["seconds"], strict=True)]
    peaks = [peak for peak in found["peak_bytes"] if peak is not None]
    cell |= {
        "documents_per_second": scored / statistics.median(found["seconds"]),
        "over_plain": statistics.median(over) * plan["documents"] / scored,
        "peak_bytes": max(peaks, default=None),
        "sequences": found["sequences"][0] / plan["documents"],
    }
    if name != _PLAIN and condition != "seven":
        (values,), (true,) = found["check"], parts[_PLAIN]["cells"][f"{case}/{condition}"]["check"]
        cell["difference"] = max(abs(a - b) for a, b in zip(values, true, strict=True))
    return cell


def _seconds(parts: dict[str, Any], name: str, case: str, condition: str) -> list[float]:
    return parts[name]["cells"][f"{case}/{condition}"]["seconds"]


def _differences(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far each library's log-probabilities are from those of transformers with plain hooks."""
    rows = []
    for name in LIBRARIES:
        mine = [c["difference"] for c in cells if c["library"] == name and "difference" in c]
        if mine:
            what = f"log-probabilities of {name}: largest difference from plain hooks"
            rows.append(ratio_row(what, "all prompts", _DIFFERENCE_BAR, [max(mine)]))
    return rows


def _bars(parts: dict[str, Any], absent: dict[str, str]) -> list[dict[str, Any]]:
    rows, times = [], partial(_seconds, parts)

    def row(what: str, case: str, bar: float, upper: list[float], lower: list[float], at: str):
        values = [a / b for a, b in zip(upper, lower, strict=True)]
        rows.append(ratio_row(what, case, bar, values, at=at))

    for case, (_, _, over_plain, over_stock, over_peer) in CASES.items():
        plain, ours = times(_PLAIN, case, "full"), times(_OURS, case, "full")
        row("one document, all labels / plain forward of its prompt", case, over_plain, ours,
            plain, "most")  # fmt: skip
        row("documents per second, full model / stock lm-eval", case, over_stock,
            times(_STOCK, case, "full"), ours, "least")  # fmt: skip
        for name in _PEERS:
            if name not in absent:
                row(f"documents per second, zero ablation / {name}", case, over_peer,
                    times(name, case, "zero"), times(_OURS, case, "zero"), "least")  # fmt: skip
        row("seven conditions / seven plain forwards", case, _SEVEN_BAR,
            times(_OURS, case, "seven"), [7 * taken for taken in plain], "most")  # fmt: skip
    return rows
