"""Parameters of the stages, checked before anything is loaded.

Notebooks hold them as literals in one cell; papermill puts its own cell after it. papermill only
warns about a parameter that a notebook does not have, so :func:`stage_parameters` compares the
names itself.

Example
-------
>>> P = icl.stage_parameters(globals())
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from icl_helpers.errors import InputError
from icl_helpers.redaction import SECRET

__all__ = ["StageParameters", "stage_parameters"]


_NONE = type(None)
_CHECKED = "_icl_parameters_checked"


@dataclass(frozen=True)
class StageParameters:
    """What a run is about. None means the default that suits the model or the task.

    ``tasks``: None for the abstract tasks. ``nlp_tasks``, those of the stage on text: None for the
    paper's seven, or for an embedded model its stand-ins; an empty list for none. ``labels`` of
    text tasks: semantic, unrelated or both; None for both in that stage and each task's own
    elsewhere. ``data_dir``: local files of NLP tasks, ``DATA_DIR/TASK/train.jsonl`` and
    ``validation.jsonl``; None for the hub. ``shots``: None for each task's own. ``fractions``: None
    for the model's (the paper's 0.01 and 0.03, or those fixed for an embedded model).
    ``reference``: a text file for the means.
    """

    model: str = "icl-tiny"
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    batch_size: int | str = "auto"
    tasks: list[str] | None = None
    nlp_tasks: list[str] | None = None
    labels: str | None = None
    shots: list[int] | None = None
    fractions: list[float] | None = None
    seeds: tuple[int, ...] | list[int] = (42, 43, 44)
    ablation_seeds: tuple[int, ...] | list[int] = (42, 43, 44)
    limit: int | None = None
    run_dir: str = "runs/icl-tiny"
    data: str = "synthetic"
    data_dir: str | None = None
    control: str = "published"
    categories: tuple[str, ...] | list[str] = ("words", "labels", "colons", "blank_lines")
    average: str = "attention_input"
    reference: str | None = None
    quantization: str | None = None
    trust_remote_code: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON values of all parameters."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


_TYPES: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "revision": (str, _NONE),
    "dtype": (str,),
    "device": (str, _NONE),
    "batch_size": (int, str),
    "tasks": (list, tuple, _NONE),
    "nlp_tasks": (list, tuple, _NONE),
    "labels": (str, _NONE),
    "shots": (list, tuple, _NONE),
    "fractions": (list, tuple, _NONE),
    "seeds": (list, tuple),
    "ablation_seeds": (list, tuple),
    "limit": (int, _NONE),
    "run_dir": (str,),
    "data": (str,),
    "data_dir": (str, _NONE),
    "control": (str,),
    "categories": (list, tuple),
    "average": (str,),
    "reference": (str, _NONE),
    "quantization": (str, _NONE),
    "trust_remote_code": (bool,),
}
_ITEMS: dict[str, tuple[type, ...]] = {
    "tasks": (str,),
    "nlp_tasks": (str,),
    "shots": (int,),
    "fractions": (float, int),
    "seeds": (int,),
    "ablation_seeds": (int,),
    "categories": (str,),
}


def stage_parameters(values: Mapping[str, Any] | None = None, **given: Any) -> StageParameters:
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
    names = {field.name for field in fields(StageParameters)}
    source = {} if values is None else values
    found = {**{k: v for k, v in source.items() if _is_plain(k, v)}, **given}
    if _CHECKED in source:
        found = {name: value for name, value in found.items() if name in names}
    unknown = sorted(set(found) - names)
    if unknown:
        raise InputError(
            f"unknown parameter {unknown[0]!r}; the parameters are {', '.join(sorted(names))}"
        )
    for name, value in found.items():
        _check_type(name, value)
    parameters = StageParameters(**found)
    _check_values(parameters)
    if isinstance(source, dict):
        source[_CHECKED] = True
    return parameters


def _is_plain(name: str, value: Any) -> bool:
    """Whether a global of a notebook is a literal that its user set, not IPython's own."""
    own = not name.startswith("_") and name not in ("In", "Out")
    return own and isinstance(value, (str, int, float, list, tuple, dict, _NONE))


def _check_type(name: str, value: Any) -> None:
    # First of all: the other messages show the value.
    if SECRET.search(repr(value)):
        raise InputError(
            f"parameter {name!r} looks like an access token; parameters are stored in notebooks. "
            f"Put it in the environment instead (HF_TOKEN)"
        )
    allowed = _TYPES[name]
    wrong = not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)
    items = value if isinstance(value, (list, tuple)) else []
    bad = [
        item
        for item in items
        if not isinstance(item, _ITEMS.get(name, ())) or isinstance(item, bool)
    ]
    if wrong or bad:
        words = " or ".join("None" if t is _NONE else t.__name__ for t in allowed)
        inside = f" of {_ITEMS[name][0].__name__}" if name in _ITEMS else ""
        got = f"{bad[0]!r} inside {value!r}" if bad else f"{value!r} ({type(value).__name__})"
        raise InputError(f"parameter {name!r} must be {words}{inside}, got {got}")


def _check_values(parameters: StageParameters) -> None:
    from icl_helpers.attention.heads import CONTROLS, check_fraction
    from icl_helpers.attention.induction_pattern import check_categories
    from icl_helpers.files import check_run_dir
    from icl_helpers.models.loading import resolve_model
    from icl_helpers.tasks.data import check_local
    from icl_helpers.tasks.specs import get_task_spec, text_spec

    resolve_model(parameters.model)
    check_run_dir(parameters.run_dir)
    for task in parameters.tasks or []:
        get_task_spec(task)
    for task in parameters.nlp_tasks or []:
        text_spec(task)
    if parameters.data_dir is not None:
        check_local(parameters.data_dir, [*(parameters.nlp_tasks or []), *(parameters.tasks or [])])
    for fraction in parameters.fractions or []:
        check_fraction(fraction)
    allowed = {
        "dtype": ("auto", "float32", "bfloat16", "float16"),
        "labels": (None, "semantic", "unrelated", "both"),
        "control": CONTROLS,
        "average": ("attention_input", "head_output"),
        "quantization": (None, "4bit", "8bit"),
    }
    for name, options in allowed.items():
        if getattr(parameters, name) not in options:
            raise InputError(
                f"parameter {name!r} must be one of {', '.join(map(str, options))}, got "
                f"{getattr(parameters, name)!r}"
            )
    check_categories(parameters.categories)
    if any(shots < 0 for shots in parameters.shots or []):
        raise InputError(f"shots must be >= 0, got {parameters.shots}")
    if parameters.limit is not None and parameters.limit < 1:
        raise InputError(f"limit must be >= 1 or None, got {parameters.limit}")
    if not parameters.seeds or not parameters.ablation_seeds:
        raise InputError("seeds and ablation_seeds must each hold at least one seed")
    size = parameters.batch_size
    if (isinstance(size, str) and size != "auto") or (isinstance(size, int) and size < 1):
        raise InputError(f"batch_size must be 'auto' or >= 1, got {size!r}")
