"""Measures how often the entries of a cache say the same in other words.

    python -m snowglobe.redundancy --captions demo/world coco/annotations/captions_train2017.json
    python -m snowglobe.redundancy --captions coco --entries 50000 --textfile original/cache.txt

A cache is of the most frequent runs of one to four words of some captions, or a file. Entries are
neighbours where the content words that both hold are at least half of those that either holds
(see antarctic/evidence.py). What has no content word ("on the") is counted, and otherwise left out.
"""

import argparse
from collections import defaultdict

import numpy as np

from antarctic.errors import InputError, print_safely
from antarctic.evidence import content
from antarctic.pairs import read_training_captions
from antarctic.runtime import run
from antarctic.texts import read_lines
from snowglobe.choices import ngrams

LIKE = 0.5  # the least overlap of neighbours
NEAREST = 10  # as many as a table holds
AT_LEAST = 1, 5, 10  # neighbours


def neighbours(sets):
    """Yields, for each set, the others that share an element with it: (their places, their overlaps
    by Jaccard, whether each holds nothing beyond it), arrays of which the most alike stand first,
    and of those the first. sets: a list of sets, none of them empty."""
    places, sizes = defaultdict(list), np.array(list(map(len, sets)))
    for place, elements in enumerate(sets):
        for element in elements:
            places[element].append(place)
    places = {element: np.array(rows) for element, rows in places.items()}
    for own, elements in enumerate(sets):
        rows, shared = np.unique(np.concatenate([places[each] for each in elements]),
                                 return_counts=True)
        rows, shared = rows[rows != own], shared[rows != own]
        overlaps = shared / (sizes[rows] + len(elements) - shared)
        order = np.lexsort((rows, -overlaps))
        yield rows[order], overlaps[order], (shared == sizes[rows])[order]


def redundancy(texts):
    """How redundant a cache is, a dict: the number of its entries; the share with a content word;
    of these the mean number of neighbours, the shares with at least so many, and the mean share of
    the nearest ten that hold no content word beyond the entry's own. texts: a list of entries.
    Raises InputError where none has a content word."""
    texts = list(dict.fromkeys(texts))
    sets = [words for words in map(content, texts) if words]
    if not sets:
        raise InputError(f"none of {len(texts)} entries holds a content word")
    counts, nothing_new = [], []
    for _, overlaps, within in neighbours(sets):
        counts.append((overlaps >= LIKE).sum())
        nothing_new.append(within[:NEAREST].sum() / NEAREST)
    return {"entries": len(texts), "content": len(sets) / len(texts), "mean": np.mean(counts),
            **{f"{n}+": np.mean(np.array(counts) >= n) for n in AT_LEAST},
            "nothing new": np.mean(nothing_new)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", nargs="+", default=[], metavar="PATH", help="captions whose "
                        "n-grams form caches: a data folder, an annotations file, or one a line")
    parser.add_argument("--entries", type=int, nargs="+", default=[17000, 50000], help="entries of "
                        "such caches (default 17000 50000)")
    parser.add_argument("--textfile", nargs="+", default=[], metavar="FILE", help="caches as they "
                        "are, one entry a line")
    args = parser.parse_args()
    if min(args.entries) < 1 or not (args.captions or args.textfile):
        raise InputError("give --captions or --textfile, and --entries of 1 or more")
    print(" entries  content    mean     1+     5+    10+  nothing new  source")
    caches = ((path, texts[:n]) for path in args.captions
              for texts in [ngrams(read_training_captions(path), max(args.entries))]
              for n in args.entries)
    files = ((path, read_lines(path, "cache")) for path in args.textfile)
    for path, texts in (*caches, *files):
        found = redundancy(texts)
        shares = "".join(f"{found[name]:7.3f}" for name in ("1+", "5+", "10+"))
        print_safely(f"{found['entries']:8,}{found['content']:9.3f}{found['mean']:8.1f}{shares}"
                     f"{found['nothing new']:13.3f}  {path}")


if __name__ == "__main__":
    run(main)
