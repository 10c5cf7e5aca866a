"""The method as objects: Clip (images and texts to unit vectors), Captioner (BART: table to
caption) and Model, which composes them: image, table, candidates, CLIP's choice."""

import contextlib
from dataclasses import replace
from functools import partial
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

import torch
from PIL.Image import Image
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoModelForSeq2SeqLM
from transformers.utils import logging

from antarctic.cache import (
    Embeddings,
    cache_description,
    read_cache,
    restrict,
    search,
    to_bfloat16,
    whole_words,
)
from antarctic.checkpoints import checkpoint_settings, load_checkpoint
from antarctic.decoding import beam_search, sample_tree
from antarctic.errors import InputError
from antarctic.files import existing_file, one_line
from antarctic.images import read_image
from antarctic.index import open_index
from antarctic.openai_clip import load_openai_clip
from antarctic.preprocessing import openai_preprocessor
from antarctic.pretrained import CLIP_NAMES, fetch, identity, load, load_tokenizer
from utils import (
    MAXLEN_DEC,
    MAXLEN_ENC,
    TOPK,
    Decoding,
    choose_cache,
    choose_checkpoint,
    choose_device,
    choose_dtype,
    linearize,
    seed_of,
)

MANY = 4096  # images for whose tables a bfloat16 copy of the embeddings pays

logging.disable_progress_bar()
logging.set_verbosity_error()

# --------------------------------------------------------------------------------------------- CLIP

class Clip:
    """A frozen CLIP, SigLIP or SigLIP 2 with its preprocessing.

    name: one of CLIP_NAMES, a hub id, a folder, or a .pt file of OpenAI's. identity: the stamp of
    caches made with it. dim: of its vectors. dtype: of weights and arithmetic; in torch.bfloat16
    the vectors have cosines above .999 with float32's. Raises InputError where it cannot be loaded.
    """

    def __init__(self, name, device="cpu", dtype=torch.float32):
        name = CLIP_NAMES.get(name, name)
        what = "CLIP model"
        if Path(name).is_file():
            model, self.tokenizer, self.processor = load_openai_clip(name)
        else:
            fetch(
                name, what,
                ("weights", "tokenizer", "processor"))  # all at once, so that its size is told once
            model = load(AutoModel, name, what, dtype=torch.float32)
            if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
                raise InputError(
                    f"the CLIP model {name} has no image and text features: it is no CLIP")
            self.tokenizer = load_tokenizer(name, what)
            # Where torchvision is installed, transformers would resize with it, to other pixels.
            processor = load(AutoImageProcessor, name, what, backend="pil")
            self.processor = openai_preprocessor(processor)
        self.model = model.to(device, dtype).eval().requires_grad_(False)
        self.identity, self.device, self.dtype = identity(name), device, dtype
        config = self.model.config
        self.max_length = config.text_config.max_position_embeddings
        # SigLIP was trained on lower-cased texts, padded to full length without a mask, and is read
        # at the last place.
        self.siglip = config.model_type.startswith("siglip")
        self.padding = dict(padding="max_length", max_length=self.max_length,
                            return_attention_mask=False) if self.siglip else {}
        self.dim = config.text_config.projection_size if self.siglip else config.projection_dim

    @torch.inference_mode()
    def encode_images(self, images):
        """images: PIL images (RGB). Returns unit vectors, float32 (len(images), dim), on the
        CPU."""
        batch = self.processor(images=images,
                               return_tensors="pt")  # pixel_values (B, 3, H, W); NaFlex: more
        return unit(self.model.get_image_features(**batch.to(self.device, self.dtype)))

    @torch.inference_mode()
    def encode_texts(self, texts, batch_size=128, progress=None):
        """Returns unit vectors, float32 (len(texts), dim), on the CPU, in the order of texts.

        Texts are sorted by length and each batch is trimmed to its longest. That is exact: the text
        tower is causal and is read at the end token, so padding behind it changes nothing. Not so
        SigLIP's, which gets its full length.
        """
        texts = [text.lower() if self.siglip else text for text in texts]
        if not texts:
            return torch.empty(0, self.dim)
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        vectors = torch.empty(len(tokens), self.dim)
        for start in tqdm(range(0, len(order), batch_size), progress, disable=progress is None,
                          unit="batch"):
            rows = order[start:start + batch_size]
            batch = self.tokenizer.pad({"input_ids": [tokens[i] for i in rows]},
                                       return_tensors="pt", **self.padding)
            vectors[rows] = unit(self.model.get_text_features(**batch.to(self.device)))
        return vectors


def unit(output):
    """Features of transformers 4 (a tensor) or 5 (an object) as float32 unit vectors (B, dim) on
    the CPU."""
    features = output if torch.is_tensor(output) else output.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


# ---------------------------------------------------------------------------------------- captioner



class Captioner:
    """A sequence-to-sequence language model that writes captions from tables.

    name: a hub id or folder of a BART. dtype: of the arithmetic (torch.float32, or torch.bfloat16
    by autocast); the weights are float32.
    """

    def __init__(self, name, device="cpu", dtype=torch.float32, maxlen_enc=MAXLEN_ENC,
                 maxlen_dec=MAXLEN_DEC):
        # On a CPU in bfloat16 a training step with the fused attention takes twice as long as with
        # the plain one.
        attention = {"attn_implementation": "eager"} if str(device) == "cpu" else {}
        fetch(name, "language model", ("weights", "tokenizer"))
        self.model = load(AutoModelForSeq2SeqLM, name, "language model", dtype=torch.float32,
                          **attention).to(device).eval()
        self.tokenizer = load_tokenizer(name, "language model")
        self.identity, self.device, self.dtype = identity(name), torch.device(device), dtype
        self.maxlen_enc, self.maxlen_dec = maxlen_enc, maxlen_dec
        longest = getattr(self.model.config, "max_position_embeddings", maxlen_enc)
        if min(maxlen_enc, maxlen_dec) < 3:
            raise InputError(
                f"--maxlen_enc {maxlen_enc} and --maxlen_dec {maxlen_dec} must be at least 3: two "
                "tokens are no text"
            )
        if max(maxlen_enc, maxlen_dec) > longest:
            raise InputError(
                f"the language model {name} reads and writes {longest} tokens at most; "
                f"--maxlen_enc {maxlen_enc} --maxlen_dec {maxlen_dec} ask for more")

    def train_only(self, wanted):
        """Freezes all parameters but those whose name wanted(name) picks. Returns {name: parameter}
        of the trained."""
        trained = {}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(wanted(name))
            if parameter.requires_grad:
                trained[name] = parameter
        return trained

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def computes_bfloat16_on_cpu(self):
        return self.dtype == torch.bfloat16 and self.device.type == "cpu"

    def tokenize(self, texts, max_length):
        """Token ids, a list for each text, cut at max_length."""
        return self.tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]

    def pad(self, rows):
        """Lists of token ids to {input_ids, attention_mask}, each int64 (B, longest)."""
        return self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.device)

    def loss(self, tables, captions):
        """Mean cross-entropy a caption token. tables, captions: lists of token ids, one pair an
        image.

        The decoder's input is the model's own shift of the labels, so that training and generation
        start alike.
        """
        labels = self.pad(captions)
        labels = labels["input_ids"].masked_fill(labels["attention_mask"] == 0,
                                                 -100)  # (B, caption)
        with self.autocast():
            return self.model(**self.pad(tables), labels=labels).loss

    @torch.inference_mode()
    def beam(self, tables, num_beams=3, num_return_sequences=3):
        """Beam search. tables: lists of token ids. Returns for each table a list of (text,
        likelihood), best first.

        likelihood: mean log-probability a token; <s>, and </s> at the greatest length, are forced
        and cost nothing. The captions are those of transformers' generate() with
        early_stopping=False: a table is done when it has num_beams captions and no open beam is
        more likely a token than the worst of them; a single beam is done at its first caption. A
        table that is done leaves the batch, where generate() computes on until all of them are.
        Raises InputError where the vocabulary is smaller than two tokens a beam.
        """
        if 2 * num_beams > self.model.config.vocab_size:
            raise InputError(f"--num_beams {num_beams} is too wide for a language model of "
                             f"{self.model.config.vocab_size} tokens")
        with self.autocast():
            finished = beam_search(self.model, self.pad(tables), num_beams, self.maxlen_dec)
        return [[(self.decode(ids[None])[0], likelihood)
                 for likelihood, ids in captions[:num_return_sequences]] for captions in finished]

    @torch.inference_mode()
    def sample(self, table, n, temperature=1.0, top_p=1.0, seed=0, chunk=256):
        """n independent samples of one image's caption: a list of (text, likelihood, how many of
        the n it is), each sequence of tokens once.

        table: token ids. The likelihood is the model's own, as beam gives it, before temperature
        and nucleus. The same seed gives the same samples. Samples that begin alike share their
        beginning; chunk: rows of the decoder at a time, which bounds the memory, see sample_tree.
        """
        with self.autocast():
            finished = sample_tree(self.model, self.pad([table]), n, temperature, top_p,
                                   self.maxlen_dec, seed, chunk)
        return [sample for tokens, likelihoods, counts in finished
                for sample in zip(self.decode(tokens), likelihoods.tolist(), counts.tolist())]

    def decode(self, sequences):
        """Texts of token ids (B, length), without special tokens."""
        return [
            " ".join(text.split())
            for text in self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        ]


def rescore(clip, features, candidates):
    """CLIP's cosine of each candidate with its image; a text that comes several times is encoded
    once.

    features: (B, dim) unit vectors. candidates: B lists of texts. Returns B lists of floats.
    """
    distinct = list(dict.fromkeys(text for texts in candidates for text in texts))
    vectors = clip.encode_texts(distinct)
    place = {text: row for row, text in enumerate(distinct)}
    return [(vectors[[place[t] for t in texts]] @ image).tolist() if texts else []
            for image, texts in zip(features, candidates)]


# ------------------------------------------------------------------------------------ the method

class Caption(NamedTuple):
    """An image's caption with all that it came from. Cosines and likelihoods have 5 digits."""

    caption: str  # "" where every candidate held a banned word
    score: float  # CLIP's cosine of caption and image
    table: list  # (entry, cosine) of the topk, best first
    candidates: list  # (text, cosine, likelihood: mean log-probability a token), best first


class Model:
    """The method: a frozen CLIP, a cache of entries, and BART, of which the layernorms are trained.

    An image becomes a caption in four steps, which caption() takes one after the other:

        features = model.features(images)         float32 (n, dim): CLIP's unit vectors
        tables = model.tables(features)           the topk entries nearest to each image, best first
        candidates = model.candidates(tables)     BART writes captions from the linearized tables
        captions = model.choose(features, tables, candidates)    CLIP rescores them: the best wins

    The vocabulary is the cache: add_words() lays new entries over it, with no training.
    Attributes: clip, a Clip; captioner, a Captioner; entries, a list of N texts; embeddings, their
    unit vectors (N, dim), an Embeddings; topk; decoding, a utils.Decoding.
    """

    def __init__(self, clip, captioner, entries, embeddings, topk=TOPK, decoding=None,
                 banned=None, prefix="", search=search):
        """banned: a pattern of texts that no caption may hold, or None. prefix: what stands before
        an entry when CLIP encodes it. search: cache.search, or Index.search."""
        self.clip, self.captioner = clip, captioner
        self.entries, self.embeddings, self.search = entries, embeddings, search
        self.topk, self.decoding, self.banned, self.prefix = topk, decoding or Decoding(
        ), banned, prefix

    @classmethod
    def load(cls, clip_model="ViT-B/16", lm="facebook/bart-large", ckpt=None, textfile=None,
             embfile=None, index=None, only=None, ban=None, topk=None, maxlen_enc=None,
             maxlen_dec=None, device="auto", dtype="auto", **decoding):
        """A Model by the sampler's flags, which have the same names, meanings and defaults here.

        textfile, embfile: lists of paths. ckpt: "none" for BART as pretrained. only, ban: lists of
        words. topk, maxlen_enc, maxlen_dec: where they are None, the checkpoint's. decoding: the
        fields of utils.Decoding. Raises InputError where a file is missing or does not fit.
        """
        decoding = Decoding(**decoding)
        textfile, embfile = choose_cache(textfile, embfile, isfile)
        ckpt = choose_checkpoint(ckpt, isfile)
        device = choose_device(device)
        settings = {"topk": TOPK, "maxlen_enc": MAXLEN_ENC, "maxlen_dec": MAXLEN_DEC}
        if ckpt:  # it knows the table and the lengths that it was trained with
            settings = checkpoint_settings(existing_file(ckpt, "checkpoint"))
        topk, maxlen_enc = topk or settings["topk"], maxlen_enc or settings["maxlen_enc"]
        maxlen_dec = maxlen_dec or settings["maxlen_dec"]

        clip = Clip(clip_model, device)
        entries, embeddings = read_cache(textfile, embfile, clip.identity, clip.dim)
        banned = whole_words(ban) if ban else None
        if only or banned:
            entries, embeddings = restrict(entries, embeddings, only, banned)
        index_search = open_index(index, embeddings).search if index else search
        captioner = Captioner(lm, device, choose_dtype(dtype, device), maxlen_enc, maxlen_dec)
        if ckpt:
            load_checkpoint(ckpt, captioner)
        prefix = (cache_description(embfile[0]) or {"prefix": ""})["prefix"]
        return cls(clip, captioner, entries, embeddings, topk, decoding, banned, prefix,
                   index_search)

    def __str__(self):
        dtype = str(self.captioner.dtype).removeprefix("torch.")
        return f"{self.captioner.identity} on {self.captioner.device}, {dtype}"

    def add_words(self, words):
        """Lays entries over the cache, in memory alone. Returns those that were not there before.

        words: texts, such as ["Geoff Hinton"]. They are encoded by CLIP with the cache's prefix.
        Raises InputError where a word is banned, or longer than an entry may be.
        """
        words = dict.fromkeys(one_line(word, "add_words") for word in words)
        if banned := [word for word in words if self.banned and self.banned.search(word)]:
            raise InputError(f'"{banned[0]}" is banned')
        known = set(self.entries)
        words = [word for word in words if word and word not in known]
        if words:
            vectors = self.clip.encode_texts([self.prefix + word for word in words])  # (words, dim)
            self.entries = self.entries + words
            self.embeddings = Embeddings([*self.embeddings.parts, vectors])
        return words

    def features(self, images):
        """CLIP's unit vectors, float32 (n, dim). images: n paths or PIL images, read at once.

        Raises InputError where a file is no image that can be read.
        """
        pictures = []
        for image in images:
            try:
                pictures.append(
                    image.convert("RGB") if isinstance(image, Image) else read_image(image))
            except OSError as error:
                raise InputError(
                    f"cannot read the image {image} ({error.strerror or error})") from error
        return self.clip.encode_images(pictures) if pictures else torch.empty(0, self.clip.dim)

    def tables(self, features):
        """The topk entries nearest to each image, best first: n lists of (entry, cosine).

        features: (n, dim), unit vectors.
        """
        find = self.search
        if len(features) >= MANY and find is search and self.captioner.computes_bfloat16_on_cpu():
            find = partial(search, half=to_bfloat16(
                self.embeddings))  # the same tables, in half the time
        tables = []
        for rows in features.split(256):
            scores, indices = find(rows, self.embeddings, self.topk)  # (256, k), (256, k)
            tables += [[(self.entries[i], score) for i, score in zip(*row)]
                       for row in zip(indices.tolist(), scores.tolist())]
        return tables

    def tokenize(self, tables):
        """Token ids of each linearized table, cut at maxlen_enc: n lists. tables: as tables()
        returns them."""
        texts = [linearize(entry for entry, _ in table) for table in tables]
        tokens = []
        for start in range(0, len(texts), 256):  # all at once, a tokenizer takes 10 kB for each
            tokens += self.captioner.tokenize(texts[start:start + 256], self.captioner.maxlen_enc)
        return tokens

    def candidates(self, tables, ids=None, **changes):
        """The captions that BART writes for each table: n dicts {text: likelihood}, which is the
        mean log-probability a token.

        tables: n lists of (entry, cosine). ids: what seeds each image's samples beside the seed, so
        that they do not depend on its neighbours (default: its place). changes: of self.decoding.
        """
        decoding = replace(self.decoding, **changes)
        seeds = [
            seed_of(decoding.seed, name) for name in (range(len(tables)) if ids is None else ids)
        ]
        tokens = self.tokenize(tables)
        n = decoding.num_return_sequences
        if decoding.do_sample:
            dials = n, decoding.temperature, decoding.top_p
            drafts = [
                self.captioner.sample(table, *dials, seed) for table, seed in zip(tokens, seeds)
            ]
        else:
            drafts = self.captioner.beam(tokens, decoding.num_beams, n) if tokens else []
        if self.banned:
            drafts = [self.without_banned(*each) for each in zip(drafts, tokens, seeds)]
        candidates = []
        for draft in drafts:  # of a text that two token sequences spell, the likelier one counts
            by_likelihood = sorted(draft, key=lambda candidate: candidate[1])
            candidates.append({text: likelihood for text, likelihood, *_ in by_likelihood})
        return candidates

    def without_banned(self, candidates, table, seed, attempts=9):
        """The candidates without a banned word; where none is left, samples without one."""
        for attempt in range(attempts + 1):
            if attempt:
                candidates = self.captioner.sample(table, 100, seed=seed + attempt)
            if clean := [each for each in candidates if not self.banned.search(each[0])]:
                return clean
        return []

    def choose(self, features, tables, candidates, **changes):
        """CLIP's choice among the candidates of each image: n Captions.

        features: (n, dim). tables, candidates: as tables() and candidates() return them. changes:
        of self.decoding, whose lm_weight lets BART's likelihood count, too.
        """
        weight = replace(self.decoding, **changes).lm_weight
        captions = []
        for table, texts, cosines in zip(tables, candidates, rescore(self.clip, features,
                                                                     candidates)):
            ranked = [(text, round(cosine, 5), round(likelihood, 5))
                      for (text, likelihood), cosine in zip(texts.items(), cosines)]
            # CLIP cannot tell some apart: then the likelier one.
            ranked.sort(key=lambda each: (-each[1] - weight * each[2], -each[2]))
            text, score = ranked[0][:2] if ranked else ("", 0.0)
            captions.append(Caption(text, score, [(e, round(c, 5)) for e, c in table], ranked))
        return captions

    def caption(self, images, ids=None, batch_size=16, **changes):
        """A Caption of each image: the four steps. images: n paths or PIL images.

        ids: see candidates(); by default paths are their own, as in the sampler. changes: of
        self.decoding, such as do_sample=True, num_return_sequences=100.
        """
        images = list(images)
        ids = ids or [
            place if isinstance(image, Image) else image for place, image in enumerate(images)
        ]
        captions = []
        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            features = self.features(images[batch])  # (B, dim)
            tables = self.tables(features)
            candidates = self.candidates(tables, ids[batch], **changes)
            captions += self.choose(features, tables, candidates, **changes)
        return captions
