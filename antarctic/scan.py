"""A large cache in memory, where one image's entries are found at the speed of memory."""

import numpy as np
import torch

from antarctic.cache import search
from antarctic.distributed import is_rank0
from antarctic.errors import InputError, print_safely
from antarctic.index import load_faiss, memory_for_indexes

BLOCK = 1 << 15  # rows of a faiss index; of more, their float32 numbers would take memory
LEAST = 1 << 16  # rows that are worth it
LONGEST = 1.002  # of a row: they are unit vectors
# Of a product of unit vectors. float16 rounds a number by at most 2**-11 of its value; the rest
# allows for numbers below its range, for LONGEST, and for sums in another order.
ERROR = 1.2 * 2 ** -11


class Scan:
    """A copy of embeddings in float16, 2 bytes a number. Called like cache.search, it returns what
    that does, except for ties: faiss scans the copy for one query, and float32 products are
    computed of those rows of the cache that may be among the best, given the greatest error of
    float16.

    embeddings: an Embeddings whose rows are unit vectors. Raises InputError where they are none, or
    faiss is not installed.
    """

    def __init__(self, embeddings):
        faiss = load_faiss()
        self.blocks, self.covered = [], len(embeddings)
        for start in range(0, self.covered, BLOCK):
            rows = embeddings[start:start + BLOCK]
            if not rows.norm(dim=1).max() <= LONGEST:  # nor NaN
                raise InputError("the rows of the cache are no unit vectors")
            block = faiss.IndexScalarQuantizer(rows.shape[1], faiss.ScalarQuantizer.QT_fp16,
                                               faiss.METRIC_INNER_PRODUCT)
            block.add(rows.numpy())
            self.blocks.append(block)

    def __call__(self, queries, embeddings, k):
        """The k nearest rows, best first. embeddings: those of the copy, or more parts over them.
        Arguments and result as of cache.search."""
        near = self.near(queries, k) if len(queries) == 1 else None
        if near is None:
            return search(queries, embeddings, k)
        rows = np.concatenate((near, np.arange(self.covered, len(embeddings))))
        scores, place = search(queries, embeddings.only(rows), k)
        return scores, torch.from_numpy(rows)[place]

    def near(self, query, k):
        """The rows of the copy that may be among the k nearest, ascending, an int64 array. None
        where they are too many. query: float32 (1, dim)."""
        query, count = query.numpy(), 2 * k + 30
        scores, rows, last = [], [], -np.inf  # last: no row that faiss leaves out scores higher
        for number, block in enumerate(self.blocks):
            best, places = block.search(query, min(count, block.ntotal))
            scores.append(best[0])
            rows.append(places[0] + number * BLOCK)
            if block.ntotal > count:
                last = max(last, best[0, -1])
        scores, rows = np.concatenate(scores), np.concatenate(rows)
        k = min(k, len(scores))
        # The k best of the scan score at least as much in float32 but for the error; another row
        # that scores so much there, at least as much in the scan but for the error again.
        least = np.partition(scores, -k)[-k] - 2 * ERROR * np.linalg.norm(query)
        return np.sort(rows[scores >= least]) if last < least else None


def kept_in_memory(embeddings):
    """A Scan of embeddings, or cache.search where they are few, memory or faiss is missing, or they
    are no unit vectors."""
    size = 2 * len(embeddings) * embeddings[:1].shape[1]
    if len(embeddings) < LEAST or size > memory_for_indexes():
        return search
    try:
        scan = Scan(embeddings)
    except InputError:
        return search
    if is_rank0():
        print_safely(f"the cache is kept in memory: {size / 1e9:.2f} GB")
    return scan
