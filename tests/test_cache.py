"""The cache on disk and its search, against plain formulas."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn.functional import normalize

from antarctic import cache, cache_changes, files
from antarctic.cache_changes import write_cache
from antarctic.cache_files import cache_description
from antarctic.files import file_sha256


def unit_rows(n, dim, seed=0):
    rows = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return normalize(rows, dim=-1)


@pytest.mark.parametrize("n, k, chunk", [
    (1000, 10, 16384), (1000, 10, 64), (1000, 10, 7), (5, 10, 2), (64, 64, 64)])
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
    write_cache(tmp_path / "c.txt", tmp_path / "c.npy", entries, rows.numpy(), "clip@1", "")
    lines, embeddings = cache.read_cache([tmp_path / "c.txt"], [tmp_path / "c.npy"], "clip@1")
    assert lines == entries
    assert torch.equal(embeddings[:], rows) and embeddings[:].dtype == torch.float32
    assert np.load(tmp_path / "c.npy").dtype == np.float32  # the original's format


def test_several_caches_are_one_and_an_entry_counts_once(tmp_path):
    a, b = unit_rows(3, 8), unit_rows(2, 8, seed=5)
    write_cache(tmp_path / "a.txt", tmp_path / "a.npy", ["dog", "cat", "cow"], a.numpy(),
                "clip@1", "")
    write_cache(tmp_path / "b.txt", tmp_path / "b.npy", ["cat", "penguin"], b.numpy(), "clip@1", "")
    entries, embeddings = cache.read_cache([tmp_path / "a.txt", tmp_path / "b.txt"],
                                           [tmp_path / "a.npy", tmp_path / "b.npy"], "clip@1")
    assert entries == ["dog", "cat", "cow", "penguin"]
    assert torch.equal(embeddings[:], torch.cat((a, b[1:])))


def test_a_cache_without_description_loads_with_a_warning(tmp_path, capsys):
    write_cache(tmp_path / "c.txt", tmp_path / "c.npy", ["dog"], unit_rows(1, 8).numpy(),
                "clip@1", "")
    (tmp_path / "c.npy.json").unlink()
    assert cache.read_cache([tmp_path / "c.txt"], [tmp_path / "c.npy"], "clip@2")[0] == ["dog"]
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.parametrize("killed_at", range(7))
def test_a_cache_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, killed_at):
    """A write that is killed before any of its renames leaves the old cache or the new one."""
    files = tmp_path / "c.txt", tmp_path / "c.npy"
    old, new = unit_rows(2, 4).numpy(), unit_rows(3, 4, seed=1).numpy()
    write_cache(*files, ["a", "b"], old, "clip", "")
    replace, calls = os.replace, []

    def replace_until_killed(*paths):
        calls.append(paths)
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_until_killed)
    try:
        write_cache(*files, ["a", "b", "c"], new, "clip", "")
    except KeyboardInterrupt:
        pass
    monkeypatch.setattr(os, "replace", replace)
    entries, embeddings = cache.read_cache([files[0]], [files[1]], "clip", 4)
    assert len(entries) == (2 if killed_at < 3 else 3)
    assert np.array_equal(embeddings[:].numpy(), old if killed_at < 3 else new)
    assert cache_description(files[1])["text_sha256"] == file_sha256(files[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_on_the_disk_read_as_those_in_memory(tmp_path, monkeypatch, dtype):
    """Any slice is equal, of two caches that share entries, with all rows and with some."""
    for module in (cache, cache_changes):  # it is read and written by blocks
        monkeypatch.setattr(module, "BLOCK", 7)
    a, b = (unit_rows(n, 8, seed=n).numpy().astype(dtype) for n in (20, 9))
    entries_a, entries_b = [str(i) for i in range(20)], [str(i) for i in range(15, 24)]
    for name, lines, rows in (("a", entries_a, a), ("b", entries_b, b)):
        write_cache(tmp_path / f"{name}.txt", tmp_path / f"{name}.npy", lines, rows, "clip", "",
                    dtype)
        np.save(tmp_path / "plain.npy", rows)
        assert (tmp_path / "plain.npy").read_bytes() == (tmp_path / f"{name}.npy").read_bytes()
    entries, rows = cache.read_cache([tmp_path / "a.txt", tmp_path / "b.txt"],
                                     [tmp_path / "a.npy", tmp_path / "b.npy"], "clip")
    plain = torch.from_numpy(np.concatenate((a, b[5:])).astype(np.float32))
    assert entries == [str(i) for i in range(24)] and len(rows) == 24
    subset = [0, 3, 19, 20, 22]
    for start in range(25):
        for stop in range(26):
            assert torch.equal(rows[start:stop], plain[start:stop])
            assert torch.equal(rows.only(subset)[start:stop], plain[subset][start:stop])
    queries = unit_rows(3, 8, seed=1)
    result, expected = cache.search(queries, rows, 5, chunk=4), cache.search(queries, plain, 5)
    assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize("chunk", [50, 1000])
@pytest.mark.parametrize("shared", [0.0, 3.0])
def test_a_scan_in_bfloat16_loses_none_of_the_nearest(tmp_path, chunk, shared):
    """Also among rows that are equal in bfloat16, with negative products, and in a float16 file.

    shared: weight of a direction that all vectors share, which brings cosines close together.
    """
    rows, queries = (normalize(unit_rows(n, 16, seed=n) + shared * torch.eye(16)[0], dim=1)
                     for n in (3000, 40))
    rows[1000:1100] = normalize(rows[1000] + 1e-4 * rows[1100:1200], dim=1)
    queries[:10] = rows[1000:1010]
    queries[10:20] *= -1
    for dtype in (np.float32, np.float16):
        np.save(tmp_path / "rows.npy", rows.numpy().astype(dtype))
        stored = cache.Embeddings([cache.Rows(tmp_path / "rows.npy")])
        exact = queries.double() @ stored[:].double().T
        scores, indices = cache.search(queries, stored, 10, chunk, cache.to_bfloat16(stored))
        torch.testing.assert_close(scores.double(), exact.topk(10).values, atol=1e-6, rtol=0)
        torch.testing.assert_close(exact.gather(1, indices), exact.topk(10).values, atol=1e-6,
                                   rtol=0)
    assert cache.to_bfloat16(1.01 * rows) is None  # search's error bound would not hold


LARGE = """
import resource, sys
import torch
from antarctic import cache
torch.set_num_threads(1)
pages = int(open("/proc/self/statm").read().split()[0])  # many, if torch loads a GPU's libraries
limit = pages * resource.getpagesize() + (3 << 29)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
entries, embeddings = cache.read_cache([sys.argv[1] + ".txt"], [sys.argv[1] + ".npy"], "clip", 128)
scores, indices = cache.search(torch.eye(128)[:1], embeddings, 3)
print([entries[i] for i in indices[0].tolist()], scores[0].tolist())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_five_million_entries_are_searched_in_less_memory_than_they_have(tmp_path):
    """2.6 GB of embeddings in 1.6 GB of address space. Most are zeros, which take no disk space."""
    n, planted = 5_000_000, {4_999_999: 0.9, 0: 0.8, 2_345_678: 0.7}  # {row: score}
    header = {"descr": "<f4", "fortran_order": False, "shape": (n, 128)}
    files.write_lines(tmp_path / "c.txt", map(str, range(n)))
    with open(tmp_path / "c.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
        file.truncate(begin + n * 128 * 4)
        for row, score in planted.items():
            file.seek(begin + row * 128 * 4)
            file.write(np.float32(score).tobytes())
    run = subprocess.run([sys.executable, "-c", LARGE, tmp_path / "c"], capture_output=True,
                         text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("['4999999', '0', '2345678'] [0.8999")
