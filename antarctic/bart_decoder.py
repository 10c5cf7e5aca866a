"""BART step by step: an encoder that runs once, and a decoder for many rows of each table.

Transformers' decoder wants the encoder's keys and values once a row. Here the rows of a table share
them: its attention reads a table's rows as if they were the places of one text, which is exact,
since attention to the encoder has no order. So rows of several tables go through one step.

Shapes: B tables of T tokens, R rows of the decoder in the order of their tables, V tokens in the
vocabulary.
"""

from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from antarctic.errors import InputError


def start_tokens(bart, rows):
    """What every caption begins with, int64 (rows, 2): the decoder's start token and <s>."""
    start = [bart.config.decoder_start_token_id, bart.config.bos_token_id]
    return torch.tensor([start] * rows, device=bart.device)


def feed_forward(layer, states):
    return layer.fc2(layer.activation_fn(layer.fc1(states)))


class Decoder:
    """BART's decoder over some tables, whose encoder states are computed here.

    bart: a BartForConditionalGeneration, or mBART's, PLBart's or MVP's. inputs: input_ids and
    attention_mask, int64 (B, T). Raises InputError where an MVP has prompts: vectors beside the
    tokens, which are not read here.
    """

    def __init__(self, bart, inputs):
        if getattr(bart.config, "use_prompt", False):
            raise InputError("the language model is an MVP with prompts (use_prompt), which cannot "
                             "caption; take one without them")
        self.bart, self.decoder = bart, bart.get_decoder()
        self.scale = getattr(self.decoder, "embed_scale", 1)  # others than MVP scale by themselves
        self.norms_first = hasattr(self.decoder, "layer_norm")  # as in mBART
        self.heads = bart.config.decoder_attention_heads
        states = bart.get_encoder()(**inputs).last_hidden_state  # (B, T, dim)
        self.mask = inputs["attention_mask"].bool()[:, None, None]  # (B, 1, 1, T)
        attentions = [layer.encoder_attn for layer in self.decoder.layers]
        self.keys = [self.split(each.k_proj(states)) for each in attentions]  # (B, heads, T, d)
        self.values = [self.split(each.v_proj(states)) for each in attentions]
        self.tables = list(range(len(states)))  # those whose keys and values are left

    def split(self, states):
        """(n, L, dim) as heads, (n, heads, L, d)."""
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def empty_past(self):
        """Keys and values of no token: what logits() reads and fills."""
        return [None] * len(self.decoder.layers)

    def logits(self, tokens, past, rows, sizes):
        """Logits of the token that follows each row, float32 (R, V). Raises InputError where they
        are not finite.

        tokens: int64 (R, L), those of each row that the past lacks; the past is of the same length
        for all. past: keys and values, a list of float tensors (rows before, length, 2, dim), one a
        layer, replaced in place by those of the new rows. rows: int64 (R,), the row before that
        each one continues, or None where the past is empty. sizes: {table: how many rows are of
        it}, the tables ascending.
        """
        self.keep(list(sizes))
        places = self.places_of(list(sizes.values()))
        length = 0 if past[0] is None else past[0].shape[1]
        words = self.decoder.embed_tokens(tokens) * self.scale  # (R, L, dim)
        states = self.decoder.layernorm_embedding(
            words + self.decoder.embed_positions(tokens, length))
        for i, layer in enumerate(self.decoder.layers):
            states = self.add(states, layer.self_attn_layer_norm, partial(
                self.read_tokens, i, past=past, rows=rows))
            states = self.add(states, layer.encoder_attn_layer_norm, partial(
                self.read_tables, i, places=places))
            states = self.add(states, layer.final_layer_norm, partial(feed_forward, layer))
        states = states[:, -1]  # (R, dim)
        if self.norms_first:
            states = self.decoder.layer_norm(states)
        logits = (self.bart.lm_head(states) + self.bart.final_logits_bias).float()  # (R, V)
        if not logits.amax(-1).isfinite().all():  # of NaN the maximum is NaN
            raise InputError("the language model computes values that are not finite; its weights "
                             "are damaged, or too large for this --dtype")
        return logits

    def add(self, states, norm, part):
        """The states (R, L, dim) after a part of a layer, a function of them, is added."""
        if self.norms_first:
            return states + part(norm(states))
        return norm(states + part(states))

    def read_tokens(self, i, states, past, rows):
        """What layer i's attention to each row's own tokens reads, (R, L, dim). past, rows: of
        logits()."""
        own = self.decoder.layers[i].self_attn
        first, new = past[i] is None, torch.stack((own.k_proj(states), own.v_proj(states)), 2)
        past[i] = new if first else torch.cat((past[i][rows], new), 1)  # (R, length + L, 2, dim)
        keys, values = map(self.split, past[i].unbind(2))  # (R, heads, length + L, d) each
        seen = scaled_dot_product_attention(self.split(own.q_proj(states)), keys, values,
                                            is_causal=first)  # (R, heads, L, d)
        return own.out_proj(seen.transpose(1, 2).flatten(2))

    def keep(self, tables):
        """Drops the keys and values of other tables. tables: some of those that are left."""
        if len(tables) < len(self.tables):
            kept = [self.tables.index(table) for table in tables]
            self.keys, self.values = ([each[kept] for each in part]
                                      for part in (self.keys, self.values))
            self.tables, self.mask = tables, self.mask[kept]

    def places_of(self, sizes):
        """(places in all, B times as many as a table has rows at most; the place of each row, int64
        (R,), or None where every place has one). sizes: how many rows each table has."""
        most = max(sizes)
        if min(sizes) == most:
            return most * len(sizes), None
        each = [torch.arange(size) + table * most for table, size in enumerate(sizes)]
        return most * len(sizes), torch.cat(each).to(self.bart.device)

    def read_tables(self, i, states, places):
        """What layer i's attention to the encoder reads for each row, (R, L, dim). places: of
        places_of()."""
        attention = self.decoder.layers[i].encoder_attn
        queries = attention.q_proj(states)  # (R, L, dim)
        (number, place), (_, length, dim) = places, queries.shape
        if place is not None:
            queries = queries.new_zeros(number, length, dim).index_copy(0, place, queries)
        queries = self.split(queries.view(len(self.tables), -1, dim))  # (B, heads, places L, d)
        seen = scaled_dot_product_attention(queries, self.keys[i], self.values[i], self.mask)
        seen = seen.transpose(1, 2).reshape(number, length, dim)
        return attention.out_proj(seen if place is None else seen[place])
