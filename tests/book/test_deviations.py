"""Switches between the paper's text, the published code and this package; what they change."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pandas as pd
import pytest
import torch

import icl_helpers as icl
from icl_helpers.book import deviations
from icl_helpers.book import deviations as data
from tests.conftest import SHARED

ORIGINAL = SHARED / "original_data"
FEW_LABELS = "D.\n\nA B:Foo\n\nC D:Bar\n\nE F:"


def test_any_layer_control_is_one_draw_from_all_layers_but_the_last():
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    found = icl.conditions(scores, fractions=[0.25], ablations=["zero"], control="any_layer")
    every = [(layer, head) for layer in range(3) for head in range(6)]
    for condition in found[2:]:
        expected = random.Random(condition.ablation_seed).sample(every, 6)
        assert list(condition.heads) == expected
    with pytest.raises(icl.InputError, match="smaller fraction"):
        icl.conditions(scores, fractions=[0.9], ablations=["zero"], control="any_layer")
    with pytest.raises(icl.InputError, match="any_layer"):
        icl.conditions(scores, control="anything")


def test_opening_blank_line_hides_the_first_sequence_from_later_blank_lines(tokenizer):
    encoded = tokenizer(FEW_LABELS, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded.offset_mapping
    first = next(i for i, (_, end) in enumerate(offsets) if end > FEW_LABELS.index("A"))
    later = [i for i, (a, b) in enumerate(offsets) if a > first and FEW_LABELS[a:b].strip() == ""]
    without = icl.induction_pattern(FEW_LABELS, tokenizer, categories=["blank_lines"])
    names = ["blank_lines", "opening_blank_line"]
    with_it = icl.induction_pattern(FEW_LABELS, tokenizer, categories=names)
    more = (with_it & ~without).nonzero().tolist()
    assert more == [[query, first] for query in later]
    assert not (without & ~with_it).any()
    with pytest.raises(icl.InputError, match="add blank_lines"):
        icl.induction_pattern(FEW_LABELS, tokenizer, categories=["labels", "opening_blank_line"])


@pytest.fixture(scope="module")
def few_prompts():
    prompts = icl.build_prompts("wordseq1_binary", shots=3, seed=1)
    return sorted(prompts[:9], key=lambda prompt: prompt.doc_id % 4)


def test_answers_equal_one_plain_forward_pass_per_prompt(llama, tokenizer, few_prompts):
    found = deviations.answers(llama, tokenizer, few_prompts, batch_size=4)
    with_bos = deviations.answers(llama, tokenizer, few_prompts, batch_size=4, bos=1)
    for index, prompt in enumerate(few_prompts):
        ids = tokenizer(prompt.context, add_special_tokens=False).input_ids
        labels = [
            tokenizer(prompt.context + choice, add_special_tokens=False).input_ids[len(ids)]
            for choice in prompt.choices
        ]
        for answers, given in ((found, ids), (with_bos, [0, *ids])):
            with torch.no_grad():
                scores = llama(torch.tensor([given])).logits[0, -1].log_softmax(-1)[labels]
            wrong = [float(score) for place, score in enumerate(scores) if place != prompt.target]
            margin = float(scores[prompt.target]) - max(wrong)
            assert answers.margin[index] == pytest.approx(margin, abs=1e-4)
            assert bool(answers.correct[index]) == (margin > 0)
            assert int(answers.chosen[index]) == int(scores.argmax())


def test_answers_under_a_condition_equal_evaluate(llama, tokenizer):
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    for condition in icl.conditions(
        scores, fractions=[0.3], ablations=["zero", "knockout"], ablation_seeds=[42]
    ):
        expected = icl.evaluate(
            llama, tokenizer, tasks=["repetition"], shots=3, seeds=[42], limit=20,
            sampling="first", conditions=[condition],
        )  # fmt: skip
        prompts = icl.build_prompts("repetition", shots=3, seed=42)[:20]
        found = deviations.answers(llama, tokenizer, prompts, condition=condition)
        assert found.accuracy == pytest.approx(expected["accuracy"].item())
        assert found.margin.numpy() == pytest.approx(expected.documents["margin"], abs=1e-3)


def test_labels_that_begin_alike_are_told_apart_by_the_rest(llama, tokenizer, few_prompts):
    prompt = icl.Prompt(few_prompts[0].context, ("FooFoo", "FooBar"), 1, 0)
    found = deviations.answers(llama, tokenizer, [prompt])
    before = len(tokenizer(prompt.context, add_special_tokens=False).input_ids)
    sums = []
    for choice in prompt.choices:
        ids = torch.tensor([tokenizer(prompt.context + choice, add_special_tokens=False).input_ids])
        with torch.no_grad():
            logs = llama(ids).logits[0, before - 1 : -1].log_softmax(-1)
        sums.append(logs.gather(1, ids[0, before:, None]).sum().item())
    assert len(ids[0]) > before + 1
    assert found.log_probability.item() == pytest.approx(sums[1], abs=1e-4)
    assert found.margin.item() == pytest.approx(sums[1] - sums[0], abs=1e-4)


def test_comparison_counts_changed_answers_and_averages_seeds():
    def side(*chosen):
        values = torch.tensor(chosen)
        return lambda prompts: deviations.Answers(values, values == 1, *[values.double()] * 2)

    frame = deviations.compare(
        {"task": []}, {"one": side(1, 1, 0, 0), "two": [side(1, 0, 0, 0), side(0, 0, 1, 1)]}
    ).set_index("side")
    assert frame.loc["one", ["accuracy", "changed"]].tolist() == [50, 0]
    assert frame.loc["two", "accuracy"] == 37.5
    assert frame.loc["two", "changed"] == pytest.approx(100 * (1 / 4 + 1) / 2)
    assert frame.loc["two", "margin"] == pytest.approx((1 / 4 + 1) / 2)
    one = frame.reset_index()
    assert "50.0 % one, 37.5 % two; 62.5 % of" in deviations.summary_sentence(one)
    # Two tasks that behave in opposite ways have no common number.
    other = one.assign(task="other", accuracy=100 - one["accuracy"], changed=[0.0, 2.5])
    said = deviations.summary_sentence(pd.concat([one, other]))
    assert "50.0 % one, 37.5 to 62.5 % two over 2 tasks; 2.5 to 62.5 % of a task's" in said


def test_score_term_is_the_attention_to_the_position_after_bos(llama):
    sequence = torch.randperm(390, generator=torch.Generator().manual_seed(4))[:12][None] + 2
    frame = deviations.score_term(llama, sequence)
    with torch.no_grad():
        ids = torch.cat([torch.tensor([[0]]), sequence.repeat(1, 4)], dim=1)
        llama.set_attn_implementation("eager")
        attentions = llama(ids, output_attentions=True).attentions
    for row in frame.itertuples():
        extra = sum(float(attentions[row.layer][0, row.head, i, 1]) for i in (24, 36, 48)) / 36
        assert row.difference == pytest.approx(extra, abs=1e-6)
    assert frame["rank"].tolist() == list(range(1, 13))
    assert sorted(frame["corrected_rank"]) == list(range(1, 13))
    assert frame["published"].is_monotonic_decreasing


def test_expected_overlap_is_what_many_draws_give():
    induction = [icl.Head(1, 0), icl.Head(1, 3), icl.Head(1, 5), icl.Head(2, 2)]
    drawn = [icl.random_heads(induction, 6, seed=seed) for seed in range(4000)]
    found = deviations.control_overlap(induction, drawn, 6)
    assert found["expected"] == pytest.approx((9 + 1) / 6)
    assert sum(found["drawn"]) / 4000 == pytest.approx(found["expected"], abs=0.05)
    # By counting: no overlap in layer 1 for 1 of 20 choices, in layer 2 for 5 of 6.
    assert found["any"] == pytest.approx(1 - 1 / 20 * 5 / 6, abs=0.02)


def test_rows_by_the_published_rule_repeat_and_degenerate_as_calculated():
    rows = [data.published_rule_rows("repetition", seed=seed) for seed in range(40)]
    audits = [data.row_audit(found) for found in rows]
    mean = {key: sum(audit[key] for audit in audits) / 40 for key in audits[0]}
    assert mean["documents"] == 500
    # 250 draws from 26 x 26 pairs of letters.
    assert mean["duplicates"] == pytest.approx(250 - 676 * (1 - (675 / 676) ** 250), abs=2)
    assert mean["degenerate"] == pytest.approx(250 / 26, abs=1.5)
    for text, label in rows[0]:
        a, b, c, d = text.split()
        assert (a, b) == (c, d) if label == "Foo" else len({a, b, c, d}) == 4
    four = data.published_rule_rows("wordseq1_4way")
    assert len(four) == 1000
    assert data.row_audit(data.load_rows("repetition"))["duplicates"] == 0
    with pytest.raises(icl.InputError, match="every pair once"):
        data.published_rule_rows("wordseq1_binary")


@pytest.mark.skipif(not ORIGINAL.is_dir(), reason="the published data files are not here")
def test_audit_of_the_published_files():
    place = str(ORIGINAL)
    found = data.task_audit("repetition", data=place, seeds=[42, 43, 44])
    assert (found["documents"], found["duplicates"], found["degenerate"]) == (500, 50, 11)
    short = 0
    for shots in (5, 10):
        for seed in (42, 43, 44):
            for prompt in icl.build_prompts("repetition", shots=shots, seed=seed, data=place):
                short += len(prompt.context.split("\n\n")) - 2 != shots
    assert found["prompts short of a demonstration"] == short
    assert found["prompts"] == 3000


def test_published_letters_fall_back_to_their_rule(tmp_path, monkeypatch):
    monkeypatch.setenv("ICL_CACHE_DIR", str(tmp_path))
    places, source = data.published_letters()
    assert "rule" in source
    assert data.load_rows("recursion", data=places["recursion"])
    assert data.published_letters("/some/folder")[0]["recursion"] == "/some/folder"
    if ORIGINAL.is_dir():
        from icl_helpers.tasks.data import fetch_original

        fetch_original(source=ORIGINAL)
        assert data.published_letters() == (
            dict.fromkeys(places, "original"),
            "the published files",
        )


@pytest.fixture(scope="module")
def splitting():
    """Every character a token of its own, but for the pieces 'car', 'rot' and 'Foo'."""
    return data.small_tokenizer(["car rot Foo"] * 50, vocab_size=256 + 8)


WORDS = "D.\n\nbeet car:Foo\n\ncarrot bus:Foo\n\nlettuce truck:"


def test_string_search_finds_a_word_inside_a_longer_one(splitting):
    found = {
        (m.word, WORDS[m.start : m.end], m.right) for m in data.string_matches(WORDS, splitting)
    }
    assert ("car", "car", False) in found
    assert ("carrot", "carrot", True) in found
    assert {m[0] for m in found if m[2]} == {"carrot", "bus", "beet", "car", "lettuce", "truck"}
    assert {m[0] for m in found if not m[2]} == {"car"}
    audit = data.search_audit([WORDS], splitting)
    assert (audit["words"], audit["found"], audit["found wrongly"]) == (6, 6, 1)
    assert audit["labels joined to their colon"] == 0


def test_a_word_found_wrongly_adds_pairs_and_a_right_search_none(splitting, tokenizer):
    more = data.string_matched_pattern(WORDS, splitting) & ~icl.induction_pattern(WORDS, splitting)
    offsets = splitting(WORDS, return_offsets_mapping=True)["offset_mapping"]
    pairs = {
        (WORDS[slice(*offsets[query])].strip(), offsets[key][0])
        for query, key in more.nonzero().tolist()
    }
    # The vehicle inside "carrot" may not see the colon that followed the vehicle before it.
    assert pairs == {("car", WORDS.index(":"))}
    prompt = icl.build_prompts("wordseq2_binary", shots=4, seed=1)[0].context
    exact = data.string_matched_pattern(prompt, tokenizer, search=tokenizer)
    if all(match.right for match in data.string_matches(prompt, tokenizer)):
        assert torch.equal(exact, icl.induction_pattern(prompt, tokenizer))


def test_tokens_across_words_join_labels_to_their_colons():
    contexts = [p.context for p in icl.build_prompts("wordseq2_binary", shots=5, seed=1)[:50]]
    across = data.small_tokenizer(contexts, vocab_size=500, split_words=False)
    assert data.search_audit(contexts, across)["labels joined to their colon"] > 0.9
    apart = data.small_tokenizer(contexts, vocab_size=500)
    assert data.search_audit(contexts, apart)["labels joined to their colon"] == 0


def test_resampled_accuracy_spreads_as_a_binomial():
    correct = torch.tensor([1.0] * 30 + [0.0] * 10)
    drawn = data.resampled_accuracy(correct, 100, draws=4000)
    assert drawn.mean() == pytest.approx(0.75, abs=0.01)
    assert drawn.std() == pytest.approx((0.75 * 0.25 / 100) ** 0.5, rel=0.1)


def test_blank_line_sentence_is_what_the_shipped_log_probabilities_give():
    rows: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    path = Path(icl.__file__).parent / "published" / "knockout_readings.csv"
    with path.open() as file:
        for row in csv.DictReader(file):
            pair = rows.setdefault((row["fraction"], row["doc_id"]), {})
            pair[row["blocked"]] = (float(row["Foo"]), float(row["Bar"]))
    differences, changed = [], 0
    for pair in rows.values():
        one, two = pair["first token"], pair["whole blank line"]
        differences += [abs(a - b) for a, b in zip(one, two, strict=True)]
        changed += (one[0] > one[1]) != (two[0] > two[1])
    said = deviations.blank_line_sentence()
    assert f"up to {max(differences):.2f} nats" in said
    assert f"{sum(differences) / len(differences):.3f} on average" in said
    assert f"{changed} of {len(rows)} answers" in said
    assert "SmolLM2-135M (instruct, 4-bit weights)" in said
