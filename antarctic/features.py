"""CLIP's vectors of images: encoded once, stored in files, and reused by later runs."""

import hashlib
import os
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from itertools import groupby, zip_longest
from pathlib import Path

from tqdm import tqdm

from antarctic.ahead import Budget, map_ahead
from antarctic.distributed import gather_lists, on_rank0, rank_and_world
from antarctic.errors import InputError, counted, escape_control, print_safely
from antarctic.feature_files import Store
from antarctic.files import fingerprint
from antarctic.images import (
    HEIF_SUFFIXES,
    MOST_BYTES,
    MOST_PIXELS,
    file_status,
    read_bytes,
    read_image,
    reads_heif,
)
from antarctic.locks import locked, remove_dead_locks
from antarctic.reads import passes, persistent
from antarctic.tars import split_path

BATCH_PIXELS = 1 << 25  # of the images of a batch, before they are resized
MOST_LISTED = 20  # images that are left out of training, or that cannot be read now


def image_features(clip, pictures, folder, batch_size=64, shard=512, max_pixels=MOST_PIXELS,
                   truncated=False, unread=frozenset(), later=None, workers=0):
    """CLIP's vectors of all images that are whole. What earlier runs left in folder is not encoded
    again.

    An image is known unopened by its path, size and time of change, and, where it was moved or
    copied, by its content. Others are encoded; each `shard` of them is a file of its own until the
    end, so that a killed run loses at most one a process. max_pixels, truncated: see read_image.
    unread: paths of images that are left out unless they are known unopened. later: a list that
    gets the (path, reason) of images that cannot be read now, whatever they hold (see
    reads.passes). workers: threads that read images ahead of the model; 0: it waits for each.
    Returns (features, float32 (n, dim), whatever workers is; their n Pictures, with sha256; bad, a
    list of (path, reason)). Raises InputError, once the others are stored, where there are images
    for `later` and no such list.
    """
    reading = {"max_pixels": max_pixels, "truncated": truncated}
    encoder = encoder_of(clip, changes(reading, pictures))
    # Rank 0 alone looks at files, since another host's may have other times.
    statuses = on_rank0(lambda: statuses_of(picture.path for picture in pictures))
    store = None
    if rank_and_world()[0] == 0:
        store = Store(Path(folder), encoder, statuses, clip.dim)
    missing, known, complete = on_rank0(lambda: store.missing())
    missing = [row for row in missing if pictures[row].path not in unread]
    lock = locked(Path(folder) / f".features-{fingerprint([encoder, statuses])}.lock")
    if complete and not missing:  # a run that was killed when it was done has left its lock
        lock = nullcontext()
        on_rank0(lambda: remove_dead_locks(folder))
    with lock:
        reasons = encode_missing(clip, pictures, missing, known, store, batch_size, shard, workers,
                                 reading)
        features, digests = on_rank0(lambda: store.finish())
    good = [picture._replace(sha256=digest.hex())
            for picture, digest in zip(pictures, digests) if digest]
    bad, unread_now = [], []
    for row, (reason, may_pass) in sorted(reasons.items()):
        (unread_now if may_pass else bad).append((pictures[row].path, reason))
    if later is None:
        on_rank0(lambda: require_read(unread_now))
    else:
        later += unread_now
    return features, good, bad


def require_read(unread):
    """Lists the images that could not be read now, and raises InputError where there are any.
    unread: (path, reason) pairs."""
    for path, reason in unread[1:MOST_LISTED]:
        print_safely(f"could not read {escape_control(path)}: {escape_control(reason)}", "stderr")
    if unread:
        path, reason = unread[0]
        raise InputError(f"{counted(len(unread), 'image')}, such as {path}, could not be read now "
                         f"({reason}); the others are done, so rerun the same command once this "
                         "is fixed")


def encoder_of(clip, changed=()):
    """A fingerprint of all but the image that decides a vector. changed: of changes()."""
    return fingerprint([clip.identity, clip.image_digests, *rounding(clip), *changed])


def rounding(clip):
    """What rounds a CLIP's vectors of images: a list that is empty in float32."""
    name = str(getattr(clip, "image_dtype", "torch.float32"))
    return [name] if name != "torch.float32" else []


def changes(reading, pictures):
    """What else decides which images are read and how: a list that is empty where it is as
    usual."""
    usual = {"max_pixels": MOST_PIXELS, "truncated": False}
    found = [[name, value] for name, value in reading.items() if value != usual[name]]
    if any(p.path.suffix.lower() in HEIF_SUFFIXES for p in pictures) and not reads_heif():
        found.append("no HEIC")
    return found


def statuses_of(paths):
    """Of each image a fingerprint that changes with its path, size and time of change; None where
    it is not there. A list."""
    places, statuses = {}, []  # {folder: its place behind all links}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in places:
            places[folder] = os.path.realpath(folder)
        try:
            status = persistent(partial(file_status, path))
        except OSError:
            statuses.append(None)
            continue
        place = os.path.join(places[folder], name)
        if os.path.islink(place):
            place = os.path.realpath(place)
        statuses.append(fingerprint([place, *status]))
    return statuses


def encode_missing(clip, pictures, missing, known, store, batch_size, shard, workers, reading):
    """Encodes images and adds them to the store, which rank 0 has. The processes share the work.

    missing: rows of pictures. known: the digests of the store. workers: threads of each process.
    reading: settings of read_image.
    Returns {row of an image that cannot be read: (reason, whether that may pass)}.
    """
    rank, world = rank_and_world()
    shares = shares_of(missing, pictures, shard, world)
    bad = {}
    with tqdm(total=len(pictures), initial=len(pictures) - len(missing), desc="encoding images",
              unit="image", disable=rank > 0 or not missing) as bar:
        for turn in zip_longest(*shares, fillvalue=[]):  # a shard for each process
            rows = turn[rank]
            paths = [pictures[row].path for row in rows]
            encoded = encode_files(clip, paths, batch_size, bar, known, workers, **reading)
            for part, digests, vectors, reasons in gather_lists([(rows, *encoded)]):
                if rank == 0:
                    store.add(part, digests, vectors)
                known |= vectors.keys()
                bad |= {part[i]: why for i, why in reasons.items()}
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


def encode_files(clip, paths, batch_size, bar, known=frozenset(), workers=0, **reading):
    """CLIP's vectors of image files. bar: a tqdm that counts images. known: digests of images whose
    vectors are not needed. workers: see image_features. reading: see read_image.

    Returns (the digest of each file, SHA-256 as bytes, None of a bad one; {digest: vector, a
    float32 array (dim,)} of those that are not known; {index of a bad one: (reason, whether that
    may pass)}). Raises InputError where an image needs more memory than there is.
    """
    digests, vectors, bad, batch, pixels = [None] * len(paths), {}, {}, {}, 0
    file_bytes, decoded = Budget(MOST_BYTES), Budget(MOST_PIXELS)  # of all threads together

    def read(path):
        """(digest, what clip.prepare makes of the image, or None where its vector is known, its
        pixels, None), or (None, None, 0, the error) of an image that cannot be read."""
        try:
            with ExitStack() as shares:
                size, *_ = persistent(partial(file_status, path))
                shares.enter_context(file_bytes.share(size))
                content = read_bytes(path)
                digest = hashlib.sha256(content).digest()
                if digest in known or digest in vectors:
                    return digest, None, 0, None
                image = read_image(content, **reading, room=lambda pixels: shares.enter_context(
                    decoded.share(pixels)))
                return digest, clip.prepare(image), image.width * image.height, None
        except (OSError, MemoryError) as error:
            return None, None, 0, error

    def encode():
        # As arrays: each tensor would be sent to other processes with the whole batch behind it.
        vectors.update(zip(batch, clip.encode_images(list(batch.values())).numpy()))
        batch.clear()

    with closing(map_ahead(read, paths, workers, batch_size)) as results:
        for i, (digest, prepared, size, error) in enumerate(results):
            if isinstance(error, MemoryError):  # no fault of the image
                raise InputError(f"there is not enough memory to read the image {paths[i]}"
                                 ) from error
            if error is not None:
                reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
                bad[i] = reason, passes(error)
            elif not (digest in known or digest in vectors or digest in batch):
                batch[digest], pixels = prepared, pixels + size
            digests[i] = digest
            if len(batch) == batch_size or pixels > BATCH_PIXELS:
                encode()
                pixels = 0
            bar.update()
    if batch:
        encode()
    return digests, vectors, bad


def report_bad_images(bad, most=None):
    """Lists and counts the images that could not be read, on rank 0. bad: (path, reason) pairs.
    most: how many are listed (default: all)."""
    if rank_and_world()[0] > 0:
        return
    for path, reason in bad[:most]:
        print_safely(f"skipped {escape_control(path)}: {escape_control(reason)}", "stderr")
    if most is not None and len(bad) > most:
        print_safely(f"... and {len(bad) - most:,} more", "stderr")
    if bad:
        were = "was" if len(bad) == 1 else "were"
        print_safely(f"{counted(len(bad), 'image')} could not be read and {were} skipped", "stderr")


def require_few_bad(bad, pictures, most, split):
    """Reports the images of a split that are left out of training. Raises InputError where they are
    more than a share of all.

    bad: (path, reason) pairs. pictures: the Pictures that are left. most: the share, --max_bad.
    """
    report_bad_images(bad, MOST_LISTED)
    total = len(bad) + len(pictures)
    path, reason = bad[0] if bad else (None, None)
    if not pictures:
        raise InputError(f"none of the {split} images, such as {path}, can be read ({reason})")
    if len(bad) > most * total:
        raise InputError(f"{len(bad):,} of {counted(total, f'{split} image')}, such as {path}, "
                         f"cannot be read ({reason}), more than --max_bad {most:g} of all; mend "
                         "them, or raise --max_bad to train without them and their captions")
