"""An approximate index over a large cache: faiss's IVF-PQ proposes a shortlist, and exact cosines
rank it.

Method: Jegou et al. 2011, https://inria.hal.science/inria-00514462. The rows of a shortlist are
read from the cache, so scores are exact, and only the choice of candidates is approximate. Each
cache may have an index of its own; those without one are searched exactly.
"""

import hashlib
import io
import math
import os

import numpy as np
import torch

from antarctic.bounded import MOST_SETTINGS
from antarctic.cache import search
from antarctic.distributed import is_rank0, launched
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import existing_file
from antarctic.held import HeldFile
from antarctic.texts import read_json

PROBED = 4  # a query reads one in this many lists
SHORTLIST = 1000  # candidates of a query in an index, whose exact cosines are computed
ENTRY_BYTES, OTHER_BYTES = 256, 1 << 26  # of the largest index; one takes 72 to 84 an entry


def load_faiss():
    """faiss, with as many threads as torch. Raises InputError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise InputError("--index needs faiss, which is not installed here: "
                         "pip install faiss-cpu==1.15.1") from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


# ------------------------------------------------------------------------------------- searching

class Index:
    """A faiss index over the file of some Rows.

    held: the faiss index while it is in memory, else None; then every search reads it again. Lists
    that are packed for registers cannot be mapped by faiss, and a batch of queries reads nearly all
    of them.
    """

    def __init__(self, read, rows, path=None, description=None):
        """read: a function that returns the faiss index of all rows of the file. rows: the Rows to
        search, all or some. path, description: of its file, see index_description."""
        faiss = load_faiss()
        self.read, self.rows, self.held = read, rows, None
        self.path, self.description = path, description
        # With few rows left, the lists that a query reads may hold too few of them, so rows are
        # searched exactly.
        self.exact = 2 * len(rows) < rows.file_rows
        self.kept = self.selector = None
        if rows.kept is not None:
            self.kept, mask = np.array(rows.kept, np.int64), np.zeros(rows.file_rows, bool)
            mask[self.kept] = True
            self.selector = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))

    def shortlists(self, queries, count):
        """Rows of the file that faiss proposes for each query, int64 (B, count); -1: none."""
        faiss = load_faiss()
        index = self.read() if self.held is None else self.held
        probes = math.ceil(faiss.extract_index_ivf(index).nlist / PROBED)
        parameters = faiss.SearchParametersPreTransform(
            index_params=faiss.SearchParametersIVF(sel=self.selector, nprobe=probes))
        return index.search(queries.numpy(), count, params=parameters)[1]

    def nearest(self, queries, k):
        """The k nearest rows, approximately. Arguments and result as of cache.search."""
        k, results = min(k, len(self.rows)), []
        for query, numbers in zip(queries[:, None], self.shortlists(queries, max(k, SHORTLIST))):
            numbers = np.unique(numbers[(numbers >= 0) & (numbers < self.rows.file_rows)])
            if self.kept is not None:
                numbers = np.searchsorted(self.kept, numbers)
            if len(numbers) < k:  # the lists that were read are too short
                results.append(search(query, self.rows, k))
                continue
            scores, place = search(query, self.rows.only(numbers.tolist())[:], k)
            results.append((scores, torch.from_numpy(numbers)[place]))
        return tuple(map(torch.cat, zip(*results)))  # (B, k), (B, k)


class Indexes:
    """The indexes of some of the caches in an Embeddings. Called like cache.search, it returns what
    that does, except for entries that the shortlists miss.

    sha256: the digests of their files, sorted.
    """

    def __init__(self, indexes):
        self.indexes = [index for index in indexes if not index.exact]
        self.sha256 = sorted(index.description["index_sha256"] for index in indexes)

    def __call__(self, queries, embeddings, k):
        """The k nearest rows by inner product, best first; approximate among the rows of an index,
        exact among all others.

        queries: (B, dim) float32, on the CPU. embeddings: the Embeddings that the indexes were
        opened for, or more parts over them. Returns (scores (B, k), indices (B, k) int64).
        """
        results, begin = [], 0
        for part in embeddings.parts:
            if len(part):
                index = next((index for index in self.indexes if index.rows is part), None)
                scores, place = index.nearest(queries, k) if index else search(queries, part, k)
                results.append((scores, place + begin))
            begin += len(part)
        scores, place = (torch.cat(each, 1) for each in zip(*results))
        scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
        return scores, place.gather(1, order)  # (B, k), (B, k) indices into the cache


# --------------------------------------------------------------------------------------- reading

def index_description(path):
    """The description that build_index stored beside an index, a dict. Raises InputError where it
    is missing or something else, or where there is no index or no faiss."""
    load_faiss()
    path = existing_file(f"{existing_file(path, 'index')}.json", "description of the index")
    try:
        description = read_json(path, "description of the index", MOST_SETTINGS)
        return {"index_sha256": description["index_sha256"] + "",
                "cache": dict(description["cache"]), "recall": float(description["recall"]),
                "queries": description["queries"] + ""}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is not the description of an index; "
                         "rebuild the index") from error


def most_bytes(entries):
    """Bytes of the largest index of so many entries that is read."""
    return ENTRY_BYTES * entries + OTHER_BYTES


def parse(data):
    """The faiss index that bytes hold. Raises RuntimeError where they hold none. A hostile index
    can crash faiss, so only bytes whose digest is known may come here."""
    faiss = load_faiss()
    reader = faiss.PyCallbackIOReader(io.BytesIO(data).read)
    return faiss.read_index(faiss.BufferedIOReader(reader))  # thousands of lists, each read apart


def open_index(path, embeddings):
    """(the Index of one of the caches in embeddings, the size of its file in bytes).

    The file stays open, and faiss only gets the bytes that the description names by their digest,
    since a hostile file can crash it. This does not make a stranger's index safe: its description
    can be forged, too. Raises InputError where there is no index, it is damaged, or it is not of
    these caches as they are now.
    """
    faiss, description = load_faiss(), index_description(path)
    matches = (part for part in embeddings.parts
               if part.description and part.description.stated() == description["cache"])
    rows = next(matches, None)
    if rows is None:
        raise InputError(f"the index {path} is of another cache than --embfile, or of an older "
                         "version of it; rebuild it with compute_cache.py --index")
    file = HeldFile(path, "index")

    def read():
        data = file.read(most=most_bytes(rows.file_rows))
        if hashlib.sha256(data).hexdigest() != description["index_sha256"]:
            raise InputError(f"{path} is not the index that {path}.json describes; rebuild it with "
                             "compute_cache.py --index")
        try:
            return parse(data)
        except RuntimeError as error:
            raise InputError(f"{path} is not an index of faiss") from error

    index = Index(read, rows, path, description)
    index.held = held = read()
    if (type(held), held.d, held.ntotal) != (faiss.IndexPreTransform, rows.dim, rows.file_rows):
        raise InputError(f"{path} is not an index of the {rows.file_rows} rows of {rows.path}")
    return index, file.size


def memory_for_indexes():
    """Bytes of indexes that this process keeps in memory: a quarter of the machine's, shared with
    the run's other processes."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # the system does not say
        memory = 1 << 32
    return memory // 4 // launched()[1]


def open_indexes(paths, embeddings):
    """The Indexes of some of the caches in embeddings, in any order. Prints how these are searched.

    Those that memory_for_indexes has no room for are read again for each batch of queries. Raises
    InputError as open_index does, and where two indexes are of one cache.
    """
    indexes, left = [], memory_for_indexes()
    for path in paths:
        index, size = open_index(path, embeddings)
        for other in indexes:
            if other.rows is index.rows:
                raise InputError(f"{other.path} and {path} are both indexes of {index.rows.path}; "
                                 "give one of them")
        if index.exact or size > left:
            index.held = None
        else:
            left -= size
        indexes.append(index)
    if is_rank0():
        for line in summary(indexes, len(embeddings)):
            print_safely(escape_control(line))
    return Indexes(indexes)


def summary(indexes, entries):
    """Yields lines that say how caches with so many entries in all are searched."""
    used = [index for index in indexes if not index.exact]
    unused = [index for index in indexes if index.exact]
    if unused:
        caches, names = (", ".join(str(path) for path in paths) for paths in zip(
            *((index.rows.path, index.path) for index in unused)))
        yield f"{caches}: less than half of the entries remain and are searched exactly, not " \
              f"through {names}"
    if used:
        worst = min(used, key=lambda index: index.description["recall"])
        through = f"{worst.path}, which found"
        if len(used) > 1:
            through = f"{len(used)} indexes, each of which found at least"
        again = sum(index.held is None for index in used)
        yield (f"approximate: {sum(len(index.rows) for index in used):,} of {entries:,} entries "
               f"are searched through {through} {worst.description['recall']:.1%} of the 10 "
               f"nearest entries of {worst.description['queries']} when it was built"
               + f" ({again} are read again for each batch: memory is short)" * bool(again))
