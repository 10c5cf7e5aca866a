"""Mines a cache of n-grams from captions, or takes a list of entries, and encodes it with CLIP; or changes a cache that exists.

    python compute_cache.py --datadir coco --textfile cache.txt --embfile cache.npy
    python compute_cache.py --entries words.txt --textfile mine.txt --embfile mine.npy --clip_model ViT-B/16
    python compute_cache.py --textfile mine.txt --embfile mine.npy --add "Geoff Hinton" "a golden retriever puppy" --remove dog
    python compute_cache.py --textfile cache.txt --embfile cache.npy --index cache.faiss

The last one builds an approximate index over a cache of millions that exists; beside a command that makes or changes a cache,
--index builds it afterwards.
"""

import argparse
import glob
import hashlib
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from nltk import wordpunct_tokenize
from tqdm import tqdm

from antarctic.cache import cache_description, read_one_cache, write_cache
from antarctic.datasets import read_coco
from antarctic.distributed import gather_lists, on_rank0, rank_and_world
from antarctic.errors import InputError
from antarctic.files import (
    append,
    existing_caches,
    existing_file,
    finish_cache,
    locked,
    output_folder,
    read_lines,
    writing,
)
from antarctic.index import build_index, load_faiss
from antarctic.runtime import cleanup, run
from utils import ORIGINAL_CACHE, OWN_CACHE, choose_device

CHUNK = 2048  # entries encoded between two writes


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Where the entries of a new cache come from: one of three.
    parser.add_argument("--datadir", help="folder in COCO's layout: its captions are mined, its images are not opened")
    parser.add_argument("--corpus", nargs="+", metavar="FILE", help="mine these text files, one sentence a line, instead")
    parser.add_argument("--entries", metavar="FILE", help="take the lines of this file as entries, with nothing mined")
    parser.add_argument("--split", default="train2017", help="split of --datadir whose captions are mined (default %(default)s)")
    parser.add_argument("--ncaptions", type=int, default=0, help="mine this many captions, drawn by --seed; 0: all (default)")
    parser.add_argument("--seed", type=int, default=0, help="seed of --ncaptions (default %(default)s)")
    # Or what of a cache that exists is changed; only what is new is encoded.
    parser.add_argument("--add", nargs="+", default=[], metavar="ENTRY", help="add these entries at the end")
    parser.add_argument("--add_from", metavar="FILE", help="add the lines of this file at the end")
    parser.add_argument("--remove", nargs="+", default=[], metavar="ENTRY", help="take these entries out")
    # What is mined.
    parser.add_argument("--topk", type=int, default=25000, help="number of unigrams, and of bigrams, kept at most "
                        "(default %(default)s)")
    parser.add_argument("--min_count", type=int, default=3, help="bigrams seen less often than this are left out (default %(default)s)")
    # What is written.
    parser.add_argument("--textfile", help="entries to write or change, one a line (.txt; default: "
                        "cache.txt, or beside --embfile)")
    parser.add_argument("--embfile", help="their embeddings to write or change (.npy), one row an "
                        "entry (default: cache.npy, or beside --textfile)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"), help="numbers of a new --embfile; float16 "
                        "takes half the disk (default %(default)s)")
    parser.add_argument("--index", metavar="FILE", help="build an approximate index over the cache (.faiss); it pays for millions")
    parser.add_argument("--queries", metavar="FILE", help="image features that trainer.py or sampler.py kept "
                        "(features-*.safetensors), to measure the recall of --index with (default: made-up ones)")
    # How they are encoded.
    parser.add_argument("--prefix", help='text set before each entry for CLIP, such as "a photo of " (default none; where a '
                        "cache is changed, the one that it was made with)")
    parser.add_argument("--clip_model", default="ViT-B/16", help="OpenAI's name or .pt file, hub id or folder of a CLIP or "
                        "SigLIP (default %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="encode in bfloat16: twice as fast where the processor or GPU computes "
                        "in it; cosines with float32's embeddings are above .999")
    parser.add_argument("--batch_size", type=int, default=128, help="entries encoded at a time (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default %(default)s)")
    args = parser.parse_args()
    sources = sum(source is not None for source in (args.datadir, args.corpus, args.entries))
    if sources + bool(args.add or args.add_from or args.remove) not in ((0, 1) if args.index else (1,)):
        raise InputError("a new cache needs exactly one of --datadir, --corpus and --entries; one that exists is changed by "
                         "--add, --add_from and --remove, and indexed by --index")
    if args.queries and not args.index:
        raise InputError("--queries are for measuring an --index, and none is built")
    return args


def find_outputs(args):
    """Fills in --textfile and --embfile. A new cache replaces no file that was not named, and the
    original's cache is not changed unless it is named. Raises InputError."""
    named = args.textfile, args.embfile
    if named == (None, None):
        args.textfile, args.embfile = OWN_CACHE
    args.textfile = args.textfile or str(Path(args.embfile).with_suffix(".txt"))
    args.embfile = args.embfile or str(Path(args.textfile).with_suffix(".npy"))
    finish_cache(args.textfile, args.embfile)
    unnamed = [path for path in (args.textfile, args.embfile) if path not in named]
    there = [path for path in unnamed if Path(path).exists()]
    if args.datadir or args.corpus or args.entries:
        if there:
            raise InputError(f"{there[0]} is there, and is replaced only where --textfile and "
                             f"--embfile name it; other names make another cache, and --add and "
                             f"--remove change this one")
    elif named == (None, None) and not there and Path(ORIGINAL_CACHE[0]).exists():
        raise InputError(f"{ORIGINAL_CACHE[0]} stays as it was downloaded; make a small cache of "
                         f"your own, as by --entries words.txt --textfile mine.txt, and give both "
                         f"to sampler.py: --textfile {ORIGINAL_CACHE[0]} mine.txt")


def words(caption):
    """Lower-cased words of a caption; tokens of punctuation alone are no words, nor are those of more than 100 characters."""
    return [token for token in wordpunct_tokenize(caption.lower()) if any(map(str.isalnum, token)) and len(token) <= 100]


def mine(captions, topk, min_count):
    """The topk unigrams by count, then the topk bigrams by pointwise mutual information.

    Bigrams are counted inside captions. PMI(a, b) = log2(n(a, b) n / (n(a) n(b))) over n words (Church and Hanks 1990,
    https://aclanthology.org/J90-1003). Ties are broken by the text, so the same captions give the same entries.
    """
    unigrams, bigrams = Counter(), Counter()
    for caption in tqdm(captions, "counting n-grams", unit="caption", disable=rank_and_world()[0] > 0):
        tokens = words(caption)
        unigrams.update(tokens)
        bigrams.update(zip(tokens, tokens[1:]))
    total = sum(unigrams.values())
    by_count = sorted(unigrams, key=lambda word: (-unigrams[word], word))[:topk]
    pmi = {pair: math.log2(n * total / (unigrams[pair[0]] * unigrams[pair[1]])) for pair, n in bigrams.items() if n >= min_count}
    by_pmi = sorted(pmi, key=lambda pair: (-pmi[pair], pair))[:topk]
    return by_count + [" ".join(pair) for pair in by_pmi]


def encode_entries(clip, texts, batch_size, part):
    """Writes CLIP's vectors of the texts to the file part, float32 rows, CHUNK a process at a time. A run that was killed goes on
    at the end of the file."""
    rank, world = rank_and_world()

    def begun():
        with writing(part), open(part, "ab") as file:
            done = file.tell() // (CHUNK * clip.dim * 4) * CHUNK
            file.truncate(done * clip.dim * 4)
        return done

    done = on_rank0(begun)
    with tqdm(total=len(texts), initial=done, desc="encoding entries", unit="entry", disable=rank > 0) as bar:
        for start in range(done, len(texts), CHUNK * world):
            some = texts[start + rank * CHUNK:start + (rank + 1) * CHUNK]
            rows = gather_lists([clip.encode_texts(some, batch_size).numpy()])  # of (CHUNK, dim), the last ones of fewer
            if rank == 0:
                append(part, b"".join(r.tobytes() for r in rows))
            bar.update(sum(map(len, rows)))


def change_cache(args, device):
    """Adds entries at the end of a cache and takes others out. All three files are replaced, or none."""
    [(textfile, embfile)] = existing_caches([args.textfile], [args.embfile])
    wanted = [" ".join(entry.split()) for entry in args.add] + (read_lines(args.add_from, "list of entries") if args.add_from else [])
    removed = {" ".join(entry.split()) for entry in args.remove}
    if both := sorted(removed.intersection(wanted)):
        raise InputError(f'"{both[0]}" is to be added and removed')
    from model import Clip
    clip = Clip(args.clip_model, device, torch.bfloat16 if args.bf16 else torch.float32)
    old, rows = read_one_cache(textfile, embfile, clip.identity)
    if rows.dim != clip.dim:
        raise InputError(f"{embfile} has {rows.dim} dimensions, but the CLIP model {clip.identity} has {clip.dim}")
    made = cache_description(embfile)
    prefix = made["prefix"] if made else args.prefix or ""
    if made is None:  # without a description only a look can tell whether these are this CLIP's vectors
        some = sorted(random.Random(0).sample(range(len(old)), min(8, len(old))))
        if ((clip.encode_texts([prefix + old[i] for i in some]) * rows.only(some)[:]).sum(1) < 0.99).any():
            raise InputError(f'{embfile} was not made with the CLIP model {clip.identity} and the prefix "{prefix}"')
    elif args.prefix not in (None, prefix):
        raise InputError(f'{embfile} was made with the prefix "{prefix}", not "{args.prefix}"')
    there, kept = set(old), [i for i, entry in enumerate(old) if entry not in removed]
    new = [entry for entry in dict.fromkeys(wanted) if entry and entry not in there]
    if not kept and not new:
        raise InputError(f"this would leave {textfile} empty")
    added = clip.encode_texts([prefix + entry for entry in new], args.batch_size, "encoding entries")  # (new, dim)
    if new or len(kept) < len(old):
        write_cache(textfile, embfile, [old[i] for i in kept] + new, torch.cat((rows.only(kept)[:], added)).numpy(), clip.identity,
                    prefix, rows.dtype)
    missing = sorted(removed - there)
    print(f"added {len(new):,} entries to {textfile} ({len(there.intersection(wanted)):,} were there before), "
          f"removed {len(old) - len(kept):,}"
          + (f"; not there to be removed: {', '.join(missing)}" if missing else "") + f"; it has {len(kept) + len(new):,}")


def main():
    args = parse()
    for name, least in (("topk", 1), ("batch_size", 1), ("ncaptions", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    find_outputs(args)
    outputs = [args.textfile, args.embfile] + ([args.index] if args.index else [])
    for path in outputs:
        output_folder(Path(path).parent)
        if Path(path).is_dir():
            raise InputError(f"{path} is a folder, not a file to write")
    if len({Path(path).resolve() for path in outputs}) < len(outputs):
        raise InputError(f"--textfile, --embfile and --index must be files of their own, not {', '.join(outputs)}")
    if args.index:
        load_faiss()  # or it would be missed after hours of encoding
        if args.queries:
            existing_file(args.queries, "file of image features")
    embfile = Path(args.embfile)
    cleanup.enter_context(locked(embfile.with_name(f".{embfile.name}.lock")))
    device = choose_device(args.device)
    make_cache(args, device)
    if args.index and rank_and_world()[0] == 0:
        build_index(args.index, *existing_caches([args.textfile], [args.embfile])[0], args.queries)


def make_cache(args, device):
    """Makes a new cache, or changes the one that is there; where only its index is asked for, nothing."""
    if args.add or args.add_from or args.remove:
        return change_cache(args, device) if rank_and_world()[0] == 0 else None  # a few entries: nothing to share
    if not (args.datadir or args.corpus or args.entries):
        return

    # The entries. CLIP is loaded before they are mined, so that a wrong name is told at once.
    if args.entries:
        lines, source = read_lines(args.entries, "list of entries"), args.entries
    elif args.corpus:
        lines = [line for path in args.corpus for line in read_lines(path, "corpus", most=math.inf)]
        source = ", ".join(args.corpus)
    else:
        pictures = read_coco(args.datadir, args.split, need_images=False)
        lines, source = [c for picture in pictures for c in picture.captions], f"{args.split} of {args.datadir}"
    if not lines:
        raise InputError(f"there is no text in {source}, so there is nothing to make a cache of")
    from model import Clip
    clip = Clip(args.clip_model, device, torch.bfloat16 if args.bf16 else torch.float32)
    if args.entries:
        entries = list(dict.fromkeys(lines))
    else:
        if args.ncaptions:
            lines = random.Random(args.seed).sample(lines, min(args.ncaptions, len(lines)))
        entries = mine(lines, args.topk, args.min_count)
    if not entries:
        raise InputError(f"there is no word in {source}, so there is nothing to make a cache of")

    # Their embeddings.
    prefix, embfile = args.prefix or "", Path(args.embfile)
    key = hashlib.sha256(json.dumps([clip.identity, entries, prefix, args.batch_size, args.bf16]).encode()).hexdigest()[:16]
    part = embfile.with_name(f".{embfile.name}.{key}.part")
    encode_entries(clip, [prefix + entry for entry in entries], args.batch_size, part)
    if rank_and_world()[0] > 0:
        return
    embeddings = np.memmap(part, np.float32, "r", shape=(len(entries), clip.dim))
    write_cache(args.textfile, args.embfile, entries, embeddings, clip.identity, prefix, args.dtype)
    for path in embfile.parent.glob(f".{glob.escape(embfile.name)}.*.part"):  # this one, and what other entries abandoned
        path.unlink()
    print(f"wrote {len(entries):,} entries to {args.textfile} and {args.embfile} (CLIP {clip.identity}, {device})")


if __name__ == "__main__":
    run(main)
