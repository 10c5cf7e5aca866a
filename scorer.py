"""Scores captions: BLEU, METEOR, ROUGE-L, CIDEr-D, SPICE, CLIPScore, RefCLIPScore, and their words.

    python scorer.py --results captions.json --annotations coco/annotations/captions_val2017.json
    python scorer.py --preds results/preds.txt --refs results/ref*.txt --images coco/val2017

It prints a table for people and writes scores.json for programs. Metrics that cannot be computed
here are listed with the reason; the others still run.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from antarctic.datasets import Picture, list_images, read_annotations, read_results, read_texts
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import output_folder, write_json
from antarctic.metrics import (
    BY_WORDS,
    TOKENIZERS,
    has_java,
    missing_corenlp,
    tokenize,
    word_scores,
    word_statistics,
)
from antarctic.runtime import run
from utils import Renamed, add_clip_flag, add_device_flag, choose_device, require_at_least

PROMPT = "A photo depicts "  # before every text for CLIP, as CLIPScore's authors have it
TABLE = (*BY_WORDS, "CLIPScore", "RefCLIPScore", "distinct captions", "novel words", "mean length")


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    pair = parser.add_argument_group("captions and their references: one of two pairs")
    pair.add_argument("--results", metavar="FILE", help="captions in COCO's results format, of all "
                      "annotated images or of a part")
    pair.add_argument("--annotations", metavar="FILE", help="references: COCO's caption file")
    pair.add_argument("--preds", metavar="FILE", help="captions, one a line")
    pair.add_argument("--refs", nargs="+", default=[], metavar="FILE", help="references: "
                      "files of as many lines")

    inputs = parser.add_argument_group("images and training captions")
    inputs.add_argument("--images", metavar="DIR", help="folder of images, for CLIPScore: with "
                        "--results those that --annotations names; with --preds all of them and "
                        "of the subfolders, sorted by path, one for each line, as sampler.py "
                        "writes them")
    inputs.add_argument("--train_captions", metavar="FILE", help="training captions, for the share "
                        "of novel words: COCO's caption file (.json), or text with one a line")

    output = parser.add_argument_group("files")
    output.add_argument("--savedir", metavar="DIR", help="folder for scores.json and for image "
                        "features, which sampler.py with the same --clip_model shares (default: "
                        "that of the captions)")
    output.add_argument("--json", action=Renamed, new="--savedir DIR")

    group = parser.add_argument_group("computation")
    add_clip_flag(group, "ViT-B/32", "; CLIPScore's own by default, and better not the one that "
                  "chose the captions")
    group.add_argument("--tokenizer", default="auto", choices=("auto", *TOKENIZERS), help="ptb, "
                       "which COCO's evaluation uses, needs Java; auto: ptb where there is Java, "
                       "else treebank (default %(default)s)")
    group.add_argument("--batch_size", type=int, default=64, help="images or texts per "
                       "batch of CLIP; there is one process (default %(default)s)")
    add_device_flag(group)
    return parser.parse_args()


def check(args):
    """Raises InputError for arguments that do not go together."""
    if (args.preds is None) == (args.results is None):
        raise InputError("give the captions with exactly one of --results and --preds")
    if (args.results is None) != (args.annotations is None) or (args.results and args.refs):
        raise InputError("--results goes with --annotations, and --preds with --refs")
    if not (args.annotations or args.refs or args.images):
        raise InputError("there is nothing to compare the captions with: give --refs or --images, "
                         "or both")
    if args.json and args.savedir:
        raise InputError("--json is an old spelling of --savedir; give one of the two")
    require_at_least(1, args, "batch_size")


def read_by_image(args):
    """read_scored() for --results, --annotations and --images."""
    captions, images = read_results(args.results), read_annotations(args.annotations)
    unknown = [image for image in captions if image not in images]
    if unknown:
        raise InputError(f"{len(unknown)} of {len(captions)} images of {args.results}, such as "
                         f"{unknown[0]!r}, are not in {args.annotations}")
    names, references = zip(*(images[image] for image in captions))
    paths = [Path(args.images) / name for name in names] if args.images else []
    if paths and not any(path.is_file() for path in paths):
        raise InputError(f"none of the images, such as {paths[0]}, is in the folder {args.images}")
    return list(captions.values()), references, paths


def read_by_line(args):
    """read_scored() for --preds, --refs and --images."""
    captions = read_texts(args.preds, "captions file")
    columns = [read_texts(path, "references file") for path in args.refs]
    for path, lines in zip(args.refs, columns):
        if len(lines) != len(captions):
            raise InputError(f"{args.preds} has {len(captions)} lines, but {path} has {len(lines)}")
    paths = [picture.path for picture in list_images([args.images])] if args.images else []
    if args.images and len(paths) != len(captions):
        raise InputError(f"{args.preds} has {len(captions)} lines, but {args.images} has "
                         f"{len(paths)} images")
    return captions, list(zip(*columns)) or [()] * len(captions), paths


def read_scored(args):
    """Returns (captions, N texts; references, N lists of texts; N image paths).

    The lists of texts are empty without references, and there are no paths without --images.
    Raises InputError where a file cannot be read, two files do not belong together, or an image has
    no reference.
    """
    captions, references, paths = read_by_image(args) if args.results else read_by_line(args)
    references = [[text for text in texts if text] for texts in references]
    if (args.annotations or args.refs) and not all(references):
        raise InputError(f"caption {references.index([]) + 1} of {args.results or args.preds} has "
                         f"no reference")
    return captions, references, paths


def read_training_captions(path):
    """A list of texts, empty where path is None. Raises InputError where the file has none."""
    if path is None:
        return []
    if not path.endswith(".json"):
        return read_texts(path, "file of training captions")
    captions = [text for _, texts in read_annotations(path).values() for text in texts]
    if not captions:
        raise InputError(f"there is no caption in {path}")
    return captions


def output_file(args):
    """The path of scores.json. Raises InputError where it cannot be written."""
    folder = args.savedir or Path(args.preds or args.results).parent
    path = Path(args.json or Path(folder) / "scores.json")
    output_folder(path.parent)
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file to write")
    return path


def choose_tokenizer(name, java):
    if name == "ptb" and not java:
        raise InputError("--tokenizer ptb needs Java, and there is none here; --tokenizer treebank "
                         "needs none")
    if name != "auto":
        return name
    return "ptb" if java else "treebank"


def unavailable(args, java, captions):
    """{metric: the reason why it cannot be computed}, as far as it is known before any work."""
    corenlp = missing_corenlp()
    needs = (
        (not corenlp, ["SPICE"], corenlp),
        (java, ["METEOR", "SPICE"], "there is no Java here"),
        (len(captions) > 1, ["CIDEr-D"],
         "it weighs n-grams by how rare they are among images, and there is one image"),
        (args.annotations or args.refs, [*BY_WORDS, "RefCLIPScore"], "no --refs"),
        (args.images, ["CLIPScore", "RefCLIPScore"], "no --images"),
        (args.train_captions, ["novel words"], "no --train_captions"))
    return {metric: reason
            for available, metrics, reason in needs if not available for metric in metrics}


def clip_scores(clip, captions, references, paths, folder, batch_size):
    """CLIPScore and RefCLIPScore (Hessel et al. 2021, https://arxiv.org/abs/2104.08718).

    Both are means over the images that can be read. CLIPScore is 2.5 max(cos(image, caption), 0);
    RefCLIPScore is its harmonic mean with the best max(cos(caption, reference), 0), and is left out
    where a list of references is empty. captions: N texts. references: N lists of texts. paths: N
    images, whose features are saved in folder.
    Returns ({metric: score}, n images that were read). Raises InputError where none can be read.
    """
    from antarctic.features import image_features
    from antarctic.images import report_bad_images
    from model import rescore
    pictures = [Picture(*row) for row in enumerate(paths)]
    features, pictures, bad = image_features(clip, pictures, folder, batch_size)  # (n, dim)
    report_bad_images(bad)
    if not pictures:
        raise InputError("none of the images can be read")
    texts = [PROMPT + captions[picture.id] for picture in pictures]
    vectors = clip.encode_texts(texts, batch_size, "encoding captions")  # (n, dim)
    clip_score = 2.5 * (vectors * features).sum(1).clamp(min=0)  # (n,)
    scores = {"CLIPScore": clip_score.mean().item()}
    if all(references):
        texts = [[PROMPT + text for text in references[picture.id]] for picture in pictures]
        best = []
        for i in tqdm(range(0, len(texts), batch_size), "encoding references", unit="batch"):
            part = slice(i, i + batch_size)
            best += map(max, rescore(clip, vectors[part], texts[part]))
        best = vectors.new_tensor(best).clamp(min=0)  # (n,)
        mean = 2 * clip_score * best / (clip_score + best).clamp(min=1e-9)  # 0 where both are
        scores["RefCLIPScore"] = mean.mean().item()
    return scores, len(pictures)


def main():
    args = parse()
    check(args)
    captions, references, paths = read_scored(args)
    train = read_training_captions(args.train_captions)
    path = output_file(args)
    java = has_java()
    tokenizer = choose_tokenizer(args.tokenizer, java)
    left_out = unavailable(args, java, captions)
    report = {"captions": len(captions), "references": sum(map(len, references)),
              "tokenizer": tokenizer}
    headline = (f"{len(captions)} captions, {report['references']} references; words by "
                f"{TOKENIZERS[tokenizer]}")
    scores = {}

    if paths:  # first, so that a wrong --clip_model is reported early
        from model import Clip  # torch and transformers take seconds to load
        clip = Clip(args.clip_model, choose_device(args.device))
        scores, images = clip_scores(clip, captions, references, paths, path.parent,
                                     args.batch_size)
        report |= {"clip_model": clip.identity, "clip_images": images}
        headline += f"; CLIP {clip.identity}, {images} images"

    # One call tokenizes all texts: Java takes as long to start as for thousands of them.
    texts = captions + [text for texts in references for text in texts] + train
    tokens = iter(tokenize(texts, tokenizer))
    captions = [next(tokens) for _ in captions]
    references = [[next(tokens) for _ in texts] for texts in references]
    by_words, failed = word_scores(captions, references, left_out)
    statistics, novel = word_statistics(captions, list(tokens))
    scores |= by_words | statistics
    left_out |= failed
    if train:
        report["novel_words"] = novel

    scores = {name: scores[name] for name in TABLE if name in scores}
    write_json(path, {"scores": scores, "left_out": left_out} | report, indent=1)
    print_safely(escape_control(headline))
    for name in TABLE:
        value = f"{scores[name]:8.4f}" if name in scores else f"       - {left_out[name]}"
        print_safely(escape_control(f"{name:18}{value}"))
    print_safely(escape_control(f"scores: {path}"))


if __name__ == "__main__":
    run(main, alone=True)
