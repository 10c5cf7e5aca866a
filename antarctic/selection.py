"""Which entries form a table: the nearest ones, or fewer that say different things.

The nearest entries of a large cache say one thing in many ways ("sandy beach | beach | the beach").
"mmr" and "omp" choose from a shortlist of them. Sources: maximal marginal relevance (Carbonell and
Goldstein 1998, https://doi.org/10.1145/290941.291025); orthogonal matching pursuit with weights
that are not negative, as SpLiCE explains images (Bhalla et al. 2024,
https://arxiv.org/abs/2402.10376). Tables of SmallCap's kind are copied by the majority of what
they say (https://arxiv.org/abs/2406.02265).
"""

import torch

METHODS = "topk", "mmr", "omp"
SHARE, MOST = 50, 512  # a shortlist is the best 50th of the entries, but no more than so many
GAIN = 0.01  # of what a table explains of an image, the least that an entry adds
SWEEPS = 8  # passes of coordinate descent over the weights
RELEVANCE = 0.5  # the weight of an entry's cosine beside its likeness to those in the table
IMAGES = 32  # at a time; their shortlists take 32 MB


def shortlist_size(entries, k):
    """How many of so many entries a table of k is chosen from. With fewer, it says one thing; with
    more, it says what is not in the image."""
    return min(entries, max(2 * k, min(entries // SHARE, MOST)))


def standard(values):
    """Values (B, s) or (B, s, s) of each image with mean 0 and deviation 1."""
    flat = values.flatten(1)
    shape = (-1,) + (1,) * (values.dim() - 1)
    deviation = flat.std(1, correction=0).clamp(min=1e-6)
    return (values - flat.mean(1).view(shape)) / deviation.view(shape)


def marginal_relevance(cosines, vectors, k):
    """Places in the shortlists, int64 (B, k), in the order in which they are chosen: each is near
    to the image and unlike those before it.

    cosines: (B, s), best first. vectors: (B, s, dim). k <= s.
    """
    images = torch.arange(len(vectors))
    relevance = RELEVANCE * standard(cosines)  # (B, s)
    likeness = (1 - RELEVANCE) * standard(vectors @ vectors.mT)  # (B, s, s)
    places = torch.zeros(len(vectors), k, dtype=torch.long)  # the first is the nearest
    nearest = likeness[:, 0].clone()  # (B, s): to the most alike in the table
    taken = torch.zeros_like(relevance, dtype=torch.bool)
    taken[:, 0] = True
    for i in range(1, k):
        places[:, i] = place = (relevance - nearest).masked_fill(taken, -torch.inf).argmax(1)
        taken[images, place] = True
        nearest = torch.maximum(nearest, likeness[images, place])
    return places


def matching_pursuit(features, vectors, k):
    """Places in the shortlists, int64 (B, k), in the order in which they are chosen, and how many
    of them to take, int64 (B,), at least 1.

    Each next entry is the one nearest to what the weighted sum of those before it leaves of the
    image; all weights are then fitted again. features: (B, dim). vectors: (B, s, dim). k <= s.
    """
    images = torch.arange(len(vectors))
    places = torch.empty(len(vectors), k, dtype=torch.long)
    chosen = vectors.new_zeros(len(vectors), k, vectors.shape[2])  # (B, k, dim)
    weights, explained = vectors.new_zeros(2, len(vectors), k)  # (B, k)
    taken = torch.zeros(vectors.shape[:2], dtype=torch.bool)
    rest = features
    for i in range(k):
        near = (vectors @ rest[:, :, None])[:, :, 0]  # (B, s)
        near, places[:, i] = near.masked_fill(taken, -torch.inf).max(1)
        taken[images, places[:, i]] = True
        chosen[:, i] = vectors[images, places[:, i]]
        weights[:, i] = near.clamp(min=0)
        likeness = chosen @ chosen.mT  # (B, k, k)
        target = (chosen @ features[:, :, None])[:, :, 0]  # (B, k)
        for _ in range(SWEEPS):
            for j in range(i + 1):
                slack = target[:, j] - (likeness[:, j] * weights).sum(1)
                weights[:, j] = (weights[:, j] + slack).clamp(min=0)
        rest = features - (weights[:, None] @ chosen)[:, 0]
        explained[:, i] = 1 - rest.square().sum(1)
    gains = explained.diff(dim=1) / explained[:, -1:].clamp(min=1e-6)  # (B, k - 1)
    return places, 1 + (gains > GAIN).long().cumprod(1).sum(1)


def select(method, features, cosines, vectors, k):
    """The entries of each image's table: B lists of places in its shortlist, at most k.

    method: one of METHODS. features: unit vectors (B, dim). cosines: (B, s), best first. vectors:
    (B, s, dim), those of the shortlists. All are float32, on the CPU.
    """
    k = min(k, cosines.shape[1])
    if method == "topk" or not k:
        return [list(range(k))] * len(cosines)
    if method == "mmr":
        return marginal_relevance(cosines, vectors, k).tolist()
    places, counts = matching_pursuit(features, vectors, k)
    return [row[:count] for row, count in zip(places.tolist(), counts.tolist())]
