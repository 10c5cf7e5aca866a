"""What photos make of a name, before it is kept: the notes of new names, and a verdict on each."""

from typing import NamedTuple

import numpy as np

from antarctic.errors import InputError
from antarctic.taught import Thing, checked_thing, noun_of
from antarctic.taught_files import FEWEST_OTHERS, FEWEST_PHOTOS, MOST_THINGS, SAME, Notes, thinned

GOOD_OTHERS, GOOD_PHOTOS = 400, 5
ALIKE = 0.99  # cosine of photos that are one photo


class Pupil(NamedTuple):
    """A thing that is to be taught. photos, unlike: CLIP's vectors of photos of it, float32 (m,
    dim), each once, and of what it is not (q, dim)."""

    thing: Thing
    photos: np.ndarray
    unlike: np.ndarray


class Verdict(NamedTuple):
    """What a thing's photos made of it."""

    thing: Thing
    named: int  # how many of its photos would get the name by the rest of them
    photos: int
    wrong: list  # rows of the others that would get it, the most alike first
    others: int
    nearest: tuple | None  # the nearest other thing: (name, its share of the way to this one)
    remarks: list  # what would make it better: sentences

    def __str__(self):
        line = (f"{self.thing.name}, {self.thing.phrase}: would be named in {self.named} of "
                f"{self.photos} of its photos by the rest of them, wrongly in {len(self.wrong)} of "
                f"{self.others:,} others")
        if self.nearest:
            line += "; nearest other thing: {}, {:.0%} of the way".format(*self.nearest)
        return line


def pupil_of(name, phrase, photos, unlike=()):
    """A Pupil. photos, unlike: vectors, lists of float32 (dim,). Raises InputError where the name
    or the phrase cannot be one, or the photos are too few for a name, or too alike."""
    thing = checked_thing(name, phrase)
    if len(photos) < FEWEST_PHOTOS:
        raise InputError(f"{name} needs {FEWEST_PHOTOS} different photos at least, better "
                         f"{GOOD_PHOTOS}, and there {'is' if len(photos) == 1 else 'are'} "
                         f"{len(photos)}")
    photos = np.array(photos, np.float32)
    if (photos @ photos.T).min() > ALIKE:
        raise InputError(f"the photos of {name} are too alike; take them in several places, two of "
                         "them beside other things")
    return Pupil(thing, photos, np.array(unlike, np.float32).reshape(-1, photos.shape[1]))


def notes_with(clip, pupils, found, before):
    """(the Notes of Pupils beside what was taught before, what found says of each of its others).

    found: of other_photos(). before: Notes, or None; of one name the pupil's photos count. Raises
    InputError.
    """
    nouns = [noun_of(pupil.thing.name) for pupil in pupils]
    if twice := {noun for noun in nouns if nouns.count(noun) > 1}:
        raise InputError(f"{min(twice)} is taught twice; give all photos to one --teach")
    things = [pupil.thing for pupil in pupils]
    vectors = [(pupil.photos, pupil.unlike) for pupil in pupils]
    if before:
        for thing, each in zip(before.things, before.vectors):
            if noun_of(thing.name) not in nouns:
                things.append(thing)
                vectors.append(each)
    if len(things) > MOST_THINGS:
        raise InputError(f"{MOST_THINGS} things can be taught at most; --untaught forgets some")
    paths, others = apart_from(found, np.concatenate([photos for photos, _ in vectors]), before)
    return Notes(clip.identity, others, things, vectors), paths


def apart_from(found, vectors, before):
    """(paths or None, vectors (n, dim)) of photos of other things, at most MOST_OTHERS.

    found: of other_photos(). vectors: (m, dim), of all that are taught, now and earlier. before:
    the Notes of what was taught earlier, or None: their others serve where there are no new ones.
    Raises InputError where there are too few.
    """
    if not found and before:
        found = [(None, vector) for vector in before.others]
    found = [each for each in found if (vectors @ each[1]).max() < SAME]
    if len(found) < FEWEST_OTHERS:
        raise InputError(f"a name needs {FEWEST_OTHERS} photos of other things at least, better "
                         f"{GOOD_OTHERS}, and there are {len(found)}: --features names a folder in "
                         "which sampler.py or trainer.py has kept image vectors of this CLIP, "
                         "--others names images")
    found = thinned(found)
    return [path for path, _ in found], np.stack([vector for _, vector in found])


def judge(taught, i):
    """The Verdict on the i-th thing of a Taught. Raises InputError where its photos are not apart
    from others."""
    notes, lesson, thing = taught.notes, taught.lessons[i], taught.things[i]
    rivals = [j for j in range(len(taught.things)) if j != i]
    mean = notes.vectors[i][0].mean(0)
    means = np.array([notes.vectors[j][0].mean(0) for j in rivals], np.float32)
    named = int((lesson.own >= lesson.threshold).sum())
    if lesson.threshold <= 0 or not named:
        alike = [taught.things[j].name for j, other in zip(rivals, means)
                 if mean @ other > ALIKE * np.linalg.norm(mean) * np.linalg.norm(other)]
        if alike:
            raise InputError(f"the photos of {thing.name} are those of {alike[0]}, or too like "
                             "them to be told apart")
        raise InputError(f"the photos of {thing.name} are not apart from others: none would be "
                         "named by the rest of them; take others, in which it is larger")
    remarks, dim = [], len(mean)
    if 2 * named < len(lesson.own):
        remarks.append(f"{thing.name} is hardly apart from others: more photos of it are better, "
                       "or others in which it is larger")
    if len(lesson.own) < GOOD_PHOTOS:
        remarks.append(f"{thing.name} has only {len(lesson.own)} photos; {GOOD_PHOTOS} are better, "
                       "two of them beside other things")
    if len(notes.others) < max(GOOD_OTHERS, dim):
        remarks.append(f"there are only {len(notes.others)} photos of other things; with "
                       f"{max(GOOD_OTHERS, 3 * dim):,}, fewer images would wrongly get a name")
    wrong = np.flatnonzero(lesson.others >= lesson.threshold)
    wrong = wrong[np.argsort(-lesson.others[wrong])].tolist()
    nearest = None
    if rivals:
        ways = (means - taught.spread.mean) @ lesson.w / lesson.own.mean()
        nearest = taught.things[rivals[ways.argmax()]].name, max(0.0, float(ways.max()))
    return Verdict(thing, named, len(lesson.own), wrong, len(notes.others), nearest, remarks)
