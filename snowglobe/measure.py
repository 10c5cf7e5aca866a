"""Scores the runs of a demo folder: a table for people, results.json for programs, one gallery of
them all.

    python -m snowglobe.measure --folder demo
    python -m snowglobe.measure --folder demo --bounds --alone

--bounds also writes captions from perfect tables (cache entries that are true of the scene) and
from random ones. --alone tells how good each of the small models is by itself.
"""

import argparse
import json
import math
import random
from itertools import zip_longest
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from antarctic.datasets import read_coco
from antarctic.files import write_json
from antarctic.gallery import write_gallery
from antarctic.runtime import run as run_script
from snowglobe import scenes

WEIGHTS = Path(__file__).parent / "weights"
RUNS = {  # folder of the run in DIR/runs: (split, what it is)
    "untuned": ("val2017", "BART as pretrained, beam 3"),
    "tuned": ("val2017", "layernorms tuned, beam 3"),
    "val_added": ("val2017", "layernorms, beam 3, words added"),
    "near_mined": ("near", "layernorms, beam 3, mined cache"),
    "near_added": ("near", "layernorms, beam 3, words added"),
    "near_added_sampled": ("near", "layernorms, 100 samples, words added"),
    "out_mined": ("out", "layernorms, beam 3, mined cache"),
    "out_added": ("out", "layernorms, beam 3, words added"),
    "tuned_sampled": ("val2017", "layernorms, 100 samples"),
    "near_mined_sampled": ("near", "layernorms, 100 samples, mined cache"),
    "out_mined_sampled": ("out", "layernorms, 100 samples, mined cache"),
    "out_added_sampled": ("out", "layernorms, 100 samples, words added"),
    "full": ("val2017", "every weight tuned, beam 3"),
    "full_near_added": ("near", "every weight, beam 3, words added"),
    "full_out_added": ("out", "every weight, beam 3, words added"),
    "perfect": ("val2017", "layernorms, perfect tables"),
    "random": ("val2017", "layernorms, random tables"),
}


def plain(text):
    """A text as lower-cased words without punctuation, as the scorers take it."""
    return " ".join(word.strip(".,!?;:\"'") for word in text.lower().split())


def coco_scores(captions, references):
    """(CIDEr-D, BLEU-4) of captions, a list of texts, against references, a list of lists of
    texts."""
    predicted = {i: [plain(text)] for i, text in enumerate(captions)}
    told = {i: [plain(text) for text in texts] for i, texts in enumerate(references)}
    return Cider().compute_score(told, predicted)[0], Bleu(4).compute_score(
        told, predicted, verbose=0)[0][3]


def reference_score(references):
    """Mean (CIDEr-D, BLEU-4) of one reference against the others of its image, each taken in
    turn."""
    rounds = [
        coco_scores([told[j]
                     for told in references], [told[:j] + told[j + 1:] for told in references])
        for j in range(min(map(len, references)))
    ]
    return tuple(sum(values) / len(rounds) for values in zip(*rounds))


def objects(captions, described):
    """(recall, precision, share of held-out kinds named): of the kinds in the scenes those that
    captions name, and back."""
    hit = there = told = held_hit = held = 0
    for text, scene in zip(captions, described):
        kinds, names = {group[0] for group in scene["groups"]}, scenes.named(text)
        hit, there, told = hit + len(kinds & names), there + len(kinds), told + len(names)
        new = kinds & set(scenes.HELD_OUT)
        held_hit, held = held_hit + len(new & names), held + len(new)
    return hit / there, hit / max(1, told), held_hit / held if held else None


def score_run(captions, references, described):
    """All scores of a run as a dict. captions: {image id: text}; described: {image id: scene}."""
    ids = list(captions)
    cider, bleu = coco_scores([captions[i] for i in ids], [references[i] for i in ids])
    recall, precision, held_out = objects([captions[i] for i in ids], [described[i] for i in ids])
    return {
        "cider": cider, "bleu4": bleu, "object_recall": recall, "object_precision": precision,
        "held_out": held_out, "distinct": len(set(captions.values())) / len(ids)
    }


def bound(folder, kind, table, described):
    """Captions from other tables than CLIP's: {image id: text}. table(scene, entries, k, rng) makes
    one; kind seeds rng. described: {image id: scene}."""
    from antarctic.checkpoints import checkpoint_settings, load_checkpoint
    from model import Captioner
    from utils import linearize
    checkpoint = folder / "checkpoints" / "best.safetensors"
    settings = checkpoint_settings(checkpoint)
    captioner = Captioner(WEIGHTS / "bart", maxlen_enc=settings["maxlen_enc"],
                          maxlen_dec=settings["maxlen_dec"])
    load_checkpoint(checkpoint, captioner)
    entries = (folder / "cache.txt").read_text(encoding="utf-8").splitlines()
    rng = random.Random(kind)
    tables = [
        linearize(table(scene, entries, settings["topk"], rng)) for scene in described.values()
    ]
    tokens = captioner.tokenize(tables, settings["maxlen_enc"])
    found = [c[0][0] for i in range(0, len(tokens), 64) for c in captioner.beam(tokens[i:i + 64])]
    return dict(zip(described, found))


def perfect_table(scene, entries, k, rng):
    """k entries of the cache that are true of the scene: of each kind in it and of what else is
    true in turn."""
    known = {name: value for name, value in scene.items() if name in scenes.Scene._fields}
    facts = scenes.truths(scenes.Scene(**known)._replace(groups=tuple(map(tuple, scene["groups"]))))
    piles = {}
    for entry in rng.sample(entries, len(entries)):
        said = scenes.claims(entry)
        if said and said <= facts:
            piles.setdefault(min((claim[1] for claim in said if claim[0] == "kind"), default=""),
                             []).append(entry)
    return [entry for turn in zip_longest(*piles.values()) for entry in turn if entry][:k]


def random_table(scene, entries, k, rng):
    """k entries of the cache, whatever the scene."""
    return rng.sample(entries, k)


def measure_alone(folder, described):
    """What each small model can do by itself, as lines of text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from antarctic.cache import read_cache, search
    from antarctic.features import image_features
    from model import Captioner, Clip
    from snowglobe import build

    clip = Clip(WEIGHTS / "clip")
    pictures = read_coco(folder / "world", "val2017")
    images, _, _ = image_features(clip, pictures, folder)
    texts = clip.encode_texts([p.captions[0] for p in pictures])
    first = (images @ texts.T).argmax(1) == torch.arange(len(images))
    yield f"CLIP: of {len(images)} captions of val2017 an image's own comes first for {first.float().mean():.0%}"
    entries, embeddings = read_cache([folder / "cache.txt"], [folder / "cache.npy"], clip.identity,
                                     clip.dim)
    for k in (8, 16, 24, 32):
        _, indices = search(images, embeddings, k)
        tables = [" | ".join(entries[i] for i in row) for row in indices.tolist()]
        recall, precision, _ = objects(tables, [described[p.id] for p in pictures])
        yield f"CLIP: in tables of {k} entries stand {recall:.0%} of the kinds; {precision:.0%} of the kinds in them are there"
    rng = random.Random("alone")
    captioner = Captioner(WEIGHTS / "bart")
    told = [build.caption_text(rng) for _ in range(500)]
    noisy = captioner.tokenize([build.noised(rng, text) for text in told], 128)
    with torch.inference_mode():
        loss = captioner.loss(noisy, captioner.tokenize(told, 64)).item()
        yield f"BART: denoises 500 fresh captions at {loss:.2f} nats a token"
        gpt, tokenizer = (kind.from_pretrained(WEIGHTS / "gpt")
                          for kind in (AutoModelForCausalLM, AutoTokenizer))
        gpt.float()
        losses = [
            gpt(**tokens, labels=tokens.input_ids).loss.item()
            for tokens in (tokenizer(build.story_text(rng), return_tensors="pt")
                           for _ in range(200))
        ]
    yield f"GPT-Neo: perplexity {math.exp(sum(losses) / len(losses)):.2f} on 200 fresh stories"


def write_pictures(folder, pictures, results):
    """gallery.html of the whole folder: held-out kinds first, each run by its first images."""
    sections = []
    for run in ("out_added", "near_added", "near_added_sampled", "tuned", "out_mined"):
        if run in results:
            with open(folder / "runs" / run / "details.jsonl", encoding="utf-8") as file:
                records = [json.loads(line) for _, line in zip(range(24), file)]
            split, what = RUNS[run]
            told = {p.id: p.captions for p in pictures[split]}
            sections.append((
                f"{split}: {what}",
                f"CIDEr {results[run]['cider']:.2f}, object recall "
                f"{results[run]['object_recall']:.2f}"
                + (f", held-out kinds named {results[run]['held_out']:.2f}"
                   if split != "val2017" else ""), records, [told[r["image_id"]] for r in records]))
    write_gallery(folder / "gallery.html", "The snowglobe, captioned", sections)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"),
                        help="folder of demo.sh (default %(default)s)")
    parser.add_argument("--bounds", action="store_true",
                        help="also caption val2017 from perfect and from random tables")
    parser.add_argument("--alone", action="store_true",
                        help="also tell how good each small model is by itself")
    args = parser.parse_args()
    folder = args.folder
    splits = {split for split, _ in RUNS.values()}
    pictures = {split: read_coco(folder / "world", split) for split in splits}
    described = {
        split: {
            s["image_id"]: s for s in json.loads((folder / "world" / "annotations" /
                                                  f"scenes_{split}.json").read_text())
        } for split in splits
    }

    # The runs that are there.
    captions = {}
    for run in RUNS:
        path = folder / "runs" / run / "captions.json"
        if path.is_file():
            captions[run] = {
                r["image_id"]: r["caption"] for r in json.loads(path.read_text(encoding="utf-8"))
            }
    if args.bounds:
        captions["perfect"] = bound(folder, "perfect", perfect_table, described["val2017"])
        captions["random"] = bound(folder, "random", random_table, described["val2017"])
    scores = {
        run: score_run(found, {p.id: list(p.captions)
                               for p in pictures[RUNS[run][0]]}, described[RUNS[run][0]])
        for run, found in captions.items()
    }
    reference = reference_score([list(p.captions) for p in pictures["val2017"]])

    # The table.
    print(
        f"{'':44}{'CIDEr-D':>8}{'BLEU-4':>8}{'objects: recall':>17}{'precision':>11}{'held-out named':>16}"
    )
    print(
        f"{'val2017     one reference against the others':44}{reference[0]:8.2f}{reference[1]:8.3f}"
    )
    for run, s in scores.items():
        split, what = RUNS[run]
        held_out = "" if s["held_out"] is None else f"{s['held_out']:.2f}"
        row = f"{split:8} {what:35}{s['cider']:8.2f}{s['bleu4']:8.3f}{s['object_recall']:17.2f}{s['object_precision']:11.2f}{held_out:>16}"
        print(row.rstrip())

    if args.alone:
        print("", *measure_alone(folder, described["val2017"]), sep="\n")

    # For programs, and to look at.
    stages = sorted((folder / "done").iterdir()) if (folder / "done").is_dir() else []
    results = {
        "reference": {"cider": reference[0], "bleu4": reference[1]},
        **{run: s for run, s in scores.items() if RUNS[run][0] == "val2017"}, **{
            split: {
                run.removeprefix(f"{split}_"): s["held_out"] for run, s in scores.items()
                if run.startswith(f"{split}_")
            } for split in ("near", "out")
        }, "runs": scores, "seconds": {
            stage: float(seconds)
            for stage, seconds in (path.read_text().split() for path in stages)
        }
    }
    write_json(folder / "results.json", results, indent=1)
    write_pictures(folder, pictures, scores)
    print(f"\nscores: {folder / 'results.json'}\npictures: {folder / 'gallery.html'}")


if __name__ == "__main__":
    run_script(main)
