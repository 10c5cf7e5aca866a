"""Goes on from captions to little stories, by a causal language model.

    python stories.py --captions results/captions.json --savedir results
    python stories.py --caption "a red dog" "a whale by a lighthouse" --lm snowglobe/weights/gpt --num_return_sequences 3
"""

from processes import InputError, gather, held, process, run, shown  # first, see there

import argparse
import json
import math
import re
import sys
from collections import Counter
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from tqdm import tqdm

from generation import nucleus
from utils import atomic, choose_device, choose_dtype, locked, one_line, output_folder, read_text, seed_of, write_lines


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # The captions: one of two.
    parser.add_argument("--captions", metavar="FILE", help="captions.json (COCO's results format) or details.jsonl of "
                        "sampler.py, or any other file as a text of one caption a line; empty captions are skipped")
    parser.add_argument("--caption", nargs="+", metavar="TEXT", help="captions given directly instead")
    # What is made of them, and where it goes.
    parser.add_argument("--prompt", default="Once upon a time there was {caption}", help="what a story begins with; a caption "
                        "stands in it without its last period, and its A, An or The is small there (default: %(default)s)")
    parser.add_argument("--savedir", help="folder for stories.txt (one a line) and stories.jsonl (default: stories are printed)")
    # The model and the sampling.
    parser.add_argument("--lm", default="EleutherAI/gpt-neo-1.3B", help="hub id or folder of a causal language model, such as "
                        "EleutherAI/gpt-neo-125m, gpt-neo-1.3B, gpt-neo-2.7B, EleutherAI/gpt-j-6b (default %(default)s)")
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


def read_captions(path):
    """(image id, or None where there is none; caption) for each caption of a file. Raises InputError where it holds none.

    .json: a list of {"image_id", "caption"}. .jsonl: such an object a line; other keys are ignored. Else: a caption a line.
    """
    path = Path(path)
    text = read_text(path, "captions file")
    if path.suffix not in (".json", ".jsonl"):
        return [(None, one_line(line, path)) for line in text.split("\n")]
    try:
        parts = [text] if path.suffix == ".json" else [f"[{line}]" for line in text.split("\n")]
        return [(record.get("image_id"), one_line(record["caption"], path)) for part in parts for record in json.loads(part)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} does not hold captions as sampler.py writes them in {path.suffix} files") from error


def fill(template, caption):
    """The prompt: the caption in place of {caption}, fit for the middle of a sentence. Other braces stay as they are."""
    first, *rest = caption.rstrip(" .").split()
    if first in ("A", "An", "The") and not template.startswith("{caption}"):  # another word's capital may be a name's
        first = first.lower()
    prompt = template.replace("{caption}", " ".join([first, *rest]))
    return prompt.encode("utf-8", "replace").decode()  # tokenizers refuse bytes of a command line that are no UTF-8


def encode(name, prompts):
    """The tokenizer of the causal language model, each prompt's token ids, and how many tokens the model can set behind each.

    No weights are read yet. Raises InputError: the model is missing or of another kind, or a prompt leaves no room.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from model import load, load_tokenizer
    config = load(AutoConfig, name, "language model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise InputError(f"{name} is a {config.model_type}, which cannot go on from a text as a causal language model does")
    tokenizer = load_tokenizer(name, "language model")
    tokens = tokenizer(prompts)["input_ids"]
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf  # some kinds have no end
    longest = max(range(len(prompts)), key=lambda i: len(tokens[i]))
    if len(tokens[longest]) >= positions:
        raise InputError(f'the prompt "{prompts[longest][:60]}..." has {len(tokens[longest])} tokens, but the language model '
                         f"{name} reads and writes {positions} at most")
    return tokenizer, tokens, [positions - len(ids) for ids in tokens]


def load_lm(name, end, device, dtype):
    """The causal language model; its generate() stops a row at the token id `end` and does nothing that is not asked of it."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from model import load
    model = load(AutoModelForCausalLM, name, "language model", dtype=dtype).to(device).eval()
    # In place of the model's own, which may hold penalties. GPT-2 has no token to pad with; as padding is masked, any will do.
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end or 0)
    return model


@torch.inference_mode()
def sample(model, prompts, seeds, n, temperature=1.0, top_p=1.0):
    """Goes on from each prompt by at most n tokens, drawn from the nucleus.

    model: of load_lm. prompts: B lists of token ids. seeds: B integers. Returns B pairs: the list of new token ids, without
    the end token, and whether there was one. Each row has random numbers of its own, so its neighbours do not matter. They
    are drawn in a logits processor, which leaves the row one possible token; all else (positions, cache, stopping) is
    generate()'s, for any architecture.
    """
    width, end = max(map(len, prompts)), model.generation_config.eos_token_id
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long, device=model.device)  # (B, width) each, padded on the left
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt):] = torch.tensor(prompt)
        mask[row, width - len(prompt):] = 1
    generators = [torch.Generator(model.device).manual_seed(seed) for seed in seeds]

    def draw(_, logits):
        p, order = nucleus(logits / temperature, top_p)  # (B, K), (B, K)
        drawn = torch.stack([row.multinomial(1, generator=generator) for row, generator in zip(p, generators)])  # (B, 1)
        return torch.full_like(logits, -math.inf).scatter_(1, order.gather(1, drawn), 0)

    found = model.generate(ids, attention_mask=mask, logits_processor=[draw], do_sample=False, max_new_tokens=n)
    return [(row[:row.index(end)], True) if end in row else (row, False) for row in found[:, width:].tolist()]


def tell(tokenizer, prompt, ids, new, ended):
    """The text of a story. One that was broken off ends at its last full sentence, if it has one behind the prompt."""
    # Some tokenizers lose the space before new where it stands alone.
    begun, whole = (tokenizer.decode(t, skip_special_tokens=True, clean_up_tokenization_spaces=False) for t in (ids, ids + new))
    more = whole[len(begun):]
    if not ended:
        stops = [match.end() for match in re.finditer(r"""[.!?]["'”’)]*(?=\s|$)""", more)]
        more = more[:stops[-1]] if stops else more.rstrip("\ufffd")  # the start of a character
    return prompt + more


def main():
    args = parse()
    check(args)
    captions = read_captions(args.captions) if args.captions else [(None, text) for text in args.caption]
    captions = [(image_id, " ".join(text.split())) for image_id, text in captions]
    captions = [(image_id, text) for image_id, text in captions if text.strip(" .")]
    if not captions:
        raise InputError(f"there is no caption in {args.captions or '--caption'}, so there is nothing to go on from")
    savedir = output_folder(args.savedir) if args.savedir else None
    if savedir:
        held.enter_context(locked(savedir / ".lock"))
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    prompts = [fill(args.prompt, text) for _, text in captions]
    tokenizer, tokens, room = encode(args.lm, prompts)
    room = [min(space, args.max_tokens) for space in room]
    model = load_lm(args.lm, tokenizer.eos_token_id, device, dtype)
    rank, world = process()
    if rank == 0:
        print(f"{args.lm} on {device}, {str(dtype).removeprefix('torch.')}", file=sys.stderr)

    # The rows to write: room, place of the caption, number of the story, seed. A caption that comes again gets other stories.
    rows, seen = [], Counter()
    for place, prompt in enumerate(prompts):
        rows += [(room[place], place, n, seed_of(args.seed, seen[prompt], n, prompt)) for n in range(args.num_return_sequences)]
        seen[prompt] += 1
    # Rows share a batch only if they share their room: max_tokens, or less with prompts of one length. So a padded batch
    # never needs more positions than there are, and no story is shorter for its neighbours.
    batches = []
    for _, group in groupby(sorted(rows, key=itemgetter(0)), itemgetter(0)):
        group = list(group)
        batches += [group[start:start + args.batch_size] for start in range(0, len(group), args.batch_size)]

    mine = []  # (place of the caption, number of the story, story) of every world-th batch
    for batch in tqdm(batches[rank::world], "writing stories", unit="batch", disable=rank > 0):
        (space, *_), places, numbers, seeds = zip(*batch)
        found = sample(model, [tokens[place] for place in places], seeds, space, args.temperature, args.top_p)
        for place, number, (new, ended) in zip(places, numbers, found):
            mine.append((place, number, tell(tokenizer, prompts[place], tokens[place], new, ended)))
    stories = [[] for _ in prompts]
    for place, _, story in sorted(gather(mine)):
        stories[place].append(story)
    if rank > 0:
        return

    lines = [" ".join(story.split()) for told in stories for story in told]
    if savedir is None:
        print("\n".join(map(shown, lines)))
        return
    write_lines(savedir / "stories.txt", lines)
    with atomic(savedir / "stories.jsonl") as file:
        for (image_id, caption), prompt, told in zip(captions, prompts, stories):
            known = {} if image_id is None else {"image_id": image_id}
            file.write(json.dumps(known | {"caption": caption, "prompt": prompt, "stories": told}, ensure_ascii=False) + "\n")
    print(f"wrote {len(lines)} stories of {len(captions)} captions to {savedir / 'stories.txt'} and stories.jsonl")


if __name__ == "__main__":
    run(main)
