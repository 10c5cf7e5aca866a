"""The cache: entries in a text file, their CLIP embeddings in an .npy file, and the search for the
entries nearest to an image."""

import io
from pathlib import Path
from tokenize import TokenError  # numpy raises it for a header that is cut in two

import numpy as np
import torch

from antarctic.cache_files import cache_description, existing_caches
from antarctic.distributed import warn
from antarctic.errors import InputError
from antarctic.files import file_sha256
from antarctic.texts import LONGEST_TEXT, read_text
from antarctic.words import warn_of_entries

BLOCK = 65536  # rows read or written at a time
HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0,
                  (2, 0): np.lib.format.read_array_header_2_0}


class Rows:
    """The rows of an .npy file, or some of them, read from the disk when needed.

    rows[a:b] maps only what it reads, so a cache may be larger than memory. It is a float32 tensor
    (b - a, dim), whatever floating-point type the file has. kept: ascending row numbers, or None
    for all rows. Raises InputError where the file is not such a table.
    """

    def __init__(self, path, kept=None):
        self.path, self.kept = path, kept
        (self.file_rows, self.dim), self.dtype, self.offset = read_npy_header(path)
        size = self.offset + self.file_rows * self.dim * self.dtype.itemsize
        if Path(path).stat().st_size < size:
            raise InputError(f"{path} is cut short, so it is not a .npy file of numbers any more")

    def __len__(self):
        return self.file_rows if self.kept is None else len(self.kept)

    def __getitem__(self, part):
        start, stop, _ = part.indices(len(self))
        if stop <= start or not self.dim:
            return torch.empty(max(0, stop - start), self.dim)
        begin, last = start, stop - 1  # rows of the file
        if self.kept is not None:
            begin, last = self.kept[begin], self.kept[last]
        offset = self.offset + begin * self.dim * self.dtype.itemsize
        rows = np.memmap(self.path, self.dtype, "c", offset, (last + 1 - begin, self.dim))
        if self.kept is not None:
            rows = rows[[row - begin for row in self.kept[start:stop]]]
        return torch.from_numpy(np.asarray(rows, np.float32))

    def only(self, rows):
        """Some of these rows, as Rows. rows: ascending numbers."""
        kept = list(rows) if self.kept is None else [self.kept[row] for row in rows]
        return Rows(self.path, kept)


def read_npy_header(path):
    """(shape, dtype, offset of the data in bytes) of an .npy file with a 2-D table of
    floating-point numbers. Raises InputError where the file is something else."""
    try:
        with open(path, "rb") as file:  # np.load would open archives, too
            # numpy writes headers of 128 bytes; its reader would accept gigabytes.
            header = io.BytesIO(file.read(512))
        version = np.lib.format.read_magic(header)
        shape, fortran_order, dtype = HEADER_READERS[version](header)
    except (ValueError, OSError, EOFError, KeyError, TokenError) as error:
        raise InputError(f"{path} is not a .npy file of numbers") from error
    is_table = len(shape) == 2 and shape[0] >= 0 and shape[1] >= 1
    if not is_table or fortran_order or not np.issubdtype(dtype, np.floating):
        raise InputError(f"{path} does not hold a table of real numbers, one row an entry")
    return shape, dtype, header.tell()


class Embeddings:
    """Rows and float32 tensors (n, dim), joined one after the other; search reads them like one
    tensor."""

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return sum(map(len, self.parts))

    def __getitem__(self, part):
        start, stop, _ = part.indices(len(self))
        pieces = []
        for rows in self.parts:
            if start < len(rows) and stop > 0:
                pieces.append(rows[max(0, start):stop])
            start, stop = start - len(rows), stop - len(rows)
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces or [torch.empty(0, self.parts[0].dim)])

    def only(self, rows):
        """Some of these rows, as Embeddings. rows: ascending numbers."""
        parts, begin = [], 0
        for part in self.parts:
            wanted = [row - begin for row in rows if begin <= row < begin + len(part)]
            parts.append(part[wanted] if torch.is_tensor(part) else part.only(wanted))
            begin += len(part)
        return Embeddings(parts)


# ---------------------------------------------------------------------------------------- reading

def read_cache(textfiles, embfiles, clip_model, dim=None):
    """Reads one or more caches as one. A repeated entry is kept once, at its first place.

    textfiles, embfiles: paths, in pairs. clip_model, dim: identity and width of the CLIP in use
    (Clip.identity, Clip.dim). Returns (entries, a list of N texts; their Embeddings, N unit rows).
    Raises InputError where a file is missing or empty, lengths differ, values are not finite, or a
    cache is of another CLIP model or another text.
    """
    entries, parts, seen = [], [], set()
    for textfile, embfile in existing_caches(textfiles, embfiles):
        lines, rows = read_one_cache(textfile, embfile, clip_model)
        if dim and rows.dim != dim:
            raise InputError(f"{embfile} has {rows.dim} dimensions, but the CLIP model "
                             f"{clip_model} has {dim}")
        if parts and rows.dim != parts[0].dim:
            raise InputError(f"{embfile} has {rows.dim} dimensions, but {embfiles[0]} has "
                             f"{parts[0].dim}: they are not of one CLIP model")
        fresh = []  # the lines that no line before them repeats
        for i, line in enumerate(lines):
            if line not in seen:
                seen.add(line)
                fresh.append(i)
        if len(fresh) < len(lines):
            rows, lines = rows.only(fresh), [lines[i] for i in fresh]
        entries += lines
        parts.append(rows)
    warn_of_entries(entries)
    return entries, Embeddings(parts)


def read_one_cache(textfile, embfile, clip_model):
    """One cache, checked: (lines, Rows). Raises InputError as read_cache does."""
    text = read_text(textfile, "cache text").replace("\r\n", "\n")
    lines = text.removesuffix("\n").split("\n") if text else []  # no other character ends an entry
    if not lines:
        raise InputError(f"the cache {textfile} is empty")
    longest = max(map(len, lines))
    if longest > LONGEST_TEXT:
        raise InputError(f"{textfile} has an entry of {longest:,} characters; {LONGEST_TEXT:,} are "
                         "read at most")
    rows = Rows(embfile)
    if len(lines) != len(rows):
        raise InputError(f"{textfile} has {len(lines)} entries, but {embfile} has {len(rows)} "
                         "rows: they are not the same cache (compute_cache.py --add adds entries, "
                         "and a text that was edited by hand no longer fits its rows)")
    description = cache_description(embfile)
    if description is None:
        warn(f"{embfile}.json is missing, so it is not checked that {embfile} was made with "
             f"{clip_model}")
    elif description["clip_model"] != clip_model:
        raise InputError(f"the cache {embfile} was made with the CLIP model "
                         f"{description['clip_model']}, not with {clip_model}")
    elif description["text_sha256"] != file_sha256(textfile):
        raise InputError(f"{textfile} is not the text that {embfile} was made from; compute the "
                         "cache again")
    if not all(rows[start:start + BLOCK].isfinite().all() for start in range(0, len(rows), BLOCK)):
        raise InputError(f"{embfile} holds values that are not finite; compute the cache again")
    return lines, rows


# ----------------------------------------------------------------------------------------- search

def search(queries, embeddings, k, chunk=8192, half=None):
    """The k nearest rows by inner product, best first.

    queries: (B, dim) float32. embeddings: a float32 tensor (N, dim), or Embeddings. Returns (scores
    (B, k), indices (B, k) int64), k <= N. Only B x chunk products exist at a time, so memory does
    not grow with N.

    half: to_bfloat16(embeddings), or None. It is scanned first, and float32 products are computed
    only of those rows of a chunk that may be among a query's k best, given the greatest error of
    bfloat16. The result is the same, except for ties.
    """
    k = min(k, len(embeddings))
    best = indices = None
    for start in range(0, len(embeddings), chunk):
        rows, near = embeddings[start:start + chunk], None
        if half is not None and best is not None and best.shape[1] == k:
            # Query, row, product and limit are each rounded by at most 2**-8 of their value. The
            # .02 allows for sums in another order.
            worst = best[:, -1:]  # (B, 1)
            norm = queries.norm(dim=1, keepdim=True)  # (B, 1)
            limit = worst - 2**-8 * (2.02 * norm + 2 * worst.abs())  # (B, 1)
            rough = queries.bfloat16() @ half[start:start + chunk].T  # (B, chunk)
            near = ((rough - limit.bfloat16()).amax(0) > 0).nonzero()[:, 0]  # (near,)
            rows = rows[near]
        scores = queries @ rows.T  # (B, chunk), with half (B, near)
        top, place = scores.topk(min(k, scores.shape[1]), dim=1)
        place = (place if near is None else near[place]) + start
        if best is not None:
            top, place = torch.cat((best, top), 1), torch.cat((indices, place), 1)
            top, order = top.topk(min(k, top.shape[1]), dim=1)
            place = place.gather(1, order)
        best, indices = top, place
    return best, indices  # (B, k), (B, k) indices into the cache


def to_bfloat16(embeddings):
    """A bfloat16 copy of embeddings (N, dim), in memory.

    search scans it twice as fast where the processor computes in bfloat16. Returns None where a row
    is longer than a unit vector, since search's error bound would not hold.
    """
    half = torch.empty(len(embeddings), embeddings[:1].shape[1], dtype=torch.bfloat16)
    for start in range(0, len(half), BLOCK):
        rows = embeddings[start:start + BLOCK]
        if rows.norm(dim=1).max() > 1.002:
            return None
        half[start:start + BLOCK] = rows
    return half
