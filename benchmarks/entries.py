"""What compute_cache.py and the tables spend their time on: encoding n-grams, and search."""

from functools import partial

import torch
from torch.nn.functional import normalize

from antarctic.cache import read_cache, search, to_bfloat16, write_cache
from benchmarks import made
from benchmarks.measure import Part, least, weights
from model import Clip


def encode_padded(clip, texts):
    """The plain way to encode texts: all in one batch, each padded to full length. Returns unit
    vectors (len(texts), dim)."""
    tokens = clip.tokenizer(texts, padding="max_length", truncation=True,
                            max_length=clip.max_length, return_tensors="pt")
    with torch.inference_mode():  # without a mask, as the tower is causal
        features = clip.model.get_text_features(tokens["input_ids"].to(clip.device)).pooler_output
    return normalize(features, dim=-1).cpu()


def encoding_work(clip, texts):
    """FLOPs and numbers read, for least: the text tower over the texts' own tokens."""
    tokens = sum(map(len, clip.tokenizer(texts)["input_ids"]))
    numbers = weights(clip.model.text_model)
    return [(2 * numbers * tokens, numbers)]


def encode_ngrams(small, device, dtype=torch.float32):
    """500 n-grams, as long as those of a cache of 50,000. Equal: vectors to 1e-5; in bfloat16
    cosines above .999."""
    plain, texts = Clip(made.clip_folder(small), device), made.ngrams(40 if small else 500)
    clip = plain if dtype == torch.float32 else Clip(made.clip_folder(small), device, dtype)
    return Part(
        partial(encode_padded, plain, texts), partial(clip.encode_texts, texts), lambda a, b: bool(
            (a - b).abs().max() < 1e-5 if dtype == torch.float32 else (a * b).sum(1).min() > 0.999),
        lambda _: least(device, dtype, encoding_work(clip, texts)))


def vectors(n, share, generator):
    """n unit vectors (n, 512) with a direction in common, as CLIP's have it: its share of their
    length."""
    noise = torch.randn(n, 512, generator=generator).mul_(((1 - share ** 2) / 512) ** 0.5)
    return normalize(noise.add_(share / 512 ** 0.5), dim=-1)


def searching(small, device, images, dtype=torch.float32, faiss=False):
    """The 10 best of 1,000,000 entries for so many images. Plain: a softmax over all entries, or
    faiss's exact index. Ours: from the cache's file, in bfloat16 with a copy in memory. Equal: the
    same entries, best first, but for ties to 1e-6."""
    generator, n = torch.Generator().manual_seed(0), 5000 if small else 1000000
    matrix = vectors(n, 0.8, generator)
    queries = vectors(images, 0.25,
                      generator)  # their cosines with the entries are .2 on average, as CLIP's are
    textfile, embfile = made.folder() / "cache.txt", made.folder() / "cache.npy"
    write_cache(textfile, embfile, list(map(str, range(n))), matrix.numpy(), "none", "")
    _, embeddings = read_cache([textfile], [embfile], "none")
    half = to_bfloat16(embeddings) if dtype == torch.bfloat16 else None
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

    return Part(
        plain, lambda: search(queries, embeddings, 10, half=half)[1], lambda a, b: bool(
            (cosines(a) - cosines(b)).abs().max() < 1e-6), lambda _: least(
                torch.device("cpu"), dtype, [(2 * matrix.numel() * images, matrix.numel())]))


PARTS = {
    "encode_ngrams": encode_ngrams,
    "encode_ngrams_bf16": partial(encode_ngrams, dtype=torch.bfloat16),
    "search_64": partial(searching, images=64),
    "search_64_bf16": partial(searching, images=64, dtype=torch.bfloat16),
    "search_1_to_faiss": partial(searching, images=1, faiss=True),
}
