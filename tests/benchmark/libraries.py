"""The libraries that stand side by side, each scoring the same labels in a process of its own.

``python -m tests.benchmark.libraries NAME PLAN PART`` loads the model of a plan
(:mod:`tests.benchmark.side_by_side`), then answers requests on standard input, one line of JSON
each, and keeps every answer in PART, from which a later process of the same plan goes on. An
environment that holds TransformerLens and nnsight need not hold ``icl_helpers``: what only one
library needs is imported by that library.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmark.process import peak_bytes, processor, seconds

# A context and a label; the token ids of both.
Pair = tuple[str, str]
Encoded = tuple[list[int], list[int]]
# Conditions of which something is edited.
_EDITED = ("zero", "mean", "seven")


class Library:
    """What all share: the model, the tokens, the heads and their means [layers, positions, ...]."""

    package = "transformers"
    #: Conditions that the library cannot score, and why.
    cannot: dict[str, str] = {}  # noqa: RUF012 - read only

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.tokenizer = AutoTokenizer.from_pretrained(plan["directory"])
        self.model = AutoModelForCausalLM.from_pretrained(
            plan["directory"], dtype=torch.float32
        ).eval()
        self.means = load_file(plan["means"])["means"]
        self.d_head: int = self.means.shape[-1]

    def score(self, pairs: Sequence[Pair], condition: str) -> list[float]:
        """Log-probability of every label; what is timed."""
        raise NotImplementedError

    def sequences(self, pairs: Sequence[Pair]) -> int:
        """How many sequences are run for these labels: one a label."""
        return len(pairs)

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        """Ids of contexts and labels; a label's are those by which it makes the text longer."""

        def ids(texts: list[str]) -> list[list[int]]:
            return self.tokenizer(texts, add_special_tokens=False).input_ids

        contexts = ids([context for context, _ in pairs])
        wholes = ids([context + label for context, label in pairs])
        return [(c, whole[len(c) :]) for c, whole in zip(contexts, wholes, strict=True)]

    def edited(self, layer: int, outputs: torch.Tensor, condition: str) -> torch.Tensor:
        """Heads' outputs [batch, positions, heads, d_head] of a layer, ablated; a copy."""
        outputs = outputs.clone()
        for head in self.heads(layer):
            outputs[:, :, head] = (
                0 if condition == "zero" else self.means[layer, : outputs.shape[1], head]
            )
        return outputs

    def heads(self, layer: int) -> list[int]:
        """Ablated heads of a layer."""
        return [head for at, head in self.plan["heads"] if at == layer]

    def layers(self, condition: str) -> list[int]:
        """Layers with ablated heads; none under the full model."""
        return sorted({layer for layer, _ in self.plan["heads"] if condition != "full"})


class Sequences(Library):
    """A library that gives logits: one sequence a label, in batches, padded on the right.

    No token sees what comes after it, so that padding there needs no mask.
    """

    def logits(self, ids: torch.Tensor, condition: str) -> torch.Tensor:
        """Logits [batch, tokens, vocabulary] of ids [batch, tokens]."""
        raise NotImplementedError

    @torch.inference_mode()
    def score(self, pairs: Sequence[Pair], condition: str) -> list[float]:
        encoded = self.encode(pairs)
        values: list[float] = []
        for start in range(0, len(encoded), self.plan["batch"]):
            batch = encoded[start : start + self.plan["batch"]]
            logits = self.logits(_padded([c + label[:-1] for c, label in batch]), condition)
            for row, (context, label) in zip(logits, batch, strict=True):
                # Only what is scored is normalised.
                scored = row[len(context) - 1 : len(context) - 1 + len(label)]
                taken = torch.log_softmax(scored.float(), dim=-1)
                values.append(float(taken[range(len(label)), label].sum()))
        return values


def _padded(rows: Sequence[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


class Plain(Sequences):
    """transformers alone: a forward pass over the prompts without their labels, all logits."""

    cannot = dict.fromkeys(_EDITED, "a plain forward pass edits nothing")

    @torch.inference_mode()
    def forward(self, pairs: Sequence[Pair], condition: str) -> None:
        """The limit: no labels, nothing scored."""
        contexts = list({tuple(context): context for context, _ in self.encode(pairs)}.values())
        for start in range(0, len(contexts), self.plan["batch"]):
            ids = _padded(contexts[start : start + self.plan["batch"]])
            self.model(input_ids=ids, use_cache=False)

    def sequences(self, pairs: Sequence[Pair]) -> int:
        return len({context for context, _ in pairs})

    def logits(self, ids: torch.Tensor, condition: str) -> torch.Tensor:
        """The oracle of the check: hooks of torch's own before the output projections."""

        def before(layer: int) -> Callable[[Any, tuple[torch.Tensor]], tuple[torch.Tensor]]:
            def edit(module: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
                split = given[0].unflatten(-1, (-1, self.d_head))
                return (self.edited(layer, split, condition).flatten(-2),)

            return edit

        blocks = self.model.model.layers
        hooks = [
            blocks[layer].self_attn.o_proj.register_forward_pre_hook(before(layer))
            for layer in self.layers(condition)
        ]
        try:
            return self.model(input_ids=ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()


class StockLMEval(Library):
    """lm-eval's own ``hf`` model around the same weights."""

    package = "lm_eval"
    cannot = dict.fromkeys(_EDITED, "lm-eval ablates no heads")

    def __init__(self, plan: dict[str, Any]) -> None:
        super().__init__(plan)
        self.lm = self.wrapped()

    def wrapped(self) -> Any:
        """The language model that lm-eval asks."""
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            pretrained=self.model, tokenizer=self.tokenizer, batch_size=self.plan["batch"],
            add_bos_token=False, max_length=self.model.config.max_position_embeddings,
        )  # fmt: skip

    def score(self, pairs: Sequence[Pair], condition: str) -> list[float]:
        from lm_eval.api.instance import Instance

        asked = [Instance("loglikelihood", {}, tuple(pair), at) for at, pair in enumerate(pairs)]
        return [value for value, _ in self.lm.loglikelihood(asked, disable_tqdm=True)]

    def sequences(self, pairs: Sequence[Pair]) -> int:
        """It runs equal sequences once: labels of one token share theirs."""
        return len({tuple(context + label[:-1]) for context, label in self.encode(pairs)})


class Ours(StockLMEval):
    """``icl_helpers``: the same model of lm-eval's, with a condition around it."""

    package = "icl_helpers"
    cannot: dict[str, str] = {}  # noqa: RUF012

    def wrapped(self) -> Any:
        from icl_helpers.attention.heads import Head
        from icl_helpers.evaluation.conditions import FULL, Condition
        from icl_helpers.evaluation.scorer import InterventionLM

        def condition(ablation: Any, heads: Sequence[Sequence[int]]) -> Condition:
            chosen = tuple(Head(*head) for head in heads)
            if ablation == "none":
                return FULL
            name: Any = "induction_pattern" if ablation == "knockout" else "induction_heads"
            means = self.means if ablation == "mean" else None
            return Condition(name, ablation, 0.03, heads=chosen, head_outputs=means)

        self.conditions = {
            "full": [FULL],
            **{name: [condition(name, self.plan["heads"])] for name in ("zero", "mean")},
            "seven": [condition(ablation, heads) for ablation, heads in self.plan["seven"]],
        }
        return InterventionLM(self.model, self.tokenizer, batch_size=self.plan["batch"])

    def score(self, pairs: Sequence[Pair], condition: str) -> list[float]:
        values: list[float] = []
        self.lm.share(self.conditions[condition])
        for one in self.conditions[condition]:
            with self.lm.under(one):
                values += super().score(pairs, condition)
        self.lm.forget()
        return values

    def sequences(self, pairs: Sequence[Pair]) -> int:
        """The labels are branches of their context's sequence."""
        return len({context for context, _ in pairs})


class TransformerLens(Sequences):
    """A TransformerBridge with hooks on ``hook_z``."""

    package = "transformer_lens"
    cannot = {"seven": "shares nothing between conditions"}  # noqa: RUF012

    def __init__(self, plan: dict[str, Any]) -> None:
        super().__init__(plan)
        from transformer_lens.model_bridge import TransformerBridge

        self.bridge = TransformerBridge.boot_transformers(
            plan["directory"], hf_model=self.model, tokenizer=self.tokenizer, device="cpu",
            dtype=torch.float32,
        )  # fmt: skip

    def logits(self, ids: torch.Tensor, condition: str) -> torch.Tensor:
        if condition == "full":
            return self.bridge(ids, return_type="logits")

        def at(layer: int) -> tuple[str, Callable[..., torch.Tensor]]:
            name = f"blocks.{layer}.attn.hook_z"
            return name, lambda value, hook: self.edited(layer, value, condition)

        hooks = [at(layer) for layer in self.layers(condition)]
        return self.bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks)


class NNsight(Sequences):
    """A trace that edits the input of ``o_proj``."""

    package = "nnsight"
    cannot = {"seven": "shares nothing between conditions"}  # noqa: RUF012

    def __init__(self, plan: dict[str, Any]) -> None:
        super().__init__(plan)
        from nnsight.modeling.transformers import TransformersModel

        self.traced = TransformersModel(
            self.model, tokenizer=self.tokenizer, task="text-generation"
        )

    def logits(self, ids: torch.Tensor, condition: str) -> torch.Tensor:
        traced, edited, d_head = self.traced, self.edited, self.d_head
        layers = self.layers(condition)
        with traced.trace(ids, use_cache=False):
            for layer in layers:
                projection = traced.model.layers[layer].self_attn.o_proj
                split = projection.input.unflatten(-1, (-1, d_head))
                projection.input = edited(layer, split, condition).flatten(-2)
            logits = traced.output.logits.save()
        return logits  # noqa: RET504 - a trace ends before what it saved is there


LIBRARIES: dict[str, type[Library]] = {
    "plain forward": Plain, "stock lm-eval": StockLMEval, "TransformerLens": TransformerLens,
    "nnsight": NNsight, "icl_helpers": Ours,
}  # fmt: skip


def versions(library: type[Library]) -> dict[str, str]:
    """Versions of Python, torch, transformers and the library."""
    names = dict.fromkeys(["torch", "transformers", library.package])
    found = {name: version(name) for name in names}
    return {"python": platform.python_version(), **found}


class Part:
    """What one library's process has measured so far, in a file."""

    def __init__(self, path: Path, library: type[Library], plan: bytes) -> None:
        self.path = path
        made_by = {"versions": versions(library), "processor": processor()}
        content = [hashlib.sha256(plan).hexdigest(), made_by]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
        self.content: dict[str, Any] = {"key": key, **made_by, "cells": {}}
        if path.is_file():
            kept = json.loads(path.read_text())
            # Another plan, another version, another machine: measured anew.
            if kept["key"] == key:
                self.content = kept

    def note(self, cell: str, what: str, value: Any) -> None:
        """Add a value to a cell's list of such values, on disk too."""
        self.content["cells"].setdefault(cell, {}).setdefault(what, []).append(value)
        self.content["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1))
        os.replace(temporary, self.path)


def answer(library: Library, part: Part, asked: dict[str, str]) -> None:
    """One request: ``check`` keeps the log-probabilities of a cell, ``time`` its cost."""
    case, condition = library.plan["cases"][asked["case"]], asked["condition"]
    cell = f"{asked['case']}/{condition}"
    if asked["what"] == "check":
        part.note(cell, "check", library.score(case["pairs"][: case["checked"]], condition))
        return
    run = library.forward if isinstance(library, Plain) else library.score
    taken: list[float] = []
    peak = peak_bytes(lambda: taken.append(seconds(lambda: run(case["pairs"], condition))))
    if not part.content["cells"].get(cell, {}).get("sequences"):
        part.note(cell, "sequences", library.sequences(case["pairs"]))
    part.note(cell, "peak_bytes", peak)
    part.note(cell, "seconds", taken[0])


def main(name: str, plan_path: str, part_path: str) -> None:
    """Load, say so, and answer until standard input ends."""
    # What libraries print must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    raw = Path(plan_path).read_bytes()
    plan = json.loads(raw)
    torch.set_num_threads(plan["threads"])
    part = Part(Path(part_path), LIBRARIES[name], raw)
    library = LIBRARIES[name](plan)
    print(json.dumps(part.content), file=answers, flush=True)
    for line in sys.stdin:
        answer(library, part, json.loads(line))
        print(json.dumps(part.content), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
