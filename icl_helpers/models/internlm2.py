"""InternLM2 checkpoints as Llama models, without running code from their repository.

InternLM2 is Llama with other names and one fused matrix: ``wqkv`` is
``[kv_heads, groups + 2, head_dim, hidden]`` with a group's queries first, then its key, then its
value. Weights are read shard by shard and unfused one tensor at a time, so that memory holds the
model plus one tensor.

Example
-------
>>> directory = fetch_internlm2("internlm/internlm2-20b")
>>> model = load_internlm2(directory, dtype="bfloat16", device_map="auto")
>>> tokenizer = load_internlm2_tokenizer(directory)
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import cached_file

from icl_helpers.errors import InputError, MissingArtefactError
from icl_helpers.models.internlm2_tokenizer import load_internlm2_tokenizer

__all__ = [
    "fetch_internlm2",
    "internlm2_config",
    "internlm2_settings",
    "is_internlm2",
    "load_internlm2",
    "load_internlm2_tokenizer",
]


_SAME_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "tie_word_embeddings",
)  # fmt: skip
_ROPE_TYPES = ("default", "linear", "dynamic")


def is_internlm2(
    source: str | os.PathLike[str] | PreTrainedConfig | Mapping[str, Any],
    *,
    revision: str | None = None,
) -> bool:
    """Whether a directory, hub id or configuration is InternLM2's.

    False where no configuration can be read: the caller's ordinary loading then explains why.
    """
    if isinstance(source, PreTrainedConfig):
        return source.model_type == "internlm2"
    if isinstance(source, Mapping):
        return source.get("model_type") == "internlm2"
    return internlm2_settings(source, revision=revision) is not None


def internlm2_settings(
    source: str | os.PathLike[str], *, revision: str | None = None
) -> dict[str, Any] | None:
    """The ``config.json`` of an InternLM2 directory or hub id; None for any other model."""
    try:
        file = cached_file(os.fspath(source), "config.json", revision=revision)
        settings = json.loads(Path(file or "").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and is_internlm2(settings) else None


def internlm2_config(settings: Mapping[str, Any]) -> LlamaConfig:
    """The Llama configuration of an InternLM2 ``config.json``.

    The two models' dynamic scaling is the same: beyond the trained length L, the rotary base is
    multiplied by ``(factor * n / L - (factor - 1)) ** (d / (d - 2))`` for n tokens and d dimensions
    per head. Up to L tokens it is plain rotary embedding. One difference does not touch a single
    prompt: after a prompt longer than L, InternLM2's code keeps the wider base for shorter ones,
    transformers returns to the plain one.
    """
    scaling = settings.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        raise InputError(
            f"InternLM2's rope_scaling must be one of {', '.join(_ROPE_TYPES)}, got {rope_type!r}"
        )
    rope = {"rope_type": rope_type, "rope_theta": float(settings.get("rope_theta", 10_000))}
    if rope_type != "default":
        rope["factor"] = float(scaling["factor"])
    same = {field: settings[field] for field in _SAME_FIELDS if field in settings}
    return LlamaConfig(
        **same,
        architectures=["LlamaForCausalLM"],
        rope_parameters=rope,
        # A configuration that does not say has biases: that is InternLM2's default.
        attention_bias=bool(settings.get("bias", True)),
    )


_RENAMED = {
    "model.tok_embeddings.": "model.embed_tokens.",
    "output.": "lm_head.",
    ".attention.wo.": ".self_attn.o_proj.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
}
_NAMES = re.compile("|".join(map(re.escape, _RENAMED)))
_FUSED = ".attention.wqkv."
# In order of preference; an index names the shards of a split checkpoint.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def fetch_internlm2(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The directory of a checkpoint: itself, or the hub's files in the Hugging Face cache.

    Raises :class:`MissingArtefactError` when the hub cannot be reached and the cache lacks them.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    kinds = ["*.safetensors", "*.bin"]
    try:
        names = list_repo_files(os.fspath(source), revision=revision)
        # Repositories may hold the weights twice; one copy is enough.
        kinds = kinds[:1] if any(name.endswith(".safetensors") for name in names) else kinds[1:]
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        pass  # offline: the cache alone decides
    try:
        return Path(
            snapshot_download(
                os.fspath(source), revision=revision, allow_patterns=["*.json", "*.model", *kinds]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise MissingArtefactError(
            f"the checkpoint {source} is not in the Hugging Face cache and cannot be fetched; "
            f"check the name and the network, or give the directory of a copy"
        ) from error


def load_internlm2(
    directory: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> LlamaForCausalLM:
    """Load an InternLM2 checkpoint (safetensors or .bin, split or not) as a Llama model.

    Parameters
    ----------
    directory
        Holds ``config.json`` and the weights.
    dtype
        ``"auto"``: what the configuration names, else that of the weights.
    device, device_map
        At most one of them; default the CPU. ``device_map`` as in transformers.

    Raises
    ------
    InputError
        The checkpoint is not InternLM2, or its weights do not fit its configuration.
    MissingArtefactError
        Configuration or weights are not in the directory.
    """
    folder = Path(directory)
    settings = _read_json(folder / "config.json")
    if not is_internlm2(settings):
        raise InputError(f"{folder} holds model_type {settings.get('model_type')!r}, not internlm2")
    if device is not None and device_map is not None:
        raise InputError(f"give device ({device}) or device_map ({device_map}), not both")
    config = internlm2_config(settings)
    target = _dtype(dtype, settings)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    devices = _devices(model, target, device, device_map)
    _fill(model, folder, target, lambda name: _device_of(name, devices))
    # Its frequencies are computed, not stored.
    rotary = LlamaRotaryEmbedding(config)
    model.model.rotary_emb = rotary.to(_device_of("model.rotary_emb", devices))
    model.tie_weights()
    model.config.dtype = model.dtype
    if len(set(devices.values())) > 1:
        from accelerate import dispatch_model  # type: ignore[import-untyped]

        dispatch_model(model, devices)
    return model.eval()


def _fill(
    model: LlamaForCausalLM,
    folder: Path,
    dtype: torch.dtype | None,
    place: Callable[[str], torch.device],
) -> None:
    """Put every weight into the model; memory holds one source tensor at a time besides it."""
    tied = model.config.tie_word_embeddings
    missing = set(model.state_dict()) - ({"lm_head.weight"} if tied else set())
    for old, tensor in _tensors(folder):
        for name, part in _llama_tensors(old, tensor, model.config):
            if tied and name == "lm_head.weight":
                continue
            if name not in missing:
                raise InputError(f"{folder} holds a weight that InternLM2 has not: {old}")
            here = model.get_parameter(name)
            if here.shape != part.shape:
                raise InputError(
                    f"{old} in {folder} has shape {tuple(tensor.shape)}, which does not fit its "
                    f"config.json ({name}: expected {tuple(here.shape)}, got {tuple(part.shape)})"
                )
            owned = part.to(place(name), dtype, copy=True).contiguous()
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent).register_parameter(leaf, torch.nn.Parameter(owned))
            missing.discard(name)
    if missing:
        raise InputError(
            f"the weights in {folder} lack {len(missing)} tensors, among them {min(missing)}"
        )


def _llama_tensors(
    old: str, tensor: torch.Tensor, config: LlamaConfig
) -> list[tuple[str, torch.Tensor]]:
    """Llama's names and tensors for one of InternLM2's."""
    if old.endswith("rotary_emb.inv_freq"):
        return []
    if _FUSED not in old:
        return [(_NAMES.sub(lambda match: _RENAMED[match[0]], old), tensor)]
    groups = config.num_attention_heads // config.num_key_value_heads
    fused_rows = (groups + 2) * config.num_key_value_heads * config.head_dim
    if tensor.shape[0] != fused_rows:
        raise InputError(
            f"{old} has {tensor.shape[0]} rows; {config.num_attention_heads} heads, "
            f"{config.num_key_value_heads} key-value heads of {config.head_dim} need {fused_rows}"
        )
    # [kv_heads * (groups + 2) * head_dim, hidden] -> [kv_heads, groups + 2, head_dim, hidden];
    # a bias has no hidden axis.
    rest = tensor.shape[1:]
    fused = tensor.view(config.num_key_value_heads, groups + 2, config.head_dim, *rest)
    parts = {"q": fused[:, :groups], "k": fused[:, groups], "v": fused[:, groups + 1]}
    return [
        (old.replace(_FUSED, f".self_attn.{name}_proj."), part.reshape(-1, *rest))
        for name, part in parts.items()
    ]


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a checkpoint, one at a time, read lazily from the files."""
    for shard in _shards(folder):
        if shard.suffix == ".safetensors":
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield name, file.get_tensor(name)
        else:
            # Files in the older, unzipped format cannot be mapped into memory.
            lazily = zipfile.is_zipfile(shard)
            weights = torch.load(shard, map_location="cpu", weights_only=True, mmap=lazily)
            while weights:
                name = next(iter(weights))
                yield name, weights.pop(name)


def _shards(folder: Path) -> list[Path]:
    for name in _WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = [
                folder / shard for shard in sorted(set(_read_json(index)["weight_map"].values()))
            ]
        elif (folder / name).is_file():
            shards = [folder / name]
        else:
            continue
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent:
            raise MissingArtefactError(f"{folder} lacks {', '.join(absent)}, named in its index")
        return shards
    raise MissingArtefactError(
        f"{folder} holds no weights; expected {' or '.join(_WEIGHT_FILES)}, or their index"
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingArtefactError(f"{path} does not exist; give the directory of a checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _dtype(dtype: str | torch.dtype, settings: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype to cast to; None keeps that of each weight."""
    if isinstance(dtype, torch.dtype):
        return dtype
    name = settings.get("dtype", settings.get("torch_dtype")) if dtype == "auto" else dtype
    found = getattr(torch, str(name).removeprefix("torch."), None) if name else None
    if name and not isinstance(found, torch.dtype):
        raise InputError(f"dtype must be 'auto' or a torch dtype such as 'bfloat16', got {name!r}")
    return found


def _devices(
    model: LlamaForCausalLM,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    device_map: str | dict[str, Any] | None,
) -> dict[str, Any]:
    """Module name -> device; the empty name stands for the whole model."""
    if device_map is None:
        return {"": device if device is not None else "cpu"}
    if isinstance(device_map, dict):
        devices = device_map
    elif device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        from accelerate import infer_auto_device_map  # type: ignore[import-untyped]
        from accelerate.utils import get_balanced_memory  # type: ignore[import-untyped]

        whole = {"no_split_module_classes": ["LlamaDecoderLayer"], "dtype": dtype}
        memory = None
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            memory = get_balanced_memory(model, low_zero=low, **whole)
        devices = infer_auto_device_map(model, max_memory=memory, **whole)
    else:
        devices = {"": device_map}
    if "disk" in devices.values():
        raise InputError(
            "the model does not fit into GPU and CPU memory together; use a larger machine or a "
            "smaller dtype"
        )
    return devices


def _device_of(name: str, devices: Mapping[str, Any]) -> torch.device:
    while name not in devices:
        if not name:
            raise InputError(f"device_map must cover every module, got {dict(devices)}")
        name = name.rpartition(".")[0]
    return torch.device(devices[name])
