"""InternLM2's sentencepiece tokenizer as a fast one, which knows character offsets.

Its repository reads ``tokenizer.model`` with code of its own; transformers turns the same file into
a byte-fallback BPE, all but three things that are put right here: the order of the merges, the
handling of spaces, and the tokens around a text.
"""

from __future__ import annotations

import os

from tokenizers import Regex, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor, generate_merges

from icl_helpers.errors import InputError

__all__ = ["load_internlm2_tokenizer"]

_SPACE = "\u2581"
_BPE = 2  # trainer_spec.model_type


def load_internlm2_tokenizer(
    source: str | os.PathLike[str], *, revision: str | None = None
) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint directory or hub id.

    Reads ``tokenizer.json`` where there is one, else ``tokenizer.model``; special tokens and
    ``add_bos_token`` (default: true) come from ``tokenizer_config.json``. Raises
    :class:`InputError` for a sentencepiece model of another kind, and whatever transformers raises
    for missing and damaged files.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.init_kwargs.get("tokenizer_file"):
        _follow_sentencepiece(tokenizer)
        tokenizer.add_bos_token = tokenizer.init_kwargs.get("add_bos_token", True)
    return tokenizer


def _follow_sentencepiece(tokenizer: PreTrainedTokenizerFast) -> None:
    """Make it split text as its ``tokenizer.model`` does."""
    proto = SentencePieceExtractor(tokenizer.vocab_file).proto
    backend, spec = tokenizer.backend_tokenizer, proto.normalizer_spec
    if proto.trainer_spec.model_type != _BPE:
        raise InputError(f"{tokenizer.vocab_file} is not a BPE model, as InternLM2's is")
    # sentencepiece joins whichever neighbours make the best-scored piece; transformers goes by ids.
    vocabulary = backend.get_vocab(with_added_tokens=False)
    scores = {token: proto.pieces[number].score for token, number in vocabulary.items()}
    backend.model = BPE(
        vocabulary,
        generate_merges(vocabulary, scores),
        unk_token=backend.model.unk_token,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
    steps = [backend.normalizer]  # ends with spaces replaced by their sign
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(f"{_SPACE}{{2,}}"), _SPACE))
        steps.append(normalizers.Replace(Regex(f"^{_SPACE}|{_SPACE}$"), ""))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
        backend.decoder = decoders.Sequence(
            [backend.decoder, decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    backend.normalizer = normalizers.Sequence(steps)
