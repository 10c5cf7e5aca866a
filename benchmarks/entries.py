"""The hot parts of compute_cache.py and of the tables: encoding n-grams, and search."""

from functools import partial

import torch
from torch.nn.functional import normalize

from antarctic.cache import read_cache, search, to_bfloat16
from antarctic.cache_changes import write_cache
from benchmarks import synthetic
from benchmarks.measure import Part, least, weights
from model import Clip


def encode_padded(clip, texts):
    """The baseline for encoding texts: one batch, each text padded to full length. Returns unit
    vectors, float32 (len(texts), dim)."""
    tokens = clip.tokenizer(texts, padding="max_length", truncation=True,
                            max_length=clip.max_length, return_tensors="pt")
    with torch.inference_mode():  # no mask, because the tower is causal
        features = clip.model.get_text_features(tokens["input_ids"].to(clip.device)).pooler_output
    return normalize(features, dim=-1).cpu()


def encoding_work(clip, texts):
    """The work of encoding texts, for least: the text tower over the tokens without padding."""
    tokens = sum(map(len, clip.tokenizer(texts)["input_ids"]))
    numbers = weights(clip.model.text_model)
    return [(2 * numbers * tokens, numbers)]


def encode_ngrams(small, device, dtype=torch.float32):
    """Encoding 500 n-grams, as long as those of a cache of 50,000. Equal: vectors to 1e-5; in
    bfloat16 cosines above .999."""
    texts = synthetic.ngrams(40 if small else 500)
    baseline = clip = Clip(synthetic.clip_folder(small), device)
    if dtype != torch.float32:
        clip = Clip(synthetic.clip_folder(small), device, dtype)

    def equal(plain, ours):
        if dtype == torch.float32:
            return bool((plain - ours).abs().max() < 1e-5)
        return bool((plain * ours).sum(1).min() > 0.999)

    return Part(partial(encode_padded, baseline, texts), partial(clip.encode_texts, texts), equal,
                lambda _: least(device, dtype, encoding_work(clip, texts)))


def vectors(n, share, generator):
    """n unit vectors, float32 (n, 512), with a common direction, as CLIP's have. share: of their
    length in this direction."""
    noise = torch.randn(n, 512, generator=generator).mul_(((1 - share ** 2) / 512) ** 0.5)
    return normalize(noise.add_(share / 512 ** 0.5), dim=-1)


def searching(small, device, images, dtype=torch.float32, faiss=False):
    """The top 10 of 1,000,000 entries for some images. Plain: a softmax over all entries, or
    faiss's exact index. Ours: search in the cache's file; in bfloat16 in a copy in memory, too, and
    in float16 by a Scan. Equal: the same entries in the same order, except ties to 1e-6."""
    generator, n = torch.Generator().manual_seed(0), 5000 if small else 1000000
    matrix = vectors(n, 0.8, generator)
    queries = vectors(images, 0.25, generator)  # mean cosine with the entries .2, as CLIP's
    textfile, embfile = synthetic.folder() / "cache.txt", synthetic.folder() / "cache.npy"
    write_cache(textfile, embfile, list(map(str, range(n))), matrix.numpy(), "none", "")
    _, embeddings = read_cache([textfile], [embfile], "none")
    half = to_bfloat16(embeddings) if dtype == torch.bfloat16 else None
    find = partial(search, half=half)
    if dtype == torch.float16:
        from antarctic.scan import Scan
        find = Scan(embeddings)
    if faiss:
        from faiss import IndexFlatIP, omp_set_num_threads
        omp_set_num_threads(torch.get_num_threads())
        index = IndexFlatIP(matrix.shape[1])
        index.add(matrix.numpy())
    on_device = queries.to(device), matrix.to(device)

    def plain():
        if faiss:
            return torch.from_numpy(index.search(queries.numpy(), 10)[1])
        similarity = (100.0 * on_device[0] @ on_device[1].T).softmax(-1)
        return torch.stack([row.topk(10).indices for row in similarity]).cpu()

    def cosines(indices):
        return (queries[:, None].double() * matrix[indices].double()).sum(-1)  # (images, 10)

    def ours():
        return find(queries, embeddings, 10)[1]

    def equal(plain, ours):
        return bool((cosines(plain) - cosines(ours)).abs().max() < 1e-6)

    # A scan's arithmetic is float32, but it reads half as much.
    numbers = matrix.numel() // 2 if dtype == torch.float16 else matrix.numel()
    dtype = torch.float32 if dtype == torch.float16 else dtype
    work = [(2 * matrix.numel() * images, numbers)]
    return Part(plain, ours, equal, lambda _: least(torch.device("cpu"), dtype, work))


PARTS = {
    "encode_ngrams": encode_ngrams,
    "encode_ngrams_bf16": partial(encode_ngrams, dtype=torch.bfloat16),
    "search_64": partial(searching, images=64),
    "search_64_bf16": partial(searching, images=64, dtype=torch.bfloat16),
    "search_1_to_faiss": partial(searching, images=1, faiss=True),
    "search_1_scan_to_faiss": partial(searching, images=1, dtype=torch.float16, faiss=True),
}
