"""Scores the runs in a folder of demo.sh: prints a table, writes results.json and a gallery.

    python -m snowglobe.measure --folder demo
    python -m snowglobe.measure --folder demo --bounds --alone

--bounds also scores captions from perfect tables (cache entries that are true of the scene) and
from random tables. --alone measures each small model alone.
"""

import argparse
import json
import math
import random
from itertools import islice, zip_longest
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from antarctic.chair import object_counts
from antarctic.datasets import read_coco
from antarctic.files import write_json
from antarctic.gallery import write_gallery
from antarctic.runtime import run as run_script
from snowglobe import scenes

WEIGHTS = Path(__file__).parent / "weights"
RUNS = {  # {folder in DIR/runs: (split, description)}
    "untuned": ("val2017", "BART as pretrained, beam 3"),
    "tuned": ("val2017", "layernorms tuned, beam 3"),
    "val_added": ("val2017", "layernorms, beam 3, words added"),
    "near_mined": ("near", "layernorms, beam 3, mined cache"),
    "near_added": ("near", "layernorms, beam 3, words added"),
    "near_added_sampled": ("near", "layernorms, sampled, words added"),
    "out_mined": ("out", "layernorms, beam 3, mined cache"),
    "out_added": ("out", "layernorms, beam 3, words added"),
    "tuned_sampled": ("val2017", "layernorms, sampled"),
    "near_mined_sampled": ("near", "layernorms, sampled, mined cache"),
    "out_mined_sampled": ("out", "layernorms, sampled, mined cache"),
    "out_added_sampled": ("out", "layernorms, sampled, words added"),
    "full": ("val2017", "every weight tuned, beam 3"),
    "full_near_added": ("near", "every weight, beam 3, words added"),
    "full_out_added": ("out", "every weight, beam 3, words added"),
    "perfect": ("val2017", "layernorms, perfect tables"),
    "random": ("val2017", "layernorms, random tables"),
}


def plain(text):
    """A text as lower-cased words without punctuation, as the scorers expect it."""
    return " ".join(word.strip(".,!?;:\"'") for word in text.lower().split())


def coco_scores(captions, references):
    """(CIDEr-D, BLEU-4). captions: N texts. references: N lists of texts."""
    captions = {i: [plain(text)] for i, text in enumerate(captions)}
    references = {i: [plain(text) for text in texts] for i, texts in enumerate(references)}
    cider, _ = Cider().compute_score(references, captions)
    bleu, _ = Bleu(4).compute_score(references, captions, verbose=0)
    return cider, bleu[3]


def reference_score(references):
    """Mean (CIDEr-D, BLEU-4) of one reference against the others of its image, over all choices of
    this reference."""
    rounds = []
    for j in range(min(map(len, references))):
        captions = [texts[j] for texts in references]
        others = [texts[:j] + texts[j + 1:] for texts in references]
        rounds.append(coco_scores(captions, others))
    return tuple(sum(values) / len(rounds) for values in zip(*rounds))


def objects(captions, described):
    """(recall, precision, recall of the held-out kinds or None) of the kinds that captions name.

    captions: texts. described: their scenes, as in scenes_{split}.json.
    """
    named = [scenes.named(text) for text in captions]
    kinds = [{group[0] for group in scene["groups"]} for scene in described]
    counts = object_counts(named, kinds)
    new = object_counts(named, [names & set(scenes.HELD_OUT) for names in kinds])
    held_out = new.recalled / new.present if new.present else None
    precision = (counts.named - counts.hallucinated) / max(1, counts.named)
    return counts.recalled / counts.present, precision, held_out


def score_run(captions, references, described):
    """All scores of a run as a dict. captions: {image id: text}. references: {image id: texts}.
    described: {image id: scene}."""
    ids = list(captions)
    cider, bleu = coco_scores([captions[i] for i in ids], [references[i] for i in ids])
    recall, precision, held_out = objects([captions[i] for i in ids], [described[i] for i in ids])
    return {"cider": cider, "bleu4": bleu, "object_recall": recall, "object_precision": precision,
            "held_out": held_out, "distinct": len(set(captions.values())) / len(ids)}


def bound(folder, kind, table, described):
    """Captions from tables that do not come from CLIP: {image id: text}.

    folder: of demo.sh. kind: seeds rng. table(scene, entries, k, rng): the entries of a table.
    described: {image id: scene}.
    """
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
    tables = [linearize(table(scene, entries, settings["topk"], rng))
              for scene in described.values()]
    tokens = captioner.tokenize(tables, settings["maxlen_enc"])
    captions = []
    for start in range(0, len(tokens), 64):
        captions += [beams[0][0] for beams in captioner.beam(tokens[start:start + 64])]
    return dict(zip(described, captions))


def perfect_table(scene, entries, k, rng):
    """k entries of the cache that are true of the scene, in turn one of each of its kinds and one
    without a kind."""
    fields = {name: value for name, value in scene.items() if name in scenes.Scene._fields}
    fields["groups"] = tuple(map(tuple, scene["groups"]))
    facts = scenes.truths(scenes.Scene(**fields))
    by_kind = {}
    for entry in rng.sample(entries, len(entries)):
        claims = scenes.claims(entry)
        if claims and claims <= facts:
            kind = min((claim[1] for claim in claims if claim[0] == "kind"), default="")
            by_kind.setdefault(kind, []).append(entry)
    return [entry for turn in zip_longest(*by_kind.values()) for entry in turn if entry][:k]


def random_table(scene, entries, k, rng):
    """k random entries of the cache."""
    return rng.sample(entries, k)


def measure_alone(folder, described):
    """Yields lines of text with scores of each small model alone. folder: of demo.sh. described:
    {image id: scene} of val2017."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from antarctic.cache import read_cache, search
    from antarctic.features import image_features
    from model import Captioner, Clip
    from snowglobe import build

    clip = Clip(WEIGHTS / "clip")
    pictures = read_coco(folder / "world", "val2017")
    images, _, _ = image_features(clip, pictures, folder)
    vectors = clip.encode_texts([p.captions[0] for p in pictures])
    first = (images @ vectors.T).argmax(1) == torch.arange(len(images))
    yield (f"CLIP: of {len(images)} captions of val2017 an image's own comes first for "
           f"{first.float().mean():.0%}")
    entries, embeddings = read_cache([folder / "cache.txt"], [folder / "cache.npy"], clip.identity,
                                     clip.dim)
    for k in (8, 16, 24, 32):
        _, indices = search(images, embeddings, k)
        tables = [" | ".join(entries[i] for i in row) for row in indices.tolist()]
        recall, precision, _ = objects(tables, [described[p.id] for p in pictures])
        yield (f"CLIP: in tables of {k} entries stand {recall:.0%} of the kinds; {precision:.0%} "
               f"of the kinds in them are there")
    rng = random.Random("alone")
    captioner = Captioner(WEIGHTS / "bart")
    texts = [build.caption_text(rng) for _ in range(500)]
    noisy = captioner.tokenize([build.noised(rng, text) for text in texts], 128)
    with torch.inference_mode():
        loss = captioner.loss(noisy, captioner.tokenize(texts, 64)).item()
        yield f"BART: denoises 500 fresh captions at {loss:.2f} nats a token"
        gpt = AutoModelForCausalLM.from_pretrained(WEIGHTS / "gpt").float()
        tokenizer, losses = AutoTokenizer.from_pretrained(WEIGHTS / "gpt"), []
        for _ in range(200):
            tokens = tokenizer(build.story_text(rng), return_tensors="pt")
            losses.append(gpt(**tokens, labels=tokens.input_ids).loss.item())
    yield f"GPT-Neo: perplexity {math.exp(sum(losses) / len(losses)):.2f} on 200 fresh stories"


def write_pictures(folder, pictures, results):
    """Writes gallery.html: the first 24 images of some runs, those with held-out kinds first.

    pictures: {split: Pictures}. results: {run: scores}.
    """
    sections = []
    for run in ("out_added", "near_added", "near_added_sampled", "tuned", "out_mined"):
        if run not in results:
            continue
        with open(folder / "runs" / run / "details.jsonl", encoding="utf-8") as file:
            records = [json.loads(line) for line in islice(file, 24)]
        split, description = RUNS[run]
        scores = results[run]
        summary = f"CIDEr {scores['cider']:.2f}, object recall {scores['object_recall']:.2f}"
        if split != "val2017":
            summary += f", held-out kinds named {scores['held_out']:.2f}"
        references = {picture.id: picture.captions for picture in pictures[split]}
        sections.append((f"{split}: {description}", summary, records,
                         [references[record["image_id"]] for record in records]))
    write_gallery(folder / "gallery.html", "The snowglobe, captioned", sections)


def read_captions(folder):
    """The captions of a run: {image id: text}."""
    records = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    return {record["image_id"]: record["caption"] for record in records}


def read_scenes(datadir, split):
    """The scenes of a split as dicts: {image id: scene}."""
    described = json.loads((datadir / "annotations" / f"scenes_{split}.json").read_text())
    return {scene["image_id"]: scene for scene in described}


def print_table(reference, scores):
    """Prints a row for the references and one for each run. reference: see reference_score. scores:
    {run: scores}."""
    print(f"{'':44}{'CIDEr-D':>8}{'BLEU-4':>8}{'objects: recall':>17}{'precision':>11}"
          f"{'held-out named':>16}")
    cider, bleu = reference
    print(f"{'val2017     one reference against the others':44}{cider:8.2f}{bleu:8.3f}")
    for run, s in scores.items():
        split, description = RUNS[run]
        held_out = "" if s["held_out"] is None else f"{s['held_out']:.2f}"
        row = (f"{split:8} {description:35}{s['cider']:8.2f}{s['bleu4']:8.3f}"
               f"{s['object_recall']:17.2f}{s['object_precision']:11.2f}{held_out:>16}")
        print(row.rstrip())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"),
                        help="folder of demo.sh (default %(default)s)")
    parser.add_argument("--bounds", action="store_true",
                        help="also caption val2017 from perfect and from random tables")
    parser.add_argument("--alone", action="store_true",
                        help="also measure each small model alone")
    args = parser.parse_args()
    folder = args.folder
    splits = {split for split, _ in RUNS.values()}
    pictures = {split: read_coco(folder / "world", split) for split in splits}
    described = {split: read_scenes(folder / "world", split) for split in splits}
    references = {split: {picture.id: list(picture.captions) for picture in pictures[split]}
                  for split in splits}

    captions = {run: read_captions(folder / "runs" / run) for run in RUNS
                if (folder / "runs" / run / "captions.json").is_file()}
    if args.bounds:
        captions["perfect"] = bound(folder, "perfect", perfect_table, described["val2017"])
        captions["random"] = bound(folder, "random", random_table, described["val2017"])
    scores = {}
    for run, texts in captions.items():
        split, _ = RUNS[run]
        scores[run] = score_run(texts, references[split], described[split])
    reference = reference_score(list(references["val2017"].values()))
    print_table(reference, scores)
    if args.alone:
        print("", *measure_alone(folder, described["val2017"]), sep="\n")

    results = {"reference": {"cider": reference[0], "bleu4": reference[1]}}
    results |= {run: s for run, s in scores.items() if RUNS[run][0] == "val2017"}
    for split in ("near", "out"):
        results[split] = {run.removeprefix(f"{split}_"): s["held_out"]
                          for run, s in scores.items() if run.startswith(f"{split}_")}
    stages = sorted((folder / "done").iterdir()) if (folder / "done").is_dir() else []
    seconds = dict(path.read_text().split() for path in stages)  # {stage: seconds}
    results |= {"runs": scores, "seconds": {stage: float(n) for stage, n in seconds.items()}}
    write_json(folder / "results.json", results, indent=1)
    write_pictures(folder, pictures, scores)
    print(f"\nscores: {folder / 'results.json'}\npictures: {folder / 'gallery.html'}")


if __name__ == "__main__":
    run_script(main)
