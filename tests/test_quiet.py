"""What a newcomer sees: one progress bar, and no notice of a tool that is none of his business."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from pathlib import Path

import nbformat
import pytest

from icl_helpers.evaluation.scorer import InterventionLM
from icl_helpers.files import stage_notebooks
from icl_helpers.run.stages import execute_notebook


@pytest.mark.slow
def test_stages_show_one_progress_bar_and_the_notebooks_they_leave(offline_run):
    # Bytes: read as text, the ends of a bar's states would pass for those of lines.
    shown = (offline_run / "stderr").read_bytes().decode()
    pieces = [piece for piece in re.split(r"[\r\n]+", shown) if piece.strip()]
    assert [piece for piece in pieces if not re.match(r"stages: +\d+%\|", piece)] == []
    assert "100%" in pieces[-1]
    # One bar that goes back to the start of its line, not a line for each of its states.
    assert shown.count("\n") <= 1
    printed = (offline_run / "stdout").read_text(encoding="utf-8").splitlines()
    assert [Path(line).name for line in printed] == [path.name for path in stage_notebooks()]


TRANSPORT = """
import json, sys
from pathlib import Path
from ipykernel.kernelapp import IPKernelApp
kernel = IPKernelApp.instance()
print(json.dumps([kernel.transport, kernel.ip]))
print("a bar", file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "transport"), [("t", "ipc"), ("a-long-name-" * 10, "tcp")], ids=["short", "long"]
)
def test_kernel_has_sockets_of_its_own_where_their_path_fits_and_says_nothing(
    folder, transport, tmp_path, capfd
):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(TRANSPORT)])
    nbformat.write(notebook, tmp_path / "stage.ipynb")
    # The folder of pytest is itself too long for some.
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        scratch = Path(short) / folder
        scratch.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(scratch))
            executed = execute_notebook(tmp_path / "stage.ipynb", tmp_path / "executed.ipynb", {})
        assert list(scratch.iterdir()) == []
    outputs = nbformat.read(executed, as_version=4).cells[-1].outputs
    used, address = json.loads(next(o.text for o in outputs if o.name == "stdout"))
    assert used == transport
    assert (str(scratch) in address) == (transport == "ipc")
    assert "".join(capfd.readouterr()) == ""


def test_model_that_is_loaded_already_gives_no_notice(llama, tokenizer, caplog):
    with caplog.at_level(logging.DEBUG):
        InterventionLM(llama, tokenizer)
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == []
