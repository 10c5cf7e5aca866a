"""Image files of any origin: read upright, in RGB, within bounds."""

import os
import stat
import warnings

import numpy as np
from PIL import Image, ImageOps

from antarctic.distributed import rank_and_world
from antarctic.errors import escape_control, print_safely

# Files are recognized by content, not by name. EPS is left out: Pillow would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# Of an image. Pillow needs up to 16 bytes a pixel, and CLIP's preprocessing 14.
MOST_PIXELS = 64_000_000
MOST_BYTES = 1 << 29  # of an image file: some formats are read whole
# As a multiple of the short side, which CLIP's preprocessing resizes to some hundred pixels.
LONGEST_SIDE = 200
STRIP = 128  # rows of pixels that are laid on white at a time


def read_image(path):
    """An image file as an upright RGB picture: EXIF rotation applied, transparency laid on white,
    first frame.

    Raises OSError where the file is not a whole image of one of FORMATS, or its header says that it
    is too large to be read in a GB of memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # reading a pipe, say, could wait forever
                raise OSError("it is no regular file")
            if status.st_size > MOST_BYTES:
                raise OSError(f"the file is too large: more than {MOST_BYTES >> 20} MB")
            with Image.open(path, formats=FORMATS) as file:
                return upright_rgb(file)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            millions = MOST_PIXELS // 10**6
            raise OSError(f"the image is too large: more than {millions} million pixels") from error
        except (SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError,
                OverflowError) as error:
            raise OSError(f"the image is damaged: {error}") from error


def upright_rgb(file):
    """An image that Pillow has opened, upright and in RGB. Raises what Pillow raises, and OSError
    or DecompressionBombError where the image is too large."""
    if file.width * file.height > MOST_PIXELS:
        raise Image.DecompressionBombError
    if max(file.size) > LONGEST_SIDE * min(file.size):
        raise OSError(f"the image is too long for its width: {file.width} x {file.height} pixels")
    ImageOps.exif_transpose(file, in_place=True)
    is_grey16 = file.mode.startswith("I;16")
    if not (is_grey16 or file.mode in ("RGBA", "LA", "PA") or "transparency" in file.info):
        return file.convert("RGB")
    image = Image.new("RGB", file.size)
    for top in range(0, file.height, STRIP):  # the intermediate copies need memory
        strip = file.crop((0, top, file.width, min(top + STRIP, file.height)))
        image.paste(on_white(strip), (0, top))
    return image


def on_white(image):
    """An image in RGB, which may have been transparent or of 16-bit grey."""
    if image.mode.startswith("I;16"):  # Pillow's own conversions clip it at 255
        shades = np.asarray(image)
        alpha = np.where(shades == image.info.get("transparency", -1), 0, 255)
        bands = [Image.fromarray(band.astype(np.uint8)) for band in (shades >> 8, alpha)]
        image = Image.merge("LA", bands)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def report_bad_images(bad):
    """Lists and counts the images that could not be read, on rank 0. bad: (path, reason) pairs."""
    if rank_and_world()[0] > 0:
        return
    for path, reason in bad:
        print_safely(f"skipped {escape_control(path)}: {escape_control(reason)}", "stderr")
    if bad:
        print_safely(f"{len(bad)} images could not be read and were skipped", "stderr")
