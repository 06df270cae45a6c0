"""Function-vector scores: which heads carry what the task is (Todd et al. 2023, arXiv 2310.15213).

In a prompt whose demonstrations have shuffled labels a model cannot tell the task. If one head's
output at the last token, replaced by its mean over the task's ordinary prompts, makes the right
label more likely all the same, that head carries the task. Yin & Steinhardt (2025, arXiv
2502.14010) rank heads by this score beside the one for induction.

Example
-------
>>> scores = icl.function_vector_scores(model, tokenizer, tasks=["wordseq1_binary"])
>>> icl.top_heads(scores, 0.02)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.hook import AttentionCall, attention_layout, edited_attention
from icl_helpers.attention.means import prompt_head_outputs
from icl_helpers.attention.passes import measuring, one_angle_length
from icl_helpers.errors import InputError
from icl_helpers.evaluation.scorer import InterventionLM
from icl_helpers.evaluation.shared_work import SharedStart, scored_logits, shares_start
from icl_helpers.tasks.prompts import Prompt, build_prompts, sample_documents, shuffled_labels

__all__ = ["function_vector_scores"]


@measuring
def function_vector_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    shots: int = 10,
    n_prompts: int = 25,
    seed: int = 0,
    data: str = "synthetic",
) -> Float[torch.Tensor, "layers heads"]:
    """Average indirect effect of every head (Todd et al. 2023, section 2.3).

    For each task, documents are drawn evenly over the labels. ``mean`` is the head's output at the
    last token of their prompts, averaged. On the same prompts with the demonstrations' labels in
    another order, the effect is the probability of the right label (all its tokens, of the whole
    vocabulary) when the head gives ``mean`` at the prompt's last token, less its probability when
    nothing is replaced. The score is the mean over prompts, then over tasks.

    Only the last token changes when a head does there, so that what comes before is computed once
    per prompt.

    Parameters
    ----------
    tasks
        Names from :func:`icl_helpers.task_names`, each with its default labels.
    shots
        Demonstrations per prompt.
    n_prompts
        Documents per task.
    seed
        Of the demonstrations, the documents and the order of the labels.
    data
        As for :func:`icl_helpers.build_prompts`.

    Raises
    ------
    InputError
        No task, or one that is unknown or has too few documents; prompts without two
        demonstrations, or longer than the model's context.
    UnsupportedArchitectureError
        The model does not go through transformers' attention interface.
    """
    if not tasks or isinstance(tasks, str):
        raise InputError(f"tasks must be a list of at least one task, got {tasks!r}")
    if shots < 2 or n_prompts < 1:
        raise InputError(
            f"shots must be at least 2, so that there are labels to shuffle, and n_prompts at "
            f"least 1; got {shots} and {n_prompts}"
        )
    drawn: dict[str, list[Prompt]] = {}
    for task in tasks:
        prompts = build_prompts(task, shots=shots, seed=seed, data=data)
        if len(prompts) < n_prompts:
            raise InputError(f"task {task} has {len(prompts)} documents, fewer than {n_prompts}")
        numbers = sample_documents([prompt.target for prompt in prompts], n_prompts, seed=seed)
        drawn[task] = [prompts[number] for number in numbers]
    lm = InterventionLM(model, tokenizer)
    effects = [_effects(lm, prompts, seed, task) for task, prompts in drawn.items()]
    return torch.stack(effects).mean(0)


def _effects(
    lm: InterventionLM, prompts: Sequence[Prompt], seed: int, task: str
) -> Float[torch.Tensor, "layers heads"]:
    """Mean effect over the prompts of one task."""
    shuffled = [shuffled_labels(prompt, seed=seed) for prompt in prompts]
    clean = lm.encode([(p.context, p.choices[p.target]) for p in prompts])
    corrupted = lm.encode([(p.context, p.choices[p.target]) for p in shuffled])
    outputs = [
        prompt_head_outputs(lm.model, torch.tensor([ids]), positions=torch.tensor([[len(ids) - 1]]))
        for _, ids, _ in clean
    ]
    means = torch.cat(outputs).mean(0)[:, 0]
    rises = [
        _rises(lm.model, context, label, means)
        for _, context, label in tqdm(corrupted, desc=f"function vectors, {task}", leave=False)
    ]
    return torch.stack(rises).mean(0)


def _rises(
    model: PreTrainedModel,
    context: list[int],
    label: list[int],
    means: Float[torch.Tensor, "layers heads d_head"],
) -> Float[torch.Tensor, "layers heads"]:
    """How much likelier the label becomes after this context with each head's mean at its end."""
    ids = torch.tensor([context + label[:-1]])
    columns = torch.arange(len(context) - 1, ids.shape[1])
    short = len(context) > 1 and ids.shape[1] <= one_angle_length(model)
    usable = short and attention_layout(model).cacheable and shares_start(model)
    start = SharedStart(model, ids[:, : len(context) - 1]) if usable else None

    def probabilities(n_rows: int) -> Float[torch.Tensor, " rows"]:
        logits = scored_logits(
            model, ids.expand(n_rows, -1), columns.expand(n_rows, -1), start=start
        )
        of_tokens = logits.float().log_softmax(-1)[:, torch.arange(len(label)), label]
        return of_tokens.sum(-1).exp().cpu()

    def one_head_a_row(call: AttentionCall, outputs: torch.Tensor) -> torch.Tensor:
        output = call.output.clone()
        heads = torch.arange(len(output))
        output[heads, len(context) - 1 - call.offset, heads] = outputs.to(output)
        return output

    before = probabilities(1)
    rises = torch.zeros(means.shape[:2])
    for layer, of_heads in enumerate(means):
        with edited_attention(model, {layer: [partial(one_head_a_row, outputs=of_heads)]}):
            rises[layer] = probabilities(len(of_heads)) - before
    return rises
