"""An induction circuit whose weights are written down: every measure must say what it is.

A GPT-2 of two layers without MLPs, one-hot vectors throughout. Head 0.0 attends to the position
before and writes its token into dimensions of their own; head 1.0 looks for the token among those,
and writes the token it attends to where the logits read it. The other heads are zero.
"""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import icl_helpers as icl

WORDS = ["<unk>", "<s>", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "Foo", "Bar", ":", "."]
N_TOKENS, N_POSITIONS, HIDDEN, D_HEAD = len(WORDS), 128, 256, 128
TOKEN, POSITION = slice(0, N_TOKENS), slice(N_TOKENS, N_TOKENS + N_POSITIONS)
BEFORE = slice(N_TOKENS + N_POSITIONS, 2 * N_TOKENS + N_POSITIONS)
PREVIOUS, INDUCTION = (0, 0), (1, 0)


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=N_TOKENS, n_positions=N_POSITIONS, n_embd=HIDDEN, n_layer=2, n_head=2,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name:
                parameter.zero_()
        words, places = torch.eye(N_TOKENS), torch.eye(N_POSITIONS)
        model.transformer.wte.weight[:, TOKEN] = words
        model.transformer.wpe.weight[:, POSITION] = places
        # Small logits: probabilities follow how often a label was seen, and do not saturate.
        model.lm_head.weight[:, TOKEN] = 0.2 * words
        for layer, head in enumerate(block.attn for block in model.transformer.h):
            # Columns of head 0's queries, keys and values, and rows of its output.
            query, key, value = (head.c_attn.weight[:, i * HIDDEN :][:, :D_HEAD] for i in range(3))
            if layer == PREVIOUS[0]:
                query[POSITION, :N_POSITIONS] = 10 * places
                key[POSITION, :N_POSITIONS] = places.roll(1, dims=1).triu(1)
                value[TOKEN, :N_TOKENS] = words
                head.c_proj.weight[:N_TOKENS, BEFORE] = 0.1 * words
            else:
                query[TOKEN, :N_TOKENS] = 10 * words
                key[BEFORE, :N_TOKENS] = words
                value[TOKEN, :N_TOKENS] = words
                head.c_proj.weight[:N_TOKENS, TOKEN] = 0.5 * words
    return model


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="module")
def sequences() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(26, generator=generator)[:20] + 2 for _ in range(4)])


def test_prefix_score_is_high_for_the_induction_head_alone(model, sequences):
    scores = icl.prefix_matching_scores(model, sequences).mean(0)
    assert scores[INDUCTION] > 0.95
    assert scores.flatten().topk(2).values[1] < 0.2


def test_previous_token_head_is_found(model, sequences):
    scores = icl.previous_token_scores(model, sequences)
    assert scores[PREVIOUS] > 0.99
    assert scores.flatten().topk(2).values[1] < 0.3


def test_induction_head_copies_and_no_other(model):
    assert icl.copying_scores(model).tolist() == [[0, 0], [1, 0]]


def test_induction_head_alone_speaks_for_what_followed(model, sequences):
    effects = icl.direct_logit_effects(model, sequences)
    assert effects[INDUCTION] > 1
    assert effects.abs().flatten().topk(2).values[1] < 0.01


def test_composition_is_through_keys_with_the_previous_token_head(model):
    keys = icl.composition_scores(model, kind="K")
    assert keys[(*PREVIOUS, *INDUCTION)] > 2 / HIDDEN**0.5
    assert keys.count_nonzero() == 1
    assert icl.composition_scores(model, kind="Q").count_nonzero() == 0
    assert icl.composition_scores(model, kind="V").count_nonzero() == 0


def test_removing_the_previous_token_head_lowers_the_prefix_score(model, sequences):
    falls = icl.causal_composition(model, sequences, [PREVIOUS, (0, 1)])
    assert falls[(0, *INDUCTION)] > 0.8
    assert (falls[1] == 0).all()


@torch.no_grad()
def repeated_correctly(model, sequences: torch.Tensor, *interventions) -> float:
    ids = torch.cat([torch.ones(4, 1, dtype=torch.long), sequences.repeat(1, 3)], dim=1)
    with icl.intervene(model, *interventions):
        said = model(ids).logits.argmax(-1)
    return float((said[:, 21:-1] == ids[:, 22:]).float().mean())


def test_knockout_of_the_pattern_removes_repetition_and_the_control_does_not(model, sequences):
    ids = torch.cat([torch.ones(4, 1, dtype=torch.long), sequences.repeat(1, 3)], dim=1)
    blocked = icl.repeated_token_pattern(ids)
    assert repeated_correctly(model, sequences) == 1
    assert repeated_correctly(model, sequences, icl.AttentionKnockout([INDUCTION], blocked)) < 0.1
    control = icl.control_pattern(blocked, seed=0)
    assert repeated_correctly(model, sequences, icl.AttentionKnockout([INDUCTION], control)) == 1
    assert repeated_correctly(model, sequences, icl.ZeroAblation([INDUCTION])) < 0.1


def test_induction_carries_no_function_vector(model, words):
    scores = icl.function_vector_scores(model, words, tasks=["repetition", "recursion"], seed=1)
    assert scores.abs().max() < 0.05
