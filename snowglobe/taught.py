"""Measures names from photos (compute_cache.py --teach) on things that no model here has seen.

    python -m snowglobe.taught --datadir demo/world --textfile demo/cache.txt \\
        --embfile demo/cache.npy --ckpt demo/checkpoints/best.safetensors
    python -m snowglobe.taught --datadir world --textfile c.txt --embfile c.npy --ckpt \\
        best.safetensors --draws 0 --images 4 --val 20 --tuning

For each draw, each thing is taught from three pictures of it alone and two of it beside known
things, all six of a group at once, with 400 pictures of train2017 as the others. Prints a table of
means over draws, with the least and the greatest, and writes FOLDER/taught.json.
"""

import argparse
import random
from pathlib import Path

import numpy as np

from antarctic.datasets import read_coco
from antarctic.files import output_folder, write_json
from antarctic.runtime import run
from snowglobe import scenes, strangers
from snowglobe.measure import WEIGHTS, coco_scores

OTHERS = 400  # pictures of other things
SAMPLED = {"do_sample": True, "num_return_sequences": 100, "top_p": 0.9}
BEAM = {}  # of 3, the default
CALLED = {kind: f"a {kind[:4]}ling" for kind in scenes.HELD_OUT}


def draw(name, alone, seed, single):
    """A picture with a thing, alone or beside known ones. single: there is one of it."""
    rng = random.Random(f"{name}/{alone}/{seed}")
    known = [kind for kind in scenes.KINDS
             if kind not in strangers.STRANGERS and kind not in scenes.HELD_OUT]
    while True:
        scene = scenes.make_scene(rng, [name] if alone else known, (name,), 1 if alone else 3)
        counts = [count for kind, _, count in scene.groups if kind == name]
        if counts == [1] or not single:
            return scenes.draw_scene(scene)


def draw_others_of_class(name, seed):
    """A picture of another thing of a stranger's class, alone."""
    kind = strangers.CLASSES[name].split(" ", 1)[1]
    rng = random.Random(f"{kind}/{seed}")
    return scenes.draw_scene(scenes.make_scene(rng, [kind], (kind,), most_groups=1))


def features(model, pictures):
    """(n, dim) of PIL images or paths."""
    import torch
    return torch.cat([model.features(pictures[i:i + 64]) for i in range(0, len(pictures), 64)])


def teach(model, others, names, seed):
    """Teaches names, {kind: (name, class word)}, all at once."""
    from antarctic.taught import Taught, checked_thing
    from antarctic.taught_files import Notes
    vectors = []
    for kind in names:
        photos = [draw(kind, i < 3, f"photo {seed} {i}", True) for i in range(5)]
        vectors.append((features(model, photos).numpy(), others[:0]))
    things = [checked_thing(*pair) for pair in names.values()]
    notes = Notes(model.clip.identity, others, things, vectors)
    model.taught = Taught(notes).fitted(model.embeddings, model.topk)


def caption(model, vectors, **how):
    """The captions of images. vectors: (n, dim)."""
    tables = model.tables(vectors)
    ids = [f"image {i}" for i in range(len(vectors))]
    results = model.choose(vectors, tables, model.candidates(tables, ids, **how), **how)
    return [result.caption for result in results]


def shares(captions, nouns, wanted):
    """(share of captions that hold the noun they should, other taught nouns a caption). wanted: the
    noun of each caption, or None."""
    named = [{noun for noun in nouns if noun in text} for text in captions]
    own = np.mean([noun in names for noun, names in zip(wanted, named)])
    return float(own), float(np.mean([len(names - {noun}) for noun, names in zip(wanted, named)]))


def measure(model, group, names, args, world, seed):
    """{what: number} of one draw of a group, names: {kind: (name, class word)}."""
    teach(model, world["others"], names, seed)
    nouns, single, results = [thing.noun for thing in model.taught.things], group == "instances", {}
    for where in ("alone", "beside"):
        pictures = [draw(kind, where == "alone", f"test {i}", single)
                    for kind in names for i in range(args.images)]
        vectors, wanted = features(model, pictures), np.repeat(nouns, args.images)
        for how, settings in (("samples", SAMPLED), ("beam", BEAM)):
            captions = caption(model, vectors, **settings)
            results[f"{where}, {how}"], others = shares(captions, nouns, wanted)
            results[f"{where}, {how}: other names an image"] = others
    if group == "held-out":
        return results
    captions = caption(model, world["val"], **SAMPLED)
    results["val2017: wrongly named, a name"] = shares(captions, nouns, [None] * len(captions))[1] \
        / len(nouns)
    results["val2017: CIDEr lost, six names"] = world["cider"] - cider(captions, world)
    if single:
        pictures = [draw_others_of_class(kind, i) for kind in names for i in range(args.images)]
        captions = caption(model, features(model, pictures), **SAMPLED)
        results["others of its class: wrongly named"] = shares(
            captions, nouns, np.repeat(nouns, args.images))[0]
    first = dict([list(names.items())[seed % len(names)]])
    teach(model, world["others"], first, seed)
    results["val2017: CIDEr lost, one name"] = world["cider"] - cider(
        caption(model, world["val"], **SAMPLED), world)
    return results


def cider(captions, world):
    return coco_scores(captions, world["references"])[0]


@strangers.moved_in()
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("datadir", "textfile", "embfile", "ckpt"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="as of sampler.py")
    parser.add_argument("--savedir", type=Path, default=Path("demo"), help="folder for taught.json "
                        "(default %(default)s)")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2], metavar="SEED",
                        help="seeds of the pictures that teach (default 0 1 2)")
    parser.add_argument("--images", type=int, default=20, help="pictures of each thing alone, and "
                        "beside others (default %(default)s)")
    parser.add_argument("--val", type=int, default=300, help="images of val2017 (default "
                        "%(default)s)")
    parser.add_argument("--tuning", action="store_true", help="take the things that the recipe was "
                        "tuned on")
    args = parser.parse_args()
    from antarctic.taught import Taught
    from model import Model
    output_folder(args.savedir)
    model = Model.load(str(WEIGHTS / "clip"), str(WEIGHTS / "bart"), args.ckpt, args.textfile,
                       args.embfile)
    model.taught = Taught().fitted(model.embeddings, model.topk)
    val = read_coco(args.datadir, "val2017")[:args.val]
    paths = [picture.path for picture in read_coco(args.datadir, "train2017")[:OTHERS]]
    world = {"others": features(model, paths).numpy(),
             "val": features(model, [picture.path for picture in val]),
             "references": [list(picture.captions) for picture in val]}
    world["cider"] = cider(caption(model, world["val"], **SAMPLED), world)
    kinds, instances = strangers.TUNING if args.tuning else strangers.REPORTED
    groups = {"kinds": {name: (f"{'an' if name[0] in 'aeiou' else 'a'} {name}",
                               strangers.CLASSES[name]) for name in kinds},
              "instances": {name: (name, strangers.CLASSES[name]) for name in instances},
              "held-out": {kind: (name, f"a {kind}") for kind, name in CALLED.items()}}
    results = {}
    for group, names in groups.items():
        results[group] = []
        for seed in args.draws:  # each is kept, since all take long
            results[group].append(measure(model, group, names, args, world, seed))
            write_json(args.savedir / "taught.json", {"cider": world["cider"], "draws": results},
                       indent=1)
        for what in results[group][0]:
            values = [result[what] for result in results[group]]
            print(f"{group:10} {what:44}{np.mean(values):7.3f}  ({min(values):.3f} to "
                  f"{max(values):.3f})", flush=True)


if __name__ == "__main__":
    run(main)
