"""Where each entry of a table was seen: maps for the records of captioned images, and their form.

A record's "where" is a dict of box, the part of the image that the maps cover (left, top, right,
bottom, as shares of its sides); side, the maps' rows and columns; and maps, for each entry of the
table [x, y, map]: the patch with the greatest share, as shares of the image's sides, and side x
side bytes in base64, row by row, 255 where a patch's share of the entry's cosine is greatest, 0
where it has none or a negative one. An entry that is not in the cache has null.
"""

import base64
import hashlib
from contextlib import ExitStack, closing
from functools import partial

import torch
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm

from antarctic.ahead import Budget, map_ahead
from antarctic.distributed import gather_lists, on_rank0, rank_and_world
from antarctic.errors import InputError
from antarctic.images import MOST_BYTES, MOST_PIXELS, file_status, read_bytes, read_image
from antarctic.reads import persistent
from antarctic.records import MOST_SIDE
from antarctic.where import contributions, map_box, maps


def add_maps(model, pictures, records, batch_size, later, workers=0, **reading):
    """Gives the records of pictures their maps, as far as they have none. The processes share the
    work, and each batch is kept as soon as it is done.

    model: a model.Model, whose settings the records are of. records: a Records. later: a list that
    gets the (path, reason) of images that cannot be read, or are not what was captioned any more.
    workers: threads that read images ahead. reading: settings of read_image.
    """
    rank, world = rank_and_world()
    rows = on_rank0(lambda: records.without_maps(pictures))
    batches = [rows[start:start + batch_size] for start in range(0, len(rows), batch_size)]
    mine = [pictures[row] for batch in batches[rank::world] for row in batch]
    read = partial(read_prepared, model.clip, Budget(MOST_BYTES), Budget(MOST_PIXELS), reading)
    with (tqdm(total=len(rows), desc="mapping", unit="image", disable=rank > 0 or not rows) as bar,
          closing(map_ahead(read, mine, workers, batch_size)) as images):
        for start in range(0, len(batches), world):
            turn = [[pictures[row] for row in batch] for batch in batches[start:start + world]]
            tables = on_rank0(lambda turn=turn: [
                [record["table"] for record in records.read(batch)] for batch in turn])
            found = []
            if rank < len(turn):
                found = seen(model, [next(images) for _ in turn[rank]], tables[rank])
            captioned = [picture for batch in turn for picture in batch]
            done = list(zip(captioned, gather_lists(found)))
            later += [(picture.path, why) for picture, why in done if isinstance(why, str)]
            done = [each for each in done if not isinstance(each[1], str)]
            on_rank0(lambda done=done: done and records.add_maps(*zip(*done)))
            bar.update(len(captioned))


def read_prepared(clip, file_bytes, decoded, reading, picture):
    """(what clip.prepare makes of a picture; the box of its maps), or the reason, a text, where it
    cannot be read. file_bytes, decoded: Budgets of all threads. Raises InputError where it needs
    more memory than there is."""
    try:
        with ExitStack() as shares:
            size, *_ = persistent(partial(file_status, picture.path))
            shares.enter_context(file_bytes.share(size))
            content = read_bytes(picture.path)
            if hashlib.sha256(content).hexdigest() != picture.sha256:
                return "it has changed since it was captioned"
            image = read_image(content, **reading, room=lambda pixels: shares.enter_context(
                decoded.share(pixels)))
            return clip.prepare(image), map_box(clip, image.size)
    except MemoryError as error:
        raise InputError(f"there is not enough memory to read the image {picture.path}") from error
    except OSError as error:
        return error.strerror or " ".join(str(error).split()) or type(error).__name__


def seen(model, images, tables):
    """The value of "where" for each image and table, a list. images: (what clip.prepare makes of
    it, the box of its maps) each; one that is a text, the reason, stays as it is. tables: lists of
    (entry, cosine). model: see add_maps."""
    whole = [each for each in images if not isinstance(each, str)]
    if not whole:
        return images
    _, c = contributions(model.clip, [prepared for prepared, _ in whole])
    vectors, c = vectors_of(model, tables), iter(c)
    return [each if isinstance(each, str) else where_of(each[1], next(c), table, vectors)
            for each, table in zip(images, tables)]


def vectors_of(model, tables):
    """{entry: its row of the cache, float32 (dim,)} of tables, lists of (entry, cosine). What was
    taught has its own row, under the noun that a table has."""
    texts = {entry for table in tables for entry, _ in table}
    numbers = [row for row, entry in enumerate(model.entries) if entry in texts]
    rows = model.embeddings.only(numbers)[:]
    vectors = {model.entries[number]: row for number, row in zip(numbers, rows)}
    taught = model.taught
    return vectors | {thing.noun: row for thing, row in zip(taught.things, taught.rows)}


def where_of(box, c, table, vectors):
    """The value of "where" of one image. box: see map_box. c: (patches, dim), see contributions.
    table: (entry, cosine) pairs. vectors: of vectors_of."""
    left, top, right, bottom = box
    none = torch.zeros(c.shape[1])
    rows = torch.stack([vectors.get(entry, none) for entry, _ in table])  # (k, dim)
    [shares] = maps(c[None], rows[None])  # (k, side, side)
    side, packed = shares.shape[-1], []
    small = shares.clamp(min=0)[None]
    if side > MOST_SIDE:
        small = adaptive_avg_pool2d(small, MOST_SIDE)
    for (entry, _), patch, values in zip(table, shares.flatten(1).argmax(1).tolist(), small[0]):
        y, x = divmod(patch, side)
        place = left + (x + 0.5) / side * (right - left), top + (y + 0.5) / side * (bottom - top)
        values = (255 * values / values.max().clamp(min=1e-9)).round().byte().numpy()
        text = base64.b64encode(values.tobytes()).decode()
        packed.append([*(round(share, 4) for share in place), text] if entry in vectors else None)
    return {"box": [round(share, 4) for share in box], "side": min(side, MOST_SIDE),
            "maps": packed}
