"""Images with their captions: COCO's layout, folders and patterns."""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from antarctic.distributed import rank_and_world
from antarctic.errors import InputError, escape_control
from antarctic.files import one_line, read_text

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


class Picture(NamedTuple):
    id: int | str  # COCO's number, or the path where there is none
    path: Path
    captions: tuple = ()  # the references, if any


def list_images(paths):
    """All image files of files, folders (with subfolders) and patterns such as "photos/*.jpg",
    sorted within each, each once.

    Nothing is fetched: an address is no path. Links inside a folder are followed within it alone,
    so that a folder from elsewhere shows no file of this computer; a warning tells of others, which
    can be named. Raises InputError.
    """
    found = {}
    for path in map(Path, paths):
        # pathlib's ** passes links by: with two links of a folder to itself, the ways through them
        # double at each step.
        matches = [path] if path.exists() else sorted(
            Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        if not matches:
            raise InputError(f"there is no image or folder at {path}; only local files are read")
        for match in matches:
            if not match.is_dir():
                found[match] = None
                continue
            walk, root = [
                p for p in match.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES or p.is_dir()
            ], os.path.realpath(match)
            links = {
                p for p in walk
                if p.is_symlink() and not Path(os.path.realpath(p)).is_relative_to(root)
            }
            inside = sorted(p for p in walk if not p.is_dir() and p not in links)
            told = (
                f"{len(links)} links, such as {min(links)}, lead out of the folder {match} and are "
                "not followed; name what they "
                f"lead to, as with {match / '*'}, to have it read") if links else ""
            if not inside:
                raise InputError(
                    told or f"the folder {match} holds no images ({', '.join(IMAGE_SUFFIXES)})")
            if told and rank_and_world()[0] == 0:
                print(f"warning: {escape_control(told)}", file=sys.stderr)
            found |= dict.fromkeys(inside)
    return [Picture(str(path), path) for path in found]


def read_annotations(path):
    """{image id: (file name, [captions])} of a COCO caption file. Raises InputError: it is none, an
    image comes twice, or a file name leads out of the folder of images, which is not a slip but an
    attack."""
    images = {}
    try:
        data = json.loads(read_text(path, "caption file"))
        for image in data["images"]:
            number, name = image["id"], image["file_name"]
            if type(number) not in (int, str):
                raise TypeError(f"{number!r} is no image id")
            f"{number}{name}".encode(
            )  # UnicodeEncodeError: half a character, which no file name holds
            if number in images:
                raise InputError(f"{path} lists the image {number!r} twice")
            if Path(name).anchor or ".." in Path(name).parts or "\0" in name:
                raise InputError(
                    f"{path} has the file name {name!r}, which is no path inside the folder of "
                    "images"
                )
            images[number] = name, []
        for annotation in data["annotations"]:
            if annotation["image_id"] in images:
                images[annotation["image_id"]][1].append(one_line(annotation["caption"], path))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is not a COCO caption file ({type(error).__name__}: {error})") from error
    return images


def read_captions(path):
    """A list of (image id, or None where there is none; caption): the captions of a file, as
    sampler.py or another captioner wrote it. Raises InputError where it holds something else.

    .json: COCO's results format, a list of {"image_id", "caption"}. .jsonl: such an object a line.
    Other keys are ignored. Any other file: a text of one caption a line.
    """
    path = Path(path)
    text = read_text(path, "captions file")
    if path.suffix not in (".json", ".jsonl"):
        return [(None, one_line(line, path)) for line in text.split("\n")]
    try:
        parts = [text] if path.suffix == ".json" else [f"[{line}]" for line in text.split("\n")]
        records = [record for part in parts for record in json.loads(part)]
        return [(record.get("image_id"), one_line(record["caption"], path)) for record in records]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} does not hold captions as sampler.py writes them in {path.suffix} files"
        ) from error


def read_results(path):
    """{image id: caption} of a file in COCO's results format. Raises InputError: it is none, or an
    image comes twice."""
    captions = {}
    for image, caption in read_captions(path):
        if not isinstance(image, (int, float, str)):
            raise InputError(f"{path} is not in COCO's results format: no image_id belongs to the "
                             f"caption {caption[:60]!r}")
        if image in captions:
            raise InputError(f"{path} has more than one caption of the image {image!r}")
        captions[image] = caption
    if not any(captions.values()):
        raise InputError(f"there is no text in the results file {path}")
    return captions


def read_texts(path, what):
    """A list of texts, one a line; a blank line is an empty text. Raises InputError: missing, empty
    or not UTF-8."""
    text = read_text(path, what).removesuffix("\n")
    lines = [one_line(line, path) for line in text.split("\n")]
    if not any(lines):
        raise InputError(f"there is no text in the {what} {path}")
    return lines


def read_coco(datadir, split, need_images=True):
    """The images of a COCO split with their captions, in the order of their ids: a list of Picture.

    Reads DIR/annotations/captions_{split}.json alone; images are expected in DIR/{split}/ and are
    not opened. Raises InputError: a folder or file is missing (the splits that exist are named), or
    it is not COCO's JSON.
    """
    datadir = Path(datadir)
    if not datadir.is_dir():
        raise InputError(f"there is no data folder at {datadir}")
    path = datadir / "annotations" / f"captions_{split}.json"
    if not path.is_file():
        there = sorted(
            p.stem.removeprefix("captions_") for p in path.parent.glob("captions_*.json"))
        raise InputError(
            f"there is no split {split} in {datadir} (no {path}); there is "
            f"{', '.join(there) or 'none'}"
        )
    pictures = [
        Picture(image, datadir / split / name, tuple(told))
        for image, (name, told) in read_annotations(path).items()
    ]
    try:
        pictures.sort(key=lambda p: p.id)
    except TypeError as error:
        raise InputError(
            f"{path} is not a COCO caption file (its image ids are of two kinds)") from error
    if not pictures:
        raise InputError(f"{path} lists no images")
    if need_images and not (datadir / split).is_dir():
        raise InputError(f"there is no image folder at {datadir / split}")
    return pictures
