"""Captions beside the images, for training: sidecars and metadata.jsonl; shards are in `shards`."""

import json
import os
import posixpath
from pathlib import Path

from antarctic.distributed import on_rank0, warn
from antarctic.errors import InputError, counted
from antarctic.files import atomic, create, output_folder, reason_of, sync_folder
from antarctic.images import is_image
from antarctic.leftovers import remove_leftovers
from antarctic.locks import locked
from antarctic.runtime import cleanup
from antarctic.shards import check_shards, own_shards, write_shards
from antarctic.tars import split_path
from antarctic.texts import read_text

EMPTY = "its caption is empty"
EXISTS = "it exists; --overwrite replaces it"


class Exports:
    """What a run of the sampler writes beside its images. args: the sampler's flags. All processes
    make one; raises InputError where another run writes to --shards."""

    def __init__(self, args):
        self.args, self.sidecars, self.left, self.metadata = args, {}, {}, None
        if args.shards:  # what a killed run left there may be a gigabyte; two runs would mix theirs
            on_rank0(lambda: output_folder(args.shards))
            cleanup.enter_context(locked(Path(args.shards) / ".shards.lock"))

    def check(self, pictures):
        """Before any work: raises InputError for what cannot be written. pictures: all that are
        listed, and some may be no images. Returns the paths of images that have a text already,
        which must not be replaced."""
        if self.args.metadata:
            self.metadata = metadata_path(pictures, self.args.images)
            remove_leftovers(self.metadata.parent)
        if self.args.shards:
            check_shards(self.args.shards, pictures)
        if not self.args.sidecar:
            return set()
        folders = {picture.path.parent for picture in pictures if not split_path(picture.path)}
        for folder in folders:
            remove_leftovers(folder)
        closed = sorted(folder for folder in folders if not os.access(folder, os.W_OK))
        if closed:
            warn(f"{counted(len(closed), 'folder')}, such as {closed[0]}, cannot be written; the "
                 f"images there get no {self.args.sidecar_suffix} files")
        if self.args.overwrite:
            return set()
        return captioned_before(pictures, self.args.sidecar_suffix)

    def begin(self, pictures):
        """Takes the pictures that are captioned."""
        if self.args.sidecar:
            self.sidecars, self.left = sidecars_of(pictures, self.args.sidecar_suffix)

    def text_of(self, caption):
        """The text for training that a caption becomes."""
        text = f"{self.args.caption_prefix}{caption}{self.args.caption_suffix}"
        # A command line may hold bytes that are no UTF-8, and no text file may.
        return " ".join(text.split()).encode(errors="replace").decode()

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
            shards = counted(len(own_shards(Path(self.args.shards))), "shard")
            written.append(f"{shards} in {self.args.shards}")
        return left | self.left | texts, written


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
    left, written = {}, set()
    for record in records:
        if not (path := sidecars.get(record["file"])):
            continue
        text = text_of(record["caption"])
        try:
            if not record["caption"]:
                left[path] = EMPTY
            elif not os.path.lexists(path):
                create(path, text + "\n")
                written.add(path)
            elif not holds(path, text + "\n"):
                if overwrite and not is_image(path):
                    with atomic(path, sync=False) as file:
                        file.write(text + "\n")
                    written.add(path)
                else:
                    left[path] = "it is an image" if overwrite else EXISTS
        except (OSError, InputError) as error:
            left[path] = reason_of(error)
    for folder in {path.parent for path in written}:
        try:
            sync_folder(folder)
        except OSError as error:
            left |= {path: reason_of(error) for path in written if path.parent == folder}
    return left


def holds(path, text):
    """Whether a file holds this text and nothing else. What is no file, such as a pipe, and what is
    larger, is not read."""
    content = text.encode()
    return (path.is_file() and path.stat().st_size == len(content)
            and path.read_bytes() == content)


# ----------------------------------------------------------------------------------- metadata.jsonl

def metadata_path(pictures, named=()):
    """metadata.jsonl in the deepest folder that holds all of the images and the folders among the
    paths that were named, so that it stays where it is when these grow. Raises InputError where
    that is the whole file system, or where all images lie in tar files."""
    folders = {os.path.abspath(p.path.parent) for p in pictures if not split_path(p.path)}
    if not folders:
        raise InputError("--metadata names image files, and all of these lie in tar files; "
                         "--shards writes their captions")
    folders |= {os.path.abspath(path) for path in named or () if os.path.isdir(path)}
    folder = Path(os.path.commonpath(folders))
    if folder == folder.parent:
        raise InputError(f"--metadata writes one file above all images, and these share no folder "
                         f"but {folder}; caption each folder on its own")
    return folder / "metadata.jsonl"


def write_metadata(path, records, text_of, overwrite):
    """Adds the texts to a file as load_dataset("imagefolder") reads it: a line {"file_name",
    "text"} an image. Without overwrite the lines of a file that exists stay as they are.

    Returns {path: reason} where the file does not hold the texts.
    """
    if path.is_symlink():  # to a file elsewhere, which would be copied here
        return {path: "it is a link"}
    try:
        before = read_text(path, "metadata") if os.path.lexists(path) else ""
        lines = before.removesuffix("\n").split("\n") if before else []
        rows = {i: json.loads(line) for i, line in enumerate(lines) if line.strip()}
        places = {posixpath.normpath(row["file_name"]): i for i, row in rows.items()}
        kept = in_tars = 0
        for record in records:
            name = Path(os.path.relpath(record["file"], path.parent)).as_posix()
            row, text = {"file_name": name}, text_of(record["caption"])
            if name in places:
                row = rows[places[name]]
                if row.get("text") == text or not overwrite:
                    kept += row.get("text") != text
                    continue
            elif split_path(record["file"]):
                in_tars += 1
                continue
            elif record["caption"]:
                places[name] = len(lines)
                rows[len(lines)] = row
                lines.append("")
            else:
                continue
            row["text"] = text
            lines[places[name]] = json.dumps(row, ensure_ascii=False)
        after = "".join(line + "\n" for line in lines)
        if after.removesuffix("\n") != before.removesuffix("\n"):
            with atomic(path) as file:
                file.write(after)
        warn_of_readers(path, places, records)
    except (OSError, InputError) as error:
        return {path: reason_of(error)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {path: "it is no metadata of an imagefolder"}
    remarks = []
    if kept:
        remarks.append(f"{kept} of its lines have another text; --overwrite replaces them")
    if in_tars:
        remarks.append(f"{counted(in_tars, 'image')} in tar files cannot be named in it")
    return {path: "; ".join(remarks)} if remarks else {}


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
