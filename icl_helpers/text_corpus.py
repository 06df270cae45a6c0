"""Template English for the embedded model: reference text and two text classification sets.

The sets stand in for the paper's NLP tasks where no data hub can be reached: review sentiment
(Negative, Positive) and fact against opinion (No, Yes). Their sentences fill templates with words;
a sentence belongs to the evaluation split when the hash of its text says so, and training draws
from the rest only.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from icl_helpers.corpus import Episode, draw_labels

__all__ = ["TEXT_TASKS", "TextTask", "evaluation_rows", "reference_text", "text_episode"]

_THINGS = [
    "film",
    "book",
    "meal",
    "song",
    "hotel",
    "play",
    "show",
    "garden",
    "game",
    "story",
    "market",
    "concert",
    "museum",
]
_GOOD = [
    "great",
    "lovely",
    "superb",
    "charming",
    "brilliant",
    "delightful",
    "excellent",
    "wonderful",
    "fresh",
    "clever",
]
_BAD = [
    "awful",
    "boring",
    "dreadful",
    "terrible",
    "poor",
    "dull",
    "horrible",
    "bland",
    "clumsy",
    "ugly",
]
_PLACES = ["town", "city", "village", "harbour", "valley", "island", "square", "station"]
_PEOPLE = ["my friend", "the guide", "our neighbour", "the critic", "a student", "the owner"]


def _review(rng: random.Random, label: int) -> str:
    adjective = rng.choice(_GOOD if label else _BAD)
    second = rng.choice(_GOOD if label else _BAD)
    thing = rng.choice(_THINGS)
    return rng.choice(
        (
            f"the {thing} was {adjective}",
            f"a {adjective} and {second} {thing}",
            f"{rng.choice(_PEOPLE)} found the {thing} {adjective}",
            f"it is a {adjective} {thing}",
        )
    )


def _statement(rng: random.Random, label: int) -> str:
    thing, place = rng.choice(_THINGS), rng.choice(_PLACES)
    if label:
        adjective = rng.choice(_GOOD + _BAD)
        return rng.choice(
            (
                f"i think the {thing} is {adjective}",
                f"i feel that the {place} is {adjective}",
                f"we believe the {thing} was {adjective}",
            )
        )
    hour = rng.choice(["two", "three", "four", "five", "six", "seven", "eight", "nine"])
    return rng.choice(
        (
            f"the {thing} opens at {hour}",
            f"the {place} has {hour} streets",
            f"the {thing} lasted {hour} hours",
        )
    )


@dataclass(frozen=True)
class TextTask:
    """One stand-in task: its prompt, its two labels, and how a sentence is made."""

    name: str
    description: str
    field: str
    answer: str
    labels: tuple[str, str]
    make: Callable[[random.Random, int], str]

    def block(self, sentence: str) -> str:
        """The document's part of the prompt, up to and with the colon before its label."""
        return f"{self.field}: {sentence}\n\n{self.answer}:"


TEXT_TASKS = (
    TextTask(
        "review_sentiment",
        "Classify the review according to its sentiment.",
        "Review",
        "Sentiment",
        ("Negative", "Positive"),
        _review,
    ),
    TextTask(
        "fact_opinion",
        "Does the input contain personal opinions, feelings, or beliefs?",
        "Input",
        "Output",
        ("No", "Yes"),
        _statement,
    ),
)


def held_out(sentence: str) -> bool:
    """Whether a sentence belongs to the evaluation split (a quarter of all sentences)."""
    return hashlib.sha256(sentence.encode()).digest()[0] < 64


def text_episode(rng: random.Random, *, n_shots: int | None = None) -> Episode:
    """A zero- to ten-shot prompt of a stand-in task, with its own or unrelated labels.

    The tasks' own labels are scored everywhere, so that they can be guessed without examples;
    unrelated labels only once they have been seen.
    """
    task = rng.choice(TEXT_TASKS)
    n_shots = rng.choice((0, 0, 2, 5, 8)) if n_shots is None else n_shots
    own = rng.random() < 0.5
    labels = list(task.labels) if own else draw_labels(rng, 2)
    parts, spans, seen = [task.description + "\n\n"], [], set()
    length = len(parts[0])
    for _ in range(n_shots + 1):
        kind = rng.randrange(2)
        block = task.block(training_sentence(rng, task, kind))
        parts.append(f"{block} {labels[kind]}\n\n")
        spans.append((length + len(block), 1.0 if own or kind in seen else 0.0))
        seen.add(kind)
        length += len(parts[-1])
    return Episode("".join(parts), tuple(spans))


def training_sentence(rng: random.Random, task: TextTask, kind: int) -> str:
    """A sentence of the training split."""
    while held_out(sentence := task.make(rng, kind)):
        pass
    return sentence


def evaluation_rows(
    task: TextTask, *, seed: int = 0, n: int = 100
) -> dict[str, list[dict[str, object]]]:
    """Distinct rows of a stand-in task: ``validation`` held out of training, ``train`` not.

    Each row has ``text`` and ``label`` (0 or 1), half of each label.
    """
    rng = random.Random(f"{task.name}-{seed}")
    rows: dict[str, list[dict[str, object]]] = {"train": [], "validation": []}
    seen: set[str] = set()
    wanted = {(split, label): n // 2 for split in rows for label in (0, 1)}
    for _ in range(200 * n):
        label = rng.randrange(2)
        sentence = task.make(rng, label)
        split = "validation" if held_out(sentence) else "train"
        if sentence in seen or not wanted[split, label]:
            continue
        seen.add(sentence)
        wanted[split, label] -= 1
        rows[split].append({"text": sentence, "label": label})
    return rows


def reference_text(rng: random.Random) -> str:
    """One document of plain template English, without any label."""
    sentences = []
    for _ in range(rng.randint(3, 6)):
        task = rng.choice(TEXT_TASKS)
        sentence = training_sentence(rng, task, rng.randrange(2))
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
    return " ".join(sentences)
