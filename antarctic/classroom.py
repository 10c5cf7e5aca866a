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


class Lesson(NamedTuple):
    """A name as a visitor teaches it. photos: a tuple of (SHA-256 in hex, path of an upload)."""

    name: str
    phrase: str
    photos: tuple


class Classroom:
    """Learns names from photos for the page.

    clip: the model's Clip. notes: of what it was taught, or None. vector_of: a function of an
    image's (SHA-256, path) that gives CLIP's unit vector, float32 (1, dim). others: a function that
    gives photos of other things, as lessons.other_photos does; it is called when the first name is
    taught. recent: keeps what was learned last, a studio.Recent.
    """

    def __init__(self, clip, notes, vector_of, others, recent):
        self.clip, self.notes, self.vector_of, self.recent = clip, notes, vector_of, recent
        self.others = cache(others)

    def taught(self, lessons):
        """The Taught of Lessons beside what the model was taught, as a run has it that reads them
        from a cache of their own. Raises InputError."""
        if not self.notes:
            return self.learned(lessons)[0]
        return self.recent.find(("saved", lessons), lambda: Taught(joined([
            self.notes, self.notes_of(lessons)])))

    def notes_of(self, lessons):
        """The Notes of Lessons alone."""
        notes, n = self.learned(lessons)[0].notes, len(lessons)
        return notes._replace(things=notes.things[:n], vectors=notes.vectors[:n])

    def verdicts(self, lessons):
        """The Verdict on each Lesson, a list. Raises InputError."""
        taught, _ = self.learned(lessons)
        return [judge(taught, i) for i in range(len(lessons))]

    def wrongly(self, lessons, verdict):
        """Other photos that would wrongly get a name of Lessons, as data: URIs. verdict: on it."""
        _, paths = self.learned(lessons)
        wrong = [paths[row] for row in verdict.wrong if paths[row]]
        pictures = [thumbnail(path, side=SIDE) for path in wrong[:MOST_SHOWN]]
        return [data_uri(jpeg) for jpeg, _ in filter(None, pictures)]

    def learned(self, lessons):
        """(the Taught, the path or None of each of its other photos)."""
        def learn():
            pupils = []
            for name, phrase, photos in lessons:
                vectors = [self.vector_of(*photo)[0].numpy() for photo in photos]
                pupils.append(pupil_of(name, phrase, vectors))
            notes, paths = notes_with(self.clip, pupils, self.others(), self.notes)
            return Taught(notes), paths
        return self.recent.find(lessons, learn)


def with_lesson(lessons, name, phrase, photos):
    """A visitor's Lessons, a tuple, with a new one at the front; of one name the new photos count.
    name, phrase: see taught.checked_thing. photos: as of a Lesson. Raises InputError."""
    thing = checked_thing(name, phrase)
    if len(photos) > MOST_PHOTOS:
        raise InputError(f"{MOST_PHOTOS} photos of {thing.name} are enough")
    lessons = (Lesson(*thing, photos), *without_lesson(lessons, thing.name))
    if len(lessons) > MOST_NAMES:
        raise InputError(f"{MOST_NAMES} names can be taught here; forget some")
    return lessons


def without_lesson(lessons, name):
    """A visitor's Lessons without that of a name."""
    return tuple(each for each in lessons if noun_of(each.name) != noun_of(name))
