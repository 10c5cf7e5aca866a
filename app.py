"""The page: give it a photo, see what the caption was made of, change the words, see it change.

    python app.py
    python app.py --textfile cache.txt mine.txt --embfile cache.npy mine.npy --examples photos/ \\
        --host 0.0.0.0 --auth user:password

Without --textfile and --ckpt it takes what sampler.py takes, and where there is none, the
snowglobe of ./demo.sh. It listens on this machine alone, unless --host says otherwise, and fetches
nothing from elsewhere.
"""

import argparse
import os
import shlex
import threading
from dataclasses import asdict
from functools import partial
from os.path import isdir, isfile
from pathlib import Path

from antarctic.distributed import warn
from antarctic.errors import InputError, counted, escape_control, print_safely
from antarctic.flags import (
    CAPTIONING,
    add_captioner_flags,
    add_decoding_flags,
    add_device_flags,
    add_others_flags,
    require_at_least,
)
from antarctic.folders import list_images
from antarctic.leftovers import scratch_folder
from antarctic.runtime import cleanup, run
from antarctic.texts import read_words
from utils import (
    CHECKPOINTS,
    ORIGINAL_CACHE,
    OWN_CACHE,
    Decoding,
    choose_device,
    choose_dtype,
    find_inputs,
)

DEMOS = "demo", "demo/small"  # folders of ./demo.sh
SNOWGLOBE = "snowglobe/weights"
EXAMPLES = 12
EXAMPLE_SPLITS = {"out": 6, "near": 3, "val2017": 3}  # the first two hold what no cache names yet
LOCAL = "127.0.0.1", "localhost", "::1"
STORY_TOKENS = 100


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("page")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of "
                       "this machine's, so others reach the page (default %(default)s: this "
                       "machine alone)")
    group.add_argument("--port", type=int, default=7860, help="port to listen on (default "
                       "%(default)s)")
    group.add_argument("--auth", metavar="USER:PASSWORD", help="let in only who gives these "
                       "(default: all who reach the page)")
    group.add_argument("--examples", nargs="+", metavar="PATH", help=f"image files and folders, of "
                       f"which the first {EXAMPLES} are examples (default: none, or the "
                       "snowglobe's drawings)")
    add_others_flags(group, "; who teaches the page a name sees some that look like it")
    group.add_argument("--savedir", default="words", metavar="DIR", help="folder that the button "
                       "Save writes words to (default %(default)s)")
    group.add_argument("--max_pixels", type=int, default=64_000_000, help="pixels of an image at "
                       "most (default %(default)s, which reading needs 1 GB of memory for)")
    group.add_argument("--max_mb", type=int, default=64, help="megabytes of an upload at most "
                       "(default %(default)s)")
    group.add_argument("--queue", type=int, default=256, help="requests that wait at most; more "
                       "are told to come back (default %(default)s)")
    group = add_captioner_flags(parser)
    group.add_argument("--story_lm", metavar="NAME", help="hub id, folder or GGUF file of a causal "
                       "language model for the button Tell a story, as stories.py --lm (default: "
                       "none, so no button)")
    add_decoding_flags(parser.add_argument_group("candidates, as the page begins"))
    add_device_flags(parser.add_argument_group("computation"), **CAPTIONING)
    args = parser.parse_args()
    args.defaults = {name: parser.get_default(name) for name in ("clip_model", "lm")}
    return args


def find_demo(args):
    """Fills in the snowglobe's files where no flag names others and there is no better cache or
    checkpoint. Prints what it took."""
    named = [args.textfile, args.embfile, args.ckpt]
    if any(named) or any(vars(args)[name] != value for name, value in args.defaults.items()):
        return
    if any(map(isfile, (*OWN_CACHE, *ORIGINAL_CACHE, *CHECKPOINTS))):
        return
    for demo in DEMOS:
        files = [f"{demo}/cache.txt", f"{demo}/cache.npy", f"{demo}/checkpoints/best.safetensors"]
        if not all(map(isfile, files)):
            continue
        args.textfile, args.embfile, args.ckpt = files[:1], files[1:2], files[2]
        args.clip_model, args.lm = f"{SNOWGLOBE}/clip", f"{SNOWGLOBE}/bart"
        args.story_lm = args.story_lm or f"{SNOWGLOBE}/gpt"
        args.examples = args.examples or [
            str(path) for split, number in EXAMPLE_SPLITS.items()
            for path in sorted(Path(f"{demo}/world/{split}").glob("*.png"))[:number]]
        if not (args.others or args.features) and isdir(f"{demo}/world/train2017"):
            # The trainer has kept vectors of these.
            args.others, args.features = [f"{demo}/world/train2017"], [f"{demo}/checkpoints"]
        print_safely(escape_control(f"by default: the snowglobe of ./demo.sh, {demo}/cache.txt and "
                                    f"{files[2]}, with the models of {SNOWGLOBE}"))
        return


def check(args):
    """The Decoding. Raises InputError for settings that cannot work, before anything is loaded."""
    require_at_least(1, args, "topk", "max_pixels", "max_mb", "queue")
    if not 0 <= args.port < 65536:
        raise InputError(f"--port must be from 0 to 65535, not {args.port}")
    if args.auth is not None and not all(args.auth.partition(":")):
        raise InputError("--auth must be a user and a password, as in --auth user:password")
    decoding = Decoding(**{name: getattr(args, name) for name in Decoding.__dataclass_fields__})
    find_demo(args)
    try:
        find_inputs(args)
    except InputError as error:
        if "there is no cache here" not in str(error):
            raise
        raise InputError(f"{error}; ./demo.sh makes those of the snowglobe in five minutes, and "
                         f"app.py takes them") from error
    from antarctic.lessons import require_others
    require_others(args.features, args.others)
    if args.host not in LOCAL and not args.auth:
        warn(f"--host {args.host} without --auth: all who reach this machine can use the page")
    return decoding


def example_paths(args):
    """Paths of the first dozen images of --examples."""
    pictures = list_images(args.examples) if args.examples else []
    return [picture.path for picture in pictures[:EXAMPLES]]


def quiet_gradio(folder):
    """Settings of Gradio's that it reads when it is imported: no analytics, uploads in folder, and
    none from the environment, which could open the page to others."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}
    # Gradio asks its own server whether it is there: not through a proxy.
    hosts = [os.environ.get("no_proxy", ""), *LOCAL]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, hosts))


def story_teller(args, device):
    """A function that continues a caption as a story, or None without --story_lm."""
    if not args.story_lm:
        return None
    import torch

    from antarctic.causal_lm import encode, end_tokens, load_lm, sample, to_text
    from antarctic.english import OPENING, fill
    config, tokenizer, _, _ = encode(args.story_lm, [OPENING])
    model = load_lm(args.story_lm, end_tokens(tokenizer, False), device, torch.float32, config)

    def story(caption):
        prompt = fill(OPENING, caption)
        _, _, [ids], [room] = encode(args.story_lm, [prompt])
        [(new, ended)] = sample(model, [ids], [args.seed], min(room, STORY_TOKENS), 1.0, 0.9)
        return to_text(tokenizer, prompt, ids, new, ended)
    return story


def command_of(args):
    """A function of {flag: path} of saved words that gives the sampler's command with them."""
    def command(files):
        texts, rows = list(args.textfile), list(args.embfile)
        if "--textfile" in files:
            texts.append(files["--textfile"])
            rows.append(files["--embfile"])
        words = ["python", "sampler.py", "--images", "photos/", "--textfile", *texts, "--embfile",
                 *rows, "--clip_model", args.clip_model, "--lm", args.lm, "--ckpt",
                 args.ckpt or "none"]
        words += [part for flag in ("--only", "--ban") if flag in files
                  for part in (flag, files[flag])]
        words += [part for name in ("topk", "table") if vars(args).get(name)
                  for part in (f"--{name}", vars(args)[name])]
        return shlex.join(map(str, words))
    return command


def load_page(args, decoding, folder, device, dtype):
    """The page_layout.Page."""
    from antarctic.answers import Answers
    from antarctic.lessons import other_photos
    from antarctic.page_layout import Page
    from antarctic.studio import Studio
    from antarctic.taught_files import FEWEST_OTHERS
    from antarctic.uploads import Folder, examples_of
    from model import Model
    only, ban = (path and read_words(path) for path in (args.only, args.ban))
    model = Model.load(args.clip_model, args.lm, args.ckpt or "none", args.textfile, args.embfile,
                       args.index, only, ban, args.topk, device=device, dtype=dtype,
                       table=args.table, **asdict(decoding))
    folder = Folder(folder)
    examples = examples_of(folder, example_paths(args))
    others = partial(other_photos, model.clip, args.features, args.others)
    studio = Studio(model, args.max_pixels, others, only)
    if args.others or args.features:  # else the first lesson looks into the usual folders
        found = len(studio.classroom.others())
        if found < FEWEST_OTHERS:
            warn(f"no name can be taught: --others and --features give "
                 f"{counted(found, 'photo')}, and {FEWEST_OTHERS} are needed")
    answers = Answers(studio, folder, args.savedir, command_of(args), story_teller(args, device))
    print_safely(escape_control(f"{model}, with {counted(len(model.entries), 'line')} of words"))
    return Page(answers, examples)


def main():
    args = parse()
    decoding = check(args)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    folder = cleanup.enter_context(scratch_folder("antarctic-page"))
    quiet_gradio(folder)
    from antarctic.page_layout import launch

    page = load_page(args, decoding, folder, device, dtype)
    blocks, address = launch(page, args.host, args.port, args.host in LOCAL, args.auth, args.max_mb,
                             args.queue)
    cleanup.callback(blocks.close, verbose=False)
    print_safely(f"the page is at {address}; Ctrl-C ends it")
    threading.Event().wait()  # Gradio's own wait would end before the folder is removed


if __name__ == "__main__":
    run(main)
