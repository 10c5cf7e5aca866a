"""Captions from an encoder-decoder language model: beam search, and samples that share prefixes.

Shapes: B tables of T tokens, V tokens in the vocabulary, R rows of the decoder, D distinct
continuations of these rows.
"""

import copy
from dataclasses import dataclass

import torch

from antarctic.errors import InputError

# ------------------------------------------------------------------------------------------ model

def encode(bart, inputs):
    """The encoder's states, (B, T, dim). inputs: input_ids and attention_mask, int64 (B, T)."""
    return bart.get_encoder()(**inputs).last_hidden_state


def start_tokens(bart, rows):
    """What every caption begins with, int64 (rows, 2): the decoder's start token and <s>."""
    start = [bart.config.decoder_start_token_id, bart.config.bos_token_id]
    return torch.tensor([start] * rows, device=bart.device)


def empty_cache():
    """A cache that next_logits fills with keys and values of self-attention and cross-attention."""
    # stories.py imports this module before its main() imports transformers, which takes seconds.
    from transformers import DynamicCache, EncoderDecoderCache
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def next_logits(bart, tokens, encoded, cache, mask=None):
    """Logits of the token that follows each prefix, float32 (R, V). Raises InputError where they
    are not finite.

    The decoder reads the tokens that the cache lacks, and adds their keys and values to it.
    tokens: int64 (R, length). encoded: the encoder's states, (R, T, dim). mask: int64 (R, T), or
    None where no place is padding.
    """
    output = bart.get_decoder()(
        input_ids=tokens[:, cache.get_seq_length():], encoder_hidden_states=encoded,
        encoder_attention_mask=mask, past_key_values=cache)
    hidden = output.last_hidden_state[:, -1]  # (R, dim)
    weight, bias = bart.lm_head.weight, bart.final_logits_bias[0]  # (V, dim), (V,)
    logits = torch.nn.functional.linear(hidden, weight, bias).float()  # (R, V)
    if not logits.amax(-1).isfinite().all():  # of NaN the maximum is NaN
        raise InputError("the language model computes values that are not finite; its weights are "
                         "damaged, or too large for this --dtype")
    return logits


# ------------------------------------------------------------------------------------ beam search

@torch.inference_mode()
def beam_search(bart, inputs, num_beams, maxlen):
    """Beam search. Returns for each table a list of (likelihood, token ids), best first: at least
    num_beams captions, or one where maxlen is 3.

    inputs: input_ids and attention_mask, int64 (B, T). maxlen: the greatest length of a caption,
    its two start tokens and </s> included. token ids: int64 (length,), without the last </s>.
    likelihood: mean log-probability a token; <s>, and </s> at maxlen, are forced and cost nothing.
    The vocabulary must have 2 * num_beams tokens.

    Captions and stopping are those of generate(early_stopping=False, length_penalty=1), whose
    _beam_search is in
    https://github.com/huggingface/transformers/blob/main/src/transformers/generation/utils.py.
    A table that is done leaves the batch, where generate() computes on until all of them are.
    """
    encoded, mask = encode(bart, inputs), inputs["attention_mask"]  # (B, T, dim), (B, T)
    finished = [[] for _ in range(len(mask))]
    open_tables = list(finished)  # the same lists; rows are the beams of these tables, in order
    tokens, cache = start_tokens(bart, len(mask)), empty_cache()  # (rows, length)
    scores = torch.zeros(len(mask), 1, device=bart.device)  # (tables, beams), log-probabilities
    for length in range(2, maxlen - 1):
        logits = next_logits(bart, tokens, encoded, cache, mask)  # (rows, V)
        # Twice the beams, so that num_beams continuations are left even if as many end.
        scores, parent, token = expand_beams(logits, scores, 2 * num_beams)  # (tables, 2 num_beams)
        ended = token == bart.config.eos_token_id  # (tables, 2 num_beams)
        keep_finished(open_tables, tokens, scores, parent, ended, num_beams)
        scores, best = scores.masked_fill(ended, -torch.inf).topk(num_beams)  # (tables, num_beams)
        likelihoods = (scores[:, 0] / length).tolist()  # of each table's best open beam
        remaining = [i for i, captions in enumerate(open_tables)
                     if not is_done(captions, likelihoods[i], num_beams)]
        if not remaining:
            return finished
        open_tables, scores = [open_tables[i] for i in remaining], scores[remaining]
        parent = parent.gather(1, best)[remaining].flatten()  # (rows,)
        token = token.gather(1, best)[remaining].view(-1, 1)  # (rows, 1)
        tokens = torch.cat((tokens[parent], token), 1)  # (rows, length + 1)
        encoded, mask = reorder_rows(parent, encoded, mask, cache)  # (rows, T, dim), (rows, T)
    end_open_beams(open_tables, tokens, scores, maxlen - 1)
    return finished


def expand_beams(logits, scores, width):
    """The `width` most probable continuations of each table's beams, best first.

    logits: float32 (rows, V). scores: float32 (tables, beams), log-probabilities of the beams.
    Returns (scores, float32; parent, int64, the row that is continued; token, int64), each
    (tables, width).
    """
    tables, beams = scores.shape
    best, token = logits.topk(width)  # (rows, width), for a table's best may all be of one beam
    log_p = best - logits.logsumexp(-1, keepdim=True)  # (rows, width)
    scores = log_p.view(tables, beams, width) + scores[..., None]  # (tables, beams, width)
    scores, place = scores.flatten(1).topk(width)  # (tables, width)
    first_row = torch.arange(tables, device=scores.device)[:, None] * beams  # (tables, 1)
    token = token.view(tables, -1).gather(1, place)  # (tables, width)
    return scores, place // width + first_row, token


def keep_finished(open_tables, tokens, scores, parent, ended, num_beams):
    """Adds the captions that end here to those of their tables, and keeps the best num_beams.

    A caption counts only where it is among the num_beams best continuations of its table.
    open_tables: each one's list of (likelihood, token ids). tokens: int64 (rows, length). scores,
    parent, ended: (tables, 2 num_beams), best first.
    """
    length = tokens.shape[1]
    for table, place in ended[:, :num_beams].nonzero().tolist():
        captions, likelihood = open_tables[table], scores[table, place].item() / length
        captions.append((likelihood, tokens[parent[table, place]]))
        captions.sort(key=best_first)
        del captions[num_beams:]


def end_open_beams(open_tables, tokens, scores, length):
    """Adds the open beams to the captions of their tables, where no token but </s> has room.

    open_tables: each one's list of (likelihood, token ids). tokens: int64 (rows, length). scores:
    float32 (tables, beams).
    """
    for captions, beams, totals in zip(open_tables, tokens.split(scores.shape[1]), scores.tolist()):
        captions += [(score / length, beam) for score, beam in zip(totals, beams)]
        captions.sort(key=best_first)


def best_first(caption):
    """The key that sorts captions, (likelihood, token ids); of equal ones the older comes first."""
    likelihood, _ = caption
    return -likelihood


def is_done(captions, likelihood, num_beams):
    """Whether a table has num_beams captions and its best open beam, of this likelihood, is no
    better than the worst of them. A single beam is done at its first caption."""
    if len(captions) < num_beams:
        return False
    worst, _ = captions[-1]
    return num_beams == 1 or likelihood <= worst


def reorder_rows(parent, encoded, mask, cache):
    """Gives each new row the keys and values of the row that it continues, in place. Returns the
    new rows' encoded, (rows, T, dim), and mask, (rows, T). parent: int64 (rows,)."""
    layers = list(cache.self_attention_cache.layers)
    if len(parent) != len(mask):  # else each row stays in its table, and what it reads stays too
        encoded, mask = encoded[parent], mask[parent]  # (rows, T, dim), (rows, T)
        layers += cache.cross_attention_cache.layers
    for layer in layers:
        layer.keys, layer.values = layer.keys[parent], layer.values[parent]
    return encoded, mask


# --------------------------------------------------------------------------------------- sampling

@dataclass
class Prefixes:
    """Distinct prefixes of one length, one a row, that samples of one table begin with.

    tokens: int64 (R, length). scores: float32 (R,), log-probabilities. counts: int64 (R,), how many
    samples begin so. cache: keys and values of all tokens but the last, at the start of none.
    """
    tokens: torch.Tensor
    scores: torch.Tensor
    counts: torch.Tensor
    cache: object

    def split(self):
        """The first and the second part of the rows."""
        parts = torch.arange(len(self.tokens), device=self.tokens.device).tensor_split(2)
        return [Prefixes(self.tokens[rows], self.scores[rows], self.counts[rows],
                         fork_cache(self.cache, rows)) for rows in parts]


@torch.inference_mode()
def sample_tree(bart, inputs, n, temperature, top_p, maxlen, seed, chunk):
    """n independent samples of one table's caption, each distinct sequence of tokens once. Returns
    a list of (tokens, int64 (D, length); likelihoods, float32 (D,); counts, int64 (D,)), a step of
    the decoder each.

    inputs: input_ids and attention_mask, int64 (1, T). maxlen, likelihoods: as of beam_search; the
    likelihood is before temperature and nucleus. counts: how many of the n samples a sequence is.

    Samples that begin alike share their beginning. A row is a distinct prefix with its count, and
    for each row it is drawn how many samples go on with which token. These counts are multinomial,
    as they are when samples are drawn one after the other. Barrett, Malyshev and Lvovsky sample
    quantum states like this (2021, https://arxiv.org/abs/2109.12606). The encoder runs once and all
    rows read its states. At most `chunk` rows run at a time and the others wait, which bounds the
    memory.
    """
    device, eos = bart.device, bart.config.eos_token_id
    # Draws need doubles, which mps does not have.
    generator = torch.Generator("cpu" if device.type == "mps" else device).manual_seed(seed)
    encoded = encode(bart, inputs)  # (1, T, dim)
    waiting = [Prefixes(start_tokens(bart, 1), torch.zeros(1, device=device),
                        torch.tensor([n], device=device), empty_cache())]
    finished = []
    while waiting:
        prefixes = waiting.pop()
        rows, length = prefixes.tokens.shape
        if rows > chunk:
            waiting += prefixes.split()
            continue
        logits = next_logits(bart, prefixes.tokens, encoded.expand(rows, -1, -1), prefixes.cache)
        log_p = logits.log_softmax(-1)  # (R, V)
        if length < maxlen - 1:
            parent, token, counts = draw(log_p / temperature, top_p, prefixes.counts, generator)
        else:
            parent, token, counts = end_all(prefixes.counts, eos)
        tokens = torch.cat((prefixes.tokens[parent], token[:, None]), 1)  # (D, length + 1)
        scores = prefixes.scores[parent] + log_p[parent, token]  # (D,)
        ended = token == eos  # (D,)
        finished.append((tokens[ended], scores[ended] / length, counts[ended]))
        if not ended.all():
            cache = fork_cache(prefixes.cache, parent[~ended])
            waiting.append(Prefixes(tokens[~ended], scores[~ended], counts[~ended], cache))
    return finished


def end_all(counts, eos):
    """As draw, where every sample ends: (row, token, samples), each int64 (R,)."""
    rows = torch.arange(len(counts), device=counts.device)  # (R,)
    return rows, torch.full_like(counts, eos), counts


def fork_cache(cache, rows):
    """A cache of keys and values of some rows of another, ascending, int64 (R,), each as often as
    it stands there. The encoder's part is of one image, so all of its rows are one and the same,
    and it is a view."""
    new = copy.copy(cache)
    new.self_attention_cache = copy.copy(cache.self_attention_cache)
    new.cross_attention_cache = copy.copy(cache.cross_attention_cache)
    for part in (new.self_attention_cache, new.cross_attention_cache):
        part.layers = [copy.copy(layer) for layer in part.layers]
    for layer in new.self_attention_cache.layers:
        if len(rows) != len(layer.keys) or (rows[1:] == rows[:-1]).any():
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    for layer in new.cross_attention_cache.layers:
        layer.keys = layer.keys[:1].expand(len(rows), -1, -1, -1)  # (R, heads, T, dim / heads)
        layer.values = layer.values[:1].expand(len(rows), -1, -1, -1)
    return new


# ------------------------------------------------------------------------------------------ draws

def draw(log_p, top_p, counts, generator):
    """Of each row's samples, how many go on with which token, drawn from the nucleus by inverting
    its distribution function.

    log_p: (R, V). counts: int64 (R,), samples of each row. Returns int64 (D,) each: row, token,
    samples; distinct, rows ascending.
    """
    p, order = (t.to(generator.device) for t in nucleus(log_p, top_p))  # (R, K), (R, K)
    row = torch.arange(len(p), device=p.device).repeat_interleave(counts.to(p.device))  # (samples,)
    # First the block of 256 tokens, then the token in it: one sum over a large vocabulary, in place
    # of running sums.
    padded = torch.nn.functional.pad(p, (0, -p.shape[1] % 256))
    blocks = padded.unflatten(1, (-1, 256))  # (R, K / 256, 256)
    block = invert(blocks.sum(-1)[row], generator)  # (samples,)
    column = invert(blocks[row, block], generator)  # (samples,)
    place = (row * blocks.shape[1] + block) * 256 + column  # (samples,)
    place, counts = place.unique(return_counts=True)  # (D,), (D,)
    row, token = place // blocks[0].numel(), place % blocks[0].numel()  # (D,), (D,)
    return tuple(t.to(log_p.device) for t in (row, order[row, token], counts))


def invert(p, generator):
    """A column of each row, drawn with the row's probabilities p (S, K), which need not sum to 1.
    Returns int64 (S,)."""
    # A column of no probability has no room between two values.
    reached = p.double().cumsum(-1)  # (S, K)
    uniform = torch.rand(len(p), 1, generator=generator, device=p.device, dtype=torch.double)
    column = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)  # (S, 1)
    return column.clamp(max=p.shape[1] - 1)[:, 0]


def nucleus(log_p, top_p):
    """The most probable tokens of each row that reach top_p together, best first, and as many more,
    of no probability, as the widest row has (Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751).

    log_p: (R, V). Returns (probabilities (R, K), not scaled to sum to 1; tokens int64 (R, K)).
    """
    width = 256  # sorting all of a large vocabulary costs more than the model
    p = log_p.softmax(-1)  # (R, V)
    if top_p >= 1:
        return p, torch.arange(p.shape[1], device=p.device).expand_as(p)
    best, order = p.topk(min(width, p.shape[1]))  # (R, K), (R, K)
    if (best.sum(-1) < top_p).any():
        best, order = p.sort(-1, descending=True)  # (R, V), (R, V)
    before = best.cumsum(-1) - best  # (R, K)
    # The token that crosses the limit counts too.
    return best.masked_fill(before >= top_p, 0), order
