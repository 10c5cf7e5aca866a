"""Teaching names from photos: what compute_cache.py --teach, --untaught and --taught do."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from antarctic.cache_files import cache_description
from antarctic.distributed import warn
from antarctic.errors import InputError, counted, escape_control, print_safely
from antarctic.feature_files import whole_rows
from antarctic.features import encode_files, encoder_of, report_bad_images
from antarctic.folders import list_images
from antarctic.taught import checked_thing, without_article
from antarctic.taught_files import (
    FEWEST_OTHERS,
    FEWEST_PHOTOS,
    MOST_OTHERS,
    MOST_THINGS,
    Notes,
    read_taught,
    taught_path,
    write_taught,
)
from antarctic.teaching import learn_all
from antarctic.words import fold

USUAL_FOLDERS = "results", "checkpoints"  # where sampler.py and trainer.py keep image vectors
GOOD_OTHERS = 400
ALIKE = 0.99  # cosine of photos that are one photo
SAME = 0.9999  # and of one file, encoded in two batches
MOST_NAMED = 8  # other photos that a report names


def photos_of(clip, paths, what, skip=False):
    """{digest: (path, vector)} of the images of files and folders, each once. what: what they are,
    for a bar. One that cannot be read is skipped and told of, or else raises InputError."""
    paths = [picture.path for picture in list_images(paths)]
    with tqdm(total=len(paths), desc=what, unit="image") as bar:
        digests, vectors, bad = encode_files(clip, paths, 64, bar)
    if skip:
        report_bad_images([(paths[i], reason) for i, (reason, _) in sorted(bad.items())],
                          MOST_NAMED)
    elif bad:
        i, (reason, _) = min(bad.items())
        raise InputError(f"the photo {paths[i]} cannot be read ({reason}), so nothing was taught; "
                         "leave it out, or mend it")
    return {digest: (path, vectors[digest]) for digest, path in zip(digests, paths) if digest}


def kept_vectors(clip, folders):
    """{digest: (None, vector)} of images that earlier runs have encoded by this CLIP. folders: of
    the sampler or the trainer, or None for their usual ones."""
    found = {}
    for folder in map(Path, folders or filter(Path.is_dir, map(Path, USUAL_FOLDERS))):
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}; --features names one where sampler.py "
                             "or trainer.py has kept image vectors")
        for path in sorted(folder.glob(f"features-{encoder_of(clip)}-*")):
            for _, digest, vector in whole_rows(path, clip.dim):
                found.setdefault(digest, (None, vector))
    return found


def other_photos(clip, features, paths, own, vectors, before):
    """(paths or None, vectors (n, dim)) of photos of other things, at most MOST_OTHERS.

    features, paths: --features and --others. own: digests of photos that were taught now. vectors:
    (m, dim), of all that were taught, now and earlier. before: the Notes of what was taught
    earlier, or None: their others serve where there are no new ones. Raises InputError where there
    are too few.
    """
    found = photos_of(clip, paths, "encoding other photos", skip=True) if paths else {}
    if features or not paths:
        found = kept_vectors(clip, features) | found
    found = [found[digest] for digest in sorted(found.keys() - own)]
    if not found and before:
        found = [(None, vector) for vector in before.others]
    found = [each for each in found if (vectors @ each[1]).max() < SAME]
    if len(found) < FEWEST_OTHERS:
        raise InputError(f"a name needs {FEWEST_OTHERS} photos of other things at least, better "
                         f"{GOOD_OTHERS}, and there are {len(found)}: --features names a folder in "
                         "which sampler.py or trainer.py has kept image vectors of this CLIP, "
                         "--others names images")
    if len(found) < max(GOOD_OTHERS, clip.dim):
        warn(f"there are only {len(found)} photos of other things; with "
             f"{max(GOOD_OTHERS, 3 * clip.dim):,} fewer images are given a wrong name")
    found = found[::-(-len(found) // MOST_OTHERS)]
    return [path for path, _ in found], np.stack([vector for _, vector in found])


def require_photos(name, photos):
    """Raises InputError where photos, {digest: (path, vector)}, are too few for a name, and warns
    where they are too alike."""
    if len(photos) < FEWEST_PHOTOS:
        raise InputError(f"{name} needs {FEWEST_PHOTOS} different photos at least, better 5, and "
                         f"there {'is' if len(photos) == 1 else 'are'} {len(photos)}")
    vectors = np.stack([vector for _, vector in photos.values()])
    if (vectors @ vectors.T).min() > ALIKE:
        raise InputError(f"the photos of {name} are too alike; take them in several places, two of "
                         "them beside other things")
    if len(photos) < 5:
        warn(f"{name} has only {len(photos)} photos; 5 are better, two of them beside other things")


def teach(embfile, clip, pupils, unlike, features, others):
    """Teaches names to a cache, beside those that it knows; one that it knows is taught anew.

    clip: the Clip of the cache. pupils: a list of (name, phrase, paths of photos). unlike: paths of
    photos that are none of them. features, others: see other_photos(). Prints what was made. Raises
    InputError.
    """
    said = cache_description(embfile)
    if said and said["clip_model"] != clip.identity:
        raise InputError(f"the cache {embfile} was made with the CLIP model {said['clip_model']}, "
                         f"not with {clip.identity}")
    before = read_taught(embfile, clip.identity, clip.dim)
    if files := [name for name, _, _ in pupils if Path(name).is_file()]:
        raise InputError(f"--teach begins with the name, and {files[0]} is a file: --teach Tom "
                         f"{files[0]} ...")
    things = [checked_thing(name, phrase) for name, phrase, _ in pupils]
    nouns = [noun_of(thing.name) for thing in things]
    if twice := {noun for noun in nouns if nouns.count(noun) > 1}:
        raise InputError(f"{min(twice)} is taught twice; give all photos to one --teach")
    apart, own, vectors = photos_of(clip, unlike, "encoding --not") if unlike else {}, set(), []
    apart_vectors = np.array([vector for _, vector in apart.values()], np.float32)
    for thing, (_, _, paths) in zip(things, pupils):
        photos = photos_of(clip, paths, f"encoding {escape_control(thing.name)}")
        require_photos(thing.name, photos)
        own |= photos.keys()
        taken = np.stack([vector for _, vector in photos.values()])
        vectors.append((taken, apart_vectors.reshape(-1, clip.dim)))
    old = [pair for pair in zip(before.things, before.vectors) if noun_of(pair[0].name) not in nouns
           ] if before else []
    taught = np.concatenate([photos for photos, _ in (*vectors, *(each for _, each in old))])
    paths, rest = other_photos(clip, features, others, own, taught, before)
    notes = Notes(clip.identity, rest, [*things, *(thing for thing, _ in old)],
                  [*vectors, *(each for _, each in old)])
    if len(notes.things) > MOST_THINGS:
        raise InputError(f"{MOST_THINGS} things can be taught at most; --untaught forgets some")
    spread, lessons = learn_all(notes.others, notes.vectors)
    reports = [report(notes, i, spread, lesson, paths) for i, lesson in enumerate(lessons)]
    write_taught(embfile, notes)
    for line in reports:
        print_safely(escape_control(line))
    names = ", ".join(thing.noun for thing in things)
    print_safely(escape_control(f"taught {names} to {embfile}: wrote {taught_path(embfile)}"))


def report(notes, i, spread, lesson, paths):
    """The line that says what a thing's photos made. paths: of the others, or None each. Raises
    InputError where the photos are not apart from the others."""
    thing = notes.things[i]
    named = int((lesson.own >= lesson.threshold).sum())
    if lesson.threshold <= 0 or not named:
        raise InputError(f"the photos of {thing.name} are not apart from others: none would be "
                         "named by the rest of them; take others, in which it is larger")
    if 2 * named < len(lesson.own):
        warn(f"{thing.name} is hardly apart from others: more or larger photos of it are better")
    wrong = np.flatnonzero(lesson.others >= lesson.threshold)
    worst = sorted(wrong, key=lambda row: -lesson.others[row])[:MOST_NAMED]
    which = [str(paths[row]) for row in worst if paths[row]]
    line = (f"{thing.name}, {thing.phrase}: would be named in {named} of {len(lesson.own)} of its "
            f"photos by the rest of them, wrongly in {len(wrong)} of {len(notes.others):,} others"
            + (f" ({', '.join(which)})" if which else ""))
    rivals = {other.name: float((photos.mean(0) - spread.mean) @ lesson.w)
              for other, (photos, _) in zip(notes.things, notes.vectors) if other != thing}
    if rivals:
        name = max(rivals, key=rivals.get)
        share = max(0.0, rivals[name] / lesson.own.mean())
        line += f"; nearest other thing: {name}, {share:.0%} of the way"
    return line


def forget(embfile, names):
    """Forgets names. Raises InputError where one was not taught."""
    notes = read_taught(embfile)
    known = [thing.name for thing in notes.things] if notes else []
    nouns = {noun_of(name) for name in names}
    if missing := [name for name in names if noun_of(name) not in map(noun_of, known)]:
        raise InputError(f"{missing[0]} was not taught to {embfile}, which knows "
                         f"{', '.join(known) or 'no names'}")
    kept = [pair for pair in zip(notes.things, notes.vectors)
            if noun_of(pair[0].name) not in nouns]
    write_taught(embfile, notes._replace(things=[thing for thing, _ in kept],
                                         vectors=[each for _, each in kept]))
    print_safely(escape_control(f"{embfile} no longer knows {', '.join(names)}"))


def noun_of(name):
    """What two names have in common that are one."""
    return fold(without_article(name))


def list_taught(embfile):
    """Prints what was taught to a cache."""
    notes = read_taught(embfile)
    lines = [f"{thing.name}, {thing.phrase}: {counted(len(photos), 'photo')}, apart from "
             f"{counted(len(unlike), 'photo')}"
             for thing, (photos, unlike) in zip(notes.things, notes.vectors)] if notes else [
        f"nothing was taught to {embfile}"]
    for line in lines:
        print_safely(escape_control(line))
