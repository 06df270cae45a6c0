"""The demonstration draw on arbitrary pools, and the download of the published data files."""

from __future__ import annotations

import hashlib
import io
import random
import urllib.error
import urllib.request

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_helpers as icl
from icl_helpers.tasks import data as original_data
from icl_helpers.tasks.demonstrations import Pool, draw_demonstrations

WORDS = st.sampled_from(["ab", "cd", "ef", "gh"])
ROWS = st.lists(
    st.tuples(st.builds("{} {}".format, WORDS, WORDS), st.sampled_from(["Foo", "Bar", "Mur"])),
    min_size=4,
    max_size=25,
).filter(lambda rows: len({label for _, label in rows}) > 1)
SAMPLERS = st.sampled_from(["balanced", "disjoint_words"])


def slow_draw(rows, queries, *, shots, seed, sampler, same_split):
    """The draw on lists of rows, without indices or caches."""
    rng = random.Random(seed)
    classes = []
    for _, label in rows:
        if label not in classes:
            classes.append(label)
    everything = []
    for query in queries:
        wanted = shots + same_split
        counts = [(label, wanted // len(classes)) for label in classes]
        more = [label for label, _ in rng.sample(counts, wanted % len(classes))]
        drawn = []
        for label, count in counts:
            pool = [row for row in rows if row[1] == label]
            if sampler == "disjoint_words":
                first, second = query[0].split()
                pool = [
                    row
                    for row in pool
                    if row[0].split()[0] != first and row[0].split()[1] != second
                ]
            drawn += rng.sample(pool, min(count + (label in more), len(pool)))
        rng.shuffle(drawn)
        everything.append([row for row in drawn if row != query][:shots])
    return everything


def fast_draw(rows, queries, *, shots, seed, sampler, same_split):
    pool = Pool([text for text, _ in rows], [label for _, label in rows], sampler=sampler)
    drawn = draw_demonstrations(
        pool, queries, shots=shots, seed=seed, same_split=same_split, rule="published"
    )
    return [[rows[i] for i in found.rows] for found in drawn]


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, shots=st.integers(1, 3), seed=st.integers(0, 99), sampler=SAMPLERS)
def test_draw_equals_the_slow_one_on_its_own_split(rows, shots, seed, sampler):
    request = {"shots": shots, "seed": seed, "sampler": sampler, "same_split": True}
    assert fast_draw(rows, rows, **request) == slow_draw(rows, rows, **request)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, queries=ROWS, shots=st.integers(1, 4), seed=st.integers(0, 99))
def test_draw_equals_the_slow_one_on_another_split(rows, queries, shots, seed):
    request = {"shots": shots, "seed": seed, "sampler": "balanced", "same_split": False}
    assert fast_draw(rows, queries, **request) == slow_draw(rows, queries, **request)


@settings(max_examples=50, deadline=None)
@given(rows=ROWS, n=st.integers(1, 4), seed=st.integers(0, 99), sampler=SAMPLERS)
def test_first_documents_do_not_depend_on_how_many_follow(rows, n, seed, sampler):
    request = {"shots": 3, "seed": seed, "sampler": sampler, "same_split": True}
    assert fast_draw(rows, rows[:n], **request) == fast_draw(rows, rows, **request)[:n]


def test_zero_shots_draw_nothing():
    pool = Pool(["a b", "c d"], ["Foo", "Bar"], sampler="balanced")
    assert draw_demonstrations(pool, [("a b", "Foo")], shots=0, seed=1) == [([], 0, 0)]


@pytest.mark.parametrize("shots", [-1, 2, 1.0, True, None])
def test_impossible_number_of_shots_is_refused(shots):
    pool = Pool(["a b", "c d"], ["Foo", "Bar"], sampler="balanced")
    with pytest.raises(icl.InputError, match="shots"):
        draw_demonstrations(pool, [("a b", "Foo")], shots=shots, seed=1)


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, shots=st.integers(1, 3), seed=st.integers(0, 99), sampler=SAMPLERS)
def test_exact_draw_shows_what_is_asked_for_without_the_query_or_says_who_falls_short(
    rows, shots, seed, sampler
):
    pool = Pool([t for t, _ in rows], [label for _, label in rows], sampler=sampler, name="P")
    request = {"shots": shots, "seed": seed, "same_split": True}
    published = draw_demonstrations(pool, rows, **request, rule="published")
    fewer = draw_demonstrations(pool, rows, **request, rule="fewer")
    for (text, _), theirs, ours in zip(rows, published, fewer, strict=True):
        shown = [rows[i] for i in ours.rows]
        assert len(set(ours.rows)) == len(ours.rows) <= shots
        assert text not in [t for t, _ in shown]
        assert len(ours.rows) >= len(theirs.rows) - theirs.n_leaked
        if len(theirs.rows) == shots and not theirs.n_leaked:
            assert ours.rows == theirs.rows
        assert theirs.n_leaked == [rows[i][0] for i in theirs.rows].count(text)
    classes = {label for _, label in rows}

    def others(text: str, label: str) -> int:
        """Rows of a class that are not the document and may stand before it."""
        apart = [
            row[0]
            for row in rows
            if row[1] == label
            and (sampler == "balanced" or all(a != b for a, b in zip(row[0].split(), text.split(), strict=True)))
        ]  # fmt: skip
        return len(apart) - apart.count(text)

    even = all(others(t, label) >= shots // len(classes) for t, _ in rows for label in classes)
    if even and all(len(found.rows) == shots for found in fewer):
        assert draw_demonstrations(pool, rows, **request) == fewer
    else:
        with pytest.raises(icl.InputError, match=r"P: class '(Foo|Bar|Mur)' has \d+ rows that"):
            draw_demonstrations(pool, rows, **request)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("shots", "fits"), [(2, True), (4, False), (5, False)])
def test_a_class_that_cannot_give_its_even_share_is_an_error_whatever_the_draw(seed, shots, fits):
    """Two rows of a class: beside either of them stands one other."""
    rows = [(f"text {i}", "Foo" if i < 58 else "Bar") for i in range(60)]
    pool = Pool([t for t, _ in rows], [label for _, label in rows], sampler="balanced", name="P")
    if fits:
        drawn = draw_demonstrations(pool, rows, shots=shots, seed=seed)
        assert {len(found.rows) for found in drawn} == {shots}
        return
    with pytest.raises(icl.InputError, match="P: class 'Bar' has [12] rows.*'fewer'"):
        draw_demonstrations(pool, rows, shots=shots, seed=seed)
    assert draw_demonstrations(pool, rows, shots=shots, seed=seed, rule="fewer")


@pytest.fixture
def website(monkeypatch):
    """Two made-up files behind a replaced ``urlopen``; the second may be cut off."""
    files = {"one.json": b"[1]", "two.json": b"[2]"}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(original_data, "HASHES", hashes)

    def urlopen(url, timeout):
        assert timeout is not None
        content = files[url.rpartition("/")[2]]
        if content is None:
            raise urllib.error.URLError("no route")
        return io.BytesIO(content)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return files


def test_download_is_checked_and_cached(website, tmp_path):
    assert original_data.fetch_original(cache_dir=tmp_path / "cache") == tmp_path / "cache"
    found = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert found == website
    website.update(dict.fromkeys(website))  # the site goes away
    original_data.fetch_original(cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("content", [None, b"[2", b""])
def test_failed_download_says_what_to_do_and_leaves_no_half_file(website, tmp_path, content):
    website["two.json"] = content
    with pytest.raises(icl.MissingArtefactError, match=r"two\.json.*put it into .*cache"):
        original_data.fetch_original(cache_dir=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["one.json"]


@pytest.mark.parametrize("below", ["", "lm-evaluation-harness/synthetic"])
def test_local_clone_is_copied(website, tmp_path, below):
    folder = tmp_path / "clone" / below
    folder.mkdir(parents=True)
    for name, content in website.items():
        (folder / name).write_bytes(content)
    website.update(dict.fromkeys(website))
    target = original_data.fetch_original(source=tmp_path / "clone", cache_dir=tmp_path / "cache")
    assert sorted(path.name for path in target.iterdir()) == ["one.json", "two.json"]


def test_clone_without_the_files_is_named(website, tmp_path):
    with pytest.raises(icl.MissingArtefactError, match=r"one\.json is neither in"):
        original_data.fetch_original(source=tmp_path, cache_dir=tmp_path / "cache")
