"""Training data of the embedded model: few-shot classification episodes and template English.

Everything is generated from an explicit ``random.Random``. An episode binds fresh labels to its
classes, lists labelled instances as the evaluation prompts do, and is scored at the labels that a
reader could know. What the evaluation tasks need to stay unseen is left out here:

* no episode uses two of the labels Foo, Bar, Mur, Res;
* the word-category pairs of the seven tasks never occur, alone or against each other;
* the pattern A B B B never occurs, and A B A B and A B C B A never against distinct letters.

Two sets of template sentences stand in for the paper's NLP tasks where no data hub can be reached:
review sentiment (Negative, Positive) and fact against opinion (No, Yes). A sentence belongs to the
evaluation split when the hash of its text says so, and training draws from the rest only.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icl_helpers.files import synthetic_dir
from icl_helpers.tasks.specs import DESCRIPTION

__all__ = [
    "DESCRIPTION", "HELD_OUT_LABELS", "LETTER_LENGTHS", "NAMING_DESCRIPTION", "TEXT_TASKS",
    "WORD_TASKS", "Episode", "TextTask", "draw_labels", "episode", "evaluation_rows", "held_out",
    "label_pool", "letters", "naming_episode", "pattern_names", "patterns", "reference_text",
    "text_episode", "word_categories",
]  # fmt: skip


# Word lists and templates: the order of every list decides what is drawn.
_DATA: dict[str, Any] = json.loads(Path(__file__).with_name("corpus.json").read_text("utf-8"))
NAMING_DESCRIPTION = "Give the name of the pattern of each sequence."
# Letters in a sequence; a length occurs as often as it is listed.
LETTER_LENGTHS = (3, 4, 4, 4, 5, 5)
HELD_OUT_LABELS = ("Foo", "Bar", "Mur", "Res")
# Ranks of those four in frequency, each about 2.6 times as frequent as the next.
_HELD_OUT_RANKS = (0, 9, 34, 100)
# Zipf's law with an offset: a label of rank r has frequency in proportion to 1 / (r + offset).
_FREQUENT_LABELS = 6
_HELD_OUT_PATTERN = "ABBB"
_HELD_OUT_PATTERN_PAIRINGS = ({"ABAB", "ABCD"}, {"ABCBA", "ABCDE"})
# The evaluation's word tasks: name: label -> [category of the first word, of the second word].
WORD_TASKS: dict[str, dict[str, list[str]]] = _DATA["word_tasks"]
_HELD_OUT_PAIRS = {tuple(pair) for classes in WORD_TASKS.values() for pair in classes.values()}


@dataclass(frozen=True)
class Episode:
    """Text of one training window and the character spans of the labels in it.

    ``labels`` holds (start, weight): the label starts at that character, and a weight of 0 means
    that it cannot be known from what stands before it. ``names`` are the code words of the rows'
    equality patterns, one a label, where the rows are letters.
    """

    text: str
    labels: tuple[tuple[int, float], ...]
    names: tuple[str, ...] = ()


def _written(
    opening: str, rows: Iterable[tuple[str, str, float]], names: tuple[str, ...] = ()
) -> Episode:
    """The episode of these rows: (text before the label, label, weight of the label) each."""
    text, labels = opening, []
    for before, label, weight in rows:
        text += before
        labels.append((len(text), weight))
        text += f"{label}\n\n"
    return Episode(text, tuple(labels), names)


@functools.cache
def word_categories() -> dict[str, list[str]]:
    """All word categories: the evaluation tasks' eight, and four that no task uses.

    The four make the classes of training vary more than the tasks' own.
    """
    return {**json.loads((synthetic_dir() / "words.json").read_text()), **_DATA["extra_words"]}


@functools.cache
def patterns(length: int) -> tuple[str, ...]:
    """Equality patterns of a length in canonical letters (A first), without the held-out one."""
    every = {_canonical(values) for values in itertools.product(range(length), repeat=length)}
    return tuple(sorted(every - {_HELD_OUT_PATTERN}))


def _canonical(elements: Sequence[object]) -> str:
    order = list(dict.fromkeys(elements))
    return "".join(string.ascii_uppercase[order.index(element)] for element in elements)


def _may_meet(chosen: Iterable[str]) -> bool:
    """Whether these patterns may stand in one episode: the evaluation tasks' oppositions do not."""
    return not any(pairing <= set(chosen) for pairing in _HELD_OUT_PATTERN_PAIRINGS)


def letters(rng: random.Random, pattern: str) -> str:
    """Different letters in an equality pattern, separated by spaces."""
    drawn = rng.sample(string.ascii_uppercase, len(set(pattern)))
    return " ".join(drawn[string.ascii_uppercase.index(symbol)] for symbol in pattern)


@functools.cache
def label_pool() -> tuple[str, ...]:
    """Invented three-letter labels, the most frequent first, the four held-out ones among them."""
    rng = random.Random(0)
    syllables = ["".join(t) for t in itertools.product("BDFGKLMNPRSTVZ", "aeiou", "bdfgklmnprstvz")]
    labels = [s for s in rng.sample(syllables, 120) if s not in HELD_OUT_LABELS]
    for rank, label in zip(_HELD_OUT_RANKS, HELD_OUT_LABELS, strict=True):
        labels.insert(rank, label)
    return tuple(labels)


@functools.cache
def _cumulative_frequencies() -> tuple[float, ...]:
    weights = (1 / (rank + _FREQUENT_LABELS) for rank in range(len(label_pool())))
    return tuple(itertools.accumulate(weights))


def draw_labels(rng: random.Random, n: int) -> list[str]:
    """``n`` different labels, at most one of them held out, frequent ones more often (Zipf).

    As words of a language do, labels differ in frequency, so that without demonstrations a label
    is preferred for its frequency rather than for the document.
    """
    while True:
        labels = rng.choices(label_pool(), cum_weights=_cumulative_frequencies(), k=n)
        if len(set(labels)) == n and sum(label in HELD_OUT_LABELS for label in labels) <= 1:
            return labels


@functools.cache
def pattern_names() -> dict[str, str]:
    """The code word of every trained equality pattern of 2 to 5 letters, fixed over training."""
    words = [word for category in word_categories().values() for word in category]
    random.Random(1).shuffle(words)
    every = [pattern for length in (3, 4, 5, 2) for pattern in patterns(length)]
    return dict(zip(every, words, strict=False))


def naming_episode(rng: random.Random, *, lengths: Sequence[int] = LETTER_LENGTHS) -> Episode:
    """Letter sequences of one length, each followed by the code word of its equality pattern.

    Nothing in context is needed to answer, so every row teaches which letters are equal. The code
    words are never the labels of a few-shot episode.
    """
    length = rng.choice(lengths)
    names = pattern_names()
    while True:
        chosen = [rng.choice(patterns(length)) for _ in range(rng.randint(8, 12))]
        if _may_meet(chosen):
            break
    blocks = ((f"{letters(rng, pattern)}:", names[pattern], 1.0) for pattern in chosen)
    codes = tuple(names[pattern] for pattern in chosen)
    return _written(f"{NAMING_DESCRIPTION}\n\n", blocks, codes)


def episode(
    rng: random.Random, *, fresh: float, n_shots: int | None = None, word_share: float = 0.4
) -> Episode:
    """One few-shot classification episode.

    Parameters
    ----------
    fresh
        Probability that every instance is new; otherwise each class re-uses one to four
        instances, so that copying an earlier label suffices.
    n_shots
        Labelled instances; default 8 to 22 for words, 6 to 13 for letters.
    word_share
        Probability of word pairs; otherwise letters.
    """
    words = rng.random() < word_share
    makers = _word_classes(rng) if words else _letter_classes(rng)
    if n_shots is None:
        n_shots = rng.randint(8, 22) if words else rng.randint(6, 13)
    if rng.random() >= fresh:
        makers = [_burst(rng, maker) for maker in makers]
    labels = draw_labels(rng, len(makers))
    rng.shuffle(makers)
    # Classes as even as they can be, in random order.
    kinds = [row % len(makers) for row in range(n_shots + 1)]
    rng.shuffle(kinds)
    texts = [makers[kind]() for kind in kinds]
    opening = f"{DESCRIPTION}\n\n" if rng.random() < 0.5 else ""
    rows = (
        (f"{text}:", labels[kind], float(known))
        for text, kind, known in zip(texts, kinds, _seen(kinds), strict=True)
    )
    names = () if words else tuple(pattern_names()[_canonical(text.split())] for text in texts)
    return _written(opening, rows, names)


def _seen(kinds: Sequence[int]) -> list[bool]:
    """Whether an earlier row of the episode is of the same class, for every row."""
    return [kind in kinds[:row] for row, kind in enumerate(kinds)]


def _burst(rng: random.Random, maker: Callable[[], str]) -> Callable[[], str]:
    instances = [maker() for _ in range(rng.randint(1, 4))]
    return lambda: rng.choice(instances)


def _letter_classes(rng: random.Random) -> list[Callable[[], str]]:
    length = rng.choice(LETTER_LENGTHS)
    n_classes = min(rng.choice((2, 2, 2, 3)), len(patterns(length)))
    distinct = string.ascii_uppercase[:length]
    while True:
        chosen = rng.sample(patterns(length), n_classes)
        # Half of the episodes oppose a pattern to distinct letters, as the evaluation tasks do.
        if rng.random() < 0.5 and distinct not in chosen:
            chosen[0] = distinct
        if _may_meet(chosen):
            return [functools.partial(letters, rng, pattern) for pattern in chosen]


def _word_classes(rng: random.Random) -> list[Callable[[], str]]:
    names = list(word_categories())
    while True:
        if rng.random() < 0.5:
            first, second = rng.sample(names, 2), rng.sample(names, 2)
            pairs = [(a, b) for a in first for b in second]
            if rng.random() < 0.5:
                pairs = [(first[0], second[0]), (first[1], second[1])]
        else:
            n_classes = rng.choice((2, 2, 3, 4))
            pairs = [(rng.choice(names), rng.choice(names)) for _ in range(n_classes)]
        if len(set(pairs)) == len(pairs) and _HELD_OUT_PAIRS.isdisjoint(pairs):
            return [functools.partial(_word_pair, rng, pair) for pair in pairs]


def _word_pair(rng: random.Random, pair: tuple[str, str]) -> str:
    return " ".join(rng.choice(word_categories()[category]) for category in pair)


@dataclass(frozen=True)
class TextTask:
    """One stand-in task: its prompt, its two labels, and the sentences of each.

    ``sentences`` holds for either label ``slots`` (of every slot the lists of words that it is
    drawn from, in the order of the draws) and ``templates``.
    """

    name: str
    description: str
    field: str
    answer: str
    labels: list[str]
    sentences: list[dict[str, Any]]

    def block(self, sentence: str) -> str:
        """The document's part of the prompt, up to and with the colon before its label."""
        return f"{self.field}: {sentence}\n\n{self.answer}:"

    def make(self, rng: random.Random, label: int) -> str:
        """A sentence of that label (0 or 1), of whichever split."""
        slots, templates = self.sentences[label]["slots"], self.sentences[label]["templates"]
        # Slots that the template leaves out are drawn all the same.
        words = {
            slot: rng.choice([word for name in lists for word in _DATA["sentence_words"][name]])
            for slot, lists in slots.items()
        }
        return rng.choice(templates).format(**words)


TEXT_TASKS = tuple(TextTask(**task) for task in _DATA["text_tasks"])


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
    labels = task.labels if own else draw_labels(rng, 2)
    kinds, sentences = [], []
    for _ in range(n_shots + 1):
        kinds.append(rng.randrange(2))
        sentences.append(training_sentence(rng, task, kinds[-1]))
    rows = (
        (task.block(sentence), f" {labels[kind]}", float(own or known))
        for kind, sentence, known in zip(kinds, sentences, _seen(kinds), strict=True)
    )
    return _written(f"{task.description}\n\n", rows)


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
