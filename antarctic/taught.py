"""Things that were taught from photos, in tables and captions: who is named, and what that scores.

A thing's row scores an image as an entry's does, and above the last entry of a usual table it is in
the image's table. BART need not be able to spell the name: it reads the class word, and of each
candidate with "a small orange cat" there is a twin in which that is "Tom". CLIP does not know the
name either: it scores "a cat" in its place, and what the row scores above that last entry is added.
"""

import re
from copy import copy
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch

from antarctic.cache import search
from antarctic.chair import plural
from antarctic.errors import InputError
from antarctic.teaching import learn_all, row_of
from antarctic.words import fold

MOST_NAMED = 3  # taught things in a table
WEIGHT = 2  # of what a row scores above a table's last entry, beside CLIP's cosine
USUAL = 256  # other photos whose tables are the usual ones
ALONE = 0.1  # between the last and the first entry's scores, where these are one
LONGEST = 100  # characters of a name, and of a class word
MOST_TWINS = 2000  # of an image
ONE, MANY = "an?|the|one", r"two|three|four|five|six|some|several|many|a pair of|a group of|\d+"
BREAKS = ("a an the one two three four some and or of with in on at by is are to from near under "
          "over above below beside behind next there").split()
WORD = rf"(?!(?:{'|'.join(BREAKS)})\b)[\w'-]+"  # of a noun's own phrase


class Thing(NamedTuple):
    """name: as captions say it, "Tom", of a kind with its article, "an owl". phrase: the class word
    with its article, "a cat"."""

    name: str
    phrase: str

    @property
    def noun(self):
        """The name without an article, as a table shows it."""
        return without_article(self.name)

    @property
    def word(self):
        """The class word alone, as BART reads it in a table."""
        return without_article(self.phrase)

    @property
    def is_kind(self):
        """Whether there may be several."""
        return self.noun != self.name

    def spoken(self, text):
        """A caption with the class word in place of the name, as CLIP reads it."""
        if self.is_kind:
            text = replace(rf"an? {re.escape(self.noun)}", self.phrase, text)
            text = replace(re.escape(plural(self.noun)), plural(self.word), text)
        return replace(re.escape(self.noun), self.word if self.is_kind else self.phrase, text)

    def called(self, text, anything=False):
        """Captions with the name in place of the first "a (small orange) cat", of a kind also of
        the first "two cats": a list. anything: of each noun phrase, whatever its noun."""
        one, several, first = re.escape(self.word), re.escape(plural(self.word)), ""
        if anything:  # but where it is, as "in the city"
            one = several = WORD
            first = "(?<!in )(?<!on )(?<!at )"
        name = self.name.replace("\\", r"\\")
        pairs = [(rf"(?:{ONE}) (?:{WORD} ){{0,3}}{one}(?! of\b)", name)]
        if self.is_kind:
            nouns = plural(self.noun).replace("\\", r"\\")
            pairs.append((rf"({MANY}) (?:{WORD} ){{0,3}}{several}", rf"\1 {nouns}"))
        found = []
        for pattern, words in pairs:
            matches = list(re.finditer(rf"(?<!\w){first}{pattern}(?!\w)", text, re.IGNORECASE))
            for match in matches if anything else matches[:1]:
                found.append(text[:match.start()] + match.expand(words) + text[match.end():])
        return found


def checked_thing(name, phrase):
    """A Thing. Raises InputError where a name cannot be one, or a phrase is no "a cat"."""
    for text, what in ((name, "name"), (phrase, "class word")):
        if not (isinstance(text, str) and 0 < len(text) <= LONGEST and text.isprintable()
                and text == " ".join(text.split()) and "|" not in text
                and re.search(r"\w", without_article(text))):
            raise InputError(f"a {what} must be a line of 1 to {LONGEST} characters, with a letter "
                             f"or digit and without |, not {text!r:.100}")
    if without_article(phrase) == phrase:
        raise InputError(f'the class word needs its article, such as "a cat", not {phrase!r}')
    thing = Thing(name, phrase)
    if fold(thing.noun) == fold(thing.word):
        raise InputError(f"captions say {phrase!r} already, so the name must be another one than "
                         f"{name!r}")
    return thing


def without_article(text):
    return re.sub("^(an?|the) ", "", text, flags=re.IGNORECASE)


def noun_of(name):
    """What two names have in common that are one."""
    return fold(without_article(name))


def replace(pattern, words, text):
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", lambda _: words, text)


class Taught:
    """What captions may name: the things of Notes (see taught_files), or nothing without them.

    fitted() makes one for a cache and a size of tables, which has the attributes rows, float32
    (things, dim), as those of a cache, but longer than 1; least, the score of an entry that is just
    in a usual table; by_noun, {noun: Thing}; and nouns, {noun_of(name): noun}. Attributes of all:
    things, a list of Thing, and notes, the Notes of these, or None.
    """

    def __init__(self, notes=None):
        self.notes, self.things, self.lessons = notes, [], []
        if notes:
            self.things = notes.things
            self.spread, self.lessons = learn_all(notes.others, notes.vectors)

    def fitted(self, embeddings, topk, only=(), banned=None):
        """A Taught whose rows fit the scores in tables of topk entries of a cache. It has the
        things that --only and --ban leave.

        embeddings: the cache's, (N, dim). only: a list of entries, or none. banned: a WholeWords,
        or None.
        """
        other, only = copy(self), set(map(noun_of, only or ()))
        left = [i for i, thing in enumerate(self.things)
                if (not only or noun_of(thing.name) in only)
                and not (banned and banned.search(thing.name))]
        other.things = [self.things[i] for i in left]
        other.lessons = [self.lessons[i] for i in left]
        for thing, lesson in zip(other.things, other.lessons):
            if not lesson.threshold > 0:
                raise InputError(f"the photos of {thing.name} are not apart from others; teach it "
                                 "again by compute_cache.py --teach, or forget it by --untaught")
        other.by_noun = {thing.noun: thing for thing in other.things}
        other.nouns = {noun_of(thing.name): thing.noun for thing in other.things}
        other.least, other.rows = 0.0, torch.empty(0, embeddings[:1].shape[1])
        if self.notes:
            other.notes = self.notes._replace(
                things=other.things, vectors=[self.notes.vectors[i] for i in left])
        if left:
            usual = torch.from_numpy(self.notes.others[:USUAL])
            scores, _ = search(usual, embeddings, topk)  # (USUAL, topk), best first
            other.least, most = scores[:, -1].mean().item(), scores[:, 0].mean().item()
            if scores.shape[1] == 1:
                most = other.least + ALONE
            other.rows = torch.from_numpy(np.stack([
                row_of(self.spread, lesson, other.least, most) for lesson in other.lessons]))
        return other

    def entries_among(self, only):
        """The lines of --only that are entries: those that are no taught name, or all where each is
        one. only: a list, or None."""
        known = {noun_of(thing.name) for thing in self.things}
        return only and [text for text in only if noun_of(text) not in known] or only

    def noun_like(self, text):
        """The noun of the thing that a text names, in any case, with or without its article; None
        where it names none."""
        return self.nouns.get(noun_of(text))

    def key(self):
        """What stands for all of it in a fingerprint."""
        return [self.things, self.least, sha256(self.rows.numpy()).hexdigest()]

    def scores(self, features):
        """How well the things fit images, (n, things): a cosine has no more than 1, and neither
        have these. features: (n, dim)."""
        return (features @ self.rows.T).clamp(max=1)

    def lay_over(self, tables, features):
        """Tables with the taught things that an image shows, in place of the last entries. tables:
        n lists of (entry, score). features: (n, dim)."""
        if not self.things:
            return tables
        laid = []
        for table, row in zip(tables, self.scores(features).tolist()):
            seen = sorted(zip(row, range(len(row))), reverse=True)[:min(MOST_NAMED, len(table))]
            seen = [(self.things[i].noun, score) for score, i in seen if score > self.least]
            # An entry of a name's text is not the thing: CLIP means something else by it.
            kept = [each for each in table if self.noun_like(each[0]) is None]
            kept = kept[:len(table) - len(seen)]
            if not (kept or seen):  # but of such alone the table is as it was
                kept = table
            for noun, score in seen:
                place = next((i for i, (_, other) in enumerate(kept) if other < score), len(kept))
                kept.insert(place, (noun, score))
            laid.append(kept)
        return laid

    def here(self, table):
        """The taught things of a table: a list of (Thing, score)."""
        return [(self.by_noun[entry], score) for entry, score in table
                if entry in self.by_noun and score > self.least]

    def spoken(self, tables):
        """Tables as BART reads them: with a class word in place of each name, each entry once."""
        read = []
        for table in tables:
            words = {}
            for entry, score in table:
                known = self.by_noun.get(entry)
                words.setdefault(known.word if known else entry, score)
            read.append(list(words.items()))
        return read

    def with_twins(self, tables, candidates):
        """Candidates with their twins, each as likely as what it was: n dicts {text: likelihood}.
        Where none holds the class word, any noun phrase may be the thing."""
        everything = []
        for table, drafts in zip(tables, candidates):
            twins = dict(drafts)
            for thing, _ in self.here(table):  # the second one also in twins of the first
                for anything in (False, True):
                    made = [(twin, likelihood) for text, likelihood in twins.items()
                            for twin in thing.called(text, anything)][:MOST_TWINS]
                    if made:
                        break
                for twin, likelihood in made:
                    twins[twin] = max(likelihood, twins.get(twin, likelihood))
            everything.append(twins)
        return everything

    def plain(self, tables, candidates):
        """(n lists of the texts that CLIP scores, n lists of what is added to their cosines)."""
        everything = [], []
        for table, drafts in zip(tables, candidates):
            texts, added = [], []
            for text in drafts:
                bonus = 0.0
                for thing, score in self.here(table):
                    if (spoken := thing.spoken(text)) != text:
                        text, bonus = spoken, bonus + WEIGHT * (score - self.least)
                texts.append(text)
                added.append(bonus)
            everything[0].append(texts)
            everything[1].append(added)
        return everything
