"""Writing a cache, and adding entries to one or removing them."""

import random

import numpy as np
import torch

from antarctic.cache import BLOCK, read_one_cache
from antarctic.cache_files import cache_description, finish_cache, staging_path
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import atomic, file_sha256, write_json, write_lines
from antarctic.words import warn_of_entries, warn_of_long_entries


def write_cache(textfile, embfile, entries, embeddings, clip_model, prefix, dtype=np.float32):
    """Writes a cache: entries, one a line; embeddings (entries, dim) as an .npy of dtype; and their
    description, embfile.json.

    The three files are replaced together or not at all (finish_cache). The description holds the
    text's sha256, so that files of two runs are never taken for one cache.
    """
    finish_cache(textfile, embfile)  # otherwise an older run's staged files would mix with these
    write_lines(staging_path(textfile), entries)
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": embeddings.shape}
    with atomic(staging_path(embfile), "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(embeddings), BLOCK):
            file.write(np.ascontiguousarray(embeddings[start:start + BLOCK], dtype).tobytes())
    description = {"clip_model": clip_model, "dim": int(embeddings.shape[1]),
                   "entries": len(entries), "prefix": prefix,
                   "text_sha256": file_sha256(staging_path(textfile))}
    write_json(staging_path(f"{embfile}.json"), description, indent=1)
    finish_cache(textfile, embfile)


def change_cache(textfile, embfile, clip, add=(), remove=(), prefix=None, batch_size=128):
    """Appends entries to a cache and removes others: all three files change, or none. Prints a
    summary.

    clip: the Clip that the cache was made with; it encodes the new entries. add, remove: texts
    without line breaks. prefix: must be the cache's; None takes the cache's. Raises InputError
    where the cache is of another CLIP, has another prefix, or would be empty.
    """
    entries, rows = read_one_cache(textfile, embfile, clip.identity)
    if rows.dim != clip.dim:
        raise InputError(f"{embfile} has {rows.dim} dimensions, but the CLIP model {clip.identity} "
                         f"has {clip.dim}")
    prefix = prefix_of(embfile, entries, rows, clip, prefix)
    existing, kept = set(entries), [i for i, entry in enumerate(entries) if entry not in remove]
    new = [entry for entry in dict.fromkeys(add) if entry and entry not in existing]
    if not kept and not new:
        raise InputError(f"this would leave {textfile} empty")
    warn_of_entries([entries[i] for i in kept] + new, len(kept))
    warn_of_long_entries(clip, new, prefix)
    texts = [prefix + entry for entry in new]
    vectors = clip.encode_texts(texts, batch_size, "encoding entries")  # (new, dim)
    if new or len(kept) < len(entries):
        embeddings = torch.cat((rows.only(kept)[:], vectors)).numpy()  # (kept + new, dim)
        write_cache(textfile, embfile, [entries[i] for i in kept] + new, embeddings,
                    clip.identity, prefix, rows.dtype)
    duplicates, removed = len(existing.intersection(add)), len(entries) - len(kept)
    missing = ", ".join(sorted(set(remove) - existing))
    note = f"; not in the cache, so not removed: {missing}" if missing else ""
    print_safely(escape_control(
        f"added {len(new):,} entries to {textfile} ({duplicates:,} were already in it), removed "
        f"{removed:,}{note}; it has {len(kept) + len(new):,}"))


def prefix_of(embfile, entries, rows, clip, prefix=None):
    """The prefix that a cache was made with.

    The description states it. Without a description it is the given prefix, after a check that a
    sample of the rows are this CLIP's vectors with it. Raises InputError where the prefix is
    another.
    """
    description = cache_description(embfile)
    if description is None:
        prefix = prefix or ""
        sample = sorted(random.Random(0).sample(range(len(entries)), min(8, len(entries))))
        vectors = clip.encode_texts([prefix + entries[i] for i in sample])  # (8, dim)
        if ((vectors * rows.only(sample)[:]).sum(1) < 0.99).any():
            raise InputError(f"{embfile} was not made with the CLIP model {clip.identity} and the "
                             f'prefix "{prefix}"')
        return prefix
    if prefix not in (None, description["prefix"]):
        raise InputError(f'{embfile} was made with the prefix "{description["prefix"]}", not '
                         f'"{prefix}"')
    return description["prefix"]
