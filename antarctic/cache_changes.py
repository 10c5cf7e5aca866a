"""Writing a cache, and adding entries to one or removing them."""

import io
import random

import numpy as np

from antarctic.cache import read_one_cache
from antarctic.cache_files import finish_cache, staging_path
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import atomic, file_sha256, write_json, write_lines
from antarctic.rows import DIGEST_ROWS, Embeddings, digest_of
from antarctic.words import warn_of_entries, warn_of_long_entries


def write_cache(textfile, embfile, entries, embeddings, clip_model, prefix, dtype=np.float32):
    """Writes a cache: entries, one a line; embeddings (entries, dim) as an .npy of dtype; and their
    description, embfile.json.

    embeddings: an array, or what yields its rows by slices, such as Embeddings; a block of them is
    in memory at a time. The three files are replaced together or not at all (finish_cache). The
    description holds the text's sha256 and digests of the rows, so that files of two runs are never
    taken for one cache. Raises InputError where a value is not finite.
    """
    finish_cache(textfile, embfile)  # otherwise an older run's staged files would mix with these
    write_lines(staging_path(textfile), entries)
    shape = len(embeddings), int(embeddings[:1].shape[1])
    digests = write_rows(staging_path(embfile), entries, embeddings, shape, np.dtype(dtype))
    description = {"clip_model": clip_model, "dim": shape[1], "entries": len(entries),
                   "prefix": prefix, "text_sha256": file_sha256(staging_path(textfile)),
                   "rows_sha256": digests}
    write_json(staging_path(f"{embfile}.json"), description, indent=1)
    finish_cache(textfile, embfile)


def write_rows(path, entries, embeddings, shape, dtype):
    """Writes embeddings as an .npy file. Returns the digests of its rows, see Rows.digest, one
    after the other. Raises InputError as write_cache does."""
    header, digests = io.BytesIO(), []
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    before = header.getvalue()
    with atomic(path, "wb") as file:
        file.write(before)
        for start in range(0, len(embeddings), DIGEST_ROWS):
            with np.errstate(over="ignore"):  # float16 ends at 65,504; require_finite says so
                rows = np.ascontiguousarray(embeddings[start:start + DIGEST_ROWS], dtype)
            require_finite(rows, entries[start:start + DIGEST_ROWS])
            file.write(rows.data)
            digests.append(digest_of(before, rows))
            before = b""
    return "".join(digests)


def require_finite(rows, entries):
    """Raises InputError where a vector of these entries holds a value that is not finite. rows: an
    array (entries, dim)."""
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(bad):
        raise InputError(f"CLIP's vector of the entry {entries[bad[0]][:40]!r} is not finite "
                         f"({len(bad):,} of {len(rows):,} are not), so no cache is written; its "
                         "weights or --dtype may be at fault")


def change_cache(textfile, embfile, clip, add=(), remove=(), prefix=None, batch_size=128):
    """Appends entries to a cache and removes others: all three files change, or none. Prints a
    summary.

    clip: the Clip that the cache was made with; it encodes the new entries. add, remove: texts
    without line breaks. prefix: must be the cache's; None takes the cache's. Raises InputError
    where the cache is of another CLIP, has another prefix, or would be empty.
    """
    entries, rows = read_one_cache(textfile, embfile, clip.identity, whole=True)
    if rows.dim != clip.dim:
        raise InputError(f"{embfile} has {rows.dim} dimensions, but the CLIP model {clip.identity} "
                         f"has {clip.dim}")
    prefix = prefix_of(entries, rows, clip, prefix)
    existing, kept = set(entries), [i for i, entry in enumerate(entries) if entry not in remove]
    new = [entry for entry in dict.fromkeys(add) if entry and entry not in existing]
    if not kept and not new:
        raise InputError(f"this would leave {textfile} empty")
    warn_of_entries([entries[i] for i in kept] + new, len(kept))
    warn_of_long_entries(clip, new, prefix)
    texts = [prefix + entry for entry in new]
    vectors = clip.encode_texts(texts, batch_size, "encoding entries")  # (new, dim)
    if new or len(kept) < len(entries):
        old = rows if len(kept) == len(entries) else rows.only(kept)
        embeddings = Embeddings([old, vectors])  # (kept + new, dim)
        write_cache(textfile, embfile, [entries[i] for i in kept] + new, embeddings,
                    clip.identity, prefix, rows.dtype)
    duplicates, removed = len(existing.intersection(add)), len(entries) - len(kept)
    missing = ", ".join(sorted(set(remove) - existing))
    note = f"; not in the cache, so not removed: {missing}" if missing else ""
    print_safely(escape_control(
        f"added {len(new):,} entries to {textfile} ({duplicates:,} were already in it), removed "
        f"{removed:,}{note}; it has {len(kept) + len(new):,}"))


def prefix_of(entries, rows, clip, prefix=None):
    """The prefix that a cache was made with.

    The description states it. Without a description it is the given prefix, after a check that a
    sample of the rows are this CLIP's vectors with it. Raises InputError where the prefix is
    another.
    """
    if rows.description is None:
        prefix = prefix or ""
        sample = sorted(random.Random(0).sample(range(len(entries)), min(8, len(entries))))
        vectors = clip.encode_texts([prefix + entries[i] for i in sample])  # (8, dim)
        if ((vectors * rows.only(sample)[:]).sum(1) < 0.99).any():
            raise InputError(f"{rows.path} was not made with the CLIP model {clip.identity} and "
                             f'the prefix "{prefix}"')
        return prefix
    stated = rows.description.prefix
    if prefix not in (None, stated):
        raise InputError(f'{rows.path} was made with the prefix "{stated}", not "{prefix}"')
    return stated
