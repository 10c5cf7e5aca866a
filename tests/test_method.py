"""model.Model: the steps against plain formulas, and the whole against the sampler and the caches
on disk."""

import json
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import BART, CLIP, ROOT
from PIL import Image

import model as models
from antarctic.errors import InputError
from antarctic.images import read_image
from antarctic.insertions import insertions
from model import Model

SAMPLING = {
    "do_sample": True, "num_return_sequences": 20, "top_p": 0.9, "temperature": 0.8, "seed": 3
}


@pytest.fixture(scope="module")
def load(cache, checkpoint):
    """load(**changes): a Model of the shared cache and checkpoint."""
    def load(**changes):
        return Model.load(
            **{
                "clip_model": CLIP, "lm": BART, "ckpt": str(checkpoint), "device": "cpu",
                "textfile": [str(cache.textfile)], "embfile": [str(cache.embfile)]
            } | changes)
    return load


@pytest.fixture(scope="module")
def method(load):
    return load()


@pytest.fixture(scope="module")
def paths(world):
    return sorted((world / "near").glob("*.png"))


def as_json(results):
    return json.loads(json.dumps([result._asdict() for result in results]))


@pytest.mark.parametrize("decoding", [{}, {"lm_weight": 0.3}, SAMPLING],
                         ids=["beam", "lm_weight", "samples"])
@pytest.mark.slow
def test_python_gives_the_sampler_s_captions(script, cache, checkpoint, method, paths, tmp_path,
                                             decoding):
    flags = [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in decoding.items()
    ]
    run = script("sampler", "--images", *paths, "--textfile", cache.textfile, "--embfile",
                 cache.embfile, "--ckpt", checkpoint, "--clip_model", CLIP, "--lm", BART,
                 "--savedir", tmp_path, "--device", "cpu", *flags)
    assert run.code == 0, run.err
    records = [json.loads(line) for line in (tmp_path / "details.jsonl").read_text().splitlines()]
    results = as_json(method.caption(paths, **decoding))
    assert results == [{name: record[name] for name in results[0]} for record in records]


@pytest.mark.parametrize("decoding", [{}, SAMPLING], ids=["beam", "samples"])
@pytest.mark.slow
def test_a_batch_changes_no_caption(method, paths, decoding):
    together = method.caption(paths, **decoding)
    assert [method.caption([path], **decoding)[0].caption
            for path in paths] == [result.caption for result in together]
    assert [result.caption for result in method.caption(paths, batch_size=3, **decoding)] == [
        result.caption for result in together
    ]


def test_tables_are_the_nearest_entries(load, paths):
    method = load(table="topk")
    features = method.features(paths)
    vectors = method.clip.encode_texts(method.entries)
    for image, table in zip(features, method.tables(features)):
        cosines = vectors @ image
        best = cosines.topk(method.topk)
        assert [cosine for _, cosine in table] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert all(cosines[method.entries.index(entry)].item() == pytest.approx(cosine, abs=1e-5)
                   for entry, cosine in table)


def test_tables_of_many_images_are_the_same_in_bfloat16(load, method, paths, monkeypatch):
    many, features = load(dtype="bfloat16"), method.features(paths)
    monkeypatch.setattr(models, "MANY", 1)
    assert many.tables(features) == method.tables(features)


@pytest.mark.parametrize("lm_weight, order", [(0.0, "acdb"), (0.1, "cadb")])
def test_candidates_are_ranked_by_clip_and_where_it_ties_by_likelihood(
        method, monkeypatch, lm_weight, order):
    candidates, cosines = {"d": -3.0, "c": -1.0, "b": -2.0, "a": -2.5}, [0.3, 0.3 + 1e-7, 0.1, 0.4]
    monkeypatch.setattr(models, "rescore", lambda *_: [cosines])
    [result] = method.choose(torch.zeros(1, 4), [[("dog", 0.2)]], [candidates], lm_weight=lm_weight)
    assert "".join(text for text, *_ in result.candidates) == order and result.caption == order[0]


@pytest.mark.parametrize("weight, order", [(0.0, [0, 1, 2]), (0.06, [1, 0, 2]), (0.3, [1, 2, 0])])
def test_a_candidate_loses_for_each_word_that_it_says_again(method, monkeypatch, weight, order):
    texts = ["a red pizza, two Pizzas and a pizza", "a dog on a red box", "the dog and the dogs"]
    monkeypatch.setattr(models, "rescore", lambda *_: [[0.4, 0.3, 0.2]])
    [result] = method.choose(torch.zeros(1, 4), [[("dog", 0.2)]], [dict.fromkeys(texts, -1.0)],
                             repeat_weight=weight)
    assert [text for text, *_ in result.candidates] == [texts[i] for i in order]
    assert [cosine for _, cosine, _ in result.candidates] == [
        pytest.approx(0.4 - 0.1 * i) for i in order]  # CLIP's own


def test_a_noun_of_the_table_that_no_candidate_says_is_inserted():
    table = [(entry, 0.3) for entry in ("dog", "penguins", "penguin", "red hat", "sitting", "two",
                                        "owl", "sea", "tree", "house")]
    drafts = {"a small Dog in the sea": -1.0, "two dogs": -2.0}
    made = insertions(drafts, table)
    assert {text: value for text, value in made.items() if "penguin" in text} == {
        "a penguin in the sea": -1.0, "a small Dog in the sea and a penguin": -1.0,
        "two penguins": -2.0, "two dogs and a penguin": -2.0}
    assert "an owl in the sea" in made and "two trees" in made
    assert not any("house" in text for text in made)  # at most three
    assert set(insertions({"two dogs": -1.0}, [("unicorn", 0.3)])) == {
        "two unicorns", "two dogs and a unicorn"}
    assert insertions({}, table) == insertions(drafts, table[:2]) == {}
    many = {f"a dog {'very ' * i}far": -i for i in range(20)}
    assert set(insertions(many, table).values()) == set(range(0, -10, -1))  # the likeliest ten


@pytest.mark.parametrize("cost, best", [(None, 0), (0.0, 1), (0.02, 1), (0.2, 0)])
def test_an_insertion_is_chosen_where_it_fits_better_by_its_cost(method, monkeypatch, cost, best):
    table, texts = [[("penguin", 0.3), ("dog", 0.2)]], ["a dog", "a penguin", "a dog and a penguin"]
    cosines = dict(zip(texts, (0.3, 0.4, 0.2)))
    monkeypatch.setattr(models, "rescore", lambda clip, features, candidates: [
        [cosines[text] for text in each] for each in candidates])
    [result] = method.choose(torch.zeros(1, 4), table, [{"a dog": -1.0}], insert_cost=cost)
    assert (result.caption, result.score) == (texts[best], cosines[texts[best]])  # CLIP's own
    assert len(result.candidates) == (1 if cost is None else 3)
    banned = method.with_words(ban="dog and a penguin")
    [result] = banned.choose(torch.zeros(1, 4), table, [{"a dog": -1.0}], insert_cost=0.0)
    assert [text for text, *_ in result.candidates] == ["a penguin", "a dog"]


@pytest.mark.parametrize("prefix", ["", "a photo of "])
def test_added_words_are_those_of_a_cache_laid_over_it(script, load, cache, paths, tmp_path,
                                                       prefix):
    words = ["Geoff Hinton", "penguin", "a  penguin\n"]
    (tmp_path / "words.txt").write_text("\n".join(" ".join(word.split()) for word in words))
    names = {"base": tmp_path / "base", "mine": tmp_path / "mine"}
    for name, entries in (("base", cache.textfile), ("mine", tmp_path / "words.txt")):
        run = script("compute_cache", "--entries", entries, "--textfile", f"{names[name]}.txt",
                     "--embfile", f"{names[name]}.npy", "--clip_model", CLIP, "--prefix", prefix)
        assert run.code == 0, run.err
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    added = load(textfile=[f"{names['base']}.txt"], embfile=None)
    assert added.add_words(words) == ["Geoff Hinton", "penguin", "a penguin"]
    assert added.add_words([*words, added.entries[0], " "]) == []
    laid = load(textfile=[f"{name}.txt" for name in names.values()], embfile=None)
    assert added.entries == laid.entries
    torch.testing.assert_close(added.embeddings[:], laid.embeddings[:], atol=1e-6, rtol=0)
    assert [result.caption for result in added.caption(paths)] == [
        result.caption for result in laid.caption(paths)
    ]
    assert any("penguin" in entry for result in added.caption(paths) for entry, _ in result.table)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_words_that_are_banned_or_too_long_are_refused(load):
    method = load(ban=["penguin"])
    for word in ("a Penguin", "word " * 3000):
        with pytest.raises(InputError):
            method.add_words(["a dog", word])
    assert not any("penguin" in entry for entry in method.entries)


def test_only_these_words_and_one_that_is_added(load, method, paths):
    few = load(only=method.entries[:3])
    few.add_words(["penguin"])
    [result] = few.caption(paths[:1])
    assert {entry for entry, _ in result.table} == {*method.entries[:3], "penguin"}


def test_images_are_paths_or_pictures(method, paths, tmp_path):
    pictures = [read_image(path) for path in paths]
    assert [r.caption for r in method.caption(pictures)] == [
        r.caption for r in method.caption(map(str, paths))
    ]
    assert method.caption([Image.new("L", (40, 30))])[0].table
    assert method.caption([]) == [] and method.features([]).shape == (0, method.clip.dim)
    (tmp_path / "none.png").write_text("no picture")
    for path in (tmp_path / "none.png", tmp_path / "missing.png"):
        with pytest.raises(InputError, match=path.name):
            method.caption([path])


@pytest.mark.parametrize("changes", [
    {"num_beams": 0}, {"num_return_sequences": 4}, {"temperature": 0.0},
    {"temperature": float("nan")}, {"top_p": 1.5}, {"lm_weight": float("inf")},
    {"repeat_weight": float("nan")}, {"insert_cost": float("inf")}], ids=str)
def test_settings_that_cannot_work_are_refused_at_once_and_later(load, method, paths, changes):
    with pytest.raises(InputError):
        load(clip_model="is not loaded", **changes)
    with pytest.raises(InputError):
        method.caption(paths[:1], **changes)


def test_files_that_are_missing_are_named(load, tmp_path, monkeypatch):
    for changes, name in (({"ckpt": "no.safetensors"}, "no.safetensors"), ({
            "embfile": ["no.npy"]
    }, "no.npy"), ({"textfile": ["a.txt", "b.txt"]}, "pairs")):
        with pytest.raises(InputError, match=name):
            load(**changes)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no cache here"):
        load(textfile=None, embfile=None)


def test_both_models_run_on_the_device_that_is_chosen(load, monkeypatch):
    gpu = torch.device("meta")  # stands for one
    for name in ("Clip", "Captioner", "load_checkpoint", "read_cache"):
        monkeypatch.setattr(models, name, mock.MagicMock())
    monkeypatch.setattr(models, "choose_device", {"auto": gpu}.get)
    models.read_cache.return_value = [], mock.MagicMock()
    load(device="auto")
    assert models.Clip.call_args.args[1] is models.Captioner.call_args.args[1] is gpu


def test_one_value_is_a_list_of_one(load, method, paths, cache, checkpoint):
    one = load(textfile=str(cache.textfile), embfile=None)
    assert one.add_words("a penguin") == ["a penguin"]
    [result] = method.caption(paths[:1])
    assert method.caption(str(paths[0])) == method.caption(paths[0]) == [result]
    [picture] = method.caption(Image.open(paths[0]))
    assert picture.caption == result.caption


def test_words_of_a_file_are_read_as_the_flags_do(load, tmp_path):
    (tmp_path / "words.txt").write_text("red\nblue\n")
    for words in (tmp_path / "words.txt", str(tmp_path / "words.txt")):
        assert load(only=words).entries == load(only=["red", "blue"]).entries
        assert load(ban=words).entries == load(ban=["red", "blue"]).entries
    for words in ("red", tmp_path / "none.txt"):
        with pytest.raises(InputError, match="there is no list of words"):
            load(ban=words)


@pytest.mark.parametrize("call", [
    lambda method, paths: method.add_words([1]),
    lambda method, paths: method.add_words(["red", None]),
    lambda method, paths: method.caption([b"bytes"]), lambda method, paths: method.caption([5]),
    lambda method, paths: method.caption(paths[:2], ids=[1]),
    lambda method, paths: method.caption(paths[:2], ids=[1], do_sample=True),
    lambda method, paths: method.caption(paths[:2], batch_size=0),
    lambda method, paths: method.caption(paths[:2], batch_size=-1),
    lambda method, paths: method.caption(Image.new("RGB", (0, 9)))], ids=range(9))
def test_what_cannot_be_captioned_or_added_is_one_sentence(method, paths, call):
    with pytest.raises(InputError) as error:
        call(method, paths)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("changes", [
    {"topk": 0}, {"topk": -3}, {"maxlen_enc": 0}, {"textfile": []}, {"embfile": []}], ids=str)
def test_sizes_and_files_that_cannot_work_are_refused(load, changes):
    with pytest.raises(InputError):
        load(**changes)


@pytest.mark.parametrize("name", ["turned.jpg", "clear.png", "grey16.png"])
def test_an_opened_image_is_captioned_as_its_file(method, tmp_path, paths, name):
    path, picture = tmp_path / name, read_image(paths[0])
    if name == "turned.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(path, exif=exif)
    elif name == "clear.png":
        picture.putalpha(picture.convert("L"))
        picture.save(path)
    else:
        grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        Image.fromarray(grey).save(path)
    with Image.open(path) as file:
        assert torch.equal(method.features([file]), method.features([path]))
        assert torch.equal(method.features([file]), method.features([path]))  # it stays as it is


@pytest.mark.slow
def test_nothing_of_transformers_is_changed_by_the_import():
    code = ("from transformers.utils import logging; level = logging.get_verbosity(); "
            "import model; assert logging.get_verbosity() == level "
            "and logging.is_progress_bar_enabled()")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_images_have_no_tables_by_an_index_either(method, monkeypatch):
    def nearest(queries, *_):  # as Index.search fails where there is no query
        assert len(queries)
    monkeypatch.setattr(method, "search", nearest)
    assert method.tables(torch.empty(0, method.clip.dim)) == []


@pytest.mark.slow
def test_a_program_with_processes_of_its_own_is_not_joined(cache, tmp_path):
    """Warnings of the library leave torchrun's variables to the program that uses it."""
    for file in (cache.textfile, cache.embfile):  # without a description, which is warned of
        (tmp_path / file.name).write_bytes(file.read_bytes())
    code = f"""if True:
        import os
        from model import Model
        Model.load({CLIP!r}, {BART!r}, "none", {str(tmp_path / "cache.txt")!r}, device="cpu")
        from torch import distributed
        assert not distributed.is_initialized() and os.environ["WORLD_SIZE"] == "2"
    """
    for rank in ("0", "1"):
        variables = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": "9"}
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | variables,
                             capture_output=True, text=True, timeout=100)
        assert run.returncode == 0, run.stderr
        assert ("is missing" in run.stderr) == (rank == "0")
