"""The method: Model composes a frozen CLIP, a cache of entries and a BART.

An image becomes a table, the table candidates, and CLIP chooses the caption.
"""

from copy import copy
from dataclasses import replace
from functools import partial
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL.Image import Image

from antarctic.cache import Embeddings, read_cache, search, to_bfloat16
from antarctic.cache_files import is_cache_file
from antarctic.captioner import Captioner
from antarctic.checkpoints import checkpoint_settings, load_checkpoint, warn_of_settings
from antarctic.clip import Clip
from antarctic.errors import InputError
from antarctic.evidence import repeats
from antarctic.files import existing_file, file_sha256
from antarctic.images import read_image, read_opened
from antarctic.index import open_indexes
from antarctic.insertions import insertions
from antarctic.selection import METHODS, choose_entries, shortlist_size
from antarctic.taught import Taught, checked_thing
from antarctic.taught_files import joined, read_taught, unit
from antarctic.texts import one_line, read_words
from antarctic.verdicts import judge, notes_with, pupil_of
from antarctic.words import WholeWords, fold, restrict, warn_of_entries, warn_of_long_entries
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

MANY = 4096  # images whose tables are worth a bfloat16 copy of the embeddings


def as_list(values):
    """A list of values; None stays None. A text, a path or an image is one value."""
    if values is None or isinstance(values, list | torch.Tensor):
        return values
    return [values] if isinstance(values, str | Path | Image) else list(values)


def likeliest(samples):
    """{text: likelihood} of (text, likelihood, ...) tuples. Two token sequences can spell one text:
    the likelier one counts."""
    ascending = sorted(samples, key=lambda sample: sample[1])
    return {text: likelihood for text, likelihood, *_ in ascending}


def rescore(clip, features, candidates):
    """CLIP's cosine of each candidate with its image: B lists of floats.

    features: (B, dim), unit vectors. candidates: B lists of texts; equal ones are encoded once.
    """
    distinct = list(dict.fromkeys(text for texts in candidates for text in texts))
    vectors = clip.encode_texts(distinct)  # (distinct, dim)
    row_of = {text: row for row, text in enumerate(distinct)}
    cosines = []
    for image, texts in zip(features, candidates):
        rows = torch.tensor([row_of[text] for text in texts], dtype=torch.long)
        cosines.append((vectors[rows] @ image).tolist())
    return cosines


# --------------------------------------------------------------------------------------- the method

class Caption(NamedTuple):
    """An image's caption with all that it came from. Cosines and likelihoods have 5 digits."""

    caption: str  # "" where every candidate held a banned word
    score: float  # CLIP's cosine of caption and image; of a taught name more, see Model.scores
    table: list  # (entry, cosine) of the topk, as they were chosen, nearest first
    candidates: list  # (text, cosine, likelihood), best first


class Model:
    """The method: a frozen CLIP, a cache of entries, and BART, of which the layernorms are trained.

    An image becomes a caption in four steps, and caption() takes all four:

        features = model.features(images)       # float32 (n, dim): CLIP's unit vectors
        tables = model.tables(features)         # n lists: of the entries, the topk chosen
        candidates = model.candidates(tables)   # n dicts: what BART writes from each table
        captions = model.choose(features, tables, candidates)   # n Captions: CLIP's choice

    The vocabulary is the cache: add_words() lays new entries over it, with no training.
    Attributes: clip, a Clip; captioner, a Captioner; entries, a list of N texts; embeddings, their
    unit vectors (N, dim), an Embeddings; topk; decoding, a utils.Decoding.
    """

    def __init__(self, clip, captioner, entries, embeddings, topk=TOPK, decoding=None,
                 banned=None, prefix="", search=search, table="topk", taught=None):
        """banned: a WholeWords that no caption may hold, or None. prefix: the text before each
        entry when CLIP encodes it. search: cache.search, or an Indexes. table: one of
        selection.METHODS. taught: a Taught of this cache and topk, or None."""
        self.clip, self.captioner = clip, captioner
        self.entries, self.embeddings, self.search = entries, embeddings, search
        self.topk, self.table, self.decoding = topk, table, decoding or Decoding()
        self.banned, self.prefix = banned, prefix
        self.taught = taught or Taught().fitted(embeddings, topk)

    @classmethod
    def load(cls, clip_model="ViT-B/16", lm="facebook/bart-large", ckpt=None, textfile=None,
             embfile=None, index=None, only=None, ban=None, topk=None, maxlen_enc=None,
             maxlen_dec=None, device="auto", dtype="auto", table=None, **decoding):
        """Loads a Model. The arguments are the sampler's flags, with the same defaults.

        textfile, embfile, index: a path, or a list of paths. ckpt: "none" for BART as pretrained.
        only, ban: the path of a file, as the flags, or a list of words. topk, maxlen_enc,
        maxlen_dec: None takes the checkpoint's. decoding: the fields of utils.Decoding. Raises
        InputError where a setting cannot work, or a file is missing or does not fit the others.
        """
        decoding = Decoding(**decoding)
        for name, size in (("topk", topk), ("maxlen_enc", maxlen_enc), ("maxlen_dec", maxlen_dec)):
            if size is not None and size < 1:
                raise InputError(f"{name} must be at least 1, not {size}")
        if table not in (None, *METHODS):
            raise InputError(f"table must be one of {', '.join(METHODS)}, not {table!r:.100}")
        only, ban = (read_words(words) if isinstance(words, str | Path) else words
                     for words in (only, ban))
        textfile, embfile = choose_cache(as_list(textfile), as_list(embfile), is_cache_file)
        ckpt = choose_checkpoint(ckpt, isfile)
        device = choose_device(device)
        settings = {"topk": topk or TOPK, "maxlen_enc": MAXLEN_ENC, "maxlen_dec": MAXLEN_DEC,
                    "table": table or "topk"}
        if ckpt:  # it holds the sizes of the tables and texts that it was trained with
            settings = checkpoint_settings(existing_file(ckpt, "checkpoint"))
        table = table or settings.get("table", "topk")
        topk, maxlen_enc = topk or settings["topk"], maxlen_enc or settings["maxlen_enc"]
        maxlen_dec = maxlen_dec or settings["maxlen_dec"]

        dtype = choose_dtype(dtype, device)
        # A GPU is not kept waiting by CLIP, and its tables stay those of float32.
        encodes = device.type == "cpu" and dtype.is_floating_point
        clip = Clip(clip_model, device, image_dtype=dtype if encodes else None)
        entries, embeddings = read_cache(textfile, embfile, clip.identity, clip.dim)
        banned = WholeWords(ban) if ban else None
        taught = Taught(joined([read_taught(path, clip.identity, clip.dim) for path in embfile]))
        if only or banned:
            entries, embeddings = restrict(entries, embeddings, taught.entries_among(only), banned)
        taught = taught.fitted(embeddings, topk, only, banned)
        warn_of_settings(settings, clip.identity, topk, table, len(entries))
        index_search = open_indexes(as_list(index), embeddings) if index else search
        captioner = Captioner(lm, device, dtype, maxlen_enc, maxlen_dec)
        if ckpt:
            load_checkpoint(ckpt, captioner, settings)
        description = embeddings.parts[0].description
        prefix = description.prefix if description else ""
        return cls(clip, captioner, entries, embeddings, topk, decoding, banned, prefix,
                   index_search, table, taught)

    def __str__(self):
        dtype = str(self.captioner.dtype).removeprefix("torch.")
        return f"{self.captioner.identity} on {self.captioner.device}, {dtype}"

    def add_words(self, words):
        """Lays entries over the cache, in memory only. Returns the new ones, a list.

        words: a text, or texts, such as ["Geoff Hinton"]. CLIP encodes them with the cache's
        prefix. Raises InputError where a word is no text, is banned, or is longer than an entry
        may be.
        """
        words = as_list(words)
        if wrong := [word for word in words if not isinstance(word, str)]:
            raise InputError(f"a word must be a text, not {wrong[0]!r:.100}")
        words = dict.fromkeys(one_line(word, "add_words") for word in words)
        if banned := [word for word in words if self.banned and self.banned.search(word)]:
            raise InputError(f'"{banned[0]}" is banned')
        known = set(self.entries)
        words = [word for word in words if word and word not in known]
        if words:
            warn_of_entries(self.entries + words, len(self.entries))
            warn_of_long_entries(self.clip, words, self.prefix)
            vectors = self.clip.encode_texts([self.prefix + word for word in words])  # (words, dim)
            self.entries = self.entries + words
            self.embeddings = Embeddings([*self.embeddings.parts, vectors])
        return words

    def teach(self, name, phrase, photos, others=None):
        """Teaches a name from photos, in memory only. Returns a verdicts.Verdict, whose `wrong` are
        numbers of the others.

        name: as captions shall say it, "Tom", of a kind "an owl". phrase: a word for it that CLIP
        knows, with its article, "a cat". photos: three or more paths or PIL images. others: 100 or
        more of other things, better 400 (default: those of the names that were taught before).
        Features (n, dim) can take the place of images. Raises InputError where a name cannot be
        made of these.
        """
        checked_thing(name, phrase)  # before anything is encoded
        if self.banned and self.banned.search(name):
            raise InputError(f'"{name}" is banned')
        before = self.taught.notes
        if others is None and before:
            others = torch.from_numpy(before.others)
        own, others = self.vectors_of(photos), self.vectors_of(others)
        pupil = pupil_of(name, phrase, np.unique(own.numpy(), axis=0))
        notes, numbers = notes_with(self.clip, [pupil], list(enumerate(others.numpy())), before)
        taught = Taught(notes)
        verdict = judge(taught, 0)
        self.taught = taught.fitted(self.embeddings, self.topk, (), self.banned)
        return verdict._replace(wrong=[numbers[row] for row in verdict.wrong])

    def with_words(self, words=(), only=(), ban=(), topk=None, taught=None):
        """A Model of another vocabulary, which shares the weights; this one stays as it is.

        words: entries that lie over the cache, as by add_words(). only: the only entries that are
        left; those of them that are in no cache are added. ban: words that no entry, also of words,
        and no caption may hold, beside those that this Model bans. topk: entries of a table
        (default: as here). taught: a Taught in place of this one's. Raises InputError as
        add_words() does, and where no entry is left.
        """
        model = copy(self)
        model.topk, model.taught = topk or self.topk, taught or self.taught
        words, only = as_list(words), as_list(only)
        lines = model.taught.entries_among(only)
        if only:
            folded = set(map(fold, self.entries))
            words = [*words, *(word for word in lines if fold(word) not in folded)]
        if words:
            model.add_words(words)
        if ban:  # after this, so that one's own words can be banned too
            model.banned = WholeWords([*(self.banned.lines if self.banned else ()), *as_list(ban)])
        if only or ban:
            model.entries, model.embeddings = restrict(model.entries, model.embeddings, lines,
                                                       model.banned if ban else None)
            model.search = search  # an index may hold entries that are not left
        if only or ban or topk or taught:  # a few more words change no usual table
            model.taught = model.taught.fitted(model.embeddings, model.topk, only, model.banned)
        return model

    def places(self, feature, texts):
        """Where texts stand among the entries for one image: a list of (cosine, rank), rank 1 the
        nearest. A text that is no entry gets the rank that it would have. A name that was taught,
        in any case and with or without its article, has the score and the rank of what it was
        taught for.

        feature: the image's unit vector, float32 (dim,).
        """
        chunks = range(0, len(self.embeddings), 65536)
        cosines = torch.cat([self.embeddings[at:at + 65536] @ feature for at in chunks])  # (N,)
        rows = {entry: row for row, entry in enumerate(self.entries)}
        taught = dict(zip(self.taught.by_noun, self.taught.scores(feature)))
        places = []
        for text in texts:
            if (noun := self.taught.noun_like(text)) is not None:
                cosine = taught[noun]
            elif text in rows:
                cosine = cosines[rows[text]]
            else:
                cosine = self.clip.encode_texts([self.prefix + text])[0] @ feature
            places.append((cosine.item(), 1 + (cosines > cosine).sum().item()))
        return places

    def features(self, images):
        """CLIP's unit vectors, float32 (n, dim). images: n paths or PIL images, one batch.

        A PIL image is turned upright and laid on white, as a file is. Raises InputError where an
        image cannot be read.
        """
        pictures = []
        for image in as_list(images):
            if not isinstance(image, str | Path | Image):
                raise InputError(f"an image must be a path or a PIL image, not "
                                 f"{type(image).__name__}")
            try:
                read = read_opened if isinstance(image, Image) else read_image
                pictures.append(read(image))
            except OSError as error:
                raise InputError(f"cannot read the image {image} "
                                 f"({error.strerror or error})") from error
        return self.clip.encode_images(pictures) if pictures else torch.empty(0, self.clip.dim)

    def vectors_of(self, images):
        """CLIP's unit vectors of any number of images, float32 (n, dim) on the CPU. images: paths
        or PIL images, their features (n, dim), or None. Raises InputError."""
        images = [] if images is None else as_list(images)
        if not isinstance(images, torch.Tensor):
            return torch.cat([self.features([])] + [
                self.features(images[i:i + 64]) for i in range(0, len(images), 64)])
        vectors = images.detach().float().cpu()
        if vectors.shape[1:] != (self.clip.dim,) or not unit(vectors.numpy()):
            raise InputError(f"features must be unit vectors, (n, {self.clip.dim}), as "
                             "Model.features gives them")
        return vectors

    def tables(self, features):
        """Each image's table: n lists of (entry, cosine), as they were chosen, the nearest first.

        features: unit vectors, a float32 tensor (n, dim).
        """
        find = self.search
        if len(features) >= MANY and find is search and self.captioner.computes_bfloat16_on_cpu():
            find = partial(search, half=to_bfloat16(self.embeddings))  # the same tables, sooner
        tables = []
        for rows in features.split(256) if len(features) else ():
            # (256, s), (256, s) indices into the cache
            cosines, indices = find(rows, self.embeddings, self.shortlist_size())
            for table in choose_entries(self.table, self.embeddings, cosines, indices, self.topk):
                tables.append([(self.entries[row], cosine) for row, cosine in table])
        return self.taught.lay_over(tables, features)

    def shortlist_size(self):
        """How many of the nearest entries a table is chosen from."""
        return shortlist_size(self.table, len(self.entries), self.topk)

    def tokenize(self, tables):
        """Token ids of each linearized table, cut at maxlen_enc: n lists."""
        texts = [linearize(entry for entry, _ in table) for table in self.taught.spoken(tables)]
        tokens = []
        for start in range(0, len(texts), 256):  # the tokenizer takes 10 kB for each text of a call
            tokens += self.captioner.tokenize(texts[start:start + 256], self.captioner.maxlen_enc)
        return tokens

    def candidates(self, tables, ids=None, **changes):
        """What BART writes from each table: n dicts {text: likelihood}.

        tables: n lists of (entry, cosine). ids: with decoding.seed they seed each image's samples,
        which so do not depend on its neighbours (default: 0, 1, ...). changes: fields of
        self.decoding. likelihood: the mean log-probability per token. The captioner is packed, and
        cannot be trained after it.
        """
        decoding = replace(self.decoding, **changes)
        ids = range(len(tables)) if ids is None else ids
        if len(ids) != len(tables):
            raise InputError(f"got {len(ids)} ids but {len(tables)} images")
        seeds = [seed_of(decoding.seed, image_id) for image_id in ids]
        tokens, n = self.tokenize(tables), decoding.num_return_sequences
        self.captioner.pack()
        if decoding.do_sample:
            drafts = self.captioner.sample(tokens, n, decoding.temperature, decoding.top_p, seeds)
        else:
            drafts = self.captioner.beam(tokens, decoding.num_beams, n) if tokens else []
        if self.banned:
            drafts = [self.without_banned(*each) for each in zip(drafts, tokens, seeds)]
        twins = self.taught.with_twins(tables, map(likeliest, drafts))
        return [{text: likelihood for text, likelihood in each.items()
                 if not (self.banned and self.banned.search(text))} for each in twins]

    def without_banned(self, candidates, table, seed, attempts=9):
        """The candidates without a banned word. If none is left, samples are drawn anew, up to so
        many attempts."""
        for attempt in range(attempts + 1):
            if attempt:
                [candidates] = self.captioner.sample([table], 100, seeds=[seed + attempt])
            clean = [each for each in candidates if not self.banned.search(each[0])]
            if clean:
                return clean
        return []

    def choose(self, features, tables, candidates, **changes):
        """CLIP's choice among the candidates of each image: n Captions.

        features: (n, dim). tables, candidates: of tables() and candidates(). changes: fields of
        self.decoding; lm_weight lets BART's likelihood count beside CLIP's cosine, repeat_weight
        the words that a candidate says again. With insert_cost there are more candidates, see
        insertions().
        """
        decoding, inserted = replace(self.decoding, **changes), [{}] * len(tables)
        if decoding.insert_cost is not None:
            inserted = list(map(self.insertions, tables, candidates))
            candidates = [own | more for own, more in zip(candidates, inserted)]

        def worth(text, cosine, likelihood, made):
            repeated = repeats(text) if decoding.repeat_weight else 0
            return (cosine + decoding.lm_weight * likelihood - decoding.repeat_weight * repeated
                    - (decoding.insert_cost if text in made else 0))

        all_cosines = self.scores(features, tables, candidates)
        captions = []
        for table, likelihoods, cosines, made in zip(tables, candidates, all_cosines, inserted):
            ranked = [(text, round(cosine, 5), round(likelihood, 5))
                      for (text, likelihood), cosine in zip(likelihoods.items(), cosines)]
            # Where scores are equal, the likelier text comes first.
            ranked.sort(key=lambda each: (-worth(*each, made), -each[2]))
            text, score = ranked[0][:2] if ranked else ("", 0.0)
            table = [(entry, round(cosine, 5)) for entry, cosine in table]
            captions.append(Caption(text, score, table, ranked))
        return captions

    def insertions(self, table, candidates):
        """{text: likelihood}: candidates with an entry of their table that none of them says. Names
        from photos have a way of their own, and a banned word stays out."""
        table = [each for each in table if self.taught.noun_like(each[0]) is None]
        return {text: likelihood for text, likelihood in insertions(candidates, table).items()
                if not (self.banned and self.banned.search(text))}

    def scores(self, features, tables, candidates):
        """How well each candidate fits its image: CLIP's cosine, and what taught names add to it.
        The arguments are those of choose()."""
        texts, added = self.taught.plain(tables, candidates)
        cosines = rescore(self.clip, features, texts)
        return [[cosine + more for cosine, more in zip(*each)] for each in zip(cosines, added)]

    def caption(self, images, ids=None, batch_size=16, **changes):
        """Captions images by the four steps: n Captions. images: n paths or PIL images, or one.

        ids: see candidates() (default: a file's SHA-256, as the sampler; of PIL images 0, 1, ...).
        changes: fields of self.decoding, such as do_sample=True, num_return_sequences=100. Raises
        InputError where an image cannot be read.
        """
        images = as_list(images)
        ids = [None] * len(images) if ids is None else list(ids)
        if len(ids) != len(images) or batch_size < 1:
            raise InputError(f"got {len(ids)} ids but {len(images)} images, in batches of "
                             f"{batch_size}")
        captions = []
        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            features = self.features(images[batch])  # (B, dim)
            for i, image in enumerate(images[batch], start):
                if ids[i] is None:
                    ids[i] = i if isinstance(image, Image) else file_sha256(image)
            tables = self.tables(features)
            candidates = self.candidates(tables, ids[batch], **changes)
            captions += self.choose(features, tables, candidates, **changes)
        return captions
