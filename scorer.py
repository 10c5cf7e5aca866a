"""Scores captions: BLEU, METEOR, ROUGE-L, CIDEr-D, SPICE, CLIPScore and RefCLIPScore; a table for people, a JSON for programs.

    python scorer.py --results results/captions.json --annotations coco/annotations/captions_val2017.json --images coco/val2017
    python scorer.py --preds results/preds.txt --refs results/ref*.txt --train_captions coco/annotations/captions_train2017.json

A score that cannot be computed here is named with the reason, and the others still come.
"""

import argparse
import json
import subprocess
from collections import Counter
from contextlib import suppress
from pathlib import Path

from nltk.tokenize import TreebankWordTokenizer
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice import get_stanford_models
from pycocoevalcap.spice.spice import Spice
from pycocoevalcap.tokenizer import ptbtokenizer
from tqdm import tqdm

from antarctic.datasets import Picture, list_images, read_annotations
from antarctic.errors import InputError
from antarctic.files import one_line, output_folder, read_text, write_json
from antarctic.images import report_bad_images
from antarctic.runtime import run
from utils import choose_device

PROMPT = "A photo depicts "  # before every text for CLIP, as CLIPScore's authors have it
BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
BY_WORDS = (*BLEU, "METEOR", "ROUGE-L", "CIDEr-D", "SPICE")
TABLE = (*BY_WORDS, "CLIPScore", "RefCLIPScore", "distinct captions", "novel words", "mean length")
TOKENIZERS = {"ptb": "Java's PTBTokenizer, as COCO's evaluation", "treebank": "NLTK's TreebankWordTokenizer, without Java"}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # What is scored, and against what: one of two.
    parser.add_argument("--results", metavar="FILE", help="captions in COCO's results format, of all annotated images or some")
    parser.add_argument("--annotations", metavar="FILE", help="their references: COCO's caption file")
    parser.add_argument("--preds", metavar="FILE", help="captions, one a line, instead")
    parser.add_argument("--refs", nargs="+", default=[], metavar="FILE", help="their references: files of as many lines")
    # What else is asked.
    parser.add_argument("--images", metavar="DIR", help="their images, for CLIPScore: of --results by the annotated file names; "
                        "of --preds all in the folder and its subfolders, sorted, one a line, as sampler.py writes them")
    parser.add_argument("--train_captions", metavar="FILE", help="what the captioner learned from, for the share of novel words: "
                        "COCO's caption file (.json) or text, one caption a line")
    # How it is computed, and where the scores go.
    parser.add_argument("--clip_model", default="ViT-B/32", help="OpenAI's name or .pt file, hub id or folder of a CLIP or "
                        "SigLIP; better not the one that chose the captions (default %(default)s, which is CLIPScore's)")
    parser.add_argument("--tokenizer", default="auto", choices=("auto", *TOKENIZERS), help="ptb needs Java and is what COCO's "
                        "evaluation uses; auto: ptb where there is Java, else treebank (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="images or captions a batch of CLIP (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="where the scores go, and image features beside them, which are "
                        "those of sampler.py with the same --clip_model (default: scores.json beside the captions)")
    args = parser.parse_args()
    if (args.preds is None) == (args.results is None):
        raise InputError("exactly one of --results and --preds says what is scored")
    if (args.results is None) != (args.annotations is None) or (args.results and args.refs):
        raise InputError("--results goes with --annotations, and --preds with --refs")
    if not (args.annotations or args.refs or args.images):
        raise InputError("there is nothing to hold the captions against: give --refs or --images, or both")
    if args.batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, not {args.batch_size}")
    return args


def read_texts(path, what):
    """A list of texts, one a line; a blank line is an empty text. Raises InputError: missing, empty or not UTF-8."""
    lines = [one_line(line, path) for line in read_text(path, what).removesuffix("\n").split("\n")]
    if not any(lines):
        raise InputError(f"there is no text in the {what} {path}")
    return lines


def read_results(path):
    """{image id: caption} of a file in COCO's results format. Raises InputError: it is none, or an image comes twice."""
    captions = {}
    try:
        for result in json.loads(read_text(path, "results file")):
            if result["image_id"] in captions:
                raise InputError(f"{path} has more than one caption of the image {result['image_id']!r}")
            captions[result["image_id"]] = one_line(result["caption"], path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not in COCO's results format ({type(error).__name__}: {error})") from error
    if not any(captions.values()):
        raise InputError(f"there is no text in the results file {path}")
    return captions


def read_scored(args):
    """(captions, N texts; references, N lists of texts, empty ones without --refs; N image paths, or none without --images).

    Raises InputError: a file cannot be read, two files do not belong together, or an image has no reference.
    """
    paths = []
    if args.results:
        found, images = read_results(args.results), read_annotations(args.annotations)
        strange = [image for image in found if image not in images]
        if strange:
            raise InputError(f"{len(strange)} of {len(found)} images of {args.results}, such as {strange[0]!r}, "
                             f"are not in {args.annotations}")
        captions, told = list(found.values()), [images[image][1] for image in found]
        if args.images:
            paths = [Path(args.images) / images[image][0] for image in found]
            if not any(path.is_file() for path in paths):
                raise InputError(f"none of the images is in the folder {args.images}, such as {paths[0]}")
    else:
        captions, files = read_texts(args.preds, "captions file"), [read_texts(path, "references file") for path in args.refs]
        for path, lines in zip(args.refs, files):
            if len(lines) != len(captions):
                raise InputError(f"{args.preds} has {len(captions)} lines, but {path} has {len(lines)}")
        told = list(zip(*files)) or [()] * len(captions)
        if args.images:
            paths = [picture.path for picture in list_images([args.images])]
            if len(paths) != len(captions):
                raise InputError(f"{args.preds} has {len(captions)} lines, but {args.images} has {len(paths)} images")
    references = [[text for text in texts if text] for texts in told]
    if (args.annotations or args.refs) and not all(references):
        raise InputError(f"there is no reference for caption {references.index([]) + 1} of {args.results or args.preds}")
    return captions, references, paths


def has_java():
    """Whether Java runs; on some systems there is a `java` that only says where to get it."""
    try:
        return subprocess.run(["java", "-version"], capture_output=True).returncode == 0
    except OSError:
        return False


def tokenize(texts, tokenizer):
    """Texts as COCO's evaluation takes them: lower-cased tokens with a space between, punctuation left out.

    texts: N texts without line breaks. tokenizer: one of TOKENIZERS. Returns N texts. Raises InputError where Java fails.
    The Java program is pycocoevalcap's, without its wrapper, which writes into the package's folder and hides failures.
    """
    if tokenizer == "ptb":
        jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
        command = ["java", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        told = "".join(text + "\n" for text in texts).encode(errors="replace")
        lines = subprocess.run(command, input=told, capture_output=True).stdout.decode().split("\n")[:-1]
        if len(lines) != len(texts):
            raise InputError(f"Java's tokenizer gave {len(lines)} lines for {len(texts)} texts; try --tokenizer treebank")
    else:
        split = TreebankWordTokenizer().tokenize
        lines = [" ".join(split(text.replace("|", " | "), convert_parentheses=True)).lower()  # as Java does; ||| is METEOR's own
                 for text in tqdm(texts, "tokenizing", unit="text")]
    return [" ".join(token for token in line.split(" ") if token not in ptbtokenizer.PUNCTUATIONS) for line in lines]


def meteor(references, captions):
    """METEOR, a float. Where its Java program stops, the scorer is put in order: deleted as it is, it would wait for ever."""
    scorer = Meteor()
    try:
        return scorer.compute_score(references, captions)[0]
    except (OSError, ValueError):
        scorer.lock.release()
        with suppress(OSError):
            scorer.meteor_p.stdin.close()
        raise


def word_scores(captions, references, left_out):
    """{metric: score} by pycocoevalcap's scorers, one by one: COCOEvalCap.evaluate would first have SPICE download its parts.

    captions: N tokenized texts. references: N lists of them. left_out: {metric: reason} of those to leave out; those that fail
    are added. Cider is CIDEr-D (https://arxiv.org/abs/1411.5726), 0 to 10: n-grams weigh by their rarity in these references.
    """
    pair = dict(enumerate(references)), {i: [text] for i, text in enumerate(captions)}
    jobs = {BLEU: lambda: Bleu(4).compute_score(*pair, verbose=0)[0], ("METEOR",): lambda: [meteor(*pair)],
            ("ROUGE-L",): lambda: [Rouge().compute_score(*pair)[0]], ("CIDEr-D",): lambda: [Cider().compute_score(*pair)[0]],
            ("SPICE",): lambda: [Spice().compute_score(*pair)[0]]}
    scores = {}
    for names in tqdm([names for names in jobs if names[0] not in left_out], "scoring", unit="metric"):
        try:
            scores |= zip(names, map(float, jobs[names]()))
        except (OSError, ValueError, subprocess.SubprocessError) as error:  # Java stopped, or could not write
            left_out |= dict.fromkeys(names, f"its scorer failed ({type(error).__name__}: {error})")
    return scores


def unavailable(args, java, captions):
    """{metric: why it cannot be computed}, known before any work."""
    folder, jar = Path(get_stanford_models.__file__).parent / get_stanford_models.SPICELIB, get_stanford_models.JAR
    corenlp = (folder / f"{jar}.jar").is_file() and (folder / f"{jar}-models.jar").is_file()
    needs = (
        (corenlp, ["SPICE"], f"Stanford CoreNLP ({jar}.jar and {jar}-models.jar) is not in {folder}"),
        (java, ["METEOR", "SPICE"], "there is no Java here"),
        (len(captions) > 1, ["CIDEr-D"], "it weighs n-grams by how rare they are among images, and there is one image"),
        (args.annotations or args.refs, [*BY_WORDS, "RefCLIPScore"], "no --refs"),
        (args.images, ["CLIPScore", "RefCLIPScore"], "no --images"),
        (args.train_captions, ["novel words"], "no --train_captions"))
    return {metric: reason for there, metrics, reason in needs if not there for metric in metrics}


def clip_scores(clip, captions, references, paths, folder, batch_size):
    """CLIPScore and RefCLIPScore (Hessel et al. 2021, https://arxiv.org/abs/2104.08718), means over images that can be read.

    CLIPScore is 2.5 max(cos(image, caption), 0); RefCLIPScore its harmonic mean with the best max(cos(caption, reference), 0).
    captions: N texts; references: N lists of texts, or of none: then there is no RefCLIPScore; paths: N images, whose features
    are kept in folder. Returns ({metric: score}, n images that were read). Raises InputError where none can be read.
    """
    from antarctic.features import image_features
    from model import rescore
    features, pictures, bad = image_features(clip, [Picture(*row) for row in enumerate(paths)], folder, batch_size)  # (n, dim)
    report_bad_images(bad)
    if not pictures:
        raise InputError("none of the images can be read")
    said = clip.encode_texts([PROMPT + captions[p.id] for p in pictures], batch_size, "encoding captions")  # (n, dim)
    clip_score = 2.5 * (said * features).sum(1).clamp(min=0)  # (n,)
    scores = {"CLIPScore": clip_score.mean().item()}
    if all(references):
        told = [[PROMPT + text for text in references[p.id]] for p in pictures]
        best = [max(cosines) for i in tqdm(range(0, len(told), batch_size), "encoding references", unit="batch")
                for cosines in rescore(clip, said[i:i + batch_size], told[i:i + batch_size])]
        best = said.new_tensor(best).clamp(min=0)  # (n,)
        scores["RefCLIPScore"] = (2 * clip_score * best / (clip_score + best).clamp(min=1e-9)).mean().item()  # of 0 and 0: 0
    return scores, len(pictures)


def main():
    args = parse()
    captions, references, paths = read_scored(args)
    train = []
    if args.train_captions and args.train_captions.endswith(".json"):
        train = [text for _, texts in read_annotations(args.train_captions).values() for text in texts]
    elif args.train_captions:
        train = read_texts(args.train_captions, "file of training captions")
    if args.train_captions and not train:
        raise InputError(f"there is no caption in {args.train_captions}")
    out = Path(args.json) if args.json else Path(args.preds or args.results).with_name("scores.json")
    output_folder(out.parent)
    if out.is_dir():
        raise InputError(f"{out} is a folder, not a file to write")
    java = has_java()
    if args.tokenizer == "ptb" and not java:
        raise InputError("--tokenizer ptb needs Java, and there is none here; --tokenizer treebank does without")
    tokenizer = args.tokenizer if args.tokenizer != "auto" else "ptb" if java else "treebank"
    left_out = unavailable(args, java, captions)
    report = {"captions": len(captions), "references": sum(map(len, references)), "tokenizer": tokenizer}
    scores = {}

    if paths:  # first, so that a wrong --clip_model is told at once
        from model import Clip
        clip = Clip(args.clip_model, choose_device(args.device))
        scores, read = clip_scores(clip, captions, references, paths, out.parent, args.batch_size)
        report |= {"clip_model": clip.identity, "clip_images": read}

    # All texts are tokenized in one go: Java takes as long to start as for thousands of them.
    tokens = iter(tokenize(captions + [text for texts in references for text in texts] + train, tokenizer))
    captions, references = [next(tokens) for _ in captions], [[next(tokens) for _ in texts] for texts in references]
    scores |= word_scores(captions, references, left_out)
    words = Counter(word for caption in captions for word in caption.split())
    scores |= {"distinct captions": len(set(captions)) / len(captions), "mean length": words.total() / len(captions)}
    if train:  # of all words written, each time they are, so that the share does not grow with the number of captions
        known = {word for caption in tokens for word in caption.split()}
        report["novel_words"] = {word: n for word, n in words.most_common() if word not in known}
        scores["novel words"] = sum(report["novel_words"].values()) / max(1, words.total())

    # For people, and for programs.
    print(f"{len(captions)} captions, {report['references']} references; words by {TOKENIZERS[tokenizer]}"
          + (f"; CLIP {clip.identity}, {read} images" if paths else ""))
    for name in TABLE:
        print(f"{name:18}" + (f"{scores[name]:8.4f}" if name in scores else f"       - {left_out[name]}"))
    write_json(out, {"scores": {name: scores[name] for name in TABLE if name in scores}, "left_out": left_out} | report, indent=1)
    print(f"scores: {out}")


if __name__ == "__main__":
    run(main, alone=True)
