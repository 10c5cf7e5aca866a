"""The hot part of image features, beside CLIP itself: reading and preprocessing."""

import time

import torch
from PIL import Image
from tqdm import tqdm
from transformers import CLIPImageProcessorPil

from antarctic.features import encode_files
from benchmarks import synthetic
from benchmarks.measure import Limit, Part
from model import Clip


class Pixels:
    """Stands for a Clip whose vectors are the pixels that it gets, which takes no time."""

    def __init__(self, clip):
        self.prepare = clip.prepare

    def encode_images(self, images):
        return torch.cat([torch.from_numpy(image["pixel_values"]).flatten(1) for image in images])


def encode_images(small, device):
    """Reading and preprocessing 64 JPEGs of 640 x 480 pixels. Plain: Pillow and transformers' image
    processor. Ours: encode_files, by as many --workers as there are threads, if several. Equal:
    pixels to 1e-5."""
    files, threads = synthetic.pictures(4 if small else 64), torch.get_num_threads()
    clip, processor = Pixels(Clip(synthetic.clip_folder(small))), CLIPImageProcessorPil()
    distinct = [path.with_suffix(f".{i}.jpg") for i, path in enumerate(files)]
    for i, (path, copy) in enumerate(zip(files, distinct)):
        copy.write_bytes(path.read_bytes() + bytes([i]))  # equal files are encoded once

    def plain():
        pictures = (Image.open(path).convert("RGB") for path in distinct)
        return torch.cat([processor(picture, return_tensors="pt")["pixel_values"].flatten(1)
                          for picture in pictures])

    def ours():
        digests, vectors, _ = encode_files(clip, distinct, 64, tqdm(disable=True),
                                           workers=threads if threads > 1 else 0)
        return torch.stack([torch.from_numpy(vectors[digest]) for digest in digests])

    def floor(_):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            for path in distinct:
                Image.open(path).load()
            seconds.append(time.perf_counter() - start)
        return Limit(min(seconds) / threads, "Pillow's decoding")

    return Part(plain, ours, lambda a, b: bool((a - b).abs().max() < 1e-5), floor)


PARTS = {"encode_images": encode_images}
