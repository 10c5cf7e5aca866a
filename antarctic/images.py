"""Image files of any origin: read upright, in RGB, within bounds."""

import os
import stat
import sys
import warnings

import numpy as np
from PIL import Image, ImageOps

from antarctic.distributed import rank_and_world
from antarctic.errors import escape_control

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"
           )  # by content, not by name; for EPS, Pillow would start Ghostscript

# of an image: Pillow needs up to 16 bytes for each, and CLIP's preprocessing 14
MOST_PIXELS = 64_000_000

MOST_BYTES = 1 << 29  # of an image's file: some formats are read whole

# times the short side of an image, which CLIP's preprocessing makes some hundred pixels long
LONGEST_SIDE = 200


def read_image(path):
    """An image file as an upright RGB picture: EXIF rotation applied, transparency laid on white,
    first frame.

    Raises OSError where the file is no whole image of one of FORMATS, or a larger one than can be
    read in a GB of memory, which is told by its header.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that make no sense
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(
                    "it is no regular file")  # but a pipe, say, where reading would wait for ever
            if status.st_size > MOST_BYTES:
                raise OSError(f"the file is too large: more than {MOST_BYTES >> 20} MB")
            with Image.open(path, formats=FORMATS) as file:
                if file.width * file.height > MOST_PIXELS:
                    raise Image.DecompressionBombError
                if max(file.size) > LONGEST_SIDE * min(file.size):
                    raise OSError(
                        f"the image is too long for its width: {file.width} x {file.height} pixels")
                ImageOps.exif_transpose(file, in_place=True)
                if not (file.mode.startswith("I;16") or file.mode in ("RGBA", "LA", "PA")
                        or "transparency" in file.info):
                    return file.convert("RGB")
                image = Image.new("RGB", file.size)
                for top in range(0, file.height,
                                 128):  # in strips, for the copies on the way need memory
                    image.paste(
                        on_white(file.crop((0, top, file.width, min(top + 128, file.height)))),
                        (0, top))
                return image
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise OSError(f"the image is too large: more than {MOST_PIXELS // 10**6} million pixels"
                          ) from error
        except (SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise OSError(f"the image is damaged: {error}") from error


def on_white(image):
    """An image that may be transparent, or of 16-bit grey, as RGB."""
    if image.mode.startswith("I;16"):  # Pillow's own conversions cut it off at 255
        shades = np.asarray(image)
        clear = np.where(shades == image.info.get("transparency", -1), 0, 255)
        image = Image.merge("LA",
                            [Image.fromarray(a.astype(np.uint8)) for a in (shades >> 8, clear)])
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def report_bad_images(bad):
    """Names and counts the images that could not be read. bad: (path, reason) pairs."""
    if rank_and_world()[0] > 0:
        return
    for path, reason in bad:
        print(f"skipped {escape_control(path)}: {escape_control(reason)}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} images could not be read and were skipped", file=sys.stderr)
