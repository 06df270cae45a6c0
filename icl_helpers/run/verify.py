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
from icl_helpers.evaluation.cells import CellGroup, Prompts, build, score_documents
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
    notes = _compare_keys(info, model_key(loaded, tokenizer, p["revision"]))
    scores = prefix_matching_scores(loaded, random_sequences(tokenizer))
    kept = load_file(bundle.folder / "prefix_scores.safetensors")["prefix_scores"]
    cells = bundle.cells()
    _check_heads(bundle, cells, kept.mean(0))
    groups, left_out = _groups(cells, data_dir)
    compared = _Compared()
    lm = InterventionLM(loaded, tokenizer)
    until = None if seconds is None else began + seconds
    for group, own, documents in _drawn(groups, share, seed, until):
        prompts = build(group)
        if prompts.key != own[0].spec["prompts"]:
            raise InputError(
                f"the prompts of {group.task} ({group.shots} examples, seed {group.seed}) come out "
                f"otherwise here than in bundle {directory}: the rows of {group.data!r} differ"
            )
        compared.add(lm, bundle, prompts, own, documents)
    if not compared.differences:
        raise InputError(f"bundle {directory}: nothing can be compared ({'; '.join(left_out)})")
    facts = model_facts(loaded)
    tolerance, least = TOLERANCES.get(info["dtype"], TOLERANCES["float32"])
    differences = np.array(compared.differences)
    return Verification(
        model=info["model"],
        documents=len(differences),
        of_documents=sum(len(cell.documents["doc_id"]) for cell in cells),
        cells=len(compared.cells),
        of_cells=len(cells),
        equal_answers=float(np.mean(compared.equal)),
        largest=float(differences.max()),
        percentile_99=float(np.quantile(differences, 0.99, method="higher")),
        scores_largest=float((scores - kept).abs().max()),
        tolerance=tolerance,
        least_equal=least,
        seed=seed,
        seconds=round(time.monotonic() - began, 1),
        made=_circumstances(info),
        here={**_circumstances(facts), "threads": str(torch.get_num_threads())},
        left_out=tuple(left_out),
        notes=tuple(notes),
    )


def _circumstances(facts: dict[str, Any]) -> dict[str, str]:
    versions = {name: facts["versions"].get(name, "") for name in ("torch", "transformers")}
    return {name: str(facts.get(name)) for name in ("device", "dtype", "machine")} | versions


def _compare_keys(info: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Notes on what differs of the model; other weights are refused."""
    made = info["identity"]["key"]
    other = [name for name in here if here[name] != made.get(name)]
    if "fingerprint" in other:
        raise InputError(
            f"the model here has other weights than {info['model']} had when the run was made "
            f"(fingerprint {here['fingerprint']}, not {made['fingerprint']})"
        )
    return [f"{name} is {here[name]}, not {made.get(name)} as in the run" for name in other]


def _check_heads(bundle: Bundle, cells: Sequence[BundledCell], scores: torch.Tensor) -> None:
    """Refuse cells whose induction heads are not those that the bundle's scores give."""
    for spec in (cell.spec for cell in cells if cell.spec["condition"].startswith("induction")):
        if spec["heads"] != sorted(map(list, top_heads(scores, spec["fraction"]))):
            raise InputError(
                f"bundle {bundle.folder}: cells.parquet has induction "
                f"heads that are not the highest of prefix_scores.safetensors"
            )


# Cells that share their prompts.
_Group = tuple[CellGroup, list[BundledCell]]


def _groups(cells: Sequence[BundledCell], data_dir: str | None) -> tuple[list[_Group], list[str]]:
    """Cells by their prompts, and what is left out since these cannot be built here."""
    by_prompts: dict[str, list[BundledCell]] = {}
    for cell in cells:
        by_prompts.setdefault(cell.spec["prompts"], []).append(cell)
    groups: list[_Group] = []
    lacking: dict[tuple[str, str], list[BundledCell]] = {}
    for own in by_prompts.values():
        spec, seed = own[0].spec, own[0].seed
        data = spec["data"] if spec["data"] in ("synthetic", "original") else data_dir
        try:
            if data is None:
                raise InputError(f"data_dir is not given, rows came from {spec['data']!r}")
            if seed is None:
                raise InputError("its rows were gone when the bundle was made")
            group = CellGroup.of_spec(spec, seed=seed, data=data)
            check_rows(group.task, data=group.data)
        except ICLError as error:
            lacking.setdefault((spec["task"], str(error)), []).extend(own)
        else:
            groups.append((group, own))
    return groups, [
        f"{len(own)} cells of {task}: {why}" for (task, why), own in sorted(lacking.items())
    ]


def _drawn(
    groups: Sequence[_Group], share: float, seed: int, until: float | None
) -> Iterator[tuple[CellGroup, list[BundledCell], list[int]]]:
    """Yield groups with documents to compute again; with a limit one at a time, at random.

    Nothing more is yielded where it would take too long if it took as long as the last.
    """
    units = [(n, doc) for n, (_, own) in enumerate(groups) for doc in own[0].documents["doc_id"]]
    random.Random(seed).shuffle(units)
    units = units[: math.ceil(share * len(units))]
    if until is None:
        by_group: dict[int, list[int]] = {}
        for number, document in units:
            by_group.setdefault(number, []).append(document)
        batches = list(by_group.items())
    else:
        batches = [(number, [document]) for number, document in units]
    took = 0.0
    for count, (number, documents) in enumerate(tqdm(batches, desc="verify", unit="prompts")):
        began = time.monotonic()
        if until is not None and count and began + took > until:
            return
        yield *groups[number], documents
        took = time.monotonic() - began


class _Compared:
    """What the documents that were computed again showed."""

    def __init__(self) -> None:
        self.differences: list[float] = []
        self.equal: list[bool] = []
        self.cells: set[int] = set()

    def add(
        self,
        lm: InterventionLM,
        bundle: Bundle,
        prompts: Prompts,
        cells: Sequence[BundledCell],
        documents: Sequence[int],
    ) -> None:
        """Score these documents under the conditions of the cells."""
        conditions = [_condition(cell, bundle) for cell in cells]
        lm.share(conditions)
        for cell, condition in zip(cells, conditions, strict=True):
            found = score_documents(lm, condition, prompts, documents)
            self.cells.add(id(cell))
            for place, document in enumerate(found["doc_id"]):
                stated = cell.documents["doc_id"].index(document)
                self._compare(cell.documents, stated, found, place)
        lm.forget()

    def _compare(
        self, stated: dict[str, list[Any]], at: int, found: dict[str, list[Any]], place: int
    ) -> None:
        # Blocked pairs are a knockout's, and cells of earlier versions have no number of them.
        exact = {"target", "n_tokens", "n_blocked"} & stated.keys()
        same = all(stated[name][at] == found[name][place] for name in exact)
        one, other = stated["log_probabilities"][at], found["log_probabilities"][place]
        pairs = list(zip(one, other, strict=False))
        finite = all((a is None) == (b is None) for a, b in pairs) and len(one) == len(other)
        gaps = [abs(a - b) for a, b in pairs if a is not None and b is not None]
        self.differences.append(max(gaps, default=0.0) if same and finite else math.inf)
        self.equal.append(same and _answer(one) == _answer(other))


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
