"""Cost of large caches with indexes and without. Artificial caches are written, indexed, searched
and deleted.

    python -m benchmarks.large --rows 1000000
    python -m benchmarks.large --rows 1000000 --caches 20 --folder /disk/with/30GB --keep

Embeddings are sums of three of 20,000 word vectors and a common direction, as CLIP's texts have:
the mean cosine of entries is 0.64, and variances along the axes fall as 1, 1/2, 1/3 ... Prints each
figure when it is measured, then a line of JSON. "From disk": the system's copy of the files in
memory is dropped first. "CPU s": the seconds on one thread of an idle machine. "Read again": the
indexes are not kept in memory, as where it has no room for them.
"""

import argparse
import json
import os
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import embedding_bag, normalize

from antarctic.cache import read_cache, search
from antarctic.cache_changes import write_cache
from antarctic.errors import InputError
from antarctic.flags import Renamed
from antarctic.index import open_indexes
from antarctic.index_build import build_index, made_queries
from antarctic.runtime import run
from benchmarks.measure import resident, seconds, timed

CPU, DIM, WORDS = torch.device("cpu"), 512, 20000


def parse():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000000,
                        help="entries of a cache, of 512 numbers each (default %(default)s)")
    parser.add_argument("--caches", type=int, default=1,
                        help="caches, each with an index (default %(default)s)")
    parser.add_argument("--emb_dtype", default="float16", choices=("float16", "float32"),
                        help="numbers on the disk (default %(default)s)")
    parser.add_argument("--dtype", action=Renamed, new="--emb_dtype", dest="emb_dtype",
                        choices=("float16", "float32"), default=argparse.SUPPRESS)
    parser.add_argument("--folder", help="folder with 1.1 kB of free space an entry (default: the "
                        "system's temporary folder)")
    parser.add_argument("--keep", action="store_true", help="take the caches and indexes that are "
                        "in --folder, and leave them there")
    parser.add_argument("--exact_repeats", type=int, default=3,
                        help="times that exact search is repeated (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    return parser.parse_args()


class Embeddings:
    """Unit rows, float32 (rows, DIM), computed when they are read. first: the number of the first,
    of those of all caches."""

    def __init__(self, rows, first=0):
        self.shape, self.first = (rows, DIM), first
        generator = torch.Generator().manual_seed(0)
        axes, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))
        words = torch.randn(WORDS, DIM - 1, generator=generator) * torch.arange(1, DIM) ** -0.5
        self.common, self.words = axes[0], words @ axes[1:]

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, part):
        start, stop, _ = part.indices(len(self))
        generator = torch.Generator().manual_seed(1 + self.first + start)
        drawn = torch.rand(stop - start, 3, generator=generator) ** 2  # some words are frequent
        own = normalize(embedding_bag((drawn * WORDS).long(), self.words, mode="sum"), dim=1)
        return (0.8 * self.common + 0.6 * own).numpy()


def drop(path):
    """Drops the system's copy of a file in memory, so that it is read from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Cache:
    """The files of one of the caches, number 0, 1, ..., each of other rows and entries."""

    def __init__(self, folder, number):
        self.number = number
        self.textfile, self.embfile, self.index = (
            Path(folder, f"{number}{suffix}") for suffix in (".txt", ".npy", ".faiss"))

    def write(self, args):
        begin = self.number * args.rows
        entries = [f"entry {i}" for i in range(begin, begin + args.rows)]
        write_cache(self.textfile, self.embfile, entries, Embeddings(args.rows, begin), "made", "",
                    args.emb_dtype)

    def build(self):
        build_index(self.index, self.textfile, self.embfile)


def build(caches, args, note):
    """Writes the caches and builds their indexes, but for those that are there."""
    for cache in caches:
        if not Path(f"{cache.embfile}.json").exists():
            cache.write(args)
        if not Path(f"{cache.index}.json").exists():
            start = time.process_time()
            took, peak = timed(cache.build, CPU)
            note("building an index, s", took)
            note("building an index, CPU s", time.process_time() - start)
            note("building an index, peak GB", peak / 1e3)
    note("embeddings, GB", sum(cache.embfile.stat().st_size for cache in caches) / 1e9)
    note("indexes, GB", sum(cache.index.stat().st_size for cache in caches) / 1e9)
    note("least recall at 10 of an index", min(
        json.loads(Path(f"{cache.index}.json").read_text())["recall"] for cache in caches))


def measure(caches, args, note):
    """Searches the caches through their indexes, kept in memory and read again, and exactly."""
    opened = []
    files = [[getattr(cache, kind) for cache in caches]
             for kind in ("textfile", "embfile", "index")]
    took, peak = timed(lambda: opened.extend(read_cache(*files[:2], "made")), CPU)
    note("opening the caches, s", took)
    note("opening the caches, peak GB", peak / 1e3)
    entries, embeddings = opened
    queries = made_queries(embeddings)[:64]
    took, peak = timed(lambda: opened.append(open_indexes(files[2], embeddings)), CPU)
    note("opening the indexes, s", took)
    note("opening the indexes, peak GB", peak / 1e3)
    indexes = opened[2]
    found = search_both(indexes, queries, embeddings, "indexes", files, note)
    for index in indexes.indexes:
        index.held = None
    search_both(indexes, queries, embeddings, "read again", files, note)
    exact = search_both(search, queries, embeddings, "exact", files, note, args.exact_repeats)
    note("recall at 10 of all", (found >= exact[:, -1:] - 1e-6).float().mean().item())
    note("memory at the end, GB", resident("VmRSS") / 1e9)


def search_both(find, queries, embeddings, name, files, note, repeats=3):
    """Notes the costs of searching one query and all of them. Returns the scores of all."""
    results = []

    def search_batch(batch):
        results.append(find(batch, embeddings, 10)[0])

    for batch in (queries[:1], queries):
        for path in files[1] + files[2]:
            drop(path)
        took, peak = timed(partial(search_batch, batch), CPU)
        note(f"{name}, {len(batch)} from disk, s", took)
        start = time.process_time()
        again = median(seconds(partial(search_batch, batch), CPU) for _ in range(repeats))
        note(f"{name}, {len(batch)} again, s", again)
        note(f"{name}, {len(batch)} again, CPU s", (time.process_time() - start) / repeats)
    note(f"{name}, peak GB", peak / 1e3)
    return results[-1]


def main():
    args = parse()
    if args.rows < 1000 or min(args.caches, args.threads, args.exact_repeats) < 1:
        raise InputError(f"--rows must be at least 1000, --caches, --threads and --exact_repeats "
                         f"1, not {args.rows}, {args.caches}, {args.threads} and "
                         f"{args.exact_repeats}")
    if args.keep and not args.folder:
        raise InputError("--keep needs a --folder")
    torch.set_num_threads(args.threads)
    figures = {"rows": args.rows, "caches": args.caches, "threads": args.threads,
               "emb_dtype": args.emb_dtype}

    def note(name, value):
        figures[name] = round(value, 4)
        print(f"{name:34}{value:14,.3f}", flush=True)

    temporary = tempfile.TemporaryDirectory(dir=args.folder)
    with nullcontext(args.folder) if args.keep else temporary as folder:
        caches = [Cache(folder, number) for number in range(args.caches)]
        build(caches, args, note)
        measure(caches, args, note)
    print(json.dumps(figures))


if __name__ == "__main__":
    run(main)
