"""Which entries form a table: the nearest ones, or some of them that say different things.

The nearest entries of a large cache say one thing in many ways ("sandy beach | beach | the beach"),
and captions leave out what no entry says. Source of "mmr": maximal marginal relevance (Carbonell
and Goldstein 1998, https://doi.org/10.1145/290941.291025).
"""

METHODS = "topk", "mmr"
SHARE, MOST = 17, 1000  # a shortlist is the nearest 17th of the entries, but no more than so many
RELEVANCE = 0.5  # the weight of an entry's cosine beside its likeness to those in the table
SAMPLE = 32  # entries of a shortlist whose likeness to all tells how much that varies
MOST_NUMBERS = 1 << 25  # of a cache that is read whole for many images: 128 MB


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
    places, relevance[0] = [0], -torch.inf  # of what is in the table
    nearest = vectors @ vectors[0]  # (s,): cosine to the most alike in the table
    while len(places) < k:
        place = (relevance - weight * nearest).argmax().item()
        places.append(place)
        relevance[place] = -torch.inf
        nearest = torch.maximum(nearest, vectors @ vectors[place])
    return places


def choose_entries(method, embeddings, cosines, indices, k):
    """The rows of each image's table: n lists of (index into the cache, cosine), at most k.

    method: one of METHODS. cosines, indices: (n, s), of shortlists, best first. embeddings: the
    cache's, which are read at these rows.
    """
    k, tables, whole = min(k, indices.shape[1]), [], None
    if method == "mmr" and len(embeddings) <= indices.numel():
        if len(embeddings) * embeddings[:1].shape[1] <= MOST_NUMBERS:
            whole = embeddings[:]  # sooner than row by row for each image
    for near, rows in zip(cosines, indices):
        places = slice(k)
        if method == "mmr" and k:
            vectors = read_rows(embeddings, rows) if whole is None else whole.index_select(0, rows)
            places = marginal_relevance(near, vectors, k)
        tables.append(list(zip(rows[places].tolist(), near[places].tolist())))
    return tables


def read_rows(embeddings, rows):
    """Rows of Embeddings, float32 (s, dim), read in the order of the file. rows: (s,)."""
    import torch

    order = rows.argsort()
    vectors = torch.empty(len(rows), embeddings[:1].shape[1])
    vectors[order] = embeddings.only(rows[order].tolist())[:]
    return vectors
