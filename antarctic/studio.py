"""What the page asks of a Model: captions under one's own words and dials, one at a time."""

import hashlib
import os
import threading
import time
from contextlib import contextmanager
from copy import copy
from pathlib import Path

from antarctic.cache import search
from antarctic.cache_files import cache_lock, finish_cache
from antarctic.classroom import MOST_PHOTOS, Classroom, with_name
from antarctic.errors import InputError
from antarctic.files import file_sha256, output_folder, write_lines
from antarctic.images import MOST_PIXELS, read_image
from antarctic.locks import locked
from antarctic.scan import kept_in_memory
from antarctic.seen import vectors_of, where_of
from antarctic.taught_files import write_taught
from antarctic.visitors import AS_IT_IS, BOUNDS, Recent, Words, checked_dials, lines_of
from antarctic.where import contributions, map_box, require_maps

MOST_SAVED = 1000  # caches in the folder of "Save"


class Stopped(Exception):
    """The visitor does not want the caption any more."""


class Studio:
    """A Model as many visitors use it at once.

    model: a model.Model, which stays as it is. max_pixels: of an image at most. others: a function
    that gives photos of other things for teaching names, see classroom. only: the lines that the
    model was restricted to, or None. What was computed last is kept: an image's vector, so that
    another word or dial does not wait for CLIP, and vocabularies, so that a new line is encoded
    alone. Attributes: model, dials, those that the model begins with. Raises InputError where one
    of these is out of BOUNDS.
    """

    def __init__(self, model, max_pixels=MOST_PIXELS, others=list, only=None):
        if model.search is search:
            model = copy(model)
            model.search = kept_in_memory(model.embeddings)
        self.model, self.max_pixels, self.only = model, max_pixels, only or ()
        self.features, self.models, self.captions = Recent(512), Recent(32), Recent(512)
        self.fits = Recent(32)  # these share the entries' vectors of models
        self.classroom = Classroom(model.clip, model.taught.notes, self.photo, others, Recent(8))
        self.shares, self.has_maps = Recent(32), True
        try:
            require_maps(model.clip)
        except InputError:
            self.has_maps = False
        self.device, self.running, self.stopped = threading.Lock(), None, False
        self.saving = threading.Lock()
        # This layer runs once a token: between two of them a caption can be stopped.
        decoder = model.captioner.model.get_decoder()
        decoder.layernorm_embedding.register_forward_pre_hook(self.stop_here)
        decoding = model.decoding
        self.dials = {"topk": model.topk, "do_sample": decoding.do_sample,
                      **{name: getattr(decoding, name) for name in BOUNDS if name != "topk"}}
        checked_dials(self.dials)

    # ----------------------------------------------------------------------- one at a time

    @contextmanager
    def turn(self, visitor):
        """The device, for one visitor at a time. Raises Stopped where stop() is called meanwhile.
        visitor: any name, or None."""
        with self.device:
            self.running, self.stopped = visitor, False
            try:
                yield
            finally:
                self.running = None

    def stop(self, visitor):
        """Stops what is computed for this visitor, if anything is."""
        if visitor is not None and self.running == visitor:
            self.stopped = True

    def stop_here(self, *_):
        if self.stopped and self.running is not None:
            raise Stopped

    # ------------------------------------------------------------------------ what is asked

    def picture(self, path):
        """An upload as an RGB picture. Raises InputError where it is no image that can be read."""
        try:
            return read_image(path, self.max_pixels)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"this image cannot be read ({reason}); try another one") from error

    def feature(self, path):
        """(the file's sha256, CLIP's unit vector of its image, float32 (1, dim))."""
        key = self.key_of(path)
        return key, self.vector(key, path)

    def key_of(self, path):
        """An upload's sha256. Raises InputError where it was removed."""
        try:
            return file_sha256(path)
        except InputError as error:
            raise InputError("the image is not here any more; upload it again") from error

    def photo(self, key, path):
        """As vector(), of one of several photos: it is named where it cannot be read, and before
        each of them the visitor can stop. Raises InputError, and Stopped."""
        self.stop_here()
        try:
            return self.vector(key, path)
        except InputError as error:
            raise InputError(f"{Path(path).name}: {error}") from error

    def vector(self, key, path):
        """CLIP's unit vector of an image, float32 (1, dim). The shares of its patches are computed
        with it, where they are known for this CLIP. key: the file's sha256."""
        return self.features.find(key, lambda: self.decompose(key, path)[0] if self.has_maps else
                                  self.model.features(self.picture(path)))

    def decompose(self, key, path):
        """(CLIP's unit vector of an image, float32 (1, dim); c, see contributions, of it alone; the
        box of its maps)."""
        def make():
            picture = self.picture(path)
            features, [c] = contributions(self.model.clip, [picture])
            return features, c, map_box(self.model.clip, picture.size)
        return self.shares.find(key, make)

    def where(self, path, table, words=AS_IT_IS, visitor=None):
        """Where the entries of an image's table were seen, as in records (see antarctic.seen); None
        where that is not known for this CLIP. words: the Words under which it was made. Raises
        InputError, and Stopped."""
        if not self.has_maps:
            return None
        with self.turn(visitor):
            key, _ = self.feature(path)
            _, c, box = self.decompose(key, path)
            return where_of(box, c, table, vectors_of(self.fitted(words, len(table)), [table]))

    def with_words(self, words):
        """The Model of a vocabulary. words: a Words."""
        if not any(words):
            return self.model

        def make():
            model, known = self.model, 0  # lines that were encoded for a shorter list
            if words.own_names:
                model = model.with_words(taught=self.classroom.taught(words.own_names))
            for length in range(len(words.words) - 1, 0, -1):
                shorter = self.models.get(Words(words.words[:length], own_names=words.own_names))
                if shorter is not None:
                    model, known = shorter, length
                    break
            if known or not (words.only or words.ban):
                model = model.with_words(words.words[known:])
                restricted = words.only or words.ban
                return model.with_words((), words.only, words.ban) if restricted else model
            return model.with_words(words.words, words.only, words.ban)
        return self.models.find(words, make)

    def fitted(self, words, topk):
        """The Model of a vocabulary and a size of tables, which the rows of names depend on."""
        return self.fits.find((words, topk), lambda: self.with_words(words).with_words(topk=topk))

    def teach(self, name, phrase, paths, own_names=(), visitor=None):
        """A name that a visitor teaches: (the visitor's classroom.OwnNames with the new one first,
        the Verdict on each, data: URIs of other photos that would wrongly get the new name).

        name, phrase: "Tom" and "a cat". paths: uploads. own_names: what the visitor has taught.
        Raises InputError, and Stopped.
        """
        name, phrase = (" ".join(str(text or "").split()) for text in (name, phrase))
        if self.model.banned and self.model.banned.search(name):
            raise InputError(f'"{name}" is banned on this page')
        with self.turn(visitor):
            photos = {self.key_of(path): path for path in paths[:MOST_PHOTOS + 1]}
            own_names = with_name(own_names, name, phrase, tuple(photos.items()))
            verdicts = self.classroom.verdicts(own_names)
            return own_names, verdicts, self.classroom.wrongly(own_names, verdicts[0])

    def caption(self, path, words=AS_IT_IS, dials=None, visitor=None):
        """(the model.Caption of an image, the seconds that it took).

        path: an image file. words: a Words. dials: fields of utils.Decoding, and topk; those that
        are missing are the model's. Raises InputError, and Stopped.
        """
        dials = checked_dials({**self.dials, **(dials or {})})
        with self.turn(visitor):
            start = time.perf_counter()
            key, feature = self.feature(path)

            def make():  # an answer that is kept keeps its seconds
                changes = {name: value for name, value in dials.items() if name != "topk"}
                model = self.fitted(words, dials["topk"])
                tables = model.tables(feature)
                candidates = model.candidates(tables, [key], **changes)
                [result] = model.choose(feature, tables, candidates, **changes)
                return result, time.perf_counter() - start

            return self.captions.find((key, words, tuple(sorted(dials.items()))), make)

    def search(self, path, text, words=AS_IT_IS, topk=None, visitor=None):
        """Where a text stands among the entries for an image: a dict with text, known (whether it
        is an entry, or a name that was taught), cosine, rank, entries (how many there are), topk,
        shortlist (how many of the nearest the table is chosen from), kept (whether it is in the
        table, where it is an entry), last (the least cosine in the table) and others, (entry,
        cosine, rank) of up to ten entries that hold it. Raises InputError."""
        lines = lines_of(text)
        if len(lines) != 1:
            raise InputError("type one word, or one phrase, to search for")
        text = lines[0]
        with self.turn(visitor):
            _, feature = self.feature(path)
            model = self.with_words(words)
            text = model.taught.noun_like(text) or text
            taught = text in model.taught.by_noun
            folded, holding = text.casefold(), []
            for entry in model.entries:
                if (folded in entry.casefold() and entry != text
                        and model.taught.noun_like(entry) is None):  # which stands in no table
                    holding.append(entry)
                    if len(holding) == 200:
                        break
            places = model.places(feature[0], [text, *holding])
            known = taught or text in model.entries
            entries = len(model.entries)
            topk = min(topk or model.topk, len(model.entries))
            banned = model.banned and model.banned.search(text)
            # As a line of the visitor's words.
            model = model.with_words(() if banned or taught else text, topk=topk)
            [table] = model.tables(feature)
        others = [(entry, *place) for entry, place in zip(holding, places[1:])]
        others.sort(key=lambda other: other[2])
        return {"text": text, "known": known, "cosine": places[0][0], "rank": places[0][1],
                "entries": entries, "topk": topk,
                "kept": text in dict(table), "last": min(cosine for _, cosine in table),
                "shortlist": model.shortlist_size(), "others": others[:10]}

    def save(self, words, folder):
        """Writes a visitor's words as a small cache into a folder: {flag: path} of the files, which
        sampler.py takes; --only and --ban of the page are among them. Files that are there stay;
        the same words are written once. Raises InputError, also where another run is writing that
        cache."""
        if not any(words):
            raise InputError("there is nothing to save yet: write a word into one of the boxes")
        taught = [(*each[:2], sorted(key for key, _ in each.photos)) for each in words.own_names]
        only, ban = words.only, words.ban
        if self.only and not only:
            only = (*self.only, *words.words, *(own.name for own in words.own_names))
        if self.model.banned:
            ban = (*self.model.banned.lines, *ban)
        parts = (words.words, only, ban, *([taught] if taught else ()))
        name = hashlib.sha256(repr(parts).encode()).hexdigest()[:8]
        folder = output_folder(folder)
        base, files = folder / f"words-{name}", {}
        if len(list(folder.glob("words-*.txt"))) >= MOST_SAVED:
            raise InputError(f"{folder} holds {MOST_SAVED:,} lists of words; remove some of them")
        own = tuple(dict.fromkeys((*words.words, *words.only)))
        with self.turn(None):
            notes = self.classroom.notes_of(words.own_names) if words.own_names else None
        if notes and not own:  # a cache has an entry at least: one that is no new one
            known = set(self.model.entries)
            said = [thing.word for thing in notes.things if thing.word in known]
            own = (*said, *self.model.entries[:1])[:1]
        with self.saving:
            if own:
                files = {"--textfile": f"{base}.txt", "--embfile": f"{base}.npy"}
                self.save_cache(*files.values(), own, notes)
            for flag, lines in (("--only", only), ("--ban", ban)):
                if lines:
                    files[flag] = f"{base}-{flag[2:]}.txt"
                    if not os.path.exists(files[flag]):
                        write_lines(files[flag], lines)
        return files

    def save_cache(self, textfile, embfile, entries, notes):
        """Writes a cache of a few entries, and the Notes beside it unless they are None, where it
        is not there. Raises InputError where another page, or compute_cache.py, is writing to it.
        """
        from antarctic.cache_changes import write_cache
        with locked(cache_lock(embfile)):
            finish_cache(textfile, embfile)  # which a killed page had begun
            if os.path.exists(textfile) and os.path.exists(embfile):
                return
            clip, prefix = self.model.clip, self.model.prefix
            with self.turn(None):
                vectors = clip.encode_texts([prefix + entry for entry in entries])  # (n, dim)
            if notes:
                write_taught(embfile, notes)
            write_cache(textfile, embfile, entries, vectors.numpy(), clip.identity, prefix)
