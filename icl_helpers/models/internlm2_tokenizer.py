"""InternLM2's sentencepiece tokenizer as a fast one, which knows character offsets.

Its repository reads ``tokenizer.model`` with code of its own; here the same file is turned into a
byte-fallback BPE of the ``tokenizers`` library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from icl_helpers.errors import InputError, MissingArtefactError

__all__ = ["load_internlm2_tokenizer"]


_SPACE = "\u2581"
_BPE = 2  # trainer_spec.model_type
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of a piece
_SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}


def load_internlm2_tokenizer(directory: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint directory.

    Reads ``tokenizer.json`` where there is one, else ``tokenizer.model``; special tokens and
    ``add_bos_token`` (default: true) come from ``tokenizer_config.json``. Raises
    :class:`MissingArtefactError` when the directory holds neither.
    """
    folder = Path(directory)
    stated = folder / "tokenizer_config.json"
    settings = json.loads(stated.read_text(encoding="utf-8")) if stated.is_file() else {}
    special = {role: _content(settings.get(role)) or text for role, text in _SPECIAL.items()}
    if (folder / "tokenizer.json").is_file():
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "tokenizer.model").is_file():
        backend = _convert(folder / "tokenizer.model", settings.get("added_tokens_decoder", {}))
        backend.post_processor = _frame(backend, settings, special)
    else:
        raise MissingArtefactError(f"{folder} holds neither tokenizer.json nor tokenizer.model")
    options = {
        key: settings[key] for key in ("model_max_length", "chat_template") if key in settings
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special, **options
    )


def _content(token: Any) -> str | None:
    """A special token is written as its text, or as an object with its text inside."""
    return token.get("content") if isinstance(token, Mapping) else token


def _frame(
    backend: Tokenizer, settings: Mapping[str, Any], special: Mapping[str, str]
) -> processors.TemplateProcessing:
    bos, eos = special["bos_token"], special["eos_token"]
    single = [bos] if settings.get("add_bos_token", True) else []
    single += ["$A"]
    single += [eos] if settings.get("add_eos_token", False) else []
    return processors.TemplateProcessing(
        single=single,
        pair=[*single, *(part.replace("$A", "$B") + ":1" for part in single)],
        special_tokens=[(token, backend.token_to_id(token)) for token in {bos, eos}],
    )


def _convert(path: Path, added: Mapping[str, Mapping[str, Any]]) -> Tokenizer:
    """``tokenizer.model`` as a byte-fallback BPE; ``added`` renames and adds tokens by id."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    if proto.trainer_spec.model_type != _BPE:
        raise InputError(f"{path} is not a BPE model, as InternLM2's is; it cannot be converted")
    names = {int(number): token["content"] for number, token in added.items()}
    vocab = {names.get(i, piece.piece): i for i, piece in enumerate(proto.pieces)}
    backend = Tokenizer(
        BPE(
            vocab,
            _merges(proto.pieces),
            unk_token=names.get(proto.trainer_spec.unk_id, proto.trainer_spec.unk_piece),
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    backend.normalizer = _normalizer(proto.normalizer_spec)
    backend.decoder = _decoder(prefix=proto.normalizer_spec.add_dummy_prefix)
    tokens = {
        i: AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
        for i, piece in enumerate(proto.pieces)
        if piece.type in (_CONTROL, _USER_DEFINED)
    }
    for number, token in added.items():
        flags = {k: v for k, v in token.items() if k in ("lstrip", "rstrip", "single_word")}
        tokens[int(number)] = AddedToken(
            token["content"], normalized=False, special=token.get("special", True), **flags
        )
    backend.add_tokens([tokens[number] for number in sorted(tokens)])
    return backend


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Merges by the score of the piece they make, best first.

    sentencepiece keeps no merges: it joins whichever neighbours make the best-scored piece.
    """
    normal = [piece for piece in pieces if piece.type == _NORMAL]
    rank = {piece.piece: place for place, piece in enumerate(normal)}
    merges: list[tuple[str, str]] = []
    for piece in sorted(normal, key=lambda piece: -piece.score):
        text = piece.piece
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [(a, b) for a, b in splits if a in rank and b in rank]
        merges += sorted(known, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return merges


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _decoder(*, prefix: bool) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
