"""What the layouts of data sets share: an image as a file lists it, and checks of names, ids,
captions and links."""

import csv
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from antarctic.errors import InputError
from antarctic.texts import one_line

# Names of the same split in different data sets.
SAME_SPLITS = (("train", "training"), ("val", "validation", "valid", "dev"), ("test", "testing"))
SPLIT_NAMES = frozenset(name for names in SAME_SPLITS for name in names)
JOINED = {"train": ("train", "restval")}  # Karpathy's restval is trained on, as all do
ALL = "all"
LONGEST_NAME = 4096  # characters of a path
PLAIN_NAME = re.compile(r"\w[\w.-]{0,250}", re.ASCII)


class Entry(NamedTuple):
    """An image as a data set lists it."""

    id: int | str
    name: str  # path of its file, in the folder of images
    captions: tuple  # texts; an empty one is missing
    split: str | None = None
    folder: str = ""  # where the file may lie in the folder of images
    domain: str | None = None  # nocaps'


class Layout(NamedTuple):
    """A data set that was recognised, and not yet read."""

    name: str  # "Karpathy's JSON"
    source: Path  # what it is read from
    root: Path  # the data folder
    # {split: function without arguments that returns a list of Entry}. None: all splits are in one
    # list, where each Entry names its own, if there are any.
    readers: dict
    # Of a split: the folders of its images, in root. The first one that has a file counts.
    folders: Callable = lambda split: ("",)
    checked: bool = False  # whether the reader has seen each file, and that no link leads out


def same_split(split):
    """Names under which a split is looked for, itself first."""
    for names in SAME_SPLITS:
        if split in names:
            return [split, *(name for name in names if name != split)]
    return [split]


def split_of_path(name):
    """The split that a path's first folder is named after, or None."""
    first = name.split("/")[0]
    return first if "/" in name and first in SPLIT_NAMES else None


def with_splits_of_paths(entries):
    """Entries with the splits that their first folders are named after, if all are."""
    splits = [split_of_path(entry.name) for entry in entries]
    if not all(splits):
        return entries
    return [entry._replace(split=split) for entry, split in zip(entries, splits)]


@contextmanager
def reading(path, kind):
    """Wraps code that reads a user's file of the form kind. Raises InputError where it is not of
    that form."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise InputError(f"{path} is not {kind} ({type(error).__name__}: {error})") from error


def inside_name(name, source):
    """A file name of a data set, as it is. source: the file that holds it.

    Raises InputError where it leads out of the folder of images, which is not a mistake but an
    attack, TypeError where it is no text, and ValueError where no file can have it.
    """
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is no file name")
    if PLAIN_NAME.fullmatch(name):  # nearly all are
        return name
    name.encode()  # UnicodeEncodeError: half a surrogate pair
    path = Path(name)
    if path.anchor or ".." in path.parts or "\0" in name:
        raise InputError(f"{source} has the file name {name!r}, which is no path inside the folder "
                         "of images")
    if not path.parts or len(name) > LONGEST_NAME:
        raise ValueError(f"{name[:80]!r} is no file name")
    return name


def image_id(value, place="", errors="strict"):
    """An image id of a file: a whole number, which a table's program may have written as 7.0, or a
    text. place: where in the file, for the message. errors: of str.encode. Raises TypeError or
    ValueError for another."""
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) not in (int, str):
        raise TypeError(f"{place}{': ' * bool(place)}{repr(value)[:60]} is no image id")
    f"{value}".encode(errors=errors)  # half a surrogate pair; more digits than Python writes
    return value


def caption_of(value, source):
    """A caption of the file source as one line; an empty text where it is null. Raises
    AttributeError where it is something else, and InputError where it is too long."""
    return "" if value is None else one_line(value, source)


def captions_of(value, source):
    """A caption, or a list of them, as a tuple of texts, see caption_of."""
    values = value if isinstance(value, list) else [value]
    return tuple(caption_of(text, source) for text in values)


def lines_of(text, source):
    """The captions of a text that belongs to one image, one a line, see caption_of. One empty
    caption where all lines are blank."""
    return captions_of([line for line in text.split("\n") if line.strip()] or [""], source)


def distinct_ids(entries, source):
    """Entries, all of them. Raises InputError where an image is listed twice, or ids are numbers
    and texts."""
    seen = set()
    for entry in entries:
        if entry.id in seen:
            raise InputError(f"{source} lists the image {entry.id!r} twice")
        seen.add(entry.id)
    if len({type(entry.id) for entry in entries}) > 1:
        raise InputError(f"{source} has image ids that are numbers and others that are texts")
    return entries


class Inside:
    """Inside(*folders)(path): whether a path leads, through all links, to a place in one of the
    folders."""

    def __init__(self, *folders):
        self.roots = [os.path.realpath(folder) for folder in folders]
        self.known = {}  # {folder: whether it is inside}

    def __call__(self, path):
        if os.path.islink(path):
            return self.holds(path)
        folder = os.path.dirname(path)
        if folder not in self.known:
            self.known[folder] = self.holds(folder)
        return self.known[folder]

    def holds(self, path):
        path = PurePosixPath(os.path.realpath(path))
        return any(path.is_relative_to(root) for root in self.roots)
