"""The hot parts of sampler.py: beam search, sampling, and CLIP's choice among the candidates."""

import contextlib
import functools
import importlib
import itertools
import random
import sys
from collections import Counter
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from unittest import mock

import torch
from torch.nn.functional import normalize
from transformers import AutoModelForSeq2SeqLM

from antarctic.checkpoints import load_checkpoint
from antarctic.datasets import read_coco
from antarctic.features import image_features
from benchmarks import synthetic
from benchmarks.entries import encode_padded, encoding_work
from benchmarks.measure import Part, bart_weights, in_turn, least
from model import Captioner, Clip, Model, rescore
from snowglobe import scenes

SNOWGLOBE = Path(__file__).resolve().parents[1] / "snowglobe" / "weights"


def packed_captioner(folder, device, dtype=torch.float32):
    """A Captioner as Model.candidates() uses it."""
    captioner = Captioner(folder, device, dtype)
    captioner.pack()
    return captioner


def generate(model, captioner, tables, **options):
    """The baseline for writing: transformers' generate() with our settings. tables: lists of token
    ids."""
    config = model.config
    return model.generate(
        **captioner.pad(tables), max_length=captioner.maxlen_dec, min_length=0,
        no_repeat_ngram_size=0, forced_bos_token_id=config.bos_token_id,
        forced_eos_token_id=config.eos_token_id, return_dict_in_generate=True, **options)


def decoding_floor(model, captioner, tables, captions):
    """The Limit of writing captions: the encoder once, then for each length a step over all
    distinct prefixes. model: as it was before packing. tables: lists of token ids. captions: a list
    of texts for each table."""
    rows = [(table, *ids) for table, texts in enumerate(captions)
            for ids in captioner.tokenize(texts, captioner.maxlen_dec - 1)]
    prefixes = {row[:length] for row in rows for length in range(2, len(row))}
    per_length = Counter(map(len, prefixes))
    reading, writing = bart_weights(model)
    work = [(2 * reading * sum(map(len, tables)), reading)]
    work += [(2 * writing * n, writing) for n in per_length.values()]
    return least(captioner.device, captioner.dtype, work)


def beam(small, device, size, together=False):
    """Beam search with 3 beams for 16 images, bart-base or -large. Plain: one image at a time, or
    together, as a peer would. Ours: one batch. Equal: likelihoods to 1e-4, and the texts, except
    ties to 1e-4."""
    folder = synthetic.bart_folder("small" if small else size)
    captioner = packed_captioner(folder, device)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).to(device).eval()
    tables = captioner.tokenize(synthetic.tables(3 if small else 16), captioner.maxlen_enc)

    def plain():
        outputs = [generate(model, captioner, batch, do_sample=False, num_beams=3,
                            num_return_sequences=3, length_penalty=1.0, early_stopping=False,
                            output_scores=True)
                   for batch in ([tables] if together else [[table] for table in tables])]
        captions = [pair for output in outputs for pair in zip(
            captioner.decode(output.sequences), output.sequences_scores.tolist())]
        return [captions[start:start + 3] for start in range(0, len(captions), 3)]

    def same(plain, ours):
        """Compares the captions of one table, lists of (text, likelihood)."""
        (_, worst), texts = plain[-1], dict(ours)
        close = all(abs(a - b) < 1e-4 for (_, a), (_, b) in zip(plain, ours, strict=True))
        return close and all(text in texts for text, score in plain if score > worst + 1e-4)

    def floor(result):
        texts = [[text for text, _ in beams] for beams in result]
        return decoding_floor(model, captioner, tables, texts)

    return Part(plain, lambda: captioner.beam(tables),
                lambda a, b: all(same(*pair) for pair in zip(a, b, strict=True)), floor)


def sample(captioner, folder, tables, n, clip=None, together=False, **dials):
    """n samples of each table. Plain: generate(), all samples of a table in one batch; together:
    those of all tables. Ours: Captioner.sample. With a CLIP, both also rescore them. Equal: see
    same_distribution, since the random draws differ; the part "rescore" compares rescoring."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(captioner.device).eval()
    batches = [tables] if together else [[table] for table in tables]
    image, seeds = normalize(torch.ones(1, clip.dim if clip else 1), dim=-1), itertools.count()
    torch.manual_seed(0)

    def plain():
        outputs = [generate(model, captioner, batch, do_sample=True, num_beams=1, top_k=0,
                            num_return_sequences=n, **dials) for batch in batches]
        texts = [text for output in outputs for text in captioner.decode(output.sequences)]
        texts = [texts[i:i + n] for i in range(0, len(texts), n)]  # of each table
        if clip:
            encode_padded(clip, texts[0]) @ image[0]
        return texts

    def ours():
        samples = captioner.sample(tables, n, **dials, seeds=[next(seeds) for _ in tables])
        if clip:
            rescore(clip, image, [[text for text, *_ in samples[0]]])
        return samples

    def floor(result):
        texts = [[text for text, *_ in samples] for samples in result]
        limits = [decoding_floor(model, captioner, tables, texts)]
        if clip:
            limits.append(least(captioner.device, torch.float32, encoding_work(clip, texts[0])))
        return in_turn(limits)

    return Part(plain, ours,
                lambda a, b: same_distribution(model, captioner, tables, a, b), floor)


def same_distribution(model, captioner, tables, plain, ours):
    """Whether plain and ours have samples of one distribution, from 200 of each, of as few tables
    as have so many.

    The likelihoods of nine in ten captions must be the model's own to 1e-3; the text of the others
    may have other tokens. The mean log-probability and the mean length must be equal to four
    standard errors. plain: lists of texts. ours: as Captioner.sample returns them.
    """
    drawn, others, returned = [], [], []
    for table, texts, samples in zip(tables, plain, ours, strict=True):
        each = [(text, likelihood) for text, likelihood, count in samples for _ in range(count)]
        each = random.Random(0).sample(each, min(200, len(each)))
        drawn.append(log_probabilities(model, captioner, table, [text for text, _ in each]))
        others.append(log_probabilities(model, captioner, table, texts[:200]))
        returned += [likelihood for _, likelihood in each]
        if len(returned) >= 200:
            break
    drawn, others = torch.cat(drawn, 1), torch.cat(others, 1)  # (2, texts) each
    own = ((drawn[0] / drawn[1] - torch.tensor(returned)).abs() < 1e-3).float().mean() >= 0.9
    error = (drawn.var(1) / drawn.shape[1] + others.var(1) / others.shape[1]).sqrt()
    return bool(own and ((drawn.mean(1) - others.mean(1)).abs() <= 4 * error).all())


@torch.inference_mode()
def log_probabilities(model, captioner, table, texts):
    """Log-probabilities of texts, by teacher forcing without a cache, and their numbers of tokens,
    float32 (2, texts)."""
    encoded = model.get_encoder()(torch.tensor([table], device=model.device)).last_hidden_state
    pairs = []
    for ids in captioner.tokenize(texts, captioner.maxlen_dec):
        labels = torch.tensor([ids], device=model.device)  # (1, tokens)
        logits = model(encoder_outputs=(encoded,), labels=labels).logits
        log_p = logits.log_softmax(-1).gather(2, labels[..., None])  # (1, tokens, 1)
        pairs.append((log_p[0, 1:].sum().item(), len(ids)))  # without <s>, which is forced
    return torch.tensor(pairs, dtype=torch.float32).T


def sample_random(small, device, size, n, rescored=False):
    """n samples of one image from random weights, with the sampler's defaults: temperature 1 and
    top-p 1."""
    folder = synthetic.bart_folder("small" if small else size)
    captioner = packed_captioner(folder, device)
    clip = Clip(synthetic.clip_folder(small), device) if rescored else None
    tables = captioner.tokenize(synthetic.tables(1), captioner.maxlen_enc)
    return sample(captioner, folder, tables, 100 if small else n, clip)


def tuned_captioner(small, device, split, n):
    """A captioner, packed, of the snowglobe's BART with tuned layernorms, the folder of the same
    weights, and the tables of n images of a split, as token ids."""
    files = tuned(*(16, 1, 1) if small else (1000, 4, 4))
    method = Model.load(SNOWGLOBE / "clip", SNOWGLOBE / "bart", files / "best.safetensors",
                        [files / "cache.txt"], [files / "cache.npy"], device=device,
                        dtype="float32")
    captioner = Captioner(SNOWGLOBE / "bart", device)
    load_checkpoint(files / "best.safetensors", captioner)
    captioner.model.save_pretrained(files / "bart")
    captioner.pack()
    features, _, _ = image_features(method.clip, read_coco(files, split)[:n], files)
    return captioner, files / "bart", method.tokenize(method.tables(features))


def sample_tree(small, device, temperature):
    """1,000 samples of each of 4 images from the snowglobe's BART, at top-p 0.9."""
    captioner, folder, tables = tuned_captioner(small, device, "val2017", 4)
    return sample(captioner, folder, tables, 100 if small else 1000, temperature=temperature,
                  top_p=0.9)


def sample_peer(small, device, n):
    """n samples of each of 32 images from the snowglobe's BART, at top-p 0.9. Plain is no baseline
    but a peer: transformers' generate() over all images in one batch."""
    captioner, folder, tables = tuned_captioner(small, device, "train2017", 32)
    return sample(captioner, folder, tables, n, together=True, temperature=1.0, top_p=0.9)


@functools.cache
def tuned(train, val, epochs):
    """A folder with a small world, its cache and a checkpoint, from the project's own scripts.
    train, val: numbers of images."""
    files = synthetic.folder() / "snowglobe"
    with ThreadPool(1) as pool:
        for split, images in (("train2017", train), ("val2017", val)):
            scenes.write_split(files, split, images, 0, pool)
    common = ["--datadir", files, "--textfile", files / "cache.txt",
              "--embfile", files / "cache.npy", "--clip_model", SNOWGLOBE / "clip"]
    training = ["--topk", 16, "--savedir", files, "--lm", SNOWGLOBE / "bart", "--lrate", "7e-2",
                "--epochs", epochs]
    for script, more in (("compute_cache", ["--topk", 300]), ("trainer", training)):
        argv = mock.patch.object(sys, "argv", [script, *map(str, common + more)])
        with argv, contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(script).main()
    return files


def rescoring(small, device, share):
    """CLIP's cosines of 1,000 candidates with their image. share: of candidates that are distinct.
    Plain: all candidates, padded to 77 tokens. Equal: cosines to 1e-5."""
    clip, n = Clip(synthetic.clip_folder(small), device), 20 if small else 1000
    texts = synthetic.captions(round(share * n))
    candidates = texts + random.Random(0).choices(texts, k=n - len(texts))
    image = normalize(torch.randn(1, clip.dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    return Part(lambda: encode_padded(clip, candidates) @ image[0],
                lambda: torch.tensor(rescore(clip, image, [candidates])[0]),
                lambda a, b: bool((a - b).abs().max() < 1e-5),
                lambda _: least(device, torch.float32, encoding_work(clip, texts)))


PARTS = {
    "beam_base": partial(beam, size="base"),
    "beam_large": partial(beam, size="large"),
    "beam_base_to_generate": partial(beam, size="base", together=True),
    "beam_large_to_generate": partial(beam, size="large", together=True),
    "sample_base": partial(sample_random, size="base", n=200),
    "sample_large_rescored": partial(sample_random, size="large", n=1000, rescored=True),
    "rescore": partial(rescoring, share=1),
    "rescore_distinct": partial(rescoring, share=0.4),
    "sample_1_to_generate": partial(sample_peer, n=1),
    "sample_10_to_generate": partial(sample_peer, n=10),
    "sample_100_to_generate": partial(sample_peer, n=100),
    "sample_tree_t10_p09": partial(sample_tree, temperature=1.0),
    "sample_tree_t07_p09": partial(sample_tree, temperature=0.7),
}
