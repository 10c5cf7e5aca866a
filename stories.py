"""Goes on from captions to little stories, by a causal language model.

    python stories.py --captions results/captions.json --savedir results
    python stories.py --caption "a red dog" "a whale by a lighthouse" --lm snowglobe/weights/gpt --num_return_sequences 3
    python stories.py --captions captions.txt --lm SmolLM2-135M-Instruct.Q4_1.gguf --chat

With --savedir a stopped run goes on where it was when the same command is given again.
"""

import argparse
import hashlib
import json
import math
import sys
from collections import Counter, deque
from itertools import groupby
from operator import itemgetter

from tqdm import tqdm

from antarctic.causal_lm import encode, end_tokens, load_lm, sample, tell
from antarctic.datasets import read_captions
from antarctic.distributed import gather_lists, on_rank0, rank_and_world
from antarctic.english import noun_phrase
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import (
    append,
    atomic,
    locked,
    output_folder,
    write_lines,
    writing,
)
from antarctic.runtime import cleanup, run
from utils import choose_device, choose_dtype, seed_of

OPENING = "Once upon a time there {was} {caption}"
REQUEST = f"Write a short story for children that begins with: {OPENING}"  # to an instruct model


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # The captions: one of two.
    parser.add_argument("--captions", metavar="FILE", help="captions.json (COCO's results format) or details.jsonl of "
                        "sampler.py, or any other file as a text of one caption a line; empty captions are skipped")
    parser.add_argument("--caption", nargs="+", metavar="TEXT", help="captions given directly instead")
    # What is made of them, and where it goes.
    parser.add_argument("--prompt", help="what a story begins with, or with --chat what the model is "
                        "asked. A caption stands in it without its last period, and its A, An or The is "
                        "small there. Where {was} stands in it, too, that becomes was or were, and the "
                        'caption a noun phrase: "Dogs are running." gives "were dogs running" '
                        f'(default: "{OPENING}", with --chat "{REQUEST}")')
    parser.add_argument("--savedir", help="folder for stories.txt (one a line) and stories.jsonl "
                        "(default: stories are printed as they come)")
    # The model and the sampling.
    parser.add_argument("--lm", default="EleutherAI/gpt-neo-1.3B", help="hub id or folder of a causal language model, such as "
                        "EleutherAI/gpt-neo-125m, gpt-neo-1.3B, gpt-neo-2.7B, EleutherAI/gpt-j-6b; or a GGUF "
                        "file, whose weights are unpacked: in float32 4 bytes each, 0.5 GB for 135 million "
                        "of them, 4 GB for a billion, and twice that while loading (default %(default)s)")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the chat template of an "
                        "instruct model; a story is then the model's answer, without the prompt")
    parser.add_argument("--num_return_sequences", type=int, default=1, help="stories a caption (default %(default)s)")
    parser.add_argument("--max_tokens", type=int, default=100, help="tokens after the prompt at most, fewer where the model's "
                        "positions end; a story broken off there is cut back to its last full sentence (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (default %(default)s)")
    parser.add_argument("--top_p", type=float, default=0.9, help="probability mass of nucleus sampling (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default %(default)s)")
    # How it is computed.
    parser.add_argument("--batch_size", type=int, default=16, help="stories a batch (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16"), help="weights and arithmetic; "
                        "bfloat16 halves the memory, but rounds so coarsely that a story depends on its batch, too; auto: "
                        "bfloat16 on a GPU that has it, else float32 (default %(default)s)")
    args = parser.parse_args()
    args.prompt = args.prompt or (REQUEST if args.chat else OPENING)
    if (args.captions is None) == (args.caption is None):
        raise InputError("exactly one of --captions and --caption says what the stories go on from")
    return args


def check(args):
    """Raises InputError for settings that cannot work, before anything is loaded."""
    for name in ("num_return_sequences", "max_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 < args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise InputError(f"--temperature must be above 0 and --top_p in (0, 1], not {args.temperature} and {args.top_p}")
    if "{caption}" not in args.prompt:
        raise InputError(f'--prompt "{args.prompt}" has no {{caption}}, so every story would begin alike')


def fill(template, caption):
    """The prompt: the caption in place of {caption}, fit for the middle of a sentence. Other braces stay as they are."""
    if "{was}" in template:
        was, caption = noun_phrase(caption)
        template = template.replace("{was}", was)
    else:
        first, *rest = caption.rstrip(" .").split()
        if first in ("A", "An", "The") and not template.startswith("{caption}"):
            first = first.lower()  # another word's capital may be a name's
        caption = " ".join([first, *rest])
    prompt = template.replace("{caption}", caption)
    return prompt.encode("utf-8", "replace").decode()  # tokenizers refuse bytes of a command line that are no UTF-8


def print_line(text, must=False):
    """Prints a text as one line at once, what the terminal cannot show as escapes. Where it cannot be
    printed, as nobody reads any more, nothing happens, or if it must be, InputError is raised."""
    line = " ".join(map(escape_control, text.split()))  # word by word, as escape_control() cuts off what is long
    with tqdm.external_write_mode():
        error = print_safely(line)
    if error and must:
        reason = getattr(error, "strerror", None) or error  # a closed stream raises ValueError
        raise InputError(f"stories cannot be printed any more ({reason}); --savedir writes them to "
                         f"files") from error


def write(model, tokenizer, batch, tokens, prompts, args):
    """The stories of a batch of rows (room, place of the caption, number of the story, seed)."""
    (room, *_), places, _, seeds = zip(*batch)
    begun = [tokens[place] for place in places]
    found = sample(model, begun, seeds, room, args.temperature, args.top_p)
    openings = ["" if args.chat else prompts[place] for place in places]
    return [tell(tokenizer, *each) for each in zip(openings, begun, *zip(*found))]


def batches_of(prompts, room, args):
    """Batches of rows (room, place of the caption, number of the story, seed), almost in the order of
    the captions.

    Rows share a batch only if they share their room: max_tokens, or less with prompts of one length.
    So a padded batch never needs more positions than there are, and no story is shorter for its
    neighbours.
    """
    rows, seen = [], Counter()
    for place, prompt in enumerate(prompts):
        for n in range(args.num_return_sequences):
            seed = seed_of(args.seed, seen[prompt], n, prompt)
            rows.append((min(room[place], args.max_tokens), place, n, seed))
        seen[prompt] += 1  # a caption that comes again gets other stories
    batches = []
    for _, group in groupby(sorted(rows, key=itemgetter(0)), itemgetter(0)):
        group = list(group)
        batches += [group[start:start + args.batch_size] for start in range(0, len(group), args.batch_size)]
    return sorted(batches, key=lambda batch: batch[0][1:3])


def kept_stories(part, batches):
    """Cuts what a stopped run wrote down to whole lines: of each batch the list of its stories.
    Returns these lists."""
    kept, size = [], 0
    if not part.exists():
        return kept
    with writing(part), open(part, "rb+") as file:
        for batch, line in zip(batches, file):
            try:
                told = json.loads(line.decode())  # of bytes, it would guess the encoding
            except (ValueError, RecursionError):
                break
            of_batch = isinstance(told, list) and [*map(type, told)] == [str] * len(batch)
            if not of_batch or not line.endswith(b"\n"):
                break
            kept.append(told)
            size += len(line)
        file.truncate(size)
    return kept


def write_results(savedir, captions, prompts, stories):
    """stories.txt and stories.jsonl. stories: {(place of the caption, number): story}."""
    told = [[] for _ in captions]
    for (place, _), story in sorted(stories.items()):
        told[place].append(story)
    write_lines(savedir / "stories.txt", [story for some in told for story in some])
    with atomic(savedir / "stories.jsonl") as file:
        for (image_id, caption), prompt, some in zip(captions, prompts, told):
            record = {} if image_id is None else {"image_id": image_id}
            record |= {"caption": caption, "prompt": prompt, "stories": some}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    # Last, as until here a stopped run goes on. Others are of runs with other settings.
    for part in savedir.glob("stories-*.jsonl.part"):
        part.unlink()


def captions_of(args):
    """(image id or None, caption) of each caption that is not empty. Raises InputError."""
    captions = read_captions(args.captions) if args.captions else [(None, text) for text in args.caption]
    captions = [(image_id, " ".join(text.split())) for image_id, text in captions]
    captions = [(image_id, text) for image_id, text in captions if text.strip(" .")]
    if not captions:
        raise InputError(f"there is no caption in {args.captions or '--caption'}, so there is nothing to go on from")
    return captions


def main():
    args = parse()
    check(args)
    captions = captions_of(args)
    savedir = output_folder(args.savedir) if args.savedir else None
    if savedir:
        cleanup.enter_context(locked(savedir / ".lock"))
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    prompts = [fill(args.prompt, text) for _, text in captions]
    config, tokenizer, tokens, room = encode(args.lm, prompts, args.chat)
    ends = end_tokens(tokenizer, args.chat)
    batches = batches_of(prompts, room, args)

    # What a stopped run of the same captions and settings has written is kept.
    from antarctic.pretrained import identity
    written = []
    if savedir:
        decides = [on_rank0(lambda: identity(args.lm)), tokens, batches, ends, args.chat, str(dtype),
                   args.temperature, args.top_p]
        digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
        part = savedir / f"stories-{digest}.jsonl.part"
        written = on_rank0(lambda: kept_stories(part, batches))
    model = load_lm(args.lm, ends, device, dtype, config)
    rank, world = rank_and_world()
    if rank == 0:
        print(f"{args.lm} on {device}, {str(dtype).removeprefix('torch.')}", file=sys.stderr)

    # Each process writes every world-th batch; all get all: {(place of the caption, number): story}.
    keys = [[row[1:3] for row in batch] for batch in batches]
    stories = {key: story for pair in zip(keys, written) for key, story in zip(*pair)}
    to_print = deque(sorted(key for batch in keys for key in batch) if savedir is None and rank == 0 else [])
    turns = range(len(written), len(batches), world)
    for start in tqdm(turns, "writing stories", unit="batch", disable=rank > 0):
        mine = batches[start + rank:start + rank + 1]
        new = gather_lists([write(model, tokenizer, batch, tokens, prompts, args) for batch in mine])
        for pair in zip(keys[start:], new):
            stories.update(zip(*pair))
        if savedir and rank == 0:
            append(part, "".join(json.dumps(told) + "\n" for told in new).encode())
        while to_print and to_print[0] in stories:
            print_line(stories[to_print.popleft()], must=True)
    if savedir and rank == 0:
        write_results(savedir, captions, prompts, stories)
        print_line(f"wrote {len(stories)} stories of {len(captions)} captions to {savedir / 'stories.txt'} "
            f"and stories.jsonl")


if __name__ == "__main__":
    run(main)
