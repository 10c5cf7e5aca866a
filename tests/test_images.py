"""CLIP's preprocessing, compared with torchvision's formulas in plain Pillow and NumPy."""

import json
import os
import shutil
import subprocess
import sys
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import torch
from conftest import CLIP, ROOT
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from antarctic.preprocessing import (
    OpenAIPreprocessor,
    center_box,
    openai_preprocessor,
    resized_size,
)
from model import Clip

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SIZES = [(640, 427), (427, 640), (640, 480), (224, 224), (225, 224), (224, 225), (223, 224),
         (336, 337), (500, 375), (375, 500), (1, 1), (1, 2), (2, 1), (1, 200), (200, 1), (3, 500),
         (500, 3), (97, 96), (1000, 667)]


def drawn(sizes, seed=0):
    """Pictures of these sizes, of noise, so that a shift by one pixel shows."""
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
            for width, height in sizes]


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.default_rng(1)
    return drawn([*SIZES, *map(tuple, generator.integers(1, 700, (30, 2)).tolist())])


def plain_pixels(image, short, crop_height, crop_width):
    """torchvision's Resize, CenterCrop, ToTensor and Normalize, step by step."""
    width, height = image.size
    if width <= height:
        new_width, new_height = short, int(short * height / width)
    else:
        new_width, new_height = int(short * width / height), short
    resized = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    top = int(round((new_height - crop_height) / 2.0))
    left = int(round((new_width - crop_width) / 2.0))
    crop = resized[top:top + crop_height, left:left + crop_width].transpose(2, 0, 1)
    assert crop.shape == (3, crop_height, crop_width)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (torch.tensor(crop) / 255 - mean) / std


@pytest.mark.parametrize("target", [224, 336])
@pytest.mark.slow
def test_sizes_and_crops_are_torchvisions_for_every_size(target):
    sides = np.arange(1, 701)
    width, height = (side.ravel() for side in np.meshgrid(sides, sides))
    long = target * np.maximum(width, height) / np.minimum(width, height)
    long = np.trunc(long).astype(int)
    expected = np.array([np.where(width <= height, target, long),
                         np.where(width <= height, long, target)])
    sizes = [resized_size(size, target) for size in zip(width.tolist(), height.tolist())]
    assert np.array_equal(np.array(sizes).T, expected)
    boxes = np.array([center_box(size, (target, target)) for size in sizes]).T
    assert np.array_equal(boxes[:2], np.rint((expected - target) / 2))  # rint: half to even
    assert np.array_equal(boxes[2:], boxes[:2] + target)
    assert (boxes[:2] >= 0).all() and (boxes[2:] <= expected).all()


@pytest.mark.parametrize("short, crop_size", [
    (224, (224, 224)), (336, (336, 336)), (96, (96, 96)), (256, (224, 224)), (64, (30, 51))])
@pytest.mark.slow
def test_pixels_equal_torchvisions_to_the_bit(pictures, short, crop_size):
    batch = OpenAIPreprocessor(short, crop_size)(images=pictures)["pixel_values"]
    assert batch.dtype == torch.float32 and batch.is_contiguous()
    for image, pixels in zip(pictures, batch, strict=True):
        assert torch.equal(pixels, plain_pixels(image, short, *crop_size)), image.size


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_modes_become_rgb_after_the_crop_as_openais_do(pictures, mode):
    image = pictures[0].convert(mode)
    resized = image.resize((335, 224), Image.Resampling.BICUBIC)  # 640 x 427
    expected = np.array(resized.convert("RGB"))[:, 56:280]
    assert np.array_equal(OpenAIPreprocessor(224, (224, 224)).crop(image), expected)


def test_threads_can_share_it(pictures):
    preprocessor = OpenAIPreprocessor(224, (224, 224))
    with ThreadPool(4) as pool:
        crops = pool.map(preprocessor.crop, pictures * 2, chunksize=1)
    for crop, image in zip(crops, pictures * 2, strict=True):
        assert np.array_equal(crop, preprocessor.crop(image))


# ------------------------------------------------------------------- processors that it replaces

OLD = {
    "feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3,
    "do_resize": True, "do_center_crop": True, "do_normalize": True,
    "image_mean": MEAN, "image_std": STD,
}
MIDDLE = OLD | {
    "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224},
    "do_rescale": True, "do_convert_rgb": True, "rescale_factor": 0.00392156862745098,
}
BOTH = MIDDLE | {"image_processor_type": "CLIPImageProcessor"}
NEW = {key: value for key, value in BOTH.items() if key != "feature_extractor_type"}


def loaded(folder, config):
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize("config", [
    OLD, MIDDLE, BOTH, NEW, NEW | {"size": 224}, NEW | {"crop_size": 224},
    NEW | {"image_processor_type": "CLIPImageProcessorFast"},
    {"image_processor_type": "CLIPImageProcessor"},
], ids=["old", "middle", "both", "new", "size a number", "crop a number", "fast", "defaults"])
def test_openais_preprocessing_is_known_in_every_spelling(tmp_path, config):
    expected = OpenAIPreprocessor(224, (224, 224), tuple(MEAN), tuple(STD))
    assert openai_preprocessor(loaded(tmp_path, config)) == expected


def test_numbers_are_those_of_the_file(tmp_path):
    config = NEW | {"size": {"shortest_edge": 50}, "crop_size": {"height": 40, "width": 30},
                    "image_mean": [0, 0, 0.5], "image_std": [1, 2, 3]}
    expected = OpenAIPreprocessor(50, (40, 30), (0, 0, 0.5), (1, 2, 3))
    assert openai_preprocessor(loaded(tmp_path, config)) == expected


@pytest.mark.parametrize("change", [
    {"size": {"height": 224, "width": 224}}, {"size": {"shortest_edge": 224, "longest_edge": 300}},
    {"size": {"shortest_edge": 200}}, {"resample": 2}, {"do_center_crop": False},
    {"do_resize": False}, {"do_rescale": False}, {"do_normalize": False}, {"do_pad": True},
    {"rescale_factor": 1 / 127}, {"image_mean": 0.5}, {"image_processor_type": "ViTImageProcessor"},
], ids=str)
def test_other_preprocessing_stays_its_own(tmp_path, change):
    processor = loaded(tmp_path, NEW | change)
    assert openai_preprocessor(processor) is processor
    assert isinstance(processor, (CLIPImageProcessorPil, ViTImageProcessorPil))


@pytest.mark.parametrize("kind", [SiglipImageProcessorPil, Siglip2ImageProcessorPil])
def test_siglips_stays_its_own(tmp_path, kind):
    kind().save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(openai_preprocessor(processor)) is kind


# --------------------------------------------------------------------- the same on every machine

TORCHVISION = {  # the names that transformers imports from it; none of them computes
    "__init__.py": "__version__ = '0.28.0'",
    "io.py": "",
    "transforms/__init__.py": "import enum\nInterpolationMode = enum.Enum('InterpolationMode', "
                              "'NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS')",
    "transforms/functional.py": "def pil_to_tensor(image):\n    raise RuntimeError",
    "transforms/v2/__init__.py": "from . import functional",
    "transforms/v2/functional.py": "def __getattr__(name):\n    raise RuntimeError",
}
SAVE_PIXELS = """import sys, torch
from PIL import Image
from transformers.utils import is_torchvision_available
from model import Clip
assert is_torchvision_available()
saved, folders, paths = sys.argv[1], sys.argv[2].split(":"), sys.argv[3:]
images, clips = [Image.open(path) for path in paths], [Clip(folder) for folder in folders]
pixels = [clip.processor(images=images, return_tensors="pt")["pixel_values"] for clip in clips]
torch.save(pixels, saved)
"""


@pytest.mark.slow
def test_pixels_are_the_same_where_torchvision_can_be_imported(tmp_path, pictures):
    square = {"size": {"height": 96, "width": 96}}
    siglip = square | {"image_processor_type": "SiglipImageProcessor"}
    folders = []
    for name, change in {"openais": {}, "squashed": square, "siglip": siglip}.items():
        folder = shutil.copytree(CLIP, tmp_path / name)
        folders.append(folder)
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for image, path in zip(pictures, paths):
        image.save(path)
    for name, text in TORCHVISION.items():
        file = tmp_path / "site" / "torchvision" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    python_path = os.pathsep.join([str(ROOT), str(tmp_path / "site")])
    arguments = [tmp_path / "pixels.pt", ":".join(map(str, folders)), *paths]
    subprocess.run([sys.executable, "-c", SAVE_PIXELS, *arguments], check=True, cwd=tmp_path,
                   env=os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"})
    for folder, pixels in zip(folders, torch.load(tmp_path / "pixels.pt"), strict=True):
        processor = Clip(str(folder)).processor
        assert isinstance(processor, OpenAIPreprocessor) == (folder.name == "openais")
        expected = processor(images=pictures[:3], return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels, expected), folder.name


def test_the_snowglobes_clip_is_prepared_as_openais():
    expected = OpenAIPreprocessor(96, (96, 96), tuple(MEAN), tuple(STD))
    assert Clip(CLIP).processor == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_gets_the_pixels_in_its_own_precision(pictures, dtype):
    clip = Clip(CLIP, dtype=dtype)
    pixels = torch.stack([plain_pixels(image, 96, 96, 96) for image in pictures[:5]])
    with torch.no_grad():
        vectors = clip.model.get_image_features(pixel_values=pixels.to(dtype)).pooler_output
    expected = torch.nn.functional.normalize(vectors.float(), dim=-1)
    assert torch.equal(clip.encode_images(pictures[:5]), expected)


