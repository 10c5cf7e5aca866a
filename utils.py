"""What the scripts share: how candidates are written, the files that they find by default, the
start of a run."""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

from antarctic.cache_files import existing_caches, is_cache_file, whole
from antarctic.distributed import on_rank0, rank_and_world
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import existing_file, output_folder
from antarctic.flags import check_sampling, require_at_least
from antarctic.locks import locked
from antarctic.runtime import cleanup

SEPARATOR = " | "
# The original's defaults: entries of a table, tokens of a table, tokens of a caption.
TOPK, MAXLEN_ENC, MAXLEN_DEC = 10, 128, 32
OWN_CACHE = "cache.txt", "cache.npy"
ORIGINAL_CACHE = "original/cache.txt", "original/cache.npy"
CHECKPOINTS = "checkpoints/best.safetensors", "original/checkpoint.ckpt"


@dataclass(frozen=True)
class Decoding:
    """How candidates are written and chosen. Raises InputError for settings that cannot work."""

    num_beams: int = 3  # width of beam search
    num_return_sequences: int = 3  # candidates an image
    do_sample: bool = False  # sample them in place of beam search
    temperature: float = 1.0
    top_p: float = 1.0  # probability mass of nucleus sampling
    seed: int = 0
    lm_weight: float = 0.0  # of BART's mean log-probability a token, beside CLIP's cosine
    repeat_weight: float = 0.0  # taken from the cosine for each content word that is said again
    insert_cost: float | None = None  # of candidates with an entry that none says; None: no such

    def __post_init__(self):
        require_at_least(1, self, "num_beams", "num_return_sequences")
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise InputError(f"beam search of width {self.num_beams} cannot return "
                             f"{self.num_return_sequences} candidates; raise --num_beams, or give "
                             f"--do_sample")
        check_sampling(self)
        for name in ("lm_weight", "repeat_weight", "insert_cost"):
            if not math.isfinite(getattr(self, name) or 0):
                raise InputError(f"--{name} must be a number, not {getattr(self, name)}")


def linearize(entries):
    """The table as BART reads it: a separator follows each entry, the last one too."""
    return "".join(entry + SEPARATOR for entry in entries)


def seed_of(*parts):
    """A seed of these parts only, such as --seed and an image's id: neighbours in a batch change
    nothing."""
    text = "/".join(map(str, parts)).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


# -------------------------------------------------------------------------------- files by default

def choose_cache(textfile, embfile, exists):
    """The caches to read: (text files, embedding files), two lists.

    --textfile and --embfile name them; where one of the two is missing, its files lie beside those
    of the other and differ in the suffix. Without both it is the cache in this folder, else the
    original's. textfile, embfile: lists of paths, or None. exists: a function of a path. Raises
    InputError where there is none.
    """
    if [] in (textfile, embfile):
        raise InputError("a cache is two files, and no file is named")
    if textfile is None and embfile is None:
        textfile, embfile = default_cache(exists)
    elif embfile is None:
        embfile = beside(textfile, ".npy", "--embfile", exists)
    elif textfile is None:
        textfile = beside(embfile, ".txt", "--textfile", exists)
    return textfile, embfile


def beside(paths, suffix, flag, exists):
    """The other files of caches, see choose_cache. flag: the one that can name them."""
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
    existing = [path for path in CHECKPOINTS if exists(path)]
    if not existing:
        raise InputError(f"there is no checkpoint here, neither {' nor '.join(CHECKPOINTS)}: "
                         f"./download.sh --original gets the original's, trainer.py --datadir coco "
                         f"makes one, and --ckpt none does without")
    return existing[0]


def find_inputs(args):
    """Fills in --textfile, --embfile and, if the script has it, --ckpt, and prints which it took.

    Raises InputError where a file is missing, before anything is loaded.
    """
    given, taken = dict(vars(args)), []
    args.textfile, args.embfile = choose_cache(args.textfile, args.embfile, is_cache_file)
    if None in (given["textfile"], given["embfile"]):
        pairs = (f"{text} with {rows}" for text, rows in zip(args.textfile, args.embfile))
        taken.append(f"the cache {' and '.join(pairs)}")
    if "ckpt" in given:
        args.ckpt = choose_checkpoint(args.ckpt, os.path.isfile)
        if given["ckpt"] is None:
            taken.append(f"the checkpoint {args.ckpt}")
    if taken and rank_and_world()[0] == 0:
        print_safely(escape_control(f"by default: {', '.join(taken)}"))
    existing_caches(args.textfile, args.embfile)
    if getattr(args, "ckpt", None):
        existing_file(args.ckpt, "checkpoint")
    if args.index:
        from antarctic.index import index_description
        for path in args.index:
            index_description(path)


def find_outputs(args, new):
    """Fills in --textfile and --embfile of a cache to write. new: it is made, not changed.

    Raises InputError where a new cache would replace a file that no flag names, and where the
    original's cache would be changed without being named.
    """
    named = args.textfile, args.embfile
    if named == (None, None):
        args.textfile, args.embfile = OWN_CACHE
    args.textfile = args.textfile or str(Path(args.embfile).with_suffix(".txt"))
    args.embfile = args.embfile or str(Path(args.textfile).with_suffix(".npy"))
    unnamed = [path for path in (args.textfile, args.embfile) if path not in named]
    existing = [path for path in unnamed if whole(path, args.embfile).exists()]
    if new:
        if existing:
            raise InputError(f"{existing[0]} exists and is replaced only where --textfile and "
                             f"--embfile name it; other names make another cache, and --add and "
                             f"--remove change this one")
    elif named == (None, None) and not existing and Path(ORIGINAL_CACHE[0]).exists():
        raise InputError(f"{ORIGINAL_CACHE[0]} stays as it was downloaded; make a small cache of "
                         f"your own, as by --entries words.txt --textfile mine.txt, and give both "
                         f"to sampler.py: --textfile {ORIGINAL_CACHE[0]} mine.txt")


def refuse_overwriting(inputs, outputs):
    """Raises InputError where a run would replace a file that it reads, also by a link or another
    name. inputs: pairs of a flag and a path, or None. outputs: paths."""
    for flag, path in inputs:
        for output in outputs:
            if path is not None and same_file(path, output):
                raise InputError(f"{flag} {path} would be replaced by {output}, which this run "
                                 "writes; give the output another name")


def same_file(path, other):
    """Whether two paths name one file, which need not exist."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return os.path.realpath(path) == os.path.realpath(other)


# ------------------------------------------------------------------------------- the start of a run

def start_run(args):
    """Makes --savedir and locks it until run() ends, and chooses what to compute on.

    Returns (Path, or None without --savedir; torch.device; torch.dtype). Raises InputError where
    the folder cannot be written, another run is writing to it, or there is no such device.
    """
    savedir = on_rank0(lambda: output_folder(args.savedir)) if args.savedir else None
    if savedir:
        cleanup.enter_context(locked(savedir / ".lock"))
    device = choose_device(args.device)
    return savedir, device, choose_dtype(args.dtype, device)


def choose_device(name):
    """torch.device of "auto", "cpu", "cuda", "cuda:1" or "mps"; "auto" takes a GPU if there is
    one. Raises InputError where it cannot be used."""
    import torch
    if name == "auto":
        gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((gpu for gpu, available in gpus.items() if available), "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun's processes have a GPU each
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the device {name} cannot be used here; try --device cpu") from error


def choose_dtype(name, device):
    """torch.dtype of "auto", "float32", "bfloat16" or "int8"; "auto" takes bfloat16 on a GPU that
    supports it, else float32. A torch.dtype is returned as it is. Raises InputError where int8 is
    asked of another device than a CPU, or of a torch without it."""
    import torch

    from antarctic.packed import can_pack
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if name == "int8" and not (device.type == "cpu" and can_pack(torch.int8)):
        raise InputError(f"--dtype int8 cannot be used here on {device}; it needs --device cpu and "
                         f"a torch with quantized products")
    return getattr(torch, name)
