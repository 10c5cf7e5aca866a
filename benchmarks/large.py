"""Cost of a large cache with an index and without. An artificial cache is written,
indexed, searched and deleted.

    python -m benchmarks.large --rows 1000000
    python -m benchmarks.large --rows 20000000 --folder /disk/with/30GB --threads 2

Embeddings are sums of three of 20,000 word vectors and a common direction, as CLIP's texts have:
the mean cosine of entries is 0.64, and variances along the axes fall as 1, 1/2, 1/3 ... Prints each
figure when it is measured, then a line of JSON. "From disk": the system's copy of the file in
memory is dropped first. "CPU s": the seconds on one thread of an idle machine.
"""

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import embedding_bag, normalize

from antarctic.cache import read_cache, search
from antarctic.cache_changes import write_cache
from antarctic.errors import InputError
from antarctic.index import build_index, made_queries, open_index
from antarctic.runtime import run
from benchmarks.measure import seconds, timed
from utils import Renamed

CPU, DIM, WORDS = torch.device("cpu"), 512, 20000


def parse():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000000,
                        help="entries, of 512 numbers each (default %(default)s)")
    parser.add_argument("--emb_dtype", default="float16", choices=("float16", "float32"),
                        help="numbers on the disk (default %(default)s)")
    parser.add_argument("--dtype", action=Renamed, new="--emb_dtype", dest="emb_dtype",
                        choices=("float16", "float32"), default=argparse.SUPPRESS)
    parser.add_argument("--folder", help="folder with 1.1 kB of free space a row (default: the "
                        "system's temporary folder)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    return parser.parse_args()


class Embeddings:
    """Unit rows, float32 (rows, DIM), computed when they are read."""

    def __init__(self, rows):
        self.shape = rows, DIM
        generator = torch.Generator().manual_seed(0)
        axes, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))
        words = torch.randn(WORDS, DIM - 1, generator=generator) * torch.arange(1, DIM) ** -0.5
        self.common, self.words = axes[0], words @ axes[1:]

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, part):
        start, stop, _ = part.indices(len(self))
        generator = torch.Generator().manual_seed(1 + start)
        drawn = torch.rand(stop - start, 3, generator=generator) ** 2  # some words are frequent
        own = normalize(embedding_bag((drawn * WORDS).long(), self.words, mode="sum"), dim=1)
        return (0.8 * self.common + 0.6 * own).numpy()


def drop(path):
    """Drops the system's copy of a file in memory, so that it is read from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main():
    args = parse()
    if args.rows < 1000 or args.threads < 1:
        raise InputError(f"--rows must be at least 1000 and --threads 1, not {args.rows} and "
                         f"{args.threads}")
    torch.set_num_threads(args.threads)
    figures = {"rows": args.rows, "threads": args.threads, "emb_dtype": args.emb_dtype}

    def note(name, value):
        figures[name] = round(value, 4)
        print(f"{name:32}{value:14,.3f}", flush=True)

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        textfile, embfile = Path(folder, "cache.txt"), Path(folder, "cache.npy")
        index = Path(folder, "cache.faiss")
        entries = [f"entry {i}" for i in range(args.rows)]
        write_cache(textfile, embfile, entries, Embeddings(args.rows), "made", "", args.emb_dtype)
        del entries
        note("embeddings, GB", embfile.stat().st_size / 1e9)
        start = time.process_time()
        took, peak = timed(lambda: note("recall at 10", build_index(index, textfile, embfile)), CPU)
        note("building the index, s", took)
        note("building the index, CPU s", time.process_time() - start)
        note("building the index, peak GB", peak / 1e3)
        note("index, GB", index.stat().st_size / 1e9)
        _, embeddings = read_cache([textfile], [embfile], "made")
        queries = made_queries(embeddings.parts[0])[:64]
        indexes = []
        took, peak = timed(lambda: indexes.append(open_index(index, embeddings)), CPU)
        note("opening the index, s", took)
        note("opening the index, peak GB", peak / 1e3)
        for name, find in (("index", indexes[0].search), ("exact", search)):
            for batch in (queries[:1], queries):
                search_batch = partial(find, batch, embeddings, 10)
                drop(embfile)
                took, peak = timed(search_batch, CPU)
                note(f"{name}, {len(batch)} from disk, s", took)
                start = time.process_time()
                again = median(seconds(search_batch, CPU) for _ in range(3))
                note(f"{name}, {len(batch)} again, s", again)
                note(f"{name}, {len(batch)} again, CPU s", (time.process_time() - start) / 3)
            note(f"{name}, peak GB", peak / 1e3)
    print(json.dumps(figures))


if __name__ == "__main__":
    run(main)
