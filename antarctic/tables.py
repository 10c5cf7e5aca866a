"""Captions in rows: Flickr's files, and the metadata files of Hugging Face's imagefolder."""

import csv
import io
import json
import re
from functools import partial
from itertools import islice

from antarctic.annotations import image_folders
from antarctic.bounded import parse_json
from antarctic.errors import InputError
from antarctic.files import reason_of
from antarctic.layouts import (
    SPLIT_NAMES,
    Entry,
    Layout,
    captions_of,
    distinct_ids,
    image_id,
    inside_name,
    reading,
    with_splits_of_paths,
)
from antarctic.reads import persistent
from antarctic.texts import read_text

# The columns that are read, by the names that they have in these data sets.
NAMES = ("file_name", "filename", "image", "image_name")
CAPTIONS = ("text", "caption", "captions", "comment", "raw")
TOKEN = re.compile(r"(.+)#\d+[ \t]+(.*)")  # of Flickr's own files: name.jpg#0, a tab, the caption
TABLES = ("*.token", "*.token.txt", "results.csv", "captions.txt", "flickr_annotations_30k.csv")
METADATA = ("metadata.jsonl", "metadata.csv")
# Flickr8k's lists of images, by split.
LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt",
         "test": "Flickr_8k.testImages.txt"}
TEXT_FOLDERS = ("", "Flickr8k_text", "Flickr_Data/Flickr_TextData")  # of Flickr8k, where unpacked


# ------------------------------------------------------------------------------------------ files

def read_table(path, folder=""):
    """A list of Entry of a table of images and captions, told by its first line. Rows of one image
    add up. folder: that names are relative to, in the data folder.

    Raises InputError where the file is no such table, or a file name leads out of the folder.
    """
    kind = "a table of images and captions"
    text = read_text(path, kind)
    with reading(path, kind):
        first = text.partition("\n")[0]
        if path.suffix == ".jsonl":
            lines = ",\n".join(line for line in text.split("\n") if line.strip())
            rows = parse_json(f"[{lines}]", path, "table")
        elif re.match(r"image_name\s*\|", first):
            rows = list(bar_rows(text))
        elif TOKEN.match(first):
            rows = list(token_rows(text))
        else:
            rows = list(csv_rows(text, "\t" if path.suffix == ".tsv" else ","))
        if not rows:
            raise ValueError("it has no rows")
        return rows_to_entries(rows, path, folder)


def token_rows(text):
    """The rows of results_20130124.token and Flickr8k.token.txt."""
    for line in text.split("\n"):
        if line.strip():
            match = TOKEN.match(line)
            if not match:
                raise ValueError(f"{line[:60]!r} is not NAME#NUMBER, a tab and a caption")
            yield {"image": match[1], "caption": match[2]}


def bar_rows(text):
    """The rows of Kaggle's results.csv, where captions hold quotation marks, and one line lacks its
    second bar."""
    for line in islice(text.split("\n"), 1, None):
        if line.strip():
            match = re.match(r"([^|]+)\|\s*\d+\s*\|?(.*)", line)
            if not match:
                raise ValueError(f"{line[:60]!r} is not an image, a number and a caption")
            yield {"image": match[1].strip(), "caption": match[2]}


def csv_rows(text, delimiter):
    """The rows of a CSV file. What follows commas in an unquoted last column belongs to it."""
    rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, delimiter=delimiter)
    for row in rows:
        more = row.pop(None, [])
        if more:
            row[rows.fieldnames[-1]] = f"{delimiter} ".join([row[rows.fieldnames[-1]], *more])
        yield row


def rows_to_entries(rows, path, folder):
    """A list of Entry, in the order in which the rows first name an image. rows: dictionaries."""
    name_column, caption_column = columns(rows)
    images = {}  # {name: (id, split, captions)}
    for row in rows:
        name = inside_name(row[name_column], path)
        name = f"{folder}{name}"
        split = row.get("split")
        if name not in images:
            number = int(row["img_id"]) if "img_id" in row else name
            images[name] = image_id(number), split if isinstance(split, str) else None, []
        images[name][2].extend(captions_of(listed(row.get(caption_column)), path))
    entries = [Entry(number, name, tuple(captions), split)
               for name, (number, split, captions) in images.items()]
    return distinct_ids(entries, path)


def columns(rows):
    """(the column of file names, that of captions) of rows. Raises ValueError where it is not
    clear which they are."""
    names = dict.fromkeys(name for row in rows for name in row)
    name_column = next((name for name in NAMES if name in names), None)
    if name_column is None:
        raise ValueError(f"it has no column {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    for name in CAPTIONS:
        if name in names:
            return name_column, name
    texts = [name for name in names if name not in (name_column, "split")
             and any(is_text(row.get(name)) for row in rows)]
    if len(texts) != 1:
        raise ValueError("its captions are not in a column text, caption or captions, and "
                         f"{len(texts)} other columns hold texts")
    return name_column, texts[0]


def is_text(value):
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        float(value)
        return False
    except ValueError:
        return True


def listed(value):
    """A cell's value: a list where it is the JSON of a list of texts, as in
    flickr_annotations_30k.csv."""
    if isinstance(value, str) and value.startswith('["') and value.endswith(']'):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass  # a caption that begins like one
    return value


def is_table(path):
    """Whether the first line of a file is that of a table of images and captions. Raises InputError
    where it cannot be read."""
    def read():
        with open(path, "rb") as file:
            return file.readline(1 << 16)

    try:
        first = persistent(read).decode("utf-8-sig", "replace").lower()
    except OSError as error:
        raise InputError(f"cannot read {path} ({reason_of(error)})") from error
    cells = {cell.strip(' "\r\n') for cell in re.split(r"[,|\t]", first)}
    return bool(cells & set(NAMES) and cells & set(CAPTIONS) or TOKEN.match(first))


# ---------------------------------------------------------------------------------------- layouts

def find_table(root):
    """The Layout of a folder with one of Flickr's TABLES, or None."""
    paths = [path for folder in TEXT_FOLDERS for pattern in TABLES
             for path in sorted((root / folder).glob(pattern))]
    path = next((path for path in paths
                 if path.is_file() and "lemma" not in path.name and is_table(path)), None)
    return table_layout(path, root) if path else None


def table_layout(path, root):
    """The Layout of a table, with the splits of Flickr8k's lists where they are beside it."""
    def read():
        entries = read_table(path)
        lists = {split: path.with_name(name) for split, name in LISTS.items()}
        split_of = {line.strip(): split for split, place in lists.items() if place.is_file()
                    for line in read_text(place, "list of images").split("\n")}
        return [entry._replace(split=split_of.get(entry.name, entry.split)) for entry in entries]

    return Layout(path.name, path, root, {None: read}, image_folders)


def find_metadata(root):
    """The Layout of a folder with Hugging Face's metadata.jsonl or metadata.csv, in it or in
    folders of splits, or None."""
    def in_folder(folder):
        return next((path for path in (folder / name for name in METADATA) if path.is_file()), None)

    path = in_folder(root)
    if path:
        return metadata_layout(path, root)
    paths = {split: in_folder(root / split) for split in sorted(SPLIT_NAMES)}
    readers = {split: partial(read_table, path, f"{split}/")
               for split, path in paths.items() if path}
    return Layout("metadata files", root, root, readers) if readers else None


def metadata_layout(path, root):
    return Layout(path.name, path, root, {None: lambda: with_splits_of_paths(read_table(path))})
