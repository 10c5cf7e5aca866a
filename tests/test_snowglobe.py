"""The miniature world: drawings and captions agree; scores have known values."""

import json
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, commands
from PIL import ImageChops

from antarctic.datasets import read_coco
from antarctic.evidence import content
from model import Captioner, Clip
from snowglobe import build, choices, dials, faults, measure, redundancy, scenes
from snowglobe.kinds import KINDS

SPLITS = scenes.SPLITS


def some_scenes(split, n):
    return [scenes.split_scene(split, 7, i) for i in range(n)]


@pytest.mark.parametrize("split", SPLITS)
def test_every_caption_is_true_of_its_scene(split):
    for scene, texts in some_scenes(split, 400):
        assert len(set(texts)) == 5
        for text in texts:
            assert scenes.claims(text) <= scenes.truths(scene), (text, scene.groups)
            assert scenes.named(text) <= {g[0] for g in scene.groups} and scenes.named(text)


@pytest.mark.parametrize("wrong", ["a red dog", "two dogs", "a dog in the snow",
                                   "a dog under a cat", "a tiny dog", "three green cats"])
def test_a_false_caption_is_found_out(wrong):
    scene = scenes.Scene("beach", (("dog", "blue", 1), ("cat", "red", 1)), "next to", "", (), 0)
    assert not scenes.claims(wrong) <= scenes.truths(scene)
    assert scenes.claims("a blue dog next to a red cat on the beach") <= scenes.truths(scene)


def test_a_thing_changes_the_picture_within_its_box_and_nowhere_else():
    for scene, _ in some_scenes("val2017", 40):
        whole = scenes.draw_scene(scene)
        for i, thing in enumerate(scene.things):
            others = scene.things[:i] + scene.things[i + 1:]
            without = scenes.draw_scene(scene._replace(things=others))
            box = ImageChops.difference(whole, without).getbbox()
            assert box, "an object of the scene must be visible"
            left = (thing.x - thing.size / 2) * scenes.SIZE
            top = (thing.y - thing.size) * scenes.SIZE
            side = thing.size * scenes.SIZE
            assert left - 3 <= box[0] and box[2] <= left + side + 3
            assert top - 3 <= box[1] and box[3] <= top + side + 3


def test_relations_are_drawn_as_they_are_told():
    seen = set()
    for scene, _ in some_scenes("val2017", 600):
        if not scene.relation:
            continue
        seen.add(scene.relation)
        a, b = ([t for t in scene.things if (t.kind, t.colour) == g[:2]] for g in scene.groups[:2])
        middle = [sum(t.y - t.size / 2 for t in things) / len(things) for things in (a, b)]
        if scene.relation in ("above", "on"):
            assert middle[0] < middle[1]
        elif scene.relation == "under":
            assert middle[0] > middle[1]
        elif scene.relation == "in front of":
            assert scene.things.index(a[0]) > scene.things.index(b[0])  # drawn later
    assert seen == {"above", "on", "under", "in front of", "next to"}


def test_counts_colours_and_settings_are_drawn_as_they_are_written_down():
    for scene, _ in some_scenes("near", 200):
        drawn = {}
        for thing in scene.things:
            drawn[thing.kind, thing.colour] = drawn.get((thing.kind, thing.colour), 0) + 1
        assert drawn == {(kind, colour): n for kind, colour, n in scene.groups}
        assert 1 <= len(scene.things) <= 4


def test_held_out_kinds_stand_where_they_should_and_nowhere_else():
    new = set(scenes.HELD_OUT)
    for split in SPLITS:
        for scene, texts in some_scenes(split, 300):
            kinds = {g[0] for g in scene.groups}
            if split in ("train2017", "val2017"):
                assert not kinds & new and not any(scenes.named(text) & new for text in texts)
            elif split == "near":
                assert len(kinds & new) == 1 and kinds - new
            else:
                assert kinds <= new


def test_the_world_is_large_enough():
    assert len(KINDS) - len(scenes.HELD_OUT) >= 40
    assert len(scenes.COLOURS) == 10 and len(scenes.SETTINGS) == 8


def test_the_same_seed_writes_the_same_world(world, script, tmp_path):
    run = script("snowglobe.scenes", "--datadir", tmp_path, "--train", "48", "--val", "8")
    assert run.code == 0, run.err
    for path in sorted(p for p in world.rglob("*") if p.suffix in (".png", ".json")):
        assert (tmp_path / path.relative_to(world)).read_bytes() == path.read_bytes()


def test_annotations_are_laid_out_as_cocos(world):
    data = json.loads((world / "annotations" / "captions_val2017.json").read_text())
    assert set(data) == {"info", "licenses", "images", "annotations"}
    assert {"id", "file_name", "width", "height", "license"} == set(data["images"][0])
    assert {"id", "image_id", "caption"} == set(data["annotations"][0])
    assert len(data["annotations"]) == 5 * len(data["images"])
    assert len({a["id"] for a in data["annotations"]}) == len(data["annotations"])
    assert all((world / "val2017" / image["file_name"]).is_file() for image in data["images"])


def test_objects_count_synonyms_and_plurals():
    described = [{"groups": [["dog", "red", 2], ["penguin", "", 1]]},
                 {"groups": [["ice cream", "", 1]]}]
    recall, precision, held_out = measure.objects(["two puppies near a cat", "some Ice Creams"],
                                                  described)
    assert (recall, precision, held_out) == (2 / 3, 2 / 3, 0)


def test_a_copy_of_a_reference_scores_best_and_nonsense_zero():
    rng = random.Random(0)
    references = [scenes.captions(scenes.make_scene(rng, list(KINDS)), rng) for _ in range(30)]
    perfect, bleu = measure.coco_scores([texts[0] for texts in references], references)
    one, _ = measure.reference_score(references)
    assert bleu == pytest.approx(1) and perfect > 1.5 * one > 0
    assert measure.coco_scores(["xyzzy"] * 30, references)[0] == 0


def test_scores_equal_published_ones():
    """BLEU-4 by hand, for two captions of which one equals its reference."""
    captions = ["a cat sits on the mat today", "a dog runs"]
    references = [["a cat sits on the mat today"], ["the dog runs fast"]]
    _, bleu = measure.coco_scores(captions, references)
    # n-gram matches 9/10, 7/8, 5/6, 4/4 (the second has no 4-gram); brevity exp(1 - 11/10)
    assert bleu == pytest.approx((0.9 * 0.875 * 5 / 6 * 1)**0.25 * 2.718281828**(1 - 11 / 10),
                                 abs=1e-4)


def test_perfect_tables_hold_true_entries_and_random_ones_any():
    words = {word for _, texts in some_scenes("val2017", 60) for text in texts
             for word in text.split()}
    entries, rng = sorted(words | {"red dog", "two cats"}), random.Random(0)
    for i, (scene, _) in enumerate(some_scenes("val2017", 30)):
        described = json.loads(json.dumps({"image_id": i, **scene._asdict()}))
        table = measure.perfect_table(described, entries, 8, rng)
        assert table and all(scenes.claims(entry) for entry in table)
        assert all(scenes.claims(entry) <= scenes.truths(scene) for entry in table)
        assert len(set(measure.random_table(described, entries, 8, rng))) == 8


def test_noise_keeps_to_words_of_the_text_and_lists_in_order():
    rng = random.Random(0)
    for _ in range(200):
        text = build.bart_text(rng)
        kept = [word for word in build.noised(rng, text).split() if word != "<mask>"]
        words = {word.rstrip(".") for word in text.split()}  # noise can part sentences
        assert {word.rstrip(".") for word in kept} <= words
        if "|" in text.split():
            words = iter(text.split())
            assert all(word in words for word in kept)  # a subsequence


def test_fragment_losses_fall_as_true_fragments_rise():
    truth = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # the third fragment is always false
    plain = names_kind = torch.ones(3, dtype=torch.bool)
    right = build.fragment_losses(20 * truth, truth, plain, names_kind)
    wrong = build.fragment_losses(20 * truth.flip(0), truth, plain, names_kind)
    assert all(abs(loss.item()) < 1e-3 for loss in right)
    assert all(loss.item() > 5 for loss in wrong)


@pytest.mark.slow
def test_built_models_load_as_the_real_ones_do(tmp_path):
    build.build_clip(tmp_path, minutes=1e-4, seed=0, resume=False, n_images=8, batch=8)
    build.build_bart(tmp_path, minutes=1e-4, seed=0, resume=False)
    build.build_gpt(tmp_path, minutes=1e-4, seed=0, resume=False)
    clip, captioner = Clip(str(tmp_path / "clip")), Captioner(str(tmp_path / "bart"))
    assert clip.encode_texts(["a dog", "a penguin"]).shape == (2, clip.dim)
    scene, _ = scenes.split_scene("out", 0, 0)
    assert clip.encode_images([scenes.draw_scene(scene)]).shape == (1, clip.dim)
    assert len(captioner.beam(captioner.tokenize(["a dog | "], 16))[0]) == 3
    assert (tmp_path / "gpt" / "model.safetensors").is_file()


def test_bad_folders_end_in_one_sentence(script, tmp_path):
    (tmp_path / "file").write_text("")
    for name, flag in (("snowglobe.scenes", "--datadir"), ("snowglobe.measure", "--folder")):
        run = script(name, flag, tmp_path / "file" / "folder")
        assert run.code == 2 and run.err.startswith("error: ")
        assert run.err.count("\n") == 1 and "folder" in run.err


def test_the_world_is_drawn_by_the_command_to_the_end(tmp_path):
    """The command uses a pool of processes; the other worlds of the tests do not."""
    command = [sys.executable, "-m", "snowglobe.scenes", "--datadir", tmp_path, "--train", "40",
               "--val", "5"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True)
    assert len(list((tmp_path / "train2017").glob("*.png"))) == 40


def test_runs_of_one_to_four_words_are_counted_within_a_caption():
    captions = ["A red dog, a red cat.", "a red dog"]
    assert set(choices.ngrams(captions, 6)) == {
        "a", "red", "a red", "dog", "red dog", "a red dog"}
    everything = choices.ngrams(captions, 1000)
    assert "dog a red cat" in everything and "cat a" not in everything
    assert max(len(text.split()) for text in everything) == 4


def test_a_line_of_choices_holds_means_and_half_the_spread():
    scores = {score for _, score in choices.COLUMNS.values()}
    results = [{split: dict.fromkeys(scores, value) for split in ("val2017", "near")}
               for value in (1, 2, 6)]
    assert choices.cells(results)[:2] == ["3.000 ±2.500", "3.000"]
    assert choices.cells(results[:1])[:2] == ["1.000", "1.000"]
    results[1]["val2017"]["cider"] = None  # of one training there is none
    assert choices.cells(results)[:2] == ["-", "3.000"]


def test_what_is_in_no_table_is_told_from_what_is():
    assert choices.area([1, 2, 2, 5], [True, False, True, False]) == 3.5 / 4
    assert choices.area([1, 2], [True, True]) is choices.area([], []) is None
    dog, cat = ({"groups": [[kind, 1, None]]} for kind in ("dog", "cat"))
    captions = {1: "a dog", 2: "a dog and a cat", 3: "a cat", 4: "a cat"}
    tables = {1: "dog", 2: "dogs", 3: "cat", 4: "dog"}
    records = {i: {"table": [[text, 0.3]], "score": i} for i, text in tables.items()}
    found = choices.evidence_scores(captions, records, {1: dog, 2: dog, 3: dog, 4: cat})
    assert found["wrong_said"] == 1 / 3 and found["wrong_unsaid"] == 1 / 2
    assert found["cover_area"] == 1.5 / 4 and found["score_area"] == 2 / 4


@pytest.mark.parametrize("text, counts", [  # repeated, missing, wrong object, colour, count
    ("two red dogs next to a black cat on the beach", [0, 0, 0, 0, 0]),
    ("a dog, a dog and a cat", [1, 0, 0, 0, 0]),  # one of two dogs is no wrong count
    ("a dog and a car", [0, 1, 1, 0, 0]),
    ("two blue dogs and a white cat", [0, 0, 0, 2, 0]),
    ("three dogs and two cats", [0, 0, 0, 0, 2]),
    ("", [0, 2, 0, 0, 0])])
def test_faults_are_counted_by_kind(text, counts):
    scene = {"setting": "beach", "groups": [["dog", "red", 2], ["cat", "black", 1]], "size": "",
             "relation": "next to", "things": [], "seed": 0, "image_id": 1}
    assert faults.faults(text, scene) == counts


def test_the_seconds_of_a_run_are_what_it_says(script, world, cache, checkpoint, tmp_path):
    run = script("sampler", *commands(world, cache, checkpoint)["sampler"](tmp_path))
    assert run.code == 0 and 0 < dials.seconds_each(run.out) < 600


def test_a_rule_chooses_among_the_candidates_of_a_record():
    record = {"candidates": [["a dog, a dog", .30, -2.0], ["a dog", .29, -2.0], ["dog", .28, -1.0]]}
    assert faults.chosen(record, 0, 0) == "a dog, a dog"
    assert faults.chosen(record, 0, .02) == "a dog" and faults.chosen(record, .03, 0) == "dog"


CACHE = ["a dog", "the dog", "two dogs", "a red dog", "red", "on the", "a dog on the beach",
         "sandy beach", "beaches", "a cat", "black cat", "red black cat", "dog", "sand",
         "dogs"]


def test_the_redundancy_of_a_cache_is_that_of_the_plain_formula():
    sets = [content(text) for text in CACHE if content(text)]
    counts, nothing_new = [], []
    for i, own in enumerate(sets):
        others = [(-len(own & other) / len(own | other), j) for j, other in enumerate(sets)
                  if j != i]
        counts.append(sum(overlap <= -0.5 for overlap, _ in others))
        nothing_new.append(sum(sets[j] <= own for _, j in sorted(others)[:10]) / 10)
    found = redundancy.redundancy([*CACHE, "a dog"])  # an entry that comes again counts once
    assert found["entries"] == len(CACHE) and found["content"] == len(sets) / len(CACHE)
    assert found["mean"] == sum(counts) / len(sets) and max(counts) > 4 > min(counts)
    assert [found[f"{n}+"] for n in (1, 5, 10)] == [
        sum(count >= n for count in counts) / len(sets) for n in (1, 5, 10)]
    assert found["nothing new"] == pytest.approx(sum(nothing_new) / len(sets))


def test_caches_of_captions_and_of_files_are_measured(script, world, tmp_path):
    """The n-grams of a world's captions, as a file too, which says the same."""
    captions = [text for picture in read_coco(world, "train2017") for text in picture.captions]
    (tmp_path / "cache.txt").write_text("\n".join(choices.ngrams(captions, 50)) + "\n")
    run = script("snowglobe.redundancy", "--captions", world, "--entries", 20, 50, "--textfile",
                 tmp_path / "cache.txt")
    assert run.code == 0, run.err
    head, *rows = [line.split() for line in run.out.splitlines()]
    assert [row[0] for row in rows] == ["20", "50", "50"] and rows[1][:-1] == rows[2][:-1]
    for arguments in ([], ["--captions", tmp_path / "none.json"], ["--textfile", tmp_path],
                      ["--captions", world, "--entries", 0]):
        run = script("snowglobe.redundancy", *arguments)
        assert run.code == 2 and run.err.startswith("error: ") and run.err.count("\n") == 1
