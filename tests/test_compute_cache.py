"""Mining, compared with nltk's counts and definitions, and caches, equal to the byte each time."""

import json
import math
from collections import Counter

import nltk
import numpy as np
import pytest
import torch
from conftest import CLIP

from antarctic.rows import Rows
from compute_cache import mine
from model import Clip

CAPTIONS = [
    "A dog on the grass.", "the dog, the cat", "A DOG on a mat", "hot dog on the grill",
    "a hot dog on bread", "hot dog"]


def compute(script, folder, *source):
    return script("compute_cache", *source, "--textfile", folder / "c.txt",
                  "--embfile", folder / "c.npy", "--clip_model", CLIP)


def tokenize(caption):
    """The words of a caption, as nltk splits it."""
    return [token for token in nltk.wordpunct_tokenize(caption.lower()) if token.isalnum()]


def test_unigrams_come_by_count_and_ties_by_text():
    unigrams = [e for e in mine(CAPTIONS, 100, 3) if " " not in e]
    counts = Counter(word for caption in CAPTIONS for word in tokenize(caption))
    assert unigrams == sorted(counts, key=lambda word: (-counts[word], word))
    assert unigrams[:4] == ["dog", "a", "on", "the"]


def test_bigrams_equal_nltks_pmi_within_captions():
    bigrams = [e for e in mine(CAPTIONS * 3, 100, 3) if " " in e]
    documents = [tokenize(caption) for caption in CAPTIONS * 3]
    words = nltk.FreqDist(word for document in documents for word in document)
    pairs = nltk.FreqDist(pair for document in documents for pair in zip(document, document[1:]))
    finder = nltk.BigramCollocationFinder(words, pairs)
    finder.apply_freq_filter(3)
    pmi = dict(finder.score_ngrams(nltk.BigramAssocMeasures.pmi))
    assert set(bigrams) == {" ".join(pair) for pair in pmi}
    scores = [pmi[tuple(bigram.split())] for bigram in bigrams]
    assert all(a > b or math.isclose(a, b) for a, b in zip(scores, scores[1:]))


def test_no_bigram_crosses_from_one_caption_into_the_next():
    entries = mine(["a dog", "cat food"] * 5, 100, 3)
    assert "dog cat" not in entries and "food a" not in entries
    assert "a dog" in entries and "cat food" in entries


def test_rare_bigrams_are_left_out_and_topk_bounds_each_kind():
    entries = mine(["a dog"] * 2 + ["a cat"] * 3, 1, 3)
    assert entries == ["a", "a cat"]


def test_two_runs_give_the_same_bytes(script, world, cache, tmp_path):
    run = compute(script, tmp_path, "--datadir", world)
    assert run.code == 0, run.err
    assert (tmp_path / "c.txt").read_bytes() == cache.textfile.read_bytes()
    assert (tmp_path / "c.npy").read_bytes() == cache.embfile.read_bytes()


def test_row_i_is_the_embedding_of_line_i(cache):
    lines = cache.textfile.read_text(encoding="utf-8").splitlines()
    rows = np.load(cache.embfile)
    picked = [0, 7, len(lines) // 2, len(lines) - 1]
    alone = torch.cat([Clip(CLIP).encode_texts([lines[i]]) for i in picked])
    np.testing.assert_allclose(rows[picked], alone.numpy(), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("flags, text, entries", [
    (["--entries"], "penguin\n\nGeoff  Hinton\npenguin\n", ["penguin", "Geoff Hinton"]),
    (["--topk", "2", "--corpus"], "hinton geoff\ngeoff hinton\n", ["geoff", "hinton"]),
])
def test_other_sources_of_entries(script, tmp_path, flags, text, entries):
    (tmp_path / "in.txt").write_text(text)
    run = compute(script, tmp_path, *flags, tmp_path / "in.txt")
    assert run.code == 0, run.err
    assert (tmp_path / "c.txt").read_text().splitlines() == entries
    assert json.loads((tmp_path / "c.npy.json").read_text())["entries"] == 2


def test_the_prefix_is_encoded_but_not_written(script, tmp_path):
    (tmp_path / "in.txt").write_text("dog\n")
    run = compute(script, tmp_path, "--entries", tmp_path / "in.txt", "--prefix", "a photo of a ")
    assert run.code == 0, run.err
    assert (tmp_path / "c.txt").read_text() == "dog\n"
    expected = Clip(CLIP).encode_texts(["a photo of a dog"]).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "c.npy"), expected, atol=2e-6)


def test_a_byte_order_mark_is_no_part_of_the_first_entry(script, tmp_path):
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbfpenguin\r\nwhale\r\n")
    run = compute(script, tmp_path, "--entries", tmp_path / "in.txt")
    assert run.code == 0, run.err
    assert (tmp_path / "c.txt").read_bytes() == b"penguin\nwhale\n"


def contents(folder):
    return [(folder / name).read_bytes() for name in ("c.txt", "c.npy", "c.npy.json")]


def entries_cache(script, folder, *entries, more=()):
    (folder / "list.txt").write_text("\n".join(entries))
    run = compute(script, folder, "--entries", folder / "list.txt", *more)
    assert run.code == 0, run.err


def test_added_and_removed_entries_give_the_cache_of_the_changed_list(script, tmp_path,
                                                                      monkeypatch):
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    whole.mkdir()
    changed.mkdir()
    entries_cache(script, whole, "a dog", "red", "Geoff Hinton", "a golden retriever puppy",
                  "penguin")
    entries_cache(script, changed, "a dog", "a cat", "red")
    (tmp_path / "more.txt").write_text("penguin\n\n  red \n")
    encoded, encode = [], Clip.encode_texts

    def record_texts(self, texts, *options):
        encoded.extend(texts)
        return encode(self, texts, *options)

    monkeypatch.setattr(Clip, "encode_texts", record_texts)
    run = compute(script, changed, "--add", "Geoff Hinton", "a dog", "a golden  retriever puppy",
                  "--add_from", tmp_path / "more.txt", "--remove", "a cat", "unicorn")
    assert run.code == 0, run.err
    assert encoded == ["Geoff Hinton", "a golden retriever puppy", "penguin"]
    assert "added 3 entries" in run.out and "(2 were already in it)" in run.out
    assert "removed 1" in run.out and "unicorn" in run.out
    assert contents(whole)[0] == contents(changed)[0]
    described = [json.loads(contents(folder)[2]) for folder in (whole, changed)]
    # Of other batches, the vectors are equal but for their last bits.
    assert described[0] | {"rows_sha256": ""} == described[1] | {"rows_sha256": ""}
    assert np.abs(np.load(whole / "c.npy") - np.load(changed / "c.npy")).max() < 1e-6


def test_adding_what_is_there_changes_no_file(script, tmp_path):
    entries_cache(script, tmp_path, "a dog", "red")
    before = contents(tmp_path), (tmp_path / "c.npy").stat().st_mtime_ns
    assert "added 0 entries" in compute(script, tmp_path, "--add", "red").out
    assert before == (contents(tmp_path), (tmp_path / "c.npy").stat().st_mtime_ns)


def test_a_caches_prefix_holds_for_what_is_added(script, tmp_path):
    entries_cache(script, tmp_path, "dog", more=("--prefix", "a photo of "))
    assert compute(script, tmp_path, "--add", "cat").code == 0
    expected = Clip(CLIP).encode_texts(["a photo of cat"])[0]
    assert np.allclose(np.load(tmp_path / "c.npy")[1], expected, atol=1e-6)
    run = compute(script, tmp_path, "--add", "cow", "--prefix", "this is ")
    assert run.code == 2 and '"a photo of "' in run.err


def test_a_cache_without_a_description_is_changed_only_where_its_rows_are_this_clips(
        script, tmp_path):
    entries_cache(script, tmp_path, "dog", "cat")
    (tmp_path / "c.npy.json").unlink()
    assert compute(script, tmp_path, "--add", "cow").code == 0
    np.save(tmp_path / "c.npy", np.load(tmp_path / "c.npy")[::-1])
    (tmp_path / "c.npy.json").unlink()
    before = (tmp_path / "c.npy").read_bytes()
    run = compute(script, tmp_path, "--add", "cow two")
    assert run.code == 2 and "was not made with the CLIP model" in run.err
    assert before == (tmp_path / "c.npy").read_bytes()


@pytest.mark.parametrize("flags, message", [
    (("--add", "x", "--remove", "x"), "is to be added and removed"), (("--remove", "dog"), "empty"),
    (("--add", "x", "--datadir", "."), "exactly one of"),
    (("--add_from", "nowhere.txt"), "nowhere.txt"), ((), "exactly one of")])
def test_changes_that_cannot_be_made_are_refused(script, tmp_path, flags, message):
    entries_cache(script, tmp_path, "dog")
    before = contents(tmp_path)
    run = compute(script, tmp_path, *flags)
    assert run.code == 2 and message in run.err and len(run.err.splitlines()) == 1
    assert before == contents(tmp_path)


def test_there_must_be_a_cache_to_change(script, tmp_path):
    run = compute(script, tmp_path, "--add", "dog")
    assert run.code == 2 and str(tmp_path / "c.txt") in run.err


def stopped_at_100(script, world, folder, monkeypatch):
    """Makes the cache of the world in folder/whole, and begins it in folder/cut, where the run is
    stopped after two chunks of 50 entries. Returns (a list of all entries that are encoded in
    folder/cut, then and later; the path of what the run left)."""
    monkeypatch.setattr("antarctic.entries.CHUNK", 50)
    (folder / "whole").mkdir()
    (folder / "cut").mkdir()
    compute(script, folder / "whole", "--datadir", world)
    encoded, encode = [], Clip.encode_texts

    def stop_at_100(self, texts, *options):
        if len(encoded) == 100:
            encoded.append("the stop")
            raise KeyboardInterrupt
        encoded.extend(texts)
        return encode(self, texts, *options)

    monkeypatch.setattr(Clip, "encode_texts", stop_at_100)
    assert compute(script, folder / "cut", "--datadir", world).code == 130
    [part] = (folder / "cut").iterdir()
    return encoded, part


def test_a_stopped_run_goes_on_and_gives_the_bytes_of_an_uninterrupted_one(
        script, world, cache, tmp_path, monkeypatch):
    encoded, part = stopped_at_100(script, world, tmp_path, monkeypatch)
    with open(part, "ab") as file:
        file.write(b"half a row")  # as a kill leaves it
    assert compute(script, tmp_path / "cut", "--datadir", world).code == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(list((tmp_path / "cut").iterdir())) == 3
    entries = (tmp_path / "cut" / "c.txt").read_text().splitlines()
    assert encoded == [*entries[:100], "the stop", *entries[100:]]


def flip(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]


@pytest.mark.parametrize("damage, kept", [
    (lambda data: data + bytes(len(data)), 100), (lambda data: flip(data, len(data) // 2 + 40), 50),
    (lambda data: flip(data, -1), 50), (lambda data: flip(data, 0), 0),
    (lambda data: data[len(data) // 2:] + data[:len(data) // 2], 0),  # each chunk is whole
    (lambda data: data[:len(data) // 2] * 2, 50), (lambda data: bytes(len(data) - 32), 0)],
    ids=["zeros behind it", "a bit", "a bit of a checksum", "the first bit", "exchanged", "doubled",
         "an earlier version's"])
def test_of_a_damaged_part_only_what_is_whole_is_taken(script, world, tmp_path, monkeypatch, damage,
                                                      kept):
    encoded, part = stopped_at_100(script, world, tmp_path, monkeypatch)
    part.write_bytes(damage(part.read_bytes()))
    run = compute(script, tmp_path / "cut", "--datadir", world)
    assert run.code == 0 and f"is damaged from entry {kept + 1} on" in run.err
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    entries = (tmp_path / "cut" / "c.txt").read_text().splitlines()
    assert encoded[101:] == entries[kept:]


def test_a_part_that_is_damaged_before_the_cache_is_written_is_noticed(script, world, tmp_path,
                                                                       monkeypatch):
    import antarctic.cache_changes
    encoded, part = stopped_at_100(script, world, tmp_path, monkeypatch)
    write = antarctic.cache_changes.write_rows

    def damage_first(*arguments):
        part.write_bytes(flip(part.read_bytes(), 7))
        return write(*arguments)

    monkeypatch.setattr(antarctic.cache_changes, "write_rows", damage_first)
    run = compute(script, tmp_path / "cut", "--datadir", world)
    assert run.code == 2 and f"{part} was " in run.err
    monkeypatch.setattr(antarctic.cache_changes, "write_rows", write)
    assert compute(script, tmp_path / "cut", "--datadir", world).code == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_link_in_place_of_a_part_is_not_followed(script, world, tmp_path, monkeypatch):
    _, part = stopped_at_100(script, world, tmp_path, monkeypatch)
    own = tmp_path / "diary.txt"
    own.write_text("mine")
    part.unlink()
    part.hardlink_to(own)
    run = compute(script, tmp_path / "cut", "--datadir", world)
    assert run.code == 2 and f"{part} is a link" in run.err
    assert own.read_text() == "mine"
    part.unlink()
    part.symlink_to(own)
    assert compute(script, tmp_path / "cut", "--datadir", world).code == 0
    assert own.read_text() == "mine"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", [(), ("--add", "cow", "NaN")])
def test_a_vector_that_is_not_finite_never_enters_a_cache(script, tmp_path, monkeypatch, change):
    entries_cache(script, tmp_path, "dog", "cat")
    before, encode = contents(tmp_path), Clip.encode_texts

    def spoil(self, texts, *options):
        vectors = encode(self, texts, *options).clone()
        vectors[[text == "NaN" for text in texts]] = math.nan
        return vectors

    monkeypatch.setattr(Clip, "encode_texts", spoil)
    (tmp_path / "other.txt").write_text("red\nNaN\n")
    run = compute(script, tmp_path, *(change or ("--entries", tmp_path / "other.txt")))
    assert run.code == 2 and "the entry 'NaN' is not finite" in run.err
    assert before == contents(tmp_path)
    for part in tmp_path.glob(".*.part"):
        assert not part.read_bytes()


def test_a_change_reads_and_writes_blocks(script, tmp_path, monkeypatch):
    """Memory is that of a block, however large the cache."""
    entries_cache(script, tmp_path, *map(str, range(500)))
    rows = np.load(tmp_path / "c.npy")
    for module in ("cache", "cache_changes", "rows"):
        monkeypatch.setattr(f"antarctic.{module}.DIGEST_ROWS", 8)
    description = json.loads((tmp_path / "c.npy.json").read_text())
    del description["rows_sha256"]  # which were of larger blocks
    (tmp_path / "c.npy.json").write_text(json.dumps(description))
    read, sizes = Rows.read, []

    def record(self, begin, end):
        sizes.append(end - begin)
        return read(self, begin, end)

    monkeypatch.setattr(Rows, "read", record)
    assert compute(script, tmp_path, "--add", "penguin", "--remove", "7", "8", "301").code == 0
    assert max(sizes) <= 16 and len(sizes) > 500 / 8
    kept = [i for i in range(500) if i not in (7, 8, 301)]
    changed = np.load(tmp_path / "c.npy")
    assert np.array_equal(changed[:-1], rows[kept])
    assert (tmp_path / "c.txt").read_text().split("\n") == [*map(str, kept), "penguin", ""]


# ------------------------------------------------------------------------------ files that are read

def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("target", ["c.txt", "c.npy", "c.npy.json", "c.faiss", "c.faiss.json",
                                    ".c.txt.new"])
@pytest.mark.parametrize("way", ["name", "spelling", "link", "hard link"])
def test_no_run_replaces_what_it_reads(script, tmp_path, monkeypatch, target, way):
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    outputs = "--textfile", "c.txt", "--embfile", "c.npy", "--index", "c.faiss"
    own = tmp_path / target
    own.write_text("a dog on the grass\n" * 3)
    path = {"name": own, "spelling": f"{tmp_path}/../{tmp_path.name}/./{target}",
            "link": tmp_path / "own.txt", "hard link": tmp_path / "own.txt"}[way]
    if way == "link":
        path.symlink_to(own)
    elif way == "hard link":
        path.hardlink_to(own)
    before = snapshot(tmp_path)
    others = "--clip_model", CLIP
    for flag in ("--corpus", "--entries"):
        run = script("compute_cache", flag, path, *outputs, *others)
        assert run.code == 2 and run.err.startswith(f"error: {flag} {path} would be replaced by ")
        assert len(run.err.splitlines()) == 1
        assert before == snapshot(tmp_path)
    run = script("compute_cache", "--corpus", __file__, path, *outputs, *others)
    assert run.code == 2 and f"--corpus {path}" in run.err
    for flag in (("--add_from", path), ("--add", "cow", "--queries", path)):
        run = script("compute_cache", *flag, *outputs, *others)
        assert run.code == 2 and f"{flag[-2]} {path} would be" in run.err
    assert before == snapshot(tmp_path)


def test_outputs_are_files_of_their_own_also_by_links(script, tmp_path):
    (tmp_path / "c.txt").write_text("dog\n")
    (tmp_path / "c.npy").hardlink_to(tmp_path / "c.txt")
    (tmp_path / "in.txt").write_text("dog\n")
    run = compute(script, tmp_path, "--entries", tmp_path / "in.txt")
    assert run.code == 2 and "must be files of their own" in run.err


def test_the_check_reads_a_cache_and_writes_nothing(script, tmp_path, monkeypatch):
    entries_cache(script, tmp_path, "dog", "cat")
    monkeypatch.setattr("model.Clip", None)
    (tmp_path / "c.npy").rename(tmp_path / ".c.npy.new")  # as a kill leaves it
    (tmp_path / "c.npy.json").rename(tmp_path / ".c.npy.json.new")
    before = snapshot(tmp_path)
    run = compute(script, tmp_path, "--check")
    assert run.code == 0 and "2 rows: each is what was written" in run.out
    (tmp_path / ".c.npy.new").write_bytes(flip(before[".c.npy.new"], 200))
    run = compute(script, tmp_path, "--check")
    assert run.code == 2 and "damaged: rows 1 ('dog') to 2 ('cat') are not" in run.err
    assert len(run.err.splitlines()) == 1 and not run.out
    (tmp_path / ".c.npy.new").write_bytes(before[".c.npy.new"])
    for flags in (("--add", "x"), ("--index", tmp_path / "i"), ("--entries", __file__)):
        assert compute(script, tmp_path, "--check", *flags).code == 2
    assert before == snapshot(tmp_path)


# ------------------------------------------------------------------------------------ old spellings

@pytest.mark.parametrize("old, new", [
    (["--bf16"], ["--dtype", "bfloat16"]),
    (["--dtype", "float16"], ["--emb_dtype", "float16"]),
])
def test_an_old_spelling_works_and_warns_once(script, tmp_path, old, new):
    (tmp_path / "list.txt").write_text("a dog\nred\nGeoff Hinton\n")
    results = []
    for name, flags in (("old", old), ("new", new), ("none", [])):
        folder = tmp_path / name
        folder.mkdir()
        run = compute(script, folder, "--entries", tmp_path / "list.txt", *flags)
        assert run.code == 0, run.err
        warnings = [line for line in run.err.splitlines() if line.startswith("warning")]
        expected = (f"warning: {' '.join(old)} is now {' '.join(new)}; "
                    "the next release drops the old spelling")
        assert warnings == [expected] * (flags == old)
        results.append(contents(folder))
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("old", [
    ["--bf16", "--dtype", "float16"], ["--dtype", "float16", "--bf16"]])
def test_both_old_spellings_go_together(script, tmp_path, old):
    new = ["--dtype", "bfloat16", "--emb_dtype", "float16"]
    for name, flags in (("old", old), ("new", new)):
        folder = tmp_path / name
        folder.mkdir()
        entries_cache(script, folder, "a dog", "red", more=flags)
    assert contents(tmp_path / "old") == contents(tmp_path / "new")


def test_numbers_on_disk_and_arithmetic_are_two_things(script, tmp_path):
    rows = {}
    for flags in ((), ("--emb_dtype", "float16"), ("--dtype", "bfloat16"), ("--dtype", "auto")):
        folder = tmp_path / "-".join(("c", *flags))
        folder.mkdir()
        entries_cache(script, folder, "a dog", "Geoff Hinton", more=(*flags, "--device", "cpu"))
        rows[flags[1:]] = np.load(folder / "c.npy")
    exact = rows[()]
    assert [r.dtype for r in rows.values()] == [np.float32, np.float16, np.float32, np.float32]
    assert np.abs(rows["float16",] - exact).max() < 1e-3
    assert (rows["auto",] == exact).all() and (rows["bfloat16",] != exact).any()
    assert ((rows["bfloat16",] * exact).sum(1) > 0.99).all()
