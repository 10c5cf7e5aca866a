"""Images with their captions, in COCO's layout."""

import json
from pathlib import Path
from typing import NamedTuple

from antarctic.errors import InputError
from antarctic.files import one_line, read_text
from antarctic.folders import Picture

DOMAINS = ("in-domain", "near-domain", "out-domain")  # of images in nocaps' annotations



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
