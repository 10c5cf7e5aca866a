"""The results of the sampler, in every form, and what must not change them."""

import json

import pytest

from conftest import BART, CLIP
from model import Clip
from utils import read_coco, read_image


def sample(script, cache, savedir, *more, textfiles=(), embfiles=()):
    run = script("sampler", "--textfile", cache.textfile, *textfiles, "--embfile", cache.embfile, *embfiles, "--savedir", savedir,
                 "--clip_model", CLIP, "--lm", BART, *more)
    assert run.code == 0, run.err
    with open(savedir / "details.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_results_come_in_all_forms_and_agree(script, world, cache, checkpoint, tmp_path):
    records = sample(script, cache, tmp_path, "--datadir", world, "--ckpt", checkpoint)
    pictures = read_coco(world, "val2017")
    assert [r["image_id"] for r in records] == [p.id for p in pictures]
    assert json.loads((tmp_path / "captions.json").read_text()) == [{"image_id": r["image_id"], "caption": r["caption"]} for r in records]
    assert (tmp_path / "preds.txt").read_text().splitlines() == [r["caption"] for r in records]
    for i in range(5):
        assert (tmp_path / f"ref{i}.txt").read_text().splitlines() == [p.captions[i] for p in pictures]
    page = (tmp_path / "gallery.html").read_text()
    assert page.count('<div class="card">') == len(records)


def test_the_evidence_is_the_truth(script, world, cache, checkpoint, tmp_path):
    """Entries and candidates carry CLIP's own cosines, best first, and the best candidate is the caption."""
    records, clip = sample(script, cache, tmp_path, "--datadir", world, "--ckpt", checkpoint), Clip(CLIP)
    lines = open(cache.textfile, encoding="utf-8").read().splitlines()
    for record in records[:3]:
        image = clip.encode_images([read_image(record["file"])])[0]
        everything = clip.encode_texts(lines) @ image
        entries, scores = zip(*record["table"])
        assert len(entries) == 24 and list(scores) == sorted(scores, reverse=True)
        assert list(scores) == pytest.approx(everything.topk(24).values.tolist(), abs=1e-4)
        texts, cosines, _ = zip(*record["candidates"])
        assert list(cosines) == sorted(cosines, reverse=True) and len(set(texts)) == len(texts)
        assert list(cosines) == pytest.approx((clip.encode_texts(texts) @ image).tolist(), abs=1e-4)
        assert record["caption"] == texts[0] and record["score"] == cosines[0]


def test_samples_of_an_image_do_not_depend_on_its_batch_or_neighbours(script, world, cache, checkpoint, tmp_path):
    how = ("--ckpt", checkpoint, "--do_sample", "--num_return_sequences", "8", "--top_p", "0.9")
    paths = [str(p.path) for p in read_coco(world, "val2017")[:4]]
    together = sample(script, cache, tmp_path / "a", "--images", *paths, *how)
    small = sample(script, cache, tmp_path / "b", "--images", *paths, "--batch_size", "1", *how)
    alone = sample(script, cache, tmp_path / "c", "--images", paths[2], *how)
    assert [r["caption"] for r in together] == [r["caption"] for r in small]
    assert together[2]["caption"] == alone[0]["caption"]
    assert [c[0] for c in together[2]["candidates"]] == [c[0] for c in alone[0]["candidates"]]


def test_images_need_no_captions_and_are_named_by_their_path(script, world, cache, checkpoint, tmp_path):
    folder = world / "near"
    records = sample(script, cache, tmp_path, "--images", folder, "--ckpt", checkpoint)
    assert [r["image_id"] for r in records] == sorted(str(p) for p in folder.glob("*.png"))
    assert not list(tmp_path.glob("ref*.txt"))


def test_without_a_checkpoint_the_model_writes_as_pretrained(script, world, cache, tmp_path):
    records = sample(script, cache, tmp_path, "--datadir", world, "--topk", "6")
    assert all(len(r["table"]) == 6 for r in records)


def test_a_word_beside_the_cache_is_offered_where_it_fits(script, world, cache, checkpoint, tmp_path):
    """The promise: a line of text makes a thing nameable, with no training; the rest of the table stays in order."""
    (tmp_path / "words.txt").write_text("penguin\n")
    made = script("compute_cache", "--entries", tmp_path / "words.txt", "--textfile", tmp_path / "w.txt", "--embfile", tmp_path / "w.npy",
                  "--clip_model", CLIP)
    assert made.code == 0, made.err
    before = sample(script, cache, tmp_path / "a", "--datadir", world, "--split", "out", "--ckpt", checkpoint)
    after = sample(script, cache, tmp_path / "b", "--datadir", world, "--split", "out", "--ckpt", checkpoint,
                   textfiles=[tmp_path / "w.txt"], embfiles=[tmp_path / "w.npy"])
    described = json.loads((world / "annotations" / "scenes_out.json").read_text())
    for scene, b, a in zip(described, before, after):
        offered = [entry for entry, _ in a["table"]]
        assert ("penguin" in offered) or scene["groups"][0][0] != "penguin"
        rest = [entry for entry in offered if entry != "penguin"]
        assert rest == [entry for entry, _ in b["table"]][:len(rest)]
