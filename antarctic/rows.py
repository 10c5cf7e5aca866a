"""Vectors in an .npy file that is held open, read from the disk block by block."""

import hashlib
import io
from tokenize import TokenError  # numpy raises it for a header that is cut in two

import numpy as np
import torch

from antarctic.cache_files import hold
from antarctic.errors import InputError

DIGEST_ROWS = 1024  # rows under one digest
DIGITS = 16  # hexadecimal, of each digest
HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0,
                  (2, 0): np.lib.format.read_array_header_2_0}


class Rows:
    """The rows of an .npy file, or some of them, read from the disk when needed.

    rows[a:b] reads no others, so a cache may be larger than memory. It is a float32 tensor
    (b - a, dim), whatever floating-point type the file has. The file stays open: the rows remain
    those that it held, and InputError is raised once it is changed in place. kept: ascending row
    numbers, or None for all rows. file: a HeldFile; path, which messages name, is opened without
    one. description: the cache's Description, or None. Raises InputError where the file is not
    such a table.
    """

    def __init__(self, path, kept=None, file=None, description=None):
        self.path, self.kept, self.description = path, kept, description
        self.file = file or hold(path, path)
        if self.file is None:
            raise InputError(f"there is no .npy file at {path}")
        (self.file_rows, self.dim), self.dtype, self.offset = read_npy_header(self.file)
        self.row_bytes = self.dim * self.dtype.itemsize
        self.end = self.offset + self.file_rows * self.row_bytes
        if self.file.size < self.end:
            raise InputError(f"{path} is cut short, so it is not a .npy file of numbers any more")

    def __len__(self):
        return self.file_rows if self.kept is None else len(self.kept)

    def __getitem__(self, part):
        start, stop, _ = part.indices(len(self))
        if stop <= start or not self.dim:
            return torch.empty(max(0, stop - start), self.dim)
        if self.kept is None:
            data = self.read(start, stop)
        else:
            data = self.read_some(self.kept[start:stop])
        self.file.check()
        rows = data.view(self.dtype).reshape(-1, self.dim)
        return torch.from_numpy(rows.astype(np.float32, copy=False))

    def read(self, begin, end):
        """The bytes of the rows begin .. end - 1 of the file, an array of uint8."""
        data = np.empty((end - begin) * self.row_bytes, np.uint8)
        self.file.fill(memoryview(data), self.offset + begin * self.row_bytes)
        return data

    def read_some(self, numbers):
        """The bytes of these rows of the file, an array of uint8. numbers: ascending."""
        begin, end = int(numbers[0]), int(numbers[-1]) + 1
        if end - begin <= 4 * len(numbers):
            return self.read(begin, end).reshape(-1, self.row_bytes)[numbers - begin].ravel()
        offsets = (self.offset + numbers * self.row_bytes).tolist()
        return np.frombuffer(self.file.gather(offsets, self.row_bytes), np.uint8)

    def only(self, rows):
        """Some of these rows, as Rows. rows: ascending numbers."""
        kept = np.asarray(rows, np.int64)
        kept = kept if self.kept is None else self.kept[kept]
        return Rows(self.path, kept, self.file, self.description)

    def blocks(self):
        """The parts of the file that have a digest each, as ranges of rows."""
        return [range(start, min(start + DIGEST_ROWS, self.file_rows))
                for start in range(0, self.file_rows, DIGEST_ROWS)]

    def digest(self, block):
        """The digest of one of blocks()."""
        header = self.file.read(self.offset) if block.start == 0 else b""
        digest = digest_of(header, self.read(block.start, block.stop))
        self.file.check()
        return digest

    def damaged(self, blocks):
        """Those of the blocks() that are not what write_cache wrote, by the description's digests.
        Raises InputError where these are not of so many rows."""
        digests = self.description.digests
        if len(digests) != DIGITS * len(self.blocks()) or self.file.size != self.end:
            raise InputError(f"{self.path} is not the file that {self.path}.json describes: it has "
                             f"{self.file.size:,} bytes, with {self.file_rows:,} rows; compute the "
                             "cache again")
        places = [block.start // DIGEST_ROWS * DIGITS for block in blocks]
        return [block for block, place in zip(blocks, places)
                if self.digest(block) != digests[place:place + DIGITS]]


def digest_of(header, rows):
    """The digest of a block of rows, bytes: the first DIGITS hexadecimal digits of their SHA-256.
    header: what precedes the first block, b"" for the others."""
    digest = hashlib.sha256(header)
    digest.update(rows)
    return digest.hexdigest()[:DIGITS]


def read_npy_header(file):
    """(shape, dtype, offset of the data in bytes) of an .npy file with a 2-D table of
    floating-point numbers. file: a HeldFile. Raises InputError where it is something else."""
    try:
        # numpy writes headers of 128 bytes; its reader would accept gigabytes. np.load would open
        # archives, too.
        header = io.BytesIO(file.read(512))
        version = np.lib.format.read_magic(header)
        shape, fortran_order, dtype = HEADER_READERS[version](header)
    except (ValueError, OSError, EOFError, KeyError, TokenError) as error:
        raise InputError(f"the {file.title} is not a .npy file of numbers") from error
    is_table = len(shape) == 2 and shape[0] >= 0 and shape[1] >= 1
    if not is_table or fortran_order or not np.issubdtype(dtype, np.floating):
        raise InputError(f"the {file.title} does not hold a table of real numbers, one row an "
                         "entry")
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
        rows, parts, begin = np.asarray(rows, np.int64), [], 0
        for part in self.parts:
            wanted = rows[(rows >= begin) & (rows < begin + len(part))] - begin
            parts.append(part[wanted] if torch.is_tensor(part) else part.only(wanted))
            begin += len(part)
        return Embeddings(parts)

    def files(self):
        """The Rows among the parts."""
        return [part for part in self.parts if isinstance(part, Rows)]
