"""The cache: entries in a text file, their CLIP embeddings in an .npy beside it, and the search for
those nearest to an image."""

import io
import json
import random
import re
import sys
from pathlib import Path
from tokenize import TokenError  # numpy's, of a header cut in two

import numpy as np
import torch

from antarctic.errors import InputError
from antarctic.files import (
    LONGEST_TEXT,
    atomic,
    existing_caches,
    file_sha256,
    finish_cache,
    read_text,
    staging_path,
    write_json,
    write_lines,
)

BLOCK = 65536  # rows read or written at a time


class Rows:
    """The rows of an .npy file, or some of them, left on the disk: what is asked for is mapped, so
    a cache may be larger than memory. rows[a:b] is a float32 tensor (b - a, dim), whatever the
    file's own type of real numbers. Raises InputError."""

    def __init__(self, path, kept=None):
        self.path, self.kept = path, kept  # kept: ascending numbers of rows, or None for all
        try:
            with open(path, "rb") as file:  # not np.load, which opens archives, too
                begin = io.BytesIO(file.read(
                    512))  # numpy's own headers have 128 bytes, and it would read gigabytes
            header = {(1, 0): np.lib.format.read_array_header_1_0,
                      (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, self.dtype = header[np.lib.format.read_magic(begin)](begin)
            self.offset = begin.tell()
        except (ValueError, OSError, EOFError, KeyError, TokenError) as error:
            raise InputError(f"{path} is not a .npy file of numbers") from error
        if len(shape) != 2 or fortran or not np.issubdtype(
                self.dtype, np.floating) or shape[0] < 0 or shape[1] < 1:
            raise InputError(f"{path} does not hold a table of real numbers, one row an entry")
        self.file_rows, self.dim = shape
        if Path(path).stat(
        ).st_size < self.offset + self.file_rows * self.dim * self.dtype.itemsize:
            raise InputError(f"{path} is cut short, so it is not a .npy file of numbers any more")

    def __len__(self):
        return self.file_rows if self.kept is None else len(self.kept)

    def __getitem__(self, part):
        start, stop, _ = part.indices(len(self))
        if stop <= start or not self.dim:
            return torch.empty(max(0, stop - start), self.dim)
        first, last = (start, stop - 1) if self.kept is None else (self.kept[start],
                                                                   self.kept[stop - 1])
        rows = np.memmap(self.path, self.dtype, "c",
                         self.offset + first * self.dim * self.dtype.itemsize,
                         (last + 1 - first, self.dim))
        if self.kept is not None:
            rows = rows[[row - first for row in self.kept[start:stop]]]
        return torch.from_numpy(np.asarray(rows, np.float32))

    def only(self, rows):
        """Some of these rows. rows: ascending numbers."""
        return Rows(self.path,
                    list(rows) if self.kept is None else [self.kept[row] for row in rows])


class Embeddings:
    """Rows and float32 tensors (n, dim) one behind the other, which search reads as it reads a
    tensor."""

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return sum(map(len, self.parts))

    def __getitem__(self, part):
        start, stop, _ = part.indices(len(self))
        found = []
        for rows in self.parts:
            if start < len(rows) and stop > 0:
                found.append(rows[max(0, start):stop])
            start, stop = start - len(rows), stop - len(rows)
        return found[0] if len(found) == 1 else torch.cat(found
                                                          or [torch.empty(0, self.parts[0].dim)])

    def only(self, rows):
        """Some of these rows. rows: ascending numbers."""
        parts, begin = [], 0
        for part in self.parts:
            wanted = [row - begin for row in rows if begin <= row < begin + len(part)]
            parts.append(part[wanted] if torch.is_tensor(part) else part.only(wanted))
            begin += len(part)
        return Embeddings(parts)


def write_cache(textfile, embfile, entries, embeddings, clip_model, prefix, dtype=np.float32):
    """Writes entries (one a line), embeddings (entries, dim) as an .npy of dtype, and what they
    were made with (.npy.json).

    All of them or none come into place (finish_cache). The JSON holds the text's sha256, so that
    files of two runs are never taken for one cache.
    """
    finish_cache(textfile, embfile)  # or its staged files would mix with these
    write_lines(staging_path(textfile), entries)
    with atomic(staging_path(embfile), "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": embeddings.shape})
        for start in range(0, len(embeddings), BLOCK):
            file.write(np.ascontiguousarray(embeddings[start:start + BLOCK], dtype).tobytes())
    write_json(
        staging_path(f"{embfile}.json"), {
            "clip_model": clip_model, "dim": int(embeddings.shape[1]), "entries": len(entries),
            "prefix": prefix, "text_sha256": file_sha256(staging_path(textfile))
        }, indent=1)
    finish_cache(textfile, embfile)


def change_cache(textfile, embfile, clip, add=(), remove=(), prefix=None, batch_size=128):
    """Adds entries at the end of a cache and takes others out: all three files change, or none.

    clip: the Clip that the cache was made with; it encodes what is new. add, remove: texts without
    line breaks. prefix: as in the cache; None: whatever that is. Prints what was done.
    Raises InputError: the cache is not this CLIP's, has another prefix, or would be empty.
    """
    entries, rows = read_one_cache(textfile, embfile, clip.identity)
    if rows.dim != clip.dim:
        raise InputError(f"{embfile} has {rows.dim} dimensions, but the CLIP model {clip.identity} "
                         f"has {clip.dim}")
    prefix = prefix_of(embfile, entries, rows, clip, prefix)
    present, kept = set(entries), [i for i, entry in enumerate(entries) if entry not in remove]
    new = [entry for entry in dict.fromkeys(add) if entry and entry not in present]
    if not kept and not new:
        raise InputError(f"this would leave {textfile} empty")
    texts = [prefix + entry for entry in new]
    vectors = clip.encode_texts(texts, batch_size, "encoding entries")  # (new, dim)
    if new or len(kept) < len(entries):
        write_cache(textfile, embfile, [entries[i] for i in kept] + new,
                    torch.cat((rows.only(kept)[:], vectors)).numpy(), clip.identity, prefix,
                    rows.dtype)
    missing = ", ".join(sorted(set(remove) - present))
    print(f"added {len(new):,} entries to {textfile} ({len(present.intersection(add)):,} were "
          f"there before), removed {len(entries) - len(kept):,}"
          f"{missing and f'; not there to be removed: {missing}'}; it has {len(kept) + len(new):,}")


def prefix_of(embfile, entries, rows, clip, prefix=None):
    """The prefix that a cache was made with: by its description, else the given one, where a sample
    of its rows are the vectors of this CLIP with it. Raises InputError where they are not."""
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


def read_cache(textfiles, embfiles, clip_model, dim=None):
    """Reads caches one after the other as one; an entry that comes again is kept once, at its first
    place.

    textfiles, embfiles: paths, in pairs. clip_model, dim: identity and width of the CLIP in use
    (Clip.identity, Clip.dim). Returns (entries, a list of N texts; their Embeddings, unit rows).
    Raises InputError: a file is missing or empty, lengths differ, another CLIP model or text, not
    finite.
    """
    entries, parts, seen = [], [], set()
    for textfile, embfile in existing_caches(textfiles, embfiles):
        lines, rows = read_one_cache(textfile, embfile, clip_model)
        if rows.dim != (dim or rows.dim):
            raise InputError(
                f"{embfile} has {rows.dim} dimensions, but the CLIP model {clip_model} has {dim}")
        if parts and rows.dim != parts[0].dim:
            raise InputError(
                f"{embfile} has {rows.dim} dimensions, but {embfiles[0]} has {parts[0].dim}: not "
                "of one CLIP model"
            )
        fresh = [i for i, line in enumerate(lines) if not (line in seen or seen.add(line))]
        if len(fresh) < len(lines):
            rows, lines = rows.only(fresh), [lines[i] for i in fresh]
        entries += lines
        parts.append(rows)
    return entries, Embeddings(parts)


def cache_description(embfile):
    """What write_cache noted beside the embeddings, a dict; None where there is nothing. Raises
    InputError."""
    side = Path(f"{embfile}.json")
    if not side.is_file():
        return None
    try:
        made = json.loads(read_text(side, "description"))
        return {name: made[name] + "" for name in ("clip_model", "text_sha256", "prefix")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{side} is not the description of a cache; delete it to load the cache unchecked"
        ) from error


def read_one_cache(textfile, embfile, clip_model):
    """One cache, checked: (lines, Rows). Raises InputError, see read_cache."""
    text = read_text(textfile, "cache text").replace("\r\n", "\n")
    lines = text.removesuffix("\n").split("\n") if text else []  # no other character ends an entry
    if not lines:
        raise InputError(f"the cache {textfile} is empty")
    if (longest := max(map(len, lines))) > LONGEST_TEXT:
        raise InputError(
            f"{textfile} has an entry of {longest:,} characters; {LONGEST_TEXT:,} are read at most")
    rows = Rows(embfile)
    if len(lines) != len(rows):
        raise InputError(
            f"{textfile} has {len(lines)} entries, but {embfile} has {len(rows)} rows: not the "
            "same cache"
        )
    made = cache_description(embfile)
    if made is None:
        print(
            f"warning: {embfile}.json is missing, so it is not checked that {embfile} was made "
            f"with {clip_model}",
            file=sys.stderr)
    elif made["clip_model"] != clip_model:
        raise InputError(
            f"the cache {embfile} was made with the CLIP model {made['clip_model']}, not with "
            f"{clip_model}"
        )
    elif made["text_sha256"] != file_sha256(textfile):
        raise InputError(
            f"{textfile} is not the text that {embfile} was made from; compute the cache again")
    if not all(rows[start:start + BLOCK].isfinite().all() for start in range(0, len(rows), BLOCK)):
        raise InputError(f"{embfile} holds values that are not finite; compute the cache again")
    return lines, rows


def restrict(entries, embeddings, only, banned):
    """The entries, and their Embeddings, that --only and --ban leave. only: a list or None; banned:
    a pattern or None."""
    if only and (missing := set(only).difference(entries)):
        raise InputError(
            f'{len(missing)} lines of --only, such as "{min(missing)}", are in no cache; '
            'compute_cache.py --add puts '
            f"them into one")
    only = set(only or entries)
    rows = [
        i for i, entry in enumerate(entries)
        if entry in only and not (banned and banned.search(entry))
    ]
    if not rows:
        raise InputError("--ban leaves no entry")
    return [entries[i] for i in rows], embeddings.only(rows)


def whole_words(lines):
    """A pattern that finds any of the lines as whole words, in any case."""
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, lines))})(?!\w)", re.IGNORECASE)


def search(queries, embeddings, k, chunk=8192, half=None):
    """The k nearest rows by inner product, best first.

    queries: (B, dim) float32. embeddings: a float32 tensor (N, dim), or Embeddings. Returns (scores
    (B, k), indices (B, k) int64), k <= N. Only B x chunk products exist at a time, so memory does
    not grow with N. half: to_bfloat16(embeddings), which is scanned in their place; float32 decides
    among those rows of a chunk that may be among the best of a query by as much as bfloat16 can be
    wrong. So the result is the same, but for ties.
    """
    k = min(k, len(embeddings))
    best = indices = None
    for start in range(0, len(embeddings), chunk):
        rows, near = embeddings[start:start + chunk], None
        if half is not None and best is not None and best.shape[1] == k:
            # Query, row, product and limit are rounded, each by 2**-8 of itself at most; the .02 is
            # for sums in another order.
            limit = best[:, -1:] - 2**-8 * (2.02 * queries.norm(dim=1, keepdim=True) +
                                            2 * best[:, -1:].abs())
            rough = queries.bfloat16() @ half[start:start + chunk].T  # (B, chunk)
            near = ((rough - limit.bfloat16()).amax(0) > 0).nonzero()[:, 0]
            rows = rows[near]
        scores = queries @ rows.T  # (B, chunk), with half (B, near)
        top, where = scores.topk(min(k, scores.shape[1]), dim=1)
        where = (where if near is None else near[where]) + start
        if best is not None:
            top, where = torch.cat((best, top), 1), torch.cat((indices, where), 1)
            top, order = top.topk(min(k, top.shape[1]), dim=1)
            where = where.gather(1, order)
        best, indices = top, where
    return best, indices  # (B, k), (B, k) indices into the cache


def to_bfloat16(embeddings):
    """A copy of embeddings in bfloat16 and in memory, (N, dim), which search scans twice as fast
    where the processor computes in it; None where a row is longer than a unit vector, as search's
    bound would not hold."""
    half = torch.empty(len(embeddings), embeddings[:1].shape[1], dtype=torch.bfloat16)
    for start in range(0, len(half), BLOCK):
        rows = embeddings[start:start + BLOCK]
        if rows.norm(dim=1).max() > 1.002:
            return None
        half[start:start + BLOCK] = rows
    return half
