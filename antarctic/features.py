"""Images and texts as CLIP's vectors: encoded once, kept in a file, found again by later runs."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from antarctic.distributed import gather_lists, on_rank0, rank_and_world
from antarctic.files import append, atomic, fingerprint, locked, writing
from antarctic.images import read_image

CHUNK = 2048  # texts that a process encodes between two writes
# read_image's copies of a batch and CLIP's preprocessing of it need 14 bytes for each
BATCH_PIXELS = 1 << 25


def image_features(clip, pictures, folder, batch_size=64, shard=512):
    """CLIP vectors of all images that can be read, from a file in folder where an earlier run left
    one.

    The file is keyed by the CLIP model and by each image's path, size and time of change. Until it
    is whole, each shard of so many images is a file of its own, so that a run that is killed loses
    no more than one. Returns (features, float32 (n, dim); the n Pictures that they belong to; bad,
    a list of (path, reason)).
    """
    stats = []
    for picture in pictures:
        try:
            stat = picture.path.stat()
            stats.append((str(picture.path.resolve()), stat.st_size, stat.st_mtime_ns))
        except OSError:
            stats.append((str(picture.path), 0, 0))
    key = fingerprint([clip.identity, stats])
    path = Path(
        folder
    # of another host's files the times may differ
    ) / f"features-{on_rank0(lambda: key)}.safetensors"
    if (found := on_rank0(lambda: read_features(path, len(pictures), clip.dim))) is None:
        with locked(path.with_name(f".{path.name}.lock")):
            encode_shards(clip, pictures, path, batch_size, shard)
        found = on_rank0(lambda: read_features(path, len(pictures), clip.dim))
    if rank_and_world()[0] == 0:
        for part in path.parent.glob(
                f"{path.stem}.*.part"):  # also of a run that was killed between the file and this
            part.unlink(missing_ok=True)  # another run may be about it, too
    features, bad = found
    good = [picture for row, picture in enumerate(pictures) if row not in bad]
    return features, good, [(pictures[row].path, reason) for row, reason in bad.items()]


def encode_shards(clip, pictures, path, batch_size, shard):
    """Writes the features file of image_features by way of its shards, of which each process
    encodes every world-th."""
    rank, world = rank_and_world()
    shards = {
        path.with_suffix(f".{start}.part"): pictures[start:start + shard]
        for start in range(0, len(pictures), shard)
    }
    missing = on_rank0(lambda: [
        part for part in shards if read_features(part, len(shards[part]), clip.dim) is None
    ])
    done = len(pictures) - sum(len(shards[part]) for part in missing)
    with tqdm(total=len(pictures), initial=done, desc="encoding images", unit="image", disable=rank
              > 0) as bar:
        for start in range(0, len(missing), world):
            some = missing[start:start + world]
            mine = [(part, *encode_files(clip, [p.path for p in shards[part]], batch_size, bar))
                    for part in some[rank:rank + 1]]
            for part, features, bad in gather_lists(mine):
                if rank == 0:
                    write_features(part, features, bad)
            bar.update(sum(len(shards[part]) for part in some[1:]))
    if rank == 0:
        parts, bads = zip(*(read_features(part, len(some), clip.dim)
                            for part, some in shards.items()))
        write_features(
            path, torch.cat(parts),
            {i * shard + row: reason for i, bad in enumerate(bads) for row, reason in bad.items()})


def read_features(path, n, dim):
    """What write_features wrote of n images and a CLIP of dim, or None where there is nothing, or
    nothing like it."""
    try:
        with safe_open(path, "pt") as file:
            features = file.get_tensor("features")
            bad = {
                int(row): reason + "" for row, reason in json.loads(file.metadata()["bad"]).items()
            }
        whole = set(bad) <= set(
            range(n)) and features.shape == (n - len(bad), dim) and features.dtype == torch.float32
        return (features, bad) if whole and features.isfinite().all() else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def write_features(path, features, bad):
    """features: float32 (n, dim). bad: {row of an image that could not be read: reason}."""
    with atomic(path, "wb") as file:
        file.write(save({"features": features}, {"bad": json.dumps(bad)}))


def encode_files(clip, paths, batch_size, bar):
    """(vectors of the images that can be read, {row of a bad one: reason}). bar: a tqdm that counts
    images."""
    vectors, bad, batch = [torch.empty(0, clip.dim)], {}, []
    for row, path in enumerate(paths):
        try:
            batch.append(read_image(path))
        except OSError as error:
            bad[row] = error.strerror or " ".join(str(error).split()) or type(error).__name__
        pixels = sum(image.width * image.height for image in batch)
        if batch and (len(batch) == batch_size or pixels > BATCH_PIXELS or row == len(paths) - 1):
            vectors.append(clip.encode_images(batch))
            batch = []
        bar.update()
    return torch.cat(vectors), bad


def text_features(clip, texts, part, batch_size):
    """CLIP's vectors of texts, on rank 0 an array (len(texts), dim) mapped from the file part; all
    processes call this and share the work.

    The file grows by float32 rows. A run that was killed resumes at its end, so part must be named
    by all that decides the vectors. batch_size: texts at a time, per process.
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
