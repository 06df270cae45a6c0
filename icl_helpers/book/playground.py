"""icl-tiny for the reader's browser: weights in 8 bits, tokenizer, heads and prompts, as one file.

The page ``book/playground.md`` computes everything else itself, with ``assets/playground.js``; it
needs no server and fetches nothing from elsewhere.

Example
-------
>>> write_playground(Path("_build/html/_static/playground"))
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int8
from transformers import PreTrainedTokenizerBase

from icl_helpers.attention.heads import layer_matched_heads, top_heads
from icl_helpers.attention.induction_pattern import word_categories
from icl_helpers.attention.scores import prefix_matching_scores, random_sequences
from icl_helpers.files import assets_dir, embedded_dir
from icl_helpers.models.loading import load_model
from icl_helpers.tasks.prompts import build_prompts
from icl_helpers.tasks.specs import get_task_spec

__all__ = ["playground_data", "quantized_rows", "write_playground"]

MODEL = "icl-tiny"
TASKS = (
    "wordseq1_binary", "wordseq2_binary", "wordseq1_4way", "wordseq2_4way", "repetition",
    "recursion", "centre_embedding", "review_sentiment", "fact_opinion",
)  # fmt: skip
_ASSETS = ("viewer.css", "viewer.js", "playground.css", "playground.js")
_SEED, _PROMPTS = 42, 3


def write_playground(folder: Path) -> None:
    """Write scripts, styles and ``icl-tiny.js`` into a folder, for the page to load from there."""
    folder.mkdir(parents=True)
    for name in _ASSETS:
        shutil.copyfile(assets_dir() / name, folder / name)
    text = json.dumps(playground_data(), ensure_ascii=False, separators=(",", ":"))
    (folder / f"{MODEL}.js").write_text(f"window.iclTinyData = {text};\n", encoding="utf-8")


def playground_data() -> dict[str, Any]:
    """Return what the page's script needs, as plain JSON values.

    Returns ``config``, ``tensors`` (base64: whole numbers with the scale of each row, or float32),
    ``tokenizer``, ``words`` (their categories), ``heads`` with the prefix-matching scores of the
    8-bit model, ``induction`` (the larger share of heads), ``control`` (as many others of the same
    layers) and ``prompts``, three of each task with its most examples.
    """
    # transformers draws a bar for every model that it loads; who builds a book has asked for none.
    with contextlib.redirect_stderr(io.StringIO()):
        model, tokenizer = load_model(MODEL)
    tensors = {}
    for name, weight in model.named_parameters():
        tensors[name] = {"values": _base64(weight.data)}
        if weight.ndim == 2:
            values, scales = quantized_rows(weight.data)
            tensors[name] = {"values": _base64(values), "scales": _base64(scales)}
            weight.data.copy_(values * scales[:, None])
    scores = prefix_matching_scores(model, random_sequences(tokenizer)).mean(0)
    fractions = json.loads((embedded_dir() / MODEL / "fractions.json").read_text(encoding="utf-8"))
    induction = top_heads(scores, fractions["larger"])
    n_layers, n_heads = scores.shape
    control, _ = layer_matched_heads(induction, n_heads, n_layers, seed=_SEED, exclude=induction)
    config = model.config
    return {
        "config": {
            "layers": n_layers, "hidden": config.hidden_size, "heads": n_heads,
            "groups": config.num_key_value_heads, "size": config.head_dim,
            "theta": config.rope_parameters["rope_theta"], "epsilon": config.rms_norm_eps,
            "positions": config.max_position_embeddings,
        },
        "tensors": tensors,
        "tokenizer": _tokenizer(tokenizer),
        "words": word_categories(),
        "heads": [
            {"layer": layer, "head": head, "score": round(float(scores[layer, head]), 3)}
            for layer in range(n_layers) for head in range(n_heads)
        ],
        "induction": induction, "control": control,
        "prompts": [prompt for task in TASKS for prompt in _prompts(task)],
    }  # fmt: skip


def quantized_rows(
    weight: Float[torch.Tensor, "rows columns"],
) -> tuple[Int8[torch.Tensor, "rows columns"], Float[torch.Tensor, " rows"]]:
    """Round a matrix to whole numbers from -127 to 127, with a scale each row (8 bits)."""
    scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(weight.dtype).tiny) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def _base64(tensor: torch.Tensor) -> str:
    """Return the tensor's bytes, little-endian as all browsers have them."""
    array = tensor.numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the byte-level BPE of ``tokenizer.json``, in the order of its ids and merges."""
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    split, _ = stored["pre_tokenizer"]["pretokenizers"]
    vocabulary = stored["model"]["vocab"]
    return {
        "vocabulary": sorted(vocabulary, key=vocabulary.__getitem__),
        "merges": [" ".join(pair) for pair in stored["model"]["merges"]],
        "words": split["pattern"]["Regex"],
        "special": [token["content"] for token in stored["added_tokens"]],
    }


def _prompts(task: str) -> list[dict[str, Any]]:
    """Return the first prompts of a task, one for each label in turn."""
    shots = max(get_task_spec(task).default_shots)
    built = build_prompts(task, shots=shots, seed=_SEED)
    labels = len(built[0].choices)
    prompts = []
    for number in range(_PROMPTS):
        same = [prompt for prompt in built if prompt.target == number % labels]
        prompt = same[number // labels]
        prompts.append(
            {
                "task": f"{task.replace('_', ' ')}, {shots} examples", "example": number + 1,
                "context": prompt.context, "choices": prompt.choices, "target": prompt.target,
            }
        )  # fmt: skip
    return prompts
