"""The hot part of trainer.py: a training step, after the images are encoded."""

from functools import partial

import torch
from torch.nn.functional import normalize
from transformers import AutoModelForSeq2SeqLM

from antarctic.checkpoints import is_layernorm
from antarctic.images import read_image
from benchmarks import synthetic
from benchmarks.measure import Part, bart_weights, least
from model import Captioner, Clip, Model
from utils import linearize


def train_step(small, device, dtype=torch.float32):
    """A training step of 16 images with bart-base and 50,000 entries.

    Plain: reads and encodes the images, computes tables with a softmax over all entries, pads
    tables to 128 tokens and captions to 32. Ours: trainer.py's step, from tokenized tables and
    captions. Equal: the loss to 1e-4 and the gradient to 1e-3 of its length; in bfloat16 to 2e-2
    and 1e-1.
    """
    size, n = ("small", 4) if small else ("base", 16)
    entries = synthetic.ngrams(200 if small else 50000)
    files, captions = synthetic.pictures(n), synthetic.captions(n)
    clip = Clip(synthetic.clip_folder(small), device)
    generator = torch.Generator().manual_seed(0)
    embeddings = normalize(torch.randn(len(entries), clip.dim, generator=generator), dim=-1)
    captioner = Captioner(synthetic.bart_folder(size), device, dtype)
    tokenizer = captioner.tokenizer
    model = AutoModelForSeq2SeqLM.from_pretrained(synthetic.bart_folder(size)).to(device).eval()
    method = Model(clip, captioner, entries, embeddings, topk=10)
    tables = method.tokenize(method.tables(method.features(files)))
    tokens = captioner.tokenize(captions, 32)
    on_device = embeddings.to(device)

    def plain_loss():
        with torch.inference_mode():
            pixels = clip.processor(images=list(map(read_image, files)),
                                    return_tensors="pt").to(device)
            features = normalize(clip.model.get_image_features(**pixels).pooler_output, dim=-1)
            best = (100.0 * features @ on_device.T).softmax(-1).topk(10).indices.tolist()
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        inputs = tokenizer([linearize([entries[i] for i in row]) for row in best], max_length=128,
                           **padded).to(device)
        target = tokenizer(captions, max_length=32, **padded).to(device)
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                     labels=labels).loss

    def stepper(model, loss_of):
        """A function that makes a step and returns (loss, gradient)."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_layernorm(name))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-4)

        def step():
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            return loss.item(), torch.cat([p.grad.flatten() for p in trained])
        return step

    def equal(plain, ours):
        (expected, expected_gradient), (loss, gradient) = plain, ours
        most, most_share = (1e-4, 1e-3) if dtype == torch.float32 else (2e-2, 1e-1)
        error = (expected_gradient - gradient).norm()
        return abs(expected - loss) < most and bool(error < most_share * expected_gradient.norm())

    # The least work: the forward pass over all tokens without padding, and the backward pass to the
    # first layernorm. Frozen weights need no gradient.
    used = zip(bart_weights(captioner.model), (tables, tokens))
    work = [(4 * numbers * sum(map(len, rows)), numbers) for numbers, rows in used]
    ours = stepper(captioner.model, lambda: captioner.loss(tables, tokens))
    return Part(stepper(model, plain_loss), ours, equal, lambda _: least(device, dtype, work))


PARTS = {"train_step": train_step, "train_step_bf16": partial(train_step, dtype=torch.bfloat16)}
