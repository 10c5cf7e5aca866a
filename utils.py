"""What the scripts share around the models: safe writing, the table, images, COCO.

Nothing here knows a model.
"""

import hashlib
import json
import os
import socket
import stat
import sys
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

import numpy as np
import torch
from PIL import Image, ImageOps

from processes import InputError, first, process, say, shown

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SEPARATOR = " | "
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # by content, not by name; for EPS, Pillow would start Ghostscript
MOST_PIXELS = 64_000_000  # of an image: Pillow needs up to 16 bytes for each, and CLIP's preprocessing 14
MOST_BYTES = 1 << 29  # of an image's file: some formats are read whole
LONGEST_SIDE = 200  # times the short side of an image, which CLIP's preprocessing makes some hundred pixels long
LONGEST_TEXT = 10_000  # characters of an entry or a caption, of which the models read 128 tokens at most
OWN_CACHE, ORIGINAL_CACHE = ("cache.txt", "cache.npy"), ("original/cache.txt", "original/cache.npy")
CHECKPOINTS = "checkpoints/best.safetensors", "original/checkpoint.ckpt"
TEXT = {"encoding": "utf-8", "newline": "\n", "errors": "backslashreplace"}  # errors: file names that are no UTF-8


# ------------------------------------------------------------------------------------------ safe writing

@contextmanager
def writing(path):
    """Around what writes the file path. Raises InputError, which names it: the disk is full, the folder may only be read."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename and Path(path).name not in str(error.filename):  # of a file read meanwhile
            raise
        raise InputError(f"cannot write {path} ({error.strerror}); finished files are whole, so once that is mended the same "
                         f"command goes on") from error


@contextmanager
def atomic(path, mode="w"):
    """Opens a temporary file beside path and renames it to path at the end, so that path is never half-written.

    mode: "w" (UTF-8 text) or "wb". If the body raises, path stays as it was. Raises InputError where the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, mode, **({} if "b" in mode else TEXT)) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def append(path, data):
    """Adds bytes to a file that grows as a run goes on; they are on the disk when this returns. Raises InputError."""
    with writing(path), open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def locked(path):
    """Holds a file as the mark that this run alone writes what it stands for, until the body ends; all processes call this.

    The lock is the system's (flock), which frees it when its process dies, by SIGKILL too; the file says who that is. What a
    dead one left half-written beside it is removed. Raises InputError where another run holds it.
    """
    path, files = Path(path), []

    def take():
        while True:
            file = open(path, "a+")
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise InputError(f"another run is writing to {path.parent}: {file.read() or 'it has just begun'}; wait until it "
                                 f"ends, or give another folder or file") from error
            except OSError:  # a file system that knows no locks
                pass
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else its holder has just removed it
                    break
        files.append(file)
        file.seek(0)
        for dead in file.read().split()[1:2]:
            for left in path.parent.glob(f".*.{dead}.tmp"):
                left.unlink(missing_ok=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()

    def take_named():
        with writing(path):
            take()

    first(take_named)
    try:
        yield
    finally:
        for file in files:
            path.unlink(missing_ok=True)
            file.close()


def staged(path):
    """Where a cache's file waits until all of them are written."""
    return Path(path).with_name(f".{Path(path).name}.new")


def finish_cache(textfile, embfile):
    """Moves the files that write_cache staged into place, also those of a run that was killed there.

    The description is staged last: where it is, all are whole. So text and embeddings are never out of step.
    """
    files = textfile, embfile, f"{embfile}.json"
    if staged(files[-1]).is_file():
        for path in files:
            with writing(path), suppress(FileNotFoundError):  # moved before
                os.replace(staged(path), path)


def write_lines(path, lines):
    """One text a line; line breaks inside a text become spaces, so that line i stays text i."""
    with atomic(path) as file:
        file.writelines(" ".join(line.split()) + "\n" for line in lines)


def write_json(path, data, indent=None):
    with atomic(path) as file:
        json.dump(data, file, ensure_ascii=False, indent=indent)
        file.write("\n")


def output_folder(path):
    """Makes a folder and proves that it can be written to, before hours of work go into it. Raises InputError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to the folder {path} ({error.strerror})") from error
    return path


def existing_file(path, what):
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no {what} at {path}")
    return path


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path, what):
    """A UTF-8 text file as it is, but for the mark that editors on Windows set first. Raises InputError."""
    try:
        return existing_file(path, what).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the {what} {path} is not UTF-8 text") from error


def one_line(text, path, most=LONGEST_TEXT):
    """A text of a file with its white space made single, fit for a tokenizer. Raises InputError where it is longer than any entry
    or caption, which tokenizers would take minutes and gigabytes for; AttributeError where it is no text."""
    text = " ".join(text.split())
    if len(text) > most:
        raise InputError(f"{path} holds a text of {len(text):,} characters ({text[:40]!r}...); {most:,} are read at most")
    return text.encode(errors="replace").decode()  # JSON can hold half a character


def read_lines(path, what, most=LONGEST_TEXT):
    """Lines of a text file, white space made single, without blank ones. Raises InputError, also for one of more than most
    characters."""
    return [one_line(line, path, most) for line in read_text(path, what).split("\n") if line.strip()]


def seed_of(*what):
    """A seed that depends on these things alone, such as --seed and an image's id, so that neighbours in a batch change nothing."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, what)).encode(errors="surrogateescape")).digest()[:7], "big")


# ------------------------------------------------------------------------ what is there by default

def choose_cache(textfile, embfile, exists):
    """The caches to read, as two lists: those that --textfile and --embfile name, else the cache in
    this folder, else the original's. Where one of the two flags is missing, the other files lie
    beside those that are named, with the same name but for the suffix.

    textfile, embfile: lists of paths, or None. exists: a function of a path. Raises InputError.
    """
    if textfile is None and embfile is None:
        textfile, embfile = default_cache(exists)
    elif embfile is None:
        embfile = beside(textfile, ".npy", "--embfile", exists)
    elif textfile is None:
        textfile = beside(embfile, ".txt", "--textfile", exists)
    return textfile, embfile


def beside(paths, suffix, flag, exists):
    """The other halves of caches, see choose_cache. flag: what would name them."""
    others = [str(Path(path).with_suffix(suffix)) for path in paths]
    missing = [path for path in others if not exists(path)]
    if missing:
        raise InputError(f"a cache is two files, and there is no {missing[0]}; {flag} names the "
                         f"other one")
    return others


def default_cache(exists):
    """The cache in this folder, else the original's, see choose_cache."""
    for textfile, embfile in (OWN_CACHE, ORIGINAL_CACHE):
        if exists(textfile) and exists(embfile):
            return [textfile], [embfile]
        for one, other in ((textfile, embfile), (embfile, textfile)):
            if exists(one):
                raise InputError(f"a cache is two files, and {one} is there without {other}; "
                                 f"move it away, or name a cache by --textfile and --embfile")
    raise InputError("there is no cache here, neither cache.txt with cache.npy nor the original's: "
                     "./download.sh --original gets that one, and compute_cache.py --datadir coco "
                     "makes one from captions")


def choose_checkpoint(ckpt, exists):
    """The checkpoint that --ckpt names, else trainer.py's, else the original's; None for "none".

    exists: a function of a path. Raises InputError.
    """
    if ckpt is not None:
        return None if ckpt == "none" else ckpt
    there = [path for path in CHECKPOINTS if exists(path)]
    if not there:
        raise InputError(f"there is no checkpoint here, neither {' nor '.join(CHECKPOINTS)}: "
                         f"./download.sh --original gets the original's, trainer.py --datadir coco "
                         f"makes one, and --ckpt none does without")
    return there[0]


def find_inputs(args):
    """Fills in --textfile, --embfile and, where a script has it, --ckpt with what is there, and
    says what was taken. Raises InputError."""
    finish_cache(*OWN_CACHE)
    given, taken = dict(vars(args)), []
    args.textfile, args.embfile = choose_cache(args.textfile, args.embfile, os.path.isfile)
    if None in (given["textfile"], given["embfile"]):
        pairs = (f"{text} with {rows}" for text, rows in zip(args.textfile, args.embfile))
        taken.append(f"the cache {' and '.join(pairs)}")
    if "ckpt" in given:
        args.ckpt = choose_checkpoint(args.ckpt, os.path.isfile)
        if given["ckpt"] is None:
            taken.append(f"the checkpoint {args.ckpt}")
    if taken and process()[0] == 0:
        say(shown(f"taken, since no other is named: {', '.join(taken)}"))


# --------------------------------------------------------------------------------------- device and dtype

def choose_device(name):
    """torch.device for "auto", "cpu", "cuda", "cuda:1", "mps"; "auto" takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # each of torchrun's processes has a GPU of its own
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the device {name} cannot be used here; try --device cpu") from error


def choose_dtype(name, device):
    """torch.float32 or torch.bfloat16; "auto" takes bfloat16 on a GPU that computes in it, float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


# -------------------------------------------------------------------------------------------------- table

def linearize(entries):
    """The table as the language model reads it: each entry followed by a bar, the last one too."""
    return "".join(entry + SEPARATOR for entry in entries)


# ------------------------------------------------------------------------------------------------- images

class Picture(NamedTuple):
    id: int | str  # COCO's number, or the path where there is none
    path: Path
    captions: tuple = ()  # the references, if any


def read_image(path):
    """An image file as an upright RGB picture: EXIF rotation applied, transparency laid on white, first frame.

    Raises OSError where the file is no whole image of one of FORMATS, or a larger one than can be read in a GB of memory, which
    is told by its header.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that make no sense
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("it is no regular file")  # but a pipe, say, where reading would wait for ever
            if status.st_size > MOST_BYTES:
                raise OSError(f"the file is too large: more than {MOST_BYTES >> 20} MB")
            with Image.open(path, formats=FORMATS) as file:
                if file.width * file.height > MOST_PIXELS:
                    raise Image.DecompressionBombError
                if max(file.size) > LONGEST_SIDE * min(file.size):
                    raise OSError(f"the image is too long for its width: {file.width} x {file.height} pixels")
                ImageOps.exif_transpose(file, in_place=True)
                if not (file.mode.startswith("I;16") or file.mode in ("RGBA", "LA", "PA") or "transparency" in file.info):
                    return file.convert("RGB")
                image = Image.new("RGB", file.size)
                for top in range(0, file.height, 128):  # in strips, for the copies on the way need memory
                    image.paste(on_white(file.crop((0, top, file.width, min(top + 128, file.height)))), (0, top))
                return image
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise OSError(f"the image is too large: more than {MOST_PIXELS // 10**6} million pixels") from error
        except (SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise OSError(f"the image is damaged: {error}") from error


def on_white(image):
    """An image that may be transparent, or of 16-bit grey, as RGB."""
    if image.mode.startswith("I;16"):  # Pillow's own conversions cut it off at 255
        shades = np.asarray(image)
        clear = np.where(shades == image.info.get("transparency", -1), 0, 255)
        image = Image.merge("LA", [Image.fromarray(a.astype(np.uint8)) for a in (shades >> 8, clear)])
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def report_bad_images(bad):
    """Names and counts the images that could not be read. bad: (path, reason) pairs."""
    if process()[0] > 0:
        return
    for path, reason in bad:
        print(f"skipped {shown(path)}: {shown(reason)}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} images could not be read and were skipped", file=sys.stderr)


def list_images(paths):
    """All image files of files, folders (with subfolders) and patterns such as "photos/*.jpg", sorted within each, each once.

    Nothing is fetched: an address is no path. Links inside a folder are followed within it alone, so that a folder from elsewhere
    shows no file of this computer; a warning tells of others, which can be named. Raises InputError.
    """
    found = {}
    for path in map(Path, paths):
        # pathlib's ** passes links by: with two links of a folder to itself, the ways through them double at each step.
        matches = [path] if path.exists() else sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        if not matches:
            raise InputError(f"there is no image or folder at {path}; only local files are read")
        for match in matches:
            if not match.is_dir():
                found[match] = None
                continue
            walk, root = [p for p in match.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES or p.is_dir()], os.path.realpath(match)
            links = {p for p in walk if p.is_symlink() and not Path(os.path.realpath(p)).is_relative_to(root)}
            inside = sorted(p for p in walk if not p.is_dir() and p not in links)
            told = (f"{len(links)} links, such as {min(links)}, lead out of the folder {match} and are not followed; name what they "
                    f"lead to, as with {match / '*'}, to have it read") if links else ""
            if not inside:
                raise InputError(told or f"the folder {match} holds no images ({', '.join(IMAGE_SUFFIXES)})")
            if told and process()[0] == 0:
                print(f"warning: {shown(told)}", file=sys.stderr)
            found |= dict.fromkeys(inside)
    return [Picture(str(path), path) for path in found]


def read_annotations(path):
    """{image id: (file name, [captions])} of a COCO caption file. Raises InputError: it is none, an image comes twice, or a file
    name leads out of the folder of images, which is not a slip but an attack."""
    images = {}
    try:
        data = json.loads(read_text(path, "caption file"))
        for image in data["images"]:
            number, name = image["id"], image["file_name"]
            if type(number) not in (int, str):
                raise TypeError(f"{number!r} is no image id")
            f"{number}{name}".encode()  # UnicodeEncodeError: half a character, which no file name holds
            if number in images:
                raise InputError(f"{path} lists the image {number!r} twice")
            if Path(name).anchor or ".." in Path(name).parts or "\0" in name:
                raise InputError(f"{path} has the file name {name!r}, which is no path inside the folder of images")
            images[number] = name, []
        for annotation in data["annotations"]:
            if annotation["image_id"] in images:
                images[annotation["image_id"]][1].append(one_line(annotation["caption"], path))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a COCO caption file ({type(error).__name__}: {error})") from error
    return images


def read_coco(datadir, split, need_images=True):
    """The images of a COCO split with their captions, in the order of their ids: a list of Picture.

    Reads DIR/annotations/captions_{split}.json alone; images are expected in DIR/{split}/ and are not opened.
    Raises InputError: a folder or file is missing (the splits that exist are named), or it is not COCO's JSON.
    """
    datadir = Path(datadir)
    if not datadir.is_dir():
        raise InputError(f"there is no data folder at {datadir}")
    path = datadir / "annotations" / f"captions_{split}.json"
    if not path.is_file():
        there = sorted(p.stem.removeprefix("captions_") for p in path.parent.glob("captions_*.json"))
        raise InputError(f"there is no split {split} in {datadir} (no {path}); there is {', '.join(there) or 'none'}")
    pictures = [Picture(image, datadir / split / name, tuple(told)) for image, (name, told) in read_annotations(path).items()]
    try:
        pictures.sort(key=lambda p: p.id)
    except TypeError as error:
        raise InputError(f"{path} is not a COCO caption file (its image ids are of two kinds)") from error
    if not pictures:
        raise InputError(f"{path} lists no images")
    if need_images and not (datadir / split).is_dir():
        raise InputError(f"there is no image folder at {datadir / split}")
    return pictures
