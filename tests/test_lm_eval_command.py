"""lm-eval's requests under ``hf-icl``: each runs under its condition, as stock lm-eval on the edited
model does, or is refused by name; so is every model argument that means nothing here."""

from __future__ import annotations

import contextlib

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import icl_helpers as icl
from icl_helpers import lm_eval_command
from icl_helpers.cli import main
from icl_helpers.evaluation.conditions import Condition
from icl_helpers.evaluation.scorer import InterventionLM
from icl_helpers.lm_eval_command import HFICL
from tests.conftest import make_llama

HEADS = (icl.Head(0, 1), icl.Head(1, 2), icl.Head(2, 0))
TEXTS = ["A B C A B", "apple dog:Foo and much more of it, " * 12, "x"]


def condition(ablation: str) -> Condition:
    torch.manual_seed(1)
    means = torch.randn(3, 200, 4, 8)
    return Condition("induction_heads", ablation, 0.2, None, HEADS, means)


def under(model, ablation: str):
    chosen = condition(ablation)
    return (
        icl.intervene(model, *chosen.interventions())
        if ablation != "none"
        else contextlib.nullcontext()
    )


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


REQUESTS = {
    # Windows of 120 tokens: one text is cut into several.
    "loglikelihood_rolling": [(text,) for text in TEXTS],
    "loglikelihood": [(a, b) for a in ("", *TEXTS[::2]) for b in (" A", " dog and cat")],
    "generate_until": [
        (text, {"until": ["\n\n"], "max_gen_toks": 9, "do_sample": False}) for text in TEXTS[::2]
    ],
}


@pytest.mark.parametrize("ablation", ["none", "zero", "mean"])
@pytest.mark.parametrize("kind", REQUESTS)
def test_requests_equal_stock_lm_eval_on_the_edited_model(kind, ablation, tokenizer):
    model = make_llama(eos_token_id=None)
    ours = InterventionLM(model, tokenizer, max_length=120)
    stock = HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=120, add_bos_token=False, batch_size=1
    )
    asked = instances(kind, REQUESTS[kind])
    with ours.under(condition(ablation)):
        found = getattr(ours, kind)(asked, disable_tqdm=True)
    with under(model, ablation):
        expected = getattr(stock, kind)(asked, disable_tqdm=True)
    if kind == "generate_until":
        assert found == expected
    else:
        assert torch.tensor(found).allclose(torch.tensor(expected), atol=1e-3)
    plain = getattr(ours, kind)(asked, disable_tqdm=True)
    assert (plain == found) == (ablation == "none")


@pytest.mark.parametrize("kind", REQUESTS)
def test_requests_without_an_induction_pattern_are_refused_for_the_knockout(kind, tokenizer):
    lm = InterventionLM(make_llama(), tokenizer)
    with lm.under(condition("knockout")), pytest.raises(icl.InputError, match="induction pattern"):
        getattr(lm, kind)(instances(kind, REQUESTS[kind][-1:]), disable_tqdm=True)


def test_prompts_that_the_context_does_not_hold_are_refused_and_never_cut(tokenizer):
    lm = InterventionLM(make_llama(), tokenizer, max_length=40)
    for kind, arguments in (
        ("loglikelihood", (TEXTS[1], " A")),
        ("generate_until", (TEXTS[0], {"until": [], "max_gen_toks": 60})),
    ):
        with pytest.raises(icl.InputError, match="longer than the model's context of 40"):
            getattr(lm, kind)(instances(kind, [arguments]), disable_tqdm=True)


def test_a_bos_shifts_the_blocked_pairs(tokenizer):
    model = make_llama()
    prompts = icl.build_prompts("wordseq1_binary", shots=2, seed=42)[:3]
    lm = InterventionLM(model, tokenizer, add_bos_token=True)
    # This tokenizer adds none by itself.
    lm.tok_encode = lambda text, **_: [0, *tokenizer(text, add_special_tokens=False).input_ids]
    asked = [(prompt.context, label) for prompt in prompts for label in prompt.choices]
    with lm.under(condition("knockout")):
        found = lm.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    for (context, label), (value, _) in zip(asked, found, strict=True):
        n = len(tokenizer(context, add_special_tokens=False).input_ids)
        ids = [0, *tokenizer(context + label, add_special_tokens=False).input_ids]
        blocked = torch.zeros(len(ids), len(ids), dtype=torch.bool)
        blocked[1 : n + 1, 1 : n + 1] = icl.induction_pattern(context, tokenizer)
        with torch.no_grad(), icl.intervene(model, icl.AttentionKnockout(HEADS, blocked)):
            log = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert value == pytest.approx(
            sum(float(log[i - 1, ids[i]]) for i in range(n + 1, len(ids))), abs=1e-3
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"no_such": 3}, "'no_such' is no model argument of hf-icl; they are pretrained, revision"),
        ({"peft": "an-adapter"}, "'peft'.*merge it into the model.*pretrained"),
        ({"load_in_4bit": True}, "use quantization=4bit"),
        ({"parallelize": True}, "use device_map=auto"),
        ({"tokenizer": "gpt2"}, "the model's own tokenizer"),
        ({"truncation": True}, "never cut"),
        ({"batch_size": "auto:x"}, "batch_size must be a number, got 'auto:x'"),
        ({"ablate": "half"}, "ablate must be none, induction, random, pattern.*'half'"),
        ({"control": "none"}, "control must be one of"),
        ({"fraction": "much"}, "fraction must be a number, got 'much'"),
        ({"fraction": 3}, "fraction must lie in"),
    ],
)
def test_model_arguments_that_mean_nothing_are_refused_before_a_model_is_loaded(
    arguments, message, monkeypatch
):
    monkeypatch.setattr(lm_eval_command, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(icl.InputError, match=message):
        HFICL("icl-tiny", **arguments)


def test_usual_model_arguments_work_or_say_why_not():
    assert HFICL(batch_size="auto:4", max_batch_size=8)._batch_size_wanted == "auto"
    assert HFICL(batch_size="3", device="cuda:0")._batch_size_wanted == 3
    with pytest.raises(icl.InputError, match="tokenizer does not put a BOS"):
        HFICL(add_bos_token=True)
    with pytest.raises(icl.InputError, match="max_length must be from 1 to .* 512 tokens, got 513"):
        HFICL(max_length=513)


TASK = """
task: my_letters
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: [A, B]
doc_to_target: A
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["--include_path={}", "--include_path {}"])
def test_a_users_task_folder_stands_beside_ours(form, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(TASK)
    given = form.format(tmp_path).split(" ")
    assert main(["lm-eval", "validate", "--tasks", "my_letters,repetition", *given]) == 0
    assert "All tasks found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "repetition", "--use_cache", "c"], "--use_cache knows neither"),
        (
            ["--tasks", "repetition", "--include_path", "no/such"],
            "include_path must be a directory",
        ),
    ],
)
def test_what_would_serve_other_numbers_or_no_tasks_is_refused(arguments, message, capsys):
    assert main(["lm-eval", "--model", "hf-icl", *arguments]) == 2
    assert message in capsys.readouterr().err
