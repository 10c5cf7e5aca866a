"""Measures the effect of the sampler's dials on a world that nothing was tuned on.

    python -m snowglobe.dials --folder demo
    python -m snowglobe.dials --folder demo --images 20 --only candidates

A dial is a set of the sampler's flags. The cache and the checkpoint are those of ./demo.sh in
--folder. Prints a table for each dial and writes dials.json and dials.png into FOLDER/dials/IMAGES.
Rerunning skips finished runs.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from antarctic.datasets import read_coco
from antarctic.errors import InputError
from antarctic.files import atomic, existing_file, write_json
from antarctic.runtime import run
from snowglobe.measure import WEIGHTS, read_captions, read_scenes, score_run

MODELS = ["--clip_model", str(WEIGHTS / "clip"), "--lm", str(WEIGHTS / "bart")]


def sampled(n, temperature=1.0, top_p=0.9):
    return ["--do_sample", "--num_return_sequences", str(n), "--temperature", str(temperature),
            "--top_p", str(top_p)]


CACHES = {  # {name: flags of compute_cache.py}; the first is the cache of the demo
    "as in training": None,
    "of another world": ["--topk", "150"],
    "unigrams alone": ["--topk", "150"],
    "1,000 bigrams": ["--topk", "1000"],
}
DIALS = {  # {dial: {setting: flags of sampler.py, or ["cache", one of CACHES]}}
    "candidates": {"beam 3": [], **{f"{n:,} samples": sampled(n) for n in (10, 100, 1000)}},
    "temperature and top-p": {f"T {t}, p {p}": sampled(100, t, p)
                              for t in (0.7, 1.0, 1.3) for p in (0.8, 0.9, 1.0)},
    "entries in a table": {f"{k} entries": ["--topk", str(k)] for k in (4, 8, 16, 24, 32)},
    "cache": {name: ["cache", name] for name in CACHES},
    "weight of the likelihood": {f"{w:g}": [*sampled(100), "--lm_weight", str(w)]
                                 for w in (0, 0.01, 0.03, 0.1, 0.3, 1)},
}


def script(*arguments):
    """Runs one of the project's scripts in a process of its own. Returns its output. Raises
    InputError where it fails."""
    process = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                             cwd=Path(__file__).parents[1])
    if process.returncode:
        raise InputError(f"{arguments[0]} failed: {process.stderr.strip().splitlines()[-1]}")
    return process.stdout


def make_caches(folder, demo):
    """Makes the CACHES, with the held-out words added. Returns {name: path without extension}.

    folder: for the caches. demo: the folder of demo.sh.
    """
    paths = {}
    for name, mined in CACHES.items():
        path = paths[name] = folder / ("cache_" + re.sub(r"\W+", "_", name))
        files = ["--textfile", f"{path}.txt", "--embfile", f"{path}.npy", *MODELS[:2]]
        # A separate mark: the cache's own files exist before the words are added.
        complete = path.with_suffix(".whole")
        if complete.exists():
            continue
        if not mined:
            for end in (".txt", ".npy", ".npy.json"):
                shutil.copy(demo / f"added{end}", f"{path}{end}")
            complete.touch()
            continue
        world = folder / "world" if name == "of another world" else demo / "world"
        script("compute_cache.py", "--datadir", world, *mined, *files)
        if name == "unigrams alone":
            entries = Path(f"{path}.txt").read_text(encoding="utf-8").splitlines()
            pairs = [entry for entry in entries if " " in entry]
            script("compute_cache.py", *files, "--remove", *pairs)
        script("compute_cache.py", *files, "--add_from", WEIGHTS.parent / "held_out.txt")
        complete.touch()
    return paths


def seconds_each(output):
    """The seconds an image that a run of sampler.py says it took."""
    return float(re.search(r"\(([\d.]+) s each\)", output)[1])


def measure(folder, name, flags, caches, checkpoint):
    """Scores of one setting: {"val2017": scores, "near": scores}, each as of score_run, with the
    seconds an image.

    folder: of the world and the runs. name: of the dial and the setting. flags: see DIALS. caches:
    see make_caches.
    """
    cache = caches["as in training"]
    if flags[:1] == ["cache"]:
        cache, flags = caches[flags[1]], flags[2:]
    scores = {}
    for split in ("val2017", "near"):
        savedir = folder / "runs" / re.sub(r"\W+", "_", f"{name} {split}")
        if not (savedir / "seconds").exists():
            out = script("sampler.py", "--datadir", folder / "world", "--split", split,
                         "--textfile", f"{cache}.txt", "--embfile", f"{cache}.npy", "--savedir",
                         savedir, "--features", folder, "--ckpt", checkpoint, "--gallery", 0,
                         *MODELS, *flags)
            with atomic(savedir / "seconds") as file:
                file.write(str(seconds_each(out)))
        pictures = read_coco(folder / "world", split)
        references = {picture.id: list(picture.captions) for picture in pictures}
        described = read_scenes(folder / "world", split)
        scores[split] = score_run(read_captions(savedir), references, described)
        scores[split]["seconds"] = float((savedir / "seconds").read_text())
    return scores


def plot(path, results):
    """Draws one panel for each dial: CIDEr-D on val2017 and the share of held-out kinds named on
    near, over the settings."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, panels = pyplot.subplots(1, len(results), figsize=(3.6 * len(results), 3.6),
                                     layout="constrained", squeeze=False)
    for axes, (dial, settings) in zip(panels[0], results.items()):
        places = range(len(settings))
        axes.plot(places, [s["val2017"]["cider"] for s in settings.values()], "o-",
                  label="CIDEr-D, val2017")
        axes.plot(places, [s["near"]["held_out"] for s in settings.values()], "s--",
                  label="new things named, near")
        axes.set_xticks(places, settings, rotation=60, ha="right", fontsize=8)
        axes.set(title=dial, ylim=(0, None))
    panels[0][0].legend(fontsize=8)
    with atomic(path, "wb") as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"),
                        help="folder of demo.sh (default %(default)s)")
    parser.add_argument("--images", type=int, default=100,
                        help="images of val2017 and of near (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=DIALS, default=list(DIALS),
                        help="dials to measure (default: all)")
    args = parser.parse_args()
    demo, folder = args.folder.resolve(), (args.folder / "dials" / str(args.images)).resolve()
    checkpoint = existing_file(demo / "checkpoints" / "best.safetensors", "checkpoint of ./demo.sh")
    existing_file(demo / "added.npy", "cache of ./demo.sh")
    if not (folder / "world" / "annotations" / "captions_near.json").exists():
        script("-m", "snowglobe.scenes", "--datadir", folder / "world", "--train", 1000, "--val",
               args.images, "--seed", 1)
    caches = make_caches(folder, demo)
    results = {}
    for dial in args.only:
        print(f"\n{dial:28}{'CIDEr-D':>8}{'objects: recall':>17}{'precision':>11}"
              f"{'new things named':>18}{'distinct':>10}{'s an image':>12}")
        results[dial] = {}
        for setting, flags in DIALS[dial].items():
            scores = measure(folder, f"{dial} {setting}", flags, caches, checkpoint)
            results[dial][setting] = scores
            val, near = scores["val2017"], scores["near"]
            print(f"{setting:28}{val['cider']:8.2f}{val['object_recall']:17.2f}"
                  f"{val['object_precision']:11.2f}{near['held_out']:18.2f}"
                  f"{val['distinct']:10.2f}{val['seconds']:12.3f}", flush=True)
    write_json(folder / "dials.json", results, indent=1)
    plot(folder / "dials.png", results)
    print(f"\nscores: {folder / 'dials.json'}\npicture: {folder / 'dials.png'}")


if __name__ == "__main__":
    run(main)
