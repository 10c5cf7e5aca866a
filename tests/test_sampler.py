"""The sampler's results in every form, and that batches and stopped runs do not change them."""

import json
import re
import shutil

import pytest
from conftest import BART, CLIP

from antarctic.datasets import read_coco
from antarctic.images import read_image
from model import Captioner, Clip, rescore
from snowglobe import scenes


def run_sampler(script, cache, savedir, *flags, textfiles=(), embfiles=()):
    """Runs the sampler with this cache, and with those of textfiles and embfiles after it."""
    return script("sampler", "--textfile", cache.textfile, *textfiles, "--embfile", cache.embfile,
                  *embfiles, "--savedir", savedir, "--clip_model", CLIP, "--lm", BART, *flags)


def sample(script, cache, savedir, *flags, **caches):
    """The records of details.jsonl that run_sampler writes."""
    run = run_sampler(script, cache, savedir, *flags, **caches)
    assert run.code == 0, run.err
    with open(savedir / "details.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_results_come_in_all_forms_and_agree(script, world, cache, checkpoint, tmp_path):
    records = sample(script, cache, tmp_path, "--datadir", world, "--ckpt", checkpoint)
    pictures = read_coco(world, "val2017")
    assert [r["image_id"] for r in records] == [p.id for p in pictures]
    assert json.loads((tmp_path / "captions.json").read_text()) == [
        {"image_id": r["image_id"], "caption": r["caption"]} for r in records]
    assert (tmp_path / "preds.txt").read_text().splitlines() == [r["caption"] for r in records]
    for i in range(5):
        references = (tmp_path / f"ref{i}.txt").read_text().splitlines()
        assert references == [p.captions[i] for p in pictures]
    page = (tmp_path / "gallery.html").read_text()
    assert page.count('<div class="card"') == len(records)


@pytest.mark.parametrize("table", ["topk", "mmr"])
def test_the_evidence_is_the_truth(script, world, cache, checkpoint, tmp_path, table):
    """Entries and candidates have CLIP's own cosines, candidates best first. The best candidate is
    the caption. A table begins with the nearest entry, and by topk it goes on with the next."""
    records = sample(script, cache, tmp_path, "--datadir", world, "--ckpt", checkpoint, "--table",
                     table)
    clip, lines = Clip(CLIP), cache.textfile.read_text(encoding="utf-8").splitlines()
    for record in records[:3]:
        image = clip.encode_images([read_image(record["file"])])[0]
        exact = clip.encode_texts(lines) @ image
        entries, scores = zip(*record["table"])
        assert len(set(entries)) == 24 and scores[0] == max(scores)
        places = [lines.index(entry) for entry in entries]
        assert list(scores) == pytest.approx(exact[places].tolist(), abs=1e-4)
        if table == "topk":
            assert list(scores) == pytest.approx(exact.topk(24).values.tolist(), abs=1e-4)
        texts, cosines, _ = zip(*record["candidates"])
        assert list(cosines) == sorted(cosines, reverse=True) and len(set(texts)) == len(texts)
        assert list(cosines) == pytest.approx((clip.encode_texts(texts) @ image).tolist(), abs=1e-4)
        assert record["caption"] == texts[0] and record["score"] == cosines[0]


def test_samples_of_an_image_do_not_depend_on_its_batch_or_neighbours(script, world, cache,
                                                                      checkpoint, tmp_path):
    flags = ("--ckpt", checkpoint, "--do_sample", "--num_return_sequences", "8", "--top_p", "0.9")
    paths = [str(p.path) for p in read_coco(world, "val2017")[:4]]
    together = sample(script, cache, tmp_path / "a", "--images", *paths, *flags)
    single = sample(script, cache, tmp_path / "b", "--images", *paths, "--batch_size", "1", *flags)
    alone = sample(script, cache, tmp_path / "c", "--images", paths[2], *flags)
    assert [r["caption"] for r in together] == [r["caption"] for r in single]
    assert together[2]["caption"] == alone[0]["caption"]
    assert [c[0] for c in together[2]["candidates"]] == [c[0] for c in alone[0]["candidates"]]


def test_images_need_no_captions_and_are_named_by_their_path(script, world, cache, checkpoint,
                                                             tmp_path):
    folder = world / "near"
    records = sample(script, cache, tmp_path, "--images", folder, "--ckpt", checkpoint)
    assert [r["image_id"] for r in records] == sorted(str(p) for p in folder.glob("*.png"))
    assert not list(tmp_path.glob("ref*.txt"))


def test_without_a_checkpoint_the_model_writes_as_pretrained(script, world, cache, tmp_path):
    records = sample(script, cache, tmp_path, "--datadir", world, "--ckpt", "none", "--topk", "6")
    assert all(len(r["table"]) == 6 for r in records)


@pytest.mark.parametrize("table", ["topk", "mmr"])
def test_a_word_beside_the_cache_is_offered_where_it_fits(script, world, cache, checkpoint,
                                                          tmp_path, table):
    """A line of text adds a word without training. By topk, the rest of the table stays in
    order."""
    (tmp_path / "words.txt").write_text("penguin\n")
    run = script("compute_cache", "--entries", tmp_path / "words.txt",
                 "--textfile", tmp_path / "w.txt", "--embfile", tmp_path / "w.npy",
                 "--clip_model", CLIP)
    assert run.code == 0, run.err
    flags = ("--datadir", world, "--split", "out", "--ckpt", checkpoint, "--table", table)
    before = sample(script, cache, tmp_path / "a", *flags)
    after = sample(script, cache, tmp_path / "b", *flags, textfiles=[tmp_path / "w.txt"],
                   embfiles=[tmp_path / "w.npy"])
    all_scenes = json.loads((world / "annotations" / "scenes_out.json").read_text())
    for scene, old, new in zip(all_scenes, before, after):
        entries = [entry for entry, _ in new["table"]]
        assert "penguin" in entries or scene["groups"][0][0] != "penguin"
        rest = [entry for entry in entries if entry != "penguin"]
        assert table == "mmr" or rest == [entry for entry, _ in old["table"]][:len(rest)]


def test_only_and_ban_keep_words_out_of_tables_and_captions(script, world, cache, checkpoint,
                                                            tmp_path):
    flags = ("--datadir", world, "--ckpt", checkpoint)
    plain = sample(script, cache, tmp_path / "a", *flags)
    word = next(w for w in plain[0]["caption"].split() if w not in scenes.FUNCTION_WORDS)
    (tmp_path / "ban.txt").write_text(f"{word.upper()}\n")
    for record in sample(script, cache, tmp_path / "b", *flags, "--ban", tmp_path / "ban.txt"):
        texts = [entry for entry, _ in record["table"]]
        texts += [candidate for candidate, _, _ in record["candidates"]]
        assert all(word not in re.findall(r"\w+", text.lower()) for text in texts)
    entries = [entry for entry, _ in plain[0]["table"]][:5]
    (tmp_path / "only.txt").write_text("\n".join(entries))
    for record in sample(script, cache, tmp_path / "c", *flags, "--only", tmp_path / "only.txt"):
        assert {entry for entry, _ in record["table"]} == set(entries)


def test_where_every_caption_is_banned_it_is_empty_and_counted(script, world, cache, tmp_path,
                                                               monkeypatch):
    candidates = [[("a dog", -1.0)], [("a dog", -1.0), ("a cat", -2.0)]]
    monkeypatch.setattr(Captioner, "beam", lambda *_: candidates)
    monkeypatch.setattr(Captioner, "sample", lambda *_, **__: [[("Dog, dog", -1.0, 100)]])
    (tmp_path / "ban.txt").write_text("dog\n")
    images = sorted((world / "out").glob("*.png"))[:2]
    run = run_sampler(script, cache, tmp_path / "r", "--images", *images, "--ckpt", "none",
                      "--ban", tmp_path / "ban.txt")
    assert run.code == 0 and "an empty caption for 1 image" in run.err
    assert (tmp_path / "r" / "preds.txt").read_text() == "\na cat\n"


def photos(world, folder, n=4):
    """A folder of n photos of the world."""
    folder.mkdir()
    for i, path in enumerate(sorted((world / "near").glob("*.png"))[:n]):
        shutil.copy(path, folder / f"{i}.png")
    return folder


def test_a_stopped_run_of_other_settings_is_not_gone_on_with(script, world, cache, checkpoint,
                                                             tmp_path, monkeypatch):
    flags = ("--datadir", world, "--ckpt", checkpoint, "--batch_size", "3")
    calls = []

    def rescore_or_fail(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise IndexError
        return rescore(*arguments)

    monkeypatch.setattr("model.rescore", rescore_or_fail)
    with pytest.raises(IndexError):
        run_sampler(script, cache, tmp_path, *flags)
    monkeypatch.setattr("model.rescore", rescore)
    records = sample(script, cache, tmp_path, *flags, "--topk", "6")
    assert all(len(r["table"]) == 6 for r in records) and not list(tmp_path.glob("*.part"))


def test_the_weight_of_the_likelihood_moves_the_choice(script, world, cache, checkpoint, tmp_path):
    flags = ("--datadir", world, "--ckpt", checkpoint)
    for weight in (0, 0.5, 1e6):
        for record in sample(script, cache, tmp_path / str(weight), *flags, "--lm_weight", weight):
            scores = [cosine + weight * likelihood
                      for _, cosine, likelihood in record["candidates"]]
            assert scores == sorted(scores, reverse=True)
            caption, cosine, _ = record["candidates"][0]
            assert (record["caption"], record["score"]) == (caption, cosine)


def test_a_list_of_paths_is_captioned_as_the_paths(script, world, cache, checkpoint, tmp_path):
    paths = sorted((world / "near").glob("*.png"))[:3]
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    by_path = sample(script, cache, tmp_path / "a", "--ckpt", checkpoint, "--images", *paths)
    assert by_path == sample(script, cache, tmp_path / "b", "--ckpt", checkpoint, "--images_from",
                             tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("\n".join(map(str, [tmp_path / "gone.png", *paths])))
    run = run_sampler(script, cache, tmp_path / "b", "--ckpt", checkpoint, "--images_from",
                      tmp_path / "list.txt")
    assert run.code == 0 and f"skipped {tmp_path / 'gone.png'}: No such file" in run.err
    assert "captioned 3 images" in run.out
    run = run_sampler(script, cache, tmp_path / "c", "--ckpt", checkpoint, "--images", *paths,
                      "--images_from", tmp_path / "list.txt")
    assert run.code == 2 and "exactly one of" in run.err
