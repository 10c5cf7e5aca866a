"""Mining against nltk's counts and definitions; the cache is the same to the byte each time."""

import json
import math
from collections import Counter

import nltk
import numpy as np
import pytest
import torch

from compute_cache import mine
from conftest import CLIP
from model import Clip

CAPTIONS = ["A dog on the grass.", "the dog, the cat", "A DOG on a mat", "hot dog on the grill", "a hot dog on bread", "hot dog"]


def compute(script, folder, *source):
    return script("compute_cache", *source, "--textfile", folder / "c.txt", "--embfile", folder / "c.npy", "--clip_model", CLIP)


def test_unigrams_come_by_count_and_ties_by_text():
    unigrams = [e for e in mine(CAPTIONS, 100, 3) if " " not in e]
    counts = Counter(t for c in CAPTIONS for t in nltk.wordpunct_tokenize(c.lower()) if t.isalnum())
    assert unigrams == sorted(counts, key=lambda w: (-counts[w], w))
    assert unigrams[:4] == ["dog", "a", "on", "the"]


def test_bigrams_equal_nltks_pmi_within_captions():
    bigrams = [e for e in mine(CAPTIONS * 3, 100, 3) if " " in e]
    documents = [[t for t in nltk.wordpunct_tokenize(c.lower()) if t.isalnum()] for c in CAPTIONS * 3]
    unigram, pairs = Counter(t for d in documents for t in d), Counter(p for d in documents for p in zip(d, d[1:]))
    finder = nltk.BigramCollocationFinder(nltk.FreqDist(unigram), nltk.FreqDist(pairs))
    finder.apply_freq_filter(3)
    measured = dict(finder.score_ngrams(nltk.BigramAssocMeasures.pmi))
    assert set(bigrams) == {" ".join(p) for p in measured}
    scores = [measured[tuple(b.split())] for b in bigrams]
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
    assert (tmp_path / "c.txt").read_bytes() == open(cache.textfile, "rb").read()
    assert (tmp_path / "c.npy").read_bytes() == open(cache.embfile, "rb").read()


def test_row_i_is_the_embedding_of_line_i(cache):
    lines, rows = open(cache.textfile, encoding="utf-8").read().splitlines(), np.load(cache.embfile)
    picked = [0, 7, len(lines) // 2, len(lines) - 1]
    alone = torch.cat([Clip(CLIP).encode_texts([lines[i]]) for i in picked])
    np.testing.assert_allclose(rows[picked], alone.numpy(), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("flags, entries", [(["--entries"], ["penguin", "Geoff Hinton"]), (["--topk", "2", "--corpus"], ["geoff", "hinton"])])
def test_other_sources_of_entries(script, tmp_path, flags, entries):
    (tmp_path / "in.txt").write_text("penguin\n\nGeoff  Hinton\npenguin\n" if flags == ["--entries"] else "hinton geoff\ngeoff hinton\n")
    run = compute(script, tmp_path, *flags, tmp_path / "in.txt")
    assert run.code == 0, run.err
    assert (tmp_path / "c.txt").read_text().splitlines() == entries
    assert json.loads((tmp_path / "c.npy.json").read_text())["entries"] == 2


def test_the_prefix_is_encoded_but_not_written(script, tmp_path):
    (tmp_path / "in.txt").write_text("dog\n")
    run = compute(script, tmp_path, "--entries", tmp_path / "in.txt", "--prefix", "a photo of a ")
    assert run.code == 0, run.err
    assert (tmp_path / "c.txt").read_text() == "dog\n"
    np.testing.assert_allclose(np.load(tmp_path / "c.npy"), Clip(CLIP).encode_texts(["a photo of a dog"]).numpy(), atol=2e-6)


def test_a_byte_order_mark_is_no_part_of_the_first_entry(script, tmp_path):
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbfpenguin\r\nwhale\r\n")
    run = compute(script, tmp_path, "--entries", tmp_path / "in.txt")
    assert run.code == 0, run.err
    assert (tmp_path / "c.txt").read_bytes() == b"penguin\nwhale\n"
