"""The entries of a table, against plain formulas for one image."""

import json

import numpy as np
import pytest
import torch
from conftest import commands
from torch.nn.functional import normalize

from antarctic import selection
from antarctic.cache import search


def unit(*shape, seed):
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return normalize(vectors + 0.3, dim=-1)  # as CLIP's, they have a direction in common


@pytest.fixture(scope="module")
def shortlists():
    """(features (6, 24), cosines (6, 40), vectors (6, 40, 24)) of random unit vectors."""
    features, rows = unit(6, 24, seed=0), unit(300, 24, seed=1)
    cosines, indices = search(features, rows, 40)
    return features, cosines, rows[indices]


def relevant(cosines, vectors, k):
    """Maximal marginal relevance of one image, by its formula. Arrays of numpy."""
    likeness = vectors @ vectors.T
    relevance = (cosines - cosines.mean()) / cosines.std(ddof=0)
    likeness = (likeness - likeness.mean()) / likeness.std(ddof=0)
    places = [0]
    while len(places) < k:
        left = [i for i in range(len(cosines)) if i not in places]
        places.append(max(left, key=lambda i: 0.5 * relevance[i] - 0.5 * likeness[i, places].max()))
    return places


def fitted(vectors, feature):
    """The weights, none negative, of the sum of vectors that is nearest to feature, by projected
    gradient descent."""
    gram = vectors @ vectors.T
    weights, step = np.zeros(len(vectors)), 1 / np.linalg.eigvalsh(gram)[-1]
    for _ in range(20000):
        weights = np.maximum(0, weights - step * (gram @ weights - vectors @ feature))
    return weights


def pursued(feature, vectors, k):
    """Matching pursuit of one image, by its definition: (places, how many to take)."""
    places, explained, rest = [], [], feature
    for _ in range(k):
        near = vectors @ rest
        near[places] = -np.inf
        places.append(int(near.argmax()))
        weights = fitted(vectors[places], feature)
        rest = feature - weights @ vectors[places]
        explained.append(1 - rest @ rest)
    count = 1
    while count < k and explained[count] - explained[count - 1] > 0.01 * explained[-1]:
        count += 1
    return places, count


@pytest.mark.parametrize("k", [1, 2, 10, 40])
def test_marginal_relevance_is_its_formula(shortlists, k):
    _, cosines, vectors = (each.double() for each in shortlists)
    expected = [relevant(*(each.numpy() for each in image), k) for image in zip(cosines, vectors)]
    assert selection.marginal_relevance(cosines, vectors, k).tolist() == expected


def test_matching_pursuit_is_its_definition(shortlists, monkeypatch):
    monkeypatch.setattr(selection, "SWEEPS", 500)  # weights that are fitted to the last digit
    features, _, vectors = (each.double() for each in shortlists)
    places, counts = selection.matching_pursuit(features, vectors, 8)
    expected = [pursued(*(each.numpy() for each in image), 8) for image in zip(features, vectors)]
    assert list(zip(places.tolist(), counts.tolist())) == expected
    assert 1 < counts.min() and counts.max() <= 8


@pytest.mark.parametrize("method", selection.METHODS)
def test_a_table_depends_on_no_other_image(shortlists, method):
    together = selection.select(method, *shortlists, 10)
    alone = [selection.select(method, *(each[i:i + 1] for each in shortlists), 10)[0]
             for i in range(6)]
    assert together == alone
    for places in together:
        assert places[0] == 0  # the nearest entry comes first
        assert len(set(places)) == len(places) <= 10


def test_topk_takes_the_nearest(shortlists):
    assert selection.select("topk", *shortlists, 3) == [[0, 1, 2]] * 6


@pytest.mark.parametrize("method, said", [("topk", 1), ("mmr", 2), ("omp", 3)])
def test_what_is_said_already_is_not_said_again(method, said):
    """Three directions have ten entries each that are nearly the same."""
    axes = torch.eye(3, 16).repeat_interleave(10, 0)
    rows = normalize(axes + 0.02 * torch.rand(30, 16, generator=torch.Generator().manual_seed(0)),
                     dim=1)
    feature = normalize(torch.tensor([[1.2, 1.1, 1.0]]) @ torch.eye(3, 16), dim=1)
    cosines, indices = search(feature, rows, 30)
    directions = indices[0] // 10
    [places] = selection.select(method, feature, cosines, rows[indices], 3)
    assert len(directions[places].unique()) == said


def test_a_table_ends_where_nothing_more_is_explained():
    rows, feature = torch.eye(8), normalize(torch.tensor([[2.0, 1, 0, 0, 0, 0, 0, 0]]), dim=1)
    cosines, indices = search(feature, rows, 8)
    [places] = selection.select("omp", feature, cosines, rows[indices], 5)
    assert indices[0][places].tolist() == [0, 1]


@pytest.mark.parametrize("method", selection.METHODS)
@pytest.mark.parametrize("entries", [1, 2, 5])
def test_few_entries_are_a_table(method, entries):
    features, rows = unit(2, 8, seed=0), unit(entries, 8, seed=1)
    cosines, indices = search(features, rows, selection.shortlist_size(entries, 10))
    tables = selection.select(method, features, cosines, rows[indices], 10)
    assert all(1 <= len(places) <= entries for places in tables)


@pytest.mark.parametrize("entries, k, size", [
    (5, 10, 5), (300, 10, 20), (17000, 10, 340), (50000, 10, 512), (50000, 300, 600)])
def test_a_shortlist_grows_with_the_cache_to_a_bound(entries, k, size):
    assert selection.shortlist_size(entries, k) == size


# ------------------------------------------------------------------------------------ the scripts

@pytest.mark.parametrize("method", ["mmr", "omp"])
def test_a_checkpoint_brings_its_way_to_choose(script, world, cache, tmp_path, method):
    arguments = commands(world, cache, tmp_path / "out" / "best.safetensors")
    out, run = tmp_path / "out", tmp_path / "run"
    assert script("trainer", *arguments["trainer"](out, table=method, tmax=1)).code == 0
    tables = {}
    for flags in ([], ["--table", method], ["--table", "topk"]):
        result = script("sampler", *arguments["sampler"](run), *flags)
        assert result.code == 0, result.err
        assert ("was trained on tables by" in result.err) == (flags == ["--table", "topk"])
        with open(run / "details.jsonl") as file:
            tables[flags[-1] if flags else None] = [json.loads(line)["table"] for line in file]
    assert tables[None] == tables[method] != tables["topk"]


def test_another_choice_is_captioned_anew(script, world, cache, checkpoint, tmp_path):
    sampler, captions = commands(world, cache, checkpoint)["sampler"], []
    for method in ("topk", "omp", "topk"):
        assert script("sampler", *sampler(tmp_path), "--table", method).code == 0
        captions.append((tmp_path / "details.jsonl").read_bytes())
    assert captions[0] == captions[2] != captions[1]
