"""Images with their captions: COCO's layout, folders and patterns."""

import fnmatch
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from antarctic.distributed import rank_and_world, warn
from antarctic.errors import InputError, counted, escape_control, print_safely
from antarctic.files import existing_file, one_line, read_text

# What looks like an image. Files that cannot be read are named in the end, not passed over.
IMAGE_SUFFIXES = frozenset("""
.jpg .jpeg .jpe .jfif .jif .pjpeg .pjp .mpo .png .apng .webp .bmp .dib .tif .tiff .gif .avif .avifs
.heic .heif .heics .heifs .hif .jp2 .j2k .j2c .jpc .jpf .jpx .jxl .jxr .hdp .wdp .jls
.psd .psb .xcf .svg .svgz .ico .icns .cur .tga .icb .vda .vst .pcx .dcx .ppm .pgm .pbm .pnm .pfm
.pam .qoi .dds .sgi .xbm .xpm .exr .hdr .eps .wmf .emf .fits
.dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .raf .orf .rw2 .pef .srw .raw .rwl .3fr .iiq .x3f .kdc
.dcr .mrw .erf .mef .mos
""".split())
# Folders of thumbnails, of deleted files and of what other systems note beside files.
ASIDE = {"@eadir", "__macosx", "$recycle.bin", "#recycle", "system volume information"}
RECORD = {"image_id", "caption", "file"}  # what is read of a record of captions
DOMAINS = ("in-domain", "near-domain", "out-domain")  # of images in nocaps' annotations


class Picture(NamedTuple):
    id: int | str  # COCO's number, or the path where there is none
    path: Path
    captions: tuple = ()  # the references, if any


def list_images(paths):
    """The images of files, folders (with subfolders) and patterns such as "photos/*.jpg".

    Returns a list of Picture, sorted within each path, each image once. Nothing is fetched: URLs
    are not paths. Links inside a folder are followed only within it, so that a folder from
    elsewhere cannot show a file of this computer. A warning counts the others, which can be named
    as paths. Hidden images (see is_hidden) are read only where a path names them or their folder,
    and a warning counts the others. Raises InputError where a path has no image.
    """
    images, hidden = {}, {}  # {absolute path: path}
    for path in map(Path, paths):
        matches = matching(path)
        if not matches:
            raise InputError(f"there is no image or folder at {path}; only local files are read")
        for match in matches:
            inside, passed_over = [match], []
            if is_hidden(match, path.parts):
                inside, passed_over = [], [match]
            elif match.is_dir():
                inside, passed_over = folder_images(match)
            for image in inside:
                images.setdefault(os.path.abspath(image), image)
            hidden |= {os.path.abspath(other): other for other in passed_over}
    hidden = sorted(other for place, other in hidden.items() if place not in images)
    example = f"such as {hidden[0]}" if hidden else ""
    if not images:
        places = ", ".join(map(str, paths[:5]))
        raise InputError(f"there are only hidden images and folders at {places}, {example}; "
                         f"name them to read them")
    if hidden:
        warn(f"{len(hidden)} hidden images and thumbnails, {example}, are passed over; name them "
             f"or their folder to read them")
    return [Picture(str(path), path) for path in images.values()]


def read_paths(path):
    """The paths that a file lists, one a line, or with a NUL behind each, as `find -print0` writes
    them. path: "-" is standard input. Raises InputError where the file lists none."""
    if path == "-":
        content = sys.stdin.buffer.read()
    else:
        content = existing_file(path, "list of images").read_bytes()
    separator = b"\0" if b"\0" in content else b"\n"
    paths = [os.fsdecode(line.removesuffix(b"\r") if separator == b"\n" else line)
             for line in content.split(separator)]
    paths = [line for line in paths if line]
    if not paths:
        raise InputError(f"there is no path in {path}")
    return paths


def is_hidden(path, pattern=()):
    """Whether a path is hidden, or in a folder of thumbnails or deleted files, unless a part of
    pattern names it."""
    def aside(part):
        return part.startswith(".") and part not in (".", "..") or part.lower() in ASIDE

    named = [part for part in pattern if aside(part)]
    return any(aside(part) and not any(fnmatch.fnmatch(part, name) for name in named)
               for part in path.parts)


def matching(path):
    """The files and folders that a path means, sorted: itself where it exists.

    Otherwise the parts that do not exist are patterns, so a bracket or star in a folder's name
    stands for itself.
    """
    matches = [Path(path.anchor)]
    for part in path.relative_to(path.anchor).parts:
        deeper = {}  # as an ordered set
        for folder in matches:
            # os.path.exists raises nothing where a name is too long.
            if os.path.exists(folder / part):
                deeper[folder / part] = None
            elif any(c in part for c in "*?["):
                # pathlib's ** does not follow links: two links of a folder to itself would double
                # the number of ways at each step.
                deeper |= dict.fromkeys(folder.glob(part))
        matches = list(deeper)
    return sorted(matches)


def folder_images(folder):
    """The paths of a folder's images: (those to read, sorted; hidden ones, see is_hidden). Raises
    InputError where there are none to read.

    Links that lead out of the folder are left out, with a warning.
    """
    walk = [p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES or p.is_dir()]
    hidden = [p for p in walk if is_hidden(p.relative_to(folder))]
    walk = sorted(set(walk) - set(hidden))
    hidden = [p for p in hidden if not p.is_dir()]
    root = os.path.realpath(folder)
    outside = {p for p in walk
               if p.is_symlink() and not Path(os.path.realpath(p)).is_relative_to(root)}
    inside = [p for p in walk if not p.is_dir() and p not in outside]
    message = f"the folder {folder} holds no images (.jpg, .png, .heic ...)"
    if hidden:
        message += f" but {len(hidden)} hidden ones, such as {min(hidden)}; name them to read them"
    if outside:
        message = (f"{len(outside)} links, such as {min(outside)}, lead out of the folder {folder} "
                   f"and are not followed; name them to read them, as with {folder / '*'}")
    if not inside:
        raise InputError(message)
    if outside:
        warn(message)
    return inside, hidden


class Annotated(NamedTuple):
    file_name: str
    captions: list
    domain: str | None  # one of DOMAINS, where the file is nocaps'


def read_annotations(path):
    """The captions of a COCO caption file: {image id: (file name, [captions])}.

    Raises InputError where the file is something else, an image is listed twice, or a file name
    leads out of the image folder, which is not a mistake but an attack.
    """
    return {image: (name, captions) for image, (name, captions, _) in read_annotated(path).items()}


def read_annotated(path):
    """read_annotations with domains: {image id: Annotated}. A null caption is none."""
    images = {}
    try:
        data = json.loads(read_text(path, "caption file"))
        for image in data["images"]:
            number, name = image["id"], image["file_name"]
            if type(number) not in (int, str):
                raise TypeError(f"{number!r} is no image id")
            # UnicodeEncodeError, a ValueError: half a surrogate pair, which no file name holds.
            f"{number}{name}".encode()
            if number in images:
                raise InputError(f"{path} lists the image {number!r} twice")
            if Path(name).anchor or ".." in Path(name).parts or "\0" in name:
                raise InputError(f"{path} has the file name {name!r}, which is no path inside the "
                                 "folder of images")
            domain = image.get("domain")
            images[number] = Annotated(name, [], domain if domain in DOMAINS else None)
        for annotation in data["annotations"]:
            caption = annotation["caption"] if annotation["image_id"] in images else None
            if caption is not None:
                images[annotation["image_id"]].captions.append(one_line(caption, path))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a COCO caption file "
                         f"({type(error).__name__}: {error})") from error
    return images


def read_captions(path, other=".txt"):
    """The captions of a file, as sampler.py or another captioner wrote it: a list of (image id or
    None, caption). Raises InputError where the file holds something else.

    .json: COCO's results format, a list of {"image_id", "caption"}. .jsonl: one such object a line.
    Other keys are ignored. .txt: one caption a line. other: which of these any other suffix means.
    A caption that is missing or null is an empty text, unless all are missing.
    """
    return [(image, caption) for image, caption, _ in read_records(path, other)]


def read_records(path, other):
    """read_captions with image files: a list of (image id or None, caption, file or None)."""
    path = Path(path)
    text = read_text(path, "captions file")
    suffix = path.suffix if path.suffix in (".json", ".jsonl") else other
    if suffix == ".txt":
        return [(None, one_line(line, path), None) for line in text.split("\n")]
    try:
        parts = [text] if suffix == ".json" else (f"[{line}]" for line in text.split("\n"))
        # Only what is used: details.jsonl can hold 1,000 candidates an image.
        records = [{name: record[name] for name in record.keys() & RECORD}
                   for part in parts for record in json.loads(part)]
        if records and not any("caption" in record.keys() for record in records):
            raise KeyError("caption")
        captions = [record.get("caption") for record in records]
        captions = [one_line("" if text is None else text, path) for text in captions]
        files = [record.get("file") for record in records]
        return [(record.get("image_id"), caption, file if isinstance(file, str) else None)
                for record, caption, file in zip(records, captions, files)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} does not hold captions as sampler.py writes them in {suffix} "
                         f"files") from error


def read_captioned(path):
    """The captions of a file in COCO's results format, or of details.jsonl, which also names the
    image files: {image id: (caption, file or None)}. Raises InputError where the file is something
    else, or an image has two captions."""
    captions = {}
    for image, caption, file in read_records(path, ".json"):
        if not isinstance(image, (int, float, str)):
            raise InputError(f"{path} is not in COCO's results format: no image_id belongs to the "
                             f"caption {caption[:60]!r}")
        if image in captions:
            raise InputError(f"{path} has more than one caption of the image {image!r}")
        captions[image] = caption, file
    if not any(caption for caption, _ in captions.values()):
        raise InputError(f"there is no text in the results file {path}")
    return captions


def read_texts(path, kind):
    """A list of texts, one a line; a blank line is an empty text. kind: what the file is, for
    messages. Raises InputError where it is missing, empty or not UTF-8."""
    text = read_text(path, kind).removesuffix("\n")
    lines = [one_line(line, path) for line in text.split("\n")]
    if not any(lines):
        raise InputError(f"there is no text in the {kind} {path}")
    return lines


def read_coco(datadir, split, need_images=True):
    """The images of a COCO split with their captions, in the order of their ids: a list of Picture.

    Reads only DIR/annotations/captions_{split}.json; images are expected in DIR/{split}/ and are
    not opened. need_images: whether that folder must exist. Raises InputError where a folder or
    file is missing (the message lists the splits that exist), or the file is not COCO's JSON.
    """
    datadir = Path(datadir)
    if not datadir.is_dir():
        raise InputError(f"there is no data folder at {datadir}")
    path = datadir / "annotations" / f"captions_{split}.json"
    if not path.is_file():
        files = path.parent.glob("captions_*.json")
        splits = ", ".join(sorted(file.stem.removeprefix("captions_") for file in files))
        raise InputError(f"there is no split {split} in {datadir} (no {path}); there is "
                         f"{splits or 'none'}")
    pictures = [Picture(image, datadir / split / name, tuple(captions))
                for image, (name, captions) in read_annotations(path).items()]
    try:
        pictures.sort(key=lambda p: p.id)
    except TypeError as error:
        raise InputError(f"{path} is not a COCO caption file (its image ids are numbers and "
                         "texts)") from error
    if not pictures:
        raise InputError(f"{path} lists no images")
    if need_images and not (datadir / split).is_dir():
        raise InputError(f"there is no image folder at {datadir / split}")
    return pictures


def report_bad_images(bad):
    """Lists and counts the images that could not be read, on rank 0. bad: (path, reason) pairs."""
    if rank_and_world()[0] > 0:
        return
    for path, reason in bad:
        print_safely(f"skipped {escape_control(path)}: {escape_control(reason)}", "stderr")
    if bad:
        print_safely(f"{counted(len(bad), 'image')} could not be read and were skipped", "stderr")
