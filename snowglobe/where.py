"""Measures where entries are seen (--where): whether a map's peak lies in a box of the named kind.

    python -m snowglobe.where --datadir demo/world
    python -m snowglobe.where --datadir demo/world other/world --split near \\
        --textfile demo/added.txt --embfile demo/added.npy
    python -m snowglobe.where --taught

Counts the entries of tables that name one kind, and one that is in the image. Beside the shares of
patches stands MaskCLIP's way, which treats the last layer's values of a patch as those of the class
token (Zhou et al. 2022, https://arxiv.org/abs/2112.01071), and chance: the share of the patches
whose middle lies in such a box. Prints a table, and what maps cost beside encoding, on one thread.
--taught does so with things that were taught from five pictures each, six at once (compute_cache.py
--teach), on 20 others with each thing; beside them stand maps of their class word.
"""

import argparse
import random
import time
from pathlib import Path

from antarctic.datasets import read_coco
from antarctic.runtime import run
from snowglobe import scenes, strangers
from snowglobe.measure import WEIGHTS, read_scenes

BATCH = 16  # images at a time, as the sampler has
COLUMNS = ("entries", "shares", "MaskCLIP", "chance", "beside other kinds", "shares", "MaskCLIP",
           "chance")


def inside(scene, kind, side):
    """Which patches have their middle in a box of a kind, bool (side, side). scene: as in
    scenes_{split}.json."""
    import torch
    middle, found = (torch.arange(side) + 0.5) / side, torch.zeros(side, side, dtype=torch.bool)
    for thing in scene["things"]:
        if thing["kind"] == kind:
            across = (middle - thing["x"]).abs() <= thing["size"] / 2
            down = (middle >= thing["y"] - thing["size"]) & (middle <= thing["y"])
            found |= down[:, None] & across
    return found


def mask_clip(clip, prepared):
    """MaskCLIP's vectors of patches, unit rows, float32 (B, patches, dim)."""
    import torch
    vision, kept = clip.model.vision_model, []
    attention = vision.encoder.layers[-1].self_attn
    with attention.v_proj.register_forward_hook(lambda _, inputs, output: kept.append(output)):
        clip.encode_images(prepared)
    with torch.inference_mode():
        vectors = clip.model.visual_projection(vision.post_layernorm(attention.out_proj(kept[0])))
    return torch.nn.functional.normalize(vectors[:, 1:], dim=-1)


def peaks_of(clip, prepared, entries, embeddings, topk):
    """For each of B images a list of (entry, patch of its peak by shares, by MaskCLIP)."""
    from antarctic.cache import search
    from antarctic.where import contributions, maps
    features, c = contributions(clip, prepared)
    _, rows = search(features, embeddings, topk)  # (B, k)
    vectors = embeddings[rows]  # (B, k, dim)
    ways = [maps(parts, vectors).flatten(2).argmax(2).tolist()
            for parts in (c, mask_clip(clip, prepared))]
    return [list(zip([entries[row] for row in image], *peaks))
            for image, *peaks in zip(rows.tolist(), *ways)]


def measure(clip, datadir, split, entries, embeddings, topk):
    """A world's line of the table: (its numbers, see COLUMNS; what was prepared of the images)."""
    from antarctic.images import read_image
    pictures, described = read_coco(datadir, split), read_scenes(datadir, split)
    prepared = [clip.prepare(read_image(picture.path)) for picture in pictures]
    hits, several = [], []
    for start in range(0, len(prepared), BATCH):
        found = peaks_of(clip, prepared[start:start + BATCH], entries, embeddings, topk)
        for picture, peaks in zip(pictures[start:start + BATCH], found):
            scene = described[picture.id]
            kinds = {group[0] for group in scene["groups"]}
            for entry, *patches in peaks:
                named = scenes.named(entry)
                if len(named) == 1 and named <= kinds:
                    right = inside(scene, *named, side_of(clip)).flatten()
                    hit = [*(right[patch].item() for patch in patches), right.float().mean().item()]
                    hits.append(hit)
                    several += [hit] if len(kinds) > 1 else []
    shares, masked, chance = (sum(column) / len(hits) for column in zip(*hits))
    of_several = [sum(column) / len(several) for column in zip(*several)]
    return [len(hits), shares, masked, chance, len(several), *of_several], prepared


def draw(rng, name, alone):
    """A scene with a stranger, alone or beside known kinds."""
    known = [kind for kind in scenes.KINDS if kind not in (*strangers.STRANGERS, *scenes.HELD_OUT)]
    return scenes.make_scene(rng, [name] if alone else known, (name,), 1 if alone else 3)


def encode(clip, drawn):
    """contributions() of scenes."""
    import torch

    from antarctic.where import contributions
    parts = [contributions(clip, [scenes.draw_scene(scene) for scene in drawn[i:i + BATCH]])
             for i in range(0, len(drawn), BATCH)]
    return [torch.cat(each) for each in zip(*parts)]  # (n, dim), (n, patches, dim)


def rows_of_taught(clip, rng, names, others, embeddings, topk):
    """The rows that five pictures of each thing teach, float32 (dim,) each: three of it alone, two
    beside known kinds. others: vectors of other pictures."""
    import torch

    from antarctic.cache import search
    from antarctic.teaching import learn_all, row_of
    taught = []
    for name in names:
        photos, _ = encode(clip, [draw(rng, name, i < 3) for i in range(5)])
        taught.append((photos.numpy(), others.numpy()[:0]))
    spread, lessons = learn_all(others.numpy(), taught)
    scores, _ = search(others, embeddings, topk)
    least, most = scores[:, -1].mean().item(), scores[:, 0].mean().item()
    return [torch.from_numpy(row_of(spread, lesson, least, most)) for lesson in lessons]


def measure_taught(clip, embeddings, topk, seed, images=20):
    """Yields (group, images, share by rows, by class words, chance) of one draw. The strangers must
    have moved in."""
    rng = random.Random(seed)
    known = [kind for kind in scenes.KINDS if kind not in (*strangers.STRANGERS, *scenes.HELD_OUT)]
    others, _ = encode(clip, [scenes.make_scene(rng, known) for _ in range(400)])
    for group, names in zip(("new kinds", "instances"), strangers.REPORTED):
        rows = rows_of_taught(clip, rng, names, others, embeddings, topk)
        words = clip.encode_texts([strangers.CLASSES[name] for name in names])
        for alone in (True, False):
            hits = []
            for name, *vectors in zip(names, rows, words):
                drawn = [draw(rng, name, alone) for _ in range(images)]
                for scene, c in zip(drawn, encode(clip, drawn)[1]):
                    scene = {"things": [thing._asdict() for thing in scene.things]}
                    right = inside(scene, name, side_of(clip)).flatten()
                    hits.append([*(right[(c @ vector).argmax()].item() for vector in vectors),
                                 right.float().mean().item()])
            where = "alone" if alone else "beside others"
            yield f"{group}, {where}", len(hits), *(sum(way) / len(hits) for way in zip(*hits))


@strangers.moved_in()
def print_taught(clip, embeddings, topk):
    """Prints the table of measure_taught(), means of three draws."""
    draws = zip(*(measure_taught(clip, embeddings, topk, seed) for seed in range(3)))
    print(f"{'':26}{'images':>8}{'shares':>8}{'least, greatest':>18}{'class word':>12}"
          f"{'chance':>8}")
    for line in draws:
        [group, *_], counts, rows, words, chances = zip(*line)
        print(f"{group:26}{sum(counts):8}{sum(rows) / 3:8.3f}{min(rows):10.3f}{max(rows):8.3f}"
              f"{sum(words) / 3:12.3f}{sum(chances) / 3:8.3f}", flush=True)


def side_of(clip):
    """Patches along one side of an image."""
    vision = clip.model.config.vision_config
    return vision.image_size // vision.patch_size


def cost(clip, prepared, vectors, repeats=25):
    """Milliseconds an image, the least of some repeats in turns: (encoding; encoding with maps of
    these vectors, float32 (k, dim))."""
    from antarctic.where import contributions, maps

    def with_maps(batch):
        _, c = contributions(clip, batch)
        return maps(c, vectors.expand(len(batch), -1, -1))

    least = [float("inf")] * 2
    for start in range(0, repeats * BATCH, BATCH):
        batch = prepared[start % (len(prepared) - BATCH + 1):][:BATCH]
        for way, function in enumerate((clip.encode_images, with_maps)):
            begin = time.perf_counter()
            function(batch)
            least[way] = min(least[way], (time.perf_counter() - begin) / len(batch) * 1000)
    return least


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datadir", type=Path, nargs="+", default=[Path("demo/world")],
                        metavar="DIR", help="worlds of snowglobe.scenes (default: demo/world)")
    parser.add_argument("--taught", action="store_true",
                        help="measure things that were taught from pictures, in place of --datadir")
    parser.add_argument("--split", default="val2017", help="split (default %(default)s)")
    parser.add_argument("--textfile", default="demo/cache.txt", metavar="FILE",
                        help="entries of a cache (default %(default)s)")
    parser.add_argument("--embfile", default="demo/cache.npy", metavar="FILE",
                        help="their embeddings (default %(default)s)")
    parser.add_argument("--topk", type=int, default=10, help="entries of a table (default "
                        "%(default)s)")
    args = parser.parse_args()
    import torch

    from antarctic.cache import read_cache
    from antarctic.clip import Clip

    torch.set_num_threads(1)
    clip = Clip(str(WEIGHTS / "clip"))
    entries, embeddings = read_cache([args.textfile], [args.embfile], clip.identity, clip.dim)
    embeddings = embeddings[:]
    if args.taught:
        return print_taught(clip, embeddings, args.topk)
    widths = [max(10, len(name) + 2) for name in COLUMNS]
    print(f"{'':24}" + "".join(f"{name:>{width}}" for name, width in zip(COLUMNS, widths)))
    for world in args.datadir:
        numbers, prepared = measure(clip, world, args.split, entries, embeddings, args.topk)
        cells = [f"{each:,}" if isinstance(each, int) else f"{each:.3f}" for each in numbers]
        print(f"{str(world)[-24:]:24}" + "".join(
            f"{cell:>{width}}" for cell, width in zip(cells, widths)), flush=True)
    alone, both = cost(clip, prepared, embeddings[:args.topk])
    print(f"\nencoding takes {alone:.2f} ms an image, with maps {both:.2f}")


if __name__ == "__main__":
    run(main)
