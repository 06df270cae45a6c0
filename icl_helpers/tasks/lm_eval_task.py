"""lm-eval task objects whose prompts are those of :func:`icl_helpers.build_prompts`.

The YAML files in ``tasks/`` name :class:`PatternTask` as their class, so that lm-eval itself loads
them with ``--include_path``; :func:`load_task` makes the same object for :func:`icl.evaluate`.
lm-eval draws demonstrations while it walks over a rank's share of the documents; here all prompts
are built at once, so they do not depend on a limit or on the number of workers.
"""

from __future__ import annotations

import functools
from typing import Any

import datasets
import yaml
from lm_eval.api.task import ConfigurableTask

from icl_helpers.errors import InputError
from icl_helpers.files import tasks_dir
from icl_helpers.tasks.demonstrations import Rule
from icl_helpers.tasks.prompts import Prompt, build_prompts
from icl_helpers.tasks.specs import get_task_spec

__all__ = ["PatternTask", "load_task"]


class PatternTask(ConfigurableTask):
    """A task of :func:`icl_helpers.build_prompts` as a multiple-choice task of lm-eval.

    Its ``metadata`` name the task (``pattern_task``) and may give ``labels``, ``data`` (default
    synthetic), the rule for ``demonstrations``, and a pinned ``demonstration_seed``; without one it
    is lm-eval's ``fewshot_random_seed``.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        settings = {key: value for key, value in (config or {}).items() if key != "class"}
        metadata = settings.get("metadata") or {}
        self._task = str(metadata.get("pattern_task", settings.get("task")))
        self._pinned_seed: int | None = metadata.get("demonstration_seed")
        self._seed = self._pinned_seed
        data = str(metadata.get("data", "synthetic"))
        others: Any = {name: metadata.get(name) for name in ("labels", "demonstrations")}
        build = functools.partial(build_prompts, self._task, data=data, **others)
        self._build = functools.lru_cache(maxsize=1)(build)
        super().__init__(config=settings)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Make the data set from the zero-shot prompts of all rows: nothing is fetched."""
        rows = [
            {
                "doc_id": prompt.doc_id,
                "query": prompt.context.removeprefix(get_task_spec(self._task).description).strip(),
                "choices": list(prompt.choices),
                "target": prompt.target,
            }
            for prompt in self.prompts(0)
        ]
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})

    def prompts(self, num_fewshot: int) -> list[Prompt]:
        """Prompts of all documents, in order; those asked for last are kept."""
        return self._build(shots=num_fewshot, seed=self._seed or 0)

    def set_fewshot_seed(self, seed: int | None = None) -> None:
        """Take lm-eval's seed unless the task has one of its own."""
        super().set_fewshot_seed(seed)
        self._seed = seed if self._pinned_seed is None else self._pinned_seed

    def fewshot_context(
        self,
        doc: dict[str, Any],
        num_fewshot: int,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        **kwargs: Any,
    ) -> str:
        """The document's prompt; chat templates would change it and are refused."""
        if apply_chat_template or system_instruction:
            raise InputError(
                f"task {self.config.task} is defined without chat template or system instruction; "
                f"leave both out"
            )
        return self.prompts(num_fewshot)[doc["doc_id"]].context


def load_task(
    name: str,
    *,
    shots: int,
    seed: int,
    labels: str | None = None,
    data: str = "synthetic",
    demonstrations: Rule | None = None,
) -> PatternTask:
    """lm-eval's task object for a task, shots and demonstration seed.

    Call ``build_all_requests()`` on it for the requests. Raises :class:`InputError` as
    :func:`icl_helpers.build_prompts` does.
    """
    config = yaml.safe_load((tasks_dir() / "_pattern.yaml").read_text())
    config |= {"task": name, "num_fewshot": shots}
    config["metadata"] |= {
        "pattern_task": name, "labels": labels, "data": data, "demonstrations": demonstrations,
        "demonstration_seed": seed,
    }  # fmt: skip
    task = PatternTask(config)
    task.prompts(shots)
    return task
