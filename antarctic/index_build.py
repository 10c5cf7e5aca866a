"""Building an approximate index over a cache, and measuring what it finds."""

import hashlib
import math
import os
import random
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.functional import normalize
from tqdm import tqdm

from antarctic.cache import BLOCK, read_one_cache, search
from antarctic.cache_files import cache_description
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import atomic, existing_file, fingerprint, made_by_runs, remove, write_json
from antarctic.index import Index, load_faiss, most_bytes, parse
from antarctic.reads import read_regular

LEAST = 256  # entries of the smallest cache that an index is built for
WIDTH = 256  # dimensions that remain before rows are quantized
QUERIES = 256  # queries that recall is measured with
SAVE_SECONDS = 60  # between two saves of an index that is being built


def sample_rows(rows, count, seed):
    """A sample of count rows, float32 (count, dim), read in blocks so that little of the file is
    mapped at a time."""
    sample = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    blocks = [rows.only(sample[start:start + 4096])[:] for start in range(0, len(sample), 4096)]
    return torch.cat(blocks)


def trained_index(rows):
    """An empty faiss index, trained on a sample of the rows.

    The number of lists n, 4 sqrt(rows), and of rows to train on, 40 n, are from faiss's guidelines
    (https://github.com/facebookresearch/faiss/wiki/Guidelines-to-choose-an-index). Rows are first
    projected onto the WIDTH directions in which they differ most, rotated at random so that each
    dimension carries as much. Codes are of 4 bits for two dimensions, which faiss scans in
    registers (Andre et al. 2017, https://arxiv.org/abs/1704.07355). Lists and codes compare inner
    products, as search does: all entries are far from an image, and distances would rank the lists
    by their width.
    """
    faiss = load_faiss()
    lists = max(1, min(round(4 * math.sqrt(len(rows))), len(rows) // 40))
    width = min(WIDTH, rows.dim // 2 * 2)
    sample = sample_rows(rows, 40 * lists, 0)
    covariance = sample[::max(1, len(sample) // 65536)].T.cov()  # (dim, dim)
    _, directions = torch.linalg.eigh(covariance)  # (dim, dim), the widest last
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    # It subtracts no mean, which would change the order of inner products.
    projection = faiss.LinearTransform(rows.dim, width, False)
    matrix = (directions[:, -width:] @ rotation).T  # (width, dim)
    faiss.copy_array_to_vector(matrix.numpy().ravel(), projection.A)
    projection.is_trained = True
    ivf = faiss.index_factory(width, f"IVF{lists},PQ{width // 2}x4fs", faiss.METRIC_INNER_PRODUCT)
    index = faiss.IndexPreTransform(projection, ivf)
    index.train(sample.numpy())
    return index


def made_queries(rows):
    """Queries made from rows, at most QUERIES unit vectors, as near to the rows as images are to
    CLIP's texts. Each is a mixture of three rows and noise.

    Images lie apart from texts (Liang et al. 2022, https://arxiv.org/abs/2203.02053): their cosine
    is about 0.2 with any entry, and 0.3 to 0.35 with the best. Rows as queries, with a cosine of 1,
    would overstate recall.
    """
    sample = sample_rows(rows, 3 * QUERIES, 1)  # (3 QUERIES, dim)
    common = normalize(sample.mean(0), dim=0)  # (dim,)

    def without_common(vectors):
        return normalize(vectors - (vectors @ common)[:, None] * common, dim=1)

    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(sample), generator=generator)
    shuffled = without_common(sample)[order][:len(sample) // 3 * 3]
    mixture = without_common(shuffled.view(-1, 3, sample.shape[1]).sum(1))  # (QUERIES, dim)
    noise = without_common(torch.randn(mixture.shape, generator=generator))  # (QUERIES, dim)
    rest = (1 - 0.25 ** 2 - 0.3 ** 2) ** 0.5
    return normalize(0.25 * common + 0.3 * mixture + rest * noise, dim=1)  # (QUERIES, dim)


def image_queries(path, dim):
    """A sample of at most QUERIES vectors of a features-*.safetensors file, which trainer.py and
    sampler.py write. Raises InputError where it has no image features of dim dimensions."""
    try:
        features = load_file(existing_file(path, "file of image features"))["features"].float()
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path} is not a file of image features "
                         "(features-*.safetensors)") from error
    is_table = features.dim() == 2 and len(features) > 0
    if not is_table or features.shape[1] != dim or not features.isfinite().all():
        raise InputError(f"{path} does not hold image features of {dim} dimensions, as the cache "
                         "has them")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    return features[order[:QUERIES]]  # (QUERIES, dim)


def recall(index, queries, k=10):
    """The share of the k nearest rows of each query that index.nearest finds. A row that ties with
    the k-th counts as found."""
    exact, _ = search(queries, index.rows, k)  # (B, k)
    approximate, _ = index.nearest(queries, k)  # (B, k)
    return (approximate >= exact[:, -1:] - 1e-6).float().mean().item()


def build_index(path, textfile, embfile, features=None):
    """Builds an index over a cache. Prints and returns its recall.

    Writes the index and a description (.json) that ties it to the cache, both atomically.
    features: a file of image features to measure recall with; None measures it with made_queries.
    Rows are added block by block, and a stopped build resumes from its last save, after the
    training. Raises InputError.
    """
    faiss, path, cache = load_faiss(), Path(path), cache_description(embfile)
    if cache is None:
        raise InputError(f"{embfile}.json is missing, so an index could not be tied to the cache; "
                         "compute the cache again")
    _, rows = read_one_cache(Path(textfile), Path(embfile), cache["clip_model"], whole=True)
    if len(rows) < LEAST:
        raise InputError(f"{textfile} has {len(rows)} entries; below {LEAST} an index gains "
                         "nothing")
    queries = image_queries(features, rows.dim) if features else made_queries(rows)

    key = fingerprint([cache, len(rows), rows.dim, WIDTH, faiss.__version__])
    part = path.with_name(f".{path.name}.{key}.part")
    index = read_part(part, key, len(rows)) or trained_index(rows)
    saved = time.monotonic() if index.ntotal else 0  # 0: the training is saved at once
    with tqdm(total=len(rows), initial=index.ntotal, desc="indexing entries", unit="entry") as bar:
        for start in range(index.ntotal, len(rows), BLOCK):
            if time.monotonic() - saved > SAVE_SECONDS:
                write_index(part, index, key)
                saved = time.monotonic()
            block = rows[start:start + BLOCK].numpy()
            index.add(block)
            bar.update(len(block))
    share = recall(Index(lambda: index, rows), queries)
    source = f"{len(queries)} {'images' if features else 'made-up queries'}"
    digest = write_index(path, index)
    description = {"index_sha256": digest, "cache": cache, "recall": round(share, 4),
                   "queries": source}
    write_json(f"{path}.json", description, indent=1)
    remove(*made_by_runs(path.parent, f".{path.name}.", ".part"))
    print_safely(escape_control(
        f"wrote {path}, an index of {len(rows):,} entries: approximate, it finds {share:.1%} of "
        f"the 10 nearest entries of {source}"))
    return share


# ---------------------------------------------------------------------------- files of a build

def write_index(path, index, key=None):
    """Writes an index, and returns the SHA-256 of its bytes. key: of a build that goes on, whose
    seal is written behind it, see read_part."""
    faiss, digest = load_faiss(), hashlib.sha256()
    with atomic(path, "wb") as file:
        def write(data):
            digest.update(data)
            return file.write(data)

        faiss.write_index(index, faiss.PyCallbackIOWriter(write))
        if key:
            file.write(seal(digest, key))
    return digest.hexdigest()


def seal(digest, key):
    """The 32 bytes that show that an unfinished index is whole, and of the build with this key.
    digest: the SHA-256 of the index."""
    return hashlib.sha256(key.encode() + digest.digest()).digest()


def read_part(path, key, entries):
    """The index that a stopped build left at path, None where there is none to resume from.

    faiss sees no link, no pipe, no file larger than an index of so many entries, and no bytes
    without the seal of write_index.
    """
    if os.path.islink(path):
        return None
    try:
        data = read_regular(path, most_bytes(entries))
    except OSError:
        return None
    if data[-32:] != seal(hashlib.sha256(memoryview(data)[:-32]), key):
        return None
    return parse(data)
