"""The sampler's results: captions in the formats of the field, their evidence, the gallery."""

import csv
import json
from collections import Counter
from itertools import count, takewhile
from pathlib import Path

from antarctic.errors import InputError
from antarctic.files import atomic, write_json, write_lines
from antarctic.gallery import write_gallery
from antarctic.images import read_image
from antarctic.sealed import read_sealed

COLUMNS = "image_id", "file", "caption", "score"


def check_sidecars(pictures, overwrite):
    """Raises InputError where two pictures would share a .txt file, or a file would be replaced."""
    paths = [picture.path.with_suffix(".txt") for picture in pictures]
    if len(set(paths)) < len(paths):
        [(twice, _)] = Counter(paths).most_common(1)
        raise InputError(f"two images would have the same --sidecar {twice}; rename one of them")
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise InputError(f"{len(existing)} files that --sidecar would write exist, such as "
                         f"{existing[0]}; --overwrite replaces them")


def write_results(savedir, part, pictures, gallery=200, as_csv=False, sidecar=False,
                  read=read_image):
    """Writes all results from the sealed records in part, which is removed at the end.

    They are preds.txt, ref*.txt, captions.json, details.jsonl and gallery.html. as_csv: also
    captions.csv. sidecar: also a .txt file beside each image. pictures: a Picture for each record.
    gallery: images on the page at most, which read(path) gives. Returns (a dict of COLUMNS for
    each image; the number of images without a candidate).
    """
    records, shown, empty = [], [], 0  # shown: on the gallery
    with atomic(savedir / "details.jsonl") as details:
        for record in read_sealed(part):
            details.write(json.dumps(record, ensure_ascii=False) + "\n")
            if len(shown) < gallery:
                shown.append(record)
            empty += not record["candidates"]
            records.append({name: record[name] for name in COLUMNS})
        if len(records) != len(pictures):
            raise InputError(f"{part} was changed by another program: {len(records)} of its "
                             f"{len(pictures)} records are whole; rerun the same command to resume")
        write_captions(savedir, records, as_csv)
        references = [picture.captions for picture in pictures]
        write_references(savedir, references)
        if sidecar:
            for picture, record in zip(pictures, records):
                write_lines(picture.path.with_suffix(".txt"), [record["caption"]])
        remark = f"{len(records)} images"
        if len(shown) < len(records):
            remark += f", the first {len(shown)} of them"
        section = "Captions", remark, shown, references
        write_gallery(savedir / "gallery.html", "Captions", [section], read)
    # Last, since a stopped run resumes from part. Others were left by runs with other settings.
    for finished in savedir.glob("details-*.jsonl.part"):
        finished.unlink()
    return records, empty


def write_captions(savedir, records, as_csv):
    """Writes preds.txt, captions.json (COCO's results format) and, if asked for, captions.csv."""
    write_lines(savedir / "preds.txt", [record["caption"] for record in records])
    results = [{name: record[name] for name in ("image_id", "caption")} for record in records]
    write_json(savedir / "captions.json", results)
    if not as_csv:
        (savedir / "captions.csv").unlink(missing_ok=True)  # an earlier run's
        return
    with atomic(savedir / "captions.csv") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(records)


def write_references(savedir, references):
    """Writes ref0.txt, ref1.txt ..., as many as every image has captions."""
    number = min(map(len, references))
    for i in range(number):
        write_lines(savedir / f"ref{i}.txt", [captions[i] for captions in references])
    others = (savedir / f"ref{i}.txt" for i in count(number))
    for earlier in takewhile(Path.exists, others):  # an earlier run's
        earlier.unlink()
