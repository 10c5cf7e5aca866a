"""Captions a COCO split, or any images: table, candidates from the language model, CLIP picks the best one.

    python sampler.py --datadir coco --textfile cache.txt --embfile cache.npy --savedir results --ckpt checkpoints/best.safetensors
    python sampler.py --images photos/ --textfile cache.txt mine.txt --embfile cache.npy mine.npy --savedir results \\
        --ckpt checkpoints/best.safetensors --do_sample --num_return_sequences 100 --top_p 0.9
"""

import argparse
import hashlib
import json
import math

from tqdm import tqdm

from utils import (
    InputError, atomic, choose_device, choose_dtype, existing_file, linearize, list_images, output_folder, read_cache, read_coco,
    report_bad_images, run, search, write_gallery, write_json, write_lines,
)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # What is captioned: one of two.
    parser.add_argument("--datadir", help="folder in COCO's layout (annotations/, val2017/)")
    parser.add_argument("--split", default="val2017", help="split of --datadir (default %(default)s)")
    parser.add_argument("--images", nargs="+", metavar="PATH", help="image files and folders (with subfolders) instead")
    # What it is captioned with, and where results go.
    parser.add_argument("--textfile", nargs="+", required=True, help="entries of the cache, or of several caches (.txt)")
    parser.add_argument("--embfile", nargs="+", required=True, help="their embeddings (.npy), in the same order")
    parser.add_argument("--savedir", required=True, help="folder for preds.txt, ref0.txt ..., captions.json, details.jsonl, gallery.html")
    parser.add_argument("--ckpt", help="checkpoint of trainer.py; without it the language model writes as it was pretrained")
    parser.add_argument("--features", help="folder where image features are kept for later runs (default: --savedir)")
    parser.add_argument("--gallery", type=int, default=200, help="images shown in gallery.html at most (default %(default)s)")
    # The models.
    parser.add_argument("--clip_model", default="ViT-B/16", help="OpenAI's name, hub id or folder of a CLIP (default %(default)s)")
    parser.add_argument("--lm", default="facebook/bart-large", help="hub id or folder of a BART (default %(default)s)")
    parser.add_argument("--topk", type=int, help="entries in a table (default: as in training, 10 without --ckpt)")
    # The candidates.
    parser.add_argument("--num_beams", type=int, default=3, help="width of beam search (default %(default)s)")
    parser.add_argument("--num_return_sequences", type=int, default=3, help="candidates an image (default %(default)s)")
    parser.add_argument("--do_sample", action="store_true", help="sample the candidates in place of beam search")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (default %(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, help="probability mass of nucleus sampling (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default %(default)s)")
    # How it is computed.
    parser.add_argument("--batch_size", type=int, default=16, help="images a batch of beam search (default %(default)s)")
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
    for path in args.textfile + args.embfile:
        existing_file(path, "cache file")
    if args.ckpt:
        existing_file(args.ckpt, "checkpoint")


def sample_seed(seed, image_id):
    """A seed for an image's samples that depends on nothing else, so that neighbours in a batch change nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{image_id}".encode()).digest()[:7], "big")


def write_results(savedir, records, references, gallery):
    """preds.txt, ref*.txt, captions.json (COCO results), details.jsonl and gallery.html of captioned images."""
    write_lines(savedir / "preds.txt", [r["caption"] for r in records])
    for i in range(min(map(len, references), default=0)):
        write_lines(savedir / f"ref{i}.txt", [told[i] for told in references])
    write_json(savedir / "captions.json", [{"image_id": r["image_id"], "caption": r["caption"]} for r in records])
    with atomic(savedir / "details.jsonl") as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    remark = f"{len(records)} images" + (f", the first {gallery} of them" if gallery < len(records) else "")
    write_gallery(savedir / "gallery.html", "Captions", [("Captions", remark, records[:gallery], references)])


def main():
    args = parse()
    check(args)
    pictures = list_images(args.images) if args.images else read_coco(args.datadir, args.split)
    savedir = output_folder(args.savedir)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    from model import Captioner, Clip, checkpoint_settings, image_features, load_checkpoint, rescore

    # The models. The checkpoint knows the table and the lengths that it was trained with.
    settings = checkpoint_settings(args.ckpt) if args.ckpt else {"topk": 10, "maxlen_enc": 128, "maxlen_dec": 32}
    topk = args.topk or settings["topk"]
    clip = Clip(args.clip_model, device)
    entries, embeddings = read_cache(args.textfile, args.embfile, clip.identity, clip.dim)
    captioner = Captioner(args.lm, device, dtype, settings["maxlen_enc"], settings["maxlen_dec"])
    if args.ckpt:
        load_checkpoint(args.ckpt, captioner)
    print(f"{captioner.identity} on {device}, {str(dtype).removeprefix('torch.')}, with {args.ckpt or 'no checkpoint: as pretrained'}")

    features, pictures, bad = image_features(clip, pictures, output_folder(args.features or savedir))
    if not pictures:
        report_bad_images(bad)
        raise InputError("none of the images can be read")

    # For each batch the tables (each image's nearest entries), the candidates, and CLIP's choice.
    records = []
    for start in tqdm(range(0, len(pictures), args.batch_size), "captioning", unit="batch"):
        batch = slice(start, start + args.batch_size)
        scores, indices = search(features[batch], embeddings, topk)  # (B, k), (B, k)
        tables = [[entries[i] for i in row] for row in indices.tolist()]
        tokens = captioner.tokenize(map(linearize, tables), captioner.maxlen_enc)
        if args.do_sample:
            found = [captioner.sample(ids, args.num_return_sequences, args.temperature, args.top_p, sample_seed(args.seed, picture.id))
                     for ids, picture in zip(tokens, pictures[batch])]
        else:
            found = captioner.beam(tokens, args.num_beams, args.num_return_sequences)
        found = [list(dict(candidates).items()) for candidates in found]  # distinct texts
        matches = rescore(clip, features[batch], [[text for text, _ in candidates] for candidates in found])
        for picture, table, row, candidates, cosines in zip(pictures[batch], tables, scores.tolist(), found, matches):
            ranked = sorted(((text, round(cosine, 5), round(likelihood, 5)) for (text, likelihood), cosine in zip(candidates, cosines)),
                            key=lambda c: -c[1])
            records.append({"image_id": picture.id, "file": str(picture.path), "caption": ranked[0][0], "score": ranked[0][1],
                            "table": [(entry, round(score, 5)) for entry, score in zip(table, row)], "candidates": ranked})

    write_results(savedir, records, [p.captions for p in pictures], args.gallery)
    report_bad_images(bad)
    print(f"captioned {len(records)} images; wrote preds.txt, captions.json, details.jsonl and {savedir / 'gallery.html'}")


if __name__ == "__main__":
    run(main)
