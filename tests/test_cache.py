"""The cache on disk and its search, against plain formulas."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from antarctic import cache, files
from antarctic.files import file_sha256


def unit_rows(n, dim, seed=0):
    rows = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


@pytest.mark.parametrize("n, k, "
                         "chunk", [(1000, 10, 16384), (1000, 10, 64), (1000, 10, 7), (5, 10, 2), (64, 64, 64)])
def test_search_in_chunks_equals_sorting_all_scores(n, k, chunk):
    queries, embeddings = unit_rows(6, 16, seed=1), unit_rows(n, 16)
    scores, indices = cache.search(queries, embeddings, k, chunk)
    expected, order = (queries @ embeddings.T).sort(dim=1, descending=True)
    k = min(k, n)
    assert indices.shape == (6, k)
    assert torch.equal(indices, order[:, :k])
    torch.testing.assert_close(scores, expected[:, :k])


def test_a_cache_comes_back_as_it_was_written(tmp_path):
    entries, rows = ["a dog", "grass", "naïve café"], unit_rows(3, 8)
    cache.write_cache(tmp_path / "c.txt", tmp_path / "c.npy", entries, rows.numpy(), "clip@1", "")
    found, embeddings = cache.read_cache([tmp_path / "c.txt"], [tmp_path / "c.npy"], "clip@1")
    assert found == entries
    assert torch.equal(embeddings[:], rows) and embeddings[:].dtype == torch.float32
    assert np.load(tmp_path / "c.npy").dtype == np.float32  # the original's format


def test_several_caches_are_one_and_an_entry_counts_once(tmp_path):
    first, second = unit_rows(3, 8), unit_rows(2, 8, seed=5)
    cache.write_cache(tmp_path / "a.txt", tmp_path / "a.npy", ["dog", "cat", "cow"], first.numpy(),
                      "clip@1", "")
    cache.write_cache(tmp_path / "b.txt", tmp_path / "b.npy", ["cat", "penguin"], second.numpy(),
                      "clip@1", "")
    entries, embeddings = cache.read_cache([tmp_path / "a.txt", tmp_path / "b.txt"],
                                           [tmp_path / "a.npy", tmp_path / "b.npy"], "clip@1")
    assert entries == ["dog", "cat", "cow", "penguin"]
    assert torch.equal(embeddings[:], torch.cat((first, second[1:])))


def test_a_cache_without_description_loads_with_a_warning(tmp_path, capsys):
    cache.write_cache(tmp_path / "c.txt", tmp_path / "c.npy", ["dog"],
                      unit_rows(1, 8).numpy(), "clip@1", "")
    (tmp_path / "c.npy.json").unlink()
    assert cache.read_cache([tmp_path / "c.txt"], [tmp_path / "c.npy"], "clip@2")[0] == ["dog"]
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.parametrize("killed_at", range(7))
def test_a_cache_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, killed_at):
    """Killed before any of its renames, a write leaves the old cache or the new one, never a
    mixture."""
    files, old, new = (tmp_path / "c.txt", tmp_path / "c.npy"), unit_rows(2, 4).numpy(), unit_rows(
        3, 4, seed=1).numpy()
    cache.write_cache(*files, ["a", "b"], old, "clip", "")
    replace, count = os.replace, [0]

    def killed(*paths):
        count[0] += 1
        if count[0] > killed_at:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", killed)
    try:
        cache.write_cache(*files, ["a", "b", "c"], new, "clip", "")
    except KeyboardInterrupt:
        pass
    monkeypatch.setattr(os, "replace", replace)
    entries, embeddings = cache.read_cache([files[0]], [files[1]], "clip", 4)
    assert len(entries) == (2 if killed_at < 3 else 3)
    assert np.array_equal(embeddings[:].numpy(), old if killed_at < 3 else new)
    assert cache.cache_description(files[1])["text_sha256"] == file_sha256(files[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_on_the_disk_read_as_those_in_memory(tmp_path, monkeypatch, dtype):
    """Any slice, of one cache or of several over one another, with entries that come again and
    others left out."""
    monkeypatch.setattr(cache, "BLOCK", 7)
    first, second = (unit_rows(n, 8, seed=n).numpy().astype(dtype) for n in (20, 9))
    names = [[str(i) for i in range(20)], [str(i) for i in range(15, 24)]]
    for end, lines, rows in zip("ab", names, (first, second)):
        cache.write_cache(tmp_path / f"{end}.txt", tmp_path / f"{end}.npy", lines, rows, "clip", "",
                          dtype)
        np.save(tmp_path / "plain.npy", rows)
        assert (tmp_path / "plain.npy").read_bytes() == (tmp_path / f"{end}.npy").read_bytes()
    entries, rows = cache.read_cache([tmp_path / "a.txt", tmp_path / "b.txt"],
                                     [tmp_path / "a.npy", tmp_path / "b.npy"], "clip")
    plain = torch.from_numpy(np.concatenate((first, second[5:])).astype(np.float32))
    assert entries == [str(i) for i in range(24)] and len(rows) == 24
    some = [0, 3, 19, 20, 22]
    for start in range(25):
        for stop in range(26):
            assert torch.equal(rows[start:stop], plain[start:stop])
            assert torch.equal(rows.only(some)[start:stop], plain[some][start:stop])
    queries = unit_rows(3, 8, seed=1)
    for found, expected in zip(cache.search(queries, rows, 5, chunk=4),
                               cache.search(queries, plain, 5)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("chunk", [50, 1000])
# a direction in common to all, so that cosines lie close together
@pytest.mark.parametrize("shared", [0.0, 3.0])
def test_a_scan_in_bfloat16_loses_none_of_the_nearest(tmp_path, chunk, shared):
    """Also of rows that bfloat16 cannot tell apart, of negative products, and of a file of
    float16."""
    rows, queries = (torch.nn.functional.normalize(
        unit_rows(n, 16, seed=n) + shared * torch.eye(16)[0], dim=1) for n in (3000, 40))
    rows[1000:1100] = torch.nn.functional.normalize(rows[1000] + 1e-4 * rows[1100:1200], dim=1)
    queries[:10] = rows[1000:1010]
    queries[10:20] *= -1
    for dtype in (np.float32, np.float16):
        np.save(tmp_path / "rows.npy", rows.numpy().astype(dtype))
        stored = cache.Embeddings([cache.Rows(tmp_path / "rows.npy")])
        exact = queries.double() @ stored[:].double().T
        scores, indices = cache.search(queries, stored, 10, chunk, cache.to_bfloat16(stored))
        torch.testing.assert_close(scores.double(), exact.topk(10).values, atol=1e-6, rtol=0)
        torch.testing.assert_close(exact.gather(1, indices),
                                   exact.topk(10).values, atol=1e-6, rtol=0)
    assert cache.to_bfloat16(1.01 * rows) is None  # of which the bound would not hold


LARGE = """
import resource, sys
import torch
from antarctic import cache
torch.set_num_threads(1)
imported = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # much, where torch brings a GPU's libraries
resource.setrlimit(resource.RLIMIT_AS, (imported + (3 << 29), imported + (3 << 29)))
entries, embeddings = cache.read_cache([sys.argv[1] + ".txt"], [sys.argv[1] + ".npy"], "clip", 128)
scores, indices = cache.search(torch.eye(128)[:1], embeddings, 3)
print([entries[i] for i in indices[0].tolist()], scores[0].tolist())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_five_million_entries_are_searched_in_less_memory_than_they_have(tmp_path):
    """2.6 GB of embeddings, most of them zeros that take no place on the disk, in 1.6 GB of address
    space."""
    n, planted = 5_000_000, {4_999_999: 0.9, 0: 0.8, 2_345_678: 0.7}
    files.write_lines(tmp_path / "c.txt", map(str, range(n)))
    with open(tmp_path / "c.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (n, 128)})
        begin = file.tell()
        file.truncate(begin + n * 128 * 4)
        for row, score in planted.items():
            file.seek(begin + row * 128 * 4)
            file.write(np.float32(score).tobytes())
    run = subprocess.run([sys.executable, "-c", LARGE, tmp_path / "c"], capture_output=True,
                         text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("['4999999', '0', '2345678'] [0.8999")
