"""Image files by path: folders, patterns and lists of paths."""

import fnmatch
import os
import sys
from pathlib import Path
from typing import NamedTuple

from antarctic.bounded import read_bytes
from antarctic.distributed import warn
from antarctic.errors import InputError, counted
from antarctic.files import reason_of

# What looks like an image. Files that cannot be read are named in the end, not passed over.
IMAGE_SUFFIXES = frozenset("""
.jpg .jpeg .jpe .jfif .jif .pjpeg .pjp .mpo .png .apng .webp .bmp .dib .tif .tiff .gif .avif .avifs
.heic .heif .heics .heifs .hif .jp2 .j2k .j2c .jpc .jpf .jpx .jxl .jxr .hdp .wdp .jls
.psd .psb .xcf .svg .svgz .ico .icns .cur .tga .icb .vda .vst .pcx .dcx .ppm .pgm .pbm .pnm .pfm
.pam .qoi .dds .sgi .xbm .xpm .exr .hdr .eps .wmf .emf .fits
.dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .raf .orf .rw2 .pef .srw .raw .rwl .3fr .iiq .x3f .kdc
.dcr .mrw .erf .mef .mos
""".split())
# Folders of thumbnails, of deleted files and of what other systems note beside files.
ASIDE = {"@eadir", "__macosx", "$recycle.bin", "#recycle", "system volume information"}


class Picture(NamedTuple):
    id: int | str  # COCO's number, or the path where there is none
    path: Path
    captions: tuple = ()  # the references, if any
    sha256: str = ""  # of the file, 64 hexadecimal digits, once it was read

    @property
    def seed(self):
        """What seeds its samples: the id that a data set gives it, else its content, so that
        captions stay the same where a file is moved."""
        return self.sha256 if self.id == str(self.path) else self.id

    @property
    def key(self):
        """What stands for the image as far as captions go."""
        return f"{self.seed}/{self.sha256}"


def list_images(paths, skip=False):
    """The images of files, folders (with subfolders) and patterns such as "photos/*.jpg".

    Returns a list of Picture, sorted within each path, each image once. Nothing is fetched: URLs
    are not paths. Links inside a folder are followed only within it, so that a folder from
    elsewhere cannot show a file of this computer. A warning counts the others, which can be named
    as paths. Hidden images (see is_hidden) are read only where a path names them or their folder,
    and a warning counts the others. skip: paths where nothing is are listed as they are, so that
    they are told of with the images that cannot be read, and do not end a run of millions. Raises
    InputError where a path has no image.
    """
    images, hidden = {}, {}  # {absolute path: path}
    for path in map(Path, paths):
        matches = matching(path)
        if not matches and skip:
            images.setdefault(os.path.abspath(path), path)
        elif not matches:
            raise InputError(f"there is no image or folder at {path}; only local files are read")
        for match in matches:
            inside, passed_over = [match], []
            if is_hidden(match, path.parts):
                inside, passed_over = [], [match]
            elif match.is_dir():
                inside, passed_over = folder_images(match)
            for image in inside:
                images.setdefault(os.path.abspath(image), image)
            hidden |= {os.path.abspath(other): other for other in passed_over}
    hidden = sorted(other for place, other in hidden.items() if place not in images)
    example = f"such as {hidden[0]}" if hidden else ""
    if not images:
        places = ", ".join(map(str, paths[:5]))
        raise InputError(f"there are only hidden images and folders at {places}, {example}; "
                         f"name them to read them")
    if hidden:
        warn(f"{len(hidden)} hidden images and thumbnails, {example}, are passed over; name them "
             f"or their folder to read them")
    return [Picture(str(path), path) for path in images.values()]


def read_paths(path):
    """The paths that a file lists, one a line, or with a NUL behind each, as `find -print0` writes
    them. path: "-" is standard input. Raises InputError where the file lists none."""
    if path == "-":
        content = sys.stdin.buffer.read()
    else:
        content = read_bytes(path, "list of images")
    separator = b"\0" if b"\0" in content else b"\n"
    paths = [os.fsdecode(line.removesuffix(b"\r") if separator == b"\n" else line)
             for line in content.split(separator)]
    paths = [line for line in paths if line]
    if not paths:
        raise InputError(f"there is no path in {'standard input' if path == '-' else path}")
    return paths


def is_hidden(path, pattern=()):
    """Whether a path is hidden, or in a folder of thumbnails or deleted files, unless a part of
    pattern names it."""
    def aside(part):
        return part.startswith(".") and part not in (".", "..") or part.lower() in ASIDE

    named = [part for part in pattern if aside(part)]
    return any(aside(part) and not any(fnmatch.fnmatch(part, name) for name in named)
               for part in path.parts)


def matching(path):
    """The files and folders that a path means, sorted: itself where it exists.

    Otherwise the parts that do not exist are patterns, so a bracket or star in a folder's name
    stands for itself.
    """
    matches = [Path(path.anchor)]
    for part in path.relative_to(path.anchor).parts:
        deeper = {}  # as an ordered set
        for folder in matches:
            # os.path.exists raises nothing where a name is too long.
            if os.path.exists(folder / part):
                deeper[folder / part] = None
            elif any(c in part for c in "*?["):
                # pathlib's ** does not follow links: two links of a folder to itself would double
                # the number of ways at each step.
                deeper |= dict.fromkeys(folder.glob(part))
        matches = list(deeper)
    return sorted(matches)


def folder_images(folder):
    """The paths of a folder's images: (those to read, sorted; hidden ones, see is_hidden). Raises
    InputError where there are none to read.

    Links that lead out of the folder are left out, with a warning.
    """
    unreadable, walk = [], []  # OSErrors; paths of images and folders
    for place, folders, files in os.walk(folder, onerror=unreadable.append):
        walk += [Path(place, name) for name in folders]
        walk += [Path(place, name) for name in files
                 if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    hidden = [p for p in walk if is_hidden(p.relative_to(folder))]
    walk = sorted(set(walk) - set(hidden))
    hidden = [p for p in hidden if not p.is_dir()]
    root = os.path.realpath(folder)
    outside = {p for p in walk
               if p.is_symlink() and not Path(os.path.realpath(p)).is_relative_to(root)}
    inside = [p for p in walk if not p.is_dir() and p not in outside]
    message = f"the folder {folder} holds no images (.jpg, .png, .heic ...)"
    if hidden:
        message += f" but {len(hidden)} hidden ones, such as {min(hidden)}; name them to read them"
    if outside:
        message = (f"{len(outside)} links, such as {min(outside)}, lead out of the folder {folder} "
                   f"and are not followed; name them to read them, as with {folder / '*'}")
    if unreadable:
        first = unreadable[0]
        reason = (f"{counted(len(unreadable), 'folder')}, such as {first.filename}, cannot be read "
                  f"({reason_of(first)})")
        if not inside:
            raise InputError(reason)
        warn(f"{reason}; what is in there is passed over")
    if not inside:
        raise InputError(message)
    if outside:
        warn(message)
    return inside, hidden
