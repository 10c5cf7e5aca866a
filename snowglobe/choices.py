"""Measures the ways to choose a table's entries (--table) on worlds that nothing was tuned on.

    python -m snowglobe.choices --folder demo
    python -m snowglobe.choices --folder demo --worlds 2 --caches "17,000" --trainings 0
    python -m snowglobe.choices --folder demo --samples 100

For each world, cache and way, layernorms are trained on such tables, two epochs on 2,400 images,
once for each seed of --trainings. Then 500 images of val2017 are captioned by beam search, or the
best of --samples, and 500 of near with the held-out words added. Prints the means, half the spread
of CIDEr-D over trainings, how well cover (see antarctic/evidence.py) and CLIP's score tell captions
that name a kind which is not in the image, and what share of the kinds that captions name is wrong,
of those in the table and of others. Writes FOLDER/choices/choices.json, of samples
choices-100.json. Rerunning skips finished runs.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from antarctic.datasets import read_coco
from antarctic.evidence import cover
from antarctic.files import atomic, write_json
from antarctic.runtime import run
from antarctic.selection import METHODS
from snowglobe.dials import MODELS, script
from snowglobe.measure import WEIGHTS, objects, read_captions, read_scenes, score_run
from snowglobe.scenes import named

MINED = {"300": 150, "1,700": 1500}  # {cache: --topk of compute_cache.py}
LARGE = "17,000"  # n-grams of one to four words
COLUMNS = {  # {heading: (split, score)}
    "CIDEr-D": ("val2017", "cider"), "recall": ("val2017", "object_recall"),
    "precision": ("val2017", "object_precision"), "table: recall": ("val2017", "table_recall"),
    "precision ": ("val2017", "table_precision"), "entries": ("val2017", "entries"),
    "near: CIDEr-D": ("near", "cider"), "held-out named": ("near", "held_out"),
    "area: cover": ("val2017", "cover_area"), "score": ("val2017", "score_area"),
    "wrong: in table": ("val2017", "wrong_said"), "not in table": ("val2017", "wrong_unsaid")}


def ngrams(captions, count):
    """The `count` most frequent runs of one to four words of the captions, a list of texts."""
    counts = Counter()
    for caption in captions:
        words = re.findall(r"[a-z']+", caption.lower())
        counts.update(" ".join(words[i:i + n]) for n in range(1, 5)
                      for i in range(len(words) - n + 1))
    return [text for text, _ in counts.most_common(count)]


def make_cache(path, world, name):
    """Makes one of the caches: path.txt and path.npy, and path-added with the held-out words."""
    source = ["--datadir", world, "--topk", MINED.get(name)]
    if name == LARGE:
        captions = (text for picture in read_coco(world, "train2017") for text in picture.captions)
        with atomic(path.with_suffix(".entries")) as file:
            file.write("".join(f"{text}\n" for text in ngrams(captions, 17000)))
        source = ["--entries", path.with_suffix(".entries")]
    for ending in ("", "-added"):  # the second is made anew, then changed
        files = ["--textfile", f"{path}{ending}.txt", "--embfile", f"{path}{ending}.npy"]
        script("compute_cache.py", *source, *files, *MODELS[:2])
    script("compute_cache.py", "--add_from", WEIGHTS.parent / "held_out.txt", *files, *MODELS[:2])


def read_details(savedir):
    """{image id: record} of a run."""
    with open(savedir / "details.jsonl", encoding="utf-8") as file:
        return {record["image_id"]: record for record in map(json.loads, file)}


def area(values, wrong):
    """How well low values tell the wrong captions: the share of pairs of a wrong and a right one in
    which the wrong one has the lower value; ties count half. None without such pairs. values:
    numbers. wrong: of each, whether it is wrong."""
    low = [value for value, bad in zip(values, wrong) if bad]
    high = [value for value, bad in zip(values, wrong) if not bad]
    pairs = [(a < b) + (a == b) / 2 for a in low for b in high]
    return sum(pairs) / len(pairs) if pairs else None


def evidence_scores(captions, records, described):
    """How well a run's tables tell what is wrong in its captions, a dict: the areas of cover and of
    CLIP's score over captions that name a kind which is not in the image; and the shares of wrong
    kinds among those that the captions name, which are in the table and which are not. captions,
    records, described: {image id: caption; record; scene}."""
    covers, cosines, wrong, kinds = [], [], [], {"said": [], "unsaid": []}
    for i, caption in captions.items():
        table, true = records[i]["table"], {kind for kind, *_ in described[i]["groups"]}
        covers.append(cover(caption, table) or 0)
        cosines.append(records[i]["score"])
        wrong.append(bool(named(caption) - true))
        said = named(" | ".join(entry for entry, _ in table))
        for kind in named(caption):
            kinds["said" if kind in said else "unsaid"].append(kind not in true)
    shares = {f"wrong_{name}": sum(each) / len(each) if each else None
              for name, each in kinds.items()}
    return {"cover_area": area(covers, wrong), "score_area": area(cosines, wrong), **shares}


def measure(folder, world, cache, method, seed, topk, samples, insert_cost):
    """Trains and captions: {split: scores}, as of measure.score_run, with those of the tables."""
    scores, how, name = {}, [], ""
    if samples:
        how = ["--do_sample", "--num_return_sequences", samples, "--top_p", 0.9]
        name = f"-{samples}"
    if insert_cost is not None:
        how, name = [*how, "--insert_cost", insert_cost], f"{name}-insert{insert_cost}"
    trained = folder / f"{cache.name}-{method}-{seed}"
    files = ["--textfile", f"{cache}.txt", "--embfile", f"{cache}.npy"]
    if not (trained / "loss.csv").exists() or list(trained.glob("state-*")):
        script("trainer.py", "--datadir", world, *files, *MODELS, "--savedir", trained, "--table",
               method, "--topk", topk, "--lrate", "7e-2", "--epochs", 2, "--seed", seed)
    for split, ending in (("val2017", ""), ("near", "-added")):
        files = ["--textfile", f"{cache}{ending}.txt", "--embfile", f"{cache}{ending}.npy"]
        savedir = trained / f"{split}{name}"
        if not (savedir / "gallery.html").exists():  # the last file that a run writes
            script("sampler.py", "--datadir", world, "--split", split, *files, *MODELS, "--ckpt",
                   trained / "best.safetensors", "--savedir", savedir, "--features", folder,
                   "--gallery", 0, "--batch_size", 64, *how)
        captions, records = read_captions(savedir), read_details(savedir)
        tables = {i: [entry for entry, _ in record["table"]] for i, record in records.items()}
        references = {each.id: list(each.captions) for each in read_coco(world, split)}
        described = read_scenes(world, split)
        scores[split] = score_run(captions, references, described)
        recall, precision, _ = objects([" | ".join(tables[i]) for i in captions],
                                       [described[i] for i in captions])
        entries = sum(map(len, tables.values())) / len(tables)
        scores[split] |= evidence_scores(captions, records, described) | {
            "table_recall": recall, "table_precision": precision, "entries": entries}
    return scores


def cells(results):
    """One line of the printed table. results: of measure(), one a training."""
    parts = []
    for split, score in COLUMNS.values():
        values = [result[split][score] for result in results]
        if None in values:  # there is nothing to compare
            parts.append("-")
            continue
        mean, spread = sum(values) / len(values), max(values) - min(values)
        text = f"{mean:.1f}" if score == "entries" else f"{mean:.3f}"
        parts.append(text + f" ±{spread / 2:.3f}" * (len(values) > 1 and score == "cider"))
    return parts


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"),
                        help="folder of demo.sh (default %(default)s)")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 3], metavar="SEED",
                        help="seeds of the worlds (default 2 3)")
    parser.add_argument("--caches", nargs="+", default=[*MINED, LARGE], choices=[*MINED, LARGE],
                        help="caches, by their entries (default: all)")
    parser.add_argument("--tables", nargs="+", default=METHODS, choices=METHODS,
                        help="ways to choose entries (default: all)")
    parser.add_argument("--trainings", type=int, nargs="+", default=[0, 1, 2], metavar="SEED",
                        help="seeds of the trainings (default 0 1 2)")
    parser.add_argument("--topk", type=int, default=10, help="entries of a table (default "
                        "%(default)s)")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="samples of an image, "
                        "of which CLIP chooses; 0: beam search (default %(default)s)")
    parser.add_argument("--insert_cost", type=float, help="as of sampler.py (default: none)")
    args = parser.parse_args()
    folder, results = (args.folder / "choices").resolve(), {}
    widths = [max(14, len(heading) + 2) for heading in COLUMNS]
    print(f"{'world, cache, tables':24}"
          + "".join(f"{name.strip():>{width}}" for name, width in zip(COLUMNS, widths)))
    for seed in args.worlds:
        world = folder / str(seed) / "world"
        if not (world / "annotations" / "captions_near.json").exists():
            script("-m", "snowglobe.scenes", "--datadir", world, "--train", 2400, "--val", 500,
                   "--seed", seed)
        for name in args.caches:
            cache = folder / str(seed) / f"cache{name.replace(',', '')}"
            if not Path(f"{cache}.whole").exists():
                make_cache(cache, world, name)
                Path(f"{cache}.whole").touch()
            for method in args.tables:
                key = f"{seed}, {name}, {method}"
                results[key] = [measure(folder / str(seed), world, cache, method, training,
                                        args.topk, args.samples, args.insert_cost)
                                for training in args.trainings]
                print(f"{key:24}" + "".join(f"{text:>{width}}" for text, width in zip(
                    cells(results[key]), widths)), flush=True)
    path = folder / (f"choices-{args.samples}.json" if args.samples else "choices.json")
    write_json(path, results, indent=1)
    print(f"\nscores: {path}")


if __name__ == "__main__":
    run(main)
