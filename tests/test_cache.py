"""The cache on disk and its search, against plain formulas."""

import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn.functional import normalize

from antarctic import cache, cache_changes, cache_files, files
from antarctic import rows as rows_module
from antarctic.cache_changes import write_cache
from antarctic.cache_files import cache_description, finish_cache
from antarctic.errors import InputError
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
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    entries, embeddings = cache.read_cache([files[0]], [files[1]], "clip", 4)
    assert len(entries) == (2 if killed_at < 3 else 3)
    assert np.array_equal(embeddings[:].numpy(), old if killed_at < 3 else new)
    # A reader moves nothing.
    assert left == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(cache_files.existing_caches(files[:1], files[1:])) == 1
    monkeypatch.setattr(os, "replace", replace)
    finish_cache(*files)
    assert cache_description(files[1])["text_sha256"] == file_sha256(files[0])


# ---------------------------------------------------------------- changed while it is read, damaged

def made(folder, n=40, seed=0, dim=8, dtype=np.float32):
    """Writes a cache of n entries, e 0 ... Returns its files and rows."""
    paths, rows = (folder / "c.txt", folder / "c.npy"), unit_rows(n, dim, seed).numpy()
    write_cache(*paths, [f"e {i}" for i in range(n)], rows, "clip", "", dtype)
    return paths, rows


def read(paths):
    return cache.read_cache([paths[0]], [paths[1]], "clip")


def test_a_cache_that_is_replaced_stays_what_was_opened(tmp_path):
    paths, rows = made(tmp_path)
    digest = file_sha256(paths[1])
    entries, embeddings = read(paths)
    made(tmp_path, 30, seed=1)
    assert len(entries) == 40 and np.array_equal(embeddings[:], rows)
    assert np.array_equal(embeddings.only(range(0, 40, 3))[:], rows[::3])
    assert [part.file.content_key() for part in embeddings.files()] == [digest]
    assert len(read(paths)[0]) == 30


@pytest.mark.parametrize("change", [
    lambda path, rows: np.save(path, rows[::-1]), lambda path, rows: os.truncate(path, 200),
    lambda path, rows: os.truncate(path, 0), lambda path, rows: np.save(path, rows[:7]),
    lambda path, rows: open(path, "ab").write(b"more")],
    ids=["other rows", "cut short", "emptied", "fewer rows", "longer"])
def test_a_cache_that_is_changed_in_place_is_noticed_and_no_row_comes_of_it(tmp_path, change):
    paths, rows = made(tmp_path)
    _, embeddings = read(paths)
    change(paths[1], rows)
    for use in (lambda: embeddings[30:33], lambda: embeddings.only([1, 39])[:],
                lambda: cache.search(torch.eye(8)[:1], embeddings, 3),
                embeddings.files()[0].file.content_key):
        with pytest.raises(InputError, match="c.npy was changed while this run read it"):
            use()


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("opened", [0, 1, 2])
def test_a_replacement_between_two_openings_gives_one_state(tmp_path, monkeypatch, opened,
                                                            described):
    """Another run replaces the cache when so many of its three files have been opened."""
    paths, rows = made(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    new_paths, new = made(other, 40, seed=1)
    write_cache(new_paths[0], new_paths[1], [f"new {i}" for i in range(40)], new, "clip", "")
    if not described:
        for folder in (tmp_path, other):
            (folder / "c.npy.json").unlink()
    hold, calls = cache_files.hold, []

    def hold_late(*names):
        if len(calls) == opened:
            for path in other.iterdir():
                os.replace(path, tmp_path / path.name)
        calls.append(names)
        return hold(*names)

    monkeypatch.setattr(cache_files, "hold", hold_late)
    entries, embeddings = read(paths)
    assert len(calls) == 6  # all are opened again
    assert entries[0] == "new 0" and np.array_equal(embeddings[:], new)


def test_processes_that_opened_two_states_stop(tmp_path, monkeypatch):
    """Each process gives what the cache that it opened is; both gather the same list."""
    given = []

    def gather(items):
        given.extend(items)
        return list(given)

    monkeypatch.setattr(cache, "gather_lists", gather)
    monkeypatch.setattr(cache, "peer_sockets", [None])  # it has joined another one
    paths, _ = made(tmp_path)
    read(paths)
    read(paths)
    assert len(set(given)) == 1
    made(tmp_path, seed=1)  # the same text
    with pytest.raises(InputError, match="was replaced while the processes of this run opened it"):
        read(paths)


def test_a_cache_that_is_replaced_again_and_again_is_named(tmp_path, monkeypatch):
    paths, _ = made(tmp_path)
    hold = cache_files.hold

    def hold_and_write(*names):
        made(tmp_path)
        return hold(*names)

    monkeypatch.setattr(cache_files, "hold", hold_and_write)
    monkeypatch.setattr(cache_files, "ATTEMPTS", 3)
    with pytest.raises(InputError, match="c.npy is being replaced again and again"):
        read(paths)


@pytest.mark.parametrize("n", [1, 39, 40, 41])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_digests_are_those_of_the_files_parts(tmp_path, monkeypatch, n, dtype):
    for module in (cache_changes, rows_module):
        monkeypatch.setattr(module, "DIGEST_ROWS", 10)
    paths, _ = made(tmp_path, n, dtype=dtype)
    data, step = paths[1].read_bytes(), 10 * 8 * np.dtype(dtype).itemsize
    parts = [data[:128 + step], *(data[at:at + step] for at in range(128 + step, len(data), step))]
    digests = "".join(hashlib.sha256(part).hexdigest()[:16] for part in parts)
    assert json.loads((tmp_path / "c.npy.json").read_text())["rows_sha256"] == digests
    cache.check_cache(*paths)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1  # the last bit of a number: it stays a number
    path.write_bytes(data)


@pytest.mark.parametrize("row, found", [(0, True), (9, True), (150, False), (199, True)])
def test_damage_is_named_by_the_check_and_at_the_ends_when_it_is_opened(
        tmp_path, monkeypatch, row, found):
    for module in (cache_changes, rows_module):
        monkeypatch.setattr(module, "DIGEST_ROWS", 10)
    monkeypatch.setattr(cache.random.Random, "sample", lambda _, blocks, k: blocks[:k])
    paths, _ = made(tmp_path, 200)
    flip(paths[1], 128 + row * 32 + 8)
    block = row // 10 * 10
    names = rf"damaged: rows {block + 1} \('e {block}'\) to {block + 10} \('e {block + 9}'\) "
    with pytest.raises(InputError, match=names):
        cache.check_cache(*paths)
    if found:
        with pytest.raises(InputError, match=names):
            read(paths)
    else:
        assert len(read(paths)[0]) == 200


def test_a_small_cache_is_checked_whole_when_it_is_opened(tmp_path, monkeypatch):
    for module in (cache_changes, rows_module):
        monkeypatch.setattr(module, "DIGEST_ROWS", 10)
    paths, _ = made(tmp_path, 80)
    good = paths[1].read_bytes()
    for place in [*range(0, 128, 9), *range(128, len(good), 97)]:
        flip(paths[1], place)
        with pytest.raises(InputError):
            read(paths)
        paths[1].write_bytes(good)
    paths[1].write_bytes(good + b"0")
    with pytest.raises(InputError, match="is not the file that"):
        read(paths)


def test_all_that_is_damaged_is_named_where_it_is_not_too_much(tmp_path, monkeypatch):
    for module in (cache_changes, rows_module):
        monkeypatch.setattr(module, "DIGEST_ROWS", 1)
    paths, _ = made(tmp_path, 60)
    for row in (3, 4, 5, *range(10, 60, 2)):
        flip(paths[1], 128 + row * 32 + 8)
    with pytest.raises(InputError) as error:
        cache.check_cache(*paths)
    assert "damaged: rows 4 ('e 3') to 6 ('e 5'); row 11 ('e 10'); " in str(error.value)
    assert "and 16 more are not what was written" in str(error.value)


def test_a_description_without_digests_is_one_of_an_earlier_version(tmp_path, capsys):
    paths, rows = made(tmp_path)
    side = tmp_path / "c.npy.json"
    description = json.loads(side.read_text())
    del description["rows_sha256"]
    side.write_text(json.dumps(description))
    flip(paths[1], 300)
    assert len(read(paths)[0]) == 40
    cache.check_cache(*paths)
    output = capsys.readouterr()
    assert not output.err and "no digests" in output.out and "40 rows" in output.out
    rows[7] = np.inf
    np.save(paths[1], rows)
    with pytest.raises(InputError, match=r"damaged: row 8 \('e 7'\) are not finite"):
        cache.check_cache(*paths)


@pytest.fixture()
def damaged_between_samples(tmp_path, monkeypatch):
    """A function that damages a row of a new cache, in a block that is not looked at when the cache
    is opened. Returns the cache's paths."""
    for module in (cache_changes, rows_module):
        monkeypatch.setattr(module, "DIGEST_ROWS", 10)

    def damage(value):
        paths, rows = made(tmp_path, 200)
        rows[55, 2] = value
        with open(paths[1], "r+b") as file:
            file.seek(128)
            file.write(rows.tobytes())
        monkeypatch.setattr(cache.random.Random, "sample", lambda _, blocks, count: blocks[:count])
        return paths

    return damage


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("count", [1, 100])
def test_a_value_that_is_not_finite_does_not_pass_for_the_nearest(
        damaged_between_samples, value, count):
    _, embeddings = read(damaged_between_samples(value))
    queries = torch.ones(count, embeddings[:1].shape[1])
    half = cache.to_bfloat16(embeddings)
    with pytest.raises(InputError, match="a score is not finite"):
        cache.search(queries, embeddings, 3, half=half)


def test_what_is_damaged_is_not_sealed_anew_where_entries_are_added(damaged_between_samples):
    paths = damaged_between_samples(0.5)
    read(paths)
    before = paths[1].read_bytes()
    clip = SimpleNamespace(identity="clip", dim=read(paths)[1][:1].shape[1])
    with pytest.raises(InputError, match="is damaged: rows 51 "):
        cache_changes.change_cache(*paths, clip, add=["a word"])
    assert paths[1].read_bytes() == before


def test_no_value_that_is_not_finite_is_written(tmp_path):
    paths, rows = made(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for bad in (np.nan, np.inf):
        rows[33, 2] = bad
        with pytest.raises(InputError, match="the entry 'e 33' is not finite"):
            write_cache(*paths, [f"e {i}" for i in range(40)], rows, "clip", "")
    rows[33, 2] = 1e6
    with pytest.raises(InputError, match="the entry 'e 33' is not finite"):  # as float16
        write_cache(*paths, [f"e {i}" for i in range(40)], rows, "clip", "", np.float16)
    assert len(read(paths)[0]) == 40
    for name, data in before.items():
        assert (tmp_path / name).read_bytes() == data


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_on_the_disk_read_as_those_in_memory(tmp_path, monkeypatch, dtype):
    """Any slice is equal, of two caches that share entries, with all rows and with some."""
    for module in (cache, cache_changes, rows_module):  # it is read and written by blocks
        monkeypatch.setattr(module, "DIGEST_ROWS", 7)
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


def test_rows_are_read_alike_where_the_system_reads_at_no_place(tmp_path, monkeypatch):
    """Windows has neither pread nor preadv."""
    write_cache(tmp_path / "c.txt", tmp_path / "c.npy", list("abcdefgh"), unit_rows(8, 4).numpy(),
                "clip", "")

    def read():
        _, rows = cache.read_one_cache(tmp_path / "c.txt", tmp_path / "c.npy", "clip")
        return rows[:], rows.only([1, 5])[:]

    expected = read()
    for name in ("pread", "preadv"):
        monkeypatch.delattr(os, name)
    for rows, other in zip(read(), expected, strict=True):
        assert torch.equal(rows, other)


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
