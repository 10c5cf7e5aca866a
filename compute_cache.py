"""Makes a cache: mines n-grams from captions, or reads a list of entries, and encodes them by CLIP.

    python compute_cache.py --datadir coco --textfile cache.txt --embfile cache.npy
    python compute_cache.py --entries words.txt --textfile mine.txt --embfile mine.npy

It also changes an existing cache, and encodes only the new entries:

    python compute_cache.py --textfile mine.txt --embfile mine.npy --add "Geoff Hinton" --remove dog

It teaches a cache what CLIP does not know, from three to five photos of it:

    python compute_cache.py --teach Tom tom/*.jpg --as "a cat" --features results

--index builds an approximate index over the cache, alone or beside these commands. --check reads a
cache and says whether it is whole.
"""

import argparse
import math
import random
from collections import Counter
from itertools import combinations
from pathlib import Path

from tqdm import tqdm

from antarctic.cache_files import cache_lock, existing_caches, finish_cache, staging_path
from antarctic.datasets import read_split
from antarctic.distributed import on_rank0, rank_and_world
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import existing_file, fingerprint, made_by_runs, output_folder, remove
from antarctic.flags import (
    Renamed,
    add_clip_flag,
    add_device_flags,
    add_teaching_flags,
    require_at_least,
    warn_renamed,
)
from antarctic.locks import locked
from antarctic.runtime import cleanup, run
from antarctic.texts import LONGEST_TEXT, read_lines
from utils import choose_device, choose_dtype, find_outputs, refuse_overwriting, same_file

# torch, transformers and NLTK take seconds to load, so the functions that need them import them.


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("entries of a new cache: one of three")
    source.add_argument("--datadir", metavar="DIR", help="data set whose captions are mined, in "
                        "one of the layouts of docs/data.md; its images are not opened")
    source.add_argument("--corpus", nargs="+", metavar="FILE",
                        help="text files, one sentence a line, that are mined instead")
    source.add_argument("--entries", metavar="FILE", help="list of entries, one a line, instead")

    change = parser.add_argument_group("changes to an existing cache")
    change.add_argument("--add", nargs="+", default=[], metavar="TEXT", help="entries to add")
    change.add_argument("--add_from", metavar="FILE", help="list of entries to add, one a line")
    change.add_argument("--remove", nargs="+", default=[], metavar="TEXT", help="entries to remove")
    change.add_argument("--check", action="store_true", help="only read the cache, and name what "
                        "is damaged")

    add_teaching_flags(parser.add_argument_group("names from photos, for an existing cache"))

    mining = parser.add_argument_group("mining")
    mining.add_argument("--split", metavar="NAME", help="split of --datadir (default: train2017, "
                        "or what the layout calls it)")
    mining.add_argument("--ncaptions", type=int, default=0,
                        help="captions to mine, drawn by --seed; 0: all (default %(default)s)")
    mining.add_argument("--seed", type=int, default=0,
                        help="seed of --ncaptions (default %(default)s)")
    mining.add_argument("--topk", type=int, default=25000, help="n-grams to keep: so many "
                        "unigrams and so many bigrams at most (default %(default)s)")
    mining.add_argument("--min_count", type=int, default=3,
                        help="bigrams that occur less often are left out (default %(default)s)")

    output = parser.add_argument_group("files")
    output.add_argument("--textfile", metavar="FILE", help="entries to write or change, one a line "
                        "(.txt; default: cache.txt, or beside --embfile)")
    output.add_argument("--embfile", metavar="FILE", help="their embeddings to write or change, "
                        "one row an entry (.npy; default: cache.npy, or beside --textfile)")
    output.add_argument("--emb_dtype", default="float32", choices=("float32", "float16"),
                        help="numbers of a new --embfile; float16 takes half the disk (default "
                        "%(default)s)")
    output.add_argument("--index", metavar="FILE", help="approximate index to build over the cache "
                        "(.faiss; default: none)")
    output.add_argument("--queries", metavar="FILE", help="image features that trainer.py or "
                        "sampler.py kept (features-*.safetensors), to measure the recall of "
                        "--index with (default: made-up ones)")

    encoding = parser.add_argument_group("encoding")
    encoding.add_argument("--prefix", metavar="TEXT", help='text before each entry for CLIP, such '
                          'as "a photo of " (default: none; in a change, that of the cache)')
    add_clip_flag(encoding)
    encoding.add_argument("--batch_size", type=int, default=128,
                          help="entries per batch, per process (default %(default)s)")
    add_device_flags(encoding, "float32", "arithmetic of CLIP; bfloat16 is twice as fast where the "
                     "hardware computes in it, with cosines above .999 to float32's", ("float16",))
    encoding.add_argument("--bf16", action=Renamed, new="--dtype bfloat16", nargs=0, const=True)
    args = parser.parse_args()
    if args.dtype == "float16":  # the old flag for the numbers in --embfile
        warn_renamed("--dtype float16", "--emb_dtype float16")
        args.dtype, args.emb_dtype = "float32", "float16"
    if args.bf16:
        args.dtype = "bfloat16"
    return args


def sources(args):
    """The sources of a new cache; an empty list where an existing one is changed or indexed."""
    return [source for source in (args.datadir, args.corpus, args.entries) if source is not None]


def check(args):
    """Raises InputError for arguments that cannot work, before anything is loaded."""
    teaches = bool(args.teach) + bool(args.untaught) + args.taught
    changes = bool(args.add or args.add_from or args.remove)
    tasks = len(sources(args)) + changes + args.check + teaches
    if tasks > 1 or not tasks and not args.index:
        raise InputError("a new cache needs exactly one of --datadir, --corpus, --entries; an old "
                         "one --add, --remove, --teach, --untaught, --taught, --check or --index")
    if len(args.teach) != len(args.phrases) or any(len(each) < 2 for each in args.teach):
        raise InputError('each --teach needs a name, photos and an --as, such as --teach Tom '
                         'tom/*.jpg --as "a cat"')
    if (args.unlike or args.features or args.others) and not args.teach:
        raise InputError("--not, --features and --others are for --teach, and nothing is taught")
    if (args.check or teaches) and args.index:
        raise InputError("--index goes without --check, --teach, --untaught and --taught")
    require_at_least(1, args, "topk", "batch_size")
    require_at_least(0, args, "ncaptions")
    if args.queries and not args.index:
        raise InputError("--queries are for measuring an --index, and none is built")
    if len(args.prefix or "") > LONGEST_TEXT:
        raise InputError(f"--prefix has {len(args.prefix):,} characters; {LONGEST_TEXT:,} are read "
                         "at most")


def check_outputs(args):
    """Raises InputError where an input is missing or an output cannot be written, before any work.
    """
    outputs = [args.textfile, args.embfile, f"{args.embfile}.json"]
    if args.index:
        outputs += [args.index, f"{args.index}.json"]
    if any(same_file(*pair) for pair in combinations(outputs, 2)):
        raise InputError(f"--textfile, --embfile, --index and their .json must be files of their "
                         f"own, not {', '.join(outputs)}")
    inputs = [("--corpus", path) for path in args.corpus or ()]
    inputs += [(f"--{name}", getattr(args, name))
               for name in ("entries", "add_from", "queries", "clip_model")]
    refuse_overwriting(inputs, [*outputs, *map(staging_path, outputs)])
    for path in outputs:
        output_folder(Path(path).parent)
        if Path(path).is_dir():
            raise InputError(f"{path} is a folder, not a file to write")
    if not sources(args):
        existing_caches([args.textfile], [args.embfile])
    if args.index:
        from antarctic.index import load_faiss
        load_faiss()
        if args.queries:
            existing_file(args.queries, "file of image features")


def read_source(args):
    """Returns (lines of the new cache's source, its name). Raises InputError where it has none."""
    if args.entries is not None:
        lines, name = read_lines(args.entries, "list of entries"), args.entries
    elif args.corpus is not None:
        lines = [line for path in args.corpus for line in read_lines(path, "corpus", most=math.inf)]
        name = ", ".join(args.corpus)
    else:
        pictures = read_split(args.datadir, args.split, "train2017", need_images=False,
                              need_captions=True)
        lines = [caption for picture in pictures for caption in picture.captions]
        name = f"the captions of {args.datadir}"
    if not lines:
        raise InputError(f"there is no text in {name} to make a cache of")
    return lines, name


def is_word(token):
    return any(map(str.isalnum, token)) and len(token) <= 100


def mine(captions, topk, min_count):
    """The topk unigrams by count, then the topk bigrams by pointwise mutual information.

    Bigrams are counted inside captions. PMI(a, b) = log2(n(a, b) n / (n(a) n(b))) over n words
    (Church and Hanks 1990, https://aclanthology.org/J90-1003). Ties are broken by the text, so the
    same captions give the same entries.
    """
    from nltk import wordpunct_tokenize
    unigrams, bigrams = Counter(), Counter()
    for caption in tqdm(captions, "counting n-grams", unit="caption",
                        disable=rank_and_world()[0] > 0):
        words = [token for token in wordpunct_tokenize(caption.lower()) if is_word(token)]
        unigrams.update(words)
        bigrams.update(zip(words, words[1:]))
    total = sum(unigrams.values())
    by_count = sorted(unigrams, key=lambda word: (-unigrams[word], word))[:topk]
    pmi = {(a, b): math.log2(n * total / (unigrams[a] * unigrams[b]))
           for (a, b), n in bigrams.items() if n >= min_count}
    by_pmi = sorted(pmi, key=lambda pair: (-pmi[pair], pair))[:topk]
    return by_count + [" ".join(pair) for pair in by_pmi]


def load_clip(args):
    device = choose_device(args.device)
    from model import Clip
    return Clip(args.clip_model, device, choose_dtype(args.dtype, device))


def make_cache(args):
    """Reads captions, mines n-grams, encodes them and writes the cache. Raises InputError."""
    lines, source = read_source(args)
    from antarctic.cache_changes import write_cache
    from antarctic.entries import text_features
    from antarctic.words import warn_of_entries, warn_of_long_entries
    clip = load_clip(args)  # before mining, so a wrong name is reported early
    if args.entries is not None:
        entries = list(dict.fromkeys(lines))
    else:
        if args.ncaptions:
            lines = random.Random(args.seed).sample(lines, min(args.ncaptions, len(lines)))
        entries = mine(lines, args.topk, args.min_count)
    if not entries:
        raise InputError(f"there is no word in {source} to make a cache of")
    prefix, embfile = args.prefix or "", Path(args.embfile)
    warn_of_entries(entries)
    warn_of_long_entries(clip, entries, prefix)
    key = fingerprint([clip.identity, clip.digests, entries, prefix, args.batch_size,
                       str(clip.dtype)])
    part = embfile.with_name(f".{embfile.name}.{key}.part")
    vectors = text_features(clip, [prefix + entry for entry in entries], part, args.batch_size)
    if rank_and_world()[0] > 0:
        return
    write_cache(args.textfile, embfile, entries, vectors, clip.identity, prefix, args.emb_dtype)
    # These are the vectors of this run, and of stopped runs with other settings.
    remove(*made_by_runs(embfile.parent, f".{embfile.name}.", ".part"))
    print_safely(escape_control(f"wrote {len(entries):,} entries to {args.textfile} and "
                                f"{args.embfile} (CLIP {clip.identity}, {clip.device})"))


def update_cache(args):
    """Adds entries to a cache and removes others. Raises InputError."""
    add = [" ".join(entry.split()) for entry in args.add]
    if args.add_from:
        add += read_lines(args.add_from, "list of entries")
    remove = {" ".join(entry.split()) for entry in args.remove}
    if remove.intersection(add):
        raise InputError(f'"{min(remove.intersection(add))}" is to be added and removed')
    from antarctic.cache_changes import change_cache
    clip = load_clip(args)
    change_cache(args.textfile, args.embfile, clip, add, remove, args.prefix, args.batch_size)


def change_names(args):
    """Teaches names from photos, forgets some, or lists them. Raises InputError."""
    from antarctic import lessons
    if args.taught:
        lessons.list_taught(args.embfile)
    elif args.untaught:
        lessons.forget(args.embfile, args.untaught)
    else:
        pupils = [(name, phrase, paths) for (name, *paths), phrase in zip(args.teach, args.phrases)]
        lessons.teach(args.embfile, load_clip(args), pupils, args.unlike, args.features,
                      args.others)


def main():
    args = parse()
    check(args)
    find_outputs(args, new=bool(sources(args)))
    rank = rank_and_world()[0]
    if args.check:
        from antarctic.cache import check_cache
        on_rank0(lambda: check_cache(args.textfile, args.embfile))
        return
    check_outputs(args)
    cleanup.enter_context(locked(cache_lock(args.embfile)))
    on_rank0(lambda: finish_cache(args.textfile, args.embfile))  # which a killed run had begun
    if sources(args):
        make_cache(args)
    elif (args.add or args.add_from or args.remove) and rank == 0:  # too few entries to split
        update_cache(args)
    elif (args.teach or args.untaught or args.taught) and rank == 0:
        change_names(args)
    if args.index and rank == 0:
        from antarctic.index_build import build_index
        build_index(args.index, args.textfile, args.embfile, args.queries)


if __name__ == "__main__":
    run(main)
