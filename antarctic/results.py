"""The sampler's results: captions in the formats of the field, their evidence, the gallery."""

import csv
import json
import os
from functools import partial
from itertools import count, takewhile

from antarctic.errors import InputError, counted
from antarctic.files import (
    atomic,
    check_lines,
    made_by_runs,
    reading,
    remove,
    write_json,
    write_lines,
)

COLUMNS = "image_id", "file", "caption", "score"
BYTE_ORDER_MARK = "\ufeff"  # tells Excel that it is UTF-8


def write_results(savedir, records, pictures, gallery=200, as_csv=False, **reading):
    """Writes all results of some pictures from their Records, whose part is removed at the end.

    They are preds.txt, ref*.txt, captions.json, details.jsonl and gallery.html. as_csv: also
    captions.csv. gallery: images on the page at most. reading: settings of read_image. Returns (a
    dict of COLUMNS and sha256 for each image; the number of images without a candidate).
    """
    from antarctic.gallery import write_gallery
    from antarctic.images import read_image  # Pillow
    rows, empty = [], 0
    with atomic(savedir / "details.jsonl") as details:
        for record in records.read(pictures):
            details.write(json.dumps(record, ensure_ascii=False) + "\n")
            empty += not record["candidates"]
            rows.append({name: record[name] for name in (*COLUMNS, "sha256")})
        write_captions(savedir, rows, as_csv)
        references = [picture.captions for picture in pictures]
        write_references(savedir, references)
        shown, remark = pictures[:gallery], counted(len(rows), "image")
        if len(shown) < len(rows):
            remark += f", the first {len(shown):,} of them"
        if records.where:
            remark += (". Pointing at an entry, or at a word of the caption that an entry spells, "
                       "lights where in the image CLIP's score of the entry came from")
        # The records are read again: those of thousands of images would take gigabytes.
        section = "Captions", remark, records.read(shown), references[:gallery]
        read = partial(read_image, **reading)
        write_gallery(savedir / "gallery.html", "Captions", [section], read)
    check_results(savedir, rows)
    # Last, since a stopped run resumes from it. Others were left by runs with other settings.
    remove(*made_by_runs(savedir, "details-", ".jsonl.part"))
    return rows, empty


def write_captions(savedir, records, as_csv):
    """Writes preds.txt, captions.json (COCO's results format) and, if asked for, captions.csv."""
    write_lines(savedir / "preds.txt", [record["caption"] for record in records])
    results = [{name: record[name] for name in ("image_id", "caption")} for record in records]
    write_json(savedir / "captions.json", results)
    path = savedir / "captions.csv"
    if as_csv:
        write_csv(path, COLUMNS, ([record[name] for name in COLUMNS] for record in records))
    elif is_captions_csv(path):  # an earlier run's
        remove(path)


def is_captions_csv(path):
    """Whether a file begins as write_captions writes it; a person's may have that name, too."""
    if path.is_symlink() or not path.is_file():
        return False
    begin = f"{BYTE_ORDER_MARK}{','.join(COLUMNS)}\n".encode()
    with reading(path), open(path, "rb") as file:
        return file.read(len(begin) + 1).replace(b"\r\n", b"\n").startswith(begin)


def check_results(savedir, records):
    """Raises InputError unless the files hold one line or record an image, and these captions: two
    runs may write to one place where locks do not work."""
    for name in ("details.jsonl", "preds.txt"):
        check_lines(savedir / name, len(records))
    path = savedir / "captions.json"
    with reading(path):
        text = path.read_bytes()
    try:
        found = [result["caption"] for result in json.loads(text)]
    except (ValueError, LookupError, TypeError, RecursionError):
        found = None
    if found != [record["caption"] for record in records]:
        raise InputError(f"{path} does not hold the captions of {counted(len(records), 'image')}: "
                         "another run or program has changed it; see that none does, and rerun the "
                         "same command")


def write_csv(path, columns, records):
    """Writes a CSV file as spreadsheets read it. records: a tuple of values each."""
    with atomic(path) as file:
        file.write(BYTE_ORDER_MARK)
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(map(cell_of, record) for record in records)


def cell_of(value):
    """A value as spreadsheets show it: a text that they would take for a formula has an apostrophe
    before it, see https://owasp.org/www-community/attacks/CSV_Injection."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value


def write_references(savedir, references):
    """Writes ref0.txt, ref1.txt ..., as many as every image has captions."""
    number = min(map(len, references))
    for i in range(number):
        write_lines(savedir / f"ref{i}.txt", [captions[i] for captions in references])
    others = (savedir / f"ref{i}.txt" for i in count(number))
    remove(*takewhile(os.path.lexists, others))  # an earlier run's
