"""Writing: exclusively, never through a link, for good; and what killed runs leave goes."""

import contextlib
import errno
import os
import re
import shutil
import signal
import tempfile
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from antarctic import exports, files, leftovers, locks, results
from antarctic.errors import InputError
from antarctic.records import Records

CALLS = "open", "fsync", "link", "replace", "unlink", "mkdir", "close"  # of the module os


def text_of(caption):
    return caption


def write_sidecars(folder, overwrite=False):
    names = ["0", "1" * 250]
    sidecars = {f"{folder}/{name}.jpg": folder / f"{name}.txt" for name in names}
    records = [{"file": file, "caption": f"a dog {file[-5]}"} for file in sidecars]
    assert not exports.write_sidecars(records, sidecars, text_of, overwrite)


def overwrite_sidecars(folder):
    write_sidecars(folder, overwrite=True)


def write_metadata(folder):
    records = [{"file": f"{folder}/{i}.jpg", "caption": "a dog"} for i in range(2)]
    assert not exports.write_metadata(folder / "metadata.jsonl", records, text_of, True)


def write_new_folders(folder):
    files.output_folder(folder / "a" / "b")
    files.write_lines(folder / "a" / "b" / "c.txt", ["a dog"])


def tree(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes()
            for path in folder.rglob("*")}


def killed_at(number, function, *arguments):
    """Runs a function in a process that kills itself at its call of this number of CALLS, half of
    them before the call, half of them after it. Returns whether it was killed."""
    pid = os.fork()
    if pid == 0:
        calls = count()

        def deadly(call):
            def wrapped(*arguments, **options):
                if next(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = call(*arguments, **options)
                if next(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result
            return wrapped

        for name in CALLS:
            setattr(os, name, deadly(getattr(os, name)))
        status = 1
        with contextlib.suppress(BaseException):
            function(*arguments)
            status = 0
        os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("write", [write_sidecars, overwrite_sidecars, write_metadata,
                                   write_new_folders])
def test_after_a_kill_at_any_point_the_next_run_leaves_nothing_of_its_own(tmp_path, write):
    def new_folder(name):
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.jpg").write_bytes(b"photo")
        if write in (overwrite_sidecars, write_metadata):
            (tmp_path / name / "0.txt").write_text("of a person")
        return tmp_path / name

    def run(folder):
        files.output_folder(folder)
        write(folder)
    run(whole := new_folder("whole"))
    for number in count():
        folder = new_folder(str(number))
        if not killed_at(number, run, folder):
            break
        for path in (path for path in folder.rglob("*.txt") if path.name != "0.txt"):
            assert path.read_bytes() == (whole / path.relative_to(folder)).read_bytes()
        run(folder)
        assert tree(folder) == tree(whole), number
    assert number > 12


def test_only_what_a_dead_run_made_is_removed(tmp_path, monkeypatch):
    def name_by(**changes):
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(*((os, name) if name == "getpid" else (leftovers, name)),
                              lambda *_, value=value: value)
            return leftovers.temporary_path(tmp_path / "photo.txt")

    dead = {"getpid": 999_999_999}
    gone = [name_by(**dead), name_by(start_and_state=(7, b"S")), name_by(this_host="01234567")]
    alive = [leftovers.temporary_path(tmp_path / "photo.txt"), name_by(this_host="01234567")]
    for path in [*gone, *alive]:
        path.write_text("half")
    os.utime(gone[2], (1e9, 1e9))  # of another host
    (tmp_path / "mine.txt").write_text("of a person")
    link, hidden, changed = name_by(**dead), name_by(**dead), name_by(**dead)
    link.symlink_to("mine.txt")
    hidden.mkdir()
    (hidden / "photo.jpg").touch()
    changed = changed.with_name(changed.name.replace("photo", "photos"))  # its checksum is wrong
    near = [changed, *(tmp_path / name for name in (
        ".photo.tmp", ".foo-12345678.1.tmp", ".photo.txt.1.1.01234567.01234567.01234567.tmp",
        "photo.tmp", ".tmp", ".*.1.tmp", name_by(**dead).name + "x"))]
    for path in near:
        path.touch()
        os.utime(path, (1e9, 1e9))
    os.utime(link, (1e9, 1e9), follow_symlinks=False)
    kept = {*near, *alive, link, hidden, tmp_path / "mine.txt"}
    files.output_folder(tmp_path)
    assert {*tmp_path.iterdir()} == kept
    if not os.geteuid():  # what another user made stays
        other = name_by(**dead)
        other.touch()
        os.chown(other, 12345, 12345)
        files.output_folder(tmp_path)
        assert other.exists()


def test_what_cannot_be_removed_keeps_nothing_else(tmp_path, monkeypatch):
    """Another run may remove the same files, and a full disk has no room for an age to be taken."""
    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "this_host", lambda: "01234567")
        elsewhere = leftovers.temporary_path(tmp_path / "a")
        patch.undo()
        patch.setattr(os, "getpid", lambda: 999_999_999)
        dead = [leftovers.temporary_path(tmp_path / "a") for _ in range(8)]
        lock = f"process 999999999 on here ({leftovers.this_process().name})\n"
    for path in (elsewhere, *dead):
        path.touch()
    held = [tmp_path / ".a.lock", tmp_path / ".b.lock"]
    for path in held:
        path.write_text(lock)

    def refused(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    is_mine, calls = leftovers.is_mine, count()

    def vanishes(entry):
        if not next(calls):
            raise FileNotFoundError(entry.path)
        return is_mine(entry)
    monkeypatch.setattr(leftovers, "age_of", refused)
    leftovers.remove_leftovers(tmp_path)
    assert {*tmp_path.iterdir()} == {elsewhere, *held}
    monkeypatch.setattr(locks, "is_mine", vanishes)
    locks.remove_dead_locks(tmp_path)
    assert len({*tmp_path.iterdir()}) == 2


def test_a_persons_captions_csv_stays(tmp_path):
    rows = [dict(zip(results.COLUMNS, (1, "1.jpg", "a dog", 0.3)))]
    path = tmp_path / "captions.csv"
    results.write_captions(tmp_path, rows, True)
    ours = path.read_bytes()
    results.write_captions(tmp_path, rows, False)
    assert not path.exists()
    for text in (b"", b"mine", b"image_id,file,caption,score\r\n", ours[:20]):
        path.write_bytes(text)
        results.write_captions(tmp_path, rows, False)
        assert path.read_bytes() == text
    path.unlink()
    (tmp_path / "ours").write_bytes(ours)
    path.symlink_to("ours")
    results.write_captions(tmp_path, rows, False)
    assert path.is_symlink()


def test_a_killed_pages_folder_goes_with_its_uploads(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 999_999_999)
        prefix = f"page-{leftovers.this_process().name}-"
    gone, open_to_all, link = (Path(tempfile.mkdtemp(prefix=prefix)) for _ in range(3))
    (gone / "upload").mkdir()
    (tmp_path / "mine").write_text("of a person")
    (gone / "upload" / "photo.jpg").symlink_to(tmp_path / "mine")
    open_to_all.chmod(0o755)
    link.rmdir()
    link.symlink_to(tmp_path)
    with leftovers.scratch_folder("page") as first, leftovers.scratch_folder("page") as second:
        left = {*tmp_path.iterdir()}
        assert left == {open_to_all, link, tmp_path / "mine", Path(first), Path(second)}
    link.unlink()
    assert (tmp_path / "mine").read_text() == "of a person"


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "\udcff" * 255, "a\nb", "-", ".x"])
def test_names_of_temporary_files_fit_every_file_system(tmp_path, name):
    path = tmp_path / name
    temporary = leftovers.temporary_path(path)
    assert len(os.fsencode(temporary.name)) <= 120 and temporary.name.isascii()
    assert leftovers.writer_of(temporary.name).has_died() is False
    assert temporary != leftovers.temporary_path(path)
    files.write_lines(path, ["a dog"])
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["link", "nowhere", "hard link", "pipe", "folder"])
def test_a_file_that_grows_is_never_something_elses(tmp_path, kind):
    mine, path = tmp_path / "mine", tmp_path / "part"
    mine.write_text("of a person")
    {"link": lambda: path.symlink_to(mine), "nowhere": lambda: path.symlink_to(tmp_path / "new"),
     "hard link": lambda: os.link(mine, path), "pipe": lambda: os.mkfifo(path),
     "folder": path.mkdir}[kind]()
    with pytest.raises(InputError, match="is a link, a folder or a pipe; remove it"):
        files.append(path, b"a dog")
    assert mine.read_text() == "of a person" and not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------- power cuts

@contextlib.contextmanager
def pending_names():
    """Yields a set of the names that were made, replaced or removed, and whose folder was not
    synced since: a power cut would undo that."""
    pending, real = set(), {name: getattr(os, name) for name in CALLS}

    def changed(path):
        pending.add(os.path.abspath(path))

    def changing(name, which):
        def wrapped(*arguments, **options):
            result = real[name](*arguments, **options)
            changed(arguments[which])
            return result
        return wrapped

    def opened(path, flags, *mode, **options):
        new = flags & os.O_CREAT and not os.path.lexists(path)
        number = real["open"](path, flags, *mode, **options)
        if new:
            changed(path)
        return number

    def fsync(number):
        real["fsync"](number)
        path = os.path.realpath(f"/proc/self/fd/{number}")
        pending.difference_update([name for name in pending if os.path.dirname(name) == path])

    with contextlib.ExitStack() as stack:
        for name, fake in {"open": opened, "fsync": fsync, "replace": changing("replace", 1),
                           "link": changing("link", 1), "unlink": changing("unlink", 0),
                           "mkdir": changing("mkdir", 0)}.items():
            stack.enter_context(mock.patch.object(os, name, fake))
        yield pending


def is_result(path):
    return not re.fullmatch(r"\..*\.(tmp|lock)", os.path.basename(path))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="only Linux tells what is synced")
@pytest.mark.parametrize("write", [write_sidecars, overwrite_sidecars, write_metadata,
                                   write_new_folders])
def test_names_are_on_the_disk_before_they_are_reported(tmp_path, write):
    with pending_names() as pending:
        write(tmp_path)
        assert not [*filter(is_result, pending)]
        (tmp_path / "no result").touch()
        files.append(tmp_path / "part", b"a dog")
        files.move(tmp_path / "part", tmp_path / "whole")
        files.remove(tmp_path / "whole")
        assert not [*filter(is_result, pending)]
        os.mkdir(tmp_path / "new")
        assert pending  # the test sees what is left open


def test_folders_that_cannot_be_opened_or_synced_are_no_error(tmp_path, monkeypatch):
    def refused(number):
        raise OSError(number, os.strerror(number))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: refused(errno.EINVAL))
        files.sync_folder(tmp_path)
        patch.setattr(os, "fsync", lambda _: refused(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            files.sync_folder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_: refused(errno.EACCES))
        files.sync_folder(tmp_path)


# ------------------------------------------------------------------------------- calls that fail

RECORD = SimpleNamespace(_asdict=lambda: {"caption": "a dog", "score": 0.3, "table": [],
                                          "candidates": [["a dog", 0.3, -1.0]]})


def write_all(folder):
    """What the scripts write and remove, without their models."""
    from antarctic.folders import Picture
    pictures = [Picture(i, folder / f"{i}.jpg", (), f"{i}" * 64) for i in range(2)]
    folder = files.output_folder(folder / "results")
    for stale in ("captions.csv", "ref0.txt", f"details-{'1' * 16}.jsonl.part"):
        shutil.copy(os.devnull, folder / stale)
    (folder / "captions.csv").write_bytes(b"\xef\xbb\xbfimage_id,file,caption,score\r\n")
    records = Records(folder, "0" * 16)
    records.append(pictures, [RECORD] * 2)
    return results.write_results(folder, records, pictures)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO,
                                    errno.EBUSY])
@pytest.mark.parametrize("name", CALLS[:-1])
def test_every_call_that_fails_is_a_sentence_that_names_a_file(tmp_path, monkeypatch, name, number):
    """Each call fails in turn, and all that follow it."""
    call, at = getattr(os, name), count()
    for first in at:
        folder, calls = tmp_path / str(first), count()

        def failing(*arguments, calls=calls, first=first, **options):
            if next(calls) >= first:
                path = arguments[0] if isinstance(arguments[0], (str, Path)) else None
                raise OSError(number, os.strerror(number), path)
            return call(*arguments, **options)

        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            if name == "link":  # only of sidecars, which are told of one by one
                sidecars = {"a.jpg": folder / "a.txt"}
                left = exports.write_sidecars([{"file": "a.jpg", "caption": "a"}], sidecars,
                                              text_of, False)
                assert left == {folder / "a.txt": os.strerror(number)}
                assert not list(folder.iterdir())
                return
            with contextlib.suppress(InputError):
                write_all(folder)
                break
        with monkeypatch.context() as patch, pytest.raises(InputError, match=re.escape(
                os.strerror(number))) as error:
            calls = count()
            patch.setattr(os, name, lambda *a, **o: failing(*a, calls=calls, **o))  # noqa: B023
            write_all(tmp_path / f"{first} again")
        assert str(tmp_path / f"{first} again") in str(error.value)
    assert first > (2 if name == "unlink" else 0)


@pytest.mark.parametrize("name, content", [
    ("preds.txt", b"a dog\n"), ("preds.txt", b"a dog\na dog"), ("preds.txt", None),
    ("captions.json", b"[]"), ("captions.json", b"[{"), ("details.jsonl", b"{}\n")])
def test_results_are_counted_before_they_are_called_done(tmp_path, monkeypatch, name, content):
    """Another run writes to the same place, where locks do not work."""
    path, write = tmp_path / "results" / name, results.check_results

    def other_run(savedir, records):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        write(savedir, records)
    monkeypatch.setattr(results, "check_results", other_run)
    with pytest.raises(InputError, match=re.escape(str(path))):
        write_all(tmp_path)
    monkeypatch.undo()
    assert len(list(path.parent.glob("details-*.part"))) == 2  # the same command resumes
    assert write_all(tmp_path)[1] == 0
