"""What the scripts share around the models: processes, safe writing, the table, images, COCO.

Nothing here imports from this project or knows a model.
"""

import glob
import hashlib
import json
import os
import signal
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import distributed

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SEPARATOR = " | "
TEXT = {"encoding": "utf-8", "newline": "\n", "errors": "backslashreplace"}  # errors: file names that are no UTF-8


class InputError(Exception):
    """What a user gave cannot be used. The message is one sentence that says what was tried and what to do."""


def run(main):
    """Runs a script's main(). InputError becomes one sentence and exit code 2, Ctrl-C one sentence and 130, and SIGTERM, which
    batch systems send before they kill, the same."""
    def stop(*_):
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # the only one that may
        signal.signal(signal.SIGTERM, stop)
    try:
        main()
        if distributed.is_initialized():
            distributed.destroy_process_group()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; finished files are whole, run the same command again to go on", file=sys.stderr)
        sys.exit(130)


# --------------------------------------------------------------------------------------------- processes

def process():
    """(rank, number of processes). It is (0, 1) unless torchrun started several; then this one joins the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def gather(things):
    """The lists of all processes one behind the other, by rank; on all of them."""
    lists = [things] * process()[1]
    if len(lists) > 1:
        distributed.all_gather_object(lists, things)
    return [thing for some in lists for thing in some]


def add_up(tensors):
    """Replaces each tensor by its sum over all processes, in one go; they all have one device and float32."""
    if process()[1] > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def first(make):
    """What make() gives on the first process, which alone looks at and writes files; on all of them."""
    rank, world = process()
    thing = [make() if rank == 0 else None]
    if world > 1:
        distributed.broadcast_object_list(thing)
    return thing[0]


# ------------------------------------------------------------------------------------------ safe writing

@contextmanager
def atomic(path, mode="w"):
    """Opens a temporary file beside path and renames it to path at the end, so that path is never half-written.

    mode: "w" (UTF-8 text) or "wb". If the body raises, path stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **({} if "b" in mode else TEXT)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_lines(path, what):
    """Lines of a text file, white space made single, without blank ones. Raises InputError."""
    try:
        lines = existing_file(path, what).read_text(encoding="utf-8-sig").splitlines()  # editors on Windows set a mark first
    except UnicodeDecodeError as error:
        raise InputError(f"the {what} {path} is not UTF-8 text") from error
    return [" ".join(line.split()) for line in lines if line.strip()]


def seed_of(*what):
    """A seed that depends on these things alone, such as --seed and an image's id, so that neighbours in a batch change nothing."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, what)).encode(errors="surrogateescape")).digest()[:7], "big")


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

    Raises OSError where the file is no whole image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that make no sense
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
                if image.mode.startswith("I;16"):  # grey; Pillow's own conversions cut it off at 255
                    shades = np.asarray(image)
                    clear = np.where(shades == image.info.get("transparency", -1), 0, 255)
                    image = Image.merge("LA", [Image.fromarray(a.astype(np.uint8)) for a in (shades >> 8, clear)])
                if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise OSError("the image is too large") from error
        except (SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise OSError(f"the image is damaged: {error}") from error


def report_bad_images(bad):
    """Names and counts the images that could not be read. bad: (path, reason) pairs."""
    if process()[0] > 0:
        return
    for path, reason in bad:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} images could not be read and were skipped", file=sys.stderr)


def list_images(paths):
    """All image files of files, folders (with subfolders) and patterns such as "photos/*.jpg", sorted within each, each once.

    Nothing is fetched: an address is no path. Raises InputError.
    """
    found = {}
    for path in map(Path, paths):
        matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not matches:
            raise InputError(f"there is no image or folder at {path}; only local files are read")
        for match in matches:
            if match.is_file():
                found[match] = None
                continue
            inside = sorted(p for p in match.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not inside:
                raise InputError(f"the folder {match} holds no images ({', '.join(IMAGE_SUFFIXES)})")
            found |= dict.fromkeys(inside)
    return [Picture(str(path), path) for path in found]


def read_annotations(path):
    """{image id: (file name, [captions])} of a COCO caption file. Raises InputError where it is none."""
    try:
        data = json.loads(existing_file(path, "caption file").read_text(encoding="utf-8"))
        images = {image["id"]: (str(image["file_name"]), []) for image in data["images"]}
        for annotation in data["annotations"]:
            if annotation["image_id"] in images:
                images[annotation["image_id"]][1].append(" ".join(annotation["caption"].split()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
