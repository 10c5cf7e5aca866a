"""Annotation files in JSON: COCO's, Karpathy's and nocaps'."""

import re
from functools import partial
from typing import NamedTuple

from antarctic.errors import InputError
from antarctic.layouts import (
    Entry,
    Layout,
    caption_of,
    distinct_ids,
    image_id,
    inside_name,
    reading,
)
from antarctic.texts import read_json

DOMAINS = ("in-domain", "near-domain", "out-domain")  # of images in nocaps' annotations
# Where people keep the images of these data sets, beside folders of the split's name.
IMAGE_FOLDERS = ("", "images", "Images", "flickr30k-images", "flickr30k_images",
                 "Flicker8k_Dataset", "Flickr8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset")
COCO = "COCO's layout"
COCO_FILE = re.compile(r"(captions|image_info)_(.+)\.json")
NOCAPS_FILE = re.compile(r"nocaps_([a-z]+)_.*\.json")


# What is read of images and of Karpathy's sentences. COCO's file for training has 700,000 objects,
# which would take 200 MB otherwise.
READ = {"id", "file_name", "domain", "images", "annotations", "cocoid", "imgid", "filename",
        "filepath", "split", "sentences", "raw"}


class Annotation(NamedTuple):
    image_id: object
    caption: object
    captioned: bool  # whether it says what its caption is, be it null


class Annotated(NamedTuple):
    names: tuple  # paths of the image, in the folder of images: the first that exists counts
    captions: list  # texts, without empty ones
    domain: str | None  # one of DOMAINS, where the file is nocaps'


# ------------------------------------------------------------------------------------------ files

def read_annotations(path):
    """The captions of an annotation file, of all its splits: {image id: (file name, [captions])}.

    Raises InputError where the file is something else, an image is listed twice, or a file name
    leads out of the image folder.
    """
    return {image: (names[0], captions)
            for image, (names, captions, _) in read_annotated(path).items()}


def read_annotated(path):
    """read_annotations with other places of images, and domains: {image id: Annotated}."""
    return {entry.id: Annotated(tuple(dict.fromkeys([entry.name, join(entry.folder, entry.name)])),
                                [text for text in entry.captions if text], entry.domain)
            for entry in read_entries(path)}


def join(folder, name):
    return f"{folder}/{name}" if folder else name


def read_entries(path):
    """A list of Entry of an annotation file, told by its content. An empty caption is missing.

    Raises InputError where the file is none, an image is listed twice, or a file name leads out of
    the image folder.
    """
    with reading(path, "a COCO caption file"):
        data = read_json(path, "caption file", object_hook=slim)
        images = data["images"]
        if not isinstance(images, list):
            raise TypeError("its images are no list")
    if not images:
        raise InputError(f"{path} lists no images")
    if isinstance(images[0], dict) and "sentences" in images[0]:
        with reading(path, "a JSON file in Karpathy's form"):
            entries = [karpathy_entry(image, path, i) for i, image in enumerate(images, 1)]
    else:
        with reading(path, "a COCO caption file"):
            entries = coco_entries(data, path)
    return distinct_ids(entries, path)


def slim(record):
    """What is read of a JSON object of an annotation file: an Annotation, or a smaller dict."""
    if "image_id" in record and not record.keys() & {"file_name", "filename"}:
        return Annotation(record["image_id"], record.get("caption"), "caption" in record)
    return {name: record[name] for name in record if name in READ}


def coco_entries(data, path):
    """The entries of COCO's JSON, or nocaps'. Captions may be missing: of a test split, say."""
    annotations = data.get("annotations", [])
    if not all(isinstance(annotation, Annotation) for annotation in annotations):
        raise KeyError("image_id")
    if annotations and not any(annotation.captioned for annotation in annotations):
        raise KeyError("caption")
    numbers = [image_id(image["id"], f"image {i}") for i, image in enumerate(data["images"], 1)]
    captions = {number: [] for number in numbers}  # {image id: [texts]}
    for i, (number, caption, _) in enumerate(annotations, 1):
        if type(number) not in (int, str, type(None)):  # null is of no image
            number = image_id(number, f"annotation {i}")
        if number in captions:
            captions[number].append(caption_of(caption, path))
    entries = []
    for number, image in zip(numbers, data["images"]):
        domain = image.get("domain")
        entries.append(Entry(number, inside_name(image["file_name"], path),
                             tuple(captions[number]),
                             domain=domain if domain in DOMAINS else None))
    return entries


def karpathy_entry(image, path, i):
    """The entry of the i-th image in the JSON of
    https://cs.stanford.edu/people/karpathy/deepimagesent"""
    number = image_id(image["cocoid"] if "cocoid" in image else image["imgid"], f"image {i}")
    folder, split = image.get("filepath", ""), image["split"]
    if not isinstance(split, str):
        raise TypeError(f"{split!r} is no split")
    captions = tuple(caption_of(sentence.get("raw"), path) for sentence in image["sentences"])
    return Entry(number, inside_name(image["filename"], path), captions, split,
                 inside_name(folder, path) if folder else "")


# ---------------------------------------------------------------------------------------- layouts

def find_coco(root):
    """The Layout of a folder with annotations/captions_SPLIT.json or image_info_SPLIT.json, or
    None."""
    files = files_by_split((root / "annotations").glob("*.json"), COCO_FILE)

    def folder(split):
        """COCO's test-dev2017 is a part of test2017."""
        names = [split, split.replace("test-dev", "test")]
        places = [f"{above}{name}" for name in names for above in ("", "images/")]
        return [next((place for place in places if (root / place).is_dir()), split)]

    return Layout(COCO, root / "annotations", root, files, folder) if files else None


def find_karpathy(root):
    """The Layout of a folder with Karpathy's dataset_NAME.json, or None."""
    paths = sorted(root.glob("dataset_*.json"))
    return one_file(paths[0], root) if paths else None


def find_nocaps(root):
    """The Layout of a folder with nocaps' files, a split each, or None."""
    paths = [path for folder in (root, root / "annotations") for path in folder.glob("*.json")]
    files = files_by_split(paths, NOCAPS_FILE)
    return Layout("nocaps_*.json", root, root, files, image_folders) if files else None


def json_layout(path):
    """The Layout of an annotation file that a user names. Its images are sought in its folder, and
    beside a folder "annotations"."""
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    for pattern in (COCO_FILE, NOCAPS_FILE):
        files = files_by_split([path], pattern)
        if files:
            return Layout(path.name, path, root, files, image_folders)
    return one_file(path, root)


def files_by_split(paths, pattern):
    """{split: reader} of the paths whose names match a pattern, which has the split in its last
    group."""
    files = {}
    for path in sorted(paths):  # captions_ comes before image_info_
        match = pattern.fullmatch(path.name)
        if match:
            files.setdefault(match[match.lastindex], partial(read_entries, path))
    return files


def one_file(path, root):
    """The Layout of one JSON file that holds all splits, if there are any."""
    return Layout(path.name, path, root, {None: partial(read_entries, path)}, image_folders)


def image_folders(split):
    return *IMAGE_FOLDERS, split, f"images/{split}", f"nocaps_{split}"
