"""The three files of a cache: entries, embeddings and their description. They belong together."""

import os
from contextlib import suppress
from pathlib import Path

from antarctic.bounded import MOST_SETTINGS
from antarctic.errors import InputError
from antarctic.files import existing_file, writing
from antarctic.texts import LONGEST_TEXT, read_json


def staging_path(path):
    """Where a file of a cache is kept until all of them are written."""
    return Path(path).with_name(f".{Path(path).name}.new")


def finish_cache(textfile, embfile):
    """Moves the files that write_cache staged into place, also those of a run that was killed while
    it moved them.

    The description is staged last: where it exists, all files are whole. So text and embeddings
    always belong together.
    """
    files = textfile, embfile, f"{embfile}.json"
    if staging_path(files[-1]).is_file():
        for path in files:
            with writing(path), suppress(FileNotFoundError):  # a killed run has moved it
                os.replace(staging_path(path), path)


def existing_caches(textfiles, embfiles):
    """Pairs of paths (text, embeddings). Raises InputError where a file is missing or the numbers
    of files differ."""
    if len(textfiles) != len(embfiles):
        raise InputError(f"got {len(textfiles)} --textfile but {len(embfiles)} --embfile; they go "
                         "in pairs")
    pairs = []
    for textfile, embfile in zip(textfiles, embfiles):
        finish_cache(textfile, embfile)
        pairs.append((existing_file(textfile, "cache text"),
                      existing_file(embfile, "cache embeddings")))
    return pairs


def cache_description(embfile):
    """The description that write_cache stored beside the embeddings, a dict, or None where there is
    none. Raises InputError where the file holds something else."""
    path = Path(f"{embfile}.json")
    if not path.is_file():
        return None
    try:
        description = read_json(path, "description", MOST_SETTINGS)
        if len(description["prefix"]) > LONGEST_TEXT:
            raise ValueError("each entry would be read with this prefix")
        return {name: description[name] + "" for name in ("clip_model", "text_sha256", "prefix")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not the description of a cache; delete it to load the cache "
                         "unchecked") from error
