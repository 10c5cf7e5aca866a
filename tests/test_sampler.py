"""The sampler's results in every form, and that batches and stopped runs do not change them."""

import csv
import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import BART, CLIP
from safetensors import safe_open
from safetensors.torch import save_file

from antarctic.datasets import read_coco
from antarctic.errors import InputError
from antarctic.folders import Picture
from antarctic.images import read_image
from antarctic.results import write_results
from antarctic.sealed import seal
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
    assert page.count('<div class="card">') == len(records)


def test_the_evidence_is_the_truth(script, world, cache, checkpoint, tmp_path):
    """Entries and candidates have CLIP's own cosines, best first. The best candidate is the
    caption."""
    records = sample(script, cache, tmp_path, "--datadir", world, "--ckpt", checkpoint)
    clip, lines = Clip(CLIP), cache.textfile.read_text(encoding="utf-8").splitlines()
    for record in records[:3]:
        image = clip.encode_images([read_image(record["file"])])[0]
        exact = clip.encode_texts(lines) @ image
        entries, scores = zip(*record["table"])
        assert len(entries) == 24 and list(scores) == sorted(scores, reverse=True)
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


def test_a_word_beside_the_cache_is_offered_where_it_fits(script, world, cache, checkpoint,
                                                          tmp_path):
    """A line of text adds a word without training. The rest of the table stays in order."""
    (tmp_path / "words.txt").write_text("penguin\n")
    run = script("compute_cache", "--entries", tmp_path / "words.txt",
                 "--textfile", tmp_path / "w.txt", "--embfile", tmp_path / "w.npy",
                 "--clip_model", CLIP)
    assert run.code == 0, run.err
    flags = ("--datadir", world, "--split", "out", "--ckpt", checkpoint)
    before = sample(script, cache, tmp_path / "a", *flags)
    after = sample(script, cache, tmp_path / "b", *flags, textfiles=[tmp_path / "w.txt"],
                   embfiles=[tmp_path / "w.npy"])
    all_scenes = json.loads((world / "annotations" / "scenes_out.json").read_text())
    for scene, old, new in zip(all_scenes, before, after):
        entries = [entry for entry, _ in new["table"]]
        assert "penguin" in entries or scene["groups"][0][0] != "penguin"
        rest = [entry for entry in entries if entry != "penguin"]
        assert rest == [entry for entry, _ in old["table"]][:len(rest)]


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
    monkeypatch.setattr(Captioner, "sample", lambda *_, **__: [("Dog, dog", -1.0, 100)])
    (tmp_path / "ban.txt").write_text("dog\n")
    images = sorted((world / "out").glob("*.png"))[:2]
    run = run_sampler(script, cache, tmp_path / "r", "--images", *images, "--ckpt", "none",
                      "--ban", tmp_path / "ban.txt")
    assert run.code == 0 and "an empty caption for 1 image" in run.err
    assert (tmp_path / "r" / "preds.txt").read_text() == "\na cat\n"


def test_sidecars_and_csv_hold_the_captions(script, world, cache, checkpoint, tmp_path):
    folder = shutil.copytree(world / "near", tmp_path / "photos")
    flags = ("--images", folder, "--ckpt", checkpoint, "--sidecar")
    records = sample(script, cache, tmp_path / "r", *flags, "--csv")
    for record in records:
        sidecar = Path(record["file"]).with_suffix(".txt")
        assert sidecar.read_text() == record["caption"] + "\n"
    with open(tmp_path / "r" / "captions.csv", newline="") as file:
        rows = [(row["file"], row["caption"]) for row in csv.DictReader(file)]
    assert rows == [(r["file"], r["caption"]) for r in records]
    mine = Path(records[0]["file"]).with_suffix(".txt")
    mine.write_text("written by hand")
    run = run_sampler(script, cache, tmp_path / "r", *flags)  # the same command once more
    assert run.code == 0 and f"left {mine} as it is" in run.err and run.err.count("left ") == 1
    assert mine.read_text() == "written by hand"
    run = run_sampler(script, cache, tmp_path / "r", *flags, "--overwrite")
    assert run.code == 0 and mine.read_text() == records[0]["caption"] + "\n"


def photos(world, folder, n=4):
    """A folder of n photos of the world."""
    folder.mkdir()
    for i, path in enumerate(sorted((world / "near").glob("*.png"))[:n]):
        shutil.copy(path, folder / f"{i}.png")
    return folder


def test_a_text_that_another_run_or_a_person_wrote_stays(script, world, cache, checkpoint, tmp_path,
                                                        monkeypatch):
    folder = photos(world, tmp_path / "photos")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "details-0.jsonl.part").touch()  # of another run that was stopped
    (folder / "0.txt").write_text("by hand")
    typed = iter(["", "", "typed meanwhile", "", ""])

    def slow_rescore(*how):
        if text := next(typed):
            (folder / "2.txt").write_text(text)
        return rescore(*how)
    monkeypatch.setattr("model.rescore", slow_rescore)
    run = run_sampler(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                      "--sidecar", "--batch_size", "1")
    assert run.code == 0, run.err
    texts = [(folder / f"{i}.txt").read_text() for i in range(4)]
    captions = (tmp_path / "r" / "preds.txt").read_text().splitlines(keepends=True)
    assert texts == ["by hand", captions[1], "typed meanwhile", captions[3]]
    assert run.err.count("as it is: it exists") == 2


def test_a_stop_keeps_the_sidecars_that_are_written(script, world, cache, checkpoint, tmp_path,
                                                   monkeypatch):
    folder = photos(world, tmp_path / "photos")
    calls = []

    def stops(*how):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rescore(*how)
    monkeypatch.setattr("model.rescore", stops)
    command = ("--images", folder, "--ckpt", checkpoint, "--sidecar", "--batch_size", "1")
    assert run_sampler(script, cache, tmp_path / "r", *command).code == 130
    assert sorted(path.name for path in folder.glob("*.txt")) == ["0.txt", "1.txt"]
    assert run_sampler(script, cache, tmp_path / "r", *command).code == 0 and len(calls) == 5
    assert len(list(folder.glob("*.txt"))) == 4


def test_a_folder_that_is_read_only_costs_the_sidecars_alone(script, world, cache, checkpoint,
                                                            tmp_path, monkeypatch):
    folder = photos(world, tmp_path / "photos")

    def refused(path, text):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    monkeypatch.setattr("antarctic.results.create", refused)
    run = run_sampler(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                      "--sidecar")
    assert run.code == 0 and run.err.count("as it is: Permission denied") == 4
    assert len((tmp_path / "r" / "preds.txt").read_text().splitlines()) == 4


def test_no_image_becomes_a_caption(script, world, cache, checkpoint, tmp_path):
    folder = photos(world, tmp_path / "photos", 2)
    shutil.copy(folder / "0.png", folder / "x.txt")  # a PNG by content
    flags = ("--images", folder / "x.txt", folder / "0.png", "--ckpt", checkpoint, "--sidecar")
    run = run_sampler(script, cache, tmp_path / "r", *flags)
    assert run.code == 2 and "same --sidecar" in run.err
    assert (folder / "x.txt").read_bytes() == (folder / "0.png").read_bytes()
    (folder / "x.txt").unlink()
    shutil.copy(folder / "0.png", folder / "0.jpeg")
    run = run_sampler(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                      "--sidecar")
    assert run.code == 2 and "0.jpeg" in run.err and "0.png" in run.err
    (folder / "0.jpeg").unlink()
    for _ in range(2):  # the second time the shell names the texts, too
        run = run_sampler(script, cache, tmp_path / "r", "--images", *sorted(folder.iterdir()),
                          "--ckpt", checkpoint, "--sidecar")
        assert run.code == 0 and len(list(folder.glob("*.txt"))) == 2, run.err


def test_a_name_as_long_as_can_be_has_a_sidecar(script, world, cache, checkpoint, tmp_path):
    folder = photos(world, tmp_path / "photos", 1)
    path = (folder / "0.png").rename(folder / ("x" * 251 + ".png"))
    run = run_sampler(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                      "--sidecar")
    assert run.code == 0 and path.with_suffix(".txt").is_file(), run.err
    run = run_sampler(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                      "--sidecar", "--overwrite", "--do_sample", "--top_p", "0.5")
    assert run.code == 0 and len(list(folder.iterdir())) == 2, run.err


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


def test_records_that_another_program_changed_are_never_taken_for_all(tmp_path):
    pictures = [Picture(i, tmp_path / f"{i}.png") for i in range(3)]
    record = {"file": "1.png", "caption": "a dog", "score": 0.3, "table": [("dog", 0.3)],
              "candidates": []}
    part = tmp_path / "details-1.jsonl.part"
    part.write_bytes(b"".join(seal({"image_id": i} | record) for i in range(2)) + b"damaged\n")
    with pytest.raises(InputError, match="2 of its 3 records are whole"):
        write_results(tmp_path, part, pictures)
    assert sorted(tmp_path.iterdir()) == [part]


def test_a_list_of_paths_is_captioned_as_the_paths(script, world, cache, checkpoint, tmp_path):
    paths = sorted((world / "near").glob("*.png"))[:3]
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    by_path = sample(script, cache, tmp_path / "a", "--ckpt", checkpoint, "--images", *paths)
    assert by_path == sample(script, cache, tmp_path / "b", "--ckpt", checkpoint, "--images_from",
                             tmp_path / "list.txt")
    run = run_sampler(script, cache, tmp_path / "c", "--ckpt", checkpoint, "--images", *paths,
                      "--images_from", tmp_path / "list.txt")
    assert run.code == 2 and "exactly one of" in run.err


def test_images_that_would_share_a_sidecar_are_refused_before_they_are_encoded(
        script, world, cache, checkpoint, tmp_path, monkeypatch):
    folder = photos(world, tmp_path / "photos", 2)
    shutil.copy(folder / "0.png", folder / "0.jpg")
    monkeypatch.setattr("antarctic.features.encode_files", None)
    run = run_sampler(script, cache, tmp_path / "r", "--images", folder, "--ckpt", checkpoint,
                      "--sidecar")
    assert run.code == 2 and "same --sidecar" in run.err


def test_what_an_older_reader_refused_is_tried_again(script, world, cache, checkpoint, tmp_path):
    folder = photos(world, tmp_path / "photos", 2)
    good = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(b"refused" + bytes(len(good) - 7))
    flags = ("--images", folder, "--ckpt", checkpoint)
    assert "skipped" in run_sampler(script, cache, tmp_path / "r", *flags).err
    [path] = (tmp_path / "r").glob("features-*.safetensors")
    times = (folder / "1.png").stat()
    (folder / "1.png").write_bytes(good)
    os.utime(folder / "1.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "skipped" in run_sampler(script, cache, tmp_path / "r", *flags).err  # as it was
    with safe_open(path, "pt") as file:
        features, metadata = file.get_tensor("features"), file.metadata()
    reasons = json.loads(metadata["bad"])
    del reasons["reader"]  # as earlier versions wrote it
    save_file({"features": features}, path, {"bad": json.dumps(reasons)})
    assert "skipped" not in run_sampler(script, cache, tmp_path / "r", *flags).err
