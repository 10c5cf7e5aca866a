"""Scores captions: BLEU, METEOR, ROUGE-L, CIDEr-D, SPICE, CLIPScore, CHAIR, evidence, words.

    python scorer.py --results captions.json --annotations coco/annotations/captions_val2017.json
    python scorer.py --results captions.json --datadir flickr30k --split test
    python scorer.py --results results/details.jsonl
    python scorer.py --preds results/preds.txt --refs results/ref*.txt --images coco/val2017

It prints a table for people and writes scores.json for programs. Metrics that cannot be computed
here are listed with the reason; the others still run.
"""

import argparse
import math
from pathlib import Path

from tqdm import tqdm

from antarctic import chair, pairs
from antarctic.annotations import DOMAINS
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import output_folder, write_json
from antarctic.flags import Renamed, add_clip_flag, add_device_flag, require_at_least
from antarctic.folders import Picture
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
from utils import choose_device, refuse_overwriting

PROMPT = "A photo depicts "  # before every text for CLIP, as CLIPScore's authors have it
BY_CLIP = ("CLIPScore", "RefCLIPScore")
INPUTS = ("results", "annotations", "datadir", "preds", "images", "instances", "train_captions",
          "clip_model")  # flags of what is read, beside --refs
TABLE = (*BY_WORDS, *BY_CLIP, *chair.METRICS, pairs.COVER, "distinct captions", "novel words",
         "mean length")


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    pair = parser.add_argument_group("captions and their references: one of two pairs")
    pair.add_argument("--results", metavar="FILE", help="captions in COCO's results format, of all "
                      "annotated images or of a part; or the sampler's details.jsonl, which also "
                      "names the image files")
    pair.add_argument("--annotations", metavar="FILE", help="references: JSON of COCO, Karpathy or "
                      "nocaps, which is also scored by domain")
    pair.add_argument("--datadir", metavar="DIR", help="references and images: a data set of any "
                      "layout that the sampler reads, in place of --annotations and --images")
    pair.add_argument("--split", metavar="NAME", help="split of --datadir (default: val2017, or "
                      "what the layout calls it)")
    pair.add_argument("--preds", metavar="FILE", help="captions, one a line")
    pair.add_argument("--refs", nargs="+", default=[], metavar="FILE", help="references, likewise")

    inputs = parser.add_argument_group("images and training captions")
    inputs.add_argument("--images", metavar="DIR", help="folder of images, for CLIPScore: with "
                        "--results those that --annotations names, or else the image ids, which "
                        "are paths, as they stand or in DIR; with --preds all of them and of the "
                        "subfolders, sorted by path, one for each line")
    inputs.add_argument("--instances", metavar="FILE", help="objects of the images of --results, "
                        "for CHAIR: COCO's instances file")
    inputs.add_argument("--train_captions", metavar="FILE", help="training captions, for the share "
                        "of novel words: COCO's or Karpathy's JSON, text with one a line, or the "
                        "folder of a data set with a training split")

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
    add_device_flag(group, images=True)
    return parser.parse_args()


def check(args):
    """Raises InputError for arguments that do not go together."""
    if (args.preds is None) == (args.results is None):
        raise InputError("give the captions with exactly one of --results and --preds")
    by_image = args.annotations or args.datadir or args.instances
    if (args.preds and by_image) or (args.results and args.refs):
        raise InputError("--results goes with --annotations, --datadir and --instances, and "
                         "--preds with --refs")
    if args.datadir and (args.annotations or args.images):
        raise InputError("--datadir gives references and images; leave out --annotations and "
                         "--images")
    if args.split and not args.datadir:
        raise InputError("--split is one of --datadir, which is not given")
    if args.results and not (by_image or args.images or args.results.endswith(".jsonl")):
        raise InputError("--results goes with --annotations, --datadir, --images or --instances; "
                         "only details.jsonl, which names the images, needs none")
    if args.preds and not (args.refs or args.images):
        raise InputError("there is nothing to compare the captions with; give --refs or --images")
    if args.json and args.savedir:
        raise InputError("--json is an old spelling of --savedir; give one of the two")
    require_at_least(1, args, "batch_size")


def output_file(args, rows):
    """The path of scores.json. Raises InputError where it cannot be written, or would replace a
    file that is read. rows: a list of pairs.Scored."""
    folder = args.savedir or Path(args.preds or args.results).parent
    path = Path(args.json or Path(folder) / "scores.json")
    inputs = [(f"--{name}", getattr(args, name)) for name in INPUTS]
    inputs += [("--refs", name) for name in args.refs]
    inputs.append(("the evidence", pairs.evidence_file(Path(args.preds or args.results))))
    if path.exists():
        inputs += [("the image", row.path) for row in rows]
        # Of a folder any file may be read; earlier scores are none of them.
        inputs += [(f"a file of {flag},", path) for flag, name in inputs[:len(INPUTS)]
                   if name and path.name != "scores.json"
                   and Path(name).resolve() in path.resolve().parents]
    refuse_overwriting(inputs, [path])
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


def unavailable(args, java, rows):
    """{metric: the reason why it cannot be computed}, as far as it is known before any work."""
    corenlp = missing_corenlp()
    flag = "--annotations" if args.results else "--refs"
    given = args.annotations or args.datadir or args.refs
    references = sum(bool(row.references) for row in rows)
    needs = (
        (not corenlp, ["SPICE"], corenlp),
        (java, ["METEOR", "SPICE"], "there is no Java here"),
        (references > 1, ["CIDEr-D"],
         "it weighs n-grams by how rare they are among images, and there is one image"),
        (references, [*BY_WORDS, "RefCLIPScore"],
         "no image has a reference" if given else f"no {flag}"),
        (any(row.path for row in rows), BY_CLIP, "no --images"),
        (args.instances, chair.METRICS, "no --instances"),
        (any(row.cover is not None for row in rows), [pairs.COVER], "no details.jsonl"),
        (args.train_captions, ["novel words"], "no --train_captions"))
    return {metric: reason
            for available, metrics, reason in needs if not available for metric in metrics}


def clip_values(clip, rows, folder, batch_size, workers=0):
    """CLIPScore and RefCLIPScore (Hessel et al. 2021, https://arxiv.org/abs/2104.08718) of each
    caption whose image can be read: {metric: {row: score}}.

    CLIPScore is 2.5 max(cos(image, caption), 0); RefCLIPScore is its harmonic mean with the best
    max(cos(caption, reference), 0), where there are references. The images' features are saved in
    folder. Raises InputError where no image can be read.
    """
    from antarctic.features import image_features, report_bad_images
    from model import rescore
    pictures = [Picture(i, row.path) for i, row in enumerate(rows) if row.path]
    features, pictures, bad = image_features(clip, pictures, folder, batch_size, workers=workers)
    report_bad_images(bad)
    if not pictures:
        raise InputError("none of the images can be read")
    read = [picture.id for picture in pictures]
    vectors = clip.encode_texts([PROMPT + rows[i].caption for i in read], batch_size,
                                "encoding captions")  # (n, dim)
    clip_score = 2.5 * (vectors * features).sum(1).clamp(min=0)  # (n,)
    values = {"CLIPScore": dict(zip(read, clip_score.tolist())), "RefCLIPScore": {}}
    chosen = [j for j, i in enumerate(read) if rows[i].references]
    for start in tqdm(range(0, len(chosen), batch_size), "encoding references", unit="batch",
                      disable=not chosen):
        part = chosen[start:start + batch_size]
        texts = [[PROMPT + text for text in rows[read[j]].references] for j in part]
        best = vectors.new_tensor([max(row) for row in rescore(clip, vectors[part], texts)])
        best = best.clamp(min=0)
        # 0 where both are
        mean = 2 * clip_score[part] * best / (clip_score[part] + best).clamp(min=1e-9)
        values["RefCLIPScore"] |= zip((read[j] for j in part), mean.tolist())
    return values


def tokenized(rows, train, tokenizer):
    """(rows with tokenized texts, tokenized texts of train). One call tokenizes all texts: Java
    takes as long to start as for thousands of them."""
    texts = [text for row in rows for text in (row.caption, *row.references)]
    tokens = iter(tokenize(texts + train, tokenizer))
    rows = [row._replace(caption=next(tokens), references=[next(tokens) for _ in row.references])
            for row in rows]
    return rows, list(tokens)


def score(part, rows, values, objects, train, left_out):
    """Scores some of the captions. part: their rows. rows: all Scored, tokenized. values: {metric:
    {row: score}}. objects: of chair.named_and_present. train: tokenized texts. left_out: {metric:
    reason}. Returns ({metric: score}; all that is left out; {novel word: count})."""
    scores = {}
    for metric, by_row in values.items():
        known = [by_row[i] for i in part if i in by_row]
        if known:
            scores[metric] = sum(known) / len(known)
    compared = [rows[i] for i in part if rows[i].references]
    by_words, failed = word_scores([row.caption for row in compared],
                                   [row.references for row in compared], left_out)
    statistics, novel = word_statistics([rows[i].caption for i in part], train)
    pairs_of = [objects[i] for i in part if i in objects]
    by_objects = chair.chair_scores(chair.object_counts(*zip(*pairs_of))) if pairs_of else {}
    scores |= by_words | by_objects | statistics
    for name in [name for name, value in scores.items() if not math.isfinite(value)]:
        failed[name] = f"it came out as {scores.pop(name)}"
    reasons = dict.fromkeys(TABLE, "there is nothing to count") | left_out | failed
    return ({name: scores[name] for name in TABLE if name in scores},
            {name: reasons[name] for name in TABLE if name not in scores}, novel)


def print_table(scores, left_out, domains):
    """Prints a row for each metric, with a column for each domain. domains: {domain: scores}."""
    if domains:
        print_safely(" ".join([f"{'':18}{'all':>8}", *(f"{domain:>11}" for domain in domains)]))
    for name in TABLE:
        if name not in scores:
            print_safely(escape_control(f"{name:18}       - {left_out[name]}"))
            continue
        others = (f"{d[name]:11.4f}" if name in d else f"{'-':>11}" for d in domains.values())
        print_safely(" ".join([f"{name:18}{scores[name]:8.4f}", *others]))


def main():
    args = parse()
    check(args)
    rows = pairs.read_scored(args)
    instances = chair.read_instances(args.instances, rows) if args.instances else None
    train = pairs.read_training_captions(args.train_captions)
    path = output_file(args, rows)
    java = has_java()
    tokenizer = choose_tokenizer(args.tokenizer, java)
    report = {"captions": len(rows), "references": sum(len(row.references) for row in rows),
              "without_reference": sum(not row.references for row in rows),
              "empty_captions": sum(not row.caption for row in rows), "tokenizer": tokenizer}
    headline = (f"{len(rows)} captions, {report['references']} references; words by "
                f"{TOKENIZERS[tokenizer]}")
    left_out = unavailable(args, java, rows)

    values = {pairs.COVER: {i: row.cover for i, row in enumerate(rows) if row.cover is not None}}
    if any(row.path for row in rows):  # first, so that a wrong --clip_model is reported early
        from model import Clip  # torch and transformers take seconds to load
        try:
            clip = Clip(args.clip_model, choose_device(args.device))
            values |= clip_values(clip, rows, path.parent, args.batch_size, args.workers)
            images = len(values["CLIPScore"])
            report |= {"clip_model": clip.identity, "clip_images": images}
            headline += f"; CLIP {clip.identity}, {images} images"
        except InputError as error:
            # details.jsonl and --datadir name images that nobody asked for.
            if args.images or not (args.annotations or args.datadir or args.instances):
                raise
            left_out |= dict.fromkeys(BY_CLIP, str(error))
    objects = chair.named_and_present(rows, instances) if instances else {}
    rows, train = tokenized(rows, train, tokenizer)

    scores, left_out, novel = score(range(len(rows)), rows, values, objects, train, left_out)
    domains = {}
    for domain in DOMAINS:
        part = [i for i, row in enumerate(rows) if row.domain == domain]
        if part:
            reasons = left_out | unavailable(args, java, [rows[i] for i in part])
            domains[domain], _, _ = score(part, rows, values, objects, train, reasons)
    if train:
        report["novel_words"] = novel
    if instances:
        report |= {"chair_images": len(objects), "hallucinated": chair.hallucinated(objects)}
    if domains:
        report["domains"] = domains
    write_json(path, {"scores": scores, "left_out": left_out} | report, indent=1)
    print_safely(escape_control(headline))
    print_table(scores, left_out, domains)
    print_safely(escape_control(f"scores: {path}"))


if __name__ == "__main__":
    run(main, alone=True)
