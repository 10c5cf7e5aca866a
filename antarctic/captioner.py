"""BART, which writes captions from tables, and whose layernorms are trained."""

import contextlib

import torch
from transformers import AutoModelForSeq2SeqLM

from antarctic.decoding import beam_search, sample_trees
from antarctic.errors import InputError
from antarctic.model_files import opened_model, telling
from antarctic.packed import can_pack, is_packed, pack


class Captioner:
    """A BART that writes captions from tables.

    name: a hub id or folder. dtype: the arithmetic, torch.float32, torch.bfloat16 by autocast, or
    torch.int8 after pack(); the weights are float32. maxlen_enc, maxlen_dec: tokens of a table and
    of a caption at most. Raises InputError where the model cannot be loaded, or has fewer
    positions.
    """

    def __init__(self, name, device="cpu", dtype=torch.float32, maxlen_enc=128, maxlen_dec=32):
        # On a CPU in bfloat16, a training step with fused attention takes twice as long.
        attention = {"attn_implementation": "eager"} if str(device) == "cpu" else {}
        with opened_model(name, "language model", ("weights", "tokenizer")) as files:
            self.model = files.load_model(AutoModelForSeq2SeqLM, "BART", dtype=torch.float32,
                                          **attention).to(device).eval()
            self.tokenizer = files.load_tokenizer(self.model.config.vocab_size)
            self.identity, self.digests = files.identity(), files.digests
        self.device, self.dtype = torch.device(device), dtype
        self.maxlen_enc, self.maxlen_dec = maxlen_enc, maxlen_dec
        longest = getattr(self.model.config, "max_position_embeddings", maxlen_enc)
        if min(maxlen_enc, maxlen_dec) < 3:
            raise InputError(f"--maxlen_enc {maxlen_enc} and --maxlen_dec {maxlen_dec} must be at "
                             f"least 3: two tokens are no text")
        if max(maxlen_enc, maxlen_dec) > longest:
            raise InputError(f"the language model {name} reads and writes {longest} tokens at "
                             f"most; --maxlen_enc {maxlen_enc} --maxlen_dec {maxlen_dec} ask for "
                             f"more")
        with telling("language model", name):
            self.try_out()

    @torch.inference_mode()
    def try_out(self):
        """Reads and writes a few tokens, since what the model's files say may not go together."""
        table = self.tokenizer(["a b"], truncation=True, max_length=8)["input_ids"]
        self.loss(table, table)
        beam_search(self.model, self.pad(table), num_beams=1, maxlen=5)

    def pack(self):
        """Lays the weights out for captioning on a CPU, and rounds them for int8, once. The model
        cannot be trained or saved after it."""
        if self.device.type == "cpu" and self.dtype != torch.bfloat16 and can_pack(self.dtype):
            pack(self.model, self.dtype)

    def train_only(self, wanted):
        """Freezes all parameters except those with wanted(name): {name: parameter} of these. Raises
        InputError where the weights are packed."""
        if is_packed(self.model):
            raise InputError("the language model has captioned, and so cannot be trained any more; "
                             "load it anew")
        trained = {}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(wanted(name))
            if parameter.requires_grad:
                trained[name] = parameter
        return trained

    def autocast(self):
        if self.dtype != torch.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def computes_bfloat16_on_cpu(self):
        return self.dtype == torch.bfloat16 and self.device.type == "cpu"

    def tokenize(self, texts, max_length):
        """Token ids, a list for each text, cut at max_length."""
        return self.tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]

    def pad(self, rows):
        """B lists of token ids as {input_ids, attention_mask}, each int64 (B, longest)."""
        return self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.device)

    def loss(self, tables, captions):
        """Mean cross-entropy per caption token. tables, captions: B lists of token ids.

        The model shifts the labels itself to get the decoder's input, so training and generation
        start alike.
        """
        batch = self.pad(captions)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)  # (B, caption)
        with self.autocast():
            return self.model(**self.pad(tables), labels=labels).loss

    @torch.inference_mode()
    def beam(self, tables, num_beams=3, num_return_sequences=3):
        """Beam search: for each table a list of (text, likelihood), best first.

        tables: B lists of token ids. likelihood: the mean log-probability per token. The captions
        are those of transformers' generate() with early_stopping=False, see beam_search. Raises
        InputError where the vocabulary has fewer than two tokens a beam.
        """
        if 2 * num_beams > self.model.config.vocab_size:
            raise InputError(f"--num_beams {num_beams} is too wide for a language model of "
                             f"{self.model.config.vocab_size} tokens")
        with self.autocast():
            finished = beam_search(self.model, self.pad(tables), num_beams, self.maxlen_dec)
        return [[(self.decode(ids[None])[0], likelihood)
                 for likelihood, ids in captions[:num_return_sequences]] for captions in finished]

    @torch.inference_mode()
    def sample(self, tables, n, temperature=1.0, top_p=1.0, seeds=None, chunk=None):
        """n independent samples for each table, each distinct sequence of tokens once: B lists of
        (text, likelihood, count), whose counts sum to n.

        tables: B lists of token ids. likelihood: as of beam(), before temperature and nucleus.
        seeds: B numbers (default: 0, 1, ...); a table's samples depend on its own alone. chunk:
        rows of the decoder at a time, which bounds the memory (default: see rows_at_a_time). See
        sample_trees.
        """
        if not tables:
            return []
        seeds = range(len(tables)) if seeds is None else seeds
        with self.autocast():
            finished = sample_trees(self.model, self.pad(tables), n, temperature, top_p,
                                    self.maxlen_dec, list(seeds), chunk or self.rows_at_a_time())
        return [[sample for tokens, likelihoods, counts in steps
                 for sample in zip(self.decode(tokens), likelihoods.tolist(), counts.tolist())]
                for steps in finished]

    def rows_at_a_time(self):
        """256, or on a CPU as many rows as take half a GB: 135 of bart-large. A row has the keys
        and values of its tokens, and four times as many numbers as there are logits."""
        config = self.model.config
        numbers = 2 * config.decoder_layers * config.d_model * self.maxlen_dec
        fitting = (1 << 29) // (4 * (numbers + 4 * config.vocab_size))
        return min(256, max(1, fitting)) if self.device.type == "cpu" else 256

    def decode(self, sequences):
        """Texts of token ids (B, length), without special tokens."""
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
