"""Scores against published values and formulas, in both forms of input. Metrics that cannot be
computed are listed with the reason, and the others still run."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess

import pytest
import torch
from conftest import CLIP, VAL, commands
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.spice import get_stanford_models
from pycocoevalcap.spice.spice import Spice
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from test_chair import instances

import scorer
from antarctic import metrics
from antarctic.datasets import read_coco
from antarctic.errors import InputError
from antarctic.files import write_lines
from antarctic.images import read_image
from antarctic.leftovers import Process, this_host
from antarctic.pairs import Scored
from model import Clip

# The example of https://github.com/jmhessel/clipscore, and its scores in that README.
GOOD = [
    "an orange cat and a grey cat are lying together.",
    "a black dog wearing headphones looks at the camera as an orange cat walks in the background.",
]
BAD = [
    "a calico cat and a white cat are lying together.",
    "a black dog wearing a hat looks at the camera as a tabby walks in the background.",
]
REFERENCES = [
    ["two cats are sleeping next to each other.",
     "a grey cat is cuddling with an orange cat on a blanket.",
     "the orange cat is happy that the black cat is close to it."],
    ["a dog is wearing ear muffs as it lies on a carpet.",
     "a black dog and an orange cat are looking at the photographer.",
     "headphones are placed on a dogs ears."],
]
PUBLISHED = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D")
GOOD_SCORES = dict(zip(PUBLISHED, (0.6667, 0.4899, 0.3469, 0, 0.3444, 0.4280, 0.5637)))
BAD_SCORES = dict(zip(PUBLISHED, (0.4815, 0.2404, 0.1359, 0, 0.1861, 0.3121, 0.2790)))

needs_java = pytest.mark.skipif(not scorer.has_java(), reason="there is no Java here")


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    """A computer without Java: PATH is an empty folder."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def lines(folder, captions, references=()):
    """Writes captions and references, one a line. Returns the arguments that name the files."""
    write_lines(folder / "preds.txt", captions)
    columns = list(zip(*references))
    for i, column in enumerate(columns):
        write_lines(folder / f"ref{i}.txt", column)
    refs = ["--refs", *(folder / f"ref{i}.txt" for i in range(len(columns)))] if columns else []
    return ["--preds", folder / "preds.txt", *refs]


def coco(folder, captions, references):
    """Writes captions and references in COCO's formats. Returns the arguments that name the files.

    Image i has the id 10 i. One more image is annotated and has no caption.
    """
    ids = [10 * i for i in range(len(references))]
    (folder / "captions.json").write_text(
        json.dumps([{"image_id": i, "caption": text} for i, text in zip(ids, captions)]))
    annotations = [{"image_id": i, "caption": text}
                   for i, texts in zip([*ids, 7], [*references, ["a bus"]]) for text in texts]
    images = [{"id": i, "file_name": f"{i}.png"} for i in (*ids, 7)]
    (folder / "references.json").write_text(
        json.dumps({"images": images, "annotations": annotations}))
    return ["--results", folder / "captions.json", "--annotations", folder / "references.json"]


def score(script, folder, *arguments):
    """Runs the scorer, which must succeed. Returns the contents of scores.json, and its output."""
    result = script("scorer", *arguments, "--savedir", folder)
    assert result.code == 0, result.err
    return json.loads((folder / "scores.json").read_text()), result.out


# --------------------------------------------------------------------------------- known values

@pytest.mark.parametrize("form", [lines, coco])
@pytest.mark.parametrize("captions, published", [(GOOD, GOOD_SCORES), (BAD, BAD_SCORES)],
                         ids=["good", "bad"])
def test_published_values_come_without_java(script, no_java, tmp_path, form, captions, published):
    report, _ = score(script, tmp_path, *form(tmp_path, captions, REFERENCES))
    assert report["tokenizer"] == "treebank"
    assert report["captions"] == 2 and report["references"] == 6
    for name in set(PUBLISHED) - {"METEOR"}:
        assert report["scores"][name] == pytest.approx(published[name], abs=5e-5), name
    assert report["left_out"]["METEOR"] == report["left_out"]["SPICE"] == "there is no Java here"


@needs_java
@pytest.mark.slow
def test_published_values_come_with_java_and_meteors_too(script, tmp_path):
    report, _ = score(script, tmp_path, *lines(tmp_path, GOOD, REFERENCES))
    assert report["tokenizer"] == "ptb"
    assert {name: round(report["scores"][name], 4) for name in PUBLISHED} == GOOD_SCORES


TEXTS = {  # {text: its tokens in COCO's evaluation}
    "A dog's (big) ball, isn't it?": "a dog 's -lrb- big -rrb- ball is n't it",
    'Two "red" boats; one T-shirt...': "two red boats one t-shirt",
    "": "", "...": "", "A CAFÉ": "a café", "a ||| b": "a | | | b",
}


def test_texts_are_tokenized_as_cocos_evaluation_does(no_java):
    assert scorer.tokenize(list(TEXTS), "treebank") == list(TEXTS.values())


@needs_java
def test_javas_tokens_are_those_of_pycocoevalcaps_wrapper():
    assert scorer.tokenize(list(TEXTS), "ptb") == list(TEXTS.values())
    texts = [*TEXTS, *REFERENCES[0], *REFERENCES[1]]
    wrapped = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert scorer.tokenize(texts, "ptb") == [wrapped[i][0] for i in range(len(texts))]


def test_a_caption_equal_to_its_reference_scores_all_and_an_unrelated_one_nothing(
        script, no_java, tmp_path):
    captions = ["a red dog sleeps on the beach", "two whales swim under an old boat",
                "snow falls over some quiet mushrooms"]
    references = [[text] for text in captions]
    equal, _ = score(script, tmp_path, *lines(tmp_path, captions, references))
    for name, most in {"BLEU-1": 1, "BLEU-4": 1, "ROUGE-L": 1, "CIDEr-D": 10}.items():
        assert equal["scores"][name] == pytest.approx(most), name
    other, _ = score(script, tmp_path, *lines(tmp_path, captions[1:] + captions[:1], references))
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D"):
        assert other["scores"][name] == pytest.approx(0, abs=1e-6), name


def test_words_are_novel_where_no_training_caption_has_them_each_time_they_are_written(
        script, no_java, tmp_path):
    captions = ["A penguin, a penguin!", "a dog", "A dog."]  # 8 words
    write_lines(tmp_path / "train.txt", ["The dog", "A cat"])
    images = [{"id": 1, "file_name": "1.jpg"}]
    annotations = [{"image_id": 1, "caption": text} for text in ("The dog", "A cat")]
    (tmp_path / "train.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    arguments = lines(tmp_path, captions, [["a dog"]] * 3)
    for name in ("train.txt", "train.json"):
        report, _ = score(script, tmp_path, *arguments, "--train_captions", tmp_path / name)
        assert report["novel_words"] == {"penguin": 2} and report["scores"]["novel words"] == 2 / 8
    assert report["scores"]["distinct captions"] == 2 / 3  # case and punctuation make no difference
    assert report["scores"]["mean length"] == 8 / 3
    report, _ = score(script, tmp_path, *arguments)
    assert report["left_out"]["novel words"] == "no --train_captions"


# ------------------------------------------------------------------------------------------- images

def test_clip_scores_are_those_of_the_formula(monkeypatch, tmp_path):
    """Four images in the plane, computed by hand. The captions fit image and references, the
    references alone, the image alone, and neither."""
    vectors = {"near": (0.6, 0.8), "far": (-0.6, 0.8), "reference": (0.8, 0.6),
               "back": (-0.6, -0.8), "left": (-1.0, 0.0)}

    class Plane:
        def encode_texts(self, texts, *_):
            assert all(text.startswith("A photo depicts ") for text in texts)
            return torch.tensor([vectors[text.split()[-1]] for text in texts])

    def image_features(clip, pictures, *_, **__):
        return torch.tensor([(1.0, 0.0)] * 4), pictures, []

    monkeypatch.setattr("antarctic.features.image_features", image_features)
    captions = ["near", "far", "near", "far"]
    references = [["back", "reference"], ["far"], ["back"], ["reference", "back"]]
    # The cosines are .6 with the image and .48 + .48 with the better reference.
    first_image = 2 * 1.5 * 0.96 / (1.5 + 0.96)

    def values(captions, references):
        rows = [Scored(i, *texts, tmp_path) for i, texts in enumerate(zip(captions, references))]
        return scorer.clip_values(Plane(), rows, tmp_path, 3)

    assert values(captions, references) == {
        "CLIPScore": pytest.approx(dict(enumerate([1.5, 0, 1.5, 0]))),
        "RefCLIPScore": pytest.approx(dict(enumerate([first_image, 0, 0, 0])))}
    references[0] = []  # the other images keep their scores
    assert values(captions, references) == {
        "CLIPScore": pytest.approx(dict(enumerate([1.5, 0, 1.5, 0]))),
        "RefCLIPScore": {1: 0, 2: 0, 3: 0}}
    zeros = dict.fromkeys(range(4), 0)
    both_zero = values(["left"] * 4, [["reference"]] * 4)
    assert both_zero == {"CLIPScore": zeros, "RefCLIPScore": zeros}


@pytest.fixture(scope="module")
def sampled(script, world, cache, checkpoint, tmp_path_factory):
    """The folder of sampler.py's results on val2017."""
    folder = tmp_path_factory.mktemp("sampled")
    result = script("sampler", *commands(world, cache, checkpoint)["sampler"](folder))
    assert result.code == 0, result.err
    return folder


def test_what_the_sampler_wrote_is_scored_in_both_forms(script, world, sampled, no_java):
    captions = world / "annotations" / "captions_val2017.json"
    options = ("--images", world / "val2017", "--clip_model", CLIP,
               "--train_captions", world / "annotations" / "captions_train2017.json")
    before = set(sampled.iterdir())
    by_image = script("scorer", "--results", sampled / "captions.json", "--annotations", captions,
                      *options)
    assert by_image.code == 0, by_image.err
    report = json.loads((sampled / "scores.json").read_text())
    # It makes no image features: it reads the sampler's.
    assert set(sampled.iterdir()) - before == {sampled / "scores.json"}
    by_line = script("scorer", "--preds", sampled / "preds.txt", "--refs",
                     *sorted(sampled.glob("ref*.txt")), *options)
    assert by_line.code == 0, by_line.err
    assert by_line.out == by_image.out
    assert json.loads((sampled / "scores.json").read_text()) == report
    assert report["clip_images"] == report["captions"] == VAL and report["references"] == 5 * VAL
    assert set(report["scores"]) | set(report["left_out"]) == set(scorer.TABLE)

    # The formulas, with the prompt, which the sampler's own cosines lack.
    clip = Clip(CLIP)

    def encode(name):
        texts = (sampled / name).read_text().splitlines()
        return clip.encode_texts([scorer.PROMPT + text for text in texts])

    images = clip.encode_images([read_image(p.path) for p in read_coco(world, "val2017")])
    vectors = encode("preds.txt")
    references = [encode(f"ref{i}.txt") for i in range(5)]
    clip_score = 2.5 * (images * vectors).sum(1).clamp(min=0)
    best = torch.stack([(vectors * rows).sum(1) for rows in references]).amax(0).clamp(min=0)
    ref_clip_score = 2 / (1 / clip_score + 1 / best)
    assert report["scores"]["CLIPScore"] == pytest.approx(clip_score.mean().item(), abs=1e-5)
    assert report["scores"]["RefCLIPScore"] == pytest.approx(ref_clip_score.mean().item(), abs=1e-5)


def test_the_cover_of_captions_is_found_in_the_details_of_their_run(script, world, sampled, no_java,
                                                                    tmp_path):
    """In the file itself or beside it, by image or by line; a caption that the run did not write
    has none."""
    shutil.copytree(sampled, tmp_path / "r")
    details = tmp_path / "r" / "details.jsonl"
    covers = [json.loads(line)["cover"] for line in details.open()]
    assert len(covers) == VAL and min(covers) > 0
    mean = pytest.approx(sum(covers) / VAL, abs=1e-3)
    references = "--annotations", world / "annotations" / "captions_val2017.json"
    by_image = ["--results", tmp_path / "r" / "captions.json", *references]
    by_line = ["--preds", tmp_path / "r" / "preds.txt", "--refs", tmp_path / "r" / "ref0.txt"]
    for arguments in (by_image, by_line, ["--results", details, *references]):
        report, _ = score(script, tmp_path / "s", *arguments)
        assert report["scores"]["evidence cover"] == mean

    lines = details.read_text().splitlines()
    others = [json.dumps({**json.loads(lines[0]), "caption": "a penguin"}), "[" * 9999,
              json.dumps({**json.loads(lines[2]), "table": {}})]
    details.write_text("\n".join([*others, *lines[3:]]) + "\n")
    for arguments in (by_image, by_line):
        report, _ = score(script, tmp_path / "s", *arguments)
        assert report["scores"]["evidence cover"] == pytest.approx(sum(covers[3:]) / (VAL - 3),
                                                                   abs=1e-3)
    details.unlink()
    report, _ = score(script, tmp_path / "s", *by_image)
    assert report["left_out"]["evidence cover"] == "no details.jsonl"


@pytest.mark.parametrize("fails", ["a folder", "at its second line"])
def test_evidence_that_cannot_be_read_is_named_and_costs_no_other_score(
        script, no_java, tmp_path, monkeypatch, fails):
    def read_covers(path):
        yield 1, GOOD[0], 0.5
        raise InputError(f"{path} cannot be read (Input/output error)")

    arguments = lines(tmp_path, GOOD, REFERENCES)
    if fails == "a folder":
        (tmp_path / "details.jsonl").mkdir()
    else:
        monkeypatch.setattr("antarctic.pairs.read_covers", read_covers)
    run = script("scorer", *arguments)
    assert run.code == 0 and "warning: no evidence cover: " in run.err and "details" in run.err
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["left_out"]["evidence cover"] == "no details.jsonl"
    assert report["scores"]["BLEU-1"] == pytest.approx(GOOD_SCORES["BLEU-1"], abs=5e-5)


def test_the_table_says_what_the_json_says(script, world, sampled, no_java, tmp_path):
    report, out = score(script, tmp_path, "--preds", sampled / "preds.txt", "--refs",
                        sampled / "ref0.txt", "--images", world / "val2017", "--clip_model", CLIP)
    headline, *rows, _ = out.splitlines()
    table = dict(re.match(r"(.+?)  +(\S.*)", row).groups() for row in rows)
    assert list(table) == list(scorer.TABLE)
    for name, value in table.items():
        if name in report["left_out"]:
            assert value == f"- {report['left_out'][name]}"
        else:
            assert value == f"{report['scores'][name]:.4f}"
    assert headline.startswith(f"{VAL} captions, {VAL} references; words by NLTK")
    assert report["clip_model"] in headline


def test_an_image_that_cannot_be_read_is_named_and_left_out_of_the_clip_scores_alone(
        script, world, sampled, no_java, tmp_path):
    images = shutil.copytree(world / "val2017", tmp_path / "images")
    broken = sorted(images.iterdir())[2]
    broken.write_bytes(b"no picture")
    captions = (sampled / "preds.txt").read_text().splitlines()
    references = (sampled / "ref0.txt").read_text().splitlines()
    arguments = lines(tmp_path, captions, [[text] for text in references])
    result = script("scorer", *arguments, "--images", images, "--clip_model", CLIP)
    assert result.code == 0 and f"skipped {broken}: " in result.err
    report = json.loads((tmp_path / "scores.json").read_text())  # by default beside the captions
    assert report["clip_images"] == VAL - 1 and report["captions"] == VAL
    broken.unlink()
    del captions[2], references[2]
    arguments = lines(tmp_path, captions, [[text] for text in references])
    without, _ = score(script, tmp_path, *arguments, "--images", images, "--clip_model", CLIP)
    for name in ("CLIPScore", "RefCLIPScore"):
        assert report["scores"][name] == pytest.approx(without["scores"][name], abs=1e-6)


def test_captions_without_references_are_held_against_their_images(
        script, world, sampled, no_java, tmp_path):
    report, _ = score(script, tmp_path, "--preds", sampled / "preds.txt", "--images",
                      world / "val2017", "--clip_model", CLIP)
    assert set(report["scores"]) == {"CLIPScore", "evidence cover", "distinct captions",
                                     "mean length"}
    assert report["left_out"]["CIDEr-D"] == report["left_out"]["RefCLIPScore"] == "no --refs"


# ----------------------------------------------------------------------- photos of a user's own

@pytest.fixture(scope="module")
def photos(script, world, cache, checkpoint, tmp_path_factory):
    """A folder with photos/, one of them broken, and the sampler's results on them in runs/, by
    relative paths and in another order than the sorted one."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(world / "val2017", folder / "photos")
    names = sorted(path.name for path in (folder / "photos").iterdir())
    (folder / "photos" / names[3]).write_bytes(b"no picture")
    (folder / "photos" / "more").mkdir()
    (folder / "photos" / names[5]).rename(folder / "photos" / "more" / names[5])
    options = commands(world, cache, checkpoint)["sampler"](folder / "runs", datadir=None)
    with contextlib.chdir(folder):
        result = script("sampler", *options, "--images", "photos/more",
                        *(f"photos/{name}" for name in reversed(names) if name != names[5]))
    assert result.code == 0, result.err
    return folder


def test_photos_are_found_by_their_paths_whatever_their_order_and_whichever_was_skipped(
        script, world, photos, no_java, tmp_path, monkeypatch):
    runs, clip = photos / "runs", Clip(CLIP)
    rows = json.loads((runs / "captions.json").read_text())
    assert len(rows) == VAL - 1 and rows != sorted(rows, key=lambda row: row["image_id"])
    images = clip.encode_images([read_image(photos / row["image_id"]) for row in rows])
    texts = clip.encode_texts([scorer.PROMPT + row["caption"] for row in rows])
    expected = 2.5 * (images * texts).sum(1).clamp(min=0).mean().item()

    shuffled = tmp_path / "shuffled.json"
    shuffled.write_text(json.dumps(rows[::-1]))
    monkeypatch.chdir(photos)  # paths as they stand
    for arguments in (["--results", runs / "captions.json", "--images", "photos"],
                      ["--results", shuffled, "--images", tmp_path],
                      ["--results", runs / "details.jsonl"]):
        report, _ = score(script, tmp_path, *arguments, "--clip_model", CLIP)
        assert report["scores"]["CLIPScore"] == pytest.approx(expected, abs=1e-6), arguments
        assert report["clip_images"] == VAL - 1
        assert report["left_out"]["CIDEr-D"] == "no --annotations"
    monkeypatch.chdir(tmp_path)  # paths in the folder of images
    for name in ("captions.json", "details.jsonl"):
        report, _ = score(script, tmp_path, "--results", runs / name, "--images", photos,
                          "--clip_model", CLIP)
        assert report["scores"]["CLIPScore"] == pytest.approx(expected, abs=1e-6), name
        (tmp_path / "out").mkdir(exist_ok=True)
        refused(script, tmp_path, ["--results", runs / name, "--images", tmp_path],
                "none of the 7 images", "photos/more/", tmp_path)
    refused(script, tmp_path, ["--results", runs / "details.jsonl"], "none of the 7 images")
    refused(script, tmp_path, ["--preds", runs / "preds.txt", "--images", photos / "photos"],
            "7 lines", "8 images", "--results")


def test_a_photo_that_has_gone_is_named_and_the_others_are_scored(
        script, photos, no_java, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    rows = json.loads((photos / "runs" / "captions.json").read_text())
    gone = ["photos/gone.png", "x" * 5000, "a\x1b[2Jb.png", "a\0b", "\ud800", "", 7]
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps(rows + [{"image_id": name, "caption": "a"} for name in gone]))
    result = script("scorer", "--results", captions, "--images", "photos", "--clip_model", CLIP)
    assert result.code == 0, result.err
    assert "skipped photos/gone.png: " in result.err and "\x1b" not in result.err
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["captions"] == VAL + 6 and report["clip_images"] == VAL - 1
    assert f"warning: 4 images of {captions} have no path" in result.err


def test_results_without_paths_are_refused_with_images_alone(script, tmp_path):
    arguments = coco(tmp_path, GOOD, REFERENCES)[:2]
    refused(script, tmp_path, [*arguments, "--images", tmp_path], "holds no paths", "--annotations")
    details = tmp_path / "details.jsonl"
    details.write_text('{"image_id": 1, "caption": "a dog"}\n')
    refused(script, tmp_path, ["--results", details], "details.jsonl", "holds no paths")


def test_details_need_no_folder_of_images_with_references_either(
        script, world, sampled, no_java, tmp_path):
    arguments = ["--results", sampled / "details.jsonl", "--annotations",
                 world / "annotations" / "captions_val2017.json"]
    named, _ = score(script, tmp_path, *arguments, "--images", world / "val2017",
                     "--clip_model", CLIP)
    report, _ = score(script, tmp_path, *arguments, "--clip_model", CLIP)
    assert report == named and "RefCLIPScore" in report["scores"]
    # Nobody asked for a CLIP, so that a missing one costs no other score.
    without, _ = score(script, tmp_path, *arguments, "--clip_model", "no/clip")
    assert "no/clip" in without["left_out"]["CLIPScore"]
    assert without["scores"]["CIDEr-D"] == report["scores"]["CIDEr-D"]


# ------------------------------------------------------------------- what is missing, and domains

WORDS = {"BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D"}


def test_images_without_references_are_named_and_the_others_scored_alike_in_both_forms(
        script, no_java, tmp_path):
    full, _ = score(script, tmp_path, *lines(tmp_path, GOOD, REFERENCES))
    captions = [GOOD[0], "a bus", GOOD[1], "a train"]
    references = [REFERENCES[0], ["", "", ""], REFERENCES[1], ["", "", ""]]
    nulls = [REFERENCES[0], [None, ""], REFERENCES[1], []]
    for arguments, ids in ((lines(tmp_path, captions, references), "2, 4"),
                           (coco(tmp_path, captions, nulls), "10, 30")):
        result = script("scorer", *arguments, "--savedir", tmp_path)
        assert result.code == 0, result.err
        [warning] = [line for line in result.err.splitlines() if line.startswith("warning")]
        assert warning.startswith("warning: 2 ") and "no reference" in warning
        assert warning.endswith(f": {ids}")
        report = json.loads((tmp_path / "scores.json").read_text())
        assert {name: report["scores"][name] for name in WORDS} == pytest.approx(
            {name: full["scores"][name] for name in WORDS})
        assert report["captions"] == 4 and report["without_reference"] == 2
        assert report["references"] == 6 and report["scores"]["mean length"] == 31 / 4


def test_images_without_references_keep_their_clipscore(script, world, sampled, no_java, tmp_path):
    data = json.loads((world / "annotations" / "captions_val2017.json").read_text())
    first = data["images"][0]["id"]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] != first]
    (tmp_path / "part.json").write_text(json.dumps(data))
    options = "--images", world / "val2017", "--clip_model", CLIP
    full, _ = score(script, tmp_path, "--results", sampled / "captions.json", "--annotations",
                    world / "annotations" / "captions_val2017.json", *options)
    part, _ = score(script, tmp_path, "--results", sampled / "captions.json", "--annotations",
                    tmp_path / "part.json", *options)
    assert part["scores"]["CLIPScore"] == pytest.approx(full["scores"]["CLIPScore"])
    assert part["scores"]["RefCLIPScore"] != full["scores"]["RefCLIPScore"]
    data["annotations"] = []
    (tmp_path / "part.json").write_text(json.dumps(data))
    none, _ = score(script, tmp_path, "--results", sampled / "captions.json", "--annotations",
                    tmp_path / "part.json", *options)
    assert none["scores"]["CLIPScore"] == part["scores"]["CLIPScore"]
    assert none["left_out"]["CIDEr-D"] == "no image has a reference"


@pytest.mark.parametrize("missing", [{}, {"caption": ""}, {"caption": " \n"}, {"caption": None}])
def test_a_caption_that_is_missing_is_named_and_counts_as_an_empty_one(
        script, no_java, tmp_path, missing):
    by_line, _ = score(script, tmp_path, *lines(tmp_path, [GOOD[0], ""], REFERENCES))
    arguments = coco(tmp_path, GOOD, REFERENCES)
    records = [{"image_id": 0, "caption": GOOD[0]}, {"image_id": 10} | missing]
    for name, text in (("captions.json", json.dumps(records)),
                       ("details.jsonl", "\n".join(map(json.dumps, records)))):
        (tmp_path / name).write_text(text)
        result = script("scorer", "--results", tmp_path / name, *arguments[2:])
        assert result.code == 0, result.err
        assert "warning: 1 images have an empty caption: 10\n" in result.err
        assert json.loads((tmp_path / "scores.json").read_text()) == by_line
    assert by_line["empty_captions"] == 1


def test_nocaps_domains_are_scored_as_if_each_were_alone(
        script, world, sampled, no_java, tmp_path):
    names = ("out-domain", "in-domain", "near-domain", None, "elsewhere", 5, "in-domain",
             "near-domain")
    data = json.loads((world / "annotations" / "captions_val2017.json").read_text())
    domains = {image["id"]: domain for image, domain in zip(data["images"], names)}
    for image in data["images"]:
        image["domain"] = domains[image["id"]]
    (tmp_path / "nocaps.json").write_text(json.dumps(data))
    options = ("--annotations", tmp_path / "nocaps.json", "--images", world / "val2017",
               "--clip_model", CLIP)
    report, out = score(script, tmp_path, "--results", sampled / "captions.json", *options)
    assert list(report["domains"]) == ["in-domain", "near-domain", "out-domain"]
    assert out.splitlines()[1].split() == ["all", *report["domains"]]
    [row] = [line.split() for line in out.splitlines() if line.startswith("BLEU-1 ")]
    assert row == [row[0], *(f"{scores['BLEU-1']:.4f}"
                             for scores in (report["scores"], *report["domains"].values()))]
    assert "CIDEr-D" not in report["domains"]["out-domain"]  # there is one image
    rows = json.loads((sampled / "captions.json").read_text())
    shutil.copy(sampled / "details.jsonl", tmp_path)
    for domain, scores in report["domains"].items():
        (tmp_path / "part.json").write_text(
            json.dumps([row for row in rows if domains[row["image_id"]] == domain]))
        alone, _ = score(script, tmp_path, "--results", tmp_path / "part.json", *options)
        assert scores == pytest.approx(alone["scores"], abs=1e-6)


# -------------------------------------------------------------------------------------------- CHAIR

def test_chair_is_scored_beside_the_others_or_alone(script, no_java, tmp_path):
    objects = {0: ["cat"], 10: ["dog"]}
    path = instances(tmp_path, objects)
    arguments = coco(tmp_path, ["two cats and a kite", "a man"], [["a cat"], ["a puppy"]])
    for part in (arguments, arguments[:2]):
        report, out = score(script, tmp_path, *part, "--instances", path)
        chair = {name: report["scores"][name] for name in ("CHAIRs", "CHAIRi", "object recall")}
        assert chair == {"CHAIRs": 1, "CHAIRi": 2 / 3, "object recall": 1 / 2}
        assert report["hallucinated"] == {"kite": 1, "person": 1} and report["chair_images"] == 2
        assert re.search(r"^CHAIRi +0\.6667$", out, re.M)
    report, _ = score(script, tmp_path, *coco(tmp_path, ["a tree", "grass"], REFERENCES)[:2],
                      "--instances", path)
    assert report["scores"]["CHAIRs"] == 0
    assert report["left_out"]["CHAIRi"] == "there is nothing to count"
    refused(script, tmp_path, [*lines(tmp_path, GOOD, REFERENCES), "--instances", path],
            "goes with")
    refused(script, tmp_path, [*arguments, "--instances", tmp_path / "references.json"],
            "references.json", "not a COCO instances file")


# ------------------------------------------------------------------------ metrics that are left out

def test_spice_is_named_where_its_parts_are_missing_and_nothing_is_fetched(
        script, monkeypatch, tmp_path):
    def fail(*_):
        raise AssertionError("a download started")
    monkeypatch.setattr("urllib.request.urlopen", fail)
    monkeypatch.setattr(get_stanford_models, "urlretrieve", fail)
    monkeypatch.setattr(get_stanford_models, "SPICELIB", str(tmp_path))
    monkeypatch.setattr(scorer, "has_java", lambda: True)
    monkeypatch.setitem(metrics.SCORERS, ("METEOR",), lambda *_: [0.25])
    arguments = (*lines(tmp_path, GOOD, REFERENCES), "--tokenizer", "treebank")
    report, _ = score(script, tmp_path, *arguments)
    assert "CoreNLP" in report["left_out"]["SPICE"] and report["scores"]["METEOR"] == 0.25

    for part in ("", "-models"):
        (tmp_path / f"{get_stanford_models.JAR}{part}.jar").touch()
    monkeypatch.setattr(Spice, "compute_score", lambda *_: (0.4, []))
    assert score(script, tmp_path, *arguments)[0]["scores"]["SPICE"] == 0.4

    def stop(*_):
        raise subprocess.CalledProcessError(1, ["java"])
    monkeypatch.setattr(Spice, "compute_score", stop)
    report, _ = score(script, tmp_path, *arguments)
    assert "CalledProcessError" in report["left_out"]["SPICE"]
    assert report["scores"]["CIDEr-D"] == pytest.approx(0.5637, abs=5e-5)


def test_a_java_that_stops_is_named_and_does_not_hang(script, no_java, tmp_path):
    java = tmp_path / "bin" / "java"
    java.write_text('#!/bin/sh\n[ "$1" = -version ]\n')
    java.chmod(0o755)
    arguments = lines(tmp_path, GOOD, REFERENCES)
    report, _ = score(script, tmp_path, *arguments, "--tokenizer", "treebank")
    assert report["left_out"]["METEOR"].startswith("its scorer failed")
    assert "CIDEr-D" in report["scores"]
    result = script("scorer", *arguments)
    assert result.code == 2 and "try --tokenizer treebank" in result.err


JAVA = """#!/bin/sh
[ "$1" = -version ] && exit
{}
"""


def fake_java(folder, body):
    """Puts a program java into the folder bin, which is the PATH of no_java."""
    (folder / "bin" / "java").write_text(JAVA.format(body))
    (folder / "bin" / "java").chmod(0o755)


@pytest.mark.parametrize("body, reason", [
    ("echo no heap >&2; exit 1", "no heap"),
    ("while read line; do echo nonsense; done", "0 scores of 2"),
    ("while read line; do printf '\\377\\n'; done; echo; echo", "could not convert"),
    ("while read line; do echo nan; done; echo; echo nan", "nan"),
    ("read line; echo 1; read line; exit", "Java ended"),
])
def test_a_meteor_that_dies_or_answers_nonsense_is_named_and_costs_no_other_score(
        script, no_java, tmp_path, body, reason):
    fake_java(tmp_path, body)
    arguments = lines(tmp_path, GOOD, REFERENCES)
    report, _ = score(script, tmp_path, *arguments, "--tokenizer", "treebank")
    assert reason in report["left_out"]["METEOR"]
    assert {name: round(report["scores"][name], 4) for name in PUBLISHED if name != "METEOR"} == {
        name: value for name, value in GOOD_SCORES.items() if name != "METEOR"}


SILENT = "exec /bin/sleep 60"


@pytest.mark.parametrize("body", [
    SILENT, f"read a; echo 1; read a; echo 1; read a; echo 1; {SILENT}"], ids=["first", "last"])
def test_a_meteor_that_is_silent_is_waited_for_within_bounds(
        script, no_java, tmp_path, monkeypatch, body):
    monkeypatch.setattr(metrics, "PATIENCE", 1)
    fake_java(tmp_path, body)
    references = [[text * 100 for text in texts * 5] for texts in REFERENCES]
    report, _ = score(script, tmp_path, *lines(tmp_path, GOOD, references), "--tokenizer",
                      "treebank")  # more than a pipe holds
    assert re.search(r"Java gave METEOR no answer for .* minutes; rerun the same command where",
                     report["left_out"]["METEOR"])
    assert "CIDEr-D" in report["scores"]


def test_a_meteor_that_is_slow_is_waited_for(script, no_java, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "PATIENCE", 2)
    fake_java(tmp_path, "read a; echo 1; read a; /bin/sleep 1.5; echo 1; read a; /bin/sleep 1.5\n"
                        "echo 1; echo 1; /bin/sleep 1.5; echo 0.5")
    report, _ = score(script, tmp_path, *lines(tmp_path, GOOD, REFERENCES), "--tokenizer",
                      "treebank")
    assert report["scores"]["METEOR"] == 0.5


def test_a_java_that_is_silent_otherwise_is_named(script, no_java, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "PATIENCE", 1)
    fake_java(tmp_path, SILENT)
    result = script("scorer", *lines(tmp_path, GOOD, REFERENCES), "--tokenizer", "ptb")
    assert result.code == 2 and "Java's tokenizer has not ended" in result.err
    assert "try --tokenizer treebank" in result.err
    (tmp_path / "bin" / "java").write_text(f"#!/bin/sh\n{SILENT}\n")
    result = script("scorer", *lines(tmp_path, GOOD, REFERENCES))
    assert result.code == 0 and "`java -version` gave no answer" in result.err
    assert re.search("METEOR +- there is no Java here", result.out)


def test_a_java_tokenizer_that_answers_nonsense_is_named(script, no_java, tmp_path):
    fake_java(tmp_path, "printf '\\377\\n'; echo out of memory >&2")
    result = script("scorer", *lines(tmp_path, GOOD, REFERENCES), "--tokenizer", "ptb")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "out of memory" in result.err and "--tokenizer treebank" in result.err


@needs_java
@pytest.mark.slow
def test_meteor_is_that_of_pycocoevalcaps_wrapper():
    captions = {0: ["the puppy watches a guy"], 1: ["children ||| play  soccer"], 2: [""]}
    references = {0: ["a dog looks at the man", "a dog"], 1: ["kids play football"], 2: ["a café"]}
    expected, _ = Meteor().compute_score(references, captions)
    assert metrics.meteor(references, captions) == [expected] and expected > 0


def test_a_score_that_is_no_number_is_left_out(script, world, no_java, tmp_path, monkeypatch):
    monkeypatch.setitem(metrics.SCORERS, ("ROUGE-L",), lambda *_: [math.nan])
    monkeypatch.setattr(scorer, "clip_values", lambda *_: {"CLIPScore": {0: 1.0, 1: math.inf}})
    arguments = lines(tmp_path, ["a dog"] * VAL, [["a dog"]] * VAL)
    report, out = score(script, tmp_path, *arguments, "--images", world / "val2017",
                        "--clip_model", CLIP)
    for name, value in (("ROUGE-L", "nan"), ("CLIPScore", "inf")):
        assert value in report["left_out"][name] and name not in report["scores"]
    text = (tmp_path / "scores.json").read_text()
    assert "NaN" not in text and "Infinity" not in text


def test_one_image_has_no_cider(script, no_java, tmp_path):
    report, _ = score(script, tmp_path, *coco(tmp_path, GOOD[:1], REFERENCES[:1]))
    assert "one image" in report["left_out"]["CIDEr-D"] and report["scores"]["BLEU-1"] > 0


def test_a_blank_line_is_no_reference_and_an_empty_caption_scores_nothing(
        script, no_java, tmp_path):
    full, _ = score(script, tmp_path, *coco(tmp_path, GOOD, [REFERENCES[0], REFERENCES[1][:2]]))
    references = [REFERENCES[0], [*REFERENCES[1][:2], ""]]
    blank, _ = score(script, tmp_path, *lines(tmp_path, GOOD, references))
    assert blank["scores"] == full["scores"] and blank["references"] == 5
    empty, _ = score(script, tmp_path, *lines(tmp_path, [GOOD[0], ""], REFERENCES))
    assert 0 < empty["scores"]["CIDEr-D"] < full["scores"]["CIDEr-D"]
    assert empty["scores"]["mean length"] == 5


# --------------------------------------------------------------------------------------- refusals

def refused(script, folder, arguments, *named):
    """Runs the scorer, which must refuse with one sentence that holds the texts `named`."""
    result = script("scorer", *arguments, "--savedir", folder / "out")
    assert result.code == 2, result.out
    assert len(result.err.splitlines()) == 1 and result.err.startswith("error: "), result.err
    assert all(str(text) in result.err for text in named), result.err
    assert not list((folder / "out").glob("*"))


def test_arguments_that_do_not_go_together_are_refused(script, tmp_path):
    pair, both = lines(tmp_path, GOOD, REFERENCES), coco(tmp_path, GOOD, REFERENCES)
    for arguments in ([], both + pair[:2]):
        refused(script, tmp_path, arguments, "--results", "--preds")
    for arguments in (both[:2], pair + both[2:], both + pair[2:]):
        refused(script, tmp_path, arguments, "goes with")
    refused(script, tmp_path, pair[:2], "--refs", "--images")
    refused(script, tmp_path, [*pair, "--batch_size", "0"], "--batch_size")


def test_files_that_are_missing_empty_or_no_text_are_named(script, tmp_path):
    arguments = lines(tmp_path, GOOD, REFERENCES) + ["--train_captions", tmp_path / "train.txt"]
    (tmp_path / "train.txt").write_text("a dog\n")
    for name in ("preds.txt", "ref1.txt", "train.txt"):
        path = tmp_path / name
        whole = path.read_bytes()
        for damage in (b"", b"\n \n", b"\xff\xfea dog\n"):
            path.write_bytes(damage)
            refused(script, tmp_path, arguments, path)
        path.unlink()
        refused(script, tmp_path, arguments, path)
        path.write_bytes(whole)


@pytest.mark.parametrize("extra", ["a dog\n", "\n"])
def test_files_of_other_lengths_are_refused(script, tmp_path, extra):
    arguments = lines(tmp_path, GOOD, REFERENCES)
    with open(tmp_path / "ref1.txt", "a") as file:
        file.write(extra)
    refused(script, tmp_path, arguments, "preds.txt has 2 lines", "ref1.txt has 3")


def test_captions_of_which_none_has_a_reference_are_refused(script, tmp_path):
    arguments = coco(tmp_path, GOOD, [[None], []])
    refused(script, tmp_path, arguments, "captions.json", "no caption", "has a reference")


@pytest.mark.parametrize("name", ["captions.json", "references.json"])
@pytest.mark.parametrize("text", [
    "", "a cat\n", "7", "{}", "[]", "[1]", '["a"]', '{"images": [], "annotations": []}',
    '[{"image_id": 10}]', '[{"image_id": 10, "caption": 5}]',
    '[{"image_id": [], "caption": "a cat"}]'])
def test_json_of_another_kind_is_refused(script, tmp_path, name, text):
    arguments = coco(tmp_path, GOOD, REFERENCES)
    (tmp_path / name).write_text(text)
    refused(script, tmp_path, arguments, tmp_path / name)
    (tmp_path / name).unlink()
    refused(script, tmp_path, arguments, tmp_path / name)


def test_strange_and_doubled_images_are_refused(script, tmp_path):
    arguments = coco(tmp_path, GOOD, REFERENCES)
    results = json.loads((tmp_path / "captions.json").read_text())
    (tmp_path / "captions.json").write_text(
        json.dumps(results + [{"image_id": "10", "caption": "a dog"}]))
    refused(script, tmp_path, arguments, "1 of 3", "'10'", "references.json")
    (tmp_path / "captions.json").write_text(json.dumps(results + results[1:]))
    refused(script, tmp_path, arguments, "more than one caption of the image 10")


def test_images_that_do_not_belong_to_the_captions_are_refused(script, world, tmp_path):
    folder, nowhere = world / "val2017", tmp_path / "nowhere"
    by_line, by_image = lines(tmp_path, GOOD, REFERENCES), coco(tmp_path, GOOD, REFERENCES)
    refused(script, tmp_path, [*by_line, "--images", folder], "2 lines",
            f"{folder} has {VAL} images")
    refused(script, tmp_path, [*by_line, "--images", nowhere], nowhere)
    refused(script, tmp_path, [*by_image, "--images", folder], folder / "0.png")


def test_a_wrong_clip_is_refused_before_anything_is_scored(script, world, tmp_path):
    arguments = lines(tmp_path, ["a dog"] * VAL, [["a dog"]] * VAL)
    arguments += ["--images", world / "val2017", "--clip_model", "no/clip"]
    refused(script, tmp_path, arguments, "no/clip")


def test_what_cannot_be_done_is_refused(script, no_java, tmp_path):
    arguments = lines(tmp_path, GOOD, REFERENCES)
    refused(script, tmp_path, [*arguments, "--tokenizer", "ptb"], "needs Java")
    (tmp_path / "scores.json").mkdir()
    result = script("scorer", *arguments)
    assert result.code == 2 and f"{tmp_path / 'scores.json'} is a folder" in result.err


SPELLINGS = {
    "itself": lambda path, _: path,
    "another spelling": lambda path, _: path.parent / "." / ".." / path.parent.name / path.name,
    "a link": lambda path, other: other.symlink_to(path) or other,
    "a hard link": lambda path, other: os.link(path, other) or other,
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_no_file_that_is_read_is_replaced(script, world, no_java, tmp_path, spelling):
    data = shutil.copytree(world, tmp_path / "world")
    by_line, by_image = lines(tmp_path, GOOD, REFERENCES), coco(tmp_path, GOOD, REFERENCES)
    train = write_lines(tmp_path / "train.txt", GOOD) or tmp_path / "train.txt"
    captions = data / "annotations" / "captions_val2017.json"
    ids = [image["id"] for image in json.loads(captions.read_text())["images"]]
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"image_id": i, "caption": "a dog"} for i in ids]))
    image = sorted((data / "val2017").iterdir())[0]
    by_folder = ["--results", results, "--datadir", data]
    link = tmp_path / "link"
    for arguments, paths in [
            (by_line, [by_line[1], by_line[3], by_line[5]]),
            ([*by_line, "--train_captions", train], [train]),
            (by_image, [by_image[1], by_image[3]]),
            (by_folder, [results, image] + [captions] * (spelling is not SPELLINGS["a hard link"])),
            (["--results", results, "--annotations", captions, "--images", data / "val2017"],
             [results, captions, image])]:
        for path in paths:
            link.unlink(missing_ok=True)
            before = path.read_bytes()
            result = script("scorer", *arguments, "--clip_model", CLIP, "--json",
                            spelling(path, link))
            assert result.code == 2 and "would be replaced" in result.err, (path, result.err)
            assert path.read_bytes() == before and not list(tmp_path.glob("features-*"))


def test_earlier_scores_are_replaced_also_in_a_folder_that_is_read(
        script, world, no_java, tmp_path):
    data = shutil.copytree(world, tmp_path / "world")
    arguments = lines(tmp_path, ["a dog"] * VAL, [["a dog"]] * VAL)
    for _ in range(2):
        score(script, data / "val2017", *arguments, "--images", data / "val2017",
              "--clip_model", CLIP)


# ------------------------------------------------------------------------------------ old spellings

def test_json_still_writes_exactly_that_file_and_warns_once(script, no_java, tmp_path):
    arguments = lines(tmp_path, GOOD, REFERENCES)
    report, out = score(script, tmp_path / "new", *arguments)
    old = script("scorer", *arguments, "--json", tmp_path / "old" / "numbers.txt")
    assert old.code == 0 and old.out == out.replace("new/scores.json", "old/numbers.txt")
    warnings = [line for line in old.err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: --json is now --savedir DIR; "
                        "the next release drops the old spelling"]
    [path] = (tmp_path / "old").iterdir()
    assert path.read_bytes() == (tmp_path / "new" / "scores.json").read_bytes()
    both = script("scorer", *arguments, "--json", tmp_path / "a.json", "--savedir", tmp_path / "b")
    assert both.code == 2 and "one of the two" in both.err.splitlines()[-1]


def test_image_features_go_into_savedir(script, world, no_java, tmp_path):
    (tmp_path / "preds").mkdir()
    write_lines(tmp_path / "preds" / "preds.txt", ["a dog"] * VAL)
    arguments = ("--preds", tmp_path / "preds" / "preds.txt", "--images", world / "val2017",
                 "--clip_model", CLIP)
    score(script, tmp_path / "out", *arguments)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names[0].startswith("features-") and names[1:] == ["scores.json"]
    # A run that was killed when all images were encoded.
    (tmp_path / "out" / f".features-{1:016}.lock").write_text(
        f"process 999999999 on here ({Process(999_999_999, 1, this_host()).name})\n")
    score(script, tmp_path / "out", *arguments)
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [path.name for path in (tmp_path / "preds").iterdir()] == ["preds.txt"]


def test_a_caption_without_an_image_is_refused(script, tmp_path):
    arguments = coco(tmp_path, GOOD, REFERENCES)
    (tmp_path / "captions.json").write_text('[{"caption": "a dog"}]')
    refused(script, tmp_path, arguments, "captions.json", "no image_id", "'a dog'")
    (tmp_path / "captions.json").write_text('[{"image_id": 0, "caption": " "}]')
    refused(script, tmp_path, arguments, "captions.json", "no text")


def test_results_may_be_the_samplers_details(script, no_java, tmp_path):
    _, results, *annotations = coco(tmp_path, GOOD, REFERENCES)
    expected, _ = score(script, tmp_path, "--results", results, *annotations)
    records = json.loads(results.read_text())
    details = tmp_path / "details.jsonl"
    details.write_text("".join(json.dumps(record) + "\n" for record in records))
    report, _ = score(script, tmp_path, "--results", details, *annotations)
    assert report == expected
