"""Captions as trainers of image models read them: a text beside each image, metadata.jsonl,
WebDataset shards."""

import json
import os
import re
from pathlib import Path

from tqdm import tqdm

from antarctic.distributed import warn
from antarctic.errors import InputError, counted
from antarctic.files import atomic, create, output_folder, read_text, write_json, write_lines
from antarctic.images import file_status, is_image, open_file
from antarctic.tars import split_path

SIZES = "sizes.json"  # {name of a shard: images in it}, as OpenCLIP's users know it
SHARD_NAME = re.compile(r"\d{6}\.tar")
SHARD_IMAGES, SHARD_BYTES = 10_000, 1 << 30  # of a shard at most
EMPTY = "its caption is empty"
EXISTS = "it exists; --overwrite replaces it"


class Exports:
    """What a run of the sampler writes beside its images. args: the sampler's flags."""

    def __init__(self, args):
        self.args, self.sidecars, self.left, self.metadata = args, {}, {}, None

    def check(self, pictures):
        """Before any work: raises InputError for what cannot be written. pictures: all that are
        listed, and some may be no images. Returns the paths of images that have a text already,
        which must not be replaced."""
        if self.args.metadata:
            metadata_path(pictures, self.args.images)
        if self.args.shards:
            check_shards(self.args.shards)
        if not self.args.sidecar:
            return set()
        folders = {picture.path.parent for picture in pictures if not split_path(picture.path)}
        closed = sorted(folder for folder in folders if not os.access(folder, os.W_OK))
        if closed:
            warn(f"{counted(len(closed), 'folder')}, such as {closed[0]}, cannot be written; the "
                 f"images there get no {self.args.sidecar_suffix} files")
        if self.args.overwrite:
            return set()
        return captioned_before(pictures, self.args.sidecar_suffix)

    def begin(self, pictures):
        """Takes the pictures that are captioned."""
        if self.args.metadata and pictures:
            self.metadata = metadata_path(pictures, self.args.images)
        if self.args.sidecar:
            self.sidecars, self.left = sidecars_of(pictures, self.args.sidecar_suffix)

    def text_of(self, caption):
        """The text for training that a caption becomes."""
        return " ".join(f"{self.args.caption_prefix}{caption}{self.args.caption_suffix}".split())

    def add(self, records):
        """Writes the sidecars of a batch, at once, so that a stop keeps them."""
        return write_sidecars(records, self.sidecars, self.text_of, self.args.overwrite)

    def finish(self, records):
        """Writes all that is left to write. Returns ({path: reason} of files that do not hold their
        text, those of few files first; a list that says what holds the texts)."""
        left, written, texts = {}, [], self.add(records)
        if done := len(self.sidecars) - len(texts):
            written.append(counted(done, f"{self.args.sidecar_suffix} file"))
        if self.metadata:
            left |= write_metadata(self.metadata, records, self.text_of, self.args.overwrite)
            written += [str(self.metadata)] * (self.metadata not in left)
        if self.args.shards:
            left |= write_shards(self.args.shards, records, self.text_of)
            written.append(f"{counted(len(read_sizes(Path(self.args.shards))), 'shard')} in "
                           f"{self.args.shards}")
        return left | self.left | texts, written


def reason_of(error):
    return getattr(error, "strerror", None) or str(error)


# --------------------------------------------------------------------------------------- sidecars

def captioned_before(pictures, suffix):
    """The paths of images that have a sidecar. pictures: some of them may be no images."""
    listed = {picture.path for picture in pictures}
    have = set()
    for path in listed:
        sidecar = path.with_suffix(suffix)
        # One that is listed itself may be an image; a shell's * lists the texts, too.
        if os.path.lexists(sidecar) and not (sidecar in listed and is_image(sidecar)):
            have.add(path)
    return have


def sidecars_of(pictures, suffix):
    """The path of each image's sidecar, dog.txt for dog.jpg: ({path of the image: sidecar}, {path
    of an image that gets none: reason})."""
    images, owners, sidecars, left = {p.path for p in pictures}, {}, {}, {}
    for picture in pictures:
        sidecar = picture.path.with_suffix(suffix)
        owner = owners.setdefault(sidecar, picture.path)
        if split_path(picture.path):
            left[picture.path] = "it lies in a tar file; --shards writes its caption"
        elif sidecar in images:
            left[picture.path] = f"its text would be the image {sidecar}"
        elif owner != picture.path:
            left[picture.path] = f"its text would be {sidecar}, which is that of {owner.name}"
        else:
            sidecars[str(picture.path)] = sidecar
    return sidecars, left


def write_sidecars(records, sidecars, text_of, overwrite):
    """Writes the text of each record beside its image. Without overwrite a file that exists stays,
    also one that somebody makes at this moment.

    sidecars: of sidecars_of. text_of: a function of a caption. Returns {path: reason} of the files
    that do not hold the text.
    """
    left = {}
    for record in records:
        if not (path := sidecars.get(record["file"])):
            continue
        text = text_of(record["caption"])
        try:
            if not record["caption"]:
                left[path] = EMPTY
            elif not os.path.lexists(path):
                create(path, text + "\n")
            elif path.read_bytes().decode(errors="replace") != text + "\n":
                if overwrite:
                    write_lines(path, [text])
                else:
                    left[path] = EXISTS
        except (OSError, InputError) as error:
            left[path] = reason_of(error)
    return left


# ----------------------------------------------------------------------------------- metadata.jsonl

def metadata_path(pictures, named=()):
    """metadata.jsonl in the deepest folder that holds all of the images and the folders among the
    paths that were named, so that it stays where it is when these grow. Raises InputError where
    that is the whole file system, or where images lie in a tar file."""
    if inside := next((p.path for p in pictures if split_path(p.path)), None):
        raise InputError(f"--metadata cannot describe images in a tar file, such as {inside}; "
                         f"--shards writes their captions")
    folders = [p.path.parent for p in pictures] + [p for p in named or () if os.path.isdir(p)]
    folder = Path(os.path.commonpath([*map(os.path.abspath, folders)]))
    if folder == folder.parent:
        raise InputError(f"--metadata writes one file above all images, and these share no folder "
                         f"but {folder}; caption each folder on its own")
    return folder / "metadata.jsonl"


def write_metadata(path, records, text_of, overwrite):
    """Adds the texts to a file as load_dataset("imagefolder") reads it: a line {"file_name",
    "text"} an image. Without overwrite the lines of a file that exists stay as they are.

    Returns {path: reason} where the file does not hold the texts.
    """
    try:
        lines = read_text(path, "metadata").splitlines() if os.path.lexists(path) else []
        rows = [json.loads(line) for line in lines]
        places = {row["file_name"]: i for i, row in enumerate(rows)}
        kept = 0
        for record in records:
            name = Path(os.path.relpath(record["file"], path.parent)).as_posix()
            row, text = {"file_name": name}, text_of(record["caption"])
            if name in places:
                row = rows[places[name]]
                if row.get("text") == text or not overwrite:
                    kept += row.get("text") != text
                    continue
            elif record["caption"]:
                places[name] = len(lines)
                lines.append("")
                rows.append(row)
            else:
                continue
            row["text"] = text
            lines[places[name]] = json.dumps(row, ensure_ascii=False)
        with atomic(path) as file:
            file.writelines(line + "\n" for line in lines)
        warn_of_readers(path, places, records)
    except (OSError, InputError) as error:
        return {path: reason_of(error)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {path: "it is no metadata of an imagefolder"}
    remark = f"{kept} of its lines have another text; --overwrite replaces them"
    return {path: remark} if kept else {}


def warn_of_readers(path, names, records):
    """Warns of what load_dataset("imagefolder") stumbles over: lines of images that have gone, and
    other metadata of the same images. names: file_name of all lines. records: of images that are
    there."""
    folder, there = path.parent, {record["file"] for record in records}
    others = (name for name in names if str(folder / name) not in there)
    gone = [name for name in others if not os.path.lexists(folder / name)]
    if gone:
        warn(f"{path} has {counted(len(gone), 'line')} of images that are not there, such as "
             f"{gone[0]}; load_dataset fails where it reads them, so take these lines out")
    below = {Path(parent) for file in there
             for parent in Path(os.path.relpath(file, folder)).parents} - {Path()}
    kinds = "metadata.jsonl", "metadata.csv", "metadata.parquet"
    twice = [folder / part / kind for part in sorted(below) for kind in kinds]
    twice = [other for other in [*(folder / kind for kind in kinds[1:]), *twice] if other.exists()]
    if twice:
        warn(f"{twice[0]} describes images of {path}, too; load_dataset reads both and takes such "
             f"images twice, so remove one of them")


# ----------------------------------------------------------------------------------------- shards

def check_shards(folder):
    """Raises InputError where a folder cannot be written to, or holds shards that write_shards did
    not write."""
    folder = output_folder(folder)
    others = sorted({path.name for path in folder.glob("*.tar")} - set(read_sizes(folder)))
    if others:
        raise InputError(f"{folder} holds shards of something else, such as {others[0]}; name "
                         f"another folder by --shards")


def read_sizes(folder):
    try:
        sizes = json.loads((folder / SIZES).read_bytes())
        return sizes if isinstance(sizes, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def write_shards(folder, records, text_of):
    """Writes images, as they are, with their texts into tars that WebDataset reads: for each image
    000000012.jpg, .txt (the text) and .json (id, file, caption, score).

    A shard holds SHARD_IMAGES images and SHARD_BYTES at most; SIZES, which is written first, tells
    how many. An image without a caption is left out. Returns {path: reason} of images that could
    not be read any more.
    """
    from webdataset import TarWriter
    folder, left = output_folder(folder), {}
    earlier = read_sizes(folder)
    shards = {f"{i:06}.tar": part for i, part in enumerate(parts_of(records))}
    sizes = {name: len(part) for name, part in shards.items()}
    write_json(folder / SIZES, sizes, indent=1)
    bar = tqdm([*shards.items()], "writing shards", unit="shard")
    for name, part in bar:
        with atomic(folder / name, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for number, record in part:
                path, about = Path(record["file"]), json.dumps(record)
                try:
                    with open_file(path) as image:
                        content = image.read()
                except OSError as error:
                    left[path], sizes[name] = reason_of(error), sizes[name] - 1
                    continue
                tar.write({"__key__": f"{number:09}", suffix_of(path): content,
                           "txt": text_of(record["caption"]).encode(), "json": about.encode()})
    if left:
        write_json(folder / SIZES, sizes, indent=1)
    for name in earlier.keys() - shards.keys():
        if SHARD_NAME.fullmatch(name):
            (folder / name).unlink(missing_ok=True)
    return left


def parts_of(records):
    """Yields the records of each shard, as pairs (number of the image, record)."""
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
    """What a shard calls an image file: jpg, as most readers ask for, also for .jpeg and the like,
    else its suffix."""
    suffix = path.suffix.lower().removeprefix(".")
    return "jpg" if suffix in ("jpeg", "jpe", "jfif", "jif", "") else suffix
