"""Captions images: each one's table, candidates from the language model, CLIP's choice.

    python sampler.py --images photo.jpg
    python sampler.py --datadir coco --textfile cache.txt --embfile cache.npy --savedir results \\
        --ckpt checkpoints/best.safetensors
    python sampler.py --images photos/ --textfile cache.txt mine.txt --embfile cache.npy mine.npy \\
        --do_sample --num_return_sequences 100 --top_p 0.9 --sidecar

Without --textfile and --ckpt it takes cache.txt, cache.npy and checkpoints/best.safetensors, or
what ./download.sh --original puts into original/. Rerun the same command to resume a stopped run.
"""

import argparse
import hashlib
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from antarctic.datasets import read_split
from antarctic.distributed import gather_lists, on_rank0, rank_and_world, warn
from antarctic.errors import InputError, counted, escape_control, print_safely
from antarctic.files import append, file_sha256, fingerprint, output_folder, read_words
from antarctic.folders import IMAGE_SUFFIXES, list_images, read_paths
from antarctic.results import check_sidecars, write_results, write_sidecars
from antarctic.runtime import run
from antarctic.sealed import resume, seal
from utils import (
    Decoding,
    add_cache_flags,
    add_clip_flag,
    add_device_flags,
    add_lm_flag,
    add_sampling_flags,
    find_inputs,
    require_at_least,
    start_run,
)

ON_SCREEN = 20  # captions


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("images: one of three")
    group.add_argument("--datadir", metavar="DIR", help="data set in one of the layouts of "
                       "docs/data.md: COCO's, Karpathy's, nocaps, tar shards ...")
    group.add_argument("--split", metavar="NAME", help="split of --datadir (default: val2017, or "
                       "what the layout calls it)")
    group.add_argument("--images", nargs="+", metavar="PATH", help="image files, folders (with "
                       "subfolders) and patterns")
    group.add_argument("--images_from", metavar="FILE", help="list of such paths, one a line or, "
                       "as of find -print0, with a NUL behind each; -: standard input")
    group.add_argument("--max_pixels", type=int, default=64_000_000, help="pixels of an image at "
                       "most; larger ones are skipped (default %(default)s, which reading needs 1 "
                       "GB of memory for: 16 bytes a pixel)")
    group.add_argument("--truncated", action="store_true", help="read JPEGs and PNGs that are cut "
                       "off as far as they go, the rest grey, instead of skipping them")
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
    group = parser.add_argument_group("candidates")
    group.add_argument("--num_beams", type=int, default=3, help="width of beam search (default "
                       "%(default)s)")
    group.add_argument("--num_return_sequences", type=int, default=3, help="candidates per image; "
                       "beam search has at most --num_beams (default %(default)s)")
    group.add_argument("--do_sample", action="store_true", help="sample instead of beam search")
    add_sampling_flags(group, when=", with --do_sample")
    group.add_argument("--lm_weight", type=float, default=0.0, help="weight of the language "
                       "model's mean log-probability per token beside CLIP's cosine in the choice "
                       "(default %(default)s: CLIP alone)")
    group = parser.add_argument_group("results")
    group.add_argument("--savedir", default="results", metavar="DIR", help="folder for preds.txt, "
                       "ref0.txt ..., captions.json, details.jsonl and gallery.html, whose earlier "
                       "ones are replaced (default %(default)s)")
    group.add_argument("--csv", action="store_true", help="also write captions.csv")
    group.add_argument("--sidecar", action="store_true", help="also write each caption beside its "
                       "image: dog.txt for dog.jpg")
    group.add_argument("--overwrite", action="store_true", help="let --sidecar replace .txt files")
    group.add_argument("--features", metavar="DIR", help="folder where image features are kept for "
                       "later runs (default: --savedir)")
    group.add_argument("--gallery", type=int, default=200, help="images on gallery.html at most "
                       "(default %(default)s)")
    group = parser.add_argument_group("computation")
    group.add_argument("--batch_size", type=int, default=16, help="images per batch, per process "
                       "(default %(default)s)")
    add_device_flags(group)
    return parser.parse_args()


def check(args):
    """The Decoding. Raises InputError for settings that cannot work, before anything is loaded."""
    sources = [args.datadir, args.images, args.images_from]
    if sum(source is not None for source in sources) != 1:
        raise InputError("exactly one of --datadir, --images and --images_from says what is "
                         "captioned")
    require_at_least(1, args, "topk", "batch_size", "max_pixels")
    require_at_least(0, args, "gallery")
    ignored = [f"--{name}" for name in ("temperature", "top_p")
               if getattr(args, name) != 1 and not args.do_sample]
    ignored += ["--overwrite"] * (args.overwrite and not args.sidecar)
    if ignored:
        warn(f"{' and '.join(ignored)} do nothing without --do_sample or --sidecar")
    decoding = Decoding(**{name: getattr(args, name) for name in Decoding.__dataclass_fields__})
    find_inputs(args)
    return decoding


def name_of_run(args, model, features, pictures):
    """The fingerprint of everything that determines the results. Runs of one name can resume from
    one another."""
    from antarctic.checkpoints import trained_sha256
    captioner = model.captioner
    weights = [captioner.identity, args.ckpt and trained_sha256(args.ckpt, captioner),
               str(captioner.dtype)]
    words = [model.entries, [Path(path).stat().st_mtime_ns for path in args.embfile],
             args.index and file_sha256(args.index), model.banned and model.banned.lines]
    settings = [model.topk, captioner.maxlen_enc, captioner.maxlen_dec, asdict(model.decoding),
                args.batch_size]
    images = [hashlib.sha256(features.numpy().tobytes()).hexdigest(),
              [(picture.id, str(picture.path)) for picture in pictures]]
    return fingerprint([weights, words, settings, images])


def record_of(picture, result):
    """A line of details.jsonl. result: the picture's model.Caption."""
    return {"image_id": picture.id, "file": str(picture.path), **result._asdict()}


def caption_all(model, features, pictures, part, args):
    """Captions the pictures that part has no record of, and appends their records to it.

    features: float32 (n, dim), of n pictures. Each process captions every world-th batch. Returns
    seconds per image.
    """
    rank, world = rank_and_world()
    done = on_rank0(lambda: resume(part, args.batch_size, len(pictures)))
    start_time = time.perf_counter()
    with tqdm(total=len(pictures), initial=done, desc="captioning", unit="image",
              disable=rank > 0) as bar:
        for start in range(done, len(pictures), args.batch_size * world):
            batch = slice(start + rank * args.batch_size, start + (rank + 1) * args.batch_size)
            tables = model.tables(features[batch])
            candidates = model.candidates(tables, [picture.id for picture in pictures[batch]])
            captions = model.choose(features[batch], tables, candidates)
            records = gather_lists(list(map(record_of, pictures[batch], captions)))
            if rank == 0:
                append(part, b"".join(map(seal, records)))
                if args.sidecar:  # now, so that a stop keeps them
                    write_sidecars(records, args.overwrite)
            bar.update(len(records))
    return (time.perf_counter() - start_time) / max(1, len(pictures) - done)


def report(records, empty, left, seconds, args):
    """Prints where the results are, and the first captions of a user's own images.

    records, empty: see write_results. left: see write_sidecars. seconds: per image.
    """
    for path, reason in list(left.items())[:ON_SCREEN]:
        print_safely(f"left {escape_control(path)} as it is: {escape_control(reason)}", "stderr")
    if len(left) > ON_SCREEN:
        print_safely(f"... and {len(left) - ON_SCREEN:,} more .txt files", "stderr")
    if empty:
        print_safely(f"an empty caption for {counted(empty, 'image')}: every candidate held a "
                     f"banned word", "stderr")
    if args.images:
        for record in records[:ON_SCREEN]:
            print_safely(f"{escape_control(record['file'])}: {escape_control(record['caption'])}")
        if len(records) > ON_SCREEN:
            path = escape_control(Path(args.savedir) / "preds.txt")
            print_safely(f"... and {len(records) - ON_SCREEN:,} more in {path}")
    files = ["preds.txt", "captions.json", "details.jsonl", *["captions.csv"] * args.csv]
    print_safely(f"captioned {counted(len(records), 'image')} ({seconds:.3f} s each); wrote "
                 f"{', '.join(files)} and gallery.html to {escape_control(args.savedir)}")


def main():
    args = parse()
    decoding = check(args)
    if args.images_from:
        args.images = on_rank0(lambda: read_paths(args.images_from))
    pictures = list_images(args.images) if args.images else read_split(args.datadir, args.split)
    only, ban = (path and read_words(path) for path in (args.only, args.ban))
    savedir, device, dtype = start_run(args)
    # torch and transformers take seconds to load, so they wait until the arguments are checked.
    from antarctic.features import image_features, report_bad_images
    from model import Model

    model = Model.load(args.clip_model, args.lm, args.ckpt or "none", args.textfile, args.embfile,
                       args.index, only, ban, args.topk, device=device, dtype=dtype,
                       **asdict(decoding))
    rank, _ = rank_and_world()
    if rank == 0:
        print_safely(escape_control(f"{model}, with {args.ckpt or 'no checkpoint: as pretrained'}"))
    reading = {"max_pixels": args.max_pixels, "truncated": args.truncated}
    if args.sidecar:  # before hours of encoding; a file that is no image is passed over below
        check_sidecars([p for p in pictures if p.path.suffix.lower() in IMAGE_SUFFIXES])
    features, pictures, bad = image_features(model.clip, pictures,
                                             output_folder(args.features or savedir), **reading)
    if not pictures:
        report_bad_images(bad)
        raise InputError("none of the images can be read")
    if args.sidecar:
        check_sidecars(pictures)

    name = on_rank0(lambda: name_of_run(args, model, features, pictures))
    part = savedir / f"details-{name}.jsonl.part"
    seconds = caption_all(model, features, pictures, part, args)
    if rank == 0:
        records, empty = write_results(savedir, part, pictures, args.gallery, args.csv,
                                       **reading)
        left = write_sidecars(records, args.overwrite) if args.sidecar else {}
        report_bad_images(bad)
        report(records, empty, left, seconds, args)


if __name__ == "__main__":
    run(main)
