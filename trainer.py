"""Trains the layernorms of a language model to write captions from tables of cache entries.

    python trainer.py --datadir coco --textfile cache.txt --embfile cache.npy --savedir checkpoints
    python trainer.py --datadir world --textfile cache.txt --embfile cache.npy --clip_model snowglobe/weights/clip \\
        --lm snowglobe/weights/bart --topk 16 --lrate 7e-2

A run that was stopped goes on where it was when the same command is given again: its state is saved every --save_seconds.
"""

import argparse
import csv
import hashlib
import json
import math
import random
import time
from functools import partial

import torch
from tqdm import tqdm

from antarctic.cache import read_cache, search, to_bfloat16
from antarctic.datasets import read_coco
from antarctic.distributed import all_reduce_sum, rank_and_world
from antarctic.errors import InputError
from antarctic.files import atomic, locked, output_folder
from antarctic.images import report_bad_images
from antarctic.index import open_index
from antarctic.runtime import cleanup, run
from utils import choose_device, choose_dtype, find_inputs, linearize


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # What it reads and writes.
    parser.add_argument("--datadir", required=True, help="folder in COCO's layout (annotations/, train2017/, val2017/)")
    parser.add_argument("--split", default="train2017", help="split to train on (default %(default)s)")
    parser.add_argument("--val_split", default="val2017", help="split to validate on (default %(default)s)")
    parser.add_argument("--textfile", nargs="+", help="entries of the cache, or of several caches "
                        "(.txt; default: cache.txt, else the original's)")
    parser.add_argument("--embfile", nargs="+", help="their embeddings (.npy), in the same order "
                        "(default: the .npy beside --textfile)")
    parser.add_argument("--index", metavar="FILE", help="index of compute_cache.py through which its cache is searched, "
                        "approximately (default: every cache exactly)")
    parser.add_argument("--savedir", default="checkpoints", help="folder for best.safetensors, last.safetensors, image "
                        "features, loss.csv and loss.png (default %(default)s)")
    # The models.
    parser.add_argument("--clip_model", default="ViT-B/16", help="OpenAI's name or .pt file, hub id or folder of a CLIP or "
                        "SigLIP (default %(default)s)")
    parser.add_argument("--lm", default="facebook/bart-large", help="hub id or folder of a BART (default %(default)s)")
    parser.add_argument("--trained", default="layernorms", choices=("layernorms", "all"), help="what of the language model is "
                        "trained; all is there for comparison (default %(default)s)")
    # The table and the caption.
    parser.add_argument("--topk", type=int, default=10, help="entries in a table (default %(default)s)")
    parser.add_argument("--maxlen_enc", type=int, default=128, help="longest table, in tokens (default %(default)s)")
    parser.add_argument("--maxlen_dec", type=int, default=32, help="longest caption, in tokens (default %(default)s)")
    # The training.
    parser.add_argument("--batch_size", type=int, default=16, help="images a step, of all processes together (default %(default)s)")
    parser.add_argument("--lrate", type=float, default=3e-4, help="highest learning rate of AdamW (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=100, help="steps in which the rate rises from 0, a quarter of all at "
                        "most (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the images, one caption each time (default %(default)s)")
    parser.add_argument("--tmax", type=int, default=100000, help="most steps; the rate falls as a cosine to 0 at the last step "
                        "(default %(default)s)")
    parser.add_argument("--save_seconds", type=float, default=30, help="seconds between saves of the state to go on from "
                        "(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of images and captions (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="arithmetic of the language "
                        "model; auto: bfloat16 on a GPU that has it, else float32 (default %(default)s)")
    return parser.parse_args()


def cosine_rate(step, steps, warmup):
    """Share of the highest learning rate at a step of 0 .. steps - 1: linear up over warmup steps, cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def tokenized_tables(captioner, features, entries, embeddings, topk, find=search):
    """The table of each image as token ids: a list of lists. features: (n, dim) unit vectors. find: search, or Index.search."""
    tables = []
    for rows in features.split(256):
        _, indices = find(rows, embeddings, topk)  # (256, k)
        tables += captioner.tokenize([linearize([entries[i] for i in row]) for row in indices.tolist()], captioner.maxlen_enc)
    return tables


def diverged(what, value, step, args):
    return InputError(f"the {what} became {value} at step {step}; the checkpoints in {args.savedir} are of the last good epoch (try a "
                      f"lower --lrate than {args.lrate})")


def share_step(captioner, tables, captions, parameters):
    """Leaves the gradient of a batch's mean loss a caption token in the parameters, and returns that loss, a float.

    tables, captions: lists of token ids. Each process takes every world-th pair, and its share of the tokens weighs its loss, so
    that the sum is the loss of the whole batch.
    """
    rank, world = rank_and_world()
    mine, total = slice(rank, None, world), torch.zeros((), device=captioner.device)
    if tables[mine]:
        loss = captioner.loss(tables[mine], captions[mine]) * (sum(map(len, captions[mine])) / sum(map(len, captions)))
        loss.backward()
        total += loss.detach()
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    all_reduce_sum([total, *(parameter.grad for parameter in parameters)])
    return total.item()


def validate(captioner, tables, captions, batch_size):
    """Mean loss over a fixed set: each image with its first caption, weighted by images. Each process takes every world-th batch."""
    rank, world = rank_and_world()
    total = torch.zeros((), device=captioner.device)
    with torch.inference_mode():
        for start in range(rank * batch_size, len(tables), world * batch_size):
            batch = slice(start, start + batch_size)
            total += captioner.loss(tables[batch], [c[0] for c in captions[batch]]) * len(tables[batch])
    all_reduce_sum([total])
    return total.item() / len(tables)






def write_curve(folder, history):
    """loss.csv and loss.png. history: (step, training loss, validation loss or None, learning rate)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with atomic(folder / "loss.csv") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "train_loss", "val_loss", "lrate"))
        writer.writerows((s, f"{t:.5f}", "" if v is None else f"{v:.5f}", f"{r:.3e}") for s, t, v, r in history)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([h[0] for h in history], [h[1] for h in history], label="training", linewidth=1)
    validated = [(h[0], h[2]) for h in history if h[2] is not None]
    axes.plot(*zip(*validated), "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    with atomic(folder / "loss.png", "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def main():
    args = parse()
    for name in ("topk", "maxlen_enc", "maxlen_dec", "batch_size", "epochs", "tmax"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.warmup < 0 or not args.lrate > 0:
        raise InputError(f"--warmup must not be below 0 and --lrate must be above 0, not {args.warmup} and {args.lrate}")
    if not args.save_seconds >= 0:
        raise InputError(f"--save_seconds must be at least 0, not {args.save_seconds}")
    find_inputs(args)
    train, val = read_coco(args.datadir, args.split), read_coco(args.datadir, args.val_split)
    train, val = ([p for p in pictures if p.captions] for pictures in (train, val))
    if not train or not val:
        raise InputError(f"no image of {args.split if not train else args.val_split} has a caption")
    savedir = output_folder(args.savedir)
    cleanup.enter_context(locked(savedir / ".lock"))
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    from antarctic.checkpoints import is_layernorm, load_state, save_checkpoint, save_state
    from antarctic.features import image_features
    from model import Captioner, Clip

    # The models, and every image as a vector: encoded once, found again by later runs.
    clip = Clip(args.clip_model, device)
    entries, embeddings = read_cache(args.textfile, args.embfile, clip.identity, clip.dim)
    find = open_index(args.index, embeddings).search if args.index else search
    captioner = Captioner(args.lm, device, dtype, args.maxlen_enc, args.maxlen_dec)
    trained = captioner.train_only(is_layernorm if args.trained == "layernorms" else lambda name: True)
    count, total = (sum(p.numel() for p in ps) for ps in (trained.values(), captioner.model.parameters()))
    rank, _ = rank_and_world()
    if rank == 0:
        print(f"{captioner.identity} on {device}, {str(dtype).removeprefix('torch.')}: "
              f"training {count:,} of {total:,} parameters")
    features, train, bad = image_features(clip, train, savedir)
    val_features, val, val_bad = image_features(clip, val, savedir)
    report_bad_images(bad + val_bad)
    if not train or not val:
        raise InputError(f"none of the images of {args.split if not train else args.val_split} can be read")

    # The tables and captions as tokens, once.
    if find is search and dtype == torch.bfloat16 and device.type == "cpu":
        find = partial(search, half=to_bfloat16(embeddings))  # for 100,000 images it pays
    tables = tokenized_tables(captioner, features, entries, embeddings, args.topk, find)
    val_tables = tokenized_tables(captioner, val_features, entries, embeddings, args.topk, find)
    del find
    captions, val_captions = ([captioner.tokenize(p.captions, args.maxlen_dec) for p in ps] for ps in (train, val))

    # The training.
    settings = {"lm": captioner.identity, "clip_model": clip.identity, "topk": args.topk, "maxlen_enc": args.maxlen_enc,
                "maxlen_dec": args.maxlen_dec, "trained": args.trained, "seed": args.seed}
    del clip
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lrate)
    steps_an_epoch = math.ceil(len(train) / args.batch_size)
    steps = min(args.tmax, args.epochs * steps_an_epoch)
    warmup = min(args.warmup, steps // 4)
    # What decides the outcome names the state, so a run of other settings starts anew.
    decides = [settings, args.lrate, warmup, steps, args.batch_size, str(dtype), tables, captions, val_tables, val_captions]
    state = savedir / f"state-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]}.pt"
    best, done, recent, history = load_state(state, trained, optimizer) or (math.inf, 0, [], [])
    step, saved = 0, time.monotonic()
    with tqdm(total=round(steps / steps_an_epoch * len(train)), unit="image", desc="training", disable=rank > 0) as bar:
        for epoch in range(math.ceil(steps / steps_an_epoch)):
            rng = random.Random(f"{args.seed}/{epoch}")
            order = rng.sample(range(len(train)), len(train))
            for start in range(0, len(order), args.batch_size):
                if step == steps:
                    break
                rows = order[start:start + args.batch_size]
                told = [rng.choice(captions[i]) for i in rows]
                step += 1
                if step <= done:  # before the stop
                    bar.update(len(rows))
                    continue
                loss = share_step(captioner, [tables[i] for i in rows], told, trained.values())
                recent = recent[-9:] + [loss]
                if not math.isfinite(loss):
                    raise diverged("loss", loss, step, args)
                optimizer.param_groups[0]["lr"] = args.lrate * cosine_rate(step - 1, steps, warmup)
                optimizer.step()
                optimizer.zero_grad()
                bar.update(len(rows))
                if step % 10 == 0:
                    history.append((step, sum(recent) / 10, None, optimizer.param_groups[0]["lr"]))
                    bar.set_postfix(loss=f"{history[-1][1]:.3f}", refresh=False)
                if rank == 0 and time.monotonic() - saved > args.save_seconds:
                    save_state(state, trained, optimizer, (best, step, recent, history))
                    saved = time.monotonic()
            if any(h[0] == step and h[2] is not None for h in history):  # validated before the stop
                continue
            val_loss = validate(captioner, val_tables, val_captions, args.batch_size)
            if not math.isfinite(val_loss):
                raise diverged("validation loss", val_loss, step, args)
            history.append((step, sum(recent) / len(recent), val_loss, optimizer.param_groups[0]["lr"]))
            if rank > 0:
                continue
            settings |= {"step": step, "epoch": epoch + 1, "val_loss": round(val_loss, 6)}
            save_checkpoint(savedir / "last.safetensors", trained, settings)
            if val_loss < best:
                best = val_loss
                save_checkpoint(savedir / "best.safetensors", trained, settings)
            write_curve(savedir, history)
            save_state(state, trained, optimizer, (best, step, recent, history))
            bar.write(f"epoch {epoch + 1}: step {step}, validation loss {val_loss:.4f}, best {best:.4f}")
    if rank > 0:
        return
    for path in savedir.glob("state-*.pt"):  # this one is done with, those of other settings were abandoned
        path.unlink()
    print(f"wrote {savedir / 'best.safetensors'} (validation loss {best:.4f}), last.safetensors, loss.csv and loss.png")


if __name__ == "__main__":
    run(main)
