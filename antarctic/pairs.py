"""Captions with what they are scored against: their references and their images."""

import os
from pathlib import Path
from typing import NamedTuple

from antarctic import tars
from antarctic.annotations import Annotated, read_annotated, read_entries
from antarctic.bounded import MissingError
from antarctic.captions import read_captioned, read_texts
from antarctic.datasets import DataSet
from antarctic.distributed import warn, warn_of
from antarctic.errors import InputError
from antarctic.folders import list_images
from antarctic.layouts import JOINED
from antarctic.records import read_covers

COVER = "evidence cover"  # the metric: the share of a caption's words that its table says


class Scored(NamedTuple):
    id: int | str  # of the image: COCO's number or a path; the line's number with --preds
    caption: str
    references: list = ()  # texts, without empty ones
    path: Path | None = None  # of the image
    domain: str | None = None  # nocaps'
    cover: float | None = None  # the share of its words that its table says


def read_scored(args):
    """A list of Scored, and warnings of what is missing. args: scorer.py's. Raises InputError where
    a file cannot be read or two do not belong together, or where nothing is left to compare
    with."""
    given = args.annotations or args.datadir or args.refs
    if args.results:
        images = None
        if args.annotations:
            images = read_annotated(args.annotations)
        elif args.datadir:
            images = annotated_split(args.datadir, args.split)
        alone = not (given or args.instances)
        rows = by_image(args.results, images, args.annotations or args.datadir, args.images, alone)
    else:
        rows = by_line(args.preds, args.refs, args.images)
    rows = with_covers(rows, Path(args.results or args.preds), by_id=args.results is not None)
    kind = "images" if args.results else "lines"
    warn_of([row.id for row in rows if not row.caption], f"{kind} have an empty caption")
    if given:
        without = [row.id for row in rows if not row.references]
        if len(without) == len(rows) and not (args.images or args.datadir or args.instances):
            raise InputError(f"no caption of {args.results or args.preds} has a reference")
        warn_of(without, f"{kind} have no reference and are left out of the scores that need one")
    return rows


def evidence_file(captions):
    """The details.jsonl that may tell the tables of captions: their file or that beside it."""
    return captions if captions.suffix == ".jsonl" else captions.with_name("details.jsonl")


def with_covers(rows, captions, by_id):
    """Rows with the cover of each caption that their evidence_file() holds for the same image,
    which by_id says whether to find by its id, or else by its line."""
    covers = {}
    try:
        for line, known in enumerate(read_covers(evidence_file(captions)), 1):
            if known:
                image, caption, cover = known
                covers[image if by_id else line] = caption, cover
    except MissingError:
        pass
    except InputError as error:  # nobody asked for it
        warn(f"no evidence cover: {error}")
        covers.clear()
    found = (covers.get(row.id, (None, None)) for row in rows)
    return [row._replace(cover=cover) if caption == row.caption else row
            for row, (caption, cover) in zip(rows, found)]


def annotated_split(datadir, split):
    """{image id: Annotated} of a split of any layout, where each image has one whole path."""
    taken = DataSet(datadir).take(split)
    return {picture.id: Annotated((picture.path,), picture.captions,
                                  taken.domains.get(picture.id))
            for picture in taken.pictures}


def by_image(results, images, source, folder, alone):
    """A list of Scored from captions by image id.

    results: a file of captions with image ids. images: {image id: Annotated}, or None. source: what
    they are from. folder: of the images, or None. alone: whether the images are all that the
    captions are scored against. An image's path is whole in `images`, or that of `images` in
    folder; without one of these, the "file" of details.jsonl; without `images`, the image id: as it
    stands, then in folder. Raises InputError where a file cannot be read or two do not belong
    together, or where no image of the folder, or of captions alone, is there.
    """
    captions = read_captioned(results)  # {image id: (caption, file or None)}
    unknown = [image for image in captions if images is not None and image not in images]
    if unknown:
        raise InputError(f"{len(unknown)} of {len(captions)} images of {results}, such as "
                         f"{unknown[0]!r}, are not in {source}")
    if images is not None and (folder or isinstance(next(iter(images.values())).names[0], Path)):
        paths = [path_in(folder or "", images[image].names) for image in captions]
    else:
        names = [file if file or images is not None or not folder else image
                 for image, (_, file) in captions.items()]
        paths = [find_image(name, folder) for name in names]
    there = [path for path in paths if path and tars.is_file(path)]
    if not there and (folder or alone):
        raise InputError(no_images(results, [path for path in paths if path], folder))
    if not there:
        paths = [None] * len(paths)
    else:
        warn_of([image for image, path in zip(captions, paths) if path is None],
                f"images of {results} have no path and are left out of CLIPScore")
    scored = [Scored(image, caption, path=path)
              for (image, (caption, _)), path in zip(captions.items(), paths)]
    if images is not None:
        scored = [row._replace(references=[text for text in images[row.id].captions if text],
                               domain=images[row.id].domain) for row in scored]
    return scored


def path_in(folder, names):
    """The path of an image in a folder: the first of its names that is there, else the first."""
    paths = [Path(folder) / name for name in names]
    return next((path for path in paths if tars.is_file(path)), paths[0])


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


def read_training_captions(path):
    """A list of texts: of a data set's training split, an annotation file (of Karpathy's the
    training split alone), or a text of one a line; empty where path is None. Raises InputError
    where there is none."""
    if path is None:
        return []
    if os.path.isdir(path):
        images = DataSet(path).read(None, "train2017", need_images=False)
    elif path.endswith(".json"):
        images = [image for image in read_entries(path)
                  if image.split is None or image.split in JOINED["train"]]
    else:
        return read_texts(path, "file of training captions")
    captions = [text for image in images for text in image.captions if text]
    if not captions:
        raise InputError(f"there is no caption in {path}")
    return captions


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
