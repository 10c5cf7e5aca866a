"""The sampler's results: captions in the formats of the field, their evidence, the gallery."""

import csv
import json
from functools import partial
from itertools import count, takewhile
from pathlib import Path

from antarctic.errors import InputError
from antarctic.files import atomic, create, write_json, write_lines
from antarctic.sealed import read_sealed

COLUMNS = "image_id", "file", "caption", "score"


def check_sidecars(pictures):
    """Raises InputError where two images would share a .txt file, or it is one of the images."""
    images = {picture.path: picture.path for picture in pictures}
    for picture in pictures:
        sidecar = picture.path.with_suffix(".txt")
        if sidecar in images:
            raise InputError(f"{picture.path} and {images[sidecar]} would have the same --sidecar, "
                             f"or one is that of the other; rename one of them")
        images[sidecar] = picture.path


def write_sidecars(records, overwrite):
    """Writes the caption of each image beside it: dog.txt for dog.jpg.

    Without overwrite a file that exists stays, also one that somebody makes at this moment. Returns
    {path: reason} of the files that hold something else than the caption.
    """
    left = {}
    for record in records:
        path, text = Path(record["file"]).with_suffix(".txt"), record["caption"] + "\n"
        try:
            if not path.exists():
                create(path, text)
            elif path.read_bytes().decode(errors="replace") != text:
                if overwrite:
                    write_lines(path, [record["caption"]])
                else:
                    left[path] = "it exists; --overwrite replaces it"
        except (OSError, InputError) as error:
            left[path] = getattr(error, "strerror", None) or str(error)
    return left


def write_results(savedir, part, pictures, gallery=200, as_csv=False, **reading):
    """Writes all results from the sealed records in part, which is removed at the end.

    They are preds.txt, ref*.txt, captions.json, details.jsonl and gallery.html. as_csv: also
    captions.csv. pictures: a Picture for each record. gallery: images on the page at most. reading:
    settings of read_image. Returns (a dict of COLUMNS for each image; the number of images without
    a candidate).
    """
    from antarctic.gallery import write_gallery
    from antarctic.images import read_image  # Pillow
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
        remark = f"{len(records)} images"
        if len(shown) < len(records):
            remark += f", the first {len(shown)} of them"
        section = "Captions", remark, shown, references
        read = partial(read_image, **reading)
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
