"""CLIP's preprocessing, equal to OpenAI's to the bit, without torchvision.

OpenAI's is torchvision's Resize(bicubic), CenterCrop, ToTensor and Normalize on a Pillow image:
https://github.com/openai/CLIP/blob/main/clip/clip.py (_transform).
transformers' CLIPImageProcessor places the crop differently: it rounds the margin down, whereas
torchvision rounds it half to even. The crop of a 640 x 427 image differs by one pixel.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from transformers import BatchFeature

OPENAI_STEPS = {  # as in a preprocessor_config.json
    "image_processor_type": "CLIPImageProcessor", "resample": Image.Resampling.BICUBIC,
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
}


class OpenAIPreprocessor(NamedTuple):
    """Replaces an image processor of transformers, and is called like one.

    size: the short side after resizing. crop_size: (height, width) of the crop, at most size. mean,
    std: of each channel, of values from 0 to 1.
    """
    size: int
    crop_size: tuple
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    std: tuple = (0.26862954, 0.26130258, 0.27577711)

    def __call__(self, images, return_tensors="pt"):
        """images: PIL images. Returns {pixel_values}, float32 (B, 3, height, width)."""
        mean, std = (np.float32(values)[:, None, None] for values in (self.mean, self.std))
        pixels = np.empty((len(images), 3, *self.crop_size), np.float32)
        for image, row in zip(images, pixels):  # one by one, since an image fits the CPU's cache
            np.divide(self.crop(image).transpose(2, 0, 1), np.float32(255), out=row)
            row -= mean  # as ToTensor and Normalize, in their order
            row /= std
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def crop(self, image):
        """A PIL image, resized, cropped, and only then converted to RGB: uint8 (height, width, 3).

        It is a pure function, so threads can share it. Pillow releases the GIL while it resizes.
        """
        image = image.resize(resized_size(image.size, self.size), Image.Resampling.BICUBIC)
        return np.array(image.crop(center_box(image.size, self.crop_size)).convert("RGB"))


def openai_preprocessor(processor):
    """The OpenAIPreprocessor with the settings of an image processor of transformers.

    Returns the processor itself where it does not preprocess as OpenAI does: it is SigLIP's,
    squashes images, omits a step, resamples otherwise, or crops more than the resized image has.
    """
    config = processor.to_dict()  # in transformers' current spelling, however old the file is
    if any(config.get(key) != value for key, value in OPENAI_STEPS.items()) or config.get("do_pad"):
        return processor
    size, crop_size = config["size"] or {}, config["crop_size"] or {}
    if size.keys() != {"shortest_edge"} or crop_size.keys() != {"height", "width"}:
        return processor
    short, height, width = size["shortest_edge"], crop_size["height"], crop_size["width"]
    mean, std = config["image_mean"], config["image_std"]
    if not all(type(side) is int and 0 < side <= short for side in (height, width)):
        return processor
    if not all(isinstance(values, (list, tuple)) and len(values) == 3 for values in (mean, std)):
        return processor
    if not math.isclose(config["rescale_factor"], 1 / 255):
        return processor
    return OpenAIPreprocessor(short, (height, width), tuple(mean), tuple(std))


def resized_size(size, short):
    """(width, height) of an image whose short side is resized to `short`. size: (width, height).

    Like torchvision it truncates the long side to whole pixels.
    """
    least = min(size)
    return tuple(short if side == least else int(short * side / least) for side in size)


def center_box(size, crop_size):
    """(left, top, right, bottom) of the central crop.

    size: (width, height). crop_size: (height, width), no larger. The margin is rounded half to
    even, by torchvision and by Python's round.
    """
    (width, height), (crop_height, crop_width) = size, crop_size
    left, top = round((width - crop_width) / 2), round((height - crop_height) / 2)
    return left, top, left + crop_width, top + crop_height
