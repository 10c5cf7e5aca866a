"""Captions a COCO split, or any images: table, candidates from the language model, CLIP picks the best one.

    python sampler.py --images photo.jpg
    python sampler.py --datadir coco --textfile cache.txt --embfile cache.npy --savedir results --ckpt checkpoints/best.safetensors
    python sampler.py --images photos/ --textfile cache.txt mine.txt --embfile cache.npy mine.npy --savedir results \\
        --ckpt checkpoints/best.safetensors --do_sample --num_return_sequences 100 --top_p 0.9 --sidecar

Where no cache and no checkpoint are named, it takes cache.txt, cache.npy and
checkpoints/best.safetensors, or what ./download.sh --original puts into original/. A run that was
stopped goes on where it was when the same command is given again.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import re
import sys
import time
from collections import Counter
from itertools import count, takewhile
from pathlib import Path

from tqdm import tqdm

from antarctic.cache import read_cache, search
from antarctic.datasets import list_images, read_coco
from antarctic.distributed import gather_lists, on_rank0, rank_and_world
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import (
    TEXT,
    append,
    atomic,
    file_sha256,
    locked,
    output_folder,
    read_lines,
    write_json,
    write_lines,
    writing,
)
from antarctic.gallery import write_gallery
from antarctic.images import report_bad_images
from antarctic.index import open_index
from antarctic.runtime import cleanup, run
from utils import choose_device, choose_dtype, find_inputs, linearize, seed_of

SHOWN = 20  # captions on the screen


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # What is captioned: one of two.
    parser.add_argument("--datadir", help="folder in COCO's layout (annotations/, val2017/)")
    parser.add_argument("--split", default="val2017", help="split of --datadir (default %(default)s)")
    parser.add_argument("--images", nargs="+", metavar="PATH", help="image files, folders (with subfolders) and "
                        "patterns instead")
    # What it is captioned with, and where results go.
    parser.add_argument("--textfile", nargs="+", help="entries of the cache, or of several caches "
                        "(.txt; default: cache.txt, else the original's)")
    parser.add_argument("--embfile", nargs="+", help="their embeddings (.npy), in the same order "
                        "(default: the .npy beside --textfile)")
    parser.add_argument("--index", metavar="FILE", help="index of compute_cache.py through which its cache is searched, "
                        "approximately (default: every cache exactly)")
    parser.add_argument("--savedir", default="results", help="folder for preds.txt, ref0.txt ..., "
                        "captions.json, details.jsonl, gallery.html (default %(default)s)")
    parser.add_argument("--ckpt", help="checkpoint of trainer.py, or a .ckpt of the original; "
                        "none: the language model writes as it was pretrained (default: "
                        "checkpoints/best.safetensors, else the original's)")
    parser.add_argument("--only", metavar="FILE", help="use only those entries of the caches that are lines of this file")
    parser.add_argument("--ban", metavar="FILE", help="leave out entries and captions that hold a line of this file, as whole "
                        "words in any case")
    parser.add_argument("--csv", action="store_true", help="write captions.csv, too")
    parser.add_argument("--sidecar", action="store_true", help="write each caption beside its image, too: dog.jpg gets dog.txt")
    parser.add_argument("--overwrite", action="store_true", help="let --sidecar replace .txt files that are there")
    parser.add_argument("--features", help="folder where image features are kept for later runs (default: --savedir)")
    parser.add_argument("--gallery", type=int, default=200, help="images shown in gallery.html at most (default %(default)s)")
    # The models.
    parser.add_argument("--clip_model", default="ViT-B/16", help="OpenAI's name or .pt file, hub id or folder of a CLIP or "
                        "SigLIP (default %(default)s)")
    parser.add_argument("--lm", default="facebook/bart-large", help="hub id or folder of a BART (default %(default)s)")
    parser.add_argument("--topk", type=int, help="entries in a table (default: as in training, 10 "
                        "with --ckpt none)")
    # The candidates.
    parser.add_argument("--num_beams", type=int, default=3, help="width of beam search (default %(default)s)")
    parser.add_argument("--num_return_sequences", type=int, default=3, help="candidates an image (default %(default)s)")
    parser.add_argument("--do_sample", action="store_true", help="sample the candidates in place of beam search")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (default %(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, help="probability mass of nucleus sampling (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default %(default)s)")
    parser.add_argument("--lm_weight", type=float, default=0.0, help="weight of the language model's mean log-probability a "
                        "token beside CLIP's cosine in the choice of the best (default %(default)s: CLIP alone)")
    # How it is computed.
    parser.add_argument("--batch_size", type=int, default=16, help="images a batch, of each process (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="arithmetic of the language "
                        "model; auto: bfloat16 on a GPU that has it, else float32 (default %(default)s)")
    args = parser.parse_args()
    if (args.datadir is None) == (args.images is None):
        raise InputError("exactly one of --datadir and --images says what is captioned")
    return args


def check(args):
    """Raises InputError for settings that cannot work, before anything is loaded."""
    for name in ("topk", "num_beams", "num_return_sequences", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.gallery < 0:
        raise InputError(f"--gallery must be at least 0, not {args.gallery}")
    if not args.do_sample and args.num_return_sequences > args.num_beams:
        raise InputError(f"beam search of width {args.num_beams} cannot return {args.num_return_sequences} candidates; "
                         f"raise --num_beams, or give --do_sample")
    if not 0 < args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise InputError(f"--temperature must be above 0 and --top_p in (0, 1], not {args.temperature} and {args.top_p}")
    find_inputs(args)
    if not math.isfinite(args.lm_weight):
        raise InputError(f"--lm_weight must be a number, not {args.lm_weight}")


def restrict(entries, embeddings, only, banned):
    """The entries, and their Embeddings, that --only and --ban leave. only: a list or None; banned: a pattern or None."""
    if only and (missing := set(only).difference(entries)):
        raise InputError(f'{len(missing)} lines of --only, such as "{min(missing)}", are in no cache; compute_cache.py --add puts '
                         f"them into one")
    only = set(only or entries)
    rows = [i for i, entry in enumerate(entries) if entry in only and not (banned and banned.search(entry))]
    if not rows:
        raise InputError("--ban leaves no entry")
    return [entries[i] for i in rows], embeddings.only(rows)


def whole_words(lines):
    """A pattern that finds any of the lines as whole words, in any case."""
    return re.compile(r"(?<!\w)(?:%s)(?!\w)" % "|".join(map(re.escape, lines)), re.IGNORECASE)


def check_sidecars(pictures, overwrite):
    """Raises InputError where two pictures would share a .txt file, or where one is there and must stay."""
    paths = [picture.path.with_suffix(".txt") for picture in pictures]
    if len(set(paths)) < len(paths):
        [(twice, _)] = Counter(paths).most_common(1)
        raise InputError(f"two images would have the same --sidecar {twice}; rename one of them")
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        raise InputError(f"{len(there)} files that --sidecar would write are there, such as {there[0]}; --overwrite replaces them")


def is_record(line, picture):
    """Whether a line is a record of the picture, as record_of makes it, and not what a kill or a crash left of one."""
    try:
        record = json.loads(line.decode())  # of bytes, it would guess the encoding
        texts = [record["caption"], *(entry for entry, _ in record["table"]), *(text for text, _, _ in record["candidates"])]
        numbers = [record["score"], *(n for _, n in record["table"]), *(n for _, *both in record["candidates"] for n in both)]
        return (line.endswith(b"\n") and record["image_id"] == picture.id and record["file"] == str(picture.path)
                and len(record["table"]) > 0 and all(isinstance(t, str) for t in texts) and all(isinstance(n, float) for n in numbers))
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def kept_records(part, pictures, batch_size):
    """Cuts what a stopped run wrote down to the whole batches of these pictures. Returns how many pictures that are."""
    sizes = []
    with writing(part), open(part, "ab+") as file:
        file.seek(0)
        for picture, line in zip(pictures, file):
            if not is_record(line, picture):
                break
            sizes.append(len(line))
        done = len(sizes) if len(sizes) == len(pictures) else len(sizes) // batch_size * batch_size
        file.truncate(sum(sizes[:done]))
    return done


def without_banned(captioner, banned, candidates, table, seed):
    """The candidates without a banned word; where none is left, samples without one; where there are none, no candidate."""
    for attempt in range(10):
        if attempt:
            candidates = captioner.sample(table, 100, seed=seed + attempt)
        if clean := [candidate for candidate in candidates if not banned.search(candidate[0])]:
            return clean
    return []


def write_candidates(captioner, tables, seeds, banned, args):
    """{text: likelihood} of each table's candidates. tables: B lists of entries. seeds: B integers, for sampling."""
    tokens = captioner.tokenize(map(linearize, tables), captioner.maxlen_enc)
    if args.do_sample:
        dials = args.num_return_sequences, args.temperature, args.top_p
        found = [captioner.sample(ids, *dials, seed) for ids, seed in zip(tokens, seeds)]
    else:
        found = captioner.beam(tokens, args.num_beams, args.num_return_sequences)
    if banned:
        found = [without_banned(captioner, banned, *each) for each in zip(found, tokens, seeds)]
    ordered = [sorted(candidates, key=lambda c: c[1]) for candidates in found]  # of a text that comes twice the likelier one stays
    return [{text: likelihood for text, likelihood, *_ in candidates} for candidates in ordered]


def record_of(picture, table, scores, candidates, cosines, lm_weight):
    """A line of details.jsonl: the picture's caption with all that it came from. candidates: {text: likelihood}; cosines in its
    order."""
    ranked = sorted(((text, round(cosine, 5), round(likelihood, 5)) for (text, likelihood), cosine in zip(candidates.items(), cosines)),
                    key=lambda c: (-c[1] - lm_weight * c[2], -c[2]))  # CLIP cannot tell some apart: then the likelier one
    best, score = ranked[0][:2] if ranked else ("", 0.0)
    return {"image_id": picture.id, "file": str(picture.path), "caption": best, "score": score,
            "table": [(entry, round(s, 5)) for entry, s in zip(table, scores)], "candidates": ranked}


def write_results(savedir, part, pictures, args):
    """preds.txt, ref*.txt, captions.json (COCO results), gallery.html and what else was asked for, from the records in part.
    Returns a dict with the caption and score of each image, and how many have no candidate."""
    records, pictured, empty = [], [], 0
    with open(part, **TEXT) as file:
        for line in file:
            record = json.loads(line)
            pictured += [record] * (len(pictured) < args.gallery)
            empty += not record["candidates"]
            records.append({name: record[name] for name in ("image_id", "file", "caption", "score")})
    write_lines(savedir / "preds.txt", [r["caption"] for r in records])
    references = [p.captions for p in pictures]
    for i in range(min(map(len, references))):
        write_lines(savedir / f"ref{i}.txt", [told[i] for told in references])
    # What an earlier run of other images or flags left here would be taken for this one's.
    later = takewhile(Path.exists, (savedir / f"ref{i}.txt" for i in count(min(map(len, references)))))
    for stale in [*later, *([] if args.csv else [savedir / "captions.csv"])]:
        stale.unlink(missing_ok=True)
    write_json(savedir / "captions.json", [{"image_id": r["image_id"], "caption": r["caption"]} for r in records])
    if args.csv:
        with atomic(savedir / "captions.csv") as file:
            writer = csv.DictWriter(file, ("image_id", "file", "caption", "score"))
            writer.writeheader()
            writer.writerows(records)
    if args.sidecar:
        for picture, record in zip(pictures, records):
            write_lines(picture.path.with_suffix(".txt"), [record["caption"]])
    remark = f"{len(records)} images"
    if len(pictured) < len(records):
        remark += f", the first {len(pictured)} of them"
    section = "Captions", remark, pictured, references
    write_gallery(savedir / "gallery.html", "Captions", [section])
    os.replace(part, savedir / "details.jsonl")  # last: until here a stopped run goes on
    for abandoned in savedir.glob("details-*.jsonl.part"):  # of runs with other settings
        abandoned.unlink()
    return records, empty


def report(records, empty, bad, seconds, args):
    """Tells of a run whose results are written; of a user's own images the first captions, too.

    records, empty: see write_results. bad: images that could not be read. seconds: an image took.
    """
    report_bad_images(bad)
    if empty:
        print(f"{empty} images have an empty caption: every candidate held a banned word",
              file=sys.stderr)
    if args.images:
        for record in records[:SHOWN]:
            print_safely(f"{escape_control(record['file'])}: {escape_control(record['caption'])}")
        if len(records) > SHOWN:
            path = escape_control(Path(args.savedir) / "preds.txt")
            print_safely(f"... and {len(records) - SHOWN:,} more in {path}")
    print_safely(f"captioned {len(records)} images ({seconds:.3f} s an image); wrote preds.txt, "
        f"captions.json, details.jsonl and {escape_control(Path(args.savedir) / 'gallery.html')}")


def main():
    args = parse()
    check(args)
    pictures = list_images(args.images) if args.images else read_coco(args.datadir, args.split)
    only, ban = (path and read_lines(path, "list of words") for path in (args.only, args.ban))
    if [] in (only, ban):
        raise InputError(f"there is no word in {args.only if only == [] else args.ban}")
    banned = ban and whole_words(ban)
    savedir = output_folder(args.savedir)
    cleanup.enter_context(locked(savedir / ".lock"))
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    from antarctic.checkpoints import checkpoint_settings, load_checkpoint, trained_sha256
    from antarctic.features import image_features
    from model import Captioner, Clip, rescore

    # The models. The checkpoint knows the table and the lengths that it was trained with.
    settings = checkpoint_settings(args.ckpt) if args.ckpt else {"topk": 10, "maxlen_enc": 128, "maxlen_dec": 32}
    topk = args.topk or settings["topk"]
    clip = Clip(args.clip_model, device)
    entries, embeddings = read_cache(args.textfile, args.embfile, clip.identity, clip.dim)
    if only or banned:
        entries, embeddings = restrict(entries, embeddings, only, banned)
    find = open_index(args.index, embeddings).search if args.index else search
    captioner = Captioner(args.lm, device, dtype, settings["maxlen_enc"], settings["maxlen_dec"])
    if args.ckpt:
        load_checkpoint(args.ckpt, captioner)
    rank, world = rank_and_world()
    if rank == 0:
        print_safely(escape_control(f"{captioner.identity} on {device}, {str(dtype).removeprefix('torch.')}, "
                  f"with {args.ckpt or 'no checkpoint: as pretrained'}"))

    if args.sidecar:  # those that a stopped run has written are its own
        check_sidecars(pictures, args.overwrite or any(savedir.glob("details-*.jsonl.part")))
    features, pictures, bad = image_features(clip, pictures, output_folder(args.features or savedir))
    if not pictures:
        report_bad_images(bad)
        raise InputError("none of the images can be read")

    # What a stopped run of the same images and settings has written is kept.
    trained = args.ckpt and trained_sha256(args.ckpt, captioner)
    decides = [captioner.identity, trained, captioner.maxlen_enc, captioner.maxlen_dec, topk,
               entries, args.index and file_sha256(args.index),
               [Path(path).stat().st_mtime_ns for path in args.embfile],
               hashlib.sha256(features.numpy().tobytes()).hexdigest(), banned and banned.pattern,
               str(dtype), args.num_beams, args.num_return_sequences, args.do_sample,
               args.temperature, args.top_p, args.seed, args.lm_weight, args.batch_size]
    part = savedir / f"details-{on_rank0(lambda: hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16])}.jsonl.part"
    done = on_rank0(lambda: kept_records(part, pictures, args.batch_size))

    # For each batch the tables (each image's nearest entries), the candidates, and CLIP's choice.
    start_time = time.perf_counter()
    with tqdm(total=len(pictures), initial=done, desc="captioning", unit="image", disable=rank > 0) as bar:
        for start in range(done, len(pictures), args.batch_size * world):
            batch = slice(start + rank * args.batch_size, start + (rank + 1) * args.batch_size)
            records = []
            if pictures[batch]:
                scores, indices = find(features[batch], embeddings, topk)  # (B, k), (B, k)
                tables = [[entries[i] for i in row] for row in indices.tolist()]
                found = write_candidates(captioner, tables, [seed_of(args.seed, p.id) for p in pictures[batch]], banned, args)
                matches = rescore(clip, features[batch], found)
                records = [record_of(*each, args.lm_weight) for each in zip(pictures[batch], tables, scores.tolist(), found, matches)]
            records = gather_lists(records)
            if rank == 0:
                lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                append(part, lines.encode(errors=TEXT["errors"]))
            bar.update(len(records))
    if rank > 0:
        return

    seconds = (time.perf_counter() - start_time) / max(1, len(pictures) - done)
    report(*write_results(savedir, part, pictures, args), bad, seconds, args)


if __name__ == "__main__":
    run(main)
