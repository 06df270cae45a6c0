"""Odd labels, odd data and odd logits through the whole evaluation, beside a slow oracle."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch

import icl_helpers as icl
from icl_helpers.cli import main
from icl_helpers.lm_eval_command import HFICL
from icl_helpers.models.reference_text import reference_texts
from icl_helpers.parameters import read_parameters
from icl_helpers.tasks import specs as task_registry
from tests.conftest import make_llama, make_tokenizer

FILE = "repetition_dataset_500.json"
LETTERS = ("A B C A B", "D E F G H", "K L M K L", "P Q R S T", "U V W U V", "B D F H K")


@pytest.fixture
def data(tmp_path):
    """Writes (text, label) rows to a data directory and returns its name."""

    def write(rows) -> str:
        content = [{"sequence": text, "label": label} for text, label in rows]
        (tmp_path / FILE).write_text(json.dumps(content))
        return str(tmp_path)

    return write


@pytest.fixture
def labelled(monkeypatch):
    """Gives the task repetition these labels."""

    def change(*choices: str) -> None:
        spec = replace(task_registry.get_task_spec("repetition"), choices=choices)
        monkeypatch.setitem(task_registry._TASKS, "repetition", spec)

    return change


@torch.no_grad()
def slow_correct(model, tokenizer, prompts) -> list[bool]:
    """One forward pass per label, token by token."""
    found = []
    for prompt in prompts:
        totals = []
        for label in prompt.choices:
            start = tokenizer(prompt.context, add_special_tokens=False).input_ids
            whole = tokenizer(prompt.context + label, add_special_tokens=False).input_ids
            assert whole[: len(start)] == start
            log = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
            totals.append(sum(float(log[i - 1, whole[i]]) for i in range(len(start), len(whole))))
        found.append(totals.index(max(totals)) == prompt.target)
    return found


@pytest.mark.parametrize(
    ("choices", "tokens_alike"),
    [
        (("Fob", "Foo"), 2),
        (("Foo", "Fo"), 2),
        (("F", "Fable and much more"), 1),
        (("Foo", "Bar"), 0),
    ],
)
@pytest.mark.parametrize("shots", [0, 3])
def test_labels_of_several_tokens_that_begin_alike_agree_with_a_slow_loop(
    data, labelled, choices, tokens_alike, shots
):
    labelled(*choices)
    rows = [(text, choices[i % 2]) for i, text in enumerate(LETTERS)]
    where = data(rows)
    model, tokenizer = make_llama(vocab_size=400), make_tokenizer(["x"], vocab_size=258)
    ids = [tokenizer(label, add_special_tokens=False).input_ids for label in choices]
    assert [a == b for a, b in zip(*ids, strict=False)][:tokens_alike] == [True] * tokens_alike
    model.config.max_position_embeddings = 2000  # bytes are tokens here
    found = icl.evaluate(
        model, tokenizer, tasks=["repetition"], shots=shots, seeds=[42], data=where
    )
    prompts = icl.build_prompts("repetition", shots=shots, seed=42, data=where)
    expected = slow_correct(model, tokenizer, prompts)
    assert found.documents["correct"].tolist() == expected
    assert found["accuracy"].iloc[0] == sum(expected) / len(expected)


def test_duplicated_rows_are_scored_each_and_never_demonstrate_themselves(data, llama, tokenizer):
    rows = [(text, ("Foo", "Bar")[i % 2]) for i, text in enumerate(LETTERS)]
    where = data([*rows, *rows])
    request = {"tasks": ["repetition"], "shots": 4, "seeds": [42], "data": where}
    found = icl.evaluate(llama, tokenizer, **request)
    assert found["n"].tolist() == [12]
    prompts = icl.build_prompts("repetition", shots=4, seed=42, data=where)
    assert found.documents["correct"].tolist() == slow_correct(llama, tokenizer, prompts)
    for prompt, (text, label) in zip(prompts, [*rows, *rows], strict=True):
        assert f"{text}:{label}" not in prompt.context


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "must hold a list of rows, at least one"),
        ([("A B", "Foo"), ("C D", "Foo")], "a single class, .'Foo'.; at least two are needed"),
        ([("", "Foo"), ("C D", "Bar")], "row 0: expected"),
    ],
)
def test_data_that_cannot_be_evaluated_give_one_clear_error(data, llama, tokenizer, rows, message):
    where = data(rows)
    with pytest.raises(icl.InputError, match=message):
        icl.evaluate(llama, tokenizer, tasks=["repetition"], shots=0, seeds=[42], data=where)


def test_empty_data_fail_the_command_with_one_line(data, tmp_path, capfd):
    where = data([])
    code = main(
        ["evaluate", "--tasks", "repetition", "--data", where, "--run-dir", str(tmp_path / "run")]
    )
    assert code == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("icl:")]
    assert len(errors) == 1
    assert FILE in errors[0]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_logit_of_a_label_that_is_not_finite_is_counted_and_left_out(tokenizer, tmp_path, value):
    model = make_llama()
    bar = tokenizer("Bar", add_special_tokens=False).input_ids[0]
    odd = tokenizer("Q", add_special_tokens=False).input_ids[0]
    given = {}
    model.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(ids=kwargs["input_ids"]), with_kwargs=True
    )

    def spoil(module, args, output):
        rows = (given["ids"] == odd).any(1)
        output[rows, :, bar] = value
        return output

    model.lm_head.register_forward_hook(spoil)
    with pytest.warns(UserWarning, match="not finite"):
        found = icl.evaluate(
            model, tokenizer, tasks=["repetition"], shots=0, seeds=[42], limit=60,
            sampling="first", run_dir=tmp_path,
        )  # fmt: skip
    prompts = icl.build_prompts("repetition", shots=0, seed=42)[:60]
    spoilt = [odd in tokenizer(prompt.context).input_ids for prompt in prompts]
    assert 0 < sum(spoilt) < 60
    assert (~found.documents["valid"]).tolist() == spoilt
    assert found["n_invalid"].tolist() == [sum(spoilt)]
    whole = slow_correct(make_llama(), tokenizer, prompts)
    kept = [right for right, bad in zip(whole, spoilt, strict=True) if not bad]
    assert found["accuracy"].iloc[0] == pytest.approx(sum(kept) / len(kept))
    stored = pd.read_parquet(tmp_path / "results.parquet")
    assert stored["n_invalid"].tolist() == [sum(spoilt)]


@pytest.mark.parametrize("ablation", ["zero", "mean", "knockout"])
@pytest.mark.parametrize("where", ["layer", "head", "interrupt"])
def test_exception_inside_the_evaluated_model_leaves_it_as_it_was(tokenizer, ablation, where):
    model = make_llama()
    ids = torch.randint(2, 400, (2, 40), generator=torch.manual_seed(3))
    with torch.inference_mode():
        plain = model(ids).logits
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = {
        name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()
    }
    conditions = icl.conditions(
        torch.rand(3, 4, generator=torch.manual_seed(0)), fractions=[0.4], ablations=[ablation],
        ablation_seeds=[42], full=False,
        head_outputs=torch.zeros(3, 512, 4, 8) if ablation == "mean" else None,
    )  # fmt: skip
    error = KeyboardInterrupt if where == "interrupt" else RuntimeError
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 7:
            raise error("in the middle of a cell")

    module = model.lm_head if where == "head" else model.model.layers[1].mlp
    handle = module.register_forward_hook(fail)
    with pytest.raises(error, match="in the middle"):
        icl.evaluate(
            model, tokenizer, tasks=["repetition"], shots=2, seeds=[42], limit=20, batch_size=3,
            conditions=conditions,
        )  # fmt: skip
    handle.remove()
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, plain)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert hooks == {
        name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()
    }


def test_conditions_that_results_cannot_tell_apart_are_refused(llama, tokenizer):
    first, second = (
        icl.Condition("random_heads", "zero", 0.1, 42, heads=(icl.Head(0, head),))
        for head in (0, 1)
    )
    with pytest.raises(
        icl.InputError, match=r"'random_heads', 'zero', 0\.1, '', 42.*ablation_seed"
    ):
        icl.evaluate(llama, tokenizer, tasks=["repetition"], conditions=[first, second])
    other = replace(second, ablation_seed=43)
    request = {"tasks": ["repetition"], "shots": 2, "seeds": [42], "limit": 12}
    both = icl.evaluate(llama, tokenizer, conditions=[first, other], **request)
    for condition in (first, other):
        alone = icl.evaluate(llama, tokenizer, conditions=[condition], **request)
        of_both = both.documents[both.documents["ablation_seed"] == condition.ablation_seed]
        assert of_both["margin"].tolist() == alone.documents["margin"].tolist()


def test_what_is_asked_for_twice_counts_once(llama, tokenizer):
    scores = torch.rand(3, 4)
    once = icl.conditions(scores, fractions=[0.1, 0.3], ablations=["zero"], ablation_seeds=[1, 2])
    twice = icl.conditions(
        scores, fractions=[0.1, 0.3, 0.1], ablations=["zero"] * 2, ablation_seeds=[1, 2, 1]
    )
    assert [condition.identity() for condition in twice] == [c.identity() for c in once]
    request = {"tasks": ["repetition"], "conditions": once, "limit": 3}
    found = icl.evaluate(llama, tokenizer, shots=[0, 2], seeds=[42, 43], **request)
    request["conditions"] = ["full", *once, icl.Condition("full"), *twice]
    repeated = icl.evaluate(llama, tokenizer, shots=[0, 2, 0], seeds=[42, 43, 42], **request)
    pd.testing.assert_frame_equal(pd.DataFrame(found), pd.DataFrame(repeated), check_exact=True)
    assert set(found["n"]) == {3}


READ = ("utf-8", "utf-8-sig", "utf-16")
REFUSED = ("utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "latin-1")


@pytest.mark.parametrize("word", ["café", "cafe"])
@pytest.mark.parametrize("encoding", [*READ, *REFUSED])
@pytest.mark.parametrize("kind", ["rows", "text rows", "reference", "parameters"])
def test_files_as_people_save_them_are_read_or_refused_in_one_line(tmp_path, encoding, kind, word):
    """Of plain letters every byte of another encoding may be one of UTF-8 too."""
    texts = [f"{word} {number}" for number in range(6)]
    rows = [{"sequence": text, "label": ("Foo", "Bar")[i % 2]} for i, text in enumerate(texts)]
    lines = [{"sentence": text, "label": i % 2} for i, text in enumerate(texts)]
    dumps = {"rows": json.dumps(rows, ensure_ascii=False), "reference": "\n".join(texts)}
    dumps["text rows"] = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    dumps["parameters"] = f"limit: 3\ntasks: [repetition]\nreference: {texts[0]}\n"
    names = {"rows": FILE, "text rows": "sst2/train.jsonl", "parameters": "p.yaml"}
    path = tmp_path / names.get(kind, "reference.txt")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(dumps[kind].encode(encoding))
    (path.parent / "validation.jsonl").write_text(dumps["text rows"], encoding="utf-8")

    def read() -> str:
        if kind == "rows":
            prompts = icl.build_prompts("repetition", shots=0, seed=42, data=str(tmp_path))
            return prompts[0].context
        if kind == "text rows":
            shown = icl.build_prompts("sst2", shots=2, seed=42, data=str(tmp_path))
            return shown[0].context.split("\n\n")[1]
        if kind == "reference":
            return next(iter(reference_texts("some/model", reference=str(path))))
        return str(read_parameters(path)["reference"])

    if encoding in REFUSED and (word, encoding) != ("cafe", "latin-1"):
        with pytest.raises(icl.InputError, match=re.escape(path.name)) as error:
            read()
        assert "\n" not in str(error.value)
    else:
        assert word in read()


def test_a_folder_is_one_model_however_it_is_written(tmp_path, monkeypatch):
    model, tokenizer = icl.load_model("icl-tiny")
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "org" / "m")
    (tmp_path / "link").symlink_to(tmp_path / "org" / "m")
    monkeypatch.chdir(tmp_path)
    spellings = ["org/m", "./org/m", "org/m/", "org/../org/m", str(tmp_path / "org" / "m"), "link"]
    names = {icl.stage_parameters(model=name).model for name in spellings}
    assert names == {str((tmp_path / "org" / "m").resolve())}
    assert icl.stage_parameters(model="icl-tiny").model == "icl-tiny"
    assert icl.stage_parameters(model="org/other").model == "org/other"
    # A worker, and a command that names no run directory, have it by that name too.
    assert {icl.ModelSource(name).name for name in spellings} == names
    assert icl.ModelSource("org/other").name == "org/other"
    for name in spellings:
        assert main(["scores", "--model", name]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["m"]
    monkeypatch.chdir(tmp_path / "org")
    (tmp_path / "org" / "icl-tiny").mkdir()  # named like an embedded model
    assert icl.ModelSource("icl-tiny").name == "icl-tiny"
    run_dir = str(tmp_path / "runs" / "m")
    for name in ("m", "../org/m/", "../link"):
        assert main(["scores", "--model", name, "--run-dir", run_dir]) == 0
        assert main(["cost", "--model", name, "--tasks", "repetition"]) == 0
        assert HFICL(name).model.config.vocab_size == model.config.vocab_size
