"""Names from photos: the formulas against plain ones, the file, and the scripts from end to end."""

import os
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BART, CLIP, commands, flags
from numpy.linalg import inv

from antarctic import lessons, teaching
from antarctic.cache import read_cache
from antarctic.errors import InputError
from antarctic.images import read_image
from antarctic.taught import Taught, Thing, checked_thing
from antarctic.taught_files import Notes, joined, read_taught, taught_path, write_taught
from model import Model
from snowglobe import scenes

DIM = 12


def images(n, seed, towards=(), strength=0.6):
    """Unit vectors like CLIP's of images, with a direction in common. towards: numbers of the
    directions in which these differ from others."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, DIM)) * np.linspace(0.1, 0.4, DIM)
    vectors[:, 0] += 1
    for number in towards:
        vectors += strength * np.random.default_rng(1000 + number).normal(size=DIM)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def notes_of(*things, others=300):
    """Notes of synthetic things: pairs of a name and its photos."""
    return Notes("clip", images(others, 0), [checked_thing(name, "a cat") for name, _ in things],
                 [(photos, photos[:0]) for _, photos in things])


def fitted(notes, embeddings=None):
    """A Taught of notes, in tables of 5 entries of a cache, or of a synthetic one."""
    return Taught(notes).fitted(torch.from_numpy(images(50, 20)) if embeddings is None
                                else embeddings, 5)


# ------------------------------------------------------------------------------------ the formulas

def test_directions_and_bias_are_their_formulas():
    others, photos, apart = images(300, 1), images(5, 2, [1]), images(3, 3, [2]).astype(np.float64)
    spread = teaching.spread_of(others)
    mean, plain = others.astype(np.float64).mean(0), np.cov(others.astype(np.float64).T, ddof=0)
    covariance = .9 * plain + .1 * np.trace(plain) / DIM * np.eye(DIM)
    assert np.allclose(spread.covariance, covariance)
    for rival in apart:
        covariance = covariance + np.outer(rival - mean, rival - mean)
    w = inv(covariance) @ (photos.astype(np.float64).mean(0) - mean)
    assert np.allclose(teaching.directions(spread, photos, apart).mean(0), w)
    u = inv(spread.covariance + np.outer(mean, mean)) @ mean
    assert np.allclose(teaching.bias_direction(spread), u / (u @ mean))
    assert np.abs(others @ teaching.bias_direction(spread) - 1).mean() < 0.1


def test_each_photo_is_scored_by_the_others():
    others, photos = images(300, 1), images(5, 2, [1])
    spread = teaching.spread_of(others)
    scores = teaching.left_one_out(spread, photos, teaching.directions(spread, photos))
    for i, score in enumerate(scores):
        w = teaching.directions(spread, np.delete(photos, i, 0)).mean(0)
        assert np.isclose(score, (photos[i] - spread.mean) @ w)


def test_the_share_of_few_others_is_that_of_ledoit_and_wolf():
    others = images(20, 4).astype(np.float64)
    centred = others - others.mean(0)
    covariance = centred.T @ centred / 20
    sphere = np.trace(covariance) / DIM * np.eye(DIM)
    noise = sum(((np.outer(row, row) - covariance) ** 2).sum() for row in centred) / 20 ** 2
    share = min(1, noise / ((covariance - sphere) ** 2).sum())
    spread = teaching.spread_of(others)
    assert .1 < share == pytest.approx(spread.share)
    assert np.allclose(spread.covariance, (1 - share) * covariance + share * sphere)


def test_a_row_scores_the_threshold_as_the_last_entry_and_a_typical_photo_as_the_first():
    others, photos = images(400, 5), images(5, 6, [1])
    spread, [lesson] = teaching.learn_all(others, [(photos, photos[:0])])
    assert (lesson.others > lesson.threshold).mean() <= teaching.WRONGLY
    v = teaching.row_of(spread, lesson, 0.2, 0.3)
    assert v.dtype == np.float32
    u = teaching.bias_direction(spread)
    for wanted, score in ((0.2, lesson.threshold), (0.3, lesson.typical)):
        # An image of this score: the mean, moved along w, but not along u.
        step = lesson.w - u * (lesson.w @ u) / (u @ u)
        x = spread.mean + step * score / (step @ lesson.w)
        assert v @ x == pytest.approx(wanted, abs=1e-4)
    assert v @ photos.mean(0) > 0.2 > v @ others.mean(0)


def test_things_that_are_taught_together_do_not_take_each_others_names():
    others, embeddings = images(300, 0), torch.from_numpy(images(50, 9))
    tom, rex = images(5, 2, [1]), images(5, 3, [1, 4])  # they have much in common
    apart = fitted(notes_of(("Tom", tom)), embeddings)
    both = fitted(notes_of(("Tom", tom), ("Rex", rex)), embeddings)
    more = torch.from_numpy(images(40, 8, [1, 4]))  # of Rex
    takes = [((more @ taught.rows[0]) > taught.least).float().mean() for taught in (apart, both)]
    assert takes[0] > 0.3 > 0.1 > takes[1]
    assert ((more @ both.rows[1]) > both.least).float().mean() > 0.7
    unlike = Notes("clip", others, [checked_thing("Tom", "a cat")], [(tom, rex)])  # --not
    taught = fitted(unlike, embeddings)
    assert ((more @ taught.rows[0]) > taught.least).float().mean() < takes[0]


def test_another_cache_and_size_of_tables_fits_the_rows_anew():
    notes = notes_of(("Tom", images(5, 2, [1])), ("Rex", images(5, 3, [2])))
    caches = [torch.from_numpy(images(50, seed)) for seed in (20, 21)]
    first = fitted(notes, caches[0])
    other, fresh = first.fitted(caches[1], 3), Taught(notes).fitted(caches[1], 3)
    assert torch.equal(other.rows, fresh.rows) and other.least == fresh.least
    assert not torch.equal(other.rows, first.rows) and other.key() != first.key()
    assert [thing.name for thing in first.fitted(caches[0], 5, only=["tom"]).things] == ["Tom"]
    assert first.fitted(caches[0], 5, only=["dog"]).things == []


def test_where_nothing_was_taught_tables_candidates_and_scores_stay():
    taught, table = fitted(None), [("dog", .3), ("cat", .2)]
    drafts = {"a dog and two cats": -1.0}
    assert taught.lay_over([table], torch.from_numpy(images(1, 4))) == [table]
    assert taught.spoken([table]) == [table]
    assert taught.with_twins([table], [drafts]) == [drafts]
    assert taught.plain([table], [drafts]) == ([[*drafts]], [[0.0]])
    assert taught.entries_among(["dog"]) == ["dog"] and taught.entries_among(None) is None


@pytest.mark.parametrize("entries, topk", [(50, 1), (1, 5)])
def test_a_table_of_one_entry_names_what_was_taught_and_little_else(entries, topk):
    notes = notes_of(("Tom", images(5, 2, [1])))
    taught = Taught(notes).fitted(torch.from_numpy(images(entries, 20)), topk)
    named = [(torch.from_numpy(vectors) @ taught.rows[0] > taught.least).float().mean()
             for vectors in (notes.others, images(60, 8, [1]))]
    assert named[0] < .1 and named[1] > .7  # the last entry of its tables is the first


# --------------------------------------------------------------------------------------- the words

@pytest.mark.parametrize("name, phrase, text, twin, spoken", [
    ("Tom", "a cat", "a small orange cat on a bed", "Tom on a bed", "a cat on a bed"),
    ("Tom", "a cat", "we see a dog and a cat", "we see a dog and Tom", "we see a dog and a cat"),
    ("Tom", "a cat", "a cat, a cat and a dog", "Tom, a cat and a dog", "a cat, a cat and a dog"),
    ("Tom", "a cat", "two cats sitting", None, None),
    ("Tom", "a cat", "a catapult", None, None),
    ("an owl", "a bird", "a red bird in a tree", "an owl in a tree", "a bird in a tree"),
    ("an owl", "a bird", "a group of red birds", "a group of owls", "a group of birds"),
    (r"A\1", "a cat", "a cat sits", r"A\1 sits", "a cat sits")])
def test_a_twin_has_the_name_in_place_of_the_first_class_word(name, phrase, text, twin, spoken):
    thing = checked_thing(name, phrase)
    assert thing.called(text) == ([twin] if twin else [])
    if twin:
        assert thing.spoken(twin) == spoken


def test_where_no_candidate_has_the_class_word_any_noun_phrase_may_be_the_thing():
    taught = fitted(notes_of(("Tom", images(5, 2, [1]))))
    table = [("Tom", taught.least + .1), ("dog", .3)]
    drafts = {"a red dog by a house in the snow": -1.0}
    [twins] = taught.with_twins([table], [drafts])
    assert set(twins) == {*drafts, "Tom by a house in the snow", "a red dog by Tom in the snow"}
    [texts], [added] = taught.plain([table], [twins])
    assert texts == ["a red dog by a house in the snow", "a cat by a house in the snow",
                     "a red dog by a cat in the snow"]
    assert added == pytest.approx([0, .2, .2])
    assert taught.with_twins([[("dog", .3)]], [drafts]) == [drafts]  # Tom is not there
    assert taught.spoken([[("Tom", .4), ("cat", .3), ("dog", .2)]]) == [[("cat", .4), ("dog", .2)]]


# ---------------------------------------------------------------------------------------- the file

def same(one, other):
    return (one.things == other.things and np.array_equal(one.others, other.others)
            and all(np.array_equal(*pair) for each in zip(one.vectors, other.vectors)
                    for pair in zip(*each)))


def test_what_is_written_is_read_and_a_changed_byte_is_told_of(tmp_path):
    notes = notes_of(("Tom", images(5, 2, [1])), ("an owl", images(4, 3, [2])))
    embfile = tmp_path / "c.npy"
    assert read_taught(embfile) is None
    write_taught(embfile, notes)
    assert same(read_taught(embfile, "clip", DIM), notes)
    for wrong, named in ((("other", DIM), "Tom, an owl"), (("clip", 99), "dimensions")):
        with pytest.raises(InputError, match=named):
            read_taught(embfile, *wrong)
    whole, rng = taught_path(embfile).read_bytes(), random.Random(0)
    for place in [*range(0, 400, 7), *rng.sample(range(len(whole)), 40)]:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        taught_path(embfile).write_bytes(changed)
        try:
            assert same(read_taught(embfile, "clip", DIM), notes)  # a space of the header
        except InputError as error:
            assert "c.npy.taught" in str(error)
    taught_path(embfile).write_bytes(whole[:-9])
    with pytest.raises(InputError, match="damaged"):
        read_taught(embfile)


def test_a_forged_file_is_told_of_by_its_name(tmp_path):
    embfile, photos = tmp_path / "c.npy", images(5, 2, [1])
    notes = notes_of(("Tom", photos))
    forged = [notes._replace(others=notes.others * 1e30), notes._replace(others=notes.others * 0),
              notes._replace(vectors=[(photos, photos * np.nan)]),
              notes._replace(things=[Thing("T|m", "a cat")]),
              notes._replace(things=[Thing("Tom", "cat")])]
    for each in forged:
        write_taught(embfile, each)
        with pytest.raises(InputError, match="c.npy.taught is damaged"):
            read_taught(embfile, "clip", DIM)
    taught_path(embfile).unlink()
    taught_path(embfile).symlink_to("nowhere")
    with pytest.raises(InputError, match="c.npy.taught"):  # not as if nothing had been taught
        read_taught(embfile)


def test_photos_that_are_not_apart_from_others_make_no_rows():
    alike = images(4096, 0)
    for photos in (-images(5, 2), np.repeat(alike[:1], 5, 0), np.repeat([alike.mean(0)], 5, 0)):
        try:
            taught = fitted(notes_of(("Tom", photos)), torch.from_numpy(alike[:50]))
            assert taught.rows.isfinite().all()
        except InputError as error:
            assert "Tom" in str(error) and "--untaught" in str(error)
    even = np.tile(alike[:1], (300, 1))
    with pytest.raises(InputError, match="Tom are not apart"):
        fitted(notes_of(("Tom", even[:5]))._replace(others=even), torch.from_numpy(alike[:50]))


def test_a_killed_write_leaves_what_was_taught_before(tmp_path, monkeypatch):
    embfile, before = tmp_path / "c.npy", notes_of(("Tom", images(5, 2, [1])))
    write_taught(embfile, before)

    def killed(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_taught(embfile, notes_of(("Rex", images(5, 3, [2]))))
    assert same(read_taught(embfile), before)


def test_an_entry_of_the_text_of_a_name_is_not_the_thing():
    taught = fitted(notes_of(("an owl", images(5, 2, [1]))))
    table = [("owl", 0.9), ("dog", 0.8), ("tree", 0.7)]
    shown, other = torch.from_numpy(images(2, 3, [1])[:1]), torch.from_numpy(images(1, 4))
    [without], [named] = taught.lay_over([table], other), taught.lay_over([table], shown)
    assert without == table[1:] and taught.here(without) == []
    alone = [("owl", taught.least - 0.1)]
    assert taught.lay_over([alone], other) == [alone] and taught.here(alone) == []
    assert [score for entry, score in named if entry == "owl"] == [
        pytest.approx((shown @ taught.rows.T).item())]


def test_a_name_is_known_with_and_without_its_article_and_in_any_case():
    notes, embeddings = notes_of(("an owl", images(5, 2, [1]))), torch.from_numpy(images(50, 20))
    for line in ("an owl", "owl", "Owl", "the owl"):
        taught = fitted(notes).fitted(embeddings, 5, only=[line, "dog"])
        assert [thing.name for thing in taught.things] == ["an owl"]
        assert taught.entries_among([line, "dog"]) == ["dog"] and taught.noun_like(line) == "owl"
        other = torch.from_numpy(images(1, 4))
        assert taught.lay_over([[(line, .9), ("dog", .8)]], other) == [[("dog", .8)]]


def test_names_that_differ_in_case_alone_are_one(script, mine, photos):
    others = {"others": [photos / "others"]}
    for name in ("Zo\u00e9", "ZOE\u0301"):
        run = script("compute_cache", "--teach", name, photos / "Tom", "--as", "a cat",
                     *teaching_flags(mine, **others))
        assert run.code == 0, run.err
    assert [thing.name for thing in read_taught(mine.embfile).things] == ["ZOE\u0301"]
    run = script("compute_cache", *teaching_flags(mine, untaught=["Bo"]))
    assert run.code == 2 and "knows ZO" in run.err
    run = script("compute_cache", *teaching_flags(mine, add=["x"], **others))
    assert run.code == 2 and "nothing is taught" in run.err.replace("\n", " ")
    assert script("compute_cache", *teaching_flags(mine, untaught=["zo\u00e9"])).code == 0
    assert not taught_path(mine.embfile).exists()


def test_what_lies_beside_several_caches_is_one():
    tom, owl = ("Tom", images(5, 2, [1])), ("an owl", images(4, 3, [2]))
    again = "Tom", images(5, 7, [3])
    both = joined([notes_of(tom), None, notes_of(owl, again)])
    assert [thing.name for thing in both.things] == ["Tom", "an owl"]
    assert np.array_equal(both.vectors[0][0], again[1]) and len(both.others) == 300
    assert joined([None]) is None
    # Photos of one file are not among the others of another.
    holds = notes_of(owl)._replace(others=np.concatenate([images(300, 0), tom[1]]))
    assert len(joined([holds, notes_of(tom)]).others) == 300
    every = notes_of(("Rex", images(300, 0)))  # but where too few were left, they stay
    assert len(joined([every, notes_of(tom)]).others) == 300


# ------------------------------------------------------------------------------------- the scripts

@pytest.fixture
def mine(cache, tmp_path):
    """A copy of the cache, whose paths are textfile and embfile."""
    for suffix in (".txt", ".npy", ".npy.json"):
        shutil.copy(cache.textfile.with_suffix(suffix), tmp_path / f"c{suffix}")
    return SimpleNamespace(textfile=tmp_path / "c.txt", embfile=tmp_path / "c.npy")


def teaching_flags(mine, **options):
    return flags({"clip_model": CLIP, **vars(mine), **options})


def test_teach_caption_list_and_forget(script, world, mine, checkpoint, photos, tmp_path):
    sampler = commands(world, mine, checkpoint)["sampler"]

    def captions(name):
        out = tmp_path / name
        run = script("sampler", *sampler(out, datadir=None, images=[photos / "new"]))
        assert run.code == 0, run.err
        return (out / "preds.txt").read_text(), (out / "details.jsonl").read_bytes()

    before = captions("before")
    run = script("compute_cache", "--teach", "Tom", photos / "Tom", "--as", "a cat", "--teach",
                 "Flora", photos / "Flora", "--as", "a rabbit",
                 *teaching_flags(mine, others=[photos / "others"]))
    assert run.code == 0, run.err
    assert "of 5 of its photos" in run.out and "of 120 others" in run.out
    assert "nearest other thing: Flora" in run.out and "only 120 photos" in run.err
    named, details = captions("taught")
    assert named.count("Tom") >= 3 and "Flora" not in named
    assert b'["Tom", ' in details
    run = script("compute_cache", *teaching_flags(mine, taught=True))
    assert run.out.splitlines() == ["Tom, a cat: 5 photos, apart from 0 photos",
                                    "Flora, a rabbit: 5 photos, apart from 0 photos"]
    # A name that is taught later joins those; the others are kept.
    run = script("compute_cache", "--teach", "a hare", photos / "Flora", "--as", "a rabbit",
                 *teaching_flags(mine, features=[tmp_path / "taught"]))
    assert run.code == 2 and "there are 4" in run.err  # photos, whose vectors are kept there
    assert script("compute_cache", *teaching_flags(mine, untaught=["Tom", "Bo"])).code == 2
    run = script("compute_cache", *teaching_flags(mine, untaught=["Tom", "Flora"]))
    assert run.code == 0 and not taught_path(mine.embfile).exists()
    assert captions("forgotten") == before  # to the byte


def test_a_model_names_what_its_cache_was_taught(script, mine, checkpoint, photos):
    run = script("compute_cache", "--teach", "Tom", photos / "Tom", "--as", "a cat",
                 *teaching_flags(mine, others=[photos / "others"]))
    assert run.code == 0, run.err
    model = Model.load(CLIP, BART, checkpoint, mine.textfile, mine.embfile, device="cpu")
    features = model.features(sorted((photos / "new").iterdir()))
    tables = model.tables(features)
    assert sum("Tom" in dict(table) for table in tables) >= 3
    assert {len(table) for table in tables} == {model.topk}
    assert all("Tom" not in dict(table) for table in model.with_words(ban="Tom").tables(features))
    only = model.with_words(only=["Tom", "dog", "cat"], topk=2)
    assert only.taught.least != model.taught.least and "Tom" not in only.entries
    assert len(only.entries) == 2 and len(only.tables(features)[0]) == 2
    entries, embeddings = read_cache([mine.textfile], [mine.embfile], model.clip.identity)
    assert entries == model.entries and len(embeddings) == len(entries)


def test_a_name_that_is_taught_in_memory_is_that_of_the_command(script, mine, checkpoint, photos):
    run = script("compute_cache", "--teach", "Tom", photos / "Tom", "--as", "a cat",
                 *teaching_flags(mine, others=[photos / "others"]))
    assert run.code == 0, run.err
    loaded = Model.load(CLIP, BART, checkpoint, mine.textfile, mine.embfile, device="cpu")
    taught_path(mine.embfile).unlink()
    model = Model.load(CLIP, BART, checkpoint, mine.textfile, mine.embfile, device="cpu")
    own, others, new = (sorted((photos / name).iterdir()) for name in ("Tom", "others", "new"))
    features, plain = model.features(new), model.with_words()
    before = plain.tables(features)
    verdict = model.teach("Tom", "a cat", own, others)
    assert f"{verdict.named} of 5 of its photos" in run.out and "of 120 others" in run.out
    assert torch.nn.functional.cosine_similarity(model.taught.rows, loaded.taught.rows) > .999
    tables = model.tables(features)
    assert [[entry for entry, _ in table] for table in tables] == [
        [entry for entry, _ in table] for table in loaded.tables(features)]
    assert plain.tables(features) == before and not plain.taught.things  # it is in memory
    score, rank = model.places(features[0], ["Tom"])[0]
    assert rank == 1 and score == pytest.approx(dict(tables[0])["Tom"])
    # More names join it, from PIL images and vectors; none comes from others of other images.
    images = [read_image(path) for path in sorted((photos / "Flora").iterdir())]
    assert model.teach("Flora", "a rabbit", images, model.features(others)).nearest[0] == "Tom"
    assert [thing.name for thing in model.taught.things] == ["Flora", "Tom"]
    for name, wrong, named in (("Tom", own[:2], "there are 2"), ("Flora", own, "those of Tom"),
                               ("Bo", own, "those of Tom")):
        with pytest.raises(InputError, match=named):
            model.with_words().teach(name, "a cat", wrong)
    with pytest.raises(InputError, match="banned"):
        model.with_words(ban="Bo").teach("Bo", "a cat", own, others)


def test_features_teach_what_their_images_do(mine, checkpoint, photos):
    model = Model.load(CLIP, BART, checkpoint, mine.textfile, mine.embfile, device="cpu")
    own, others = (sorted((photos / name).iterdir()) for name in ("Tom", "others"))
    expected = model.with_words().teach("an owl", "a bird", own, others)
    features = model.features(own), model.features(others)
    for own_type, others_type in ((torch.float64, torch.float64), (torch.float32, torch.float64)):
        one = model.with_words()
        given = [each.clone().to(kind).requires_grad_()
                 for each, kind in zip(features, (own_type, others_type))]
        assert one.teach("an owl", "a bird", *given)[:5] == expected[:5]
        assert one.tables(features[0])[0][0][0] == "owl"
    places = one.places(features[0][0], ["owl", "an owl", "Owl"])
    assert places == places[:1] * 3 and places[0][1] == 1
    # Without others it takes those of earlier names, and says which of them would be wrong.
    wrong = one.teach("Flora", "a rabbit", sorted((photos / "Flora").iterdir())).wrong
    assert wrong and all(0 <= number < 120 for number in wrong)
    only = one.with_words(only=["dog", "sea", "tree"])  # the names are not left
    only.teach("Bo", "a rabbit", sorted((photos / "Flora").iterdir()))
    assert [thing.name for thing in only.taught.things] == ["Bo"]
    for wrong in (features[0][:, :9], features[0][0], features[0] * 7, features[0] * np.nan):
        with pytest.raises(InputError, match="unit vectors"):
            model.teach("Tom", "a cat", wrong, features[1])
    for name, phrase, wrong, named in (("Tom", "a cat", None, "there are 0"),
                                       (None, "a cat", own, "a name must be"),
                                       ("Tom", None, own, "a class word must be")):
        with pytest.raises(InputError, match=named):
            model.with_words(ban="Bo").teach(name, phrase, wrong, features[1])
    assert not model.taught.things


def test_photos_of_a_taught_thing_are_never_among_the_others(script, mine, photos, tmp_path,
                                                             monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there are no results
    for name in ("others", "Tom", "Flora"):
        shutil.copytree(photos / name, tmp_path / "all" / name)
    (tmp_path / "all" / "bad.png").write_bytes(b"no image")  # of hundreds of others one may be bad
    everything = {"others": [tmp_path / "all"]}
    for name, options, count in (("Flora", everything, 125), ("Tom", {}, 120),
                                 ("Flora", everything, 120)):
        run = script("compute_cache", "--teach", name, photos / name, "--as", "a cat",
                     *teaching_flags(mine, **options))
        assert run.code == 0, run.err
        assert ("1 image could not be read and was skipped" in run.err) == bool(options)
        notes = read_taught(mine.embfile)
        own = np.concatenate([vectors for vectors, _ in notes.vectors])
        assert len(notes.others) == count and (notes.others @ own.T).max() < .9999


def test_of_very_many_others_some_are_encoded(photos, tmp_path, monkeypatch):
    encoded = []
    monkeypatch.chdir(tmp_path)  # where nothing is kept
    monkeypatch.setattr(lessons, "MOST_OTHERS", 25)
    monkeypatch.setattr(lessons, "encode_files", lambda clip, paths, *_: encoded.extend(paths) or (
        [str(path).encode() for path in paths], dict.fromkeys(
            [str(path).encode() for path in paths]), {}))
    found = lessons.other_photos(None, None, [photos / "others"])
    assert 25 < len(found) == len(encoded) <= 50


def test_no_twin_holds_a_banned_word(mine, checkpoint):
    model = Model.load(CLIP, BART, checkpoint, mine.textfile, mine.embfile, device="cpu")
    rows = model.embeddings[:205].numpy()
    notes = Notes("", rows[:200], [checked_thing("an owl", "a cat")], [(rows[200:], rows[:0])])
    model.taught = Taught(notes).fitted(model.embeddings, model.topk)
    model = model.with_words(ban=["owls"])
    model.captioner.beam = lambda tokens, *_: [[("two cats and a cat", -1.0)] for _ in tokens]
    [candidates] = model.candidates([[("owl", 1.0), ("cat", .3)]])
    assert set(candidates) == {"two cats and a cat", "two cats and an owl"}


@pytest.mark.parametrize("name, phrase, changed, named", [
    ("Tom", None, {}, "an --as"),
    ("Tom", "cat", {}, "article"),
    ("T\nm", "a cat", {}, "a line"),
    ("Tom|Rex", "a cat", {}, "a line"),
    ("\N{CAT FACE}", "a cat", {}, "a letter or digit"),
    ("The Cat", "a cat", {}, "another one"),
    (__file__, "a cat", {}, "begins with the name"),
    (os.path.dirname(__file__), "a cat", {}, "begins with the name"),
    ("Tom", "a cat", {"photos": "none"}, "no image or folder"),
    ("Tom", "a cat", {"photos": "same"}, "there is 1"),
    ("Tom", "a cat", {"photos": "bad"}, "cannot be read"),
    ("Tom", "a cat", {"others": "new"}, "there are 4"),
    ("Tom", "a cat", {"others": "none"}, "--others names photos of other things"),
    ("Tom", "a cat", {"photos": "mixed"}, "not apart"),
])
def test_what_cannot_be_taught_is_refused(script, mine, photos, tmp_path, name, phrase, changed,
                                          named):
    same, bad, mixed = tmp_path / "same", tmp_path / "bad", tmp_path / "mixed"
    for folder in (same, bad, mixed):
        folder.mkdir()
    for i in range(5):
        shutil.copy(photos / "Tom" / "0.png", same / f"{i}.png")
        shutil.copy(photos / "Tom" / f"{i}.png", bad / f"{i}.png")
        scene, _ = scenes.split_scene("train2017", 8, i)  # five pictures of nothing in common
        scenes.draw_scene(scene).save(mixed / f"{i}.png")
    (bad / "0.png").write_bytes(b"no image")
    places = {"same": same, "bad": bad, "mixed": mixed}
    taken = places.get(changed.get("photos"), photos / changed.get("photos", "Tom"))
    as_ = ["--as", phrase] if phrase else []
    run = script("compute_cache", "--teach", name, taken, *as_,
                 *teaching_flags(mine, others=[photos / changed.get("others", "others")]))
    assert run.code == 2 and named in run.err.replace("\n", " "), run.err
    assert not taught_path(mine.embfile).exists()
