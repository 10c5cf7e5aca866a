"""Counts the faults of captions by kind, and what rules of choice among the candidates mend.

    python -m snowglobe.faults --world demo/world --results demo/runs/tuned demo/runs/tuned_sampled

The results are the sampler's, in a world of snowglobe.scenes. Its records hold all candidates with
CLIP's cosine and the likelihood, so each rule chooses anew without a model. Prints for each rule
CIDEr-D, the recall of objects (in all scenes, and in those of so many things), and the share of
captions with each fault.
"""

import argparse
import json
import math
from pathlib import Path

from antarctic.datasets import read_coco
from antarctic.evidence import repeats
from antarctic.files import existing_file
from antarctic.runtime import run
from snowglobe.measure import coco_scores, objects, read_scenes
from snowglobe.scenes import NOUN_PATTERNS, Scene, claims, truths

RULES = {  # {name: (--lm_weight, --repeat_weight)}
    "CLIP alone": (0, 0), "likelihood .03": (.03, 0), "likelihood .1": (.1, 0),
    "repeats .01": (0, .01), "repeats .02": (0, .02), "repeats .05": (0, .05),
    "both, .03 and .02": (.03, .02),
}
FAULTS = "repeated", "missing", "wrong object", "colour", "count"
THINGS = 1, 2, 3, 4
WIDTH = 13  # of a printed column


def faults(text, scene):
    """How often a caption has each of FAULTS, a list of numbers. scene: as in
    scenes_{split}.json."""
    fields = {name: value for name, value in scene.items() if name in Scene._fields}
    facts = truths(Scene(**fields | {"groups": tuple(map(tuple, scene["groups"]))}))
    kinds = {group[0] for group in scene["groups"]}
    nouns = {kind: len(pattern.findall(text.lower())) for kind, pattern in NOUN_PATTERNS.items()}
    said = {kind for kind, n in nouns.items() if n}
    false = [claim for claim in claims(text) - facts if claim[1] in kinds]  # of what is there
    return [sum(n > 1 for n in nouns.values()), len(kinds - said), len(said - kinds),
            sum(claim[0] == "colour" for claim in false),
            len({claim[1] for claim in false if claim[0] in ("count", "many")})]


def chosen(record, lm_weight, repeat_weight):
    """The candidate of a record that the sampler chooses with these weights, a text."""
    return max(record["candidates"], key=lambda each: (
        each[1] + lm_weight * each[2] - repeat_weight * repeats(each[0]), each[2]))[0]


def measure(world, savedir, split):
    """{rule: [CIDEr-D, recall of objects, those for each of THINGS, shares for each of FAULTS]}."""
    path = existing_file(savedir / "details.jsonl", "file of a run's details")
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    described = read_scenes(world, split)
    described = [described[record["image_id"]] for record in records]
    references = {each.id: list(each.captions) for each in read_coco(world, split)}
    references = [references[record["image_id"]] for record in records]
    rows = {}
    for name, weights in RULES.items():
        captions = [chosen(record, *weights) for record in records]
        counts = [faults(text, scene) for text, scene in zip(captions, described)]
        rows[name] = [coco_scores(captions, references)[0], objects(captions, described)[0]]
        for n in THINGS:
            pairs = [pair for pair in zip(captions, described) if len(pair[1]["things"]) == n]
            rows[name].append(objects(*zip(*pairs))[0] if pairs else math.nan)
        rows[name] += [sum(map(bool, column)) / len(captions) for column in zip(*counts)]
    return rows


def main():
    parser = argparse.ArgumentParser("python -m snowglobe.faults", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True, metavar="DIR")
    parser.add_argument("--results", type=Path, nargs="+", required=True, metavar="DIR",
                        help="--savedir of runs of sampler.py")
    parser.add_argument("--split", default="val2017", help="(default %(default)s)")
    args = parser.parse_args()
    for savedir in args.results:
        head = "CIDEr-D", "recall", *(f"{n} things" for n in THINGS), *FAULTS
        rows = measure(args.world, savedir, args.split)
        print(f"\n{savedir}\n{'':20}" + "".join(f"{title:>{WIDTH}}" for title in head))
        for name, row in rows.items():
            print(f"{name:20}" + "".join(f"{value:>{WIDTH}.3f}" for value in row))


if __name__ == "__main__":
    run(main)
