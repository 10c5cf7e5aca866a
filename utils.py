"""What the scripts share: flags, the files that they find by default, the start of a run."""

import argparse
import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from antarctic.cache_files import existing_caches, is_cache_file, whole
from antarctic.distributed import on_rank0, rank_and_world, warn
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import existing_file, output_folder
from antarctic.locks import locked
from antarctic.runtime import cleanup
from antarctic.selection import METHODS

SEPARATOR = " | "
# The original's defaults: entries of a table, tokens of a table, tokens of a caption.
TOPK, MAXLEN_ENC, MAXLEN_DEC = 10, 128, 32
OWN_CACHE = "cache.txt", "cache.npy"
ORIGINAL_CACHE = "original/cache.txt", "original/cache.npy"
CHECKPOINTS = "checkpoints/best.safetensors", "original/checkpoint.ckpt"
MOST_WORKERS = 64  # threads that read images
DTYPES = "auto", "float32", "bfloat16"
CAPTIONING = {  # of add_device_flags, where the language model is not trained
    "dtypes": (*DTYPES, "int8"),
    "what": "arithmetic of the language model and, on a CPU, of CLIP's images; int8: of the "
            "language model on a CPU, faster, with other captions"}


# -------------------------------------------------------------------------------------------- flags

def warn_renamed(old, new):
    """Warns, on rank 0, that a flag has a new spelling."""
    warn(f"{old} is now {new}; the next release drops the old spelling")


class Renamed(argparse.Action):
    """An old spelling of a flag, which works for one more release. new: the new spelling."""

    def __init__(self, *how, new, **named):
        self.new = new
        super().__init__(*how, help=argparse.SUPPRESS, **named)

    def __call__(self, parser, namespace, value, option=None):
        warn_renamed(option, self.new)
        setattr(namespace, self.dest, self.const if self.nargs == 0 else value)


def add_cache_flags(parser):
    """--textfile, --embfile and --index of a script that reads caches, see find_inputs."""
    parser.add_argument("--textfile", nargs="+", metavar="FILE", help="entries of one cache or "
                        "more (.txt; default: cache.txt, else the original's)")
    parser.add_argument("--embfile", nargs="+", metavar="FILE", help="their embeddings (.npy), in "
                        "the same order (default: the .npy beside --textfile)")
    parser.add_argument("--index", nargs="+", metavar="FILE", help="approximate indexes of some of "
                        "the caches, which compute_cache.py --index built (default: exact search)")


def add_clip_flag(parser, default="ViT-B/16", remark=""):
    parser.add_argument("--clip_model", default=default, help="OpenAI's name or .pt file, hub id "
                        f"or folder of a CLIP or SigLIP{remark} (default %(default)s)")


def add_lm_flag(parser):
    parser.add_argument("--lm", default="facebook/bart-large", help="hub id or folder of a BART "
                        "(default %(default)s)")


def add_device_flag(parser, images=False):
    """--device, and of a script that encodes images --workers."""
    parser.add_argument("--device", default="auto",
                        help="auto, cpu, cuda, cuda:N or mps (default %(default)s)")
    if images:
        parser.add_argument("--workers", type=number_of_workers, default=own_cores(), metavar="N",
                            help=f"threads that read images ahead of CLIP, at most {MOST_WORKERS}; "
                            "0: it waits for each (default: the processor's cores, here "
                            "%(default)s)")


def number_of_workers(text):
    """--workers. Raises argparse.ArgumentTypeError, which ends a script with its sentence."""
    if not (text.isascii() and text.isdecimal() and int(text[:9]) <= MOST_WORKERS):
        raise argparse.ArgumentTypeError(f"must be a number from 0 to {MOST_WORKERS}, not {text!r}")
    return int(text)


def size_or_auto(text):
    """A number, or "auto": None. Raises argparse.ArgumentTypeError, as number_of_workers."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or auto, not {text!r}") from None


def own_cores():
    """The cores that this process may use, at most MOST_WORKERS; with torchrun its share of
    them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    share = (cores or 1) // int(processes) if re.fullmatch("[1-9][0-9]{,8}", processes) else cores
    return min(max(1, share), MOST_WORKERS)


def add_device_flags(parser, dtype="auto", what="arithmetic of the language model and, on a CPU, "
                     "of CLIP's images", old=(), dtypes=DTYPES, images=False):
    """--device and --dtype. dtype: its default. what: what it is the type of. old: values that the
    script accepts but does not list, beside dtypes. images: see add_device_flag."""
    add_device_flag(parser, images)
    names = f"{{{','.join(dtypes)}}}"
    parser.add_argument("--dtype", default=dtype, choices=(*dtypes, *old), metavar=names,
                        help=f"{what}; auto: bfloat16 on a GPU that supports it, else float32 "
                        "(default %(default)s)")


def add_sampling_flags(parser, top_p=1.0, when=""):
    """--temperature, --top_p and --seed. top_p: its default. when: the flag that they need."""
    parser.add_argument("--temperature", type=float, default=1.0, help=f"of sampling{when} "
                        "(default %(default)s)")
    parser.add_argument("--top_p", type=float, default=top_p, help="probability mass of nucleus "
                        f"sampling{when} (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help=f"seed of sampling{when} (default "
                        "%(default)s)")


def add_captioner_flags(parser):
    """The groups vocabulary and models of a script that captions: the flags of Model.load. Returns
    the second one."""
    group = parser.add_argument_group("vocabulary")
    add_cache_flags(group)
    group.add_argument("--only", metavar="FILE", help="use only the lines of this file as entries")
    group.add_argument("--ban", metavar="FILE", help="leave out entries and captions that hold a "
                       "line of this file, as whole words in any case")
    group = parser.add_argument_group("models")
    add_clip_flag(group)
    add_lm_flag(group)
    group.add_argument("--ckpt", metavar="FILE", help="checkpoint of trainer.py, or a .ckpt of the "
                       "original; none: the language model as pretrained (default: "
                       "checkpoints/best.safetensors, else the original's)")
    group.add_argument("--topk", type=int, help="entries of a table (default: as in training; 10 "
                       "with --ckpt none)")
    add_table_flag(group)
    return group


def add_table_flag(group, default=None):
    """--table. default: None takes the checkpoint's."""
    group.add_argument("--table", default=default, choices=METHODS, help="entries of a "
                       "table: the nearest, or of these --topk that say different things, by "
                       f"maximal marginal relevance (default: {default or 'as in training'})")


def add_teaching_flags(group):
    """What lessons.teach, forget and list_taught do."""
    group.add_argument("--teach", nargs="+", action="append", default=[],
                       metavar=("NAME", "PHOTO"), help='what captions shall name, "Tom" or, of a '
                       'kind, "an owl", and its photos or folders, some alone and some beside '
                       "other things; may come again")
    group.add_argument("--as", action="append", default=[], metavar="PHRASE", dest="phrases",
                       help='a word for it that CLIP knows, with its article, such as "a cat"; one '
                       "for each --teach")
    group.add_argument("--not", nargs="+", default=[], metavar="PHOTO", dest="unlike",
                       help="photos of what must not get these names")
    group.add_argument("--features", nargs="+", metavar="DIR", help="folders where sampler.py or "
                       "trainer.py kept vectors of other photos (default: results, checkpoints)")
    group.add_argument("--others", nargs="+", metavar="PHOTO", help="other photos, 400 or more, or "
                       "their folders, in place of or beside --features")
    group.add_argument("--untaught", nargs="+", default=[], metavar="NAME", help="names to forget")
    group.add_argument("--taught", action="store_true", help="list what was taught")


def add_decoding_flags(group):
    """The fields of Decoding."""
    group.add_argument("--num_beams", type=int, default=3, help="width of beam search (default "
                       "%(default)s)")
    group.add_argument("--num_return_sequences", type=int, default=3, help="candidates per image; "
                       "beam search has at most --num_beams (default %(default)s)")
    group.add_argument("--do_sample", action="store_true", help="sample instead of beam search")
    add_sampling_flags(group, when=", with --do_sample")
    group.add_argument("--lm_weight", type=float, default=0.0, help="weight of the language "
                       "model's mean log-probability per token beside CLIP's cosine in the choice "
                       "(default %(default)s: CLIP alone)")
    group.add_argument("--repeat_weight", type=float, default=0.0, help="what a candidate's cosine "
                       "loses in the choice for each word that it says again, in English; .02 is a "
                       "good value for samples (default %(default)s)")


def require_at_least(least, args, *names):
    """Raises InputError where one of these flags is below least. None passes: it was not given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value >= least:  # nan is not
            raise InputError(f"--{name} must be at least {least}, not {value}")


def check_sampling(args):
    """Raises InputError where --temperature or --top_p is out of its range."""
    if not 0 < args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise InputError(f"--temperature must be above 0 and --top_p in (0, 1], "
                         f"not {args.temperature} and {args.top_p}")


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

    def __post_init__(self):
        require_at_least(1, self, "num_beams", "num_return_sequences")
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise InputError(f"beam search of width {self.num_beams} cannot return "
                             f"{self.num_return_sequences} candidates; raise --num_beams, or give "
                             f"--do_sample")
        check_sampling(self)
        for name in ("lm_weight", "repeat_weight"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"--{name} must be a number, not {getattr(self, name)}")


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


def seed_of(*parts):
    """A seed of these parts only, such as --seed and an image's id: neighbours in a batch change
    nothing."""
    text = "/".join(map(str, parts)).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


def linearize(entries):
    """The table as BART reads it: a separator follows each entry, the last one too."""
    return "".join(entry + SEPARATOR for entry in entries)
