"""WebDataset's tar shards, of each key an image and its caption: read without unpacking, and
written."""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path

from tqdm import tqdm

from antarctic import tars
from antarctic.distributed import warn
from antarctic.errors import InputError
from antarctic.files import atomic, output_folder, reason_of, remove, write_json
from antarctic.folders import IMAGE_SUFFIXES
from antarctic.layouts import SPLIT_NAMES, Entry, Inside, Layout, captions_of, lines_of, reading
from antarctic.reads import persistent

# As WebDataset has it: all up to the first dot of a name is its key, the rest says what it is.
KEY = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)")
FIELDS = "caption", "captions", "text"  # of a .json that hold the caption
LONGEST_MEMBER = 1 << 20  # bytes of a caption's member
MOST_SHARDS = 100_000  # of a pattern
RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
SIZES = "sizes.json"  # {name of a shard: images in it}, as OpenCLIP's users know it
SHARD = "captions-%06d.tar"  # data sets of others have 000000.tar, and sizes.json, too
SHARD_IMAGES, SHARD_BYTES = 10_000, 1 << 30  # of a shard at most
COMPRESSED = ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"


# ------------------------------------------------------------------------------------------ shards

def read_shards(paths, root):
    """A list of Entry of some tar files, in their order. Their names are virtual paths relative to
    root, see tars. Ids are keys, with the name of the shard where two shards share one.

    Raises InputError where a file is no uncompressed tar file, or holds captions that cannot be
    read. Warns of what is left out.
    """
    entries, without, twice = [], [], []  # twice: members that are a second image of a key
    for path in paths:
        where = os.path.relpath(path, root)
        samples = read_samples(path, twice)
        without += [f"{where}/{key}" for key, (image, _) in samples.items() if image is None]
        entries += [(where, key, image, captions) for key, (image, captions) in samples.items()
                    if image is not None]
    if twice:
        warn(f"{len(twice):,} members, such as {twice[0]}, are a second image of their key and are "
             "left out")
    if without:
        warn(f"{len(without):,} keys, such as {without[0]}, have no image and are left out")
    keys = Counter(key for _, key, _, _ in entries)
    shared = len(keys) < len(entries)
    return [Entry(f"{where.removesuffix('.tar')}/{key}" if shared else key, f"{where}/{image}",
                  captions) for where, key, image, captions in entries]


def read_samples(path, twice):
    """{key: [name of the image or None, captions]} of a tar file. Adds to `twice` the paths of
    images whose key has one already."""
    index = tars.index_of(path)
    for problem in index.problems:
        warn(problem)
    samples, texts = {}, {}  # texts: {key: [(suffix, name)]}
    for name in index.members:
        match = KEY.fullmatch(name)
        if not match:
            continue
        key, suffix = match[1], match[2].lower()
        if suffix in ("txt", "caption", "json"):
            texts.setdefault(key, {})[suffix] = name
        elif f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES:
            sample = samples.setdefault(key, [name, ()])
            if sample[0] != name:
                twice.append(f"{path}/{name}")
    try:
        with persistent(partial(open, path, "rb")) as file:
            for key, names in texts.items():
                sample = samples.setdefault(key, [None, ()])
                suffix = next(suffix for suffix in ("txt", "caption", "json") if suffix in names)
                sample[1] = member_captions(path, names[suffix], suffix, file, index)
    except OSError as error:
        raise InputError(f"cannot read {path} ({reason_of(error)})") from error
    return samples


def member_captions(path, name, suffix, file, index):
    """The captions of a tar file's member, as a tuple. file: the open tar file."""
    offset, size = index.members[name]
    source = f"{path}/{name}"
    if size > LONGEST_MEMBER:
        raise InputError(f"{source} has {size:,} bytes; captions of {LONGEST_MEMBER:,} are read at "
                         "most")
    with reading(source, "a caption in UTF-8" if suffix != "json" else "JSON with a caption"):
        data = persistent(partial(tars.read_member, file, offset, size))
        text = data.decode("utf-8-sig")
        if suffix != "json":
            return lines_of(text, source)
        record = json.loads(text)
        value = next((record[field] for field in FIELDS if field in record), None)
        return captions_of(value, source)


# ---------------------------------------------------------------------------------------- layouts

def find_shards(root):
    """The Layout of a folder of tar files, or None.

    Splits are subfolders or in the file names (train-0000.tar, cc3m-train-0000.tar), where all tar
    files have one. Links that lead out of the folder are not followed.
    """
    paths = [*root.glob("*.tar"), *root.glob("*/*.tar")]
    inside = Inside(root)
    outside = [path for path in paths if not inside(path)]
    if outside:
        warn(f"{len(outside)} tar files, such as {min(outside)}, are links that lead out of {root} "
             "and are not followed")
    paths = [path for path in paths if path.is_file() and path not in outside]
    compressed = [path for path in root.glob("*") if path.name.endswith(COMPRESSED)]
    if compressed and not paths:
        warn(f"{min(compressed)} is compressed; only uncompressed .tar files are read")
    return shard_layout(sorted(paths), root) if paths else None


def shard_layout(paths, root):
    """The Layout of tar files. root: the folder that all of them are in."""
    by_split = {}
    for path in paths:
        by_split.setdefault(shard_split(path, root), []).append(path)
    if None in by_split:
        if len(by_split) > 1:
            warn(f"{by_split[None][0]} names no split, though {len(paths) - len(by_split[None])} "
                 f"other tar files do; all are read as one set without splits")
        by_split = {None: paths}
    readers = {split: partial(read_shards, part, root) for split, part in by_split.items()}
    return Layout("tar shards", paths[0], root, readers, checked=True)


def shard_split(path, root):
    """The split that a shard's folder is called after, or the beginning of its name, or what stands
    there before the number; or None."""
    words = re.split(r"[-_.]", path.name)
    numbered = [word for word, after in zip(words, words[1:]) if after.isdecimal()]
    for name in (path.relative_to(root).parts[0], words[0], *numbered):
        if name in SPLIT_NAMES:
            return name
    return None


def pattern_layout(pattern):
    """The Layout of the tar files that a path or a pattern such as "DIR/{000..127}.tar" or
    "DIR/*.tar" names. Raises InputError where one is missing."""
    if pattern.endswith(COMPRESSED):
        raise InputError(f"{pattern} is compressed; only uncompressed .tar files are read")
    paths = []
    for name in expand(pattern):
        matches = [name] if os.path.isfile(name) else sorted(glob.glob(name))
        if not matches:
            raise InputError(f"there is no tar file at {name}")
        paths += map(Path, matches)
    paths = list(dict.fromkeys(paths))
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return Layout("tar shards", paths[0], root, {None: partial(read_shards, paths, root)},
                  checked=True)


def expand(pattern):
    """The names that a pattern with ranges stands for, such as {000..127}: a list. Raises
    InputError where they are too many."""
    names = [pattern]
    while RANGE.search(names[0]):
        wider = []
        for name in names:
            match = RANGE.search(name)
            first, last = int(match[1]), int(match[2])
            if (last - first + 1) * len(names) > MOST_SHARDS or last < first:
                raise InputError(f"{pattern} must stand for 1 to {MOST_SHARDS:,} tar files")
            wider += [f"{name[:match.start()]}{i:0{len(match[1])}}{name[match.end():]}"
                      for i in range(first, last + 1)]
        names = wider
    return names


# ---------------------------------------------------------------------------------------- writing

def check_shards(folder, pictures):
    """Raises InputError where a folder cannot be written to, or holds other shards than those of
    write_shards, or those that the pictures are read from."""
    folder = output_folder(folder)
    others = sorted({path.name for path in folder.glob("*.tar")} - set(own_shards(folder)))
    if others:
        raise InputError(f"{folder} holds shards of something else, such as {others[0]}; name "
                         f"another folder by --shards")
    sources = {split[0] for split in map(tars.split_path, {p.path for p in pictures}) if split}
    if any(os.path.samefile(os.path.dirname(tar) or ".", folder) for tar in sources):
        raise InputError(f"{folder} holds the images that are captioned; name another folder by "
                         f"--shards")


def own_shards(folder):
    """The names of the shards of write_shards in a folder."""
    return [path.name for path in folder.glob(SHARD.replace("%06d", "[0-9]" * 6))]


def write_shards(folder, records, text_of):
    """Writes images, as they are, with their texts into tars that WebDataset reads: for each image
    000000012.jpg, .txt (the text) and .json (the record: id, file, caption, score, sha256).

    A shard holds SHARD_IMAGES images and SHARD_BYTES at most; SIZES, which is written last, tells
    how many. An image without a caption is left out. Returns {path: reason} of images that could
    not be read any more, or are not what was captioned.
    """
    from webdataset import TarWriter  # takes seconds to load, as do the models
    folder, left, sizes = output_folder(folder), {}, {}
    remove(folder / SIZES)
    shards = {SHARD % i: part for i, part in enumerate(parts_of(records))}
    for name, part in tqdm([*shards.items()], "writing shards", unit="shard"):
        sizes[name] = 0
        with atomic(folder / name, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for number, record in part:
                path, about = Path(record["file"]), json.dumps(record)
                try:
                    content = read_captioned(path, record["sha256"])
                except OSError as error:
                    left[path] = reason_of(error)
                    continue
                tar.write({"__key__": f"{number:09}", suffix_of(path): content,
                           "txt": text_of(record["caption"]).encode(), "json": about.encode()})
                sizes[name] += 1
    remove(*(folder / name for name in own_shards(folder) if name not in shards))
    write_json(folder / SIZES, sizes, indent=1)
    return left


def read_captioned(path, sha256):
    """The bytes of an image file. Raises OSError where it is not the file that was captioned: it
    may be another one by now, or a link to one that is nobody else's business."""
    from antarctic.images import read_bytes  # Pillow
    content = read_bytes(path)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError("it has changed since it was captioned")
    return content


def parts_of(records):
    """Yields the records of each shard, as pairs (number of the image, record)."""
    from antarctic.images import file_status
    part, size = [], 0
    for number, record in enumerate(record for record in records if record["caption"]):
        try:
            more = file_status(record["file"])[0]
        except OSError:  # write_shards tells of it
            more = 0
        if part and (len(part) == SHARD_IMAGES or size + more > SHARD_BYTES):
            yield part
            part, size = [], 0
        part.append((number, record))
        size += more
    if part:
        yield part


def suffix_of(path):
    """What a shard calls an image file: its suffix, but jpg, as most readers ask for, for .jpeg and
    the like and where the suffix is that of no image, such as txt."""
    suffix = path.suffix.lower()
    other = suffix in (".jpeg", ".jpe", ".jfif", ".jif") or suffix not in IMAGE_SUFFIXES
    return "jpg" if other else suffix.removeprefix(".")
