"""Verification: a random share of a bundle's documents computed again on this machine.

A unit of the draw is a prompt: it is scored under every condition that the bundle has for it, so
that each document of each cell is as likely to be drawn as any other. Means of ablated heads are
the bundle's; everything else (prompts, log-probabilities, prefix-matching scores) is made anew.

Example
-------
>>> print(verify_bundle("book/runs/smollm2-135m", share=0.01, seed=0))
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from icl_helpers.attention.heads import top_heads
from icl_helpers.attention.scores import prefix_matching_scores, random_sequences
from icl_helpers.errors import ICLError, InputError
from icl_helpers.evaluation.cells import CellGroup, build, score_documents
from icl_helpers.evaluation.conditions import Condition
from icl_helpers.evaluation.scorer import InterventionLM
from icl_helpers.models.fingerprint import model_facts, model_key
from icl_helpers.models.loading import load_model
from icl_helpers.run.bundle import Bundle, BundledCell, open_bundle
from icl_helpers.tasks.data import check_rows

__all__ = ["TOLERANCES", "Verification", "verify_bundle"]

# By dtype: the largest difference of a log-probability in nats, and the least share of equal
# answers. Other processors, threads and batches round otherwise; 16 bits keep 3 or 2 digits.
TOLERANCES = {"float32": (1e-3, 0.995), "float16": (0.05, 0.97), "bfloat16": (0.3, 0.95)}


@dataclass(frozen=True)
class Verification:
    """What a verification found; differences are those of log-probabilities, in nats.

    ``largest`` is infinite where one has a value and the other none. ``made`` and ``here`` say on
    what the run and the verification were computed; ``left_out`` what could not be, and why.
    """

    model: str
    documents: int
    of_documents: int
    cells: int
    of_cells: int
    equal_answers: float
    largest: float
    percentile_99: float
    scores_largest: float
    tolerance: float
    least_equal: float
    seed: int
    seconds: float
    made: dict[str, str]
    here: dict[str, str]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether answers, log-probabilities and prefix-matching scores are within tolerance."""
        within = max(self.largest, self.scores_largest) <= self.tolerance
        return within and self.equal_answers >= self.least_equal

    def as_dict(self) -> dict[str, Any]:
        """JSON values; an infinite difference is None."""
        values = {k: None if v == math.inf else v for k, v in asdict(self).items()}
        return values | {"agrees": self.agrees}

    def __str__(self) -> str:
        dtype, device = self.made["dtype"], self.made["device"]
        lines = [
            f"model                {self.model}",
            f"compared             {self.documents:,} of {self.of_documents:,} documents, in "
            f"{self.cells:,} of {self.of_cells:,} cells, seed {self.seed}",
            f"equal answers        {self.equal_answers:.2%} (at least {self.least_equal:.1%})",
            f"log-probabilities    differ by at most {self.largest:.2g} nats, 99 % of documents by "
            f"at most {self.percentile_99:.2g}",
            f"prefix scores        differ by at most {self.scores_largest:.2g}",
            f"tolerance            {self.tolerance:g}, for {dtype}, made on {device} and computed "
            f"again on {self.here['device']}",
            f"seconds              {self.seconds:.0f}",
            *(f"left out             {what}" for what in self.left_out),
            *(f"note                 {what}" for what in self.notes),
            f"verdict              {'agrees' if self.agrees else 'DOES NOT AGREE'}",
        ]
        return "\n".join(lines)


def verify_bundle(
    directory: str | os.PathLike[str],
    *,
    share: float = 0.01,
    seconds: float | None = None,
    seed: int = 0,
    model: str | None = None,
    device: str | None = None,
    data_dir: str | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Compute a share of a bundle's documents again, and compare document by document.

    Parameters
    ----------
    share
        Of the documents of all cells, drawn by ``seed``.
    seconds
        Draw in random order until they are over, loading the model included, and at most ``share``.
    model
        Where the model is, if not at the name that the bundle states.
    data_dir
        Where the rows are of tasks that were read from a directory.
    trust_remote_code
        Run code from the model's repository; a bundle cannot ask for it.

    Raises
    ------
    InputError
        A damaged bundle (see :func:`icl_helpers.import_bundle`), another model, prompts that come
        out otherwise here, or nothing that can be compared.
    MissingArtefactError
        The model is not on this machine.
    """
    if not 0 < share <= 1 or (seconds is not None and seconds <= 0):
        raise InputError(
            f"share must lie in (0, 1] and seconds be positive, got {share}, {seconds}"
        )
    began = time.monotonic()
    bundle = open_bundle(directory)
    info = bundle.json("run.json")
    p = info["parameters"]
    loaded, tokenizer = load_model(
        model or p["model"], revision=p["revision"], dtype=p["dtype"], device=device,
        quantization=p["quantization"], trust_remote_code=trust_remote_code,
    )  # fmt: skip
    here, made = model_key(loaded, tokenizer, p["revision"]), info["identity"]["key"]
    other = [name for name in here if here[name] != made.get(name)]
    if "fingerprint" in other:
        raise InputError(
            f"the model here has other weights than {info['model']} had when the run was made "
            f"(fingerprint {here['fingerprint']}, not {made['fingerprint']})"
        )
    scores = prefix_matching_scores(loaded, random_sequences(tokenizer))
    stated = load_file(bundle.folder / "prefix_scores.safetensors")["prefix_scores"]
    cells = bundle.cells()
    for spec in (cell.spec for cell in cells if cell.spec["condition"].startswith("induction")):
        if spec["heads"] != sorted(map(list, top_heads(stated.mean(0), spec["fraction"]))):
            raise InputError(
                f"bundle {bundle.folder}: cells.parquet has induction heads that are not the "
                f"highest of prefix_scores.safetensors"
            )
    groups, left_out = _groups(cells, data_dir)
    # Of every cell and document: the largest difference, and whether the answer is the same.
    compared: list[tuple[float, bool]] = []
    compared_cells: set[int] = set()
    lm = InterventionLM(loaded, tokenizer)
    until = None if seconds is None else began + seconds
    for group, alike, doc_ids in _drawn(groups, share, seed, until):
        prompts = build(group)
        if prompts.key != alike[0].spec["prompts"]:
            raise InputError(
                f"the prompts of {group.task} ({group.shots} examples, seed {group.seed}) come out "
                f"otherwise here than in bundle {directory}: the rows of {group.data!r} differ"
            )
        conditions = [_condition(cell, bundle) for cell in alike]
        lm.share(conditions)
        for cell, condition in zip(alike, conditions, strict=True):
            again = score_documents(lm, condition, prompts, doc_ids)
            compared += _compared(cell.documents, again)
            compared_cells.add(id(cell))
        lm.forget()
    if not compared:
        raise InputError(f"bundle {directory}: nothing can be compared ({'; '.join(left_out)})")
    tolerance, least = TOLERANCES.get(info["dtype"], TOLERANCES["float32"])
    differences, equal = map(np.array, zip(*compared, strict=True))
    return Verification(
        model=info["model"],
        documents=len(differences),
        of_documents=sum(len(cell.documents["doc_id"]) for cell in cells),
        cells=len(compared_cells),
        of_cells=len(cells),
        equal_answers=float(np.mean(equal)),
        largest=float(differences.max()),
        percentile_99=float(np.quantile(differences, 0.99, method="higher")),
        scores_largest=float((scores - stated).abs().max()),
        tolerance=tolerance,
        least_equal=least,
        seed=seed,
        seconds=round(time.monotonic() - began, 1),
        made=_circumstances(info),
        here=_circumstances(model_facts(loaded)) | {"threads": str(torch.get_num_threads())},
        left_out=tuple(left_out),
        notes=tuple(f"{k} is {here[k]}, not {made.get(k)} as in the run" for k in other),
    )


def _circumstances(facts: dict[str, Any]) -> dict[str, str]:
    versions = {name: facts["versions"].get(name, "") for name in ("torch", "transformers")}
    return {name: str(facts.get(name)) for name in ("device", "dtype", "machine")} | versions


# Cells that share their prompts.
_Group = tuple[CellGroup, list[BundledCell]]


def _groups(cells: Sequence[BundledCell], data_dir: str | None) -> tuple[list[_Group], list[str]]:
    """Cells by their prompts, and what is left out since these cannot be built here."""
    by_prompts: dict[str, list[BundledCell]] = {}
    for cell in cells:
        by_prompts.setdefault(cell.spec["prompts"], []).append(cell)
    groups: list[_Group] = []
    lacking: dict[tuple[str, str], list[BundledCell]] = {}
    for alike in by_prompts.values():
        spec, seed = alike[0].spec, alike[0].seed
        data = spec["data"] if spec["data"] in ("synthetic", "original") else data_dir
        try:
            if data is None:
                raise InputError(f"data_dir is not given, rows came from {spec['data']!r}")
            if seed is None:
                raise InputError("its rows were gone when the bundle was made")
            group = CellGroup.of_spec(spec, seed=seed, data=data)
            check_rows(group.task, data=group.data)
        except ICLError as error:
            lacking.setdefault((spec["task"], str(error)), []).extend(alike)
        else:
            groups.append((group, alike))
    return groups, [
        f"{len(missing)} cells of {task}: {why}" for (task, why), missing in sorted(lacking.items())
    ]


def _drawn(
    groups: Sequence[_Group], share: float, seed: int, until: float | None
) -> Iterator[tuple[CellGroup, list[BundledCell], list[int]]]:
    """Yield groups with documents to compute again; with a limit one, while time is left."""
    documents = [cells[0].documents["doc_id"] for _, cells in groups]
    units = [(number, doc_id) for number, doc_ids in enumerate(documents) for doc_id in doc_ids]
    random.Random(seed).shuffle(units)
    units = units[: math.ceil(share * len(units))]
    batches = [(number, [document]) for number, document in units]
    if until is None:
        by_group: dict[int, list[int]] = {}
        for number, document in units:
            by_group.setdefault(number, []).append(document)
        batches = list(by_group.items())
    took = 0.0
    for count, (number, doc_ids) in enumerate(tqdm(batches, desc="verify", unit="prompts")):
        began = time.monotonic()
        if until is not None and count and began + took > until:
            return
        yield *groups[number], doc_ids
        took = time.monotonic() - began


def _compared(
    stated: dict[str, list[Any]], again: dict[str, list[Any]]
) -> Iterator[tuple[float, bool]]:
    """Of each document that was scored again the largest difference, and whether answers agree."""
    # Blocked pairs are a knockout's, and cells of earlier versions have no number of them.
    exact = {"target", "n_tokens", "n_blocked"} & stated.keys()
    for row, doc_id in enumerate(again["doc_id"]):
        at = stated["doc_id"].index(doc_id)
        same = all(stated[name][at] == again[name][row] for name in exact)
        first, second = stated["log_probabilities"][at], again["log_probabilities"][row]
        pairs = list(zip(first, second, strict=False))
        finite = all((a is None) == (b is None) for a, b in pairs) and len(first) == len(second)
        gaps = [abs(a - b) for a, b in pairs if a is not None and b is not None]
        difference = max(gaps, default=0.0) if same and finite else math.inf
        yield difference, same and _answer(first) == _answer(second)


def _condition(cell: BundledCell, bundle: Bundle) -> Condition:
    condition = Condition.of_spec(cell.spec)
    if condition.ablation == "mean":
        means = bundle.means(condition.heads)
        condition = Condition.of_spec(cell.spec, None if means is None else means[0])
    if not condition.identity().items() <= cell.spec.items():
        raise InputError(f"bundle {bundle.folder} was made by another version: update icl-helpers")
    return condition


def _answer(scores: Sequence[float | None]) -> int | None:
    return None if None in scores else int(np.argmax(np.array(scores)))
