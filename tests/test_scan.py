"""One image's search in a copy of the cache in memory gives what the exact search gives."""

import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from antarctic import scan
from antarctic.cache import search
from antarctic.errors import InputError
from antarctic.rows import Embeddings, Rows

pytest.importorskip("faiss")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(scan, "BLOCK", 100)


def unit(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def stored(rows, path, dtype=np.float32):
    """Rows of a file, of which each third one is left out."""
    np.save(path, rows.numpy().astype(dtype))
    return Rows(path).only([i for i in range(len(rows)) if i % 3])


def require_same(found, expected):
    """Equal scores but for their last bits, and equal rows but for ties."""
    (scores, rows), (expected_scores, expected_rows) = found, expected
    torch.testing.assert_close(scores, expected_scores, atol=1e-6, rtol=0)
    assert rows.dtype == torch.int64 and rows.unique().numel() == rows.numel()
    other = rows != expected_rows
    for row, score in zip(rows[other].tolist(), scores[other]):
        assert (expected_scores - score).abs().min() < 1e-6, row


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("k", [1, 10, 60, 5000])
def test_it_finds_what_the_exact_search_finds(tmp_path, dtype, k):
    """In files and in memory, with rows that were added after the copy was made, also of few rows,
    and for queries of any length."""
    common = 2 * unit(1, 64, seed=9)
    for n in (1, 90, 300, 3000):
        part = stored(normalize(unit(n + 1, 64) + common, dim=-1), tmp_path / f"{n}.npy", dtype)
        embeddings = Embeddings([part, unit(7, 64, seed=2)])
        copy = scan.Scan(embeddings)
        more = Embeddings([*embeddings.parts, unit(5, 64, seed=3)])
        for query in torch.cat((unit(6, 64, seed=1), 3 * unit(2, 64, seed=4), part[:1])):
            for each in (embeddings, more):
                require_same(copy(query[None], each, k), search(query[None], each, k))


def test_it_reads_few_rows_of_the_cache(monkeypatch):
    rows, queries = unit(5000, 64), unit(20, 64, seed=1)
    copy = scan.Scan(Embeddings([rows]))
    for query in queries:
        near = copy.near(query[None], 10)
        assert 10 <= len(near) <= 40
        assert set(search(query[None], rows, 10)[1][0].tolist()) <= set(near.tolist())


def test_rows_that_float16_does_not_tell_apart_are_told_apart():
    """Of rows closer than its error all are compared in float32, and of too many the whole
    cache."""
    query = unit(1, 64)
    for n, near in ((20, True), (3000, False)):
        close = normalize(query + 1e-5 * unit(n, 64, seed=1), dim=-1)
        rows = torch.cat((unit(1000, 64, seed=2), close))[torch.randperm(
            1000 + n, generator=torch.Generator().manual_seed(3))]
        copy = scan.Scan(Embeddings([rows]))
        assert (copy.near(query, 10) is not None) == near
        require_same(copy(query, Embeddings([rows]), 10), search(query, rows, 10))


def test_queries_that_are_not_finite_are_refused_and_many_are_searched_exactly():
    rows = Embeddings([unit(500, 8)])
    copy, queries = scan.Scan(rows), unit(3, 8, seed=1)
    with pytest.raises(InputError, match="not finite"):
        copy(torch.full((1, 8), torch.nan), rows, 3)
    for one, other in zip(copy(queries, rows, 3), search(queries, rows, 3)):
        assert torch.equal(one, other)


def test_a_cache_is_kept_where_that_pays_and_can_be(monkeypatch, capsys):
    rows = Embeddings([unit(500, 8)])
    assert scan.kept_in_memory(rows) is search  # of few rows
    monkeypatch.setattr(scan, "LEAST", 500)
    assert isinstance(scan.kept_in_memory(rows), scan.Scan)
    assert "kept in memory: 0.00 GB" in capsys.readouterr().out
    for wrong in (1.01 * unit(500, 8), torch.full((500, 8), torch.nan)):
        assert scan.kept_in_memory(Embeddings([wrong])) is search
    monkeypatch.setattr(scan, "memory_for_indexes", lambda: 2 * 500 * 8 - 1)
    assert scan.kept_in_memory(rows) is search
    monkeypatch.setattr(scan, "memory_for_indexes", lambda: 1 << 30)
    monkeypatch.setitem(sys.modules, "faiss", None)  # as if it were not installed
    assert scan.kept_in_memory(rows) is search
