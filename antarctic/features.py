"""CLIP's vectors of images and texts: encoded once, stored in a file, and reused by later runs."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from antarctic.distributed import gather_lists, on_rank0, rank_and_world
from antarctic.errors import counted, escape_control, print_safely
from antarctic.files import append, atomic, fingerprint, locked, writing
from antarctic.images import HEIF_SUFFIXES, MOST_PIXELS, read_image, reads_heif

CHUNK = 2048  # texts that a process encodes between two writes
READER = "2"  # version of read_image: images that an older one refused are tried again
# Of a batch of images. read_image's copies and CLIP's preprocessing need 14 bytes a pixel.
BATCH_PIXELS = 1 << 25


# ----------------------------------------------------------------------------------------- images

def image_features(clip, pictures, folder, batch_size=64, shard=512, max_pixels=MOST_PIXELS,
                   truncated=False):
    """CLIP's vectors of all images that can be read, from a file in folder if an earlier run wrote
    one.

    The file is keyed by the CLIP model and by each image's path, size and time of change. Until it
    is complete, each shard of `shard` images is a file of its own, so that a killed run loses at
    most one shard. max_pixels, truncated: see read_image. Returns (features, float32 (n, dim);
    their n Pictures; bad, a list of (path, reason)).
    """
    stats = []
    for picture in pictures:
        try:
            stat = picture.path.stat()
            stats.append((str(picture.path.resolve()), stat.st_size, stat.st_mtime_ns))
        except OSError:
            stats.append((str(picture.path), 0, 0))
    # Rank 0's key, since another host's files may have other times.
    reading = {"max_pixels": max_pixels, "truncated": truncated}
    key = on_rank0(lambda: fingerprint([clip.identity, stats, *changes(reading, pictures)]))
    path = Path(folder) / f"features-{key}.safetensors"
    stored = on_rank0(lambda: read_features(path, len(pictures), clip.dim))
    if stored is None:
        with locked(path.with_name(f".{path.name}.lock")):
            encode_shards(clip, pictures, path, batch_size, shard, reading)
        stored = on_rank0(lambda: read_features(path, len(pictures), clip.dim))
    if rank_and_world()[0] == 0:
        # A run that was killed after it wrote the file leaves shards, too.
        for part in path.parent.glob(f"{path.stem}.*.part"):
            part.unlink(missing_ok=True)  # another run may delete them at the same time
    features, bad = stored
    good = [picture for row, picture in enumerate(pictures) if row not in bad]
    return features, good, [(pictures[row].path, reason) for row, reason in bad.items()]


def changes(reading, pictures):
    """What else decides which images are read, for the key of their file: a list that is empty
    where it is as usual, so that files of earlier runs keep their keys."""
    usual = {"max_pixels": MOST_PIXELS, "truncated": False}
    found = [[name, value] for name, value in reading.items() if value != usual[name]]
    if any(p.path.suffix.lower() in HEIF_SUFFIXES for p in pictures) and not reads_heif():
        found.append("no HEIC")
    return found


def encode_shards(clip, pictures, path, batch_size, shard, reading):
    """Writes the features file of image_features from its shards. Each process encodes every
    world-th shard. reading: settings of read_image."""
    rank, world = rank_and_world()
    shards = {path.with_suffix(f".{start}.part"): pictures[start:start + shard]
              for start in range(0, len(pictures), shard)}

    def missing_shards():
        return [part for part, images in shards.items()
                if read_features(part, len(images), clip.dim) is None]

    missing = on_rank0(missing_shards)
    done = len(pictures) - sum(len(shards[part]) for part in missing)
    with tqdm(total=len(pictures), initial=done, desc="encoding images", unit="image",
              disable=rank > 0) as bar:
        for start in range(0, len(missing), world):
            batch = missing[start:start + world]  # a shard for each process
            encoded = []
            for part in batch[rank:rank + 1]:
                paths = [picture.path for picture in shards[part]]
                encoded.append((part, *encode_files(clip, paths, batch_size, bar, **reading)))
            for part, features, bad in gather_lists(encoded):
                if rank == 0:
                    write_features(part, features, bad)
            bar.update(sum(len(shards[part]) for part in batch[1:]))
    if rank == 0:
        vectors, reasons = [], {}
        for i, (part, images) in enumerate(shards.items()):
            features, bad = read_features(part, len(images), clip.dim)
            vectors.append(features)
            reasons |= {i * shard + row: reason for row, reason in bad.items()}
        write_features(path, torch.cat(vectors), reasons)


def read_features(path, n, dim):
    """What write_features wrote of n images and a CLIP of dim dimensions: (features, bad). None
    where there is no such file, or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            features = file.get_tensor("features")
            reasons = json.loads(file.metadata()["bad"])
        reader = reasons.pop("reader", None)
        bad = {int(row): reason + "" for row, reason in reasons.items()}
        fits = set(bad) <= set(range(n)) and features.shape == (n - len(bad), dim)
        if bad and reader != READER:  # another version, which this one may read more than
            return None
        if fits and features.dtype == torch.float32 and features.isfinite().all():
            return features, bad
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError,
            RecursionError):
        pass
    return None


def write_features(path, features, bad):
    """features: float32 (n, dim). bad: {row of an image that could not be read: reason}."""
    with atomic(path, "wb") as file:
        # safetensors writes several keys of metadata in a random order, so this is one.
        reasons = bad | {"reader": READER} if bad else {}
        file.write(save({"features": features}, {"bad": json.dumps(reasons)}))


def encode_files(clip, paths, batch_size, bar, **reading):
    """CLIP's vectors of image files. bar: a tqdm that counts images. reading: see read_image.

    Returns (vectors of the images that can be read, float32 (n, dim); {row of a bad one: reason}).
    """
    vectors, bad, batch = [torch.empty(0, clip.dim)], {}, []
    for row, path in enumerate(paths):
        try:
            batch.append(read_image(path, **reading))
        except OSError as error:
            bad[row] = error.strerror or " ".join(str(error).split()) or type(error).__name__
        pixels = sum(image.width * image.height for image in batch)
        if batch and (len(batch) == batch_size or pixels > BATCH_PIXELS or row == len(paths) - 1):
            vectors.append(clip.encode_images(batch))
            batch = []
        bar.update()
    return torch.cat(vectors), bad


def report_bad_images(bad):
    """Lists and counts the images that could not be read, on rank 0. bad: (path, reason) pairs."""
    if rank_and_world()[0] > 0:
        return
    for path, reason in bad:
        print_safely(f"skipped {escape_control(path)}: {escape_control(reason)}", "stderr")
    if bad:
        print_safely(f"{counted(len(bad), 'image')} could not be read and were skipped", "stderr")


# ------------------------------------------------------------------------------------------ texts

def text_features(clip, texts, part, batch_size):
    """CLIP's vectors of texts. All processes call this and share the work.

    On rank 0 it returns an array (len(texts), dim), mapped from the file part, which grows by
    float32 rows. A killed run resumes at its end, so the name of part must depend on everything
    that determines the vectors. batch_size: texts at a time, per process.
    """
    rank, world = rank_and_world()
    row_bytes = clip.dim * np.dtype(np.float32).itemsize

    def count_done():
        with writing(part), open(part, "ab") as file:
            done = file.tell() // (CHUNK * row_bytes) * CHUNK
            file.truncate(done * row_bytes)
        return done

    done = on_rank0(count_done)
    with tqdm(total=len(texts), initial=done, desc="encoding entries", unit="entry",
              disable=rank > 0) as bar:
        for start in range(done, len(texts), CHUNK * world):
            chunk = texts[start + rank * CHUNK:start + (rank + 1) * CHUNK]
            rows = gather_lists([clip.encode_texts(chunk, batch_size).numpy()])  # (CHUNK, dim) each
            if rank == 0:
                append(part, b"".join(block.tobytes() for block in rows))
            bar.update(sum(map(len, rows)))
    return np.memmap(part, np.float32, "r", shape=(len(texts), clip.dim)) if rank == 0 else None
