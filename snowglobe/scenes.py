"""Draws the snowglobe's scenes and writes them in COCO's layout: images with five captions each.

    python -m snowglobe.scenes --datadir demo/world --train 2400 --val 500 --seed 0
    python -m snowglobe.scenes --datadir /tmp/world --train 20 --val 5

A scene has one to four objects of up to three kinds, in one of eight settings. Its captions say
only what is drawn. Six kinds (HELD_OUT) are in no training image and no training caption. As in
nocaps (Agrawal et al. 2019, https://nocaps.org), one validation split has none of them (val2017,
in-domain), one has them beside known kinds (near) and one has only them (out).

DIR/annotations/captions_{split}.json has COCO's layout. DIR/annotations/scenes_{split}.json lists
the objects drawn (kinds, colours, counts, boxes), to measure which of them a caption names.
"""

import argparse
import multiprocessing
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from tqdm import tqdm

from antarctic.files import output_folder, write_json
from antarctic.runtime import run
from snowglobe.kinds import COLOURS, GLASS, KINDS, WHITE, Pen, shade

SIZE = 128  # pixels, each side
SUPERSAMPLE = 2  # factor by which the drawing is larger than the image
HELD_OUT = ("penguin", "lighthouse", "snowman", "whale", "mushroom", "train")
SETTINGS = {  # {setting: its phrases in captions}
    "beach": ("on the beach", "at the beach", "on a sandy beach", "by the sea", "at the seaside"),
    "snow": ("in the snow", "on snowy ground", "on a winter day", "in deep snow"),
    "forest": ("in the forest", "in the woods", "in a forest", "in a quiet wood"),
    "city": ("in the city", "on a city street", "on the street", "in town"),
    "desert": ("in the desert", "on a sand dune", "in a hot desert", "among the dunes"),
    "meadow": ("in a meadow", "on the grass", "in a field", "in a grassy field"),
    "night": ("at night", "in the dark", "at midnight", "on a starry night"),
    "room": ("in a room", "indoors", "on the floor", "on a carpet", "inside a room"),
}
RELATIONS = {  # {relation of A to B: (phrases between A and B, phrases between B and A)}
    "next to": (("next to", "beside", "near", "by"), ("next to", "beside", "near", "by")),
    "above": (("above", "over"), ("under", "below")),
    "in front of": (("in front of",), ("behind",)),
    "on": (("on", "on top of"), ("under", "beneath")),
}
NUMBERS = {
    1: ("a", "a", "a", "a", "one"),
    2: ("two", "two", "a pair of"),
    3: ("three", "three", "a group of"),
    4: ("four", "four", "a group of"),
}
SIZES = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge"), "": ()}


class Thing(NamedTuple):
    kind: str
    colour: str  # "" where the kind has only its natural colours
    x: float  # middle of its square box, as a share of the image's side
    y: float  # bottom of the box, also as a share
    size: float  # side of the box, also as a share
    flip: bool  # whether left and right are swapped


class Scene(NamedTuple):
    setting: str
    groups: tuple  # ((kind, colour, count), ...), the most prominent first
    relation: str  # of the first group to the second, or "" for a single group
    size: str  # "small" or "big" for a single object, or ""
    things: tuple  # of Thing, in drawing order
    seed: int  # of the background's details


# ------------------------------------------------------------------------------------------ drawing

class Background(NamedTuple):
    sky: tuple
    ground: tuple
    blades: int = 0  # number of short lines on the ground
    blade: tuple | None = None  # colour of these lines
    behind: Callable | None = None  # draws the horizon: (pen, horizon, jitter, rng)
    before: Callable | None = None  # draws on the ground or in the sky: (pen, horizon, rng)


def draw_skyline(pen, horizon, jitter, rng):
    x = 0.0
    while x < 1:
        w, h = rng.uniform(0.1, 0.18), rng.uniform(0.2, 0.46)
        grey = shade((158, 166, 184), rng.uniform(0.8, 1.15))
        pen.draw.rectangle(pen.corners(x, horizon - h, min(x + w, 1), horizon), grey)
        for wy in range(int(h / 0.06)):
            for wx in range(int(w / 0.05)):
                if rng.random() < 0.7:
                    pen.dot(x + 0.03 + wx * 0.05, horizon - h + 0.04 + wy * 0.06, 0.01,
                            (228, 230, 200))
        x += w


def draw_trees(pen, horizon, jitter, rng):
    for _ in range(14):
        x, h = rng.random(), rng.uniform(0.24, 0.5)
        green = shade((44, 92, 60), rng.uniform(0.8, 1.2))
        corners = x - 0.07, horizon + 0.02, x, horizon - h, x + 0.07, horizon + 0.02
        pen.draw.polygon(pen.points(corners), green)


def draw_sea(pen, horizon, jitter, rng):
    pen.draw.rectangle(pen.corners(0, horizon - 0.1, 1, horizon), shade((56, 140, 206), jitter))


def draw_dunes(pen, horizon, jitter, rng):
    for _ in range(3):
        x, w = rng.random(), rng.uniform(0.3, 0.5)
        sand = shade((232, 188, 122), rng.uniform(0.9, 1.1))
        pen.draw.ellipse(pen.corners(x - w, horizon - 0.12, x + w, horizon + 0.3), sand)


def draw_snowfall(pen, horizon, rng):
    for _ in range(24):
        pen.dot(rng.random(), rng.random() * horizon, 0.008, WHITE)


def draw_road(pen, horizon, rng):
    for i in range(4):
        pen.line((236, 232, 214), 0.02, 0.05 + i * 0.27, 0.93, 0.19 + i * 0.27, 0.93)


def draw_stars(pen, horizon, rng):
    for _ in range(26):
        place = rng.random(), rng.random() * (horizon - 0.04)
        pen.dot(*place, rng.choice((0.006, 0.01)), (250, 246, 200))


def draw_carpet_and_window(pen, horizon, rng):
    carpet = pen.corners(0.08, horizon + 0.1, 0.92, horizon + 0.36)
    pen.draw.ellipse(carpet, (150, 60, 70), (220, 190, 120), 4)
    x = rng.uniform(0.08, 0.62)
    pen.box(GLASS, x, 0.08, x + 0.28, 0.32)
    pen.line(WHITE, 0.02, x + 0.14, 0.09, x + 0.14, 0.31)


BACKGROUNDS = {
    "beach": Background((150, 208, 244), (240, 218, 160), 18, (216, 190, 130), behind=draw_sea),
    "snow": Background((196, 214, 232), (244, 248, 252), 26, (214, 226, 240), before=draw_snowfall),
    "forest": Background((166, 206, 190), (96, 128, 70), 20, (70, 104, 54), behind=draw_trees),
    "city": Background((188, 200, 216), (128, 130, 136), behind=draw_skyline, before=draw_road),
    "desert": Background((252, 214, 160), (226, 178, 110), 16, (204, 154, 90), behind=draw_dunes),
    "meadow": Background((160, 214, 248), (132, 192, 90), 30, (98, 164, 66)),
    "night": Background((26, 30, 66), (44, 56, 60), before=draw_stars),
    "room": Background((236, 220, 196), (176, 130, 92), before=draw_carpet_and_window),
}


def draw_setting(draw, setting, side, rng):
    """Draws the background of a setting: sky, ground and a few details."""
    background = BACKGROUNDS[setting]
    jitter, horizon = rng.uniform(0.93, 1.0), rng.uniform(0.54, 0.64)
    pen = Pen(draw, 0, 0, side)
    draw.rectangle((0, 0, side, side), shade(background.sky, jitter))
    if background.behind:
        background.behind(pen, horizon, jitter, rng)
    draw.rectangle(pen.corners(0, horizon, 1, 1), shade(background.ground, jitter))
    for _ in range(background.blades):
        x, y = rng.random(), rng.uniform(horizon + 0.02, 1)
        pen.line(background.blade, 0.012, x, y, x + rng.uniform(0.0, 0.03), y - 0.02)
    if background.before:
        background.before(pen, horizon, rng)


def draw_scene(scene, size=SIZE):
    """The picture of a scene, an RGB image of size x size pixels."""
    side = size * SUPERSAMPLE
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)
    draw_setting(draw, scene.setting, side, random.Random(scene.seed))
    for thing in scene.things:
        box = thing.size * side
        pen = Pen(draw, thing.x * side - box / 2, thing.y * side - box, box, thing.flip)
        KINDS[thing.kind].draw(pen, COLOURS.get(thing.colour))
    return image.resize((size, size), Image.BOX)


# ------------------------------------------------------------------------------------------- scenes

def make_scene(rng, kinds, must=(), most_groups=3):
    """A random Scene.

    rng: random.Random. kinds: names to choose from. must: names of which one is in the scene (the
    held-out kinds). most_groups: the largest number of kinds.
    """
    setting = rng.choice(list(SETTINGS))
    kinds = [k for k in kinds if not (setting == "night" and k == "sun")]
    n_groups = min(most_groups, rng.choices((1, 2, 3), (42, 38, 20))[0])
    if must and most_groups > 1:
        n_groups = max(2, n_groups)  # room for a known kind
    names = rng.sample([k for k in kinds if k not in must], n_groups - bool(must))
    if must:
        names.insert(rng.randrange(n_groups), rng.choice(must))
    if n_groups == 2 and rng.random() < 0.45:  # makes "on" and "in front of" more frequent
        names.sort(key=lambda k: KINDS[k].big or KINDS[k].top > 0)
    counts = rng.choice({
        1: ((1,), (1,), (1,), (2,), (3,), (4,)),
        2: ((1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (2, 2), (3, 1)),
        3: ((1, 1, 1), (1, 1, 1), (1, 1, 1), (2, 1, 1)),
    }[n_groups])
    groups = tuple((k, rng.choice(list(COLOURS)) if KINDS[k].coloured else "", n)
                   for k, n in zip(names, counts))
    size = rng.choice(("small", "", "big")) if n_groups == 1 and groups[0][2] == 1 else ""
    relation = choose_relation(rng, groups)
    return Scene(setting, groups, relation, size, place(rng, groups, relation, size),
                 rng.randrange(2**31))


def choose_relation(rng, groups):
    """A relation of the first group to the second that can be drawn; "" for a single group."""
    if len(groups) == 1:
        return ""
    (a, _, m), (b, _, n) = groups[:2]
    if KINDS[a].sky != KINDS[b].sky:
        return "above" if KINDS[a].sky else "under"
    options = ["next to"]
    if len(groups) == 2 and m == n == 1 and not KINDS[a].sky:
        if KINDS[b].top and not KINDS[a].big:
            options += ["on"] * 2
        if KINDS[b].big and not KINDS[a].big:
            options += ["in front of"]
    return rng.choice(options)


def place(rng, groups, relation, size):
    """Places the objects of all groups: a tuple of Thing, the farthest first."""
    def thing(group, x, y, side):
        side *= rng.uniform(0.94, 1.06)
        x = min(max(x, side / 2), 1 - side / 2)
        y = min(max(y, side + 0.01), 0.99)
        return Thing(group[0], group[1], x, y, side, rng.random() < 0.5)

    if relation in ("on", "in front of"):
        a, b = groups
        x = rng.uniform(0.38, 0.62)
        if relation == "on":
            below = thing(b, x, rng.uniform(0.9, 0.97), 0.52)
            above = thing(a, below.x, 0, 0.36)
            return below, above._replace(y=below.y - below.size * (1 - KINDS[b[0]].top) + 0.02)
        behind = thing(b, x, rng.uniform(0.8, 0.86), 0.66)
        x = behind.x + rng.choice((-1, 1)) * rng.uniform(0.16, 0.24)
        return behind, thing(a, x, 0.97, 0.36)
    levels = {sky: [g for g in groups if KINDS[g[0]].sky == sky for _ in range(g[2])]
              for sky in (True, False)}
    total = sum(map(len, levels.values()))
    side = {1: 0.5, 2: 0.42, 3: 0.36, 4: 0.32}[total] * {"small": 0.6, "big": 1.4, "": 1}[size]
    things = []
    for sky, level in levels.items():
        order = level if rng.random() < 0.5 else level[::-1]
        here = min(side, 0.96 / max(1, len(order)))
        for i, group in enumerate(order):
            x = (i + 0.5) / len(order) + rng.uniform(-0.3, 0.3) * (1 / len(order) - here)
            if sky and total > len(order):
                bottom = rng.uniform(0.0, 0.06) + here
            else:
                bottom = rng.uniform(0.3, 0.4) + here / 2
            things.append(thing(group, x, bottom if sky else rng.uniform(0.86, 0.97), here))
    return tuple(sorted(things, key=lambda t: t.y))


# ----------------------------------------------------------------------------------------- captions

def noun_phrase(rng, group, size="", detail=0.55):
    """A group in words: "a red dog", "two puppies". detail: probability that it has its colour."""
    name, colour, count = group
    nouns = KINDS[name].nouns
    noun = nouns[0] if len(nouns) == 1 or rng.random() < 0.7 else rng.choice(nouns[1:])
    words = [rng.choice(SIZES[size])] if size and rng.random() < 0.5 else []
    if colour and rng.random() < detail:
        words.append(colour)
    words.append(noun[count > 1])
    number = rng.choice(NUMBERS[count])
    if number == "a" and words[0][0] in "aeiou":
        number = "an"
    return " ".join([number] + words)


def caption(scene, rng):
    """A random caption of a scene. Words, order and detail differ each time; it is always true."""
    groups = list(scene.groups)
    if len(groups) > 1 and rng.random() < 0.1:
        groups.pop()  # people leave things out
    a, *others = (noun_phrase(rng, g, scene.size) for g in groups)
    where = rng.choice(SETTINGS[scene.setting]) if rng.random() < 0.62 else ""
    be = "is" if groups[0][2] == 1 else "are"
    photo = rng.choice(("a picture of", "a photo of", "an image of", "a view of"))
    see = rng.choice((f"there {be}", f"there {be}", "we see", "you can see"))
    if not others:
        doing = KINDS[groups[0][0]].doing
        forms = [f"{a} {where}", f"{a} {where}", f"{see} {a} {where}", f"{photo} {a} {where}"]
        if doing:
            forms += [f"{a} {doing} {where}", f"{a} {be} {doing} {where}",
                      f"{see} {a} {doing} {where}"]
        if where:
            forms += [f"{where} {see} {a}", f"{a} {be} {where}"]
        return tidy(rng.choice(forms))
    b = others[0]
    if scene.relation == "under":
        ways, inverse = RELATIONS["above"][::-1]
    else:
        ways, inverse = RELATIONS[scene.relation]
    way, back = rng.choice(ways), rng.choice(inverse)
    be_b = "is" if groups[1][2] == 1 else "are"
    if len(others) == 1:
        forms = [
            f"{a} {way} {b} {where}", f"{a} {way} {b} {where}", f"{a} {be} {way} {b} {where}",
            f"{a} and {b} {where}", f"{b} {back} {a} {where}", f"{b} {be_b} {back} {a} {where}",
            f"{see} {a} {way} {b} {where}", f"{photo} {a} and {b} {where}",
            f"{photo} {a} {way} {b} {where}", f"{a} with {b} {where}", f"{b} and {a} {where}",
        ]
        if where:
            forms += [f"{where} {see} {a} and {b}", f"{where} {a} {be} {way} {b}"]
        return tidy(rng.choice(forms))
    c = others[1]
    forms = [
        f"{a}, {b} and {c} {where}", f"{c}, {a} and {b} {where}", f"{b}, {c} and {a} {where}",
        f"{a} {way} {b}, and {c} {where}", f"{c}, and {a} {way} {b} {where}",
        f"{see} {a}, {b} and {c} {where}", f"{photo} {a}, {b} and {c} {where}",
        f"{a} with {b} and {c} {where}",
    ]
    if where:
        forms += [f"{where} {see} {a}, {b} and {c}"]
    return tidy(rng.choice(forms))


def tidy(text):
    return " ".join(text.split())


def captions(scene, rng, n=5):
    """n different captions of a scene."""
    distinct = {}
    while len(distinct) < n:
        distinct[caption(scene, rng)] = None
    return list(distinct)


# -------------------------------------------------------------------------------------------- truth

FUNCTION_WORDS = set(
    "a an the of in on at by and with is are there we see you can picture photo image view".split())
NOUN_WORDS = {  # {word: (kind, whether it is only in the plural)}
    word: (name, i == 1 and noun[0] != noun[1] and word not in noun[0].split())
    for name, k in KINDS.items() for noun in k.nouns for i in (0, 1) for word in noun[i].split()
}
NOUN_PATTERNS = {name: re.compile(rf"\b({'|'.join(noun for pair in k.nouns for noun in pair)})\b")
                 for name, k in KINDS.items()}
COUNT_WORDS = {"one": (1,), "two": (2,), "pair": (2,), "three": (3,), "four": (4,), "group": (3, 4)}


def claims(text):
    """The claims of a text about a scene, a set of features. The text is true if truths(scene)
    contains them all. Function words claim nothing."""
    features = set()
    colour = count = None
    for word in text.replace(",", " ").split():
        if word in NOUN_WORDS:
            name, many = NOUN_WORDS[word]
            features.add(("kind", name))
            if many:
                features.add(("many", name))
            if colour:
                features.add(("colour", name, colour))
            if count:
                features.add(("count", name, count))
            if word != "ice":  # "cream" has the colour and count of "ice", too
                colour = count = None
        elif word in COLOURS:
            colour = word
            features.add(("colour", word))
        elif word in COUNT_WORDS:
            count = word
            features.add(("count", word))
        elif word not in FUNCTION_WORDS:
            features.add(("say", word))
    return features


def truths(scene):
    """All features that are true of a scene, in the form of claims."""
    features = set()
    phrases = list(SETTINGS[scene.setting]) + list(SIZES[scene.size])
    if scene.relation:
        key = "above" if scene.relation == "under" else scene.relation
        phrases += [phrase for way in RELATIONS[key] for phrase in way]
    for name, colour, n in scene.groups:
        phrases.append(KINDS[name].doing)
        features.add(("kind", name))
        if n > 1:
            features.add(("many", name))
        if colour:
            features |= {("colour", colour), ("colour", name, colour)}
        for word, counts in COUNT_WORDS.items():
            if n in counts:
                features |= {("count", word), ("count", name, word)}
    return features | {("say", word) for phrase in phrases for word in phrase.split()}


def named(text):
    """The set of kinds that a caption names by any of their nouns, singular or plural."""
    return {name for name, pattern in NOUN_PATTERNS.items() if pattern.search(text.lower())}


# ------------------------------------------------------------------------------ a world on the disk

SPLITS = ("train2017", "val2017", "near", "out")


def split_scene(split, seed, i):
    """(scene, five captions) of image i of a split. The arguments alone determine them."""
    rng = random.Random(f"{seed}/{split}/{i}")
    known = [k for k in KINDS if k not in HELD_OUT]
    if split == "near":
        scene = make_scene(rng, known, HELD_OUT)
    elif split == "out":
        scene = make_scene(rng, HELD_OUT, HELD_OUT, most_groups=1)
    else:
        scene = make_scene(rng, known)
    return scene, captions(scene, rng)


def reset_signals():
    """Sets the signals of a process of the pool. The parent ends it by SIGTERM, which must not
    raise here; only the parent handles Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_image(job):
    """Draws one image. job: (path, split, seed, i)."""
    path, split, seed, i = job
    temporary = path.with_suffix(".tmp")
    draw_scene(split_scene(split, seed, i)[0]).save(temporary, "PNG")
    os.replace(temporary, path)


def write_split(datadir, split, n, seed, pool):
    """Writes a split of n images: DIR/{split}/*.png, then DIR/annotations/scenes_{split}.json, and
    captions_{split}.json last, as the sign that the split is complete."""
    folder = datadir / split
    folder.mkdir(parents=True, exist_ok=True)
    base = SPLITS.index(split) * 10_000_000
    images, annotations, described = [], [], []
    for i in range(n):
        scene, texts = split_scene(split, seed, i)
        images.append({"id": base + i, "file_name": f"{base + i:012}.png", "width": SIZE,
                       "height": SIZE, "license": 1})
        annotations += [{"id": (base + i) * 5 + j, "image_id": base + i, "caption": text}
                        for j, text in enumerate(texts)]
        described.append({"image_id": base + i, **scene._asdict(),
                          "things": [thing._asdict() for thing in scene.things]})
    jobs = [(folder / image["file_name"], split, seed, i) for i, image in enumerate(images)]
    for _ in tqdm(pool.imap_unordered(write_image, jobs, chunksize=32), f"drawing {split}", n,
                  unit="image"):
        pass
    (datadir / "annotations").mkdir(exist_ok=True)
    write_json(datadir / "annotations" / f"scenes_{split}.json", described)
    write_json(datadir / "annotations" / f"captions_{split}.json", {
        "info": {"description": "the snowglobe, a drawn miniature of COCO", "version": "1",
                 "year": 2026},
        "licenses": [{"id": 1, "name": "MIT License",
                      "url": "https://opensource.org/license/mit"}],
        "images": images, "annotations": annotations})


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datadir", type=Path, required=True,
                        help="folder to write the world into")
    parser.add_argument("--train", type=int, default=3000,
                        help="images of train2017 (default %(default)s)")
    parser.add_argument("--val", type=int, default=500,
                        help="images each of val2017, near and out (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the world (default %(default)s)")
    args = parser.parse_args()
    if args.train < 1 or args.val < 1:
        parser.error("--train and --val must be at least 1")
    output_folder(args.datadir)
    with multiprocessing.Pool(initializer=reset_signals) as pool:
        for split in SPLITS:
            write_split(args.datadir, split, args.train if split == "train2017" else args.val,
                        args.seed, pool)
    print(f"wrote {args.train} images for training and 3 times {args.val} for validation to "
          f"{args.datadir}")


if __name__ == "__main__":
    run(main)
