"""Every system call by which a script writes, spoilt once: the run is killed before it, in its
middle or behind it, or the call fails, once or from then on.

A run that fails says why in one sentence, and the same command then ends with the files of an
uninterrupted run, to the byte. What a script reads fails in the same way.

CALLS=all ./test.sh tests/robustness/test_syscalls.py --dist load -rP spoils every call, and
CALLS=100 so many drawn ones of each case; the default is a few.
"""

import errno
import hashlib
import os
import random
import re
import shutil
import signal
from collections import namedtuple
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import BART, CLIP, GPT, commands, flags
from syscalls import AFTER, BEFORE, DONE, FAIL, MIDDLE, SHORT, Spoil, build, serving

from snowglobe import scenes

CALLS = os.environ.get("CALLS", "2")  # of each case, or "all"
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(not COMPILER, reason="there is no C compiler here")

WRITES = "write", "pwrite", "pwrite64", "writev"
CHANGES = "rename", "unlink", "mkdir", "link", "utime", "chmod", "ftruncate"
WRITE_ERRORS = {  # {errno: the functions that may fail with it}
    "ENOSPC": ("open", *WRITES, "fsync", "close", "mkdir", "link", "rename"),
    "EDQUOT": ("open", *WRITES, "fsync", "close", "mkdir", "link", "rename"),
    "EIO": ("open", *WRITES, "fsync", "close", "flock", *CHANGES),
    "EMFILE": ("open",),
    "EINTR": ("open", *WRITES, "fsync", "close", "flock", "ftruncate"),
    "EACCES": ("open", *CHANGES),
    "EROFS": ("open", *CHANGES),
}
READ_ERRORS = {
    "EIO": ("open", "read", "stat", "fstat", "mmap", "opendir"),
    "EACCES": ("open", "stat", "opendir"),
    "EMFILE": ("open", "opendir"),
    "ESTALE": ("open", "read", "stat", "fstat", "mmap", "opendir"),
}
# script, its arguments, and a folder that --savedir and its like begin as, or None.
Case = namedtuple("Case", "script arguments before")
CASES = ("cache", "cache-add", "cache-index", "trainer", "sampler", "sampler-again", "stories",
         "scorer")
RESUMED = "cache", "trainer", "sampler", "stories"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the runs take place. base; out, to which they write; server; cases, {name: Case}."""
    base = tmp_path_factory.mktemp("calls")
    with serving(build(base, COMPILER), base) as server:
        place = SimpleNamespace(base=base, out=base / "out", inputs=base / "inputs", server=server)
        place.cases = make_cases(place)
        yield place


def make_cases(place):
    """Makes a world of a few images, and what the scripts need of one another: {name: Case}."""
    inputs, out, server = place.inputs, place.out, place.server
    with ThreadPool(1) as pool:
        for split in ("train2017", "val2017"):
            scenes.write_split(inputs / "world", split, 6 if split == "train2017" else 3, 0, pool)
    models = {name: Path(shutil.copytree(path, inputs / name))
              for name, path in (("clip", CLIP), ("bart", BART), ("gpt", GPT))}
    clip, lm = {"clip_model": models["clip"]}, {"lm": models["bart"]}
    cache = SimpleNamespace(textfile=inputs / "c.txt", embfile=inputs / "c.npy")
    checkpoint, results = inputs / "best.safetensors", inputs / "results"
    arguments = commands(inputs / "world", cache, checkpoint)

    def succeed(script, arguments):
        run = server.run(script, arguments, out)
        assert run.code == 0, run.text

    new = {**clip, "topk": 12, "min_count": 2}
    succeed("compute_cache", arguments["compute_cache"](inputs, **new))
    train = {**clip, **lm, "topk": 3, "batch_size": 3, "save_seconds": 0}
    succeed("trainer", arguments["trainer"](inputs, **train))
    succeed("sampler", arguments["sampler"](results, **clip, **lm))
    old = {"datadir": None, "textfile": out / "c.txt", "embfile": out / "c.npy", **clip}
    small, large, photos = place.base / "small", place.base / "large", place.base / "photos"
    small.mkdir()
    for path in inputs.glob("c.*"):
        shutil.copy2(path, small)
    words = inputs / "words.txt"
    words.write_text("".join(f"a word {n}\n" for n in range(256)))
    succeed("compute_cache", arguments["compute_cache"](large, datadir=None, entries=words, **clip))
    shutil.copytree(inputs / "world" / "val2017", photos / "photos")
    sample = {**clip, **lm, "datadir": None, "images": [out / "photos"], "savedir": out / "results",
              "batch_size": 2, "csv": True, "sidecar": True, "metadata": True,
              "shards": out / "shards"}
    captioned = place.base / "captioned"  # what a run before has left
    reset(place, photos)
    succeed("sampler", arguments["sampler"](out, **sample))
    shutil.copytree(out, captioned)
    return {
        "cache": Case("compute_cache", arguments["compute_cache"](out, **new), None),
        "cache-add": Case("compute_cache", arguments["compute_cache"](
            out, **old, add=["a red whale", "an old train"], remove=["a"]), small),
        "cache-index": Case("compute_cache", arguments["compute_cache"](
            out, **old, index=out / "c.index"), large),
        "trainer": Case("trainer", arguments["trainer"](out, **train), None),
        "sampler": Case("sampler", arguments["sampler"](out, **sample), photos),
        "sampler-again": Case("sampler", arguments["sampler"](
            out, **sample, overwrite=True, caption_prefix="again, "), captioned),
        "stories": Case("stories", arguments["stories"](
            out, caption=None, captions=results / "captions.json", lm=models["gpt"], batch_size=2,
            max_tokens=6), None),
        "scorer": Case("scorer", flags({
            "results": results / "captions.json", "datadir": inputs / "world", "savedir": out,
            "tokenizer": "treebank", **clip}), None),
    }


def reset(place, before):
    """Makes the folder that a run writes to what it is in the beginning."""
    shutil.rmtree(place.out, ignore_errors=True)
    if before:
        shutil.copytree(before, place.out)


def contents(folder):
    """{path in the folder: bytes} of all files in it and below it."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def visible(name):
    return not any(part.startswith(".") for part in Path(name).parts)


def state_of(folder):
    """A digest of what a run left in a folder, without the numbers of processes."""
    digest = hashlib.sha256()
    for name, content in contents(folder).items():
        if not visible(name):
            name = re.sub(r"\d+", "", name)
        digest.update(f"{name} {len(content)} ".encode(errors="surrogateescape"))
        digest.update(b"" if name.endswith("lock") else content)
    return digest.hexdigest()


def spoils(calls, errors):
    """What becomes of each call: a list of Spoils. calls: of an uninterrupted run. errors: see
    WRITE_ERRORS. Of these a call gets EINTR and two others, in turns: once, and from then on."""
    found = []
    for call in calls:
        if errors is WRITE_ERRORS:
            found.append(Spoil(call.number, BEFORE))
            if call.name in WRITES and call.bytes > 1:
                found += [Spoil(call.number, MIDDLE), Spoil(call.number, SHORT)]
        fitting = [name for name, functions in errors.items() if call.name in functions]
        if "EINTR" in fitting:  # Python tries again, for ever
            found.append(Spoil(call.number, FAIL, errno.EINTR))
            fitting.remove("EINTR")
        if fitting:
            once, ever = (fitting[(call.number + n) % len(fitting)] for n in (0, 1))
            found += [Spoil(call.number, FAIL, getattr(errno, once)),
                      Spoil(call.number, FAIL, getattr(errno, ever), errors[ever])]
    if errors is WRITE_ERRORS:
        found.append(Spoil(len(calls), AFTER))
    return found


def drawn(spoils, name):
    """A sample of them, or all."""
    if CALLS == "all":
        return spoils
    return sorted(random.Random(name).sample(spoils, min(int(CALLS), len(spoils))))


def says(spoil, call):
    """A spoilt call in words."""
    how = {BEFORE: "killed before", MIDDLE: "killed in the middle of", AFTER: "killed after",
           SHORT: "half of", FAIL: errno.errorcode.get(spoil.code, "")}[spoil.how]
    ever = " and from then on" if spoil.names else ""
    return f"{how} {call.name} {call.path} (call {spoil.number}){ever}"


def problem_of_end(run, spoil, named):
    """What is wrong with the way in which a spoilt run ended, or None. named: whether a line names
    a file that has to do with the fault."""
    last = (run.text.splitlines() or [""])[-1]
    if "Traceback" in run.text or "Exception ignored" in run.text:
        return "a traceback: " + next(
            (line for line in reversed(run.text.splitlines()) if re.match(r"\w+(\.\w+)*: ", line)),
            last)
    if spoil.how in (BEFORE, MIDDLE, AFTER):
        return None if run.code == -signal.SIGKILL else f"exit code {run.code}"
    if run.code not in (0, 2):
        return f"exit code {run.code}: {last}"
    if run.code == 2 and not (last.startswith("error: ") and named(last)):
        return f"the sentence does not name the file: {last}"
    return None


def sweep(place, case, name, side="w"):
    """Spoils calls of a case, each in a run of its own. Returns the problems, a list of texts."""
    errors, watched = (WRITE_ERRORS, place.out) if side == "w" else (READ_ERRORS, place.base)

    def run(spoil=None):
        return place.server.run(case.script, case.arguments, watched, side, spoil)

    reset(place, case.before)
    begun = contents(place.out) if case.before else {}
    whole = run()
    assert whole.code == 0, whole.text
    ended, good, problems, hits = contents(place.out), set(), [], 0
    for spoil in drawn(spoils(whole.calls, errors), name):
        reset(place, case.before)
        spoilt = run(spoil)
        hit = next((call for call in spoilt.calls if call.how != DONE), None)
        if not hit:  # a run whose calls are other ones
            problems += [f"call {spoil.number} did not come: {spoilt.text}"] * bool(spoilt.code)
            continue
        hits += 1

        def named(line, path=Path(hit.path)):
            return path.name in line or (side == "w" and str(place.out) in line)

        problem = problem_of_end(spoilt, spoil, named) or (
            problem_of_files(contents(place.out), begun, ended, spoilt, case, named))
        state = state_of(place.out)
        if state not in good:
            again = run()
            if again.code:
                problem = f"the next run fails: {again.text[-300:]}"
            elif differing := differences(comparable(contents(place.out), side),
                                          comparable(ended, side)):
                problem = f"after the next run these are others: {differing}"
            elif not problem:
                good.add(state)
        if problem:
            problems.append(f"{says(spoil, hit)}: {problem}".replace(str(place.base), ""))
            print(f"{name}: {problems[-1]}", flush=True)
    print(f"{name}: {hits} calls were spoilt, {len(problems)} problems")
    return problems


def differences(files, others):
    """The names of files that differ or are missing in one of two results of contents()."""
    return sorted(name for name in files.keys() | others.keys()
                  if files.get(name) != others.get(name))


def problem_of_files(files, begun, ended, run, case, named):
    """What is wrong with the files that a spoilt run left, or None. begun, ended: the files before
    and after an uninterrupted run."""
    if run.code == 0:
        differing = [name for name in differences(files, ended) if visible(name)]
        silent = [name for name in differing
                  if Path(name).name not in run.text and not any(map(named, run.text.splitlines()))]
        return f"it ends well, but these are others: {silent}" if silent else None
    # The trainer's are those of an epoch, the sampler's those of the images that could be read.
    if case.script == "trainer" or "could not be read now" in run.text:
        return None
    torn = [name for name, content in files.items() if name in ended
            and content not in (begun.get(name), ended[name])]
    return f"these are neither the old nor the new files: {torn}" if torn else None


def comparable(files, side):
    """The files that must be equal in the end. An image that could not be read at first is encoded
    alone, which changes the last digits of its vector and of its scores, and it is listed last."""
    if side == "w":
        return files

    def rounded(content):
        content = re.sub(rb'"seal": "\w+"', b"", content)
        content = re.sub(rb"\d\.\d{4,}", lambda number: b"%.4f" % float(number[0]), content)
        return sorted(content.splitlines())

    return {name: rounded(content) for name, content in files.items()
            if not Path(name).name.startswith("features-") and not name.endswith(".tar")}


def fail_for(problems):
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.mark.parametrize("name", CASES)
def test_a_call_that_writes_is_spoilt_and_the_next_run_ends_as_if_nothing_had_been(place, name):
    fail_for(sweep(place, place.cases[name], name))


@pytest.mark.parametrize("name", RESUMED)
def test_a_call_of_a_resumed_run_is_spoilt(place, name):
    """As above, in a run that resumes from one that was killed in its middle."""
    case, folder = place.cases[name], place.base / f"{name}-stopped"
    reset(place, case.before)
    calls = place.server.run(case.script, case.arguments, place.out).calls
    ended = contents(place.out)
    reset(place, case.before)
    stop = Spoil(len(calls) // 2, BEFORE)
    assert place.server.run(case.script, case.arguments, place.out, spoil=stop).code == -9
    shutil.copytree(place.out, folder)
    fail_for(sweep(place, case._replace(before=folder), f"{name}-resumed"))
    assert contents(place.out).keys() >= {name for name in ended if visible(name)}


@pytest.mark.parametrize("name", CASES)
def test_a_call_that_reads_fails_and_a_sentence_names_the_file(place, name):
    fail_for(sweep(place, place.cases[name], f"{name}-reading", side="r"))
