"""The files that keep images' vectors: rows with a checksum each, written in shards, joined at the
end."""

import hashlib
import json
from functools import partial

import numpy as np
import torch
from safetensors.torch import save

from antarctic.distributed import warn
from antarctic.errors import counted
from antarctic.files import atomic, fingerprint, reason_of, remove
from antarctic.reads import persistent

STATUS, DIGEST, SEAL = 8, 32, 8  # bytes of an image's key, see key_of
KEY = STATUS + DIGEST + SEAL
LONGEST_HEADER = 1 << 16  # bytes; ours have 150
BLOCK = 4096  # rows that are read at a time


class Store:
    """The vectors of n images, and the files of a folder that they come from and go to.

    encoder: a fingerprint of all but the image that decides a vector. statuses: n times what
    changes with an image's file, 16 hexadecimal digits, or None. Warns of files and rows that are
    damaged; the images of these are not known.
    """

    def __init__(self, folder, encoder, statuses, dim):
        self.folder, self.prefix, self.statuses = folder, f"features-{encoder}-", statuses
        self.vectors = np.empty((len(statuses), dim), np.float32)
        self.digests, self.complete = [None] * len(statuses), True
        self.vector_of, self.files = {}, {}  # {digest: vector}, {path: set of digests}
        row_of = {status: row for row, status in enumerate(statuses) if status}
        paths, warnings = sorted(folder.glob(f"{self.prefix}*")), {}
        for path in paths:
            tell = partial(warnings.__setitem__, path)
            for status, digest, vector in whole_rows(path, dim, row_of, tell):
                self.vectors[row_of[status]], self.digests[row_of[status]] = vector, digest
                self.complete &= path.suffix != ".part"
        for row, status in enumerate(statuses):
            if status and row_of[status] != row:  # one file that is listed twice
                self.vectors[row] = self.vectors[row_of[status]]
                self.digests[row] = self.digests[row_of[status]]
        if None in self.digests or not self.complete:
            # Images that were moved or copied are known by their content.
            for path in paths:
                rows = list(whole_rows(path, dim, tell=partial(warnings.__setitem__, path)))
                self.files[path] = {digest for _, digest, _ in rows}
                self.vector_of |= {digest: vector for _, digest, vector in rows}
        for text in warnings.values():
            warn(text)

    def missing(self):
        """(the rows without a vector; the digests of all vectors; whether all that there is of the
        n images is in finished files)."""
        rows = [row for row, digest in enumerate(self.digests) if not digest]
        return rows, set(self.vector_of), self.complete

    def put(self, row, digest):
        self.vectors[row], self.digests[row] = self.vector_of[digest], digest

    def add(self, rows, digests, vectors):
        """Takes what encode_files returns of some rows, and writes it to a file of its own."""
        for row, digest in zip(rows, digests):
            if digest in vectors and digest not in self.vector_of:
                self.vectors[row] = vectors[digest]
                self.vector_of[digest] = self.vectors[row]
            if digest:
                self.put(row, digest)
        rows = [row for row, digest in zip(rows, digests) if digest]
        if rows:
            self.write(rows, ".part")
            self.complete = False

    def write(self, rows, suffix):
        """Writes some rows to a file, which their keys name. Returns its path."""
        keys = [(self.statuses[row], self.digests[row]) for row in rows]
        name = fingerprint([(status, digest.hex()) for status, digest in keys])
        path = self.folder / f"{self.prefix}{name}{suffix}"
        write_features(path, torch.from_numpy(self.vectors[rows]), keys)
        self.files[path] = {digest for _, digest in keys}
        return path

    def finish(self):
        """Writes one file of all rows, where there is none yet, and removes files that hold nothing
        else. Returns (vectors, float32 (m, dim), of the rows that have one; n digests, or None)."""
        rows = [row for row, digest in enumerate(self.digests) if digest]
        if not self.complete:
            path = self.write(rows, ".safetensors")
            remove(*(other for other, digests in self.files.items()
                     if other != path and digests and digests <= self.files[path]))
        vectors = self.vectors[rows] if None in self.digests else self.vectors
        return torch.from_numpy(vectors), self.digests


# ------------------------------------------------------------------------------------------- files

def key_of(status, digest, vector):
    """An image's key in a features file, KEY bytes: the status of its file, its digest, and a
    checksum of its vector. status: 16 hexadecimal digits, or None. vector: a row of floats."""
    key = bytes.fromhex(status or "00" * STATUS) + digest
    seal = hashlib.sha256(key)
    seal.update(vector)
    return key + seal.digest()[:SEAL]


def write_features(path, vectors, keys):
    """vectors: float32 (n, dim). keys: n pairs (status of the file or None, digest)."""
    rows = b"".join(key_of(*key, vector) for key, vector in zip(keys, vectors.numpy()))
    keys = torch.frombuffer(bytearray(rows), dtype=torch.uint8).view(-1, KEY) if rows else \
        torch.empty(0, KEY, dtype=torch.uint8)
    with atomic(path, "wb") as file:
        file.write(save({"features": vectors, "keys": keys}))


def whole_rows(path, dim, wanted=None, tell=warn):
    """Yields what read_features does, without damaged rows, and nothing where the file cannot be
    read. tell: a function that gets a sentence on either."""
    if not path.is_file():  # opening a pipe waits for its writer
        return
    damaged = 0
    try:
        for status, digest, vector in read_features(path, dim, wanted):
            if vector is not None:
                yield status, digest, vector
            damaged += vector is None
    except (OSError, ValueError) as error:
        tell(f"the image vectors in {path} cannot be read ({reason_of(error)}); those that are "
             "needed are encoded again")
    if damaged:
        tell(f"{counted(damaged, 'image vector')} in {path} {'is' if damaged == 1 else 'are'} "
             "damaged; those that are needed are encoded again")


def read_features(path, dim, wanted=None):
    """Yields what write_features wrote, read in blocks: (status, digest, vector), and None in place
    of a vector that is damaged.

    wanted: the statuses of the rows to read (default: all rows). Raises OSError where the file
    cannot be read, and ValueError where it is none of features of dim dimensions.
    """
    with open(path, "rb") as file:
        n, vectors_at, keys_at = read_header(file, dim)
        for start in range(0, n, BLOCK):
            size = min(BLOCK, n - start)
            keys = read_at(file, keys_at + start * KEY, size * KEY)
            keys = [keys[at:at + KEY] for at in range(0, len(keys), KEY)]
            rows = [i for i in range(size) if wanted is None or keys[i][:STATUS].hex() in wanted]
            if not rows:
                continue
            vectors = read_at(file, vectors_at + start * dim * 4, size * dim * 4)
            vectors = np.frombuffer(vectors, "<f4").reshape(size, dim)
            finite = np.isfinite(vectors).all(1)
            for i in rows:
                status, digest = keys[i][:STATUS].hex(), keys[i][STATUS:-SEAL]
                whole = finite[i] and key_of(status, digest, vectors[i]) == keys[i]
                yield status, digest, vectors[i] if whole else None


def read_header(file, dim):
    """(rows, where the vectors begin, where the keys do) of an open features file. Not safetensors'
    own reader: it maps the file, and an error of the disk ends the process then."""
    length = int.from_bytes(read_at(file, 0, 8), "little")
    if length > LONGEST_HEADER:
        raise ValueError("its header is too long")
    try:
        header = json.loads(read_at(file, 8, length))
        vectors, keys = header["features"], header["keys"]
        n = keys["shape"][0]
        right = (type(n) is int and n >= 0
                 and (keys["dtype"], keys["shape"]) == ("U8", [n, KEY])
                 and (vectors["dtype"], vectors["shape"]) == ("F32", [n, dim]))
        begins = [tensor["data_offsets"][0] for tensor in (vectors, keys)]
        if not right or any(type(at) is not int or not 0 <= at < 1 << 60 for at in begins):
            raise ValueError("its header does not describe such a table")
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError("its header does not describe such a table") from error
    return n, *(8 + length + at for at in begins)


def read_at(file, place, size):
    """So many bytes of an open file. Raises ValueError where it ends before."""
    def read():
        file.seek(place)
        return file.read(size)

    data = persistent(read)
    if len(data) < size:
        raise ValueError("it is cut off")
    return data
