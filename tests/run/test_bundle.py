"""Bundles: what goes out comes back to the last digit, and nothing but that is taken in."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import icl_helpers as icl
from icl_helpers.attention.scores import attention_patterns
from icl_helpers.cli import main
from icl_helpers.evaluation.store import KEYS
from icl_helpers.files import stage_notebooks
from icl_helpers.run.bundle import FORMAT, export_run, import_bundle, open_bundle
from icl_helpers.run.run import run_at
from icl_helpers.run.verify import verify_bundle
from tests.conftest import ROOT, made_once

# A sentence of each kind; the rows of text tasks have the columns of the data set on the hub.
SST2 = [
    {"sentence": f"a {'fine' if n % 2 else 'dull'} film, number {n}", "label": n % 2}
    for n in range(12)
]
PARAMETERS = {
    "model": "icl-tiny", "tasks": ["wordseq1_binary", "repetition"], "nlp_tasks": ["sst2"],
    "labels": "semantic", "shots": [0, 2], "seeds": [42, 43], "ablation_seeds": [42], "limit": 3,
    "control": ["strict"],
}  # fmt: skip
KINDS = {"tasks": ("full", "mean", "zero", "knockout"), "nlp_tasks": ("full", "mean", "zero")}


def make(folder: Path) -> None:
    """A run in ``run`` on text data in ``data`` and a reference text of its own, and its bundle."""
    task = folder / "data" / "texts" / "sst2"
    task.mkdir(parents=True)
    for split in ("train", "validation"):
        (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SST2))
    source = ROOT / "icl_helpers" / "embedded" / "icl-tiny" / "reference.txt"
    shutil.copyfile(source, folder / "data" / "reference.txt")
    run = icl.Run(
        icl.stage_parameters(
            **PARAMETERS, run_dir=str(folder / "run"), data_dir=str(folder / "data" / "texts"),
            reference=str(folder / "data" / "reference.txt"),
        )
    )  # fmt: skip
    for group, kinds in KINDS.items():
        run.evaluate(*kinds, group=group)
    export_run(run, folder / "bundle")


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    return made_once(tmp_path_factory, "bundle", make)


@pytest.fixture
def bundle(made, tmp_path) -> Path:
    """A bundle of its own, to be damaged."""
    return Path(shutil.copytree(made / "bundle", tmp_path / "bundle"))


def sign(bundle: Path) -> None:
    """Write the present hashes into the manifest, as a forger would."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name, file in manifest["files"].items():
        file["sha256"] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    places = [name for name in (*KEYS, "doc_id") if name in frame]
    return frame.sort_values(places).reset_index(drop=True)


# What a machine without the run's model says to whoever loads it, in every process. Exercises use
# icl-tiny whatever the run's model is: it comes with the package, and is loaded without the run.
UNLOADABLE = """
from icl_helpers.run.run import Run
def refuse(run):
    raise AssertionError("the run's model or tokenizer was loaded")
Run._load = refuse
"""


@pytest.fixture
def unloadable(tmp_path) -> dict[str, str]:
    """An environment in whose processes no model can be loaded."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(UNLOADABLE)
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", str(ROOT))])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_imported_run_executes_every_stage_without_model_and_data_and_has_the_same_tables(
    made, tmp_path, unloadable
):
    run = import_bundle(made / "bundle", tmp_path / "imported")
    for name in ("documents", "results"):
        before = pd.read_parquet(made / "run" / f"{name}.parquet")
        pd.testing.assert_frame_equal(
            pd.read_parquet(run / f"{name}.parquet"), before, check_exact=True
        )
    command = [sys.executable, "-m", "icl_helpers.cli", "run", "--run-dir", str(run)]
    done = subprocess.run(command, cwd=tmp_path, env=unloadable, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(stage_notebooks())
    # A bundle without measurements: the pages say so, and how to make them.
    page = (run / "notebooks" / "09_which_heads.ipynb").read_text()
    assert "bundle lacks it (dose and response)" in page
    assert f"icl run --run-dir {run} --measure" in page
    for name in ("documents", "results"):
        before = in_order(pd.read_parquet(made / "run" / f"{name}.parquet"))
        after = in_order(pd.read_parquet(run / f"{name}.parquet"))
        pd.testing.assert_frame_equal(after, before, check_exact=True)
    seconds = json.loads((made / "bundle" / "run.json").read_text()).get("seconds")
    assert json.loads((run / "run.json").read_text()).get("seconds") == seconds


def test_cells_come_back_byte_by_byte(made, tmp_path):
    run = import_bundle(made / "bundle", tmp_path / "imported")
    before = {path.name: path.read_bytes() for path in (made / "run" / "cells").iterdir()}
    assert {path.name: path.read_bytes() for path in (run / "cells").iterdir()} == before
    assert len(before) > 50
    assert import_bundle(made / "bundle", run) == run


@pytest.mark.slow
def test_run_goes_on_where_the_model_is(made, tmp_path):
    imported = run_at(import_bundle(made / "bundle", tmp_path / "imported"))
    before = {path.name for path in (imported.directory / "cells").iterdir()}
    more = imported.parameters.model_copy(
        update={
            "seeds": [42, 43, 44],
            "tasks": ["repetition"],
            "reference": str(made / "data" / "reference.txt"),
        }
    )
    found = icl.Run(more).evaluate("full", "mean")
    after = {path.name for path in (imported.directory / "cells").iterdir()}
    # Seed 44 with examples: full, and per fraction the induction heads and one control.
    assert before < after
    assert len(after - before) == 5
    fresh = icl.Run(more.model_copy(update={"run_dir": str(tmp_path / "fresh")})).evaluate(
        "full", "mean"
    )
    pd.testing.assert_frame_equal(found, fresh, check_exact=False, atol=1e-12)


def test_another_model_does_not_go_on_with_an_imported_run(made, tmp_path):
    run = import_bundle(made / "bundle", tmp_path / "imported")
    info = json.loads((run / "run.json").read_text())
    info["identity"]["key"]["fingerprint"] = "0" * 16
    (run / "run.json").write_text(json.dumps(info))
    with pytest.raises(icl.InputError, match="differs from its model in fingerprint"):
        _ = run_at(run).model


def test_bundle_holds_the_attention_and_the_means_that_the_model_gives(made):
    bundle = open_bundle(made / "bundle")
    model, tokenizer = icl.load_model("icl-tiny")
    views = bundle.views()
    assert len(views) == 2
    for view in views.values():
        ids = tokenizer(view.text, add_special_tokens=False, return_tensors="pt").input_ids
        heads = [(layer, head) for layer in range(model.config.num_hidden_layers)
                 for head in range(model.config.num_attention_heads)]  # fmt: skip
        expected = attention_patterns(model, ids, heads)
        assert list(view.plain) == sorted(expected) or set(view.plain) == set(expected)
        for head, attention in expected.items():
            assert (view.plain[head] - attention[0]).abs().max() <= 0.5 / 255 + 1e-6
    whole = load_file(made / "run" / "mean_head_outputs.safetensors")["mean_head_outputs"]
    specs = [cell.spec for cell in bundle.cells() if cell.spec["ablation"] == "mean"]
    for spec in specs:
        means, key = bundle.means([tuple(head) for head in spec["heads"]])
        assert key == spec["means"]
        for layer, head in spec["heads"]:
            n = means.shape[1]
            assert torch.equal(means[layer, :, head], whole[layer, :n, head])
    # Causality: as many positions as the longest prompt of the cells has, and no more.
    assert {bundle.means([tuple(h) for h in spec["heads"]])[0].shape[1] for spec in specs} == {
        max(len(tokenizer(p.context + p.choices[0], add_special_tokens=False).input_ids)
            for p in longest_prompts(made))
    }  # fmt: skip


def longest_prompts(made: Path) -> list[icl.Prompt]:
    """The documents that the run has of its tasks, with the most examples."""
    sets = [
        ("wordseq1_binary", "synthetic"),
        ("repetition", "synthetic"),
        ("sst2", str(made / "data" / "texts")),
    ]
    documents = pd.read_parquet(made / "run" / "documents.parquet")
    return [
        prompt
        for task, data in sets
        for seed in (42, 43)
        for prompt in icl.build_prompts(task, shots=2, seed=seed, data=data)
        if prompt.doc_id in set(documents.loc[documents["task"] == task, "doc_id"])
    ]


def test_nothing_of_this_machine_is_in_a_bundle(made, monkeypatch, tmp_path):
    for path in (made / "bundle").iterdir():
        content = path.read_bytes()
        assert str(made).encode() not in content
        assert str(Path.home()).encode() not in content or str(Path.home()) == "/root"
    info = json.loads((made / "bundle" / "run.json").read_text())
    assert info["parameters"]["data_dir"] == "texts"
    assert info["parameters"]["reference"] == "reference.txt"
    assert info["parameters"]["run_dir"] == "runs/run"
    for cell in open_bundle(made / "bundle").cells():
        assert "/" not in cell.spec["data"]
    # A secret of the environment that slipped into what is exported stops it.
    monkeypatch.setenv("SOME_TOKEN", "reference.txt")
    with pytest.raises(icl.LeakError, match="shown.json"):
        export_run(run_at(made / "run"), tmp_path / "leaks")
    assert not (tmp_path / "leaks").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: (b / "cells.parquet").write_bytes((b / "cells.parquet").read_bytes()[:-1]), "cells.parquet is damaged"),
        (lambda b: (b / "heads.json").write_text("{}"), "heads.json is damaged"),
        (lambda b: (b / "means.parquet").unlink(), "means.parquet is missing"),
        (lambda b: (b / "more.txt").touch(), "more.txt is not part"),
        (lambda b: (b / "folder").mkdir(), "folder is not part"),
        (lambda b: (b / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda b: (b / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda b: (b / "manifest.json").unlink(), "holds no manifest.json"),
    ],
)  # fmt: skip
def test_damaged_bundle_is_refused_by_the_name_of_the_file(
    bundle, tmp_path, damage, message, capsys
):
    damage(bundle)
    assert main(["import", str(bundle), "--run-dir", str(tmp_path / "run")]) == 2
    assert main(["verify", str(bundle)]) == 2
    printed = capsys.readouterr().err
    assert printed.count(message) == 2
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_file_of_another_folder_is_refused(bundle, tmp_path):
    (bundle / "heads.json").rename(tmp_path / "elsewhere.json")
    (bundle / "heads.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(icl.InputError, match=r"heads\.json is missing"):
        open_bundle(bundle)


def test_newer_format_is_refused(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"format": FORMAT + 1}))
    with pytest.raises(icl.InputError, match=f"has format {FORMAT + 1}.*update icl-helpers"):
        open_bundle(bundle)


def test_other_run_is_not_overwritten(bundle, made):
    with pytest.raises(icl.InputError, match="holds another run"):
        import_bundle(bundle, made / "run")
    with pytest.raises(icl.InputError, match="exists"):
        export_run(run_at(made / "run"), bundle)


def test_bundle_cannot_ask_for_remote_code(bundle, tmp_path):
    info = json.loads((bundle / "run.json").read_text())
    info["parameters"]["trust_remote_code"] = True
    (bundle / "run.json").write_text(json.dumps(info))
    sign(bundle)
    run = import_bundle(bundle, tmp_path / "run")
    assert not run_at(run).parameters.trust_remote_code


@pytest.mark.slow
def test_measurements_travel_and_are_made_in_an_imported_run_only_if_asked_for(made, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(made / "run", source)
    own, asked = run_at(source), []

    def compute(value):
        return lambda: asked.append(value) or {"loss": [value, 0.5]}

    assert own.measurement("a loss", [1], compute(1)) == {"loss": [1, 0.5]}
    assert run_at(source).measurement("a loss", [1], compute(2)) == {"loss": [1, 0.5]}
    assert own.measurement("a loss", [2], compute(3)) == {"loss": [3, 0.5]}
    export_run(own, tmp_path / "bundle")
    imported = run_at(import_bundle(tmp_path / "bundle", tmp_path / "imported"))
    assert imported.measurement("a loss", [1], compute(4)) == {"loss": [1, 0.5]}
    with pytest.raises(
        icl.NotMeasuredError, match=r"\(a loss\)\. .*--run-dir .*imported --measure"
    ):
        imported.measurement("a loss", [5], compute(5))
    assert asked == [1, 3]
    with pytest.raises(icl.InputError, match="was imported"):
        export_run(imported, tmp_path / "again")
    closer = {"measure": True, "analysis_tasks": ["repetition"], "analysis_limit": 2}
    measuring = icl.Run(imported.parameters.model_copy(update=closer))
    assert measuring.measurement("a loss", [5], compute(6)) == {"loss": [6, 0.5]}
    # What is there needs nobody's leave, and goes out with the bundle's own.
    assert imported.measurement("a loss", [5], compute(7)) == {"loss": [6, 0.5]}
    export_run(measuring, tmp_path / "longer")
    before, after = (open_bundle(tmp_path / name) for name in ("bundle", "longer"))
    assert len(after.shown["values"]) == len(before.shown["values"]) + 1
    last = run_at(import_bundle(tmp_path / "longer", tmp_path / "last"))
    assert [last.measurement("a loss", [n], compute(8))["loss"][0] for n in (1, 2, 5)] == [1, 3, 6]
    given = last.parameters
    assert (given.measure, given.analysis_tasks, given.analysis_limit) == (False, ["repetition"], 2)
    # A damaged file is set aside and measured again.
    (path,) = (measuring.directory / "measurements").rglob("*.json")
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.warns(UserWarning, match="is damaged"):
        assert measuring.measurement("a loss", [5], compute(9)) == {"loss": [9, 0.5]}


def test_unfinished_run_says_so(made, tmp_path):
    run = run_at(made / "run")
    manifest = json.loads((made / "bundle" / "manifest.json").read_text())
    assert (manifest["finished"], manifest["rows_missing"]) == (True, 0)
    longer = icl.Run(run.parameters.model_copy(update={"seeds": [42, 43, 44]}))
    export_run(longer, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    # Of seed 44 everything: two abstract tasks and a text task, with and without examples.
    per_prompts = 1 + 2 * (2 + 2 + 1), 1 + 2 * (2 + 2)
    assert (manifest["finished"], manifest["rows_missing"]) == (
        False,
        2 * (2 * per_prompts[0] + per_prompts[1]),
    )


def test_verification_agrees_and_its_draw_follows_the_seed(made, tmp_path, capsys):
    found = verify_bundle(made / "bundle", share=0.3, data_dir=str(made / "data" / "texts"))
    assert found.agrees
    assert found.largest <= 1e-4
    assert found.scores_largest <= 1e-5
    assert found.left_out == ()
    # A prompt is drawn for all its conditions: about a share of the documents.
    assert 0.2 < found.documents / found.of_documents < 0.45
    report = tmp_path / "report.json"
    assert main(["verify", str(made / "bundle"), "--seconds", "0.01", "--json", str(report)]) == 0
    said = json.loads(report.read_text())
    assert "verdict              agrees" in capsys.readouterr().out
    assert said["agrees"]
    assert 0 < said["documents"] < found.of_documents
    assert any("sst2" in what and "data_dir is not given" in what for what in said["left_out"])


def edit(bundle: Path, change) -> None:
    """Change the cells of a bundle and sign it anew."""
    rows = pq.read_table(bundle / "cells.parquet").to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), bundle / "cells.parquet")
    sign(bundle)


def test_edited_log_probability_is_found(bundle, capsys):
    def change(rows):
        for row in rows:
            row["log_probabilities"][0][0] += 0.01

    edit(bundle, change)
    assert main(["verify", str(bundle), "--share", "1"]) == 1
    printed = capsys.readouterr().out
    assert "verdict              DOES NOT AGREE" in printed
    assert "differ by at most 0.01 nats" in printed


def test_other_numbers_of_blocked_pairs_are_found(bundle):
    def change(rows):
        for row in rows:
            if row["n_blocked"] is not None:
                row["n_blocked"][0] += 1

    edit(bundle, change)
    found = verify_bundle(bundle, share=1.0)
    assert not found.agrees
    assert found.percentile_99 == float("inf")


def test_turned_answer_and_lost_value_are_found(bundle):
    def change(rows):
        for row in rows:
            row["log_probabilities"][0].reverse()
            row["log_probabilities"][1][0] = None

    edit(bundle, change)
    found = verify_bundle(bundle, share=1.0)
    assert not found.agrees
    assert found.largest == float("inf")
    assert found.as_dict()["largest"] is None
    # Two of three documents of every cell.
    assert found.equal_answers == pytest.approx(1 / 3)


def test_other_heads_under_the_name_of_induction_heads_are_found(bundle):
    def change(rows):
        for row in rows:
            spec = json.loads(row["spec"])
            if spec["condition"] == "induction_heads":
                row["spec"] = json.dumps(spec | {"heads": [[0, 0] for _ in spec["heads"]]})

    edit(bundle, change)
    with pytest.raises(icl.InputError, match="not the highest"):
        verify_bundle(bundle)


def test_missing_model_and_bad_share_take_one_line(bundle, capsys):
    info = json.loads((bundle / "run.json").read_text())
    info["model"] = info["parameters"]["model"] = "./no-such-model"
    (bundle / "run.json").write_text(json.dumps(info))
    sign(bundle)
    assert main(["verify", str(bundle)]) == 2
    assert main(["verify", str(bundle), "--share", "2"]) == 2
    assert main(["verify", str(bundle), "--model", "icl-tiny", "--share", "0.1"]) == 0
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("icl: ")]
    assert len(lines) == 2
    assert "no-such-model does not exist" in lines[0]
    assert "share must lie in (0, 1]" in lines[1]
