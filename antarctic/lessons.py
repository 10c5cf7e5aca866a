"""Teaching names from photos: what compute_cache.py --teach, --untaught and --taught do."""

import os
from pathlib import Path

from tqdm import tqdm

from antarctic.cache_files import cache_description
from antarctic.distributed import warn
from antarctic.errors import InputError, counted, escape_control, print_safely
from antarctic.feature_files import whole_rows
from antarctic.features import encode_files, encoder_of, report_bad_images
from antarctic.folders import list_images, matching
from antarctic.taught import Taught, checked_thing, noun_of
from antarctic.taught_files import MOST_OTHERS, read_taught, taught_path, thinned, write_taught
from antarctic.verdicts import judge, notes_with, pupil_of

USUAL_FOLDERS = "results", "checkpoints"  # where sampler.py and trainer.py keep image vectors
MOST_SHOWN = 8  # of photos that are bad, or would wrongly get a name


# ---------------------------------------------------------------------------------------- photos

def photos_of(clip, paths, what, skip=False, kept=None):
    """{digest: (path, vector)} of the images of files and folders, each once. what: what they are,
    for a bar. One that cannot be read raises InputError; with skip it is left out and told of, and
    2 * MOST_OTHERS images are read at most. kept: {digest: (path, vector)} of images that need not
    be encoded."""
    paths, kept = [picture.path for picture in list_images(paths)], kept or {}
    if skip:
        paths = thinned(paths, 2 * MOST_OTHERS)
    with tqdm(total=len(paths), desc=what, unit="image") as bar:
        digests, vectors, bad = encode_files(clip, paths, 64, bar, kept.keys())
    if skip:
        report_bad_images([(paths[i], reason) for i, (reason, _) in sorted(bad.items())],
                          MOST_SHOWN)
    elif bad:
        i, (reason, _) = min(bad.items())
        raise InputError(f"the photo {paths[i]} cannot be read ({reason}), so nothing was taught; "
                         "leave it out, or mend it")
    vectors |= {digest: kept[digest][1] for digest in kept.keys() & set(digests)}
    return {digest: (path, vectors[digest]) for digest, path in zip(digests, paths) if digest}


def kept_vectors(clip, folders):
    """{digest: (None, vector)} of images that earlier runs have encoded by this CLIP. folders: of
    the sampler or the trainer, or None for their usual ones."""
    found = {}
    require_others(folders, ())
    for folder in map(Path, folders or filter(Path.is_dir, map(Path, USUAL_FOLDERS))):
        for path in sorted(folder.glob(f"features-{encoder_of(clip)}-*")):
            for _, digest, vector in whole_rows(path, clip.dim):
                found.setdefault(digest, (None, vector))
    return found


def other_photos(clip, features, paths):
    """[(path or None, vector)] of photos of other things, which may hold those that are taught, at
    most 2 * MOST_OTHERS. features, paths: --features and --others."""
    found = kept = kept_vectors(clip, features)
    if paths:
        photos = photos_of(clip, paths, "encoding other photos", True, kept)
        found = kept | photos if features else photos
    return [found[digest] for digest in thinned(sorted(found), 2 * MOST_OTHERS)]


def require_others(features, paths):
    """Raises InputError where --features or --others name nothing, before anything is loaded."""
    for folder in features or ():
        if not os.path.isdir(folder):
            raise InputError(f"there is no folder {folder}; --features names one where sampler.py "
                             "or trainer.py has kept image vectors")
    for path in paths or ():
        if not matching(Path(path)):
            raise InputError(f"there is no image or folder at {path}; --others names photos of "
                             "other things, or their folders")


# --------------------------------------------------------------------------- what the flags do

def teach(embfile, clip, pupils, unlike, features, others):
    """Teaches names to a cache, beside those that it knows; one that it knows is taught anew.

    clip: the Clip of the cache. pupils: a list of (name, phrase, paths of photos). unlike: paths of
    photos that are none of them. features, others: see other_photos(). Prints what was made. Raises
    InputError.
    """
    require_others(features, others)
    said = cache_description(embfile)
    if said and said["clip_model"] != clip.identity:
        raise InputError(f"the cache {embfile} was made with the CLIP model {said['clip_model']}, "
                         f"not with {clip.identity}")
    before = read_taught(embfile, clip.identity, clip.dim)
    if paths := [name for name, _, _ in pupils if is_path(name)]:
        raise InputError(f"--teach begins with the name, and {paths[0]} is a file or folder: "
                         f"--teach Tom {paths[0]} ...")
    for name, phrase, _ in pupils:  # before anything is encoded
        checked_thing(name, phrase)

    def vectors_of(paths, what):
        found = photos_of(clip, paths, f"encoding {escape_control(what)}") if paths else {}
        return [vector for _, vector in found.values()]

    apart = vectors_of(unlike, "--not")
    pupils = [pupil_of(name, phrase, vectors_of(paths, name), apart)
              for name, phrase, paths in pupils]
    notes, paths = notes_with(clip, pupils, other_photos(clip, features, others), before)
    taught = Taught(notes)
    verdicts = [judge(taught, i) for i in range(len(notes.things))]
    write_taught(embfile, notes)
    for remark in dict.fromkeys(remark for verdict in verdicts for remark in verdict.remarks):
        warn(remark)
    for verdict in verdicts:
        print_safely(escape_control(str(verdict)))
        if which := [str(paths[row]) for row in verdict.wrong if paths[row]][:MOST_SHOWN]:
            print_safely(escape_control(f"would wrongly be {verdict.thing.name}: "
                                        f"{', '.join(which)}"))
    names = ", ".join(pupil.thing.noun for pupil in pupils)
    print_safely(escape_control(f"taught {names} to {embfile}: wrote {taught_path(embfile)}"))


def is_path(name):
    """Whether a name is a file, or a folder as a shell completes it: one may be called Tom."""
    return os.path.isfile(name) or os.sep in name and os.path.isdir(name)


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


def list_taught(embfile):
    """Prints what was taught to a cache."""
    notes = read_taught(embfile)
    lines = [f"{thing.name}, {thing.phrase}: {counted(len(photos), 'photo')}, apart from "
             f"{counted(len(unlike), 'photo')}"
             for thing, (photos, unlike) in zip(notes.things, notes.vectors)] if notes else [
        f"nothing was taught to {embfile}"]
    for line in lines:
        print_safely(escape_control(line))
