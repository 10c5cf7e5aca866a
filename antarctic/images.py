"""Image files of any origin: read upright, in RGB, within bounds, as a viewer shows them."""

import contextlib
import errno
import importlib.util
import io
import os
import re
import struct

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from antarctic import tars
from antarctic.pillow_state import PILLOW_WARNINGS, SETTINGS_LOCK, pillow_settings
from antarctic.reads import passes, persistent, read_regular, too_large
from antarctic.tiffs import PlainTiff, grey_tiff, strips

# Files are recognized by content, not by name. Beside these, JPEG (MPO too), TIFF and HEIC are
# read, see open_image. Each of them says its size before it is decoded, and is decoded by a library
# that browsers use as well. EPS, PDF and WMF are left out, which would start other programs, and
# what is rare in albums or has no such bounds: PSD, JPEG 2000, SVG, cameras' raw files.
FORMATS = ("PNG", "WEBP", "BMP", "GIF", "AVIF")
READABLE = "JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or HEIC"
HEIF_SUFFIXES = (".heic", ".heif", ".heics", ".heifs", ".hif")
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1",
               b"msf1"}
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Of an image. Pillow needs up to 16 bytes a pixel, and CLIP's preprocessing 14.
MOST_PIXELS = 64_000_000
MOST_BYTES = 1 << 29  # of an image file: some formats are read whole
# As a multiple of the short side, which CLIP's preprocessing resizes to some hundred pixels.
LONGEST_SIDE = 200
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(file, max_pixels=MOST_PIXELS, truncated=False, room=None):
    """An image file as an upright RGB picture: EXIF rotation applied, transparency laid on white,
    first frame.

    file: a path, or the file's bytes. truncated: a JPEG or PNG that is cut off is read as far as it
    goes, and the rest is grey. Raises OSError, with the reason as its text, where the file is not a
    whole image of a READABLE format, its pixels have no defined brightness, or its header says that
    it has more than max_pixels; one that reads.passes() tells where the file could not be read,
    whatever it holds. room: a function that is called with the number of pixels before they are
    decoded. Threads may call this at once, all with the same settings: of those with another
    max_pixels or truncated one decodes at a time, since Pillow's settings, which all threads share,
    change meanwhile.
    """
    stream = io.BytesIO(file if isinstance(file, bytes) else read_bytes(file))
    limit = max_pixels if max_pixels > MOST_PIXELS else None
    alone = SETTINGS_LOCK if limit or truncated else contextlib.nullcontext()
    with decoding_errors(max_pixels), alone, pillow_settings(limit):
        try:
            image, orientation = decode(stream, max_pixels, room=room)
        except Exception:
            if not truncated:
                raise
            with pillow_settings(limit, True):
                image, orientation = decode(stream, max_pixels, truncated)
        return turned(image, orientation)


def read_bytes(path):
    """The bytes of an image file, whose path may be that of a tar file's member, see tars. They are
    read at once, so that no error of the disk can look like one of the image, and what is decoded
    is what was hashed. Raises OSError where it is no regular file, is too large or cannot be
    read."""
    def read():
        member = tars.member_at(path)
        if member is None:
            return read_regular(path, MOST_BYTES)
        tar, status, offset, size = member
        if size > MOST_BYTES:
            raise OSError(too_large(MOST_BYTES))
        with open(tar, "rb") as file:
            now = os.fstat(file.fileno())
            if (now.st_size, now.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
                raise OSError(errno.ESTALE, f"{tar} changes while it is read")
            return tars.read_member(file, offset, size)

    return persistent(read)


def file_status(path):
    """What changes when an image file does: [bytes, time of change in ns], for a tar file's member
    [bytes, the tar file's time of change, offset in it]. Raises OSError where it is missing."""
    member = tars.member_at(path)
    if member is None:
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]
    _, status, offset, size = member
    return [size, status.st_mtime_ns, offset]


def is_image(path):
    """Whether a file begins as an image does that read_image reads, or cannot be read now, so that
    it may be one."""
    try:
        with decoding_errors(MOST_PIXELS):
            open_image(io.BytesIO(read_bytes(path)))
        return True
    except OSError as error:
        return passes(error)


def read_opened(image):
    """A PIL image as read_image gives its file: upright, on white, in RGB. The image itself stays
    as it is. Raises OSError as read_image."""
    with decoding_errors(MOST_PIXELS):
        check_size(image, MOST_PIXELS)
        copy = image.copy()
        copy.format = image.format
        return turned(to_rgb(copy), orientation_of(copy))


@contextlib.contextmanager
def decoding_errors(max_pixels):
    """Around the decoding of an image: OSError with the reason for whatever a library raises."""
    with PILLOW_WARNINGS:
        try:
            yield
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise OSError(f"the image is too large: more than {max_pixels / 1e6:g} million "
                          f"pixels") from error
        except UnidentifiedImageError as error:
            raise OSError(f"cannot identify it as {READABLE}") from error
        except (OSError, MemoryError):
            raise
        except Exception as error:  # it costs one image and not the run
            text = str(error) or type(error).__name__
            raise OSError(f"the image is damaged: {text}") from error


def turned(image, orientation):
    """An image turned upright. Pillow's exif_transpose would also rewrite the EXIF, and fail at any
    tag that is odd."""
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def decode(stream, max_pixels, truncated=False, room=None):
    """(an open file's picture in RGB as it is stored, its orientation as in EXIF). Raises what the
    libraries raise, and OSError or DecompressionBombError where the image is too large."""
    file = open_image(stream, truncated)
    check_size(file, max_pixels)
    if room is not None:
        room(file.width * file.height)
    shade = png_shade(file) if file.format == "PNG" else None
    if truncated:
        file.im = Image.new(file.mode, file.size, grey_of(file)).im
    file.load()
    check_size(file, max_pixels)  # HEIC has it twice
    if shade is not None:
        file.info["transparency"] = shade
    orientation = orientation_of(file)
    return to_rgb(grey_tiff(file) if file.format == "TIFF" else file), orientation


def check_size(file, max_pixels):
    if file.width * file.height > max_pixels:
        raise Image.DecompressionBombError
    if not min(file.size):
        raise OSError("the image has no pixels")
    if max(file.size) > LONGEST_SIDE * min(file.size):
        raise OSError(f"the image is too long for its width: {file.width} x {file.height} pixels")


# ---------------------------------------------------------------------------------------- formats

def open_image(stream, truncated=False):
    """A file as Pillow's image, told by its content and not yet decoded. truncated: JPEG and PNG
    alone. Raises what Pillow raises."""
    stream.seek(0)
    head = stream.read(1024)
    stream.seek(0)
    if head.startswith(b"\xff\xd8\xff"):
        return PlainJpeg(stream)
    if truncated:
        return Image.open(stream, formats=["PNG"])
    if head.startswith(TIFF_HEADS):
        return PlainTiff(stream)
    if head[4:8] != b"ftyp":
        return Image.open(stream, formats=FORMATS)
    length = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[i:i + 4] for i in (8, *range(16, length, 4))}
    opener = open_avif
    if not brands & {b"avif", b"avis"} and brands & HEIF_BRANDS:
        opener = open_heif
    try:
        return opener(stream)
    except Exception:
        # Both libraries read the EXIF, which may be odd, though it has no say in how to turn these.
        stream.seek(0)
        hidden = re.sub(rb"(?s)(infe[\2\3].{7,9}?)Exif", rb"\1none", stream.read())
        return opener(io.BytesIO(hidden))


def open_avif(stream):
    return Image.open(stream, formats=["AVIF"])


def open_heif(stream):
    if not reads_heif():
        raise OSError("HEIC is read by the package pillow-heif, which is not installed")
    # Not registered in Pillow, whose other users in this process did not ask for it.
    from pillow_heif.as_plugin import HeifImageFile
    return HeifImageFile(stream)


def reads_heif():
    """Whether the package that reads HEIC is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


class PlainJpeg(JpegImageFile):
    """The first picture of a JPEG, whatever its tables of other pictures (MPO) and its EXIF
    hold."""

    def _read_dpi_from_exif(self):
        pass


def png_shade(file):
    """The transparent shade or colour of a PNG, as its pixels of 8 bits have it; None where that is
    what Pillow says."""
    shade, rawmode = file.info.get("transparency"), file.tile[0].args if file.tile else None
    if isinstance(shade, int) and rawmode in ("L;2", "L;4"):
        return shade * {"L;2": 85, "L;4": 17}[rawmode]
    if isinstance(shade, tuple) and rawmode == "RGB;16B":
        return tuple(value >> 8 for value in shade)
    return None


def grey_of(file):
    """A pixel of medium grey for an image that Pillow has opened, or the nearest one that it
    has."""
    if file.mode == "P":
        colours = np.frombuffer(file.palette.palette, np.uint8).reshape(-1, 3).astype(int)
        return int(np.abs(colours - 128).sum(1).argmin())
    return {"1": 1, "L": 128, "I;16": 1 << 15, "LA": (128, 255), "RGB": (128,) * 3,
            "RGBA": (128, 128, 128, 255), "CMYK": (0, 0, 0, 127)}[file.mode]


# ------------------------------------------------------------------------------------ orientation

def orientation_of(file):
    """The orientation of a decoded file as in EXIF: 2 to 8 ask for a turn. What cannot be read asks
    for none."""
    if file.format == "HEIF":  # its library has turned it
        return 1
    if file.format == "AVIF":
        file.info.pop("xmp", None)  # has no say: Pillow's EXIF tells the container's own turn
    else:
        try:
            return exif_orientation(file.info["exif"])
        except (LookupError, struct.error, TypeError):
            pass
    try:  # a TIFF's own tag, or XMP
        return file.getexif().get(ORIENTATION, 1)
    except Exception:  # of anything that Pillow cannot read in it
        return 1


def exif_orientation(exif):
    """The orientation in the bytes of an EXIF, whatever else these hold: Pillow stops reading at
    the first tag that points outside. Raises LookupError or struct.error where there is none."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}[exif[:2]]
    start, = struct.unpack_from(order + "I", exif, 4)
    number, = struct.unpack_from(order + "H", exif, start)
    for at in range(start + 2, start + 2 + 12 * number, 12):
        if struct.unpack_from(order + "HHI", exif, at) == (ORIENTATION, 3, 1):
            return struct.unpack_from(order + "H", exif, at + 8)[0]
    raise LookupError("no orientation")


# ------------------------------------------------------------------------------------------- modes

def to_rgb(image):
    """A Pillow image of any mode in RGB, on white where it is transparent. Raises OSError where its
    mode does not say what is white."""
    if image.mode in ("I", "F"):  # Pillow's conversion would cut them off at 0 and 255
        raise OSError(f"pixels of Pillow's mode {image.mode} do not say which are black and white")
    if not (image.mode.startswith("I;16") or image.has_transparency_data):
        # A copy would make the allocator give memory back at each image, which doubles the time.
        return image if image.mode == "RGB" else image.convert("RGB")
    picture = Image.new("RGB", image.size)
    for top, strip in strips(image):
        picture.paste(on_white(strip), (0, top))
    return picture


def on_white(image):
    """An image in RGB, which may have been transparent or of 16-bit grey."""
    if image.mode.startswith("I;16"):  # Pillow's own conversions clip it at 255
        shades = np.asarray(image)
        alpha = np.where(shades == image.info.get("transparency", -1), 0, 255)
        bands = [Image.fromarray(band.astype(np.uint8)) for band in (shades >> 8, alpha)]
        image = Image.merge("LA", bands)
    if image.mode == "La":  # its shades are multiplied by alpha
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
