"""Captions from an encoder-decoder language model: beam search, and samples that share prefixes.

Shapes: B tables of T tokens, V tokens in the vocabulary, R rows of the decoder, D distinct
continuations of these rows.
"""

from dataclasses import dataclass

import torch

from antarctic.bart_decoder import Decoder, start_tokens

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
    decoder = Decoder(bart, inputs)
    tables = list(range(len(inputs["input_ids"])))  # those that are open
    finished = [[] for _ in tables]
    tokens, past = start_tokens(bart, len(tables)), decoder.empty_past()  # (rows, length)
    new, rows = tokens, None  # rows are the beams of the open tables, in order
    scores = torch.zeros(len(tables), 1, device=bart.device)  # (tables, beams), log-probabilities
    for length in range(2, maxlen - 1):
        sizes = dict.fromkeys(tables, scores.shape[1])
        logits = decoder.logits(new, past, rows, sizes)  # (rows, V)
        # Twice the beams, so that num_beams continuations are left even if as many end.
        scores, parent, token = expand_beams(logits, scores, 2 * num_beams)  # (tables, 2 num_beams)
        ended = token == bart.config.eos_token_id  # (tables, 2 num_beams)
        open_captions = [finished[table] for table in tables]
        keep_finished(open_captions, tokens, scores, parent, ended, num_beams)
        scores, best = scores.masked_fill(ended, -torch.inf).topk(num_beams)  # (tables, num_beams)
        likelihoods = (scores[:, 0] / length).tolist()  # of each table's best open beam
        remaining = [i for i, captions in enumerate(open_captions)
                     if not is_done(captions, likelihoods[i], num_beams)]
        if not remaining:
            return finished
        tables, scores = [tables[i] for i in remaining], scores[remaining]
        rows = parent.gather(1, best)[remaining].flatten()  # (rows,)
        new = token.gather(1, best)[remaining].view(-1, 1)  # (rows, 1)
        tokens = torch.cat((tokens[rows], new), 1)  # (rows, length + 1)
    end_open_beams([finished[table] for table in tables], tokens, scores, maxlen - 1)
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


# --------------------------------------------------------------------------------------- sampling

@dataclass
class Prefixes:
    """Distinct prefixes of one length, one a row, that samples begin with.

    tables: int64 (R,), the table that each is of, ascending. tokens: int64 (R, length). scores:
    float32 (R,), log-probabilities. counts: int64 (R,), how many samples begin so. past: keys and
    values of all tokens but the last. rows: int64 (R,), each prefix's row in the past, or None
    where it is empty.
    """
    tables: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor
    counts: torch.Tensor
    past: list
    rows: torch.Tensor | None = None

    def split(self):
        """The first and the second half of the rows."""
        columns = self.tables, self.tokens, self.scores, self.counts, self.rows
        halves = zip(*(column.tensor_split(2) for column in columns))
        return [Prefixes(*rest, list(self.past), rows) for *rest, rows in halves]


@torch.inference_mode()
def sample_trees(bart, inputs, n, temperature, top_p, maxlen, seeds, chunk):
    """n independent samples of the caption of each of B tables, each distinct sequence of tokens
    once. Returns for each table a list of (tokens, int64 (D, length); likelihoods, float32 (D,);
    counts, int64 (D,)), a step of the decoder each.

    inputs: input_ids and attention_mask, int64 (B, T). seeds: B numbers; a table's samples depend
    on its own alone. maxlen, likelihoods: as of beam_search; the likelihood is before temperature
    and nucleus. counts: how many of the n samples a sequence is.

    Samples that begin alike share their beginning. A row is a distinct prefix with its count, and
    for each row it is drawn how many samples go on with which token. These counts are multinomial,
    as they are when samples are drawn one after the other. Barrett, Malyshev and Lvovsky sample
    quantum states like this (2021, https://arxiv.org/abs/2109.12606). At most `chunk` rows run at a
    time, which bounds the memory: of so many tables that they cannot have more, or of one table,
    whose other rows wait.
    """
    together, finished = max(1, chunk // n), []
    for start in range(0, len(seeds), together):
        group = slice(start, start + together)
        part = {name: tensor[group] for name, tensor in inputs.items()}
        decoder = Decoder(bart, part)
        finished += sample_group(decoder, n, temperature, top_p, maxlen, seeds[group], chunk)
    return finished


def sample_group(decoder, n, temperature, top_p, maxlen, seeds, chunk):
    """As sample_trees, of the tables of a Decoder, which are so few that n * B is at most chunk, or
    one."""
    bart, finished = decoder.bart, [[] for _ in seeds]
    device, eos = bart.device, bart.config.eos_token_id
    # Draws need doubles, which mps does not have.
    draws_on = "cpu" if device.type == "mps" else device
    generators = [torch.Generator(draws_on).manual_seed(seed) for seed in seeds]
    tables, scores = torch.arange(len(seeds), device=device), torch.zeros(len(seeds), device=device)
    waiting = [Prefixes(tables, start_tokens(bart, len(seeds)), scores, torch.full_like(tables, n),
                        decoder.empty_past())]
    while waiting:
        prefixes = waiting.pop()
        rows, length = prefixes.tokens.shape
        if rows > chunk:
            waiting += prefixes.split()
            continue
        new = prefixes.tokens if prefixes.rows is None else prefixes.tokens[:, -1:]
        sizes = sizes_of(prefixes.tables)
        logits = decoder.logits(new, prefixes.past, prefixes.rows, sizes)
        log_p = logits.log_softmax(-1)  # (R, V)
        if length < maxlen - 1:
            uniform = uniforms(prefixes.counts, sizes, generators)
            parent, token, counts = draw(log_p / temperature, top_p, prefixes.counts, uniform)
        else:
            parent, token, counts = end_all(prefixes.counts, eos)
        tables = prefixes.tables[parent]
        tokens = torch.cat((prefixes.tokens[parent], token[:, None]), 1)  # (D, length + 1)
        scores = prefixes.scores[parent] + log_p[parent, token]  # (D,)
        ended = token == eos  # (D,)
        share(finished, tables[ended], tokens[ended], scores[ended] / length, counts[ended])
        if not ended.all():
            left = (tables, tokens, scores, counts)
            waiting.append(Prefixes(*(column[~ended] for column in left), prefixes.past,
                                    parent[~ended]))
    return finished


def end_all(counts, eos):
    """As draw, where every sample ends: (row, token, samples), each int64 (R,)."""
    rows = torch.arange(len(counts), device=counts.device)  # (R,)
    return rows, torch.full_like(counts, eos), counts


def sizes_of(tables):
    """{table: how many rows are of it}, in ascending order. tables: int64 (R,), ascending."""
    numbers, sizes = tables.unique_consecutive(return_counts=True)
    return dict(zip(numbers.tolist(), sizes.tolist()))


def share(finished, tables, *columns):
    """Adds rows to the lists of their tables. tables: int64 (D,), ascending. columns: (D, ...)."""
    sizes = sizes_of(tables)
    parts = zip(*(column.split(list(sizes.values())) for column in columns))
    for table, part in zip(sizes, parts):
        finished[table].append(part)


# ------------------------------------------------------------------------------------------ draws

def uniforms(counts, sizes, generators):
    """Two random numbers in [0, 1) for each sample, float64 (2, samples).

    counts: int64 (R,), samples of each row. sizes: {table: how many rows are of it}. generators:
    one for each table, whose numbers so do not depend on the other tables.
    """
    samples = [rows.sum().item() for rows in counts.split(list(sizes.values()))]
    drawn = []
    for table, number in zip(sizes, samples):
        options = {"generator": generators[table], "device": generators[table].device}
        drawn.append(torch.stack([torch.rand(number, dtype=torch.double, **options)
                                  for _ in range(2)]))
    return torch.cat(drawn, 1)  # (2, samples)


def draw(log_p, top_p, counts, uniform):
    """Of each row's samples, how many go on with which token, drawn from the nucleus by inverting
    its distribution function.

    log_p: (R, V). counts: int64 (R,), samples of each row. uniform: of uniforms(). Returns int64
    (D,) each: row, token, samples; distinct, rows ascending.
    """
    p, order = (t.to(uniform.device) for t in nucleus(log_p, top_p))  # (R, K), (R, K)
    row = torch.arange(len(p), device=p.device).repeat_interleave(counts.to(p.device))  # (samples,)
    # First the block of 256 tokens, then the token in it: one sum over a large vocabulary, in place
    # of running sums.
    padded = torch.nn.functional.pad(p, (0, -p.shape[1] % 256))
    blocks = padded.unflatten(1, (-1, 256))  # (R, K / 256, 256)
    block = invert(blocks.sum(-1)[row], uniform[0])  # (samples,)
    column = invert(blocks[row, block], uniform[1])  # (samples,)
    place = (row * blocks.shape[1] + block) * 256 + column  # (samples,)
    place, counts = place.unique(return_counts=True)  # (D,), (D,)
    row, token = place // blocks[0].numel(), place % blocks[0].numel()  # (D,), (D,)
    return tuple(t.to(log_p.device) for t in (row, order[row, token], counts))


def invert(p, uniform):
    """The column of each row that a random number falls into. p: (S, K), probabilities, which need
    not sum to 1. uniform: float64 (S,), in [0, 1). Returns int64 (S,)."""
    # A column of no probability has no room between two values.
    reached = p.double().cumsum(-1)  # (S, K)
    column = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)  # (S, 1)
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
