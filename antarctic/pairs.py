"""Captions with what they are scored against: their references and their images."""

import os
from pathlib import Path
from typing import NamedTuple

from antarctic.captions import read_captioned, read_texts
from antarctic.datasets import read_annotated
from antarctic.distributed import warn
from antarctic.errors import InputError
from antarctic.folders import list_images


class Scored(NamedTuple):
    id: int | str  # of the image: COCO's number or a path; the line's number with --preds
    caption: str
    references: list = ()  # texts, without empty ones
    path: Path | None = None  # of the image
    domain: str | None = None  # nocaps'


def by_image(results, annotations, folder, alone):
    """A list of Scored from captions by image id.

    results: a file of captions with image ids. annotations: COCO's caption file, or None. folder:
    of the images, or None. alone: whether the images are all that the captions are scored against.
    An image's path is that of the annotations in folder; without one of these, the "file" of
    details.jsonl; without annotations, the image id: as it stands, then in folder. Raises
    InputError where a file cannot be read or two do not belong together, or where no image of the
    folder, or of captions alone, is there.
    """
    captions = read_captioned(results)  # {image id: (caption, file or None)}
    images = read_annotated(annotations) if annotations else {}
    unknown = [image for image in captions if image not in images]
    if annotations and unknown:
        raise InputError(f"{len(unknown)} of {len(captions)} images of {results}, such as "
                         f"{unknown[0]!r}, are not in {annotations}")
    if annotations and folder:
        paths = [Path(folder) / images[image].file_name for image in captions]
    else:
        names = [file if file or annotations or not folder else image
                 for image, (_, file) in captions.items()]
        paths = [find_image(name, folder) for name in names]
    there = [path for path in paths if path and os.path.isfile(path)]
    if not there and (folder or alone):
        raise InputError(no_images(results, [path for path in paths if path], folder))
    if not there:
        paths = [None] * len(paths)
    else:
        warn_of([image for image, path in zip(captions, paths) if path is None],
                f"images of {results} have no path and are left out of CLIPScore")
    scored = [Scored(image, caption, path=path)
              for (image, (caption, _)), path in zip(captions.items(), paths)]
    if annotations:
        scored = [row._replace(references=[text for text in images[row.id].captions if text],
                               domain=images[row.id].domain) for row in scored]
    return scored


def find_image(name, folder):
    """The path of an image: name as it stands, or in folder where only that is a file. None where
    no file can have that name."""
    try:
        if not name or b"\0" in os.fsencode(name):
            return None
    except (TypeError, UnicodeEncodeError):  # a number, half a surrogate pair
        return None
    # os.path.isfile, unlike pathlib's, takes a name that is too long.
    in_folder = folder and not os.path.isfile(name) and os.path.isfile(Path(folder) / name)
    return Path(folder) / name if in_folder else Path(name)


def no_images(results, paths, folder):
    """Why none of the images of a results file is there, as a sentence."""
    if not paths:
        return (f"{results} holds no paths of images; give --annotations and --images, or the "
                "details.jsonl of the same run")
    where = f", in the folder {folder}" if folder else ""
    return f"none of the {len(paths)} images, such as {paths[0]}, is there{where}"


def by_line(preds, refs, folder):
    """A list of Scored from texts of one caption a line.

    preds: a file of captions. refs: files of references. folder: of the images, or None, which are
    taken in the order of their paths. Raises InputError where a file cannot be read, or their
    lengths differ.
    """
    captions = read_texts(preds, "captions file")
    columns = [read_texts(path, "references file") for path in refs]
    for path, lines in zip(refs, columns):
        if len(lines) != len(captions):
            raise InputError(f"{preds} has {len(captions)} lines, but {path} has {len(lines)}")
    paths = [picture.path for picture in list_images([folder])] if folder else []
    if folder and len(paths) != len(captions):
        raise InputError(f"{preds} has {len(captions)} lines, but {folder} has {len(paths)} images;"
                         " --results captions.json or details.jsonl finds each image by its path")
    references = [[text for text in texts if text] for texts in zip(*columns)]
    return [Scored(i + 1, caption, references[i] if refs else (), paths[i] if folder else None)
            for i, caption in enumerate(captions)]


def warn_of(ids, what):
    """Says on standard error how many images `what` holds for, and the first of them."""
    if ids:
        some = ", ".join(map(repr, ids[:5])) + ", ..." * (len(ids) > 5)
        warn(f"{len(ids)} {what}: {some}")
