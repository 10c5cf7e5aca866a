"""What the files of a pretrained model may say.

They are checked before a library reads them. Sizes in a config must fit the weights that are there,
since models are built to the sizes of their config. A tokenizer must not have more tokens than any
real one, or make long texts of short ones. Each function raises ValueError with the reason.
"""

import json
import math
import re
import struct
from functools import partial
from typing import NamedTuple

import torch
from safetensors import safe_open

from antarctic.bounded import parse_json
from antarctic.pickles import weight_entries
from antarctic.reads import persistent

MOST = {  # bytes of the small files; the largest known tokenizer.json, of Gemma 3, has 33 MB
    "tokenizer.json": 48 << 20, "vocab.json": 16 << 20, "merges.txt": 16 << 20,
    "vocab.txt": 16 << 20, "spiece.model": 16 << 20, "tokenizer.model": 16 << 20,
    "added_tokens.json": 4 << 20, "tokenizer_config.json": 4 << 20}
MOST_ELSE = 1 << 20
MOST_HEADER = 1 << 24  # bytes of the header of a safetensors file, or of an index of shards
MOST_TOKENS = 1 << 19  # Gemma 3 has 262,144; more would take minutes to load
MOST_ADDED = 1 << 14  # of these, tokens beside the vocabulary; Gemma 3 has 6,415
MOST_SIDE = 2048  # pixels, patches: the greatest number in the settings of an image processor
MOST_STEPS = 1 << 21  # bytes of a tokenizer's steps; a table of Unicode has 400 kB
MOST_GROWTH = 64  # how many times longer a tokenizer may make a text before it splits it

# Keys that name code, other files or other models. What they ask for is never done.
NAMES_CODE = {
    "auto_map", "custom_pipelines", "init_inputs", "fast_tokenizer_files", "transformers_weights",
    "name_or_path", "_name_or_path", "base_model_name_or_path", "_commit_hash", "peft_config",
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
    "use_kernels", "kernel_config", "backbone", "use_pretrained_backbone", "use_timm_backbone",
    "backbone_kwargs"}
# Layers are built one by one, so there are no more of them than tensors.
LAYERS, COUNTS = re.compile("layer|depth|types"), re.compile("num_|n_head|experts")


KINDS = {  # {kind of model: whether a class has the parts that are used}
    "CLIP": lambda kind: hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features"),
    "BART": lambda kind: kind.__name__.startswith(("Bart", "MBart", "PLBart", "Mvp")),
    "causal language model": bool,
}


class Tensors(NamedTuple):
    """What the headers of all files of weights say: tensors, and numbers in them."""
    count: int
    numbers: int


def parse(data, name):
    """The value of a JSON file, bytes."""
    try:
        return parse_json(data.decode("utf-8-sig"), name, "model's file")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON") from error


def most_bytes(name):
    return MOST_HEADER if name.endswith(".index.json") else MOST.get(name, MOST_ELSE)


def read_tensors(weights):
    """The Tensors of files, {name: HeldFile}. Raises InputError, and what safetensors raises,
    where a header lies."""
    shapes = []
    for name, held in weights.items():
        if not name.endswith(".safetensors"):
            entries = weight_entries(held.opened_path, held.path).values()
            shapes += [entry.shape for entry in entries]
            continue
        size = held.read(8)
        if len(size) < 8 or struct.unpack("<Q", size)[0] > MOST_HEADER:
            raise ValueError(f"{name} is not a safetensors file")
        shapes += persistent(partial(shapes_of, held.opened_path))
    return Tensors(len(shapes), sum(map(math.prod, shapes)))


def shapes_of(path):
    """The shape of each tensor of a safetensors file, a list."""
    with safe_open(path, "pt") as file:
        return [file.get_slice(key).get_shape() for key in file.keys()]


def check_index(index, files):
    """index: the value of model.safetensors.index.json or its like. files: the names there are."""
    shards = set(index["weight_map"].values())
    if strange := sorted(str(shard) for shard in shards if shard not in files):
        raise ValueError(f"it lacks its part {strange[0][:100]}")


def values_of(value, key=""):
    """Yields (key, number or text) of all values in some JSON, with the nearest key of each."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from values_of(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from values_of(inner, key)
    else:
        yield key, value


def clean(value):
    """Some JSON without what names code, other files or other models."""
    if isinstance(value, dict):
        return {key: clean(inner) for key, inner in value.items()
                if key not in NAMES_CODE and not key.endswith(("_file", "_files"))}
    return [clean(inner) for inner in value] if isinstance(value, list) else value


def check_config(config, tensors):
    """config: the value of config.json. tensors: Tensors, or None where no weights are read."""
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError("config.json does not say which model it is")
    if any(config.get(key) for key in ("quantization_config", "compression_config")):
        raise ValueError("its weights are quantized, which needs code of other libraries; give the "
                         "model as it was before that, or a GGUF file to stories.py")
    layers = max(64, tensors.count if tensors else 4096)
    for key, value in values_of(config):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        most = layers if LAYERS.search(key) else 4096 if COUNTS.search(key) else math.inf
        if value > most:
            raise ValueError(f"its config.json says {key} {value:,}, which do not fit its weights")


def check_processor(settings):
    """settings: the value of preprocessor_config.json or processor_config.json."""
    if not isinstance(settings, dict):
        raise ValueError("the settings of its image processor are none")
    for key, value in values_of(settings):
        if isinstance(value, int) and value > MOST_SIDE:
            raise ValueError(f"its image processor has {key} {value:,}; {MOST_SIDE:,} is the most")


def check_tokenizer(name, content):
    """name: of tokenizer.json, vocab.json, added_tokens.json or tokenizer_config.json. content: its
    value."""
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no tokenizer")
    vocabulary, added = {}, []  # {token: id} or a list of tokens; ids
    if name == "tokenizer.json":
        vocabulary = content["model"]["vocab"]
        added = [token["id"] for token in content.get("added_tokens") or ()]
        check_steps(content)
    elif name == "tokenizer_config.json":
        added = [int(key) for key in content.get("added_tokens_decoder") or ()]
    else:
        vocabulary = content
    if len(vocabulary) > MOST_TOKENS or len(added) > MOST_ADDED:
        raise ValueError(f"its tokenizer has {len(vocabulary):,} tokens and {len(added):,} added "
                         f"ones; {MOST_TOKENS:,} and {MOST_ADDED:,} are the most")
    ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else ()), *added]
    if strange := [i for i in ids if type(i) is not int or not 0 <= i < MOST_TOKENS]:
        raise ValueError(f"its tokenizer has the token {str(strange[0])[:30]}; there are "
                         f"{MOST_TOKENS:,} at most")


def check_steps(content):
    """Raises ValueError where the steps of a tokenizer.json could make a text much longer."""
    steps = {name: content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder",
                                                  "post_processor", "padding", "truncation")}
    if len(json.dumps(steps)) > MOST_STEPS:
        raise ValueError("the steps of its tokenizer are too large")
    if any(type(value) is int and value > 1 << 20 for _, value in values_of(steps["padding"])):
        raise ValueError("its tokenizer pads texts to more than a million tokens")
    growth, stack = 1.0, [steps["normalizer"], steps["pre_tokenizer"], steps["decoder"]]
    while stack:
        step = stack.pop()
        if isinstance(step, dict) and step.get("type") == "Replace":
            pattern = step.get("pattern")
            sought = pattern.get("String", "") if isinstance(pattern, dict) else ""
            growth *= max(1, len(str(step.get("content"))) / max(1, len(str(sought))))
        elif isinstance(step, dict) and step.get("type") == "Prepend":
            growth *= max(1, len(str(step.get("prepend"))))
        stack += step.values() if isinstance(step, dict) else step if isinstance(step, list) else ()
    if growth > MOST_GROWTH:
        raise ValueError("its tokenizer makes texts many times longer")


def is_kind(loader, config, wanted):
    """Whether a config is of a model of the kind. loader: one of transformers' AutoModel classes.
    wanted: one of KINDS."""
    found = loader._model_mapping.get(type(config), None)
    found = found if isinstance(found, list | tuple) else [found]
    return found[0] is not None and any(map(KINDS[wanted], found))


def check_size(loader, config, tensors):
    """Builds the model without memory, and compares it with its weights. loader: one of
    transformers' AutoModel classes."""
    parts = {id(part): part for part in (config, config.get_text_config(),
                                         getattr(config, "vision_config", config))}
    for part in parts.values():
        # Some models compute their positions number by number.
        positions = getattr(part, "max_position_embeddings", None) or 0
        if positions * (getattr(part, "hidden_size", None) or 1) > tensors.numbers:
            raise ValueError(f"its config.json says {positions:,} positions, which do not fit its "
                             f"weights")
    with torch.device("meta"):
        model = loader.from_config(config, trust_remote_code=False)
    weights = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if weights > tensors.numbers:
        raise ValueError(f"its config.json describes {weights:,} weights, but its files hold "
                         f"{tensors.numbers:,}")
    if buffers > 8 * tensors.numbers + (1 << 26):
        raise ValueError(f"its config.json describes tables of {buffers:,} bytes")
