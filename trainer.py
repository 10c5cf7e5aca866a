"""Trains the layernorms of a language model to write captions from tables of cache entries.

    python trainer.py --datadir coco --textfile cache.txt --embfile cache.npy --savedir checkpoints
    python trainer.py --datadir world --textfile cache.txt --embfile cache.npy \\
        --clip_model snowglobe/weights/clip --lm snowglobe/weights/bart --topk 16 --lrate 7e-2

Rerun the same command to resume a stopped run: its state is saved every --save_seconds.
"""

import argparse
import math
import random
import time
from array import array
from itertools import islice

from tqdm import tqdm

from antarctic.curves import write_curve
from antarctic.datasets import DataSet
from antarctic.distributed import all_reduce_sum, on_rank0, rank_and_world
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import fingerprint, made_by_runs, remove
from antarctic.flags import (
    add_cache_flags,
    add_clip_flag,
    add_device_flags,
    add_lm_flag,
    add_table_flag,
    require_at_least,
)
from antarctic.runtime import run
from utils import MAXLEN_DEC, MAXLEN_ENC, TOPK, find_inputs, start_run

# torch and transformers take seconds to load, so the functions that need them import them.


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--datadir", required=True, metavar="DIR", help="data set in one of the "
                       "layouts of docs/data.md: COCO's, Karpathy's, Flickr's, imagefolder, images "
                       "with .txt files, tar shards ...")
    files.add_argument("--split", metavar="NAME", help="split to train on (default: train2017, or "
                       "what the layout calls it)")
    files.add_argument("--val_split", metavar="NAME", help="split to validate on (default: "
                       "val2017, or what the layout calls it)")
    files.add_argument("--max_bad", type=float, default=0.01, help="share of a split's images that "
                       "may be damaged or missing and left out (default %(default)s)")
    add_cache_flags(files)
    files.add_argument("--savedir", default="checkpoints", metavar="DIR", help="folder for "
                       "best.safetensors, last.safetensors, image features, loss.csv and loss.png "
                       "(default %(default)s)")

    models = parser.add_argument_group("models")
    add_clip_flag(models)
    add_lm_flag(models)
    models.add_argument("--trained", default="layernorms", choices=("layernorms", "all"),
                        help="parameters of the language model to train; all is for comparison "
                        "(default %(default)s)")

    sizes = parser.add_argument_group("table and caption")
    sizes.add_argument("--topk", type=int, default=TOPK, help="entries of a table (default "
                       "%(default)s)")
    add_table_flag(sizes, "mmr")
    sizes.add_argument("--maxlen_enc", type=int, default=MAXLEN_ENC, help="tokens of a table at "
                       "most (default %(default)s)")
    sizes.add_argument("--maxlen_dec", type=int, default=MAXLEN_DEC, help="tokens of a caption at "
                       "most (default %(default)s)")

    training = parser.add_argument_group("training")
    training.add_argument("--batch_size", type=int, default=16, help="images per step, of all "
                          "processes together (default %(default)s)")
    training.add_argument("--lrate", type=float, default=3e-4, help="peak learning rate (default "
                          "%(default)s)")
    training.add_argument("--warmup", type=int, default=100, help="steps in which the rate rises "
                          "from 0, at most a quarter of all steps (default %(default)s)")
    training.add_argument("--epochs", type=int, default=6, help="passes over the images, one "
                          "caption each time (default %(default)s)")
    training.add_argument("--tmax", type=int, default=100000, help="training steps at "
                          "most; the rate falls to 0 at the last one (default %(default)s)")
    training.add_argument("--save_seconds", type=float, default=30, help="seconds between saves of "
                          "the state to resume from (default %(default)s)")
    training.add_argument("--seed", type=int, default=0, help="seed of the order of images and "
                          "captions (default %(default)s)")

    add_device_flags(parser.add_argument_group("computation"), images=True)
    return parser.parse_args()


def read_splits(args):
    """The Pictures with captions to train on, and those to validate on."""
    data_set = DataSet(args.datadir)
    return (data_set.read(args.split, "train2017", need_captions=True),
            data_set.read(args.val_split, "val2017", need_captions=True))


def tokenize(model, features):
    """The tables of images as token ids: n arrays. features: (n, dim)."""
    tables = []
    for part in features.split(1 << 13):  # tables as texts take more memory than as token ids
        tables += [array("i", tokens) for tokens in model.tokenize(model.tables(part))]
    return tables


def batches(captions, batch_size, seed, epoch):
    """Yields (rows, chosen) for each step of an epoch, always the same for one seed and epoch.

    captions: of each image. rows: the step's images. chosen: a caption of each.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = rng.sample(range(len(captions)), len(captions))
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        yield rows, [rng.choice(captions[i]) for i in rows]


def cosine_rate(step, steps, warmup):
    """The learning rate at a step of 0 .. steps - 1, as a share of the peak rate.

    It rises linearly over the warmup steps and falls as a cosine to 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def share_step(captioner, tables, captions, parameters):
    """Computes the gradient of a batch's mean loss per caption token. Returns that loss, a float.

    tables, captions: lists of token ids, a pair an image. Each process takes every world-th pair,
    and weighs its loss by its share of the tokens, so the sum is the loss of the whole batch.
    """
    import torch
    rank, world = rank_and_world()
    mine = slice(rank, None, world)
    total = torch.zeros((), device=captioner.device)
    if tables[mine]:  # the last batch of an epoch may have fewer pairs than there are processes
        share = sum(map(len, captions[mine])) / sum(map(len, captions))
        loss = captioner.loss(tables[mine], captions[mine]) * share
        loss.backward()
        total += loss.detach()
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    all_reduce_sum([total, *(parameter.grad for parameter in parameters)])
    return total.item()


def validate(captioner, tables, captions, batch_size):
    """The mean loss over all images, each with its first caption.

    tables: of tokenize(). captions: of each image. Batches are weighted by their images. Each
    process takes every world-th batch.
    """
    import torch
    rank, world = rank_and_world()
    total = torch.zeros((), device=captioner.device)
    with torch.inference_mode():
        for start in range(rank * batch_size, len(tables), world * batch_size):
            batch = [table.tolist() for table in tables[start:start + batch_size]]
            texts = [texts[0] for texts in captions[start:start + batch_size]]
            targets = captioner.tokenize(texts, captioner.maxlen_dec)
            total += captioner.loss(batch, targets) * len(batch)
    all_reduce_sum([total])
    return total.item() / len(tables)


def require_finite(name, loss, step, args):
    if not math.isfinite(loss):
        raise InputError(f"the {name} became {loss} at step {step}; the checkpoints in "
                         f"{args.savedir} are of the last good epoch (try a lower --lrate than "
                         f"{args.lrate})")


def train(captioner, trained, data, val_data, settings, savedir, args):
    """Trains; writes checkpoints and losses after each epoch. Returns the best validation loss.

    trained: {name: parameter}. data, val_data: the tables of tokenize(), and the captions of each
    image. settings: the models and lengths that a checkpoint records.
    """
    import torch

    from antarctic.checkpoints import digest_of, load_state, save_checkpoint, save_state

    rank, _ = rank_and_world()
    tables, captions = data
    images = len(tables)
    epoch_steps = math.ceil(images / args.batch_size)
    steps = min(args.tmax, args.epochs * epoch_steps)
    warmup = min(args.warmup, steps // 4)
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lrate)
    # The state's name holds all that determines the result: a run of other settings starts anew.
    key = fingerprint([settings, captioner.digests, args.lrate, warmup, steps, args.batch_size,
                       str(captioner.dtype), digest_of(*data), digest_of(*val_data)])
    state, saved = savedir / f"state-{key}.pt", time.monotonic()
    best, step, recent, history = load_state(state, trained, optimizer) or (math.inf, 0, [], [])
    validated = sum(val_loss is not None for _, _, val_loss, _ in history)  # epochs
    [group] = optimizer.param_groups

    def images_of(steps):
        """The images of the first steps: an epoch's last batch may be smaller than the others."""
        epochs, rest = divmod(steps, epoch_steps)
        return epochs * images + rest * args.batch_size

    with tqdm(total=images_of(steps), unit="image", desc="training", initial=images_of(step),
              disable=rank > 0) as bar:
        for epoch in range(validated, math.ceil(steps / epoch_steps)):
            earlier = epoch * epoch_steps  # steps of the epochs before
            schedule = batches(captions, args.batch_size, args.seed, epoch)
            for rows, chosen in islice(schedule, step - earlier, steps - earlier):
                group["lr"] = args.lrate * cosine_rate(step, steps, warmup)
                step += 1
                batch = [tables[i].tolist() for i in rows]
                targets = captioner.tokenize(chosen, captioner.maxlen_dec)
                loss = share_step(captioner, batch, targets, trained.values())
                require_finite("loss", loss, step, args)
                optimizer.step()
                optimizer.zero_grad()

                recent = recent[-9:] + [loss]
                bar.update(len(rows))
                if step % 10 == 0:
                    history.append((step, sum(recent) / 10, None, group["lr"]))
                    bar.set_postfix(loss=f"{sum(recent) / 10:.3f}", refresh=False)
                if rank == 0 and time.monotonic() - saved > args.save_seconds:
                    save_state(state, trained, optimizer, (best, step, recent, history))
                    saved = time.monotonic()

            val_loss = validate(captioner, *val_data, args.batch_size)
            require_finite("validation loss", val_loss, step, args)
            history.append((step, sum(recent) / len(recent), val_loss, group["lr"]))
            if rank == 0:
                progress = {"step": step, "epoch": epoch + 1, "val_loss": round(val_loss, 6)}
                save_checkpoint(savedir / "last.safetensors", trained, settings | progress)
                if val_loss < best:
                    best = val_loss
                    save_checkpoint(savedir / "best.safetensors", trained, settings | progress)
                write_curve(savedir, history)
                save_state(state, trained, optimizer, (best, step, recent, history))
                bar.write(f"epoch {epoch + 1}: step {step}, validation loss {val_loss:.4f}, "
                          f"best {best:.4f}")
    return best


def main():
    args = parse()
    require_at_least(1, args, "topk", "maxlen_enc", "maxlen_dec", "batch_size", "epochs", "tmax")
    require_at_least(0, args, "warmup", "save_seconds")
    if not args.lrate > 0:
        raise InputError(f"--lrate must be above 0, not {args.lrate}")
    if not 0 <= args.max_bad <= 1:
        raise InputError(f"--max_bad must be a share from 0 to 1, not {args.max_bad}")
    find_inputs(args)
    pictures, val_pictures = on_rank0(lambda: read_splits(args))
    savedir, device, dtype = start_run(args)
    rank, _ = rank_and_world()

    from antarctic.checkpoints import is_layernorm
    from antarctic.features import image_features, require_few_bad
    from model import Model

    model = Model.load(args.clip_model, args.lm, "none", args.textfile, args.embfile, args.index,
                       topk=args.topk, maxlen_enc=args.maxlen_enc, maxlen_dec=args.maxlen_dec,
                       device=device, dtype=dtype, table=args.table)
    captioner = model.captioner
    trained = captioner.train_only(is_layernorm if args.trained == "layernorms" else bool)
    if rank == 0:
        count = sum(parameter.numel() for parameter in trained.values())
        total = sum(parameter.numel() for parameter in captioner.model.parameters())
        print_safely(escape_control(f"{model}: training {count:,} of {total:,} parameters"))

    # CLIP encodes each image once; later runs read the vectors from --savedir.
    data = []
    for split, listed in ("training", pictures), ("validation", val_pictures):
        features, good, bad = image_features(model.clip, listed, savedir, workers=args.workers)
        require_few_bad(bad, good, args.max_bad, split)
        data.append((tokenize(model, features), [picture.captions for picture in good]))
    settings = {"lm": captioner.identity, "clip_model": model.clip.identity, "topk": args.topk,
                "table": args.table, "maxlen_enc": args.maxlen_enc, "maxlen_dec": args.maxlen_dec,
                "trained": args.trained, "seed": args.seed}
    # Training needs neither CLIP nor the cache, nor the images' paths.
    del model, features, listed, good, pictures, val_pictures

    best = train(captioner, trained, *data, settings, savedir, args)
    if rank == 0:
        # Of this run, and of runs with other settings.
        remove(*made_by_runs(savedir, "state-", ".pt"))
        path = escape_control(savedir / "best.safetensors")
        print_safely(f"wrote {path} (validation loss {best:.4f}), last.safetensors, loss.csv and "
                     "loss.png")


if __name__ == "__main__":
    run(main)
