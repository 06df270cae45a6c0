"""Parameters of a run, declared once and checked before anything is loaded.

A declaration names a parameter's type, default and help, the stages that use it, and the results
that it decides. The command's options, the notebooks' parameter cells, and what belongs to a run
(:mod:`icl_helpers.run.plan`) follow from it. papermill only warns about a parameter that a notebook
does not have, so :func:`stage_parameters` compares the names itself.

Example
-------
>>> P = icl.stage_parameters(globals())
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from icl_helpers.errors import InputError
from icl_helpers.redaction import SECRET

__all__ = [
    "About", "StageParameters", "about", "install_cell", "parameter_cell", "read_parameters",
    "stage_parameters",
]  # fmt: skip

_CHECKED = "_icl_parameters_checked"
# Stages that look closer, at a few documents; they read the results of the others as stage 8 does.
_CLOSER = (9, 10)
_EVERY = (1, 2, 3, 4, 5, 6, 7, 8, *_CLOSER)
_EVALUATING = (3, 4, 5, 6, 8, *_CLOSER)
# Characters of a line of code that a page of the book shows without scrolling.
_SHOWN = 72

Decides = Literal["model", "prompts", "selection", "knockout", "mean", "nothing"]


@dataclass(frozen=True)
class About:
    """What is declared of a parameter besides its type and default.

    ``stages`` are the numbers of the notebooks that use it. ``decides`` says which results change
    with it: all of a ``model``, all on some ``prompts``, those under one kind of condition; only
    which results there are (``selection``); or ``nothing``. A ``path`` is one of the user's. What
    came ``later`` than finished rows decides nothing while it has its default.
    """

    help: str
    stages: tuple[int, ...]
    decides: Decides
    allowed: tuple[Any, ...] | None = None
    path: bool = False
    later: bool = False


def _parameter(default: Any, *about: Any, **more: Any) -> Any:
    return Field(default, json_schema_extra={"about": About(*about, **more)})  # type: ignore[dict-item]


class StageParameters(BaseModel):
    """What a run is about. None means the default that suits the model or the task."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    model: str = _parameter(
        "icl-tiny", "icl-tiny, smollm2-135m, a hub id, a directory or a .gguf file", _EVERY, "model"
    )
    revision: str | None = _parameter(None, "revision of a hub model", _EVERY, "model")
    dtype: str = _parameter(
        "auto", "auto, float32, bfloat16 or float16", _EVERY, "model",
        allowed=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    device: str | None = _parameter(None, "cpu, cuda, cuda:1, ...", _EVERY, "nothing")
    quantization: str | None = _parameter(
        None, "4bit or 8bit weights (needs bitsandbytes)", _EVERY, "model",
        allowed=(None, "4bit", "8bit"),
    )  # fmt: skip
    trust_remote_code: bool = _parameter(
        False, "run code from the model's repository", _EVERY, "model"
    )
    batch_size: int | str = _parameter(
        "auto", "prompts per forward pass, or auto", (3, 4, 5, 6, *_CLOSER), "nothing"
    )
    tasks: list[str] | None = _parameter(
        None, "task names; None: the abstract tasks", (3, 4, 5, 7, 8, *_CLOSER), "selection"
    )
    nlp_tasks: list[str] | None = _parameter(
        None, "text tasks; None: those that suit the model, empty: none", (6, 8, *_CLOSER),
        "selection",
    )  # fmt: skip
    labels: str | None = _parameter(
        None, "of text tasks: semantic, unrelated or both", _EVALUATING, "selection",
        allowed=(None, "semantic", "unrelated", "both"),
    )  # fmt: skip
    shots: list[int] | dict[str, list[int]] | None = _parameter(
        None, "numbers of demonstrations, or by task; None: each task's own",
        _EVALUATING, "selection",
    )  # fmt: skip
    fractions: list[float] | None = _parameter(
        None, "fractions of heads; None: those that suit the model", (1, 4, 5, 6, 7, 8, *_CLOSER),
        "selection",
    )  # fmt: skip
    seeds: list[int] = _parameter(
        [42, 43, 44], "demonstration seeds", (3, 4, 5, 6, 7, 8, *_CLOSER), "selection"
    )
    ablation_seeds: list[int] = _parameter(
        [42, 43, 44], "seeds of the random heads", (4, 5, 6, 8, *_CLOSER), "selection"
    )
    limit: int | None = _parameter(
        None, "at most so many documents of each task", _EVALUATING, "prompts"
    )
    sampling: str | None = _parameter(
        None, "of a limit: balanced or first; None: first of published files",
        _EVALUATING, "prompts",
    )  # fmt: skip
    data: str = _parameter(
        "synthetic", "synthetic, original, or a directory of the published files",
        (3, 4, 5, 7, 8, *_CLOSER), "prompts", path=True,
    )  # fmt: skip
    data_dir: str | None = _parameter(
        None, "local files of NLP tasks, DIR/TASK/train.jsonl, ...",
        (3, 4, 5, 6, 7, 8, *_CLOSER), "prompts", path=True,
    )  # fmt: skip
    demonstrations: str | None = _parameter(
        None, "exact, fewer or published; None: what suits the data", _EVALUATING, "prompts",
        allowed=(None, "exact", "fewer", "published"), later=True,
    )  # fmt: skip
    control: list[str] = _parameter(
        ["published", "strict"], "draws of random heads: published, strict, any_layer",
        (4, 5, 6, 8, *_CLOSER), "selection",
    )  # fmt: skip
    categories: list[str] = _parameter(
        ["words", "labels", "colons", "blank_lines"], "what a knockout blocks",
        (5, 7, 8, *_CLOSER), "knockout",
    )  # fmt: skip
    average: str = _parameter(
        "attention_input", "attention_input (as the published code) or head_output",
        (2, 4, 5, 6, 8, *_CLOSER), "mean", allowed=("attention_input", "head_output"),
    )  # fmt: skip
    positions: int | None = _parameter(
        None, "of the means, at least a prompt's tokens; None: the paper's 3,000",
        (2, 4, 5, 6, 8, *_CLOSER), "mean",
    )  # fmt: skip
    reference: str | None = _parameter(
        None, "text file for the means, one text a line", (2, 4, 5, 6, 8, *_CLOSER), "mean",
        path=True,
    )  # fmt: skip
    # Measurements of the closer stages are kept under all that decides them, beside the rows.
    analysis_tasks: list[str] | None = _parameter(
        None, "tasks to look at closely; None: one of each kind", _CLOSER, "nothing"
    )
    analysis_limit: int = _parameter(
        16, "at most so many documents of each of them", _CLOSER, "nothing"
    )
    measure: bool = _parameter(False, "compute what an imported run lacks", _CLOSER, "nothing")
    run_dir: str = _parameter("runs/icl-tiny", "directory of the run", _EVERY, "nothing")

    # A notebook states what its stage uses; what it does not state says nothing of the run.
    _notebook: bool = PrivateAttr(default=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    @field_validator("control", mode="before")
    @classmethod
    def _one_control(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def loading(self) -> dict[str, Any]:
        """The arguments of :func:`icl_helpers.load_model` behind the model's name."""
        names = {"revision", "dtype", "device", "quantization", "trust_remote_code"}
        return self.model_dump(include=names)

    def as_dict(self, *, stated: bool = False) -> dict[str, Any]:
        """JSON values of all parameters; ``stated``: of a notebook's only those that it has."""
        return self.model_dump(exclude_unset=stated and self._notebook)


def about() -> Iterator[tuple[str, Any, Any, About]]:
    """Yield (name, type, default, declaration) of every parameter, in order."""
    for name, field in StageParameters.model_fields.items():
        extra: Any = field.json_schema_extra
        yield name, field.annotation, field.default, extra["about"]


def parameter_cell(stage: int) -> str:
    """Return the source of a stage notebook's parameter cell: a literal for what it uses."""
    lines = []
    for name, _, default, declared in about():
        if stage in declared.stages:
            literal = f"{name} = {default!r}".replace("'", '"')
            line = f"{literal}  # {declared.help}"
            lines += [line] if len(line) <= _SHOWN else [f"# {declared.help}", literal]
    return "\n".join(lines)


_INSTALL = """\
# Installs icl-helpers where it is missing, as on Colab; elsewhere it does nothing.
import glob
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("icl_helpers") is None:
    _version, _repository = "{version}", "{repository}"
    _tried = sorted(glob.glob(f"icl_helpers-{{_version}}-*.whl"))
    _tried += [f"icl-helpers @ git+{{_repository}}@v{{_version}}"] if _repository else []
    _tried += [f"icl-helpers=={{_version}}"]
    for _source in _tried:
        _pip = [sys.executable, "-m", "pip", "install", "--quiet", _source]
        if subprocess.run(_pip).returncode == 0:
            break
    else:
        raise ModuleNotFoundError(
            f"icl-helpers {{_version}} could not be installed from {{', '.join(_tried)}}. Make its "
            f"wheel in a checkout (pip wheel --no-deps .), put the file beside this notebook (on "
            f"Colab: upload it), and run this cell again."
        )
"""


def install_cell() -> str:
    """Return the source of every notebook's first code cell, which installs this version.

    It tries a wheel beside the notebook, this version's tag in the repository that ``_config.yml``
    names, and the package index; a notebook alone has no settings, so they stand in the cell.
    """
    from icl_helpers import __version__
    from icl_helpers.files import project_root

    settings = yaml.safe_load((project_root() / "_config.yml").read_text(encoding="utf-8"))
    repository = settings["repository"]["url"]
    return _INSTALL.format(version=__version__, repository=repository).strip()


def read_parameters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parameters from a YAML file; raises :class:`InputError` when it is not a mapping."""
    from icl_helpers.files import read_text

    try:
        content = yaml.safe_load(read_text(Path(path)))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"cannot read parameters from {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a mapping of parameter names to values")
    return content


def stage_parameters(values: Mapping[str, Any] | None = None, **named: Any) -> StageParameters:
    """Check parameters and return them.

    Parameters
    ----------
    values
        A notebook's ``globals()``, or a plain mapping. Any plain value in it that is not a
        parameter is refused: it is a misspelt one. When the cell is run again, values that the
        notebook has set since are left alone.

    Raises
    ------
    InputError
        An unknown name, a wrong type, or a value that no stage can use, naming what is allowed.
    """
    names = StageParameters.model_fields
    source = {} if values is None else values
    # Of a notebook's globals the literals that its user set, not IPython's own.
    plain = (str, int, float, list, tuple, dict, type(None))
    users = {k: v for k, v in source.items() if not k.startswith("_") and k not in ("In", "Out")}
    stated = {**{name: v for name, v in users.items() if isinstance(v, plain)}, **named}
    if _CHECKED in source:
        stated = {name: value for name, value in stated.items() if name in names}
    unknown = sorted(set(stated) - set(names))
    if unknown:
        raise InputError(
            f"unknown parameter {unknown[0]!r}; the parameters are {', '.join(sorted(names))}"
        )
    for name, value in stated.items():
        # First of all: the other messages show the value.
        if SECRET.search(repr(value)):
            raise InputError(
                f"parameter {name!r} looks like an access token; parameters are stored in "
                f"notebooks. Put it in the environment instead (HF_TOKEN)"
            )
    if isinstance(stated.get("model"), str):
        from icl_helpers.models.fingerprint import model_name

        # A folder has one name, wherever a kernel or a worker stands.
        stated["model"] = model_name(stated["model"])
    try:
        parameters = StageParameters(**stated)
    except ValidationError as error:
        # One line for the first value of a wrong type.
        first = error.errors()[0]
        name = str(first["loc"][0])
        kind: Any = names[name].annotation
        words = " or ".join(
            str(part) if get_args(part) else part.__name__.replace("NoneType", "None")
            for part in (get_args(kind) if isinstance(kind, UnionType) else (kind,))
        )
        raise InputError(f"parameter {name!r} must be {words}, got {first['input']!r}") from None
    _check_values(parameters)
    if isinstance(source, dict):
        source[_CHECKED] = True
    parameters._notebook = "__name__" in source
    return parameters


def _check_values(parameters: StageParameters) -> None:
    from icl_helpers.attention.heads import CONTROLS, check_fraction
    from icl_helpers.attention.induction_pattern import check_categories
    from icl_helpers.files import check_run_dir, imported_dir
    from icl_helpers.tasks.data import check_local
    from icl_helpers.tasks.specs import SAMPLINGS, get_task_spec, text_spec

    check_run_dir(parameters.run_dir)
    for task in [*(parameters.tasks or []), *(parameters.analysis_tasks or [])]:
        get_task_spec(task)
    for task in parameters.nlp_tasks or []:
        text_spec(task)
    # An imported run names data that need not be here.
    if parameters.data_dir is not None and imported_dir(parameters.run_dir) is None:
        check_local(parameters.data_dir, [*(parameters.nlp_tasks or []), *(parameters.tasks or [])])
    for fraction in parameters.fractions or []:
        check_fraction(fraction)
    known = {"control": CONTROLS, "sampling": (None, *SAMPLINGS)}
    for name, _, _, declared in about():
        options = known.get(name, declared.allowed)
        value = getattr(parameters, name)
        for item in value if isinstance(value, list) else [value]:
            if options is not None and item not in options:
                among = ", ".join(map(str, options))
                raise InputError(f"parameter {name!r} must be one of {among}, got {item!r}")
    check_categories(parameters.categories)
    shots = parameters.shots or []
    by_task = shots if isinstance(shots, dict) else {"": shots}
    for task in filter(None, by_task):
        get_task_spec(task)
    if any(number < 0 for several in by_task.values() for number in several):
        raise InputError(f"shots must be >= 0, got {parameters.shots}")
    for name in ("positions", "limit"):
        number = getattr(parameters, name)
        if number is not None and number < 1:
            raise InputError(f"{name} must be >= 1 or None, got {number}")
    if parameters.analysis_limit < 2:
        raise InputError(f"analysis_limit must be >= 2, got {parameters.analysis_limit}")
    if not (parameters.seeds and parameters.ablation_seeds and parameters.control):
        raise InputError("seeds, ablation_seeds and control must each hold at least one")
    size = parameters.batch_size
    if (isinstance(size, str) and size != "auto") or (isinstance(size, int) and size < 1):
        raise InputError(f"batch_size must be 'auto' or >= 1, got {size!r}")
