"""The file beside a cache that keeps what was taught: CLIP's vectors of photos, no photos.

A row depends on the cache and the size of its tables, so it is computed when the cache is loaded
(taught.Taught), and the file holds what it is computed from.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from antarctic.bounded import parse_json, read_bytes
from antarctic.errors import InputError
from antarctic.files import atomic, remove
from antarctic.taught import Thing, checked_thing, noun_of

MOST_BYTES = 1 << 28
MOST_OTHERS = 4096  # 4 a dimension of the largest CLIPs
FEWEST_OTHERS, FEWEST_PHOTOS = 100, 3
MOST_THINGS = 100
SAME = 0.9999  # cosine of one file's vectors, encoded in two batches
KEY = "antarctic_taught"


class Notes(NamedTuple):
    """clip_model: identity of the CLIP. others: float32 (n, dim). things: a list of Thing. vectors:
    of each thing (photos (m, dim), photos of what it is not (q, dim)), float32."""

    clip_model: str
    others: np.ndarray
    things: list[Thing]
    vectors: list


def taught_path(embfile):
    """Where the things taught to a cache lie."""
    return Path(f"{embfile}.taught")


def write_taught(embfile, notes):
    """Writes Notes whole or not at all; without a thing the file is removed."""
    path = taught_path(embfile)
    if not notes.things:
        remove(path)
        return
    parts = {"others": [notes.others], "photos": [photos for photos, _ in notes.vectors],
             "unlike": [unlike for _, unlike in notes.vectors]}
    tensors = {name: torch.from_numpy(np.concatenate(arrays).astype(np.float32))
               for name, arrays in parts.items()}
    things = [[*thing, len(photos), len(unlike)]
              for thing, (photos, unlike) in zip(notes.things, notes.vectors)]
    said = {"clip_model": notes.clip_model, "things": things, "sha256": digest_of(tensors, things)}
    with atomic(path, "wb") as file:
        file.write(save(tensors, {KEY: json.dumps(said)}))


def digest_of(tensors, things):
    digest = hashlib.sha256(json.dumps(things).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].numpy())
    return digest.hexdigest()


def read_taught(embfile, clip_model=None, dim=None):
    """The Notes beside a cache, None where nothing was taught. clip_model, dim: of the CLIP in use,
    or None. Raises InputError where the file is damaged, or of another CLIP."""
    path = taught_path(embfile)
    if not os.path.lexists(path):  # a link that leads nowhere is told of
        return None
    data = read_bytes(path, "file of taught things", MOST_BYTES)
    try:
        length = int.from_bytes(data[:8], "little")
        header = parse_json(data[8:8 + length], path, "header")
        said = parse_json(header["__metadata__"][KEY], path, "header")
        tensors, things = load(data), said["things"]
        if (sorted(tensors) != ["others", "photos", "unlike"] or len(things) > MOST_THINGS
                or said["sha256"] != digest_of(tensors, things)):
            raise ValueError
        notes = notes_of(said, tensors)
    except (InputError, SafetensorError, ValueError, LookupError, TypeError, AttributeError,
            RecursionError) as error:
        raise InputError(f"{path} is damaged, or no file of taught things; move it away, and teach "
                         "them again by compute_cache.py --teach") from error
    if clip_model not in (None, notes.clip_model):
        raise InputError(f"{', '.join(thing.name for thing in notes.things)} of {path} were taught "
                         f"to the CLIP model {notes.clip_model}, not to {clip_model}; give that "
                         "--clip_model, or move the file away and teach them again")
    if dim not in (None, notes.others.shape[1]):
        raise InputError(f"{path} has {notes.others.shape[1]} dimensions, but the CLIP model "
                         f"{clip_model} has {dim}")
    return notes


def unit(vectors):
    """Whether vectors (n, dim) are of length 1, as CLIP's are: sums with others would not end in
    numbers."""
    lengths = np.linalg.norm(np.asarray(vectors, np.float64), axis=1)
    return bool((np.abs(lengths - 1) < 0.01).all())  # NaN is not


def notes_of(said, tensors):
    """Notes of what a file says. Raises ValueError, LookupError, TypeError or InputError."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    widths = {array.shape[1] for array in arrays.values()}
    if len(widths) > 1 or any(array.ndim != 2 or array.dtype != np.float32
                              or not unit(array) for array in arrays.values()):
        raise ValueError
    things, vectors, ends = [], [], [0, 0]
    for name, phrase, photos, unlike in said["things"]:
        if type(photos) is not int or type(unlike) is not int or photos < 1 or unlike < 0:
            raise ValueError
        things.append(checked_thing(name, phrase))
        starts, ends = ends, [ends[0] + photos, ends[1] + unlike]
        vectors.append((arrays["photos"][starts[0]:ends[0]], arrays["unlike"][starts[1]:ends[1]]))
    counts = [len(arrays["photos"]), len(arrays["unlike"])]
    if ends != counts or not things or not FEWEST_OTHERS <= len(arrays["others"]) <= MOST_OTHERS:
        raise ValueError
    return Notes(said["clip_model"] + "", arrays["others"], things, vectors)


def joined(notes):
    """The Notes of several files as one, or None. Of a name that comes again the last one counts,
    since a small cache lies over the common one. notes: a list of Notes and None."""
    notes = [each for each in notes if each]
    if len(notes) < 2:
        return notes[0] if notes else None
    pairs = {}
    for each in notes:
        for thing, vectors in zip(each.things, each.vectors):
            pairs[noun_of(thing.name)] = thing, vectors
    others = np.unique(np.concatenate([each.others for each in notes]), axis=0)
    photos = np.concatenate([photos for _, (photos, _) in pairs.values()])
    apart = others[(others @ photos.T).max(1) < SAME]  # photos of a name are not others of another
    if len(apart) >= FEWEST_OTHERS:
        others = apart
    return Notes(notes[0].clip_model, thinned(others), [thing for thing, _ in pairs.values()],
                 [vectors for _, vectors in pairs.values()])


def thinned(values, most=MOST_OTHERS):
    """At most so many of the values of a list or an array, evenly taken."""
    return values[::-(-len(values) // most) or 1]
