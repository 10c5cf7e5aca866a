"""Mines a cache of n-grams from captions, or takes a list of entries, and encodes it with CLIP.

    python compute_cache.py --datadir coco --textfile cache.txt --embfile cache.npy
    python compute_cache.py --entries words.txt --textfile words_cache.txt --embfile words_cache.npy --clip_model ViT-B/16
"""

import argparse
import math
import random
from collections import Counter
from pathlib import Path

from nltk import wordpunct_tokenize
from tqdm import tqdm

from utils import InputError, choose_device, existing_file, output_folder, read_coco, run, write_cache


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Where the entries come from: one of three.
    parser.add_argument("--datadir", help="folder in COCO's layout: its captions are mined, its images are not opened")
    parser.add_argument("--corpus", nargs="+", metavar="FILE", help="mine these text files, one sentence a line, instead")
    parser.add_argument("--entries", metavar="FILE", help="take the lines of this file as entries, with nothing mined")
    parser.add_argument("--split", default="train2017", help="split of --datadir whose captions are mined (default %(default)s)")
    parser.add_argument("--ncaptions", type=int, default=0, help="mine this many captions, drawn by --seed; 0: all (default)")
    parser.add_argument("--seed", type=int, default=0, help="seed of --ncaptions (default %(default)s)")
    # What is mined.
    parser.add_argument("--topk", type=int, default=25000, help="number of unigrams, and of bigrams, kept at most (default %(default)s)")
    parser.add_argument("--min_count", type=int, default=3, help="bigrams seen less often than this are left out (default %(default)s)")
    # What is written.
    parser.add_argument("--textfile", required=True, help="entries to write, one a line (.txt)")
    parser.add_argument("--embfile", required=True, help="their embeddings to write (.npy), float32, one row an entry")
    # How they are encoded.
    parser.add_argument("--prefix", default="", help='text set before each entry for CLIP, such as "a photo of " (default none)')
    parser.add_argument("--clip_model", default="ViT-B/16", help="OpenAI's name, hub id or folder of a CLIP (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=128, help="entries encoded at a time (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default %(default)s)")
    args = parser.parse_args()
    if sum(source is not None for source in (args.datadir, args.corpus, args.entries)) != 1:
        raise InputError("exactly one of --datadir, --corpus and --entries says where the entries come from")
    return args


def read_lines(path, what):
    """Lines of a text file without blank ones."""
    try:
        lines = existing_file(path, what).read_text(encoding="utf-8-sig").splitlines()  # editors on Windows set a mark first
    except UnicodeDecodeError as error:
        raise InputError(f"the {what} {path} is not UTF-8 text") from error
    return [" ".join(line.split()) for line in lines if line.strip()]


def words(caption):
    """Lower-cased words of a caption; tokens of punctuation alone are no words."""
    return [token for token in wordpunct_tokenize(caption.lower()) if any(map(str.isalnum, token))]


def mine(captions, topk, min_count):
    """The topk unigrams by count, then the topk bigrams by pointwise mutual information.

    Bigrams are counted inside captions. PMI(a, b) = log2(n(a, b) n / (n(a) n(b))) over n words (Church and Hanks 1990,
    https://aclanthology.org/J90-1003). Ties are broken by the text, so the same captions give the same entries.
    """
    unigrams, bigrams = Counter(), Counter()
    for caption in tqdm(captions, "counting n-grams", unit="caption"):
        tokens = words(caption)
        unigrams.update(tokens)
        bigrams.update(zip(tokens, tokens[1:]))
    total = sum(unigrams.values())
    by_count = sorted(unigrams, key=lambda word: (-unigrams[word], word))[:topk]
    pmi = {pair: math.log2(n * total / (unigrams[pair[0]] * unigrams[pair[1]])) for pair, n in bigrams.items() if n >= min_count}
    by_pmi = sorted(pmi, key=lambda pair: (-pmi[pair], pair))[:topk]
    return by_count + [" ".join(pair) for pair in by_pmi]


def main():
    args = parse()
    for name, least in (("topk", 1), ("batch_size", 1), ("ncaptions", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    for path in (args.textfile, args.embfile):
        output_folder(Path(path).parent)
        if Path(path).is_dir():
            raise InputError(f"{path} is a folder, not a file to write")
    if Path(args.textfile).resolve() == Path(args.embfile).resolve():
        raise InputError(f"--textfile and --embfile are both {args.textfile}")
    device = choose_device(args.device)

    # The entries. CLIP is loaded before they are mined, so that a wrong name is told at once.
    if args.entries:
        lines, source = read_lines(args.entries, "list of entries"), args.entries
    elif args.corpus:
        lines, source = [line for path in args.corpus for line in read_lines(path, "corpus")], ", ".join(args.corpus)
    else:
        pictures = read_coco(args.datadir, args.split, need_images=False)
        lines, source = [c for picture in pictures for c in picture.captions], f"{args.split} of {args.datadir}"
    if not lines:
        raise InputError(f"there is no text in {source}, so there is nothing to make a cache of")
    from model import Clip  # torch and transformers take seconds: not for --help or a wrong path
    clip = Clip(args.clip_model, device)
    if args.entries:
        entries = list(dict.fromkeys(lines))
    else:
        if args.ncaptions:
            lines = random.Random(args.seed).sample(lines, min(args.ncaptions, len(lines)))
        entries = mine(lines, args.topk, args.min_count)
    if not entries:
        raise InputError(f"there is no word in {source}, so there is nothing to make a cache of")

    # Their embeddings.
    embeddings = clip.encode_texts([args.prefix + entry for entry in entries], args.batch_size, "encoding entries")
    write_cache(args.textfile, args.embfile, entries, embeddings.numpy(), clip.identity, args.prefix)
    print(f"wrote {len(entries):,} entries to {args.textfile} and {args.embfile} (CLIP {clip.identity}, {device})")


if __name__ == "__main__":
    run(main)
