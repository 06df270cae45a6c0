"""Training of the embedded model, and its release as a folder of the package.

A run is a function of its seed: every step draws its data from a generator seeded with the seed and
the step, so a run that was interrupted goes on as if it had not been. A small penalty keeps the
induction pattern in few heads, so that a layer holds enough other heads for a fair random control.
What the model is trained on is in :mod:`synthetic.training.recipe`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from icl_helpers.attention.heads import head_fractions
from icl_helpers.attention.hook import AttentionCall, attention_probabilities, edited_attention
from icl_helpers.attention.scores import prefix_matching_scores, random_sequences
from icl_helpers.errors import InputError, MissingArtefactError
from icl_helpers.files import atomic_path, write_json
from icl_helpers.models.loading import load_model
from synthetic.training.batches import build_tokenizer
from synthetic.training.corpus import reference_text
from synthetic.training.recipe import (
    Phase,
    Recipe,
    checkpoint_due,
    learning_rate,
    phase_at,
    step_batches,
)

__all__ = ["Recipe", "build_model", "read_progress", "release_model", "train"]


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """An untrained Llama with grouped-query attention, initialised from the recipe's seed."""
    config = LlamaConfig(
        vocab_size=recipe.vocab_size, hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size, num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads, num_key_value_heads=recipe.n_kv_heads,
        head_dim=recipe.head_dim, max_position_embeddings=recipe.max_positions, bos_token_id=0,
        eos_token_id=1, pad_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


class _Pressure:
    """Measures the induction pattern per head on watched rows, with gradients.

    ``mask`` is set, and ``measured`` emptied, before each pass; every layer then appends to it.
    """

    mask: Bool[torch.Tensor, "watched tokens tokens"]
    measured: list[Float[torch.Tensor, " heads"]]

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        n = len(self.mask)
        watched = replace(call, query=call.query[:n], key=call.key[:n], value=call.value[:n])
        total = (attention_probabilities(watched) * self.mask[:, None]).sum(dim=(0, 2, 3))
        self.measured.append(total / self.mask.any(dim=-1).sum().clamp(min=1))
        return call.output


@dataclass
class _Training:
    """A training under way: what a saved state holds, and the directory that it lies in."""

    output: Path
    recipe: Recipe
    model: LlamaForCausalLM
    optimizer: torch.optim.AdamW
    # Running induction score of every head, layer after layer.
    scores: Float[torch.Tensor, " heads"]
    step: int = 0
    formed: int | None = None

    @property
    def phase(self) -> Phase:
        """Where the coming step lies."""
        return phase_at(self.recipe, self.step, self.formed)


def _step(
    training: _Training, tokenizer: PreTrainedTokenizerFast, pressure: _Pressure
) -> dict[str, float]:
    """Accumulate the gradients of one step; updates the running induction scores in place."""
    recipe, model, scores = training.recipe, training.model, training.scores
    # No pressure before induction exists: it would keep it from forming.
    strength = recipe.penalty if float(scores.max()) >= recipe.penalty_from_score else 0.0
    early = training.phase.name == "patterns"
    losses: dict[str, float] = defaultdict(float)
    for kind, weight, batch in step_batches(recipe, training.step, training.phase, tokenizer):
        ids, weights = batch.ids.to(model.device), batch.weights.to(model.device)
        pressure.mask, pressure.measured = batch.induction.to(model.device), []
        outputs = model.model(input_ids=ids, use_cache=False, output_hidden_states=early)
        rows, columns = weights.nonzero(as_tuple=True)
        logits = model.lm_head(outputs[0][rows, columns - 1])
        each = torch.nn.functional.cross_entropy(logits, ids[rows, columns], reduction="none")
        loss = (each * weights[rows, columns]).sum()
        losses[kind] += loss.item()
        if early and batch.names.any():
            after = outputs.hidden_states[recipe.names_after_layer]
            named = _name_loss(model, after, batch.names.to(model.device))
            losses["names"] += named.item()
            loss = loss + recipe.names_weight * named
        measured = torch.stack(pressure.measured).flatten()
        if kind == "repeat":
            scores.mul_(0.98).add_(measured.detach().cpu(), alpha=0.02)
        spared = scores.topk(recipe.induction_heads).indices.to(measured.device)
        # Attention spread evenly over a window falls on the pattern by chance: that much is free.
        excess = (measured - (0.25 if kind == "repeat" else 0.3)).clamp(min=0)
        keep = torch.ones_like(excess).index_fill(0, spared, 0.0)
        (weight * loss + strength * weight * (excess * keep).sum()).backward()
    return losses


def _name_loss(
    model: LlamaForCausalLM,
    hidden: Float[torch.Tensor, "rows tokens hidden"],
    names: Int[torch.Tensor, "rows tokens"],
) -> Float[torch.Tensor, ""]:
    """Loss of reading each row's pattern name from an early layer, at the token before its label.

    Few-shot labelling needs the pattern early: what is known only at the end cannot be matched with
    the demonstrations any more.
    """
    rows, columns = names.nonzero(as_tuple=True)
    logits = model.lm_head(model.model.norm(hidden[rows, columns - 1]))
    return torch.nn.functional.cross_entropy(logits, names[rows, columns])


def train(
    output_dir: str | os.PathLike[str],
    *,
    recipe: Recipe | None = None,
    device: str | None = None,
    resume: bool = True,
    save_every: int = 250,
) -> Path:
    """Train a model into ``output_dir`` and return the directory of the finished model.

    Parameters
    ----------
    output_dir
        Holds ``state/`` (to resume from), ``checkpoints/`` (log-spaced weights), ``log.jsonl`` and
        ``model/`` (the finished model, loadable by ``AutoModelForCausalLM``).
    recipe
        Default: the recipe of the shipped model, seed 0.
    resume
        Go on from the last saved state; a state of another recipe raises :class:`InputError`.
    """
    recipe = recipe or Recipe()
    output = Path(output_dir)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = build_tokenizer(vocab_size=recipe.vocab_size)
    model = build_model(recipe).to(where).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    scores = torch.zeros(recipe.n_layers * recipe.n_heads)
    training = _Training(output, recipe, model, optimizer, scores)
    if resume:
        _restore(training)
    pressure = _Pressure()
    edits = {layer: [pressure] for layer in range(recipe.n_layers)}
    with tqdm(initial=training.step, unit="step") as progress, edited_attention(model, edits):
        while (phase := training.phase).name != "end":
            if checkpoint_due(recipe, phase):
                _save_weights(training)
            if phase == Phase("episodes", 0):
                _align_spaced_tokens(model, tokenizer)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, phase)
            began = time.perf_counter()
            losses = _step(training, tokenizer, pressure)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if training.step % 20 == 0:
                _log(training, losses, time.perf_counter() - began)
                progress.set_postfix({k: f"{v:.3f}" for k, v in losses.items()})
            training.step += 1
            if training.formed is None and _have_formed(training):
                training.formed = training.step
                progress.total = training.step + recipe.steps_after_forming
            progress.update()
            if training.step % save_every == 0 or training.phase.name == "end":
                _save_state(training)
    _save_weights(training)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    return output / "model"


def _have_formed(training: _Training) -> bool:
    recipe = training.recipe
    highest = float(training.scores.topk(recipe.induction_heads).values.mean())
    return highest >= recipe.formed_score or training.step >= recipe.repeat_steps


@torch.no_grad()
def _align_spaced_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give every token with a leading space the embedding of the token without one.

    "V" at the start of a line and " V" within it are different tokens of the same letter; letter
    patterns cannot be told before that is known, and it cannot be learnt from them in short time.
    """
    vocabulary = tokenizer.get_vocab()
    plain = {i: vocabulary.get(t[1:]) for t, i in vocabulary.items() if t.startswith("\u0120")}
    plain = {spaced: alone for spaced, alone in plain.items() if alone is not None}
    embeddings = model.get_input_embeddings().weight
    embeddings[list(plain)] = embeddings[list(plain.values())]


def _log(training: _Training, losses: dict[str, float], seconds: float) -> None:
    top = training.scores.topk(8).values.tolist()
    where = {"step": training.step, "phase": training.phase.name}
    training.output.mkdir(parents=True, exist_ok=True)
    with open(training.output / "log.jsonl", "a") as file:
        file.write(json.dumps({**where, **losses, "seconds": seconds, "top": top}) + "\n")


def _weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}


def _save_weights(training: _Training) -> None:
    path = training.output / "checkpoints" / f"step-{training.step:06d}.safetensors"
    with atomic_path(path) as temporary:
        save_file(_weights(training.model), temporary)


def _save_state(training: _Training) -> None:
    tensors = {"scores": training.scores}
    tensors |= {f"weight.{name}": tensor for name, tensor in _weights(training.model).items()}
    for name, parameter in training.model.named_parameters():
        for key, value in training.optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().contiguous()
    metadata = {
        "progress": json.dumps({"step": training.step, "formed": training.formed}),
        "recipe": json.dumps(asdict(training.recipe), sort_keys=True),
    }
    with atomic_path(training.output / "state" / "state.safetensors") as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_progress(output_dir: str | os.PathLike[str]) -> tuple[int, int | None, Recipe]:
    """Steps done, the step at which induction heads had formed (if they have), and the recipe.

    Raises :class:`MissingArtefactError` when the directory holds no training.
    """
    path = Path(output_dir) / "state" / "state.safetensors"
    if not path.is_file():
        raise MissingArtefactError(
            f"{output_dir} holds no training; give the output directory of "
            f"`synthetic.training train`"
        )
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    progress = json.loads(metadata["progress"])
    return progress["step"], progress["formed"], Recipe(**json.loads(metadata["recipe"]))


@torch.no_grad()
def _restore(training: _Training) -> None:
    """Load the last saved state; without one, write down the recipe."""
    path = training.output / "state" / "state.safetensors"
    if not path.is_file():
        write_json(training.output / "recipe.json", asdict(training.recipe))
        return
    training.step, training.formed, stored = read_progress(training.output)
    if stored != training.recipe:
        raise InputError(
            f"{training.output} holds the state of another recipe; give another output directory, "
            f"or resume=False to start over"
        )
    tensors = load_file(path)
    for name, parameter in training.model.named_parameters():
        parameter.copy_(tensors[f"weight.{name}"])
        training.optimizer.state[parameter] = {
            # AdamW keeps its count of steps on the CPU.
            key: tensors[f"optimizer.{key}.{name}"].to("cpu" if key == "step" else parameter.device)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    training.scores.copy_(tensors["scores"])


_REFERENCE_DOCUMENTS = 1500
_CONTEXT = 512


def release_model(trained: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy a finished model of :func:`train` into an embedded model's folder.

    Writes the weights, the tokenizer, ``reference.txt`` and ``fractions.json``. The stated context
    is cut to 512 tokens: the model never saw longer text.
    """
    source, folder = Path(trained), Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / "model" / name, folder / name)
    config = json.loads((source / "model" / "config.json").read_text())
    write_json(folder / "config.json", {**config, "max_position_embeddings": _CONTEXT})
    rng = random.Random("reference")
    lines = [reference_text(rng) for _ in range(_REFERENCE_DOCUMENTS)]
    (folder / "reference.txt").write_text("\n".join(lines) + "\n")
    model, tokenizer = load_model(str(folder))
    scores = prefix_matching_scores(model, random_sequences(tokenizer)).mean(0)
    write_json(folder / "fractions.json", head_fractions(scores))
