"""Any terminal and any environment: output that fails, leftovers of torchrun, brackets in names,
words in any spelling, entries and tables that look wrong, and bars that end at 100 %."""

import argparse
import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
import warnings

import pytest
import torch
from conftest import BART, CLIP, ROOT, commands
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from antarctic import datasets, distributed, errors, folders, runtime, words
from antarctic.errors import InputError
from model import Clip, Model

# ------------------------------------------------------------------------------------------ streams


def open_stream(kind):
    """A stream such as Python makes of standard output, or None."""
    if kind == "none":  # >&-
        return None
    if kind == "closed":
        stream = io.StringIO()
        stream.close()
        return stream
    if kind == "no reader":
        read, write = os.pipe()
        os.close(read)
        return open(write, "w", encoding="utf-8")
    if kind == "full disk":
        return open("/dev/full", "w", encoding="utf-8", buffering=1)
    return io.TextIOWrapper(io.BytesIO(), kind, newline="\n", write_through=True)


ENCODINGS = ["ascii", "cp1252", "latin-1"]
BROKEN = ["none", "closed", "no reader", "full disk"]


def run_with(kind, main, alone=False):
    """run(main) with such a stream as standard output and another as standard error. Returns (exit
    code, what was written to them)."""
    streams = open_stream(kind), open_stream(kind)
    code = 0
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            runtime.run(main, alone)
        except SystemExit as stop:
            code = stop.code or 0
        written = [stream.buffer.getvalue() if kind in ENCODINGS else b"" for stream in streams]
        for stream in streams:
            if stream and not stream.closed:
                stream.close()  # as at exit: what is not written yet would fail here
    return code, written


HELP = argparse.ArgumentParser("dog.py", description="A snowman: \u2603.")


def say_everything():
    print("B\u00e4r \u2603 \udcff")
    print("B\u00e4r \u2603 \udcff", file=sys.stderr)
    for _ in tqdm(range(3), "B\u00e4r \u2603", unit="\u2603"):
        tqdm.write("B\u00e4r \u2603")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *told: print(told, file=sys.stderr)  # pytest records others
        warnings.warn("B\u00e4r \u2603", stacklevel=2)
    HELP.print_usage(sys.stderr)
    HELP.print_help()


def refuse():
    raise InputError("B\u00e4r \u2603")


def refuse_flags():
    HELP.parse_args(["--b\u00e4r\u2603"])


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ENCODINGS + BROKEN)
@pytest.mark.parametrize("main, code", [
    (say_everything, 0), (refuse, 2), (refuse_flags, 2), (interrupt, 130)])
def test_whatever_is_said_fails_on_no_stream_and_the_exit_code_stays(kind, main, code):
    before = sys.stdout, sys.stderr
    result, (out, err) = run_with(kind, main)
    assert result == code and (sys.stdout, sys.stderr) == before
    if kind in ENCODINGS and main is say_everything:
        expected = "B\u00e4r \u2603 \udcff".encode(kind, "backslashreplace")
        assert expected + b"\n" in out and expected + b"\n" in err
        assert "A snowman: \u2603".encode(kind, "backslashreplace") in out


@pytest.mark.parametrize("kind", ["ascii", "none", "full disk"])
@pytest.mark.parametrize("name", ["compute_cache", "trainer", "sampler", "scorer", "stories"])
def test_a_terminal_changes_no_result(script, world, cache, checkpoint, tmp_path, monkeypatch, kind,
                                      name):
    """Also with names that few encodings have."""
    monkeypatch.setattr("scorer.has_java", lambda: False)  # METEOR takes as long as all the rest
    results = []
    for folder in (tmp_path / "good \u2603", tmp_path / "bad \u2603"):
        folder.mkdir()
        if name == "scorer":
            (folder / "preds.txt").write_text("a red dog\na whale\n")
            arguments = ["--preds", folder / "preds.txt", "--refs", folder / "preds.txt",
                         "--tokenizer", "treebank", "--savedir", folder]
        else:
            arguments = commands(world, cache, checkpoint, trainer={"epochs": 1})[name](folder)
        if not results:
            assert script(name, *arguments).code == 0
        else:
            monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
            code, (_, err) = run_with(kind, __import__(name).main)
            assert code == 0 and b"Traceback" not in err
        results.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert results[0].keys() == results[1].keys()
    for file in results[0].keys() - {"loss.png"}:
        assert results[0][file] == results[1][file], file


@pytest.mark.parametrize("redirection, arguments, code", [
    (">&-", "--help", 0), (">&- 2>&-", "--help", 0), ("<&- >&- 2>&-", "--none", 2),
    (">/dev/full", "--help", 0), (">/dev/full 2>&1", "--help", 0), ("2>/dev/full", "--none", 2),
    ("2>&-", "--none", 2)])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="reads /dev")
def test_help_and_refusals_leave_with_their_code(tmp_path, redirection, arguments, code):
    command = f"{sys.executable} {ROOT / 'scorer.py'} {arguments} {redirection}"
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == code
    assert "Traceback" not in run.stderr and "Exception" not in run.stderr


CLOSED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from antarctic.runtime import run
def main():
    with open("result.txt", "w") as file:
        file.write("whole")
        assert file.fileno() > 2
        os.system("echo said by another program")
run(main)
"""


def test_a_file_gets_no_number_of_a_closed_stream(tmp_path):
    """Otherwise other programs would print into the results."""
    command = f"{sys.executable} -c '{CLOSED}' {ROOT} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path).returncode == 0
    assert (tmp_path / "result.txt").read_text() == "whole"


@pytest.mark.parametrize("kind", BROKEN)
def test_the_error_of_a_stream_is_returned(monkeypatch, kind):
    stream = open_stream(kind)
    monkeypatch.setattr(sys, "stderr", stream)
    assert isinstance(errors.print_safely("a dog", "stderr"), (OSError, ValueError))
    if stream:
        stream.close()


# -------------------------------------------------------------------------- torchrun's environment

WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1",
         "MASTER_PORT": "29500"}
NONSENSE = ["", " ", "abc", "-1", "1.5", "2", "3", "\u0661", "9" * 5000]
STALE = [
    {"WORLD_SIZE": "4"}, {"RANK": "0"}, {"RANK": "3"}, {"LOCAL_RANK": "0"}, {"LOCAL_RANK": "\x1b"},
    {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"},
    *(dict(WHOLE, **{name: value}) for name in ("RANK", "LOCAL_RANK") for value in NONSENSE),
    *(dict(WHOLE, WORLD_SIZE=value) for value in [*NONSENSE[:5], "0", "1"]),
    *(dict(WHOLE, MASTER_PORT=value) for value in ["", "abc", "0", "-1", "65536", "9" * 5000]),
    *({name: value for name, value in WHOLE.items() if name != missing}
      for missing in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")),
    dict(WHOLE, MASTER_ADDR=""), dict.fromkeys(WHOLE, "")]


@pytest.fixture
def environment(monkeypatch):
    """environment({name: value}) sets torchrun's variables, and no others of it."""
    def set_to(values):
        for name in WHOLE:
            monkeypatch.setenv(name, "")  # so that it is restored
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
    return set_to


@pytest.mark.parametrize("values", STALE, ids=lambda values: ",".join(values)[:40])
def test_what_torchrun_left_behind_is_ignored_with_one_warning(environment, capsys, values):
    environment(values)
    for _ in range(3):
        assert distributed.rank_and_world() == (0, 1)
    warning, = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ignored ") and "single process" in warning
    assert warning.isprintable()
    assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & os.environ.keys()


@pytest.mark.parametrize("values, expected", [
    ({}, (0, 1)), (WHOLE, (1, 2)), (dict(WHOLE, WORLD_SIZE="1", RANK="0", LOCAL_RANK="0"), (0, 1)),
    ({name: WHOLE[name] for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}, (1, 2)),
    ({"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, (0, 1))])
def test_what_torchrun_sets_is_taken(environment, capsys, values, expected):
    environment(values)
    assert distributed.launched() == expected and not capsys.readouterr().err


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("values", [{"WORLD_SIZE": "", "RANK": "abc"}, {"RANK": "1"},
                                    {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}], ids=str)
def test_a_script_does_its_work_whatever_is_left_in_the_environment(environment, values, alone):
    environment(values)
    code, (out, err) = run_with("ascii", lambda: print(distributed.rank_and_world()), alone)
    assert code == 0 and out == b"(0, 1)\n" and err.count(b"\n") == err.count(b"warning") == 1


# ------------------------------------------------------------------------------------------- words

def spellings(text):
    return [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]


@pytest.mark.parametrize("line, hit, missed", [
    ("caf\u00e9", ["a CAF\u00c9", "caf\u00e9s, caf\u00e9"], ["cafe", "caf\u00e9s", "caf\u00ea"]),
    ("cafe", ["cafe", "a Cafe."], ["caf\u00e9", "caf\u00e9 au lait"]),
    ("Stra\u00dfe", ["eine STRASSE", "strasse"], ["strassen"]),
    ("\u03bf\u03b4\u03cc\u03c2", ["\u039f\u0394\u038c\u03a3"], ["\u03bf\u03b4\u03cc\u03c3\u03b1"]),
    ("hot dog", ["a hot  dog", "hot\u00a0dog", "HOT\tDOG"], ["hot dogs", "hotdog", "shot dog"]),
    ("c++", ["in C++."], ["c++11", "abc++", "c+"]),
    ("\u732b", ["\u732b", "a \u732b!"], ["\u9ed2\u732b", "\u732b\u304c"]),  # as for other letters
    ("\ud55c\uad6d", ["\ud55c\uad6d \uc0ac\ub78c"], ["\ud55c\uad6d\uc5b4"]),
    ("\u0e17", ["\u0e17 1"], ["\u0e17\u0e35\u0e48"]),  # vowels and tones are marks
    ("\u0939\u093f", ["\u0939\u093f"], ["\u0939", "\u0939\u093f\u0928"]),
    ("\u2764", ["I \u2764\ufe0f you", "\u2764"], []),  # in colour or not
    ("copper", ["cop\u00adper"], ["copper\u0301"]),  # hyphenated
])
def test_words_are_banned_as_unicode_has_them(line, hit, missed):
    for spelling in spellings(line):
        banned = words.WholeWords([spelling, "unicorn"])
        for text in hit:
            assert all(map(banned.search, spellings(text))), ascii(text)
        for text in missed:
            assert not any(map(banned.search, spellings(text))), ascii(text)


def test_whole_words_are_those_of_a_plain_pattern():
    rng, letters = random.Random(0), "ab c+-\u0301\u00e9\u732b_\u200d\1\2"
    hits = 0
    word = "[\\w\u0301\u200d]"
    for _ in range(20000):
        lines = ["".join(rng.choices(letters, k=rng.randint(1, 4))) for _ in range(2)]
        text = "".join(rng.choices(letters, k=rng.randint(0, 9)))
        folded = list(map(words.fold, lines))
        expected = any(re.search(f"(?<!{word}){re.escape(line)}(?!{word})",
                                 words.fold(text)) for line in folded if line)
        assert words.WholeWords(lines).search(text) == expected, (lines, text)
        hits += expected
    assert hits > 500


@pytest.mark.parametrize("lines", [
    [f"{i:05} dogs" for i in range(100_000)], ["a" * i for i in range(1, 3000)],
    ["a " * i + "b" for i in range(1, 1500)], ["+" * i for i in range(1, 1500)],
    ["e\u0301" * i + "f" for i in range(1, 1500)], ["\u0316\u0301" * 5000], [""], ["\u00ad"]],
    ids=lambda lines: ascii(lines[0])[:12])
def test_a_list_made_to_take_long_takes_seconds(lines):
    began = time.monotonic()
    banned = words.WholeWords(lines)
    for text in ("a" * 10_000, "a " * 5000, "+" * 9000 + "a", "e\u0301" * 5000, "b" * 10_000):
        banned.search(text)
    assert not banned.search("no such word")
    assert time.monotonic() - began < 20


def caption_words(script, tmp_path, entries, *flags, ckpt="none", topk=("--topk", "3")):
    """The run of the sampler, and the tables of one image, with a cache of these entries."""
    (tmp_path / "list.txt").write_text("\n".join(entries), encoding="utf-8")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    files = ("--textfile", tmp_path / "c.txt", "--embfile", tmp_path / "c.npy", "--clip_model",
             CLIP)
    made = script("compute_cache", "--entries", tmp_path / "list.txt", *files)
    assert made.code == 0, made.err
    run = script("sampler", "--images", tmp_path / "a.png", *files, "--lm", BART, "--ckpt", ckpt,
                 *topk, "--savedir", tmp_path / "out", *flags)
    if run.code:
        return made, run, None
    record = json.loads((tmp_path / "out" / "details.jsonl").read_text(encoding="utf-8"))
    return made, run, {entry for entry, _ in record["table"]}


def test_only_and_ban_take_any_spelling(script, tmp_path):
    entries = [*spellings("caf\u00e9")[:1], "cafe", "Dog", "red", "blue", "a red dog"]
    (tmp_path / "only.txt").write_text("cafe\u0301\ndog\nRED\n", encoding="utf-8")
    _, _, table = caption_words(script, tmp_path, entries, "--only", tmp_path / "only.txt")
    assert table == {"caf\u00e9", "Dog", "red"}
    (tmp_path / "ban.txt").write_text("cafe\u0301\nDOG\n", encoding="utf-8")
    _, _, table = caption_words(script, tmp_path, entries, "--ban", tmp_path / "ban.txt")
    assert table == {"cafe", "red", "blue"}


# ---------------------------------------------------------------------------------- told once each

def warned(run):
    return [line for line in run.err.splitlines() if line.startswith("warning")]


def test_entries_that_look_wrong_are_told_once_each(script, tmp_path):
    long = "word " * 90
    entries = ["a dog", "A Dog", "red", long.strip(), "a | b", "blue", "c|d"]
    made, run, _ = caption_words(script, tmp_path, entries)
    barred, alike, longer = warned(made)
    assert "2 entries" in barred and '"a | b"' in barred
    assert "1 entries" in alike and '"a dog" and "A Dog"' in alike
    assert "1 entries" in longer and "word word" in longer and "CLIP reads" in longer
    assert len(warned(run)) == 2  # what is in the cache; CLIP reads no entry now
    changed = script("compute_cache", "--textfile", tmp_path / "c.txt", "--embfile",
                     tmp_path / "c.npy", "--clip_model", CLIP, "--add", "green", "RED",
                     "longer " * 90)
    alike, longer = warned(changed)
    assert '"red" and "RED"' in alike and "longer longer" in longer


def test_white_space_alone_is_a_difference_that_is_told(capsys):
    words.warn_of_entries(["a dog", "red", "a  dog", " red", "red "])
    warning, = capsys.readouterr().err.splitlines()
    assert '2 entries, such as "a dog" and "a  dog"' in warning
    words.warn_of_entries(["a dog", "red", "a red dog", "Blue"])
    assert not capsys.readouterr().err


def test_exactly_the_entries_that_clip_cuts_are_told(capsys):
    clip = Clip(CLIP)
    for text in ("a", "dog", "\u732b", "\u0130", "\u0344", "\ufb2c"):
        fitting = max(n for n in range(1, 80) if len(clip.tokenizer(text * n)["input_ids"])
                      <= clip.max_length)
        words.warn_of_long_entries(clip, [text * fitting])
        assert not capsys.readouterr().err
        words.warn_of_long_entries(clip, ["a", text * (fitting + 40)])
        assert "1 entries" in capsys.readouterr().err, ascii(text)


def test_words_that_are_added_are_looked_at(cache, capsys):
    model = Model.load(CLIP, BART, "none", [cache.textfile], [cache.embfile], device="cpu")
    model.add_words(["a penguin"])
    assert not capsys.readouterr().err
    known = model.entries[3]
    model.add_words([known.upper(), "x | y", "word " * 90])
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3 and f'"{known}" and "{known.upper()}"' in "".join(warnings)


def test_tables_unlike_those_of_training_are_told(script, checkpoint, tmp_path):
    trained = load_file(checkpoint)
    with safe_open(checkpoint, "pt") as file:
        settings = json.loads(file.metadata()["antarctic_captions"])
    assert settings["topk"] == 24
    other = tmp_path / "other.safetensors"
    settings["clip_model"] = "clip-of-\x1banother@1"
    save_file(trained, other, {"antarctic_captions": json.dumps(settings)})
    entries = [f"dog {i}" for i in range(30)]
    for ckpt, topk, expected in (
            (checkpoint, (), []), (checkpoint, ("--topk", "24"), []),
            (checkpoint, ("--topk", "5"), ["--topk 5 entries"]),
            (checkpoint, ("--topk", "40"), ["--topk 40 entries", "30 entries"]),
            (other, (), ["the CLIP model clip-of-\\x1banother@1"])):
        _, run, table = caption_words(script, tmp_path, entries, ckpt=ckpt, topk=topk)
        assert run.code == 0 and len(warned(run)) == len(expected), run.err
        for part, warning in zip(expected, warned(run)):
            assert part in warning
    _, run, table = caption_words(script, tmp_path, ["dog", "red"], topk=())
    assert "tables have 2 entries, not --topk 10" in warned(run)[0] and table == {"dog", "red"}


# ---------------------------------------------------------------------------------------- patterns

@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos [2020]/a.jpg", "photos [2020]/b.png", "photos [2020]/[c].jpg",
                 "photos 2/d.jpg", "a[b]/e.jpg", "ab/f.jpg", "*/g.jpg", "deep/a[b]/h.jpg",
                 "deep/ab/i.jpg", "what?/j.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()


@pytest.mark.parametrize("path, expected", [
    ("photos [2020]/*.jpg", ["photos [2020]/[c].jpg", "photos [2020]/a.jpg"]),
    ("photos [2020]/a.jpg", ["photos [2020]/a.jpg"]),
    ("photos [2020]/[c].jpg", ["photos [2020]/[c].jpg"]),
    ("photos [2020]/[ab].*", ["photos [2020]/a.jpg", "photos [2020]/b.png"]),
    ("photos [12]/*", ["photos 2/d.jpg"]),
    ("a[b]", ["a[b]/e.jpg"]), ("a[b]/*", ["a[b]/e.jpg"]), ("a[bc]/*", ["ab/f.jpg"]),
    ("*/g.jpg", ["*/g.jpg"]), ("what?/*.jpg", ["what?/j.jpg"]),
    ("d*/a[b]/*.jpg", ["deep/a[b]/h.jpg"]), ("**/a[b]/*.jpg", ["a[b]/e.jpg", "deep/a[b]/h.jpg"]),
    ("deep/**/*.jpg", ["deep/a[b]/h.jpg", "deep/ab/i.jpg"]), ("**/i.jpg", ["deep/ab/i.jpg"]),
    ("deep/../ab/*.jpg", ["deep/../ab/f.jpg"]),
    ("none [1]/*.jpg", None), ("a[b", None), ("a[b]/none.jpg", None), ("x" * 300, None),
    ("x" * 300 + "*", None), ("a\0*", None)])
@pytest.mark.parametrize("absolute", [False, True])
def test_what_exists_is_no_pattern(photos, tmp_path, path, expected, absolute):
    root = f"{tmp_path}/" if absolute else ""
    if expected is None:
        with pytest.raises(InputError, match="no image or folder"):
            folders.list_images([root + path])
        return
    listed = [str(picture.path) for picture in folders.list_images([root + path])]
    assert listed == [root + name for name in expected]


# -------------------------------------------------------------------------------------------- bars

def ends(err):
    """(name, number, total) of the last state of each bar in what was written to standard error."""
    lines = [line.rpartition("\r")[2] for line in err.split("\n")]
    found = [re.match(r"(.*?): +\d+%.*?([\d.]+)/([\d.]+) \[", line) for line in lines]
    return [match.groups() for match in found if match]


def require_full(err, *names):
    bars = ends(err)
    assert {name for name, _, _ in bars} == set(names), err
    assert all(number == total for _, number, total in bars), bars
    assert "it/s]" not in err.replace("?it/s]", "")  # a number beyond the total drops the total


def stop_later(monkeypatch, target, calls):
    """Lets a function raise KeyboardInterrupt at one of its calls."""
    module, _, name = target.rpartition(".")
    function, made = getattr(sys.modules[module], name), []

    def stop(*arguments, **named):
        made.append(1)
        if len(made) == calls:
            raise KeyboardInterrupt
        return function(*arguments, **named)

    monkeypatch.setattr(target, stop)


@pytest.mark.parametrize("options", [
    {"batch_size": 7, "epochs": 2}, {"batch_size": 7, "tmax": 10}, {"batch_size": 48, "tmax": 1},
    {"batch_size": 100}])
def test_the_bars_of_training_end_full(script, world, cache, tmp_path, monkeypatch, options):
    options = {"save_seconds": 0} | options
    train = commands(world, cache, None)["trainer"](tmp_path, **options)
    names = {"training", "encoding images"}
    require_full(script("trainer", *train).err, *names)
    if options["batch_size"] < 48:
        for calls in (3, 4):
            options["seed"] = calls
            train = commands(world, cache, None)["trainer"](tmp_path, **options)
            with monkeypatch.context() as patches:
                stop_later(patches, "trainer.share_step", calls)
                assert script("trainer", *train).code == 130
            err = script("trainer", *train).err
            require_full(err, "training")
            assert f"{7 * (calls - 1)}/" in err  # it begins where it stopped


@pytest.mark.parametrize("batch_size", [3, 8, 100])
def test_the_bars_of_the_other_scripts_end_full(script, world, cache, checkpoint, tmp_path,
                                                monkeypatch, batch_size):
    monkeypatch.setattr("antarctic.entries.CHUNK", 100)
    command = commands(world, cache, checkpoint)
    for name, function, calls, bars in (
            ("compute_cache", "antarctic.entries.append", 3, ["counting n-grams",
                                                               "encoding entries"]),
            ("sampler", "antarctic.records.append", 2, ["captioning"]),
            ("stories", "stories.append", 2, ["writing stories"])):
        options = {"batch_size": batch_size}
        if name == "stories":
            options |= {"caption": ["a dog", "a red whale", "two cats"], "num_return_sequences": 3,
                        "max_tokens": 5}
        first, again = tmp_path / f"{name}1", tmp_path / f"{name}2"
        for folder in (first, again):
            folder.mkdir()
        extra = ["encoding images"] if name == "sampler" else []
        require_full(script(name, *command[name](first, **options)).err, *bars, *extra)
        with monkeypatch.context() as patches:
            stop_later(patches, function, calls)
            stopped = script(name, *command[name](again, **options)).code == 130
        if stopped:  # a large batch is the only one
            require_full(script(name, *command[name](again, **options)).err, *bars)


def test_the_bar_of_images_counts_each_once(script, world, tmp_path, capsys):
    from antarctic.features import image_features
    pictures = datasets.read_coco(world, "train2017")[:41]
    (tmp_path / "bad.png").write_bytes(b"no image")
    pictures.insert(7, folders.Picture("bad", tmp_path / "bad.png"))
    clip = Clip(CLIP)
    _, good, bad = image_features(clip, pictures, tmp_path, batch_size=4, shard=16)
    assert (len(good), len(bad)) == (41, 1)
    require_full(capsys.readouterr().err, "encoding images")


def test_the_bar_of_an_index_ends_full(capsys, tmp_path, monkeypatch):
    from antarctic import cache_changes, index_build
    pytest.importorskip("faiss")
    rows = torch.nn.functional.normalize(torch.randn(700, 16), dim=1).numpy()
    files = tmp_path / "c[1].txt", tmp_path / "c[1].npy"
    cache_changes.write_cache(*files, [str(i) for i in range(700)], rows, "clip", "")
    monkeypatch.setattr(index_build, "BLOCK", 300)
    abandoned = tmp_path / ".i[1].faiss.0123456789abcdef.part"
    abandoned.touch()
    index_build.build_index(tmp_path / "i[1].faiss", *files)
    require_full(capsys.readouterr().err, "indexing entries")
    assert not abandoned.exists()
