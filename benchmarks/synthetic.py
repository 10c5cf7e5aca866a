"""Models of real sizes with random weights, and texts and images of real lengths and sizes, so that
nothing is downloaded.

The words do not matter for speed. The number of tokens in a text does, and so does the length of
the prefixes that samples share.
"""

import functools
import random
import tempfile
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
)

from utils import linearize

# Shares of texts with 1, 2, 3 ... tokens of CLIP's tokenizer: COCO's captions of val2017, and the
# n-grams mined from them.
NGRAM_LENGTHS = (0.31, 0.65, 0.035, 0.005)
CAPTION_LENGTHS = (*[0] * 6, 0.005, 0.04, 0.15, 0.2, 0.19, 0.155, 0.1, 0.06, 0.035, 0.025, 0.015,
                   0.01, 0.005, 0.005, 0.005)


@functools.cache
def folder():
    """A temporary folder for models and images, deleted when Python ends."""
    folder.keep = tempfile.TemporaryDirectory(prefix="benchmarks-")
    return Path(folder.keep.name)


def texts(n, lengths, seed):
    """n distinct texts of artificial words, each of which is one token. lengths: shares of texts
    with 1, 2, 3 ... words."""
    rng, distinct = random.Random(seed), {}
    while len(distinct) < n:
        [length] = rng.choices(range(1, len(lengths) + 1), lengths)
        distinct[" ".join(f"w{rng.randrange(20000)}" for _ in range(length))] = None
    return list(distinct)


def ngrams(n):
    return texts(n, NGRAM_LENGTHS, 0)


def captions(n):
    return texts(n, CAPTION_LENGTHS, 1)


def tables(n):
    """n tables of 10 entries each, as texts."""
    entries = ngrams(10 * n)
    return [linearize(entries[i:i + 10]) for i in range(0, 10 * n, 10)]


def save_tokenizer(path, specials, size, unknown, longest, **names):
    """Saves a tokenizer for which each word is a token. specials: {token: id}. Words get the other
    ids below size, "|" the first of them. longest: most tokens of a text."""
    free = [i for i in range(size) if i not in specials.values()]
    vocabulary = specials | dict(zip(["|", *(f"w{i}" for i in range(size))], free))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    start, end = names["bos_token"], names["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(token, specials[token]) for token in (start, end)])
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown,
                                    model_max_length=longest, **names)
    whole.save_pretrained(path)


@functools.cache
def clip_folder(small):
    """The folder of a saved CLIP: ViT-B/16, or with small a model of two narrow layers."""
    torch.manual_seed(0)
    path, sizes = folder() / "clip", {}
    if small:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                 "num_attention_heads": 2}
    config = CLIPConfig(text_config=sizes, vision_config={"patch_size": 16, **sizes})
    CLIPModel(config).save_pretrained(path)
    save_tokenizer(path, {"<|startoftext|>": 49406, "<|endoftext|>": 49407}, 49408, "w0", 77,
                   bos_token="<|startoftext|>", eos_token="<|endoftext|>",
                   pad_token="<|endoftext|>")
    CLIPImageProcessorPil().save_pretrained(path)
    return path


@functools.cache
def bart_folder(size):
    """The folder of a saved BART. size: "base", "large", or "small" with one narrow layer."""
    torch.manual_seed(0)
    path = folder() / size
    layers, width = {"small": (1, 128), "base": (6, 768), "large": (12, 1024)}[size]
    config = BartConfig(
        encoder_layers=layers, decoder_layers=layers, d_model=width, encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width, encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64)
    bart = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        write_captions(bart)
    bart.save_pretrained(path)
    save_tokenizer(path, {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 50264}, 50265,
                   "<unk>", 1024, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                   mask_token="<mask>")
    return path


def write_captions(bart):
    """Changes random weights in place, so that generation takes as long as with trained weights.

    Captions have the lengths of COCO's. Words follow a power law with about 2 nats a word, so that
    samples share prefixes about as long as those of a trained model.
    """
    decoder, bias, end = bart.get_decoder(), bart.final_logits_bias[0], bart.config.eos_token_id
    bias[:] = -2 * torch.arange(-2, len(bias) - 2).clamp(min=1).log()
    bias[[0, 1, 2, 3, -1]] = -30  # never drawn: <s>, <pad>, </s>, <unk>, <mask>
    # Without this, each word would repeat itself, because input and output share their weights.
    decoder.embed_positions.weight.mul_(10)
    # The output's row of </s> is fitted so that after each number of words the right share of
    # captions ends.
    tables = torch.randint(5, 20000, (16, 32))
    words = bias.softmax(0).multinomial(512, replacement=True).view(16, 32)
    tables[:, 3::3] = 4  # the bar
    tables[:, 0], tables[:, -1], words[:, 0], words[:, 1] = 0, end, end, 0
    bias[end] = 0
    # Shares of captions with 0, 1, 2 ... words, of all captions and of those at least as long.
    share = torch.tensor([0.0, *CAPTION_LENGTHS, *[0.0] * 32])[:30]
    ending = (share / share.flip(0).cumsum(0).flip(0)).nan_to_num(0.9).clamp(1e-6, 0.9)
    for _ in range(2):  # twice, because the row is also an input
        encoded = bart.get_encoder()(tables).last_hidden_state
        hidden = decoder(input_ids=words, encoder_hidden_states=encoded).last_hidden_state[:, 1:31]
        logits = hidden @ bart.lm_head.weight.T + bias  # (16, 30, vocabulary)
        logits[..., end] = -torch.inf
        wanted = ending.logit() + logits.logsumexp(-1).mean(0)  # (30,)
        solution = torch.linalg.lstsq(hidden.mean(0), wanted[:, None]).solution  # (dim, 1)
        bart.lm_head.weight[end] = solution[:, 0]


def pictures(n):
    """Writes n JPEG files of COCO's size. Returns their paths."""
    generator = torch.Generator().manual_seed(0)
    paths = [folder() / f"{i}.jpg" for i in range(n)]
    for path in paths:
        pixels = torch.randint(256, (30, 40, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).resize((640, 480)).save(path)
    return paths
