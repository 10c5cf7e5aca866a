"""CLIP's vectors of images: encoded once, stored in files, and reused by later runs."""

import hashlib
import os
from contextlib import nullcontext
from itertools import groupby, zip_longest
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from antarctic.distributed import gather_lists, on_rank0, rank_and_world
from antarctic.errors import counted, escape_control, print_safely
from antarctic.files import atomic, fingerprint, remove
from antarctic.images import (
    HEIF_SUFFIXES,
    MOST_PIXELS,
    file_status,
    open_file,
    read_image,
    reads_heif,
)
from antarctic.locks import locked
from antarctic.tars import split_path

# Of a batch of images. read_image's copies and CLIP's preprocessing need 14 bytes a pixel.
BATCH_PIXELS = 1 << 25
STATUS, DIGEST, SEAL = 8, 32, 8  # bytes of an image's key, see key_of


def image_features(clip, pictures, folder, batch_size=64, shard=512, max_pixels=MOST_PIXELS,
                   truncated=False, unread=frozenset()):
    """CLIP's vectors of all images that can be read. What earlier runs left in folder is not
    encoded again.

    An image is known unopened by its path, size and time of change, and, where it was moved or
    copied, by its content. Others are encoded; each `shard` of them is a file of its own until the
    end, so that a killed run loses at most one a process. max_pixels, truncated: see read_image.
    unread: paths of images that are left out unless they are known unopened. Returns (features,
    float32 (n, dim); their n Pictures, with sha256; bad, a list of (path, reason)).
    """
    reading = {"max_pixels": max_pixels, "truncated": truncated}
    encoder = fingerprint([clip.identity, *changes(reading, pictures)])
    # Rank 0 alone looks at files, since another host's may have other times.
    statuses = on_rank0(lambda: [status_of(picture.path) for picture in pictures])
    store = None
    if rank_and_world()[0] == 0:
        store = Store(Path(folder), encoder, statuses, clip.dim)
    missing, known, complete = on_rank0(lambda: store.missing())
    missing = [row for row in missing if pictures[row].path not in unread]
    lock = locked(Path(folder) / f".features-{fingerprint([encoder, statuses])}.lock")
    with nullcontext() if complete and not missing else lock:
        bad = encode_missing(clip, pictures, missing, known, store, batch_size, shard, reading)
        features, digests = on_rank0(lambda: store.finish())
    good = [picture._replace(sha256=digest.hex())
            for picture, digest in zip(pictures, digests) if digest]
    return features, good, [(pictures[row].path, bad[row]) for row in sorted(bad)]


def changes(reading, pictures):
    """What else decides which images are read and how: a list that is empty where it is as
    usual."""
    usual = {"max_pixels": MOST_PIXELS, "truncated": False}
    found = [[name, value] for name, value in reading.items() if value != usual[name]]
    if any(p.path.suffix.lower() in HEIF_SUFFIXES for p in pictures) and not reads_heif():
        found.append("no HEIC")
    return found


def status_of(path):
    """A fingerprint that changes with an image's path, size and time of change; None where it is
    not there."""
    try:
        return fingerprint([os.path.realpath(path), *file_status(path)])
    except OSError:
        return None


def encode_missing(clip, pictures, missing, known, store, batch_size, shard, reading):
    """Encodes images and adds them to the store, which rank 0 has. The processes share the work.

    missing: rows of pictures. known: the digests of the store. reading: settings of read_image.
    Returns {row of an image that cannot be read: reason}.
    """
    rank, world = rank_and_world()
    shares = shares_of(missing, pictures, shard, world)
    bad = {}
    with tqdm(total=len(pictures), initial=len(pictures) - len(missing), desc="encoding images",
              unit="image", disable=rank > 0 or not missing) as bar:
        for turn in zip_longest(*shares, fillvalue=[]):  # a shard for each process
            rows = turn[rank]
            paths = [pictures[row].path for row in rows]
            encoded = encode_files(clip, paths, batch_size, bar, known, **reading)
            for part, digests, vectors, reasons in gather_lists([(rows, *encoded)]):
                if rank == 0:
                    store.add(part, digests, vectors)
                known |= vectors.keys()
                bad |= {part[i]: reason for i, reason in reasons.items()}
            bar.update(sum(map(len, turn[1:])))
    return bad


def shares_of(missing, pictures, shard, world):
    """The shards that each process encodes: `world` lists of lists of rows.

    A bad image, which each run tries again, must not shift the shards of the others. A tar file is
    read by one process, from its beginning to its end, unless there are fewer than processes.
    """
    tars = {row: (split_path(pictures[row].path) or [None])[0] for row in missing}
    order = {tar: i for i, tar in enumerate(dict.fromkeys(tars.values()))}
    shards = [list(rows) for _, rows in groupby(missing, lambda row: (tars[row], row // shard))]
    shares = [[] for _ in range(world)]
    for i, rows in enumerate(shards):
        turn = order[tars[rows[0]]] if len(order) >= world else i
        shares[turn % world].append(rows)
    return shares


def encode_files(clip, paths, batch_size, bar, known=frozenset(), **reading):
    """CLIP's vectors of image files. bar: a tqdm that counts images. known: digests of images whose
    vectors are not needed. reading: see read_image.

    Returns (the digest of each file, SHA-256 as bytes, None of a bad one; {digest: vector, a
    float32 array (dim,)} of those that are not known; {index of a bad one: reason}).
    """
    digests, vectors, bad, batch = [None] * len(paths), {}, {}, {}

    def encode():
        # As arrays: each tensor would be sent to other processes with the whole batch behind it.
        vectors.update(zip(batch, clip.encode_images(list(batch.values())).numpy()))
        batch.clear()

    for i, path in enumerate(paths):
        try:
            with open_file(path) as file:
                digest = hashlib.file_digest(file, "sha256").digest()
                if not (digest in known or digest in vectors or digest in batch):
                    batch[digest] = read_image(file, **reading)
            digests[i] = digest
        except OSError as error:
            bad[i] = error.strerror or " ".join(str(error).split()) or type(error).__name__
        pixels = sum(image.width * image.height for image in batch.values())
        if len(batch) == batch_size or pixels > BATCH_PIXELS:
            encode()
        bar.update()
    if batch:
        encode()
    return digests, vectors, bad


class Store:
    """The vectors of n images, and the files of a folder that they come from and go to.

    encoder: a fingerprint of all but the image that decides a vector. statuses: n times status_of
    an image.
    """

    def __init__(self, folder, encoder, statuses, dim):
        self.folder, self.prefix, self.statuses = folder, f"features-{encoder}-", statuses
        self.vectors, self.digests = torch.empty(len(statuses), dim), [None] * len(statuses)
        self.vector_of, self.files = {}, {}  # {digest: vector}, {path: set of digests}
        known, unfinished = {}, set()  # {status: digest}
        for path in sorted(folder.glob(f"{self.prefix}*")):
            rows = read_features(path, dim)
            self.files[path] = {digest for _, digest, _ in rows}
            self.vector_of |= {digest: vector for _, digest, vector in rows}
            known |= {status: digest for status, digest, _ in rows}
            if path.suffix == ".part":
                unfinished |= {status for status, _, _ in rows}
        for row, status in enumerate(statuses):
            if status in known:
                self.put(row, known[status])
        self.complete = unfinished.isdisjoint(statuses)

    def put(self, row, digest):
        self.vectors[row], self.digests[row] = self.vector_of[digest], digest

    def missing(self):
        """(the rows without a vector; the digests of all vectors; whether all that there is of the
        n images is in finished files)."""
        rows = [row for row, digest in enumerate(self.digests) if not digest]
        return rows, set(self.vector_of), self.complete

    def add(self, rows, digests, vectors):
        """Takes what encode_files returns of some rows, and writes it to a file of its own."""
        for row, digest in zip(rows, digests):
            if digest in vectors and digest not in self.vector_of:
                self.vectors[row] = torch.from_numpy(vectors[digest])
                self.vector_of[digest] = self.vectors[row]
            if digest:
                self.put(row, digest)
        rows = [row for row, digest in zip(rows, digests) if digest]
        if rows:
            self.write(rows, ".part")
            self.complete = False

    def write(self, rows, suffix):
        """Writes some rows to a file, which their keys name. Returns its path."""
        keys = [(self.statuses[row], self.digests[row]) for row in rows]
        name = fingerprint([(status, digest.hex()) for status, digest in keys])
        path = self.folder / f"{self.prefix}{name}{suffix}"
        write_features(path, self.vectors[rows], keys)
        self.files[path] = {digest for _, digest in keys}
        return path

    def finish(self):
        """Writes one file of all rows, where there is none yet, and removes files that hold nothing
        else. Returns (vectors, float32 (m, dim), of the rows that have one; n digests, or None)."""
        rows = [row for row, digest in enumerate(self.digests) if digest]
        if not self.complete:
            path = self.write(rows, ".safetensors")
            remove(*(other for other, digests in self.files.items()
                     if other != path and digests and digests <= self.files[path]))
        return (self.vectors[rows] if None in self.digests else self.vectors), self.digests


def key_of(status, digest, vector):
    """An image's key in a features file, uint8 (STATUS + DIGEST + SEAL,): status_of its file, its
    digest, and a checksum of its vector."""
    key = bytes.fromhex(status or "00" * STATUS) + digest
    seal = hashlib.sha256(key + vector.numpy().tobytes()).digest()[:SEAL]
    return np.frombuffer(key + seal, np.uint8)


def write_features(path, vectors, keys):
    """vectors: float32 (n, dim). keys: n pairs (status_of the file or None, digest)."""
    rows = [key_of(*key, vector) for key, vector in zip(keys, vectors)]
    keys = torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, 0, dtype=torch.uint8)
    with atomic(path, "wb") as file:
        file.write(save({"features": vectors, "keys": keys}))


def read_features(path, dim):
    """What write_features wrote: a list of (status, digest, vector). Rows that are damaged are left
    out, all of them where the file is."""
    if not path.is_file():  # opening a pipe waits for its writer
        return []
    try:
        with safe_open(path, "pt") as file:
            vectors, keys = file.get_tensor("features"), file.get_tensor("keys")
    except (OSError, SafetensorError):
        return []
    if not (keys.dtype == torch.uint8 and keys.shape[1:] == (STATUS + DIGEST + SEAL,)
            and vectors.dtype == torch.float32 and vectors.shape == (len(keys), dim)):
        return []
    rows, good = [], vectors.isfinite().all(1).tolist()
    for key, vector, finite in zip(keys.numpy(), vectors, good):
        status, digest = key[:STATUS].tobytes().hex(), key[STATUS:-SEAL].tobytes()
        if finite and np.array_equal(key_of(status, digest, vector), key):
            rows.append((status, digest, vector))
    return rows


def report_bad_images(bad):
    """Lists and counts the images that could not be read, on rank 0. bad: (path, reason) pairs."""
    if rank_and_world()[0] > 0:
        return
    for path, reason in bad:
        print_safely(f"skipped {escape_control(path)}: {escape_control(reason)}", "stderr")
    if bad:
        were = "was" if len(bad) == 1 else "were"
        print_safely(f"{counted(len(bad), 'image')} could not be read and {were} skipped", "stderr")
