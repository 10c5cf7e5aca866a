"""An approximate index over a large cache: faiss's IVF-PQ proposes a shortlist, and exact cosines
rank it.

Method: Jegou et al. 2011, https://inria.hal.science/inria-00514462. The rows of a shortlist are
read from the cache, so scores are exact, and only the choice of candidates is approximate. Caches
without an index are searched exactly.
"""

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

from antarctic.bounded import MOST_SETTINGS
from antarctic.cache import BLOCK, read_one_cache, search
from antarctic.cache_files import cache_description
from antarctic.distributed import is_rank0
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.files import (
    atomic,
    existing_file,
    file_sha256,
    fingerprint,
    made_by_runs,
    remove,
    write_json,
)
from antarctic.texts import read_json

LEAST = 256  # entries of the smallest cache that an index is built for
WIDTH = 256  # dimensions that remain before rows are quantized
PROBED = 4  # a query reads one in this many lists
SHORTLIST = 1000  # candidates of a query, whose exact cosines are computed
QUERIES = 256  # queries that recall is measured with
SAVE_SECONDS = 60  # between two saves of an index that is being built


def load_faiss():
    """faiss, with as many threads as torch. Raises InputError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise InputError("--index needs faiss, which is not installed here: "
                         "pip install faiss-cpu==1.15.1") from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


# ------------------------------------------------------------------------------------- searching

class Index:
    """A faiss index over the file of some Rows. search() returns what cache.search does, except for
    entries that the shortlist misses."""

    def __init__(self, index, rows):
        """index: a faiss index of all rows of the file. rows: the Rows to search, all or some."""
        faiss = load_faiss()
        self.index, self.rows = index, rows
        # With few rows left, the lists that a query reads may hold too few of them, so rows are
        # searched exactly.
        self.exact = 2 * len(rows) < rows.file_rows
        self.kept, selector = None, None
        if rows.kept is not None:
            self.kept, mask = np.array(rows.kept), np.zeros(rows.file_rows, bool)
            mask[self.kept] = True
            selector = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
        probes = math.ceil(faiss.extract_index_ivf(index).nlist / PROBED)
        self.parameters = faiss.SearchParametersPreTransform(
            index_params=faiss.SearchParametersIVF(sel=selector, nprobe=probes))

    def nearest(self, queries, k):
        """Like search, but among the rows of the index alone."""
        k, results = min(k, len(self.rows)), []
        _, shortlists = self.index.search(queries.numpy(), max(k, SHORTLIST),
                                          params=self.parameters)  # (B, SHORTLIST), -1: none
        for query, numbers in zip(queries[:, None], shortlists):
            numbers = np.unique(numbers[(numbers >= 0) & (numbers < self.rows.file_rows)])
            if self.kept is not None:
                numbers = np.searchsorted(self.kept, numbers)
            if len(numbers) < k:  # the lists that were read are too short
                results.append(search(query, self.rows, k))
                continue
            scores, place = search(query, self.rows.only(numbers.tolist())[:], k)
            results.append((scores, torch.from_numpy(numbers)[place]))
        return tuple(map(torch.cat, zip(*results)))  # (B, k), (B, k)

    def search(self, queries, embeddings, k):
        """The k nearest rows by inner product, best first; approximate among the rows of the index,
        exact among all others.

        queries: (B, dim) float32, on the CPU. embeddings: the Embeddings that the index was opened
        for. Returns (scores (B, k), indices (B, k) int64), as cache.search does.
        """
        results, begin = [], 0
        for part in embeddings.parts:
            if len(part):
                if part is self.rows and not self.exact:
                    scores, place = self.nearest(queries, k)
                else:
                    scores, place = search(queries, part, k)
                results.append((scores, place + begin))
            begin += len(part)
        scores, place = (torch.cat(each, 1) for each in zip(*results))
        scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
        return scores, place.gather(1, order)  # (B, k), (B, k) indices into the cache


def index_description(path):
    """The description that build_index stored beside an index, a dict. Raises InputError where it
    is missing or something else, or where there is no index or no faiss."""
    load_faiss()
    file = existing_file(f"{existing_file(path, 'index')}.json", "description of the index")
    try:
        description = read_json(file, "description of the index", MOST_SETTINGS)
        return {"index_sha256": description["index_sha256"] + "",
                "cache": dict(description["cache"]), "recall": float(description["recall"]),
                "queries": description["queries"] + ""}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is not the description of an index; "
                         "rebuild the index") from error


def open_index(path, embeddings):
    """The Index of one of the caches in embeddings. Prints how the cache is searched.

    faiss only gets a file that build_index wrote, since a hostile file can crash it. This does not
    make a stranger's index safe: its description can be forged, too. Raises InputError where there
    is no index, it is damaged, or it is not of these caches as they are now.
    """
    description = index_description(path)
    matches = (part for part in embeddings.parts
               if part.description and part.description.stated() == description["cache"])
    rows = next(matches, None)
    if rows is None:
        raise InputError(f"the index {path} is of another cache than --embfile, or of an older "
                         "version of it; rebuild it with compute_cache.py --index")
    if file_sha256(path) != description["index_sha256"]:
        raise InputError(f"{path} is not the index that {path}.json describes; rebuild it with "
                         "compute_cache.py --index")
    faiss = load_faiss()
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise InputError(f"{path} is not an index of faiss") from error
    if (type(index), index.d, index.ntotal) != (faiss.IndexPreTransform, rows.dim, rows.file_rows):
        raise InputError(f"{path} is not an index of the {rows.file_rows} rows of {rows.path}")
    opened = Index(index, rows)
    if is_rank0():
        if opened.exact:
            print_safely(escape_control(
                f"{rows.path} is searched exactly, since less than half of its entries remain: "
                f"the index {path} is not used"))
        else:
            print_safely(escape_control(
                f"approximate: {rows.path} is searched through {path}, which found "
                f"{description['recall']:.1%} of the 10 nearest entries of "
                f"{description['queries']} when it was built"))
    return opened


# --------------------------------------------------------------------------------------- building

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
    mixture = without_common(shuffled.view(-1, 3, rows.dim).sum(1))  # (QUERIES, dim)
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
    _, rows = read_one_cache(Path(textfile), Path(embfile), cache["clip_model"])
    if len(rows) < LEAST:
        raise InputError(f"{textfile} has {len(rows)} entries; below {LEAST} an index gains "
                         "nothing")
    queries = image_queries(features, rows.dim) if features else made_queries(rows)

    key = fingerprint([cache, len(rows), rows.dim, WIDTH, faiss.__version__])
    part = path.with_name(f".{path.name}.{key}.part")
    index = faiss.read_index(str(part)) if part.is_file() else trained_index(rows)
    saved = time.monotonic() if index.ntotal else 0  # 0: the training is saved at once
    with tqdm(total=len(rows), initial=index.ntotal, desc="indexing entries", unit="entry") as bar:
        for start in range(index.ntotal, len(rows), BLOCK):
            if time.monotonic() - saved > SAVE_SECONDS:
                write_index(part, index)
                saved = time.monotonic()
            block = rows[start:start + BLOCK].numpy()
            index.add(block)
            bar.update(len(block))
    share = recall(Index(index, rows), queries)
    source = f"{len(queries)} {'images' if features else 'made-up queries'}"
    write_index(path, index)
    description = {"index_sha256": file_sha256(path), "cache": cache, "recall": round(share, 4),
                   "queries": source}
    write_json(f"{path}.json", description, indent=1)
    remove(*made_by_runs(path.parent, f".{path.name}.", ".part"))
    print_safely(escape_control(
        f"wrote {path}, an index of {len(rows):,} entries: approximate, it finds {share:.1%} of "
        f"the 10 nearest entries of {source}"))
    return share


def write_index(path, index):
    faiss = load_faiss()
    with atomic(path, "wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
