"""An approximate index over a large cache: faiss's IVF-PQ draws up a shortlist, which is ranked by
the exact cosines.

Method: Jegou et al. 2011, https://inria.hal.science/inria-00514462. Of a shortlist the rows are
read from the cache, so scores are true, and only the choice of candidates is approximate. Caches
that have no index are searched exactly.
"""

import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.functional import normalize
from tqdm import tqdm

from antarctic.cache import BLOCK, cache_description, read_one_cache, search
from antarctic.distributed import rank_and_world
from antarctic.errors import InputError
from antarctic.files import atomic, existing_file, file_sha256, fingerprint, write_json

LEAST = 256  # entries that are worth an index
WIDTH = 256  # dimensions that are left before they are quantized
PROBED = 4  # one list in so many is read for a query
SHORTLIST = 1000  # candidates whose exact cosines are computed
QUERIES = 256  # of which recall is measured
SAVE_SECONDS = 60  # between two saves of an index that is being built


def load_faiss():
    """faiss, with as many threads as torch. Raises InputError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "--index needs faiss, which is not installed here: pip install faiss-cpu==1.15.1"
        ) from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


class Index:
    """A faiss index over the file of some Rows; search() finds what cache.search finds, but for
    what the shortlist misses."""

    def __init__(self, index, rows):
        """index: of all rows of the file. rows: those of them that are searched."""
        faiss = load_faiss()
        self.index, self.rows = index, rows
        # Where most rows are left out, the lists that are read may hold too few of the others:
        # those are searched exactly.
        self.exact = 2 * len(rows) < rows.file_rows
        self.kept, chosen = None, None
        if rows.kept is not None:
            self.kept, mask = np.array(rows.kept), np.zeros(rows.file_rows, bool)
            mask[self.kept] = True
            chosen = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
        ivf = faiss.extract_index_ivf(index)
        self.how = faiss.SearchParametersPreTransform(
            index_params=faiss.SearchParametersIVF(sel=chosen, nprobe=math.ceil(ivf.nlist /
                                                                                PROBED)))

    def nearest(self, queries, k):
        """As search, among the rows of the index alone."""
        k, found = min(k, len(self.rows)), []
        _, shortlists = self.index.search(queries.numpy(), max(k, SHORTLIST),
                                          params=self.how)  # (B, SHORTLIST), -1: none
        for query, numbers in zip(queries[:, None], shortlists):
            numbers = np.unique(numbers[(numbers >= 0) & (numbers < self.rows.file_rows)])
            if self.kept is not None:
                numbers = np.searchsorted(self.kept, numbers)
            if len(numbers) < k:  # the lists that were read are too short
                found.append(search(query, self.rows, k))
                continue
            scores, where = search(query, self.rows.only(numbers.tolist())[:], k)
            found.append((scores, torch.from_numpy(numbers)[where]))
        return tuple(map(torch.cat, zip(*found)))

    def search(self, queries, embeddings, k):
        """The k nearest rows by inner product, best first; approximate among the rows of the index,
        exact among all others.

        queries: (B, dim) float32, on the CPU. embeddings: the Embeddings that the index was opened
        for. Returns (scores (B, k), indices (B, k) int64), as cache.search.
        """
        found, begin = [], 0
        for part in embeddings.parts:
            if len(part):
                scores, where = self.nearest(queries,
                                             k) if part is self.rows and not self.exact else search(
                                                 queries, part, k)
                found.append((scores, where + begin))
            begin += len(part)
        scores, where = (torch.cat(each, 1) for each in zip(*found))
        scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
        return scores, where.gather(1, order)


def index_description(path):
    """What build_index noted beside an index, a dict. Raises InputError, also where there is no
    index or no faiss."""
    load_faiss()
    side = Path(f"{existing_file(path, 'index')}.json")
    try:
        made = json.loads(
            existing_file(side, "description of the index").read_text(encoding="utf-8"))
        return {
            "index_sha256": made["index_sha256"] + "", "cache": dict(made["cache"]),
            "recall": float(made["recall"]), "queries": made["queries"] + ""
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{side} is not the description of an index; build the index again") from error


def open_index(path, embeddings):
    """The Index of one of the caches in embeddings. Says on which terms it is approximate.

    A file that is not the one that was built is never given to faiss, which a hostile one can
    crash. That does not make a stranger's index safe, for he can write the description, too. Raises
    InputError: no index, not whole, or of another cache than these, as they are now.
    """
    made = index_description(path)
    rows = next(
        (part for part in embeddings.parts if cache_description(part.path) == made["cache"]), None)
    if rows is None:
        raise InputError(
            f"the index {path} is of another cache than --embfile, or was built before that was "
            "changed; build it "
            f"again by compute_cache.py --index")
    if file_sha256(path) != made["index_sha256"]:
        raise InputError(
            f"{path} is not the index that {path}.json describes; build it again by "
            "compute_cache.py --index"
        )
    faiss = load_faiss()
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise InputError(f"{path} is not an index of faiss") from error
    if (type(index), index.d, index.ntotal) != (faiss.IndexPreTransform, rows.dim, rows.file_rows):
        raise InputError(f"{path} is not an index of the {rows.file_rows} rows of {rows.path}")
    opened = Index(index, rows)
    if rank_and_world()[0] == 0:
        print(
            f"{rows.path} is searched exactly, as less than half of it is left: the index {path} "
            "is not used"
            if opened.exact else
            f"approximate: {rows.path} is searched through {path}, which found "
            f"{made['recall']:.1%} of the 10 nearest "
            f"entries of {made['queries']} when it was built")
    return opened


# ----------------------------------------------------------------------------------------- building

def some_rows(rows, count, seed):
    """count rows drawn by the seed, float32 (count, dim), read so that little of the file is mapped
    at a time."""
    drawn = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    return torch.cat(
        [rows.only(drawn[start:start + 4096])[:] for start in range(0, len(drawn), 4096)])


def trained_index(rows):
    """An empty faiss index, trained on some of the rows.

    The number of lists n, 4 sqrt(rows), and of rows to train on, 40 n, are from faiss's guidelines
    (https://github.com/facebookresearch/faiss/wiki/Guidelines-to-choose-an-index). Before that rows
    are turned to the WIDTH directions in which they differ most, mixed, so that each says as much.
    Codes are of 4 bits for two dimensions, which faiss scans in registers (Andre et al. 2017,
    https://arxiv.org/abs/1704.07355). Lists and codes go by inner products, as search does: from an
    image all entries are far, and distances would rank the lists by how wide they are.
    """
    faiss = load_faiss()
    lists = max(1, min(round(4 * math.sqrt(len(rows))), len(rows) // 40))
    width = min(WIDTH, rows.dim // 2 * 2)
    sample = some_rows(rows, 40 * lists, 0)
    _, directions = torch.linalg.eigh(
        sample[::max(1,
                     len(sample) // 65536)].T.cov())  # (dim, dim), the widest last
    mixing, _ = torch.linalg.qr(
        torch.randn(width, width, generator=torch.Generator().manual_seed(0)))
    turn = faiss.LinearTransform(
        rows.dim, width, False)  # takes off no mean: that would change the order of inner products
    faiss.copy_array_to_vector((directions[:, -width:] @ mixing).T.numpy().ravel(), turn.A)
    turn.is_trained = True
    ivf = faiss.index_factory(width, f"IVF{lists},PQ{width // 2}x4fs", faiss.METRIC_INNER_PRODUCT)
    index = faiss.IndexPreTransform(turn, ivf)
    index.train(sample.numpy())
    return index


def made_queries(rows):
    """Vectors that lie to the rows as images to CLIP's texts: QUERIES unit rows. They are made of
    three rows each, and noise.

    Images keep apart from texts (Liang et al. 2022, https://arxiv.org/abs/2203.02053): cosines are
    about 0.2 with any entry and 0.3 to 0.35 with the best; rows as queries, at 1, would flatter an
    index.
    """
    sample = some_rows(rows, 3 * QUERIES, 1)
    common = normalize(sample.mean(0), dim=0)

    def apart(vectors):
        return normalize(vectors - (vectors @ common)[:, None] * common, dim=1)

    generator = torch.Generator().manual_seed(1)
    mixed = apart(sample)[torch.randperm(len(sample), generator=generator)][:len(sample) // 3 * 3]
    meant = apart(mixed.view(-1, 3, rows.dim).sum(1))
    noise = apart(torch.randn(meant.shape, generator=generator))
    return normalize(0.25 * common + 0.3 * meant + (1 - 0.25 ** 2 - 0.3 ** 2) ** 0.5 * noise, dim=1)


def image_queries(path, dim):
    """At most QUERIES of the image features that trainer.py or sampler.py kept in a file. Raises
    InputError."""
    try:
        features = load_file(existing_file(path, "file of image features"))["features"].float()
    except (SafetensorError, KeyError) as error:
        raise InputError(
            f"{path} is not a file of image features (features-*.safetensors)") from error
    if features.dim(
    ) != 2 or not len(features) or features.shape[1] != dim or not features.isfinite().all():
        raise InputError(
            f"{path} does not hold image features of {dim} dimensions, as the cache has them")
    return features[torch.randperm(len(features),
                                   generator=torch.Generator().manual_seed(0))[:QUERIES]]


def recall(index, queries, k=10):
    """The share of the k nearest rows of each query that index.nearest finds; ties at the end count
    as found."""
    exact, _ = search(queries, index.rows, k)
    found, _ = index.nearest(queries, k)
    return (found >= exact[:, -1:] - 1e-6).float().mean().item()


def build_index(path, textfile, embfile, features=None):
    """Builds an index over a cache and writes it with a description (.json) that ties it to the
    cache, both atomically.

    features: a file of image features to measure recall with; None: queries are made up. Rows are
    added block by block. A build that was stopped goes on where it last saved, after the training.
    Returns the recall, which it prints. Raises InputError.
    """
    faiss, path, cache = load_faiss(), Path(path), cache_description(embfile)
    if cache is None:
        raise InputError(
            f"{embfile}.json is missing, so an index could not be tied to the cache; compute the "
            "cache again"
        )
    _, rows = read_one_cache(Path(textfile), Path(embfile), cache["clip_model"])
    if len(rows) < LEAST:
        raise InputError(
            f"{textfile} has {len(rows)} entries; below {LEAST} an index gains nothing")
    queries = image_queries(features, rows.dim) if features else made_queries(rows)

    key = fingerprint([cache, len(rows), rows.dim, WIDTH, faiss.__version__])
    part = path.with_name(f".{path.name}.{key}.part")
    index = faiss.read_index(str(part)) if part.is_file() else trained_index(rows)
    saved = 0 if not index.ntotal else time.monotonic()
    with tqdm(total=len(rows), initial=index.ntotal, desc="indexing entries", unit="entry") as bar:
        for start in range(index.ntotal, len(rows), BLOCK):
            if time.monotonic() - saved > SAVE_SECONDS:
                write_index(part, index)
                saved = time.monotonic()
            block = rows[start:start + BLOCK].numpy()
            index.add(block)
            bar.update(len(block))
    found = recall(Index(index, rows), queries)
    about = f"{len(queries)} {'images' if features else 'made-up queries'}"
    write_index(path, index)
    write_json(f"{path}.json", {
        "index_sha256": file_sha256(path), "cache": cache, "recall": round(found, 4),
        "queries": about
    }, indent=1)
    for abandoned in path.parent.glob(f".{path.name}.*.part"):
        abandoned.unlink()
    print(
        f"wrote {path}, an index of {len(rows):,} entries: approximate, it finds {found:.1%} of "
        "the 10 nearest entries of "
        f"{about}")
    return found


def write_index(path, index):
    with atomic(path, "wb") as file:
        load_faiss().write_index(index, load_faiss().PyCallbackIOWriter(file.write))
