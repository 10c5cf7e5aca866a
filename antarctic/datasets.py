"""Images with their captions: which layout a data folder has, its splits, its pictures.

The layouts' own files are read in `annotations` (JSON), `tables` (rows) and `shards` (tar files);
here stand those of image and text pairs, and what is done with all of them.
"""

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from antarctic.annotations import COCO, find_coco, find_karpathy, find_nocaps, json_layout
from antarctic.distributed import is_rank0, warn, warn_of
from antarctic.errors import InputError, counted, escape_control, print_safely
from antarctic.files import reason_of
from antarctic.folders import Picture, folder_images
from antarctic.layouts import (
    ALL,
    JOINED,
    Entry,
    Inside,
    Layout,
    lines_of,
    same_split,
    with_splits_of_paths,
)
from antarctic.reads import persistent
from antarctic.shards import COMPRESSED, find_shards, pattern_layout
from antarctic.tables import METADATA, find_metadata, find_table, metadata_layout, table_layout
from antarctic.texts import read_text

CAPTION_SUFFIXES = (".txt", ".caption")  # of a text beside its image
VAL_SHARE = 20  # one of so many images is for validation, where a data set has no splits
KINDS = ("COCO's annotations/captions_SPLIT.json, Karpathy's dataset_NAME.json, nocaps_*.json, "
         "Flickr's .token, .txt or .csv, metadata.jsonl or .csv, *.tar, images with .txt files")


class Taken(NamedTuple):
    """A split of a data set."""

    pictures: list  # of Picture
    domains: dict  # {image id: nocaps' domain}
    split: str


# ---------------------------------------------------------------------------------------- reading

def read_split(datadir, split=None, default="val2017", **needs):
    """DataSet(datadir).read(split, default, **needs)."""
    return DataSet(datadir).read(split, default, **needs)


class DataSet:
    """The data in a folder, a file of captions, a tar file or a pattern of tar files, see KINDS.

    What holds several splits is read once. Raises InputError where there is no such data.
    """

    def __init__(self, datadir):
        self.datadir = datadir
        self.known = []  # (Layout, its readers) of the layouts that have been looked at
        self.others = find_layouts(datadir)

    def layouts(self):
        """Yields (Layout, {split: function that returns a list of Entry})."""
        yield from self.known
        for layout in self.others:
            readers = layout.readers
            if None in readers:
                entries = readers[None]()
                readers = {name: partial(select, entries, name) for name in splits_of(entries)}
            self.known.append((layout, readers))
            yield self.known[-1]

    def read(self, split=None, default="val2017", need_images=True, need_captions=False):
        """The images of a split with their captions: a list of Picture.

        split: None is `default`, a name of COCO's, or what the layout calls the same. need_images:
        whether the image files must be there; they are not opened. need_captions: whether images
        without captions are left out. Pictures come in the order of their ids where these are
        numbers, else in that of the files. Raises InputError where there is no such split (the
        message lists those that are there), a file is not of its form, or a file name leads out of
        the data folder.
        """
        taken = self.take(split, default, need_images)
        if not need_captions:
            return taken.pictures
        without = [picture.id for picture in taken.pictures if not picture.captions]
        if len(without) == len(taken.pictures):
            raise InputError(f"no image of {taken.split} in {self.datadir} has a caption")
        warn_of(without, f"images of {taken.split} have no caption and are left out")
        return [picture for picture in taken.pictures if picture.captions]

    def take(self, split=None, default="val2017", need_images=True):
        """read, as Taken. A line on standard output says what was taken where it is not COCO's
        layout."""
        wanted = same_split(split or default)
        if split is None:
            wanted += same_split(default.removesuffix("2017"))
        there = []
        for layout, readers in self.layouts():
            name = next((name for name in wanted if name in readers), None)
            if name is not None:
                return take(layout, name, readers, need_images)
            there.append(f"{layout.name}: {', '.join(sorted(readers))}")
        if not there:
            raise InputError(f"there is no data set in {self.datadir}; these are read: {KINDS}")
        raise InputError(f"there is no split {split or default} in {self.datadir}; splits that are "
                         f"there: {'; '.join(there)}")


def read_coco(datadir, split, need_images=True):
    """read_split of a folder in COCO's layout alone. need_images: whether the folder of images must
    exist. Raises InputError."""
    datadir = Path(datadir)
    if not datadir.is_dir():
        raise InputError(f"there is no data folder at {datadir}")
    layout = find_coco(datadir)
    readers = layout.readers if layout else {}
    if split not in readers:
        raise InputError(f"there is no split {split} in {datadir / 'annotations'}; there is "
                         f"{', '.join(sorted(readers)) or 'none'}")
    return take(layout, split, readers, need_images).pictures


def take(layout, split, readers, need_images):
    """Taken, of a layout's split. readers: {split: function that returns a list of Entry}."""
    entries = readers[split]()
    if not entries:
        raise InputError(f"there is no image of {split} in {layout.source}")
    if type(entries[0].id) is int:
        entries = sorted(entries, key=lambda entry: entry.id)
    missing = [entry.id for entry in entries if not all(entry.captions)]
    warn_of(missing, f"images of {split} have captions that are missing, empty or null")
    paths = image_paths(layout, split, entries, need_images)
    pictures = [Picture(entry.id, path, tuple(filter(None, entry.captions)))
                for entry, path in zip(entries, paths) if path is not None]
    if layout.name != COCO and is_rank0():
        captions = sum(len(picture.captions) for picture in pictures)
        images = counted(len(pictures), "image")
        if ALL in readers and split != ALL:
            images += f" of {len(readers[ALL]()):,} (--split {ALL})"
        print_safely(escape_control(f"read {layout.name} in {layout.root}: {split}, {images}, "
                                    f"{counted(captions, 'caption')}"))
    domains = {entry.id: entry.domain for entry in entries if entry.domain}
    return Taken(pictures, domains, split)


# ----------------------------------------------------------------------------------------- splits

def splits_of(entries):
    """The splits of a layout whose splits are in one list: their own names, or train and val, and
    all."""
    names = {entry.split for entry in entries if entry.split}
    return [*sorted(names or {"train", "val"}), ALL]


def select(entries, split):
    """The entries of a split, one of splits_of.

    Where entries name no splits, val holds about every twentieth image, by a hash of its id: an
    image stays where it is when others are added, or come in another order.
    """
    if split == ALL:
        return entries
    if any(entry.split for entry in entries):
        names = JOINED.get(split, (split,))
        return [entry for entry in entries if entry.split in names]
    places = [share(entry.id) for entry in entries]
    most = max(1 / VAL_SHARE, min(places, default=0))  # so that there is one at least
    return [entry for entry, place in zip(entries, places) if (place <= most) == (split == "val")]


def share(number):
    """A number in [0, 1) that an image id determines."""
    digest = hashlib.sha256(f"{type(number).__name__} {number}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


# ----------------------------------------------------------------------------------------- images

def image_paths(layout, split, entries, need_images):
    """The path of each entry's image, None where a link leads out of the data folder. A file that
    is missing has the path where it should be. Raises InputError where none is there; of COCO's
    layout the folder is enough."""
    root, names = layout.root, layout.folders(split)
    if layout.checked:
        return [root / entry.name for entry in entries]
    folders = [str(root / name) for name in names if (root / name).is_dir()]
    if not need_images:
        folder = root / (names[0] if layout.name == COCO else "")
        return [folder / entry.name for entry in entries]
    if not folders:
        raise InputError(f"there is no image folder at {root / names[0]}")
    # COCO's folder of a split may itself be a link, as people link large folders.
    inside = Inside(root, *folders[:layout.name == COCO])
    paths, outside, missing = [], [], 0
    for entry in entries:
        path, found = find_image(folders, entry)
        if found and not inside(path):
            outside.append(path)
            path = None
        missing += not found
        paths.append(path and Path(path))
    if outside:
        # So are those of git-annex, DVC and the hub's snapshots, each a link into a store.
        warn(f"{len(outside):,} images of {split}, such as {outside[0]}, are links that lead out "
             f"of {root} and are left out; name a data folder that holds both, or make a copy "
             "without links, as cp -rL does")
    if len(outside) + missing == len(paths) and (outside or layout.name != COCO):
        raise InputError(f"none of the {len(paths):,} images of {split}, such as "
                         f"{entries[0].name}, is in {root}")
    return paths


def find_image(folders, entry):
    """(the path of an entry's image, whether it exists). The folder in which it was found comes
    first from then on."""
    names = [entry.name] if not entry.folder else [f"{entry.folder}/{entry.name}", entry.name]
    for i, folder in enumerate(folders):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.lexists(path):
                folders.insert(0, folders.pop(i))
                return path, True
    return os.path.join(folders[0], names[0]), False


# ---------------------------------------------------------------------------------------- layouts

def find_layouts(datadir):
    """Yields the Layouts that a folder, file or pattern holds, in the order in which they count."""
    path = Path(datadir)
    name = str(datadir)
    if os.path.isdir(path):
        require_listed(path)
        for find in (find_coco, find_karpathy, find_nocaps, find_table, find_metadata, find_shards,
                     find_pairs):
            layout = find(path)
            if layout:
                yield layout
    elif name.endswith((".tar", *COMPRESSED)):
        yield pattern_layout(name)
    elif not os.path.isfile(path):
        raise InputError(f"there is no data folder at {datadir}")
    elif path.suffix == ".json":
        yield json_layout(path)
    elif path.name in METADATA or path.suffix == ".jsonl":
        yield metadata_layout(path, path.parent)
    else:
        yield table_layout(path, path.parent)


def require_listed(folder):
    """Raises InputError where a folder cannot be listed."""
    try:
        persistent(partial(os.listdir, folder))
    except OSError as error:
        raise InputError(f"cannot read the folder {folder} ({reason_of(error)})") from error


def find_pairs(root):
    """The Layout of a folder of images with texts of the same names beside them, or None."""
    try:
        paths, _ = folder_images(root)
    except InputError:  # no images
        return None
    inside = Inside(root)
    pairs = {path: text for path in paths for text in texts_beside(path) if inside(text)}
    if not pairs:
        return None

    def read():
        entries = [Entry(path.relative_to(root).as_posix(), path.relative_to(root).as_posix(),
                         lines_of(read_text(pairs[path], "caption"), pairs[path])
                         if path in pairs else ())
                   for path in paths]
        return with_splits_of_paths(entries)

    return Layout("images and texts", root, root, {None: read}, checked=True)


def texts_beside(path):
    """The file of captions beside an image, if there is one: a list of one path or none."""
    for suffix in CAPTION_SUFFIXES:
        text = path.with_suffix(suffix)
        if text != path and text.is_file():
            return [text]
    return []
