"""Which entries form a table: the nearest ones, or some of them that say different things.

The nearest entries of a large cache say one thing in many ways ("sandy beach | beach | the beach"),
and captions leave out what no entry says. Source of "mmr": maximal marginal relevance (Carbonell
and Goldstein 1998, https://doi.org/10.1145/290941.291025).
"""

METHODS = "topk", "mmr"
SHARE, MOST = 17, 1000  # a shortlist is the nearest 17th of the entries, but no more than so many
RELEVANCE = 0.5  # the weight of an entry's cosine beside its likeness to those in the table
SAMPLE = 32  # entries of a shortlist whose likeness to all tells how much that varies


def shortlist_size(method, entries, k):
    """How many of so many entries a table of k is chosen from. With fewer, it says one thing; with
    more, it says what is not in the image."""
    if method == "topk":
        return k
    return min(entries, max(k, min(entries // SHARE, MOST)))


def marginal_relevance(cosines, vectors, k):
    """Places in a shortlist, a list of k, in the order in which they are chosen: each is near to
    the image and unlike those before it. Cosines to the image and among entries count in units of
    their deviations.

    cosines: float32 (s,), best first. vectors: unit vectors, float32 (s, dim). k <= s.
    """
    import torch

    spread = (vectors[::-(-len(vectors) // SAMPLE)] @ vectors.T).std(correction=0)
    relevance = RELEVANCE * cosines / cosines.std(correction=0).clamp(min=1e-6)  # (s,)
    weight = (1 - RELEVANCE) / spread.clamp(min=1e-6)
    places = [0]
    nearest = vectors @ vectors[0]  # (s,): cosine to the most alike in the table
    while len(places) < k:
        worth = relevance - weight * nearest
        worth[places] = -torch.inf
        places.append(worth.argmax().item())
        nearest = torch.maximum(nearest, vectors @ vectors[places[-1]])
    return places


def choose_entries(method, embeddings, cosines, indices, k):
    """The rows of each image's table: n lists of (index into the cache, cosine), at most k.

    method: one of METHODS. cosines, indices: (n, s), of shortlists, best first. embeddings: the
    cache's, which are read at these rows.
    """
    import torch

    k, tables = min(k, indices.shape[1]), []
    for near, rows in zip(cosines, indices):
        places = slice(k)
        if method == "mmr" and k:
            order = rows.argsort()  # embeddings are read in the order of the file
            vectors = torch.empty(len(rows), embeddings[:1].shape[1])  # (s, dim)
            vectors[order] = embeddings.only(rows[order].tolist())[:]
            places = marginal_relevance(near, vectors, k)
        tables.append(list(zip(rows[places].tolist(), near[places].tolist())))
    return tables
