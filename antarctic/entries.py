"""CLIP's vectors of a new cache's entries: encoded once, kept in a file of sealed chunks so that a
stopped run resumes."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from antarctic.cache_changes import require_finite
from antarctic.cache_files import hold
from antarctic.distributed import gather_lists, on_rank0, rank_and_world, warn
from antarctic.errors import InputError
from antarctic.files import append, own_file, writing
from antarctic.sealed import DIGITS, checksum

CHUNK = 2048  # texts that a process encodes between two writes


class Part:
    """The vectors of `count` entries, in a file that grows by chunks: of each CHUNK entries float32
    (CHUNK, dim) and the checksum of these bytes with the number of the first entry.

    part[a:b] is an array (b - a, dim) whose chunks have been compared with their checksums. Raises
    InputError where one does not fit, or the file cannot be read.
    """

    def __init__(self, path, count, dim):
        self.path, self.count, self.dim, self.file = Path(path), count, dim, None

    def __len__(self):
        return self.count

    def __getitem__(self, part):
        start, stop, _ = part.indices(self.count)
        self.file = self.file or hold(self.path, self.path)
        chunks = []
        for first in range(start // CHUNK * CHUNK, stop, CHUNK):
            rows = self.chunk(self.file, first)
            if rows is None:
                raise InputError(f"{self.path} was damaged after it was written; rerun the same "
                                 "command to encode the rest again")
            chunks.append(rows[max(0, start - first):stop - first])
        return np.concatenate(chunks or [np.empty((0, self.dim), np.float32)])

    def span(self, first):
        """Where the chunk that begins with the entry `first` begins and ends, in bytes."""
        begin = first * self.dim * 4 + first // CHUNK * DIGITS
        return begin, begin + min(CHUNK, self.count - first) * self.dim * 4 + DIGITS

    def chunk(self, file, first):
        """One chunk of a HeldFile, float32 (CHUNK, dim); None where it is not whole."""
        begin, end = self.span(first)
        data = file.read(end - begin, begin) if end <= file.size else b""
        if seal(data[:-DIGITS], first) != data:
            return None
        return np.frombuffer(data[:-DIGITS], np.float32).reshape(-1, self.dim)

    def resume(self):
        """Cuts the file off behind its leading whole chunks. Returns how many entries they hold.
        Warns where it holds a chunk that is damaged."""
        if self.path.is_symlink():  # whoever made it: what it leads to is not cut off
            self.path.unlink()
        file, done = hold(self.path, self.path), 0
        if file is None:
            return 0
        while done < self.count and self.chunk(file, done) is not None:
            done = min(done + CHUNK, self.count)
        if done < self.count:
            begin, end = self.span(done)
            if file.size >= end:  # a kill leaves a part of a chunk at most
                warn(f"{self.path}, which a stopped run left, is damaged from entry {done + 1:,} "
                     "on; these are encoded again")
            with writing(self.path), open(self.path, "rb+", opener=own_file) as part:
                part.truncate(begin)
        return done

    def append(self, first, blocks):
        """Adds chunks: arrays float32 (CHUNK, dim), the first of which begins with that entry."""
        firsts = range(first, self.count, CHUNK)
        append(self.path, b"".join(map(seal, (rows.tobytes() for rows in blocks), firsts)))


def seal(data, first):
    """The bytes of a chunk with their checksum behind them. first: the number of its first entry,
    so that a chunk counts only in its place."""
    return data + checksum(b"%d " % first + data)


def text_features(clip, texts, part, batch_size):
    """CLIP's vectors of texts. All processes call this and share the work.

    On rank 0 it returns a Part (len(texts), dim), in the file part. A killed run resumes behind its
    last whole chunk, so the name of part must depend on everything that determines the vectors.
    batch_size: texts at a time, per process. Raises InputError where a vector is not finite.
    """
    rank, world = rank_and_world()
    part = Part(part, len(texts), clip.dim)
    done = on_rank0(part.resume)
    with tqdm(total=len(texts), initial=done, desc="encoding entries", unit="entry",
              disable=rank > 0) as bar:
        for start in range(done, len(texts), CHUNK * world):
            chunk = texts[start + rank * CHUNK:start + (rank + 1) * CHUNK]
            rows = gather_lists([clip.encode_texts(chunk, batch_size).numpy()])  # (CHUNK, dim) each
            if rank == 0:
                require_finite(np.concatenate(rows), texts[start:start + CHUNK * world])
                part.append(start, rows)
            bar.update(sum(map(len, rows)))
    return part if rank == 0 else None
