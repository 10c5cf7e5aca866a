"""What trainer.py spends its time on: a step of the second epoch, or of a later one."""

from functools import partial

import torch
from torch.nn.functional import normalize
from transformers import AutoModelForSeq2SeqLM

from antarctic.checkpoints import is_layernorm
from antarctic.images import read_image
from benchmarks import made
from benchmarks.measure import Part, bart_weights, least
from model import Captioner, Clip, Model
from utils import linearize


def train_step(small, device, dtype=torch.float32):
    """A step of 16 images with bart-base and 50,000 entries.

    Plain: from files; images are encoded, tables come from a softmax over all entries, and are
    padded to 128 tokens, captions to 32. Ours: as trainer.py, from tables and captions that are
    tokens already. Equal: the loss to 1e-4 and the gradient to 1e-3 of its length; in bfloat16 to
    2e-2 and 1e-1.
    """
    size, n, entries = ("small", 4, made.ngrams(200)) if small else ("base", 16, made.ngrams(50000))
    clip, files, captions = Clip(made.clip_folder(small),
                                 device), made.pictures(n), made.captions(n)
    embeddings = normalize(
        torch.randn(len(entries), clip.dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    captioner = Captioner(made.bart_folder(size), device, dtype)
    tokenizer, model = captioner.tokenizer, AutoModelForSeq2SeqLM.from_pretrained(
        made.bart_folder(size)).to(device).eval()
    method = Model(clip, captioner, entries, embeddings, topk=10)
    tables = method.tokenize(method.tables(method.features(files)))
    tokens = captioner.tokenize(captions, 32)
    near = embeddings.to(device)

    def plain_loss():
        with torch.inference_mode():
            pixels = clip.processor(images=list(map(read_image, files)),
                                    return_tensors="pt").to(device)
            features = normalize(clip.model.get_image_features(**pixels).pooler_output, dim=-1)
            best = (100.0 * features @ near.T).softmax(-1).topk(10).indices.tolist()
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        inputs = tokenizer([linearize([entries[i] for i in row]) for row in best], max_length=128,
                           **padded).to(device)
        target = tokenizer(captions, max_length=32, **padded).to(device)
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                     labels=labels).loss

    def stepper(model, loss_of):
        """A function that does a step and returns (loss, gradient)."""
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
        near, along = (1e-4, 1e-3) if dtype == torch.float32 else (2e-2, 1e-1)
        return abs(plain[0] - ours[0]) < near and bool(
            (plain[1] - ours[1]).norm() < along * plain[1].norm())

    # Forward, and back to the first layernorm, of the tokens that are there; frozen weights need no
    # gradient of their own.
    met = zip(bart_weights(captioner.model), (tables, tokens))
    work = [(4 * numbers * sum(map(len, rows)), numbers) for numbers, rows in met]
    return Part(stepper(model, plain_loss),
                stepper(captioner.model, lambda: captioner.loss(tables, tokens)), equal,
                lambda _: least(device, dtype, work))


PARTS = {"train_step": train_step, "train_step_bf16": partial(train_step, dtype=torch.bfloat16)}
