"""What drawing captions needs that knows no model: the nucleus, draws for many samples, branches of the key/value cache."""

import copy

import torch


def fork_cache(cache, rows):
    """A cache of keys and values of some rows of another, ascending, int64 (R,), each as often as it stands there. The encoder's
    part is of one image, so all of its rows are one and the same, and it is a view."""
    new = copy.copy(cache)
    new.self_attention_cache, new.cross_attention_cache = copy.copy(cache.self_attention_cache), copy.copy(cache.cross_attention_cache)
    for part in (new.self_attention_cache, new.cross_attention_cache):
        part.layers = [copy.copy(layer) for layer in part.layers]
    for layer in new.self_attention_cache.layers:
        if len(rows) != len(layer.keys) or (rows[1:] == rows[:-1]).any():
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    for layer in new.cross_attention_cache.layers:
        layer.keys, layer.values = (t[:1].expand(len(rows), -1, -1, -1) for t in (layer.keys, layer.values))
    return new


def draw(log_p, top_p, counts, generator):
    """Of each row's samples, how many go on with which token, drawn from the nucleus by inverting its distribution function.

    log_p: (R, V). counts: int64 (R,), samples of each row. Returns int64 (D,) each: row, token, samples; distinct, rows ascending.
    """
    p, order = (t.to(generator.device) for t in nucleus(log_p, top_p))  # (R, K), (R, K)
    row = torch.arange(len(p), device=p.device).repeat_interleave(counts.to(p.device))  # (samples,)
    # First the block of 256 tokens, then the token in it: one sum over a large vocabulary, in place of running sums.
    blocks = torch.nn.functional.pad(p, (0, -p.shape[1] % 256)).unflatten(1, (-1, 256))  # (R, K / 256, 256)
    block = invert(blocks.sum(-1)[row], generator)  # (samples,)
    place = (row * blocks.shape[1] + block) * 256 + invert(blocks[row, block], generator)
    place, counts = place.unique(return_counts=True)
    row, token = place // blocks[0].numel(), place % blocks[0].numel()
    return tuple(t.to(log_p.device) for t in (row, order[row, token], counts))


def invert(p, generator):
    """A column of each row, drawn with the row's probabilities p (S, K), which need not sum to 1. Returns int64 (S,)."""
    reached = p.double().cumsum(-1)  # a column of no probability has no room between two values
    uniform = torch.rand(len(p), 1, generator=generator, device=p.device, dtype=torch.double)
    return torch.searchsorted(reached, uniform * reached[:, -1:], right=True).clamp(max=p.shape[1] - 1)[:, 0]


def nucleus(log_p, top_p):
    """The most probable tokens of each row that reach top_p together, best first, and as many more, of no probability, as the
    widest row has (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751).

    log_p: (R, V). Returns (probabilities (R, K), not scaled to sum to 1; tokens int64 (R, K)).
    """
    p, width = log_p.softmax(-1), 256  # sorting all of a large vocabulary costs more than the model
    if top_p >= 1:
        return p, torch.arange(p.shape[1], device=p.device).expand_as(p)
    best, order = p.topk(min(width, p.shape[1]))
    if (best.sum(-1) < top_p).any():
        best, order = p.sort(-1, descending=True)
    before = best.cumsum(-1) - best
    return best.masked_fill(before >= top_p, 0), order  # the token that crosses the limit still counts
