"""TIFF files, whose pixels may be deep, signed, floating-point, or begin at white."""

from contextlib import suppress

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

STRIP = 128  # rows of pixels of which intermediate copies are made at a time


class PlainTiff(TiffImageFile):
    """A TIFF as it is stored: Pillow would turn it while it is decoded, by exif_transpose.

    inverted: whether its deep greys begin at white, which Pillow takes for black or does not read.
    """

    def _setup(self):
        tags = self.tag_v2
        # A raw file's first image is a preview, often of the size of a stamp.
        if 50706 in tags or (330 in tags and tags.get(254, 0) & 1):  # DNG; reduced, with others
            raise OSError("it is a camera's raw file, of which only a preview could be read")
        bits = tags.get(258, (1,))
        subsampling = tags.get(530, (1, 1))
        if tags.get(262) == 6 and tags.get(259, 1) == 1 and subsampling != (1, 1):
            raise OSError("it is an uncompressed TIFF of subsampled YCbCr, which cannot be read")
        self.inverted = tags.get(262) == 0 and max(bits) > 8
        if self.inverted:
            tags[262] = 1
        try:
            super()._setup()
        except SyntaxError as error:
            kind = {1: "", 2: "signed ", 3: "floating-point "}.get(tags.get(339, (1,))[0], "odd ")
            raise OSError(f"TIFFs of {' + '.join(map(str, bits))} bits ({kind}PhotometricInterpr"
                          f"etation {tags.get(262)}) are not read: {error}") from error
        if tags.get(262) == 6 and tags.get(259, 1) == 1:  # Pillow 12 takes it for 4 bytes a pixel
            self._mode = "YCbCr"
            self.tile = [tile._replace(args=("YCbCr", *tile.args[1:])) for tile in self.tile]
        self._size = self._tile_size
        if self.mode in ("P", "PA") and max(tags[320]) < 256:  # some programs write 8 bits of 16
            self.palette.palette = bytes(tags[320])

    def load_end(self):
        with suppress(Exception):  # of anything that is odd in it
            self.getexif()  # kept: after this the file cannot be read any more


def grey_tiff(file):
    """A TIFF of signed numbers or of more than 8 bits of grey as 8 bits, any other as it is.

    Unsigned numbers go from black to white over the range of their bits. Raises OSError where
    signed or floating-point ones do not say what is black and white, or leave that range.
    """
    signed = file.tag_v2.get(339, (1,))[0] != 1
    if not (signed or file.mode[0] in "IF"):
        return file
    bits, dtype = file.tag_v2.get(258, (1,))[0], np.dtype(np.uint32)
    if signed:
        if len(file.getbands()) > 1:
            raise OSError("colours of signed or floating-point numbers are not read")
        low, high = (np.max(file.tag_v2.get(tag, np.nan)) for tag in (340, 341))  # SMin, SMax
        if not -np.inf < low < high < np.inf:
            raise OSError("its signed or floating-point numbers do not say which are black and "
                          "white (SMinSampleValue, SMaxSampleValue)")
    grey = Image.new("L", file.size)
    for top, strip in strips(file):
        values = np.asarray(strip)
        if not signed:
            if file.mode == "I":
                values = values.view(dtype)
            levels = values >> (bits - 8)
        else:
            values = values.view(np.int8) if file.mode == "L" else values
            if not ((values >= low) & (values <= high)).all():  # not a number neither
                raise OSError(f"it has values outside its range from {low:g} to {high:g}")
            levels = np.rint((values.astype(float) - low) / (high - low) * 255)
        levels = levels.astype(np.uint8)
        grey.paste(Image.fromarray(255 - levels if file.inverted else levels), (0, top))
    return grey


def strips(image):
    """(top, part) of an image, some rows at a time: intermediate copies need memory."""
    for top in range(0, image.height, STRIP):
        yield top, image.crop((0, top, image.width, min(top + STRIP, image.height)))
