"""What the scripts share: the files that they find by default, device and dtype, seeds, the table's text."""

import hashlib
import os
from pathlib import Path

from antarctic.distributed import rank_and_world
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import finish_cache

SEPARATOR = " | "

OWN_CACHE, ORIGINAL_CACHE = ("cache.txt", "cache.npy"), ("original/cache.txt", "original/cache.npy")

CHECKPOINTS = "checkpoints/best.safetensors", "original/checkpoint.ckpt"


def seed_of(*what):
    """A seed that depends on these things alone, such as --seed and an image's id, so that neighbours in a batch change nothing."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, what)).encode(errors="surrogateescape")).digest()[:7], "big")


def choose_cache(textfile, embfile, exists):
    """The caches to read, as two lists: those that --textfile and --embfile name, else the cache in
    this folder, else the original's. Where one of the two flags is missing, the other files lie
    beside those that are named, with the same name but for the suffix.

    textfile, embfile: lists of paths, or None. exists: a function of a path. Raises InputError.
    """
    if textfile is None and embfile is None:
        textfile, embfile = default_cache(exists)
    elif embfile is None:
        embfile = beside(textfile, ".npy", "--embfile", exists)
    elif textfile is None:
        textfile = beside(embfile, ".txt", "--textfile", exists)
    return textfile, embfile


def beside(paths, suffix, flag, exists):
    """The other halves of caches, see choose_cache. flag: what would name them."""
    others = [str(Path(path).with_suffix(suffix)) for path in paths]
    missing = [path for path in others if not exists(path)]
    if missing:
        raise InputError(f"a cache is two files, and there is no {missing[0]}; {flag} names the "
                         f"other one")
    return others


def default_cache(exists):
    """The cache in this folder, else the original's, see choose_cache."""
    for textfile, embfile in (OWN_CACHE, ORIGINAL_CACHE):
        if exists(textfile) and exists(embfile):
            return [textfile], [embfile]
        for one, other in ((textfile, embfile), (embfile, textfile)):
            if exists(one):
                raise InputError(f"a cache is two files, and {one} is there without {other}; "
                                 f"move it away, or name a cache by --textfile and --embfile")
    raise InputError("there is no cache here, neither cache.txt with cache.npy nor the original's: "
                     "./download.sh --original gets that one, and compute_cache.py --datadir coco "
                     "makes one from captions")


def choose_checkpoint(ckpt, exists):
    """The checkpoint that --ckpt names, else trainer.py's, else the original's; None for "none".

    exists: a function of a path. Raises InputError.
    """
    if ckpt is not None:
        return None if ckpt == "none" else ckpt
    there = [path for path in CHECKPOINTS if exists(path)]
    if not there:
        raise InputError(f"there is no checkpoint here, neither {' nor '.join(CHECKPOINTS)}: "
                         f"./download.sh --original gets the original's, trainer.py --datadir coco "
                         f"makes one, and --ckpt none does without")
    return there[0]


def find_inputs(args):
    """Fills in --textfile, --embfile and, where a script has it, --ckpt with what is there, and
    says what was taken. Raises InputError."""
    finish_cache(*OWN_CACHE)
    given, taken = dict(vars(args)), []
    args.textfile, args.embfile = choose_cache(args.textfile, args.embfile, os.path.isfile)
    if None in (given["textfile"], given["embfile"]):
        pairs = (f"{text} with {rows}" for text, rows in zip(args.textfile, args.embfile))
        taken.append(f"the cache {' and '.join(pairs)}")
    if "ckpt" in given:
        args.ckpt = choose_checkpoint(args.ckpt, os.path.isfile)
        if given["ckpt"] is None:
            taken.append(f"the checkpoint {args.ckpt}")
    if taken and rank_and_world()[0] == 0:
        print_safely(escape_control(f"taken, since no other is named: {', '.join(taken)}"))


def choose_device(name):
    """torch.device for "auto", "cpu", "cuda", "cuda:1", "mps"; "auto" takes a GPU where there is one."""
    import torch
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # each of torchrun's processes has a GPU of its own
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the device {name} cannot be used here; try --device cpu") from error


def choose_dtype(name, device):
    """torch.float32 or torch.bfloat16; "auto" takes bfloat16 on a GPU that computes in it, float32 elsewhere."""
    import torch
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


def linearize(entries):
    """The table as the language model reads it: each entry followed by a bar, the last one too."""
    return "".join(entry + SEPARATOR for entry in entries)

