"""What the sampler leaves in --savedir and beside the images: captions in the formats of the field,
and the gallery."""

import csv
import json
from collections import Counter
from itertools import count, takewhile
from pathlib import Path

from antarctic.errors import InputError
from antarctic.files import atomic, write_json, write_lines
from antarctic.gallery import write_gallery
from antarctic.sealed import read_sealed

COLUMNS = "image_id", "file", "caption", "score"


def check_sidecars(pictures, overwrite):
    """Raises InputError where two pictures would share a .txt file, or where one is there and must
    stay."""
    paths = [picture.path.with_suffix(".txt") for picture in pictures]
    if len(set(paths)) < len(paths):
        [(twice, _)] = Counter(paths).most_common(1)
        raise InputError(f"two images would have the same --sidecar {twice}; rename one of them")
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise InputError(f"{len(existing)} files that --sidecar would write are there, such as "
                         f"{existing[0]}; --overwrite replaces them")


def write_results(savedir, part, pictures, gallery=200, as_csv=False, sidecar=False):
    """Writes preds.txt, ref*.txt, captions.json (COCO results), gallery.html, details.jsonl and
    what else is asked for, from the sealed records in part, which is removed at the end.

    pictures: a Picture for each record. gallery: images on the page at most. Returns (a dict of
    COLUMNS for each image; how many have no candidate).
    """
    records, shown, empty = [], [], 0
    with atomic(savedir / "details.jsonl") as details:
        for record in read_sealed(part):
            details.write(json.dumps(record, ensure_ascii=False) + "\n")
            shown += [record] * (len(shown) < gallery)
            empty += not record["candidates"]
            records.append({name: record[name] for name in COLUMNS})
        write_captions(savedir, records, as_csv)
        references = [picture.captions for picture in pictures]
        write_references(savedir, references)
        if sidecar:
            for picture, record in zip(pictures, records):
                write_lines(picture.path.with_suffix(".txt"), [record["caption"]])
        remark = f"{len(records)} images"
        if len(shown) < len(records):
            remark += f", the first {len(shown)} of them"
        write_gallery(savedir / "gallery.html", "Captions",
                      [("Captions", remark, shown, references)])
    for finished in savedir.glob(
            "details-*.jsonl.part"):  # last: until here a stopped run resumes from it
        finished.unlink()  # others were abandoned by runs with other settings
    return records, empty


def write_captions(savedir, records, as_csv):
    """preds.txt, captions.json and, if asked for, captions.csv; one of an earlier run would be
    taken for this run's."""
    write_lines(savedir / "preds.txt", [record["caption"] for record in records])
    write_json(
        savedir / "captions.json",
        [{"image_id": record["image_id"], "caption": record["caption"]} for record in records])
    if not as_csv:
        (savedir / "captions.csv").unlink(missing_ok=True)
        return
    with atomic(savedir / "captions.csv") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(records)


def write_references(savedir, references):
    """ref0.txt ..., as many as every image has captions; those of an earlier run that go beyond are
    removed."""
    number = min(map(len, references))
    for i in range(number):
        write_lines(savedir / f"ref{i}.txt", [captions[i] for captions in references])
    paths = (savedir / f"ref{i}.txt" for i in count(number))
    for stale in takewhile(Path.exists, paths):
        stale.unlink()
