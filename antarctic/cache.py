"""The cache: entries in a text file, their CLIP embeddings in an .npy file, and the search for the
entries nearest to an image."""

import hashlib
import random

import torch

from antarctic.bounded import MOST_TEXT
from antarctic.cache_files import existing_caches, open_cache, read_description
from antarctic.distributed import gather_lists, warn
from antarctic.errors import InputError, counted, escape_control, print_safely
from antarctic.files import fingerprint
from antarctic.peers import peer_sockets
from antarctic.rows import DIGEST_ROWS, Embeddings, Rows
from antarctic.texts import LONGEST_TEXT, split_lines
from antarctic.words import warn_of_entries

BLOCK = 16384  # rows read or written at a time
NAMED = 10  # damaged blocks in a message
SAMPLE = 4  # blocks whose digests are checked when a cache is opened
FEW = 64  # queries, for which reading takes longer than arithmetic
CHUNK_NUMBERS = 1 << 19  # of a chunk that is searched for them: 2 MB stay in a processor's cache


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
    embeddings = Embeddings(parts)
    if peer_sockets:  # the processes of a run of ours, not of a program that uses the library
        require_one_cache(entries, embeddings)
    return entries, embeddings


def read_one_cache(textfile, embfile, clip_model, whole=False):
    """One cache, checked: (lines, Rows). whole: all digests are checked, not those of a sample:
    what is copied gets new ones. Raises InputError as read_cache does."""
    lines, rows = open_checked(textfile, embfile)
    description = rows.description
    if description is None:
        warn(f"{embfile}.json is missing, so it is not checked that {embfile} was made with "
             f"{clip_model}")
    elif description.clip_model != clip_model:
        raise InputError(f"the cache {embfile} was made with the CLIP model "
                         f"{description.clip_model}, not with {clip_model}")
    digests = description and description.digests  # only finite rows are written with them
    if digests:
        blocks = rows.blocks()
        if len(blocks) > 2 * SAMPLE and not whole:
            # The ends differ where entries were added or removed.
            some = random.Random().sample(blocks[1:-1], SAMPLE - 2)  # others each time
            blocks = [blocks[0], *some, blocks[-1]]
        if damaged := rows.damaged(blocks):
            raise InputError(f"{embfile} is damaged: {name_rows(damaged[0], lines)} are not what "
                             "was written; --check of compute_cache.py names all that are, and "
                             "the cache must be computed again")
    elif next(not_finite(rows), None) is not None:
        raise InputError(f"{embfile} holds values that are not finite; compute the cache again")
    return lines, rows


def open_checked(textfile, embfile):
    """The lines and the Rows of a cache, whose text is the one that the rows are of. Raises
    InputError."""
    held = open_cache(textfile, embfile)
    if held.text.size > MOST_TEXT:
        raise InputError(f"the cache text {textfile} has {held.text.size:,} bytes; {MOST_TEXT:,} "
                         "are read at most")
    data = held.text.read()
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"the cache text {textfile} is not UTF-8 text") from error
    # No other character ends an entry.
    lines = split_lines(text.removesuffix("\n"), textfile) if text else []
    if not lines:
        raise InputError(f"the cache {textfile} is empty")
    longest = max(map(len, lines))
    if longest > LONGEST_TEXT:
        raise InputError(f"{textfile} has an entry of {longest:,} characters; {LONGEST_TEXT:,} are "
                         "read at most")
    description = read_description(held.description)
    rows = Rows(embfile, None, held.embeddings, description)
    if len(lines) != len(rows):
        raise InputError(f"{textfile} has {len(lines)} entries, but {embfile} has {len(rows)} "
                         "rows: they are not the same cache (compute_cache.py --add adds entries, "
                         "and a text that was edited by hand no longer fits its rows)")
    if description and description.text_sha256 != hashlib.sha256(data).hexdigest():
        raise InputError(f"{textfile} is not the text that {embfile} was made from; compute the "
                         "cache again")
    return lines, rows


def not_finite(rows):
    """Yields the numbers of the rows that hold a value that is not finite."""
    for start in range(0, len(rows), DIGEST_ROWS):
        finite = rows[start:start + DIGEST_ROWS].isfinite().all(1)
        yield from (start + (~finite).nonzero()[:, 0]).tolist()


def name_rows(block, lines):
    """A range of rows as a message names it: by the lines of the text, from 1, and entries."""
    first, last = (f"{row + 1:,} ({lines[row][:40]!r})" for row in (block[0], block[-1]))
    return f"rows {first} to {last}" if len(block) > 1 else f"row {first}"


def check_cache(textfile, embfile):
    """Reads a whole cache and prints that it is as it was written. Raises InputError where it is
    not, with the rows that are damaged."""
    lines, rows = open_checked(textfile, embfile)
    damaged = []
    if digests := rows.description and rows.description.digests:
        for block in rows.damaged(rows.blocks()):
            if damaged and damaged[-1].stop == block.start:
                block = range(damaged.pop().start, block.stop)
            damaged.append(block)
    bad = [range(row, row + 1) for row in not_finite(rows)]
    for blocks, what in ((damaged, "are not what was written"), (bad, "are not finite")):
        if blocks:
            names = "; ".join(name_rows(block, lines) for block in blocks[:NAMED])
            more = f"; and {len(blocks) - NAMED:,} more" if len(blocks) > NAMED else ""
            raise InputError(f"{embfile} is damaged: {names}{more} {what}; compute the cache again")
    checked = ("each is what was written" if digests else
               "all values are finite; the cache has no digests to check them against")
    print_safely(escape_control(f"{textfile} and {embfile} fit each other; "
                                f"{counted(len(rows), 'row')}: {checked}"))


def require_one_cache(entries, embeddings):
    """Raises InputError where the processes of this run have opened different states of a cache,
    since another run replaced it between. All processes call this."""
    ends = [rows.digest(block) for rows in embeddings.files()
            for block in (*rows.blocks()[:1], *rows.blocks()[-1:])]
    if len(set(gather_lists([fingerprint([entries, ends])]))) > 1:
        raise InputError("the cache was replaced while the processes of this run opened it; rerun "
                         "the same command")


# ----------------------------------------------------------------------------------------- search

def search(queries, embeddings, k, chunk=None, half=None):
    """The k nearest rows by inner product, best first.

    queries: (B, dim) float32. embeddings: a float32 tensor (N, dim), or Embeddings. Returns (scores
    (B, k), indices (B, k) int64), k <= N. Only B x chunk products exist at a time, so memory does
    not grow with N. chunk: rows that are read at a time (default: 8192, for FEW queries 2 MB).
    Raises InputError where one of the scores is not finite.

    half: to_bfloat16(embeddings), or None. It is scanned first, and float32 products are computed
    only of those rows of a chunk that may be among a query's k best, given the greatest error of
    bfloat16. The result is the same, except for ties.
    """
    k = min(k, len(embeddings))
    if chunk is None:
        chunk = 8192
        if len(queries) <= FEW:  # a power of two, which leaves matrix products no odd rows
            chunk = min(chunk, 1 << (CHUNK_NUMBERS // queries.shape[1] | 1).bit_length() - 1)
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
        if best is not None and best.shape[1] == k and (scores < best[:, -1:]).all():
            continue  # which NaN is not
        top, place = scores.topk(min(k, scores.shape[1]), dim=1)
        place = (place if near is None else near[place]) + start
        if best is not None:
            top, place = torch.cat((best, top), 1), torch.cat((indices, place), 1)
            top, order = top.topk(min(k, top.shape[1]), dim=1)
            place = place.gather(1, order)
        best, indices = top, place
    if best is not None and not best.isfinite().all():  # topk takes NaN for the greatest
        raise InputError("a score is not finite: a cache was damaged after it was written, and "
                         "compute_cache.py --check tells which, or the CLIP model is at fault")
    return best, indices  # (B, k), (B, k) indices into the cache


def to_bfloat16(embeddings):
    """A bfloat16 copy of embeddings (N, dim), in memory.

    search scans it twice as fast where the processor computes in bfloat16. Returns None where a row
    is longer than a unit vector, since search's error bound would not hold.
    """
    half = torch.empty(len(embeddings), embeddings[:1].shape[1], dtype=torch.bfloat16)
    for start in range(0, len(half), BLOCK):
        rows = embeddings[start:start + BLOCK]
        if not rows.norm(dim=1).max() <= 1.002:  # nor NaN
            return None
        half[start:start + BLOCK] = rows
    return half
