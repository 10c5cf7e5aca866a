"""Captions that the sampler or another captioner wrote, in the formats of the field."""

from pathlib import Path

from antarctic.bounded import parse_json
from antarctic.errors import InputError
from antarctic.layouts import image_id
from antarctic.texts import one_line, read_text, split_lines


def read_captions(path, other=".txt"):
    """The captions of a file, as sampler.py or another captioner wrote it: a list of (image id or
    None, caption). Raises InputError where the file holds something else.

    .json: COCO's results format, a list of {"image_id", "caption"}. .jsonl: one such object a line.
    Other keys are ignored. .txt: one caption a line. other: which of these any other suffix means.
    A caption that is missing or null is an empty text, unless all are missing; an image id that is
    null is missing.
    """
    return [(image, caption) for image, caption, _ in read_records(path, other)]


def read_records(path, other):
    """read_captions with image files: a list of (image id or None, caption, file or None)."""
    path = Path(path)
    text = read_text(path, "captions file")
    suffix = path.suffix if path.suffix in (".json", ".jsonl") else other
    if suffix == ".txt":
        return [(None, one_line(line, path), None) for line in split_lines(text, path)]
    try:
        parts = [text] if suffix == ".json" else (f"[{line}]" for line in split_lines(text, path))
        records = (record for part in parts for record in parse_json(part, path, "captions file"))
        rows, captioned = [], False
        # Only what is used is kept: details.jsonl can hold 1,000 candidates an image.
        for i, record in enumerate(records, 1):
            caption, file = record.get("caption"), record.get("file")
            captioned |= "caption" in record
            rows.append((id_of(record, path, i), one_line("" if caption is None else caption, path),
                         file if isinstance(file, str) else None))
        if rows and not captioned:
            raise KeyError("caption")
        return rows
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} does not hold captions as sampler.py writes them in {suffix} "
                         f"files") from error


def id_of(record, path, i):
    """The image id of a file's i-th record, None where it is missing. Raises InputError where it is
    none."""
    value = record.get("image_id")
    try:
        # The sampler's ids are paths, whose bytes need not be UTF-8: JSON has them as surrogates.
        return None if value is None else image_id(value, errors="surrogatepass")
    except (TypeError, ValueError) as error:
        raise InputError(f"the image_id of record {i} in {path} is {repr(value)[:60]}, which is "
                         "neither a whole number nor a text; correct it, or leave it out") \
            from error


def read_captioned(path):
    """The captions of a file in COCO's results format, or of details.jsonl, which also names the
    image files: {image id: (caption, file or None)}. Raises InputError where the file is something
    else, or an image has two captions."""
    captions = {}
    for image, caption, file in read_records(path, ".json"):
        if image is None:
            raise InputError(f"{path} is not in COCO's results format: no image_id belongs to the "
                             f"caption {caption[:60]!r}")
        if image in captions:
            raise InputError(f"{path} has more than one caption of the image {image!r}")
        captions[image] = caption, file
    if not any(caption for caption, _ in captions.values()):
        raise InputError(f"there is no text in the results file {path}")
    return captions


def read_texts(path, kind):
    """A list of texts, one a line; a blank line is an empty text. kind: what the file is, for
    messages. Raises InputError where it is missing, empty or not UTF-8."""
    text = read_text(path, kind).removesuffix("\n")
    lines = [one_line(line, path) for line in split_lines(text, path)]
    if not any(lines):
        raise InputError(f"there is no text in the {kind} {path}")
    return lines
