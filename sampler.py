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
import re
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from antarctic.batches import FIRST, batch_sizes
from antarctic.datasets import read_split
from antarctic.distributed import gather_lists, on_rank0, rank_and_world, warn
from antarctic.errors import InputError, counted, escape_control, print_safely
from antarctic.files import fingerprint, output_folder
from antarctic.flags import (
    CAPTIONING,
    add_captioner_flags,
    add_decoding_flags,
    add_device_flags,
    require_at_least,
    size_or_auto,
)
from antarctic.folders import IMAGE_SUFFIXES, list_images, read_paths
from antarctic.records import Records
from antarctic.results import write_results
from antarctic.runtime import run
from antarctic.texts import read_words
from utils import Decoding, find_inputs, start_run

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
    add_captioner_flags(parser)
    add_decoding_flags(parser.add_argument_group("candidates"))
    group = parser.add_argument_group("results")
    group.add_argument("--savedir", default="results", metavar="DIR", help="folder for preds.txt, "
                       "ref0.txt ..., captions.json, details.jsonl and gallery.html, whose earlier "
                       "ones are replaced (default %(default)s)")
    group.add_argument("--csv", action="store_true", help="also write captions.csv")
    group.add_argument("--gallery", type=int, default=200, help="images on gallery.html at most; "
                       "those of more than 500 lie in gallery_files/ (default %(default)s)")
    group.add_argument("--where", action="store_true", help="also keep, and show on gallery.html, "
                       "where in the image CLIP's score of each entry came from")
    group.add_argument("--features", metavar="DIR", help="folder where image features are kept for "
                       "later runs (default: --savedir)")
    group = parser.add_argument_group("captions beside the images, for training on them")
    group.add_argument("--sidecar", action="store_true", help="write dog.txt beside dog.jpg; "
                       "images that have one are left alone")
    group.add_argument("--sidecar_suffix", default=".txt", metavar="SUFFIX", help="of these files, "
                       "such as .caption (default %(default)s)")
    group.add_argument("--metadata", action="store_true", help="add lines to the metadata.jsonl in "
                       "the folder of all images, which load_dataset('imagefolder') reads")
    group.add_argument("--shards", metavar="DIR", help="folder for WebDataset shards of the images "
                       "with their captions")
    group.add_argument("--caption_prefix", default="", metavar="TEXT", help="text before each "
                       "caption in these three, such as 'ohwx dog, ' (default: none)")
    group.add_argument("--caption_suffix", default="", metavar="TEXT", help="text behind it "
                       "(default: none)")
    group.add_argument("--overwrite", action="store_true", help="caption images anew that have a "
                       "sidecar, and replace it; replace lines of metadata.jsonl, too")
    group = parser.add_argument_group("computation")
    group.add_argument("--batch_size", type=size_or_auto, metavar="N", help="images per batch, per "
                       "process; auto: 16, then on a GPU as many as fit its memory, at most 256 "
                       "(default: auto)")
    add_device_flags(group, images=True, **CAPTIONING)
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
    if ignored:
        warn(f"{' and '.join(ignored)} do nothing without --do_sample")
    if args.overwrite and not (args.sidecar or args.metadata):
        warn("--overwrite does nothing without --sidecar or --metadata")
    suffix = args.sidecar_suffix
    if not re.fullmatch(r"\.[^./\\\0\s]+", suffix) or suffix.lower() in {".tar", *IMAGE_SUFFIXES}:
        raise InputError(f"--sidecar_suffix must be a suffix of texts such as .txt, not "
                         f"{suffix!r}")
    decoding = Decoding(**{name: getattr(args, name) for name in Decoding.__dataclass_fields__})
    find_inputs(args)
    return decoding


def settings_of(args, model):
    """The fingerprint of everything but the image that determines a caption."""
    from antarctic.checkpoints import trained_sha256
    from antarctic.features import rounding
    captioner = model.captioner
    models = [model.clip.identity, model.clip.digests, *rounding(model.clip),
              captioner.identity, captioner.digests,
              args.ckpt and trained_sha256(captioner), str(captioner.dtype)]
    words = [model.entries, [rows.file.content_key() for rows in model.embeddings.files()],
             args.index and model.search.sha256, model.banned and model.banned.lines]
    if model.taught.things:
        words.append(model.taught.key())
    sizes = [model.topk, model.table, captioner.maxlen_enc, captioner.maxlen_dec]
    decoding = asdict(model.decoding)
    if decoding["insert_cost"] is None:
        del decoding["insert_cost"]  # records of the version that did not have it stay
    return fingerprint([models, words, sizes, decoding])


def caption_missing(model, features, pictures, records, save, batch_size):
    """Captions the pictures that have no record, and adds their records.

    features: float32 (n, dim), of n pictures. records: a Records. save: a function of each batch's
    new records. batch_size: as for batch_sizes. Each process captions every world-th batch. Returns
    (the rows of the pictures that had none, seconds for each).
    """
    rank, world = rank_and_world()
    new = [row for row, picture in enumerate(pictures) if picture.key not in records.places]
    missing = records.missing(pictures)  # of equal images the first one
    sizes, done = batch_sizes(batch_size, model.captioner.device), 0
    start_time = time.perf_counter()
    with tqdm(total=len(pictures), initial=len(pictures) - len(missing), desc="captioning",
              unit="image", disable=rank > 0 or not pictures) as bar:
        while done < len(missing):
            size = next(sizes)
            turn = missing[done:done + size * world]  # a batch of each process
            rows = turn[rank * size:(rank + 1) * size]
            tables = model.tables(features[rows])
            candidates = model.candidates(tables, [pictures[row].seed for row in rows])
            captions = gather_lists(model.choose(features[rows], tables, candidates))
            if rank == 0:
                save(records.append([pictures[row] for row in turn], captions))
            done += len(turn)
            bar.update(len(turn))
    return new, (time.perf_counter() - start_time) / max(1, len(missing))


def report(rows, captioned, seconds, empty, left, written, args):
    """Prints where the results are, and the first new captions of a user's own images.

    rows, empty: of write_results. captioned: which of them this run has captioned, in so many
    seconds per image. left, written: of Exports.finish.
    """
    for path, reason in list(left.items())[:ON_SCREEN]:
        print_safely(f"left {escape_control(path)} as it is: {escape_control(reason)}", "stderr")
    if len(left) > ON_SCREEN:
        print_safely(f"... and {len(left) - ON_SCREEN:,} more files", "stderr")
    if empty:
        print_safely(f"an empty caption for {counted(empty, 'image')}: every candidate held a "
                     f"banned word", "stderr")
    if args.images:
        for row in [rows[i] for i in captioned[:ON_SCREEN]]:
            print_safely(f"{escape_control(row['file'])}: {escape_control(row['caption'])}")
        if more := len(rows) - len(captioned[:ON_SCREEN]):
            path = escape_control(Path(args.savedir) / "preds.txt")
            print_safely(f"... and {more:,} more in {path}")
    files = ["preds.txt", "captions.json", "details.jsonl", *["captions.csv"] * args.csv]
    earlier = len(rows) - len(captioned)
    before = f", {earlier:,} of them in earlier runs" if earlier else ""
    print_safely(f"captioned {counted(len(rows), 'image')}{before} ({seconds:.3f} s each); wrote "
                 f"{', '.join(files)} and gallery.html to {escape_control(args.savedir)}")
    if written:
        print_safely(f"for training: {escape_control(', '.join(written))}")


def main():
    args = parse()
    decoding = check(args)
    if args.images_from:
        args.images = on_rank0(lambda: read_paths(args.images_from))
    # Rank 0 lists them for all, since a folder may change meanwhile.
    pictures = on_rank0(lambda: list_images(args.images, skip=args.images_from) if args.images
                        else read_split(args.datadir, args.split))
    only, ban = (path and read_words(path) for path in (args.only, args.ban))
    savedir, device, dtype = start_run(args)
    # torch, transformers and Pillow take seconds to load, so they wait until arguments are checked.
    from antarctic.exports import Exports
    from antarctic.features import image_features, report_bad_images, require_read
    from antarctic.seen import add_maps
    from antarctic.where import require_maps
    from model import Model

    exports = Exports(args)
    alone = on_rank0(lambda: exports.check(pictures))  # images that have a text
    model = Model.load(args.clip_model, args.lm, args.ckpt or "none", args.textfile, args.embfile,
                       args.index, only, ban, args.topk, device=device, dtype=dtype,
                       table=args.table, **asdict(decoding))
    if args.where:
        require_maps(model.clip)
    rank, _ = rank_and_world()
    if rank == 0:
        print_safely(escape_control(f"{model}, with {args.ckpt or 'no checkpoint: as pretrained'}"))
    folder, images = on_rank0(lambda: output_folder(args.features or savedir)), len(pictures)
    reading = {"max_pixels": args.max_pixels, "truncated": args.truncated}
    records = on_rank0(lambda: Records(savedir, settings_of(args, model), args.where))
    unread = () if records.lost(pictures) else alone
    later = []  # images that cannot be read now, whatever they hold
    features, pictures, bad = image_features(model.clip, pictures, folder, unread=unread,
                                             later=later, workers=args.workers, **reading)
    chosen = [row for row, picture in enumerate(pictures)
              if picture.path not in alone or picture.key in records.places]
    features, pictures = features[chosen], [pictures[row] for row in chosen]
    left_alone = images - len(pictures) - len(bad) - len(later)
    if left_alone and rank == 0:
        have = "has" if left_alone == 1 else "have"
        print_safely(f"left {counted(left_alone, 'image')} alone that {have} a "
                     f"{args.sidecar_suffix} file; --overwrite captions them, too", "stderr")
    if not pictures:
        report_bad_images(bad)
        if not (left_alone or later):
            raise InputError("none of the images can be read")

    exports.begin(pictures)
    captioned, seconds = caption_missing(model, features, pictures, records, exports.add,
                                         args.batch_size)
    if args.where:
        add_maps(model, pictures, records, args.batch_size or FIRST, later, args.workers, **reading)
    if rank == 0 and pictures:
        rows, empty = write_results(savedir, records, pictures, args.gallery, args.csv, **reading)
        left, written = exports.finish(rows)
        report_bad_images(bad)
        report(rows, captioned, seconds, empty, left, written, args)
    on_rank0(lambda: require_read(later))


if __name__ == "__main__":
    run(main)
