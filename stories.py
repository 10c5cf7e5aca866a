"""Continues captions into little stories, by a causal language model.

    python stories.py --captions results/captions.json --savedir results
    python stories.py --caption "a red dog" --lm snowglobe/weights/gpt --num_return_sequences 3
    python stories.py --captions captions.txt --lm SmolLM2-135M-Instruct.Q4_1.gguf --chat

With --savedir, rerun the same command to resume a stopped run.
"""

import argparse
import json
from collections import Counter, deque
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm

from antarctic.captions import read_captions
from antarctic.distributed import gather_lists, on_rank0, rank_and_world
from antarctic.english import OPENING, fill
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import (
    append,
    atomic,
    check_lines,
    fingerprint,
    made_by_runs,
    remove,
    write_lines,
)
from antarctic.flags import add_device_flags, add_sampling_flags, check_sampling, require_at_least
from antarctic.runtime import run
from antarctic.sealed import read_sealed, resume, seal
from utils import refuse_overwriting, seed_of, start_run

PARTS = f"stories-{'[0-9a-f]' * 16}.jsonl.part"  # of unfinished runs
REQUEST = f"Write a short story for children that begins with: {OPENING}"  # to an instruct model


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("captions: one of two")
    source.add_argument("--captions", metavar="FILE", help="captions.json (COCO's results format) "
                        "or details.jsonl of sampler.py, or a text file with one caption a "
                        "line; empty captions are skipped")
    source.add_argument("--caption", nargs="+", metavar="TEXT", help="one or more captions")

    output = parser.add_argument_group("stories")
    output.add_argument("--prompt", metavar="TEXT", help="text that a story begins with, or with "
                        "--chat the request to the model. {caption} becomes the caption without "
                        "its last period, and with a small a, an or the unless it begins the text. "
                        "With {was}, which becomes was or were, the caption becomes a noun phrase: "
                        '"Dogs are running." gives "were dogs running" (default: '
                        f'"{OPENING}", with --chat "{REQUEST}")')
    output.add_argument("--num_return_sequences", type=int, default=1,
                        help="stories per caption (default %(default)s)")
    output.add_argument("--max_tokens", type=int, default=100, help="most tokens after the "
                        "prompt, fewer where the model's positions end; a story that does not end "
                        "by then is cut back to its last full sentence (default %(default)s)")
    output.add_argument("--savedir", metavar="DIR", help="folder for stories.txt (one a line) and "
                        "stories.jsonl (default: stories are printed as they come)")

    model = parser.add_argument_group("language model")
    model.add_argument("--lm", default="EleutherAI/gpt-neo-1.3B", help="hub id or folder of a "
                       "causal language model, such as EleutherAI/gpt-neo-125m, gpt-neo-1.3B, "
                       "gpt-neo-2.7B, EleutherAI/gpt-j-6b; or a GGUF file, whose weights are "
                       "unpacked: in float32 they take 4 bytes each, 0.5 GB for 135 million, "
                       "4 GB for a billion, and twice that while loading (default %(default)s)")
    model.add_argument("--chat", action="store_true", help="put the prompt into the chat template "
                       "of an instruct model; a story is then the model's answer, without the "
                       "prompt")
    add_sampling_flags(parser.add_argument_group("sampling"), top_p=0.9)

    group = parser.add_argument_group("computation")
    group.add_argument("--batch_size", type=int, default=16,
                       help="stories per batch, per process (default %(default)s)")
    add_device_flags(group, "float32", "weights and arithmetic of the language model; bfloat16 "
                     "halves the memory, but rounds so coarsely that a story also depends on its "
                     "batch")
    args = parser.parse_args()
    args.prompt = args.prompt or (REQUEST if args.chat else OPENING)
    return args


def check(args):
    """Raises InputError for settings that cannot work, before anything is loaded."""
    if (args.captions is None) == (args.caption is None):
        raise InputError("give the captions with exactly one of --captions and --caption")
    require_at_least(1, args, "num_return_sequences", "max_tokens", "batch_size")
    check_sampling(args)
    if "{caption}" not in args.prompt:
        raise InputError(f'--prompt "{args.prompt}" has no {{caption}}, so all stories would begin '
                         f'the same')
    if args.savedir:
        savedir = Path(args.savedir)
        refuse_overwriting(
            [("--captions", args.captions), ("--lm", args.lm)],
            [savedir / "stories.txt", savedir / "stories.jsonl", *savedir.glob(PARTS)])


def captions_of(args):
    """A list of (image id or None, caption), without empty captions. Raises InputError."""
    if args.captions:
        captions = read_captions(args.captions)
    else:
        captions = [(None, text) for text in args.caption]
    captions = [(image_id, " ".join(text.split())) for image_id, text in captions]
    captions = [(image_id, text) for image_id, text in captions if text.strip(" .")]
    if not captions:
        raise InputError(f"there is no caption in {args.captions or '--caption'} to continue")
    return captions


def batches_of(prompts, room, args):
    """Batches of rows (room, index of the caption, number of the story, seed).

    room: the tokens that each prompt leaves. Rows share a batch only if they share their room:
    max_tokens, or less with prompts of one length. So a padded batch never needs more positions
    than the model has, and a story's length does not depend on its neighbours. Batches are almost
    in the order of the captions.
    """
    rows, repeats = [], Counter()
    for index, prompt in enumerate(prompts):
        for n in range(args.num_return_sequences):
            seed = seed_of(args.seed, repeats[prompt], n, prompt)
            rows.append((min(room[index], args.max_tokens), index, n, seed))
        repeats[prompt] += 1  # a repeated caption gets different stories
    batches, size = [], args.batch_size
    for _, group in groupby(sorted(rows, key=itemgetter(0)), itemgetter(0)):
        group = list(group)
        batches += [group[start:start + size] for start in range(0, len(group), size)]
    return sorted(batches, key=lambda batch: batch[0][1:3])


def write(model, tokenizer, batch, tokens, prompts, args):
    """The stories of a batch of rows (see batches_of), a list of texts."""
    from antarctic.causal_lm import sample, to_text
    (room, *_), indices, _, seeds = zip(*batch)
    prefixes = [tokens[index] for index in indices]
    samples = sample(model, prefixes, seeds, room, args.temperature, args.top_p)
    openings = ["" if args.chat else prompts[index] for index in indices]
    return [to_text(tokenizer, opening, prefix, new, ended)
            for opening, prefix, (new, ended) in zip(openings, prefixes, samples)]


def finished(part, keys):
    """The stories of the batches that a stopped run has finished: of each a list of texts, as many
    as it has keys. Raises InputError where the part holds something else, sealed as it may be."""
    done = list(read_sealed(part)) if resume(part) else []
    fits = len(done) <= len(keys) and all(
        type(texts) is list and len(texts) == len(batch) and all(type(t) is str for t in texts)
        for texts, batch in zip(done, keys))
    if not fits:
        raise InputError(f"{part} does not hold stories of this run; remove it and rerun the same "
                         "command")
    return done


def print_line(text, must=False):
    """Prints a text as one line at once, and escapes what the terminal cannot show.

    Where standard output is closed, it raises InputError if must is true, else does nothing.
    """
    line = " ".join(map(escape_control, text.split()))  # word by word: escape_control() cuts
    with tqdm.external_write_mode():
        error = print_safely(line)
    if error and must:
        reason = getattr(error, "strerror", None) or error  # a closed stream raises ValueError
        raise InputError(f"the stories cannot be printed ({reason}); --savedir writes them to "
                         f"files") from error


def write_results(savedir, captions, prompts, stories):
    """Writes stories.txt and stories.jsonl.

    stories: {(index of the caption, number of the story): story}.
    """
    by_caption = [[] for _ in captions]
    for (index, _), story in sorted(stories.items()):
        by_caption[index].append(story)
    write_lines(savedir / "stories.txt", [story for texts in by_caption for story in texts])
    with atomic(savedir / "stories.jsonl") as file:
        for (image_id, caption), prompt, texts in zip(captions, prompts, by_caption):
            record = {} if image_id is None else {"image_id": image_id}
            record |= {"caption": caption, "prompt": prompt, "stories": texts}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    check_lines(savedir / "stories.txt", len(stories))
    check_lines(savedir / "stories.jsonl", len(captions))
    # Last, so that a run that is stopped above can resume. This also deletes what runs with other
    # settings left.
    remove(*made_by_runs(savedir, "stories-", ".jsonl.part"))


def main():
    args = parse()
    check(args)
    captions = captions_of(args)
    savedir, device, dtype = start_run(args)
    # torch and transformers take seconds to load; --help and wrong arguments do not wait for them.
    from antarctic.causal_lm import encode, end_tokens, load_lm

    prompts = [fill(args.prompt, text) for _, text in captions]
    config, tokenizer, tokens, room = encode(args.lm, prompts, args.chat)
    ends = end_tokens(tokenizer, args.chat)
    model = load_lm(args.lm, ends, device, dtype, config)
    batches = batches_of(prompts, room, args)
    keys = [[row[1:3] for row in batch] for batch in batches]  # (index of the caption, number)

    done, part = [], None  # stories of the batches that a stopped run has finished
    if savedir:
        settings = [model.identity, tokenizer.digests, tokens, batches, ends, args.chat,
                    str(dtype), args.temperature, args.top_p]
        part = savedir / f"stories-{fingerprint(settings)}.jsonl.part"
        done = on_rank0(lambda: finished(part, keys))
    stories = {key: story for pair in zip(keys, done) for key, story in zip(*pair)}

    rank, world = rank_and_world()
    if rank == 0:
        print_safely(escape_control(f"{args.lm} on {device}, "
                                    f"{str(dtype).removeprefix('torch.')}"), "stderr")
    to_print = deque(sorted(key for batch in keys for key in batch))
    turns = range(len(done), len(batches), world)  # each process writes every world-th batch
    with tqdm(total=len(to_print), initial=len(stories), desc="writing stories", unit="story",
              disable=rank > 0) as bar:
        for start in turns:
            mine = batches[start + rank:start + rank + 1]  # one batch, or none in the last turn
            new = gather_lists([write(model, tokenizer, batch, tokens, prompts, args)
                                for batch in mine])
            for pair in zip(keys[start:], new):
                stories.update(zip(*pair))
            if savedir and rank == 0:
                append(part, b"".join(map(seal, new)))
            bar.update(sum(map(len, new)))
            while not savedir and rank == 0 and to_print and to_print[0] in stories:
                print_line(stories[to_print.popleft()], must=True)
    if savedir and rank == 0:
        write_results(savedir, captions, prompts, stories)
        print_line(f"wrote {len(stories)} stories of {len(captions)} captions to "
                   f"{savedir / 'stories.txt'} and stories.jsonl")


if __name__ == "__main__":
    run(main)
