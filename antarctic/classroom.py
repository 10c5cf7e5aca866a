"""Names that visitors of the page teach from photos, each for that visitor alone."""

from functools import cache
from typing import NamedTuple

from antarctic.errors import InputError
from antarctic.gallery import data_uri, thumbnail
from antarctic.lessons import MOST_SHOWN
from antarctic.taught import Taught, checked_thing, noun_of
from antarctic.taught_files import joined
from antarctic.verdicts import judge, notes_with, pupil_of

MOST_NAMES, MOST_PHOTOS = 20, 50  # of a visitor; of each name
SIDE = 160  # pixels of the longer side of other photos that are shown


class OwnName(NamedTuple):
    """A name as a visitor teaches it. photos: a tuple of (SHA-256 in hex, path of an upload)."""

    name: str
    phrase: str
    photos: tuple


class Classroom:
    """Learns names from photos for the page.

    clip: the model's Clip. notes: of what it was taught, or None. vector_of: a function of an
    image's (SHA-256, path) that gives CLIP's unit vector, float32 (1, dim). others: a function that
    gives photos of other things, as lessons.other_photos does; it is called when the first name is
    taught. recent: keeps what was learned last, a visitors.Recent.
    """

    def __init__(self, clip, notes, vector_of, others, recent):
        self.clip, self.notes, self.vector_of, self.recent = clip, notes, vector_of, recent
        self.others = cache(others)

    def taught(self, own_names):
        """The Taught of OwnNames beside what the model was taught, as a run has it that reads them
        from a cache of their own. Raises InputError."""
        if not self.notes:
            return self.learned(own_names)[0]
        return self.recent.find(("saved", own_names), lambda: Taught(joined([
            self.notes, self.notes_of(own_names)])))

    def notes_of(self, own_names):
        """The Notes of OwnNames alone."""
        notes, n = self.learned(own_names)[0].notes, len(own_names)
        return notes._replace(things=notes.things[:n], vectors=notes.vectors[:n])

    def verdicts(self, own_names):
        """The Verdict on each OwnName, a list. Raises InputError."""
        taught, _ = self.learned(own_names)
        return [judge(taught, i) for i in range(len(own_names))]

    def wrongly(self, own_names, verdict):
        """Other photos that would wrongly get a name of OwnNames, as data: URIs. verdict: on it."""
        _, paths = self.learned(own_names)
        wrong = [paths[row] for row in verdict.wrong if paths[row]]
        pictures = [thumbnail(path, side=SIDE) for path in wrong[:MOST_SHOWN]]
        return [data_uri(jpeg) for jpeg, _ in filter(None, pictures)]

    def learned(self, own_names):
        """(the Taught, the path or None of each of its other photos)."""
        def learn():
            pupils = []
            for name, phrase, photos in own_names:
                vectors = [self.vector_of(*photo)[0].numpy() for photo in photos]
                pupils.append(pupil_of(name, phrase, vectors))
            notes, paths = notes_with(self.clip, pupils, self.others(), self.notes)
            return Taught(notes), paths
        return self.recent.find(own_names, learn)


def with_name(own_names, name, phrase, photos):
    """A visitor's OwnNames, a tuple, with a new one at the front; of one name the new photos count.
    name, phrase: see taught.checked_thing. photos: as of an OwnName. Raises InputError."""
    thing = checked_thing(name, phrase)
    if len(photos) > MOST_PHOTOS:
        raise InputError(f"{MOST_PHOTOS} photos of {thing.name} are enough")
    own_names = (OwnName(*thing, photos), *without_name(own_names, thing.name))
    if len(own_names) > MOST_NAMES:
        raise InputError(f"{MOST_NAMES} names can be taught here; forget some")
    return own_names


def without_name(own_names, name):
    """A visitor's OwnNames without that of a name."""
    return tuple(each for each in own_names if noun_of(each.name) != noun_of(name))
