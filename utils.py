"""What the scripts share around the models: the cache on disk, search, the table, images, COCO, safe writing.

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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

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
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; finished files are whole, run the same command again to go on", file=sys.stderr)
        sys.exit(130)


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
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the device {name} cannot be used here; try --device cpu") from error


def choose_dtype(name, device):
    """torch.float32 or torch.bfloat16; "auto" takes bfloat16 on a GPU that computes in it, float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


# -------------------------------------------------------------------------------------------------- cache

def file_sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


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
            with suppress(FileNotFoundError):  # moved before
                os.replace(staged(path), path)


def write_cache(textfile, embfile, entries, embeddings, clip_model, prefix):
    """Writes entries (one a line), embeddings (entries, dim) float32 .npy, and what they were made with (.npy.json).

    All of them or none come into place (finish_cache). The JSON holds the text's sha256, so that files of two runs
    are never taken for one cache.
    """
    write_lines(staged(textfile), entries)
    with atomic(staged(embfile), "wb") as file:
        np.save(file, np.ascontiguousarray(embeddings, dtype=np.float32))
    write_json(staged(f"{embfile}.json"), {"clip_model": clip_model, "dim": int(embeddings.shape[1]), "entries": len(entries),
                                           "prefix": prefix, "text_sha256": file_sha256(staged(textfile))}, indent=1)
    finish_cache(textfile, embfile)


def existing_caches(textfiles, embfiles):
    """Pairs of paths (text, embeddings), after a look whether they are there. Raises InputError."""
    if len(textfiles) != len(embfiles):
        raise InputError(f"{len(textfiles)} --textfile stand beside {len(embfiles)} --embfile; they go in pairs")
    pairs = []
    for textfile, embfile in zip(textfiles, embfiles):
        finish_cache(textfile, embfile)
        pairs.append((existing_file(textfile, "cache text"), existing_file(embfile, "cache embeddings")))
    return pairs


def read_cache(textfiles, embfiles, clip_model, dim=None):
    """Reads caches one after the other as one; an entry that comes again is kept once, at its first place.

    textfiles, embfiles: paths, in pairs. clip_model, dim: identity and width of the CLIP in use (Clip.identity, Clip.dim).
    Returns (entries, a list of N texts; embeddings, float32 tensor (N, dim) of unit rows).
    Raises InputError: a file is missing or empty, lengths differ, another CLIP model or text, not finite.
    """
    entries, parts, seen = [], [], set()
    for textfile, embfile in existing_caches(textfiles, embfiles):
        lines, rows = read_one_cache(textfile, embfile, clip_model)
        if rows.shape[1] != (dim or rows.shape[1]):
            raise InputError(f"{embfile} has {rows.shape[1]} dimensions, but the CLIP model {clip_model} has {dim}")
        if parts and rows.shape[1] != parts[0].shape[1]:
            raise InputError(f"{embfile} has {rows.shape[1]} dimensions, but {embfiles[0]} has {parts[0].shape[1]}: not of one CLIP model")
        fresh = [i for i, line in enumerate(lines) if not (line in seen or seen.add(line))]
        entries += [lines[i] for i in fresh]
        parts.append(torch.from_numpy(rows[fresh] if len(fresh) < len(lines) else rows))
    return entries, parts[0] if len(parts) == 1 else torch.cat(parts)


def cache_description(embfile):
    """What write_cache noted beside the embeddings, a dict; None where there is nothing. Raises InputError."""
    side = Path(f"{embfile}.json")
    if not side.is_file():
        return None
    try:
        made = json.loads(side.read_text(encoding="utf-8"))
        return {name: made[name] + "" for name in ("clip_model", "text_sha256", "prefix")}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{side} is not the description of a cache; delete it to load the cache unchecked") from error


def read_one_cache(textfile, embfile, clip_model):
    """One cache, checked: (lines, float32 array (lines, dim)). Raises InputError, see read_cache."""
    try:
        text = textfile.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{textfile} is not UTF-8 text") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise InputError(f"the cache {textfile} is empty")
    try:
        with open(embfile, "rb") as file:  # not np.load, which opens archives, too
            rows = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{embfile} is not a .npy file of numbers") from error
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.floating):
        raise InputError(f"{embfile} does not hold a table of real numbers, one row an entry")
    if len(lines) != len(rows):
        raise InputError(f"{textfile} has {len(lines)} entries, but {embfile} has {len(rows)} rows: not the same cache")
    made = cache_description(embfile)
    if made is None:
        print(f"warning: {embfile}.json is missing, so it is not checked that {embfile} was made with {clip_model}", file=sys.stderr)
    elif made["clip_model"] != clip_model:
        raise InputError(f"the cache {embfile} was made with the CLIP model {made['clip_model']}, not with {clip_model}")
    elif made["text_sha256"] != file_sha256(textfile):
        raise InputError(f"{textfile} is not the text that {embfile} was made from; compute the cache again")
    rows = rows.astype(np.float32, copy=False)
    if not np.isfinite(rows).all():
        raise InputError(f"{embfile} holds values that are not finite; compute the cache again")
    return lines, rows


def search(queries, embeddings, k, chunk=16384):
    """The k nearest rows by inner product, best first; a tie goes to the lower index within a chunk.

    queries: (B, dim) float32. embeddings: (N, dim) float32. Returns (scores (B, k), indices (B, k) int64), k <= N.
    Only B x chunk products exist at a time, so memory does not grow with N.
    """
    k = min(k, len(embeddings))
    best = indices = None
    for start in range(0, len(embeddings), chunk):
        scores = queries @ embeddings[start:start + chunk].T  # (B, chunk)
        top, where = scores.topk(min(k, scores.shape[1]), dim=1)
        where = where + start
        if best is not None:
            top, where = torch.cat((best, top), 1), torch.cat((indices, where), 1)
            top, order = top.topk(min(k, top.shape[1]), dim=1)
            where = where.gather(1, order)
        best, indices = top, where
    return best, indices  # (B, k), (B, k) indices into the cache


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
