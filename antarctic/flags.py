"""The flags that scripts share, and their checks."""

import argparse
import math
import os
import re

from antarctic.distributed import warn
from antarctic.errors import InputError
from antarctic.selection import METHODS

MOST_WORKERS = 64  # threads that read images
DTYPES = "auto", "float32", "bfloat16"
CAPTIONING = {  # of add_device_flags, where the language model is not trained
    "dtypes": (*DTYPES, "int8"),
    "what": "arithmetic of the language model and, on a CPU, of CLIP's images; int8: of the "
            "language model on a CPU, faster, with other captions"}


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
    add_others_flags(group)
    group.add_argument("--untaught", nargs="+", default=[], metavar="NAME", help="names to forget")
    group.add_argument("--taught", action="store_true", help="list what was taught")


def add_others_flags(group, remark=""):
    """Photos of other things, from which those that teach a name differ."""
    group.add_argument("--features", nargs="+", metavar="DIR", help="for names from photos: "
                       "folders where sampler.py or trainer.py kept vectors of other photos "
                       "(default: results, checkpoints)")
    group.add_argument("--others", nargs="+", metavar="PHOTO", help="for names from photos: other "
                       "photos, 400 or more, or their folders, in place of or beside --features"
                       f"{remark}")


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
    group.add_argument("--insert_cost", type=float, metavar="COST", help="also choose among "
                       "candidates in which a noun of the table that none says takes the place of "
                       "another, in English, less so much of their cosine; .02 is a good value for "
                       "new words and beam search (default: no such candidates)")


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
