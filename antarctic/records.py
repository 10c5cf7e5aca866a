"""The records of captioned images, which later runs take over: known by image and settings."""

import base64
import json
import os
from contextlib import ExitStack

from antarctic.bounded import parse_json, telling
from antarctic.errors import InputError
from antarctic.evidence import cover, used_entries
from antarctic.files import append, own_file, reading, writing
from antarctic.folders import Picture
from antarctic.layouts import image_id
from antarctic.reads import open_regular
from antarctic.sealed import LONGEST_LINE, checksum, lines_of, seal, unseal
from antarctic.texts import one_line

EVIDENCE = "caption", "score", "table", "candidates"
MOST_SIDE = 16  # rows and columns of a map
# What reading a line raises that another program wrote.
NO_RECORD = InputError, ValueError, LookupError, TypeError, AttributeError, RecursionError


class Records:
    """The records that a folder of results holds of images captioned under some settings.

    They are lines of details.jsonl, which a finished run wrote, and of the part, to which a run
    appends each batch. In both a checksum tells whether a record is whole and of these settings.
    settings: a fingerprint of all but the image that decides a caption. where: whether the records
    that are read have their maps, see antarctic.seen; they are no part of the settings, since they
    change no caption. Raises InputError where the part cannot be written.
    """

    def __init__(self, folder, settings, where=False):
        self.settings, self.where, self.details = settings, where, folder / "details.jsonl"
        self.part = folder / f"details-{settings}.jsonl.part"
        self.places = {}  # {key of an image: (file, where its line begins)}
        self.mapped = set()  # keys of those whose record has maps
        self.files = set()  # paths of the images at that time
        if self.details.is_file():
            with reading(self.details), open(self.details, "rb") as file:
                self.index(file, self.details)
        if os.path.lexists(self.part):
            with writing(self.part), open(self.part, "rb+", opener=own_file) as file:
                file.truncate(self.index(file, self.part))

    def index(self, file, path):
        """Finds the records of an open file, in the part those of whole batches. Returns where
        these end."""
        batch, start, end = {}, 0, 0
        for line in lines_of(file):
            record, left = self.parse(line, path)
            if record:
                batch[key_of(record)] = path, start, "where" in record
                self.files.add(str(record["file"]))
            elif path == self.part:
                break
            start += len(line)
            if not left:
                for key, (*place, mapped) in batch.items():
                    self.place(key, place, mapped)
                batch, end = {}, start
        return end

    def place(self, key, place, mapped):
        """Notes where the latest record of an image is. place: (file, where its line begins)."""
        self.places[key] = place
        (self.mapped.add if mapped else self.mapped.discard)(key)

    def parse(self, line, path):
        """(the record of a line, or None where it is not whole or of other settings; how many lines
        of its batch follow)."""
        try:
            record, left = unseal(line) if path == self.part else (
                parse_json(line, path, "record"), 0)
            if record["seal"] == self.seal_of(record) and is_record(record):
                return record, left
        except NO_RECORD:
            pass
        return None, 0

    def seal_of(self, record):
        evidence = (record[name] for name in (*EVIDENCE, *["where"] * ("where" in record)))
        return checksum(json.dumps([self.settings, key_of(record), *evidence]).encode()).decode()

    def missing(self, pictures):
        """The rows of the pictures without a record, each image once."""
        return rows_without(self.places, pictures)

    def without_maps(self, pictures):
        """The rows of the pictures whose record has no maps, each image once."""
        return rows_without(self.mapped, pictures)

    def lost(self, pictures):
        """Whether some record is of an image that was moved or removed, so that images at other
        paths may be it."""
        return not self.files <= {str(picture.path) for picture in pictures}

    def append(self, pictures, captions):
        """Adds a batch to the part. captions: a model.Caption of each picture. Returns the records,
        as details.jsonl has them."""
        records = list(map(self.record_of, pictures, captions))
        self.write(pictures, records)
        return records

    def add_maps(self, pictures, found):
        """Adds records with maps in place of those without to the part. found: the value of "where"
        of each picture's record."""
        records = list(self.read(pictures))
        for record, where in zip(records, found):
            record["where"] = where
            record["seal"] = self.seal_of(record)
        self.write(pictures, records)

    def write(self, pictures, records):
        """Adds a batch of records to the part."""
        with writing(self.part), open(self.part, "ab", opener=own_file) as file:
            start = file.tell()
        left = range(len(records) - 1, -1, -1)  # lines of the batch that follow
        lines = [seal(pair) for pair in zip(records, left)]
        for picture, record, line in zip(pictures, records, lines):
            self.place(picture.key, (self.part, start), "where" in record)
            start += len(line)
        append(self.part, b"".join(lines))

    def record_of(self, picture, caption):
        """A picture's record. caption: its model.Caption."""
        record = {"image_id": picture.id, "file": str(picture.path), **caption._asdict(),
                  "sha256": picture.sha256}
        return record | {"seal": self.seal_of(record)}

    def read(self, pictures):
        """Yields the record of each picture, with its id and path of today. Raises InputError where
        one has gone."""
        with ExitStack() as stack:
            files = {}
            for path in (self.details, self.part):
                if path.exists():
                    with reading(path):
                        files[path] = stack.enter_context(open(path, "rb"))
            for done, picture in enumerate(pictures):
                path, start = self.places[picture.key]
                with reading(path):
                    files[path].seek(start)
                    line = files[path].readline(LONGEST_LINE)
                record, _ = self.parse(line, path)
                if not record or key_of(record) != picture.key:
                    raise InputError(f"{path} was changed by another program: {done} of "
                                     f"{len(pictures)} records were read; rerun the same command "
                                     f"to resume")
                if not self.where:
                    record.pop("where", None)
                names = *EVIDENCE, *["where"] * ("where" in record), "sha256"
                record = {"image_id": picture.id, "file": str(picture.path),
                          **{name: record[name] for name in names}}
                yield record | {"seal": self.seal_of(record), **evidence_of(record)}


def rows_without(keys, pictures):
    """The rows of the pictures whose keys are not there, each key once."""
    first = {picture.key: row for row, picture in reversed(list(enumerate(pictures)))}
    return sorted(row for key, row in first.items() if key not in keys)


def is_record(record):
    """Whether a record holds values as a model.Caption does, and maps as antarctic.seen makes them:
    anyone can make a seal."""
    return (type(record["caption"]) is str and is_number(record["score"])
            and type(record["table"]) is type(record["candidates"]) is list
            and all(type(entry) is str and is_number(cosine) for entry, cosine in record["table"])
            and all(type(text) is str and is_number(cosine) and type(likelihood) in (float, int)
                    for text, cosine, likelihood in record["candidates"])
            and ("where" not in record or is_where(record["where"], len(record["table"]))))


def is_where(where, entries):
    """Whether a value is that of "where" in the record of a table of so many entries, see
    antarctic.seen."""
    side, found = where["side"], [each for each in where["maps"] if each is not None]
    return (where.keys() == {"box", "side", "maps"} and type(side) is int and 0 < side <= MOST_SIDE
            and len(where["box"]) == 4 and len(where["maps"]) == entries
            and all(map(is_number, (*where["box"], *(share for x, y, _ in found
                                                     for share in (x, y)))))
            and all(len(base64.b64decode(text, validate=True)) == side**2 for *_, text in found))


def evidence_of(record):
    """What details.jsonl tells of a record beside it: the share of its caption's words that the
    table says (cover), and the entries that it uses (used)."""
    caption, table = record["caption"], record["table"]
    share = cover(caption, table)
    return {"cover": None if share is None else round(share, 3),
            "used": used_entries(caption, table)}


def read_covers(path):
    """Yields what each line of a details.jsonl tells of a caption: (image id, caption, the share of
    its words that its table says, see evidence.cover); None for a line that is no record. Raises
    MissingError where there is no such file, and InputError where it cannot be read."""
    with telling(path, "file of evidence"), open_regular(path) as file:
        for line in lines_of(file):
            try:
                record = parse_json(line, path, "record")
                caption = one_line(record["caption"], path)
                image = image_id(record["image_id"], errors="surrogatepass")
                whole = is_record(record)
            except NO_RECORD:
                whole = False
            yield (image, caption, cover(caption, record["table"])) if whole else None


def is_number(value):
    return type(value) in (float, int) and -9 < value < 9  # a cosine, which NaN is not


def key_of(record):
    """The key of a record's image, see Picture."""
    return Picture(record["image_id"], record["file"], sha256=record["sha256"]).key
