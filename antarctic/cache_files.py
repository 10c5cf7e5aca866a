"""The three files of a cache: entries, embeddings and their description. They belong together."""

import os
import time
from pathlib import Path
from typing import NamedTuple

from antarctic.bounded import MOST_SETTINGS, MissingError, parse_json
from antarctic.errors import InputError
from antarctic.files import existing_file, move, remove
from antarctic.held import HeldFile
from antarctic.texts import LONGEST_TEXT

ATTEMPTS, PAUSE = 100, 0.05  # a writer moves its three files in less than these seconds
STATED = "clip_model", "text_sha256", "prefix"


def staging_path(path):
    """Where a file of a cache is kept until all of them are written."""
    return Path(path).with_name(f".{Path(path).name}.new")


def cache_lock(embfile):
    """The lock of whoever writes a cache: a path for locks.locked."""
    return Path(embfile).with_name(f".{Path(embfile).name}.lock")


def finish_cache(textfile, embfile):
    """Moves the files that write_cache staged into place, also those of a run that was killed while
    it moved them. Only a run that may write the cache calls this, under its lock.

    The description is staged last: where it exists, all files are whole. So text and embeddings
    always belong together. Where it does not, a run was killed while it staged the others, which
    are removed.
    """
    files = textfile, embfile, f"{embfile}.json"
    if staging_path(files[-1]).is_file():
        for path in files:
            move(staging_path(path), path, missing_ok=True)  # a killed run has moved it
    elif left := [path for path in map(staging_path, files) if path.is_file()]:
        remove(*left)


def whole(path, embfile):
    """Where a file of the cache embfile is that belongs to the other two: its Path, or, where a run
    was killed while it moved new files into place, that of the new one that it left."""
    staged = staging_path(path)
    moving = staging_path(f"{embfile}.json").is_file()
    return staged if moving and staged.is_file() else Path(path)


def is_cache_file(path):
    """Whether a text or embeddings are there, also where a killed run has yet to move them. The
    names of the two differ in the suffix."""
    return whole(path, Path(path).with_suffix(".npy")).is_file()


def existing_caches(textfiles, embfiles):
    """Pairs of paths (text, embeddings). Raises InputError where a file is missing or the numbers
    of files differ."""
    if len(textfiles) != len(embfiles):
        raise InputError(f"got {len(textfiles)} --textfile but {len(embfiles)} --embfile; they go "
                         "in pairs")
    pairs = list(zip(map(Path, textfiles), map(Path, embfiles)))
    for textfile, embfile in pairs:
        for path, kind in ((textfile, "cache text"), (embfile, "cache embeddings")):
            if not whole(path, embfile).is_file():
                existing_file(path, kind)
    return pairs


# ---------------------------------------------------------------------------------------- opening

class HeldCache(NamedTuple):
    """The files of a cache, opened as they belong together; description is None where there is
    none."""

    text: HeldFile
    embeddings: HeldFile
    description: HeldFile | None


def open_cache(textfile, embfile):
    """The HeldCache of one state of a cache, though another run may replace it meanwhile. Nothing
    is written. Raises InputError where a file is missing or cannot be read."""
    names = Path(textfile), Path(embfile), Path(f"{embfile}.json")
    looked_at = [*names, *map(staging_path, names)]
    for _ in range(ATTEMPTS):
        before = [identity(path) for path in looked_at]
        held = HeldCache(*[hold(whole(name, embfile), name) for name in names])
        if before == [identity(path) for path in looked_at]:
            if None in held[:2]:
                existing_caches([textfile], [embfile])
                break  # it has come back
            return held
        time.sleep(PAUSE)  # a rename fell between
    raise InputError(f"{embfile} is being replaced again and again; rerun the same command once no "
                     "other run writes to it")


def identity(path):
    """What tells whether a name stands for the same bytes; None where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def hold(path, name):
    """A HeldFile, or None where there is none. Raises InputError where it cannot be opened."""
    try:
        return HeldFile(path, name=name)
    except MissingError:
        return None


# ------------------------------------------------------------------------------------ description

class Description(NamedTuple):
    """What write_cache stored beside the embeddings. digests: one after the other, see Rows.digest;
    None where an earlier version wrote none."""

    clip_model: str
    text_sha256: str
    prefix: str
    digests: str | None

    def stated(self):
        """What the description of an index repeats, a dict."""
        return {name: getattr(self, name) for name in STATED}


def read_description(held):
    """The Description that a HeldFile holds; None for None. Raises InputError where it holds
    something else."""
    if held is None:
        return None
    try:
        if held.size > MOST_SETTINGS:
            raise ValueError
        values = parse_json(held.read().decode("utf-8-sig"), held.title, "description")
        fields = [values[name] + "" for name in STATED]
        digests = values.get("rows_sha256", "") + ""
        if len(values["prefix"]) > LONGEST_TEXT:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the {held.title} is not the description of a cache; delete it to load "
                         "the cache unchecked") from error
    return Description(*fields, digests or None)


def cache_description(embfile):
    """What the description beside the embeddings states, a dict; None where there is none. Raises
    InputError where it is something else."""
    path = Path(f"{embfile}.json")
    description = read_description(hold(whole(path, embfile), path))
    return description and description.stated()
