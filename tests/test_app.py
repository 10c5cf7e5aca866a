"""app.py: what the page computes against Model, its answers to programs, what it lets nobody do."""

import csv
import io
import json
import os
import shutil
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BART, CLIP, ROOT, flags
from PIL import Image

import app
from antarctic import cache_files, page, scan, taught
from antarctic.answers import Answers
from antarctic.cache import search
from antarctic.classroom import without_name
from antarctic.errors import InputError
from antarctic.files import file_sha256
from antarctic.lessons import other_photos
from antarctic.locks import locked
from antarctic.seen import vectors_of, where_of
from antarctic.studio import Stopped, Studio
from antarctic.taught import Thing
from antarctic.uploads import KEPT_SECONDS, Folder, examples_of, names_of, write_downloads
from antarctic.verdicts import Verdict
from antarctic.visitors import MOST_WORDS, Words, checked_dials, lines_of
from model import Caption, Model

HOSTILE = '<img src=x onerror="document.title=1">${document.title=2}{{3}}</style><script>'


@pytest.fixture(scope="module")
def method(cache):
    return Model.load(CLIP, BART, "none", cache.textfile, cache.embfile, device="cpu")


@pytest.fixture(scope="module")
def studio(method):
    return Studio(method)


@pytest.fixture(scope="module")
def penguin(world):
    return str(world / "out" / "000030000004.png")


@pytest.fixture(scope="module")
def client(served):
    from gradio_client import Client
    return Client(served.address, verbose=False, analytics_enabled=False)


def uploaded(path):
    from gradio_client import handle_file
    return handle_file(str(path))


# --------------------------------------------------------------------------- one's own vocabulary

@pytest.mark.parametrize("words", [
    Words(), Words(words=("penguin", "a red hat")), Words(ban=("beach", "sea")),
    Words(only=("penguin", "sea", "dog")), Words(("penguin",), ("sea", "penguin"), ("sea",))],
    ids=str)
def test_words_are_those_of_caches_and_flags(script, cache, method, studio, penguin, tmp_path,
                                             words):
    """The page's captions are those of a Model that was loaded with the words."""
    own = [*words.words, *words.only]
    textfile, embfile = [str(cache.textfile)], [str(cache.embfile)]
    if own:
        (tmp_path / "own.txt").write_text("\n".join(dict.fromkeys(own)))
        run = script("compute_cache", "--entries", tmp_path / "own.txt", "--textfile",
                     tmp_path / "o.txt", "--embfile", tmp_path / "o.npy", "--clip_model", CLIP)
        assert run.code == 0, run.err
        textfile.append(str(tmp_path / "o.txt"))
        embfile.append(str(tmp_path / "o.npy"))
    loaded = Model.load(CLIP, BART, "none", textfile, embfile, only=list(words.only) or None,
                        ban=list(words.ban) or None, device="cpu")
    before = list(method.entries)
    result, seconds = studio.caption(penguin, words)
    [expected] = loaded.caption([penguin], ids=[file_sha256(penguin)])
    assert (result.caption, seconds > 0) == (expected.caption, True)
    assert [entry for entry, _ in result.table] == [entry for entry, _ in expected.table]
    assert method.entries == before and method.banned is None


@pytest.mark.parametrize("words", [
    Words(), Words(words=("penguin",)), Words(ban=("beach", "sea")), Words(only=("sea", "dog"))],
    ids=str)
def test_a_cache_in_memory_changes_nothing(method, studio, penguin, monkeypatch, words):
    pytest.importorskip("faiss")
    monkeypatch.setattr(scan, "LEAST", 1)
    fast = Studio(method)
    assert isinstance(fast.model.search, scan.Scan) and method.search is search
    assert fast.caption(penguin, words)[0] == studio.caption(penguin, words)[0]
    assert fast.search(penguin, "sea", words) == studio.search(penguin, "sea", words)


def test_a_new_line_is_encoded_alone(studio, monkeypatch):
    clip, encoded = studio.model.clip, []
    encode = clip.encode_texts
    monkeypatch.setattr(clip, "encode_texts", lambda texts, *a: encoded.append(texts) or
                        encode(texts, *a))
    studio.with_words(Words(("one line", "two lines")))
    studio.with_words(Words(("one line", "two lines", "three lines")))
    assert encoded[-1] == ["three lines"]


@pytest.mark.parametrize("dials", [
    {"topk": 3}, {"num_beams": 5}, {"do_sample": True, "num_return_sequences": 20, "seed": 3},
    {"lm_weight": 0.5}], ids=str)
def test_dials_are_the_sampler_s(method, studio, penguin, dials):
    result, _ = studio.caption(penguin, dials=dials)
    changes = {name: value for name, value in dials.items() if name != "topk"}
    [expected] = method.with_words(topk=dials.get("topk")).caption(
        [penguin], ids=[file_sha256(penguin)], **changes)
    assert result == expected


@pytest.mark.parametrize("dials", [{"topk": 0}, {"topk": 10**9}, {"num_beams": None},
                                   {"temperature": "hot"}, {"top_p": float("nan")},
                                   {"num_return_sequences": 1e6}], ids=str)
def test_dials_that_cannot_work_are_one_sentence(studio, penguin, dials):
    with pytest.raises(InputError, match=next(iter(dials))):
        studio.caption(penguin, dials=dials)


def test_ranks_are_those_of_all_cosines(method, studio, penguin):
    feature = method.features([penguin])[0]
    cosines = method.embeddings[:] @ feature
    order = cosines.argsort(descending=True).tolist()
    for rank in (1, 7, len(order)):
        entry = method.entries[order[rank - 1]]
        [(cosine, place)] = method.places(feature, [entry])
        assert place == 1 + (cosines > cosines[order[rank - 1]]).sum()
        assert cosine == pytest.approx(cosines[order[rank - 1]].item(), abs=1e-6)
    found = studio.search(penguin, "penguin")
    assert not found["known"] and found["rank"] == 1 + (cosines > found["cosine"]).sum()
    after = studio.search(penguin, "penguin", Words(("penguin",)))
    assert after["known"] and after["rank"] == found["rank"]
    assert all("sea" in entry for entry, *_ in studio.search(penguin, "sea")["others"])


def test_saved_words_are_a_cache_that_the_command_uses(script, studio, cache, penguin, tmp_path):
    words = Words(("penguin", "a red hat"), (), ("sandy",))
    files = studio.save(words, tmp_path / "saved")
    assert studio.save(words, tmp_path / "saved") == files
    args = SimpleNamespace(textfile=[cache.textfile], embfile=[cache.embfile], clip_model=CLIP,
                           lm=BART, ckpt=None)
    command = app.command_of(args)(files).split()
    assert command[:4] == ["python", "sampler.py", "--images", "photos/"]
    run = script("sampler", "--images", penguin, *command[4:], "--savedir", tmp_path / "out")
    assert run.code == 0, run.err
    record = json.loads((tmp_path / "out" / "details.jsonl").read_text())
    assert record["caption"] == studio.caption(penguin, words)[0].caption
    with pytest.raises(InputError, match="nothing to save"):
        studio.save(Words(), tmp_path / "saved")


@pytest.fixture(scope="module")
def tuned(cache, checkpoint):
    """A Model whose captions are sentences, in which a name can stand."""
    return Model.load(CLIP, BART, checkpoint, cache.textfile, cache.embfile, device="cpu")


@pytest.fixture
def classroom(tuned, photos):
    """A Studio that knows photos/others."""
    return Studio(tuned, others=partial(other_photos, tuned.clip, None, [photos / "others"]))


def paths_in(folder):
    return sorted(map(str, folder.iterdir()))


def test_a_visitor_teaches_a_name_and_nobody_else_hears_of_it(classroom, tuned, photos, tmp_path,
                                                              monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nothing is kept
    tom, flora, new = (paths_in(photos / name) for name in ("Tom", "Flora", "new"))
    before = [classroom.caption(path)[0] for path in new]
    own_names, [verdict], wrong = classroom.teach(" Tom ", "a cat", tom)
    expected = tuned.with_words()
    told = expected.teach("Tom", "a cat", tom, paths_in(photos / "others"))
    assert (verdict.photos, verdict.others) == (told.photos, told.others) == (5, 120)
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in wrong)
    assert len(wrong) == min(8, len(verdict.wrong)) and "only 120 photos" in verdict.remarks[0]
    named = [classroom.caption(path, Words(own_names=own_names))[0] for path in new]
    assert sum("Tom" in result.caption for result in named) >= 3
    assert [[entry for entry, _ in result.table] for result in named] == [
        [entry for entry, _ in table] for table in expected.tables(expected.features(new))]
    found = classroom.search(new[0], "tom", Words(("TOM", "tom cat"), own_names=own_names))
    assert [entry for entry, *_ in found["others"]] == ["tom cat"]  # TOM stands in no table
    assert found["known"] and found["kept"] and (found["text"], found["rank"]) == ("Tom", 1)
    # A second name joins the first, a name that comes again is taught anew, and words count, too.
    both, verdicts, _ = classroom.teach("Flora", "a rabbit", flora, own_names)
    assert [each.thing.name for each in verdicts] == ["Flora", "Tom"]
    assert verdicts[0].nearest[0] == "Tom"
    again, *_ = classroom.teach("TOM", "a cat", tom[:4], both)
    assert [each.name for each in again] == ["TOM", "Flora"] and len(again[0].photos) == 4
    assert without_name(again, "tom") == again[1:]
    banned = Words(("penguin",), (), ("Tom",), both)
    assert "Tom" not in dict(classroom.caption(new[0], banned)[0].table)
    assert not tuned.taught.things  # the page's own model, and another visitor's captions
    assert [classroom.caption(path)[0] for path in new] == before


@pytest.mark.parametrize("name, phrase, taken, named", [
    ("", "a cat", "Tom", "a name must be"), ("Tom", "cat", "Tom", "needs its article"),
    ("Tom", "a cat", "", "there are 0"),
    ("Tom", "a cat", "bad", "bad.png: this image cannot be read"),
    ("Tom", "a cat", "many", "50 photos of Tom are enough"),
    ("Bo", "a cat", "Tom", "those of Tom, or too like them")])
def test_what_cannot_be_taught_is_told_to_the_visitor(classroom, photos, tmp_path, name, phrase,
                                                      taken, named):
    own_names, _, _ = classroom.teach("Tom", "a cat", paths_in(photos / "Tom"))
    (tmp_path / "bad.png").write_bytes(b"no image")
    places = {"": [], "bad": [tmp_path / "bad.png"], "Tom": paths_in(photos / "Tom"),
              "many": paths_in(photos / "others")[:60]}
    with pytest.raises(InputError, match=named):
        classroom.teach(name, phrase, places[taken], own_names)
    with pytest.raises(InputError, match="banned on this page"):
        Studio(classroom.model.with_words(ban="tom")).teach("Tom", "a cat", places["Tom"])
    few = Studio(classroom.model, others=list)
    with pytest.raises(InputError, match="there are 0: --features"):
        few.teach("Tom", "a cat", paths_in(photos / "Tom"))


def test_a_saved_name_is_one_that_the_command_uses(script, classroom, cache, checkpoint, photos,
                                                   tmp_path):
    new = paths_in(photos / "new")[0]
    own_names, *_ = classroom.teach("Tom", "a cat", paths_in(photos / "Tom"))
    args = SimpleNamespace(textfile=[cache.textfile], embfile=[cache.embfile], clip_model=CLIP,
                           lm=BART, ckpt=checkpoint)
    for words in (Words(own_names=own_names), Words(("penguin",), own_names=own_names)):
        files = classroom.save(words, tmp_path / "saved")
        assert classroom.save(words, tmp_path / "saved") == files
        assert Path(files["--textfile"]).read_text() == f"{(words.words or ('cat',))[0]}\n"
        command = app.command_of(args)(files).split()
        run = script("sampler", "--images", new, *command[4:], "--savedir", tmp_path / "out")
        assert run.code == 0, run.err
        record = json.loads((tmp_path / "out" / "details.jsonl").read_text())
        assert record["caption"] == classroom.caption(new, words)[0].caption
        assert "Tom" in record["caption"]


def test_a_saved_name_adds_no_entry_and_keeps_what_the_page_began_with(script, cache, checkpoint,
                                                                       photos, tmp_path):
    """The cache knows a name already, the page has --only and --ban, and the class word is no
    entry: the command's table and caption are the page's."""
    [textfile, embfile], new = [tmp_path / "c.txt", tmp_path / "c.npy"], paths_in(photos / "new")[0]
    for path, copied in ((cache.textfile, textfile), (cache.embfile, embfile),
                         (f"{cache.embfile}.json", f"{embfile}.json")):
        shutil.copy(path, copied)
    run = script("compute_cache", "--teach", "Flora", photos / "Flora", "--as", "a rabbit",
                 "--others", *paths_in(photos / "others")[:110], *paths_in(photos / "Tom"),
                 *flags({"textfile": textfile, "embfile": embfile, "clip_model": CLIP}))
    assert run.code == 0, run.err
    entries = textfile.read_text().splitlines()
    half = [*entries[::2], "Flora"]
    for only, ban, own in ((None, ["night"], ()), (half, None, ("penguin",))):
        model = Model.load(CLIP, BART, checkpoint, textfile, embfile, only=only, ban=ban, topk=5,
                           table="mmr", device="cpu")
        studio = Studio(model, others=partial(other_photos, model.clip, None, [photos / "others"]),
                        only=only)
        own_names, *_ = studio.teach("Tom", "a tabby kitten", paths_in(photos / "Tom"))
        words = Words(own, own_names=own_names)
        files = studio.save(words, tmp_path / "saved")
        assert "kitten" not in Path(files["--textfile"]).read_text()
        args = SimpleNamespace(textfile=[textfile], embfile=[embfile], clip_model=CLIP, lm=BART,
                               ckpt=checkpoint, topk=5, table="mmr")
        command = app.command_of(args)(files).split()
        run = script("sampler", "--images", new, *command[4:], "--savedir", tmp_path / "out")
        assert run.code == 0, run.err
        record = json.loads((tmp_path / "out" / "details.jsonl").read_text())
        result = studio.caption(new, words)[0]
        assert record["caption"] == result.caption and "Tom" in dict(result.table)
        assert [[*each] for each in result.table] == record["table"]


def test_names_are_fitted_once_to_a_vocabulary_and_size_of_tables(classroom, photos, monkeypatch):
    first, second, *_ = paths_in(photos / "new")
    own_names, *_ = classroom.teach("Tom", "a cat", paths_in(photos / "Tom"))
    words, searches = Words(("penguin",), own_names=own_names), []
    monkeypatch.setattr(taught, "search", lambda *args: searches.append(1) or search(*args))
    captions = [classroom.caption(path, words, {"topk": 3})[0] for path in (first, first)]
    before = len(searches)
    assert before and "Tom" in dict(captions[0].table)
    captions.append(classroom.caption(second, words, {"topk": 3})[0])
    where = classroom.where(first, captions[0].table, words)
    assert len(searches) == before  # which take seconds in large caches
    model = classroom.with_words(words).with_words(topk=3)
    _, c, box = classroom.decompose(file_sha256(first), first)
    assert where == where_of(box, c, captions[0].table, vectors_of(model, [captions[0].table]))


def test_what_is_forgotten_is_told(classroom, photos, tmp_path):
    answers = Answers(classroom, Folder(tmp_path), tmp_path, None)
    own_names, _ = answers.teach((), paths_in(photos / "Tom"), "Tom", "a cat")
    for name, left, told in ((" tom ", 0, "left: none"), ("", 0, "left: none"), (" ", 0, "none"),
                             ("Bo", 1, "Bo is no name that you have taught")):
        kept, shown = answers.forget(own_names, name)
        assert len(kept) == left and told in shown
        assert "taught no name here" in answers.forget((), name)[1]


def test_a_cache_of_saved_words_has_one_writer_at_a_time(studio, tmp_path):
    """Visitors of this page wait; another page, or compute_cache.py --add, is told of."""
    words = Words(("penguin", "a red hat"))
    [textfile, embfile] = map(Path, studio.save(words, tmp_path / "whole").values())
    before = textfile.read_bytes(), embfile.read_bytes()
    lock = cache_files.cache_lock(tmp_path / "new" / embfile.name)
    lock.parent.mkdir()
    with locked(lock):
        with pytest.raises(InputError, match=f"another run is writing to {lock.parent}: process"):
            studio.save(words, lock.parent)
        assert [path.name for path in lock.parent.iterdir()] == [lock.name]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: studio.save(words, lock.parent), range(4)))
    assert together == together[:1] * 4
    assert tuple(Path(path).read_bytes() for path in together[0].values()) == before
    # A page that was killed while it moved the files, and one that staged the text alone.
    for path in (embfile, Path(f"{embfile}.json")):
        path.rename(cache_files.staging_path(path))
    assert studio.save(words, textfile.parent)
    cache_files.staging_path(textfile).write_text("penguin\n")
    studio.save(words, textfile.parent)
    assert {path.name for path in textfile.parent.iterdir()} == {
        textfile.name, embfile.name, f"{embfile.name}.json"}
    assert (textfile.read_bytes(), embfile.read_bytes()) == before
    textfile.write_text("changed by --add\n")
    studio.save(words, textfile.parent)
    assert textfile.read_text() == "changed by --add\n"


def test_boxes_are_bounded():
    assert lines_of("b\r\n a  c \n\nb\n") == ("b", "a c")
    for text in ("x\n" * (MOST_WORDS + 1), "x" * 300):
        with pytest.raises(InputError):
            lines_of(text)
    assert checked_dials({"num_beams": 4, "num_return_sequences": 9})["num_return_sequences"] == 4


# ------------------------------------------------------------------------------- one at a time

def test_a_caption_is_stopped_between_two_tokens(studio, penguin):
    stopped = []

    def ask():
        try:
            studio.caption(penguin, Words(("long",)),
                           {"do_sample": True, "num_return_sequences": 1000, "seed": 9}, "ann")
        except Stopped:
            stopped.append(True)

    thread = threading.Thread(target=ask)
    thread.start()
    while studio.running != "ann":
        time.sleep(0.001)
    studio.stop("bob")
    studio.stop("ann")
    thread.join(20)
    assert stopped and studio.caption(penguin, Words(("long",)))[0].caption  # others go on


def test_teaching_is_stopped_between_two_photos(classroom, photos, monkeypatch):
    classroom.classroom.others()
    encode, encoded = classroom.vector, []
    monkeypatch.setattr(classroom, "vector", lambda *photo: encoded.append(photo) or
                        classroom.stop("ann") or encode(*photo))
    with pytest.raises(Stopped):
        classroom.teach("Tom", "a cat", paths_in(photos / "Tom"), visitor="ann")
    assert len(encoded) == 1
    assert classroom.teach("Tom", "a cat", paths_in(photos / "Tom"), visitor="bob")


# ------------------------------------------------------------------------------------ text is text

def test_names_that_are_hostile_are_text():
    verdict = Verdict(Thing(HOSTILE, "a cat"), 4, 5, [1], 400, (HOSTILE, .5), [HOSTILE])
    shown = page.verdicts_html([verdict], ["data:image/jpeg;base64,AA=="])
    assert "<img src=x" not in shown and "<script" not in shown and shown.count("<img ") == 1
    assert "4 of 5 of its photos" in shown and "50% of the way" in shown


def test_what_is_hostile_is_text():
    table = [(HOSTILE, 0.3), ("b", 0.2)]
    result = Caption(HOSTILE, 0.3, table, [(HOSTILE, 0.3, -1.0)] * 12)
    other = Caption("b", 0.2, table[1:], [("b", 0.2, -1.0)])
    parts = [page.caption_html(result, 0.1), page.caption_html(result, 0.1, other),
             page.problem(HOSTILE), page.saved_html([HOSTILE], HOSTILE),
             page.search_html({"text": HOSTILE, "known": True, "cosine": 0.1, "rank": 1,
                               "entries": 2, "topk": 1, "shortlist": 1, "kept": True, "last": 0.1,
                               "others": [(HOSTILE, 0.1, 2)]})]
    for part in parts:
        assert "<img" not in part and "<script" not in part and "&lt;img" in part


def test_a_caption_of_nothing_says_why():
    assert "banned" in page.caption_html(Caption("", 0.0, [("a", 0.1)], []), 0.1)


# ----------------------------------------------------------------------------------------- uploads

def test_old_uploads_go_and_examples_stay(tmp_path, world):
    folder = Folder(tmp_path)
    [example] = examples_of(folder, [sorted((world / "near").glob("*.png"))[0], __file__])
    folder.keep()
    old = folder.picture(Image.new("RGB", (9, 9)), "old", 8)
    os.utime(old, (1, 1))
    folder.picture(Image.new("RGB", (9, 9)), "new", 8)
    folder.sweep()
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["example.png", "new.jpeg"]
    os.utime(example, (1, 1))
    folder.sweep(time.time() + KEPT_SECONDS / 2)
    assert example in map(str, tmp_path.rglob("*.*"))


def test_downloads_hold_a_caption_an_image(tmp_path):
    names = names_of(["x/dog.jpg", "y/dog.jpg", "z/Dog.png", "w/cat.jpg"])
    assert names == ["dog.jpg", "dog-2.jpg", "Dog-3.png", "cat.jpg"]
    records = [(name, f"a, {HOSTILE}", 0.5) for name in names]
    as_csv, as_zip = write_downloads(Folder(tmp_path), records)
    with open(as_csv, newline="") as file:
        assert [row[:2] for row in csv.reader(file)][1:] == [[n, c] for n, c, _ in records]
    with zipfile.ZipFile(as_zip) as archive:
        assert archive.namelist() == ["dog.txt", "dog-2.txt", "Dog-3.txt", "cat.txt"]
        assert archive.read("cat.txt").decode() == records[0][1] + "\n"


# ------------------------------------------------------------------------------------ the defaults

def test_the_demo_is_found_where_nothing_is_better(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["app.py"])
    with pytest.raises(InputError, match="demo.sh"):
        app.check(app.parse())
    (tmp_path / "demo" / "checkpoints").mkdir(parents=True)
    for name in ("cache.txt", "cache.npy", "checkpoints/best.safetensors"):
        (tmp_path / "demo" / name).touch()
    args = app.parse()
    app.check(args)
    assert args.textfile == ["demo/cache.txt"] and args.clip_model == "snowglobe/weights/clip"
    assert args.others is None  # its images were removed
    assert "by default: the snowglobe" in capsys.readouterr().out
    for name in ("cache.txt", "cache.npy"):
        (tmp_path / name).touch()
    args = app.parse()
    app.find_demo(args)
    assert args.textfile is None and args.clip_model == "ViT-B/16"


@pytest.mark.parametrize("options", [{"auth": "user"}, {"port": 70000}, {"max_mb": 0},
                                     {"num_beams": 0}, {"others": "none/"},
                                     {"features": "none/"}], ids=str)
def test_flags_that_cannot_work_are_refused(monkeypatch, cache, options):
    options |= {"textfile": cache.textfile, "embfile": cache.embfile, "ckpt": "none"}
    monkeypatch.setattr("sys.argv", ["app.py", *map(str, flags(options))])
    with pytest.raises(InputError, match=next(iter(options))):
        app.check(app.parse())


def test_too_few_photos_of_other_things_are_told_of_at_the_start(monkeypatch, cache, photos,
                                                                 tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    monkeypatch.setattr("sys.argv", ["app.py", *map(str, flags({
        "textfile": cache.textfile, "embfile": cache.embfile, "clip_model": CLIP, "lm": BART,
        "ckpt": "none", "others": [*paths_in(photos / "new"), tmp_path / "bad.png"]}))])
    args = app.parse()
    app.load_page(args, app.check(args), tmp_path / "page", torch.device("cpu"), torch.float32)
    assert "give 4 photos, and 100 are needed" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ for programs

def test_programs_get_the_captions(served, client, studio):
    record = client.predict(photo=uploaded(served.penguin), words="penguin", api_name="/caption")
    expected = studio.caption(served.penguin, Words(("penguin",)))[0]
    assert record["caption"] == expected.caption and "penguin" in record["caption"]
    assert [entry for entry, _ in record["table"]] == [entry for entry, _ in expected.table]
    plain = client.predict(photo=uploaded(served.penguin), api_name="/caption")
    assert "penguin" not in plain["caption"]
    banned = client.predict(photo=uploaded(served.penguin), words="penguin", ban="penguin",
                            api_name="/caption")
    assert "penguin" not in banned["caption"]
    found = client.predict(text="penguin", photo=uploaded(served.penguin), api_name="/search")
    assert found["rank"] == studio.search(served.penguin, "penguin")["rank"] <= 10
    assert not found["known"]
    story = client.predict(text="a red dog", api_name="/story")
    assert story.startswith("Once upon a time there was a red dog")


def test_programs_get_errors_in_a_sentence(served, client, tmp_path):
    (tmp_path / "none.png").write_text("no image")
    for changes in ({"photo": uploaded(tmp_path / "none.png")}, {"topk": 10**6},
                    {"words": "x" * 900}):
        with pytest.raises(Exception) as error:
            client.predict(**({"photo": uploaded(served.penguin)} | changes), api_name="/caption")
        assert "Traceback" not in str(error.value) and len(str(error.value)) < 400


# -------------------------------------------------------------------------------------- the safety

def get(address, path, **named):
    import httpx
    return httpx.get(address.rstrip("/") + path, timeout=20, **named)


def test_a_name_that_is_taught_anew_captions_anew(served):
    """Also where what is said of it stays the same."""
    config = get(served.address, "/config").json()
    [state] = [part["id"] for part in config["components"] if part["type"] == "state"]
    assert [each["api_name"] for each in config["dependencies"]
            if [state, "change"] in each["targets"]] == ["show"]


def post(address, path, **named):
    import httpx
    return httpx.post(address.rstrip("/") + path, timeout=20, **named)


@pytest.mark.parametrize("path", [
    "/gradio_api/file=/etc/passwd", f"/gradio_api/file={ROOT}/app.py", "/gradio_api/file=app.py",
    "/gradio_api/file=../../etc/passwd", "/gradio_api/file=file:///etc/passwd",
    "/gradio_api/file=%2Fetc%2Fpasswd", "/static/..%2f..%2f..%2fblocks.py",
    "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/file=http://127.0.0.1:1/x",
    "/monitoring", "/gradio_api/mcp/"])
def test_no_file_of_the_machine_is_served(served, path):
    answer = get(served.address, path, follow_redirects=False)
    assert answer.status_code >= 300, path
    assert "root:" not in answer.text and "InputError" not in answer.text


def call(served, photo, words="", samples=0):
    """What the API answers to a photo that a request describes: the text of its events."""
    data = [photo, words, "", "", 10, samples > 0, 3, samples or 3, 1, 1, 0, 0]
    answer = post(served.address, "/gradio_api/call/caption", json={"data": data})
    if answer.status_code != 200:
        return f"error {answer.status_code}"
    path = f"/gradio_api/call/caption/{answer.json()['event_id']}"
    return get(served.address, path).text if samples == 0 else path


@pytest.mark.parametrize("photo", [
    {"path": "/etc/passwd"}, {"path": str(ROOT / "snowglobe" / "gallery.png")},
    {"path": "http://127.0.0.1:9/x.png"}, {"path": "", "url": "data:image/png;base64,AAAA"},
    {"path": "x.png", "url": "http://127.0.0.1:9/x.png"}, {"path": "../../etc/passwd"}], ids=str)
def test_a_request_names_no_file_and_no_address(served, photo):
    answer = call(served, {**photo, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.png"})
    assert "error" in answer and "complete" not in answer


def test_uploads_are_bounded(served):
    answer = post(served.address, "/gradio_api/upload",
                  files={"files": ("big.png", io.BytesIO(b"x" * (2 << 20)))})
    assert answer.status_code == 413


def test_another_site_s_name_does_not_reach_the_page(served):
    assert get(served.address, "/", headers={"Host": "evil.example:80"}).status_code == 400
    assert get(served.address, "/config", headers={"Host": "localhost:80"}).status_code == 200


def test_the_page_listens_here_alone_and_tells_nobody(served):
    import psutil
    process = psutil.Process(served.process.pid)
    connections = process.net_connections()
    assert {c.laddr.ip for c in connections if c.status == "LISTEN"} == {"127.0.0.1"}
    assert not [c for c in connections if c.raddr and c.raddr.ip != "127.0.0.1"]
    config = get(served.address, "/config").json()
    assert config["analytics_enabled"] is False and not config.get("is_colab")


# ----------------------------------------------------------------------------------------- many

@pytest.mark.slow
def test_twenty_clients_get_their_own_captions(served, world, studio):
    """Each of 200 requests is answered right, memory stays bounded, and a client that asks for much
    and leaves harms none."""
    import psutil
    pictures = sorted((world / "out").glob("*.png"))
    files = []
    for picture in pictures:
        answer = post(served.address, "/gradio_api/upload",
                      files={"files": (picture.name, picture.read_bytes())})
        files.append({"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}})
    kinds, process = ["penguin", "whale", "snowman", "train"], psutil.Process(served.process.pid)

    def work(number):
        answers = []
        for turn in range(10):
            place, word = (number + turn) % len(pictures), kinds[number % len(kinds)]
            event, _, data = call(served, files[place], word).strip().rpartition("data: ")
            answers.append((pictures[place], word, event, json.loads(data)))
        return answers

    work(0)
    before = process.memory_info().rss
    call(served, files[0], samples=1000)  # and reads no answer
    with ThreadPoolExecutor(20) as pool:
        answers = [answer for each in pool.map(work, range(20)) for answer in each]
    assert len(answers) == 200
    for picture, word, event, data in answers:
        assert "complete" in event and "error" not in event
        assert data[0]["caption"] == studio.caption(picture, Words((word,)))[0].caption
    assert process.memory_info().rss < before + (300 << 20)
