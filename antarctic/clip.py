"""CLIP, frozen: unit vectors of images and of texts."""

import contextlib
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from PIL.Image import new as new_image
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, BatchFeature

from antarctic.errors import InputError
from antarctic.held import held
from antarctic.model_files import file_identity, opened_model, telling
from antarctic.openai_clip import load_openai_clip
from antarctic.preprocessing import openai_preprocessor
from antarctic.pretrained import CLIP_NAMES, PROCESSOR


class Clip:
    """A frozen CLIP, SigLIP or SigLIP 2 with its preprocessing.

    name: one of CLIP_NAMES, a hub id, a folder, or one of OpenAI's .pt files. dtype: weights and
    arithmetic; in torch.bfloat16 the vectors have cosines above .999 with those of float32.
    image_dtype: the arithmetic of images alone, by autocast (default: dtype). Attributes: identity,
    the stamp of the caches that it encodes, by its weights; digests, {small file: its SHA-256}, and
    image_digests, those that images' vectors depend on; dim, the width of its vectors. Raises
    InputError where the model cannot be loaded.
    """

    def __init__(self, name, device="cpu", dtype=torch.float32, image_dtype=None):
        name, kind = CLIP_NAMES.get(name, name), "CLIP model"
        if Path(name).is_file():
            with held(name, kind) as file:
                model, self.tokenizer, self.processor = load_openai_clip(name)
                self.identity = file_identity(file)
        else:
            # All parts at once: the size of the download is printed before it starts.
            with opened_model(name, kind, ("weights", "tokenizer", "processor")) as files:
                model = files.load_model(AutoModel, "CLIP", dtype=torch.float32)
                self.tokenizer = files.load_tokenizer(model.config.text_config.vocab_size)
                # With torchvision installed, transformers would resize by it, to other pixels.
                processor = files.load(AutoImageProcessor, backend="pil")
                with files.telling():
                    self.processor = openai_preprocessor(processor)
                self.identity = files.identity()
        self.digests = self.tokenizer.digests
        self.image_digests = {name: digest for name, digest in self.digests.items()
                              if name in ("config.json", *PROCESSOR)}
        self.model = model.to(device, dtype).eval().requires_grad_(False)
        self.device, self.dtype, self.image_dtype = device, dtype, image_dtype or dtype
        config = self.model.config
        self.max_length = config.text_config.max_position_embeddings
        self.dim, self.padding = getattr(config, "projection_dim", None), {}
        # SigLIP was trained on lower-cased texts, padded to full length without a mask, and its
        # text vector is that of the last place.
        self.siglip = config.model_type.startswith("siglip")
        if self.siglip:
            self.dim = config.text_config.projection_size
            self.padding = {"padding": "max_length", "max_length": self.max_length,
                            "return_attention_mask": False}
        with telling(kind, name):
            self.try_out()

    @torch.inference_mode()
    def try_out(self):
        """Encodes an image and a text, since what the model's files say may not go together."""
        image = self.batch([self.prepare(new_image("RGB", (64, 48)))])
        text = self.tokenizer(["a"], return_tensors="pt", **self.padding)
        unit(self.model.get_image_features(**image))
        unit(self.model.get_text_features(**text.to(self.device)))

    def prepare(self, image):
        """What encode_images needs of a PIL image (RGB): a BatchFeature of arrays, pixel_values
        (1, 3, H, W) and, of SigLIP 2 NaFlex, masks and sizes. Threads may call this at once."""
        return self.processor(images=[image], return_tensors="np")

    @torch.inference_mode()
    def encode_images(self, images):
        """Unit vectors of B images, float32 (B, dim), on the CPU. images: PIL images (RGB), or what
        prepare() makes of them."""
        images = [self.prepare(image) if isinstance(image, Image) else image for image in images]
        rounding = contextlib.nullcontext()
        if self.image_dtype != self.dtype:
            rounding = torch.autocast(torch.device(self.device).type, self.image_dtype)
        with rounding:
            return unit(self.model.get_image_features(**self.batch(images)))

    def batch(self, prepared):
        """What prepare() made of B images as tensors on the device."""
        arrays = {name: np.concatenate([image[name] for image in prepared])
                  for name in prepared[0]}
        return BatchFeature(arrays, tensor_type="pt").to(self.device, self.dtype)

    @torch.inference_mode()
    def encode_texts(self, texts, batch_size=128, progress=None):
        """Unit vectors of N texts, float32 (N, dim), on the CPU. progress: a bar's name, or None.

        Texts are sorted by length and each batch is trimmed to its longest. This is exact: the text
        tower is causal and its vector is that of the end token, so padding behind it changes
        nothing. SigLIP's tower is not causal and reads texts at full length.
        """
        texts = [text.lower() if self.siglip else text for text in texts]
        if not texts:
            return torch.empty(0, self.dim)
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        vectors = torch.empty(len(tokens), self.dim)
        for start in tqdm(range(0, len(order), batch_size), progress, disable=progress is None,
                          unit="batch"):
            rows = order[start:start + batch_size]
            batch = self.tokenizer.pad({"input_ids": [tokens[i] for i in rows]},
                                       return_tensors="pt", **self.padding)
            vectors[rows] = unit(self.model.get_text_features(**batch.to(self.device)))
        return vectors


def unit(output):
    """Features as float32 unit vectors (B, dim) on the CPU. output: a tensor, or transformers'
    object that holds it. Raises InputError where they are not finite."""
    features = output if torch.is_tensor(output) else output.pooler_output
    if not features.isfinite().all():
        raise InputError("the CLIP model computes values that are not finite; its weights are "
                         "damaged, or too large for this --dtype")
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()
