"""What Pillow and Python keep for a whole process while one thread of it decodes an image: settings
and filters of warnings."""

import contextlib
import threading
import warnings

from PIL import Image, ImageFile


class PillowWarnings:
    """A context of threads that decode images: as long as one of them is in it, warnings of invalid
    metadata are silent and one of too many pixels is an error. Python's own context would bring the
    filters of one thread back while another decodes, and then keep these."""

    def __init__(self):
        self.lock, self.users, self.filters = threading.Lock(), 0, None

    def __enter__(self):
        with self.lock:
            self.users += 1
            if self.users == 1:
                self.filters = warnings.catch_warnings()
                self.filters.__enter__()
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)

    def __exit__(self, *_):
        with self.lock:
            self.users -= 1
            if not self.users:
                self.filters.__exit__(None, None, None)


PILLOW_WARNINGS = PillowWarnings()
SETTINGS_LOCK = threading.Lock()  # around whatever changes pillow_settings


@contextlib.contextmanager
def pillow_settings(max_pixels=None, truncated=False):
    """Pillow's limit of pixels, None for its own, and its patience with truncated files, while one
    image is read."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        if max_pixels:
            Image.MAX_IMAGE_PIXELS = max_pixels
        if truncated:
            ImageFile.LOAD_TRUNCATED_IMAGES = True
        yield
    finally:
        if max_pixels or truncated:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before
