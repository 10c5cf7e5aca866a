"""What compute_cache.py and the tables spend their time on: encoding n-grams, and search."""

from functools import partial

import torch
from torch.nn.functional import normalize

from benchmarks import made
from benchmarks.measure import Part, least, weights
from model import Clip
from cache import search


def encode_padded(clip, texts):
    """The plain way to encode texts: all in one batch, each padded to full length. Returns unit vectors (len(texts), dim)."""
    ids = clip.tokenizer(texts, padding="max_length", truncation=True, max_length=clip.max_length, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return normalize(clip.model.get_text_features(ids.to(clip.device)).pooler_output.float(), dim=-1).cpu()


def encoding_work(clip, texts):
    """FLOPs and numbers read, for least: the text tower over the texts' own tokens."""
    tokens = sum(map(len, clip.tokenizer(texts)["input_ids"]))
    numbers = weights(clip.model.text_model)
    return [(2 * numbers * tokens, numbers)]


def encode_ngrams(small, device):
    """1,000 n-grams, the original's batch, lengths as in a cache of 50,000. Equal: vectors to 1e-5."""
    clip, texts = Clip(made.clip_folder(small), device), made.ngrams(40 if small else 1000)
    return Part(partial(encode_padded, clip, texts), partial(clip.encode_texts, texts), lambda a, b: bool((a - b).abs().max() < 1e-5),
                lambda _: least(device, torch.float32, encoding_work(clip, texts)))


def vectors(n, share, generator, device):
    """n unit vectors (n, 512) with a direction in common, as CLIP's have it: its share of their length."""
    noise = torch.randn(n, 512, generator=generator) * ((1 - share ** 2) / 512) ** 0.5
    return normalize(noise.add_(share / 512 ** 0.5), dim=-1).to(device)


def searching(small, device, images, faiss=False):
    """The 10 best of 1,000,000 entries for 64 images, or for 1. Plain: a softmax over all entries, or faiss's exact index.
    Equal: the same entries, best first, but for ties to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    embeddings = vectors(5000 if small else 1000000, 0.8, generator, device)
    queries = vectors(images, 0.25, generator, device)  # cosines with the entries are 0.2 on average, as CLIP's are

    def softmax():
        similarity = (100.0 * queries @ embeddings.T).softmax(-1)
        return torch.stack([row.topk(10).indices for row in similarity])

    plain = softmax
    if faiss:
        from faiss import IndexFlatIP, omp_set_num_threads
        omp_set_num_threads(torch.get_num_threads())
        index = IndexFlatIP(embeddings.shape[1])
        index.add(embeddings.cpu().numpy())
        plain = lambda: torch.from_numpy(index.search(queries.cpu().numpy(), 10)[1])

    def cosines(indices):
        return (queries[:, None].double() * embeddings[indices].double()).sum(-1)  # (images, 10)

    return Part(plain, lambda: search(queries, embeddings, 10)[1], lambda a, b: bool((cosines(a) - cosines(b)).abs().max() < 1e-6),
                lambda _: least(device, torch.float32, [(2 * embeddings.numel() * images, embeddings.numel())]))


PARTS = {
    "encode_ngrams": encode_ngrams,
    "search_64": partial(searching, images=64),
    "search_1_to_faiss": partial(searching, images=1, faiss=True),
}
