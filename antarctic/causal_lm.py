"""The language model of stories.py, by name, folder or GGUF file: what it reads and draws."""

import math
import re
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

import torch

from antarctic.decoding import invert, nucleus
from antarctic.errors import InputError
from antarctic.files import existing_file


def is_gguf(name):
    return Path(name).suffix.lower() == ".gguf" or Path(name).is_file()


def reason(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextmanager
def reading_gguf(name):
    """Raises InputError where the body cannot read the GGUF file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of three libraries, none of which says what it raises
        raise InputError(f"the GGUF file {name} is damaged, or of a kind that transformers cannot "
                         f"read ({reason(error)})") from error


def load_gguf(loader, name, **options):
    """loader.from_pretrained of a GGUF file. It holds the weights with their sizes, the tokenizer
    and the chat template. Raises InputError."""
    path = existing_file(name, "GGUF file").absolute()  # else the working directory's comes first
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise InputError(f"transformers reads GGUF files such as {name} with the packages gguf and "
                         f"accelerate; pip install -r requirements.txt brings {' and '.join(missing)}")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{name} is not a GGUF file: it does not begin with the letters GGUF")
    with reading_gguf(name):
        return loader.from_pretrained(path.parent, gguf_file=str(path), local_files_only=True,
                                      **options)


def check_size(name, config):
    """Raises InputError where a GGUF file is too small for the model that its header tells of, which
    would only be noticed once memory for it was taken. The smallest formats have a bit and a half a
    weight."""
    from transformers import AutoModelForCausalLM
    size = Path(name).stat().st_size
    with reading_gguf(name), torch.device("meta"):
        size_named = f"{config.num_hidden_layers:,} layers"
        if config.num_hidden_layers < size:
            weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if weights < 8 * size:
                return
            size_named = f"{weights:,} weights"
    raise InputError(f"the GGUF file {name} is damaged: it tells of {size_named}, which its "
                     f"{size:,} bytes cannot hold")


def chat_prompts(tokenizer, name, prompts):
    """Each prompt as the user's turn in the model's own chat template, up to where the model
    answers. Raises InputError."""
    if not tokenizer.chat_template:
        raise InputError(f"the language model {name} has no chat template, so --chat cannot be used; "
                         f"without it a story goes on from the prompt itself")
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False,
                                             enable_thinking=False)  # those that know it think not
    except Exception as error:  # a template is a program of the model's author
        raise InputError(f"the chat template of {name} cannot be filled ({reason(error)})") from error


def encode(name, prompts, chat=False):
    """What the causal language model goes on from: (config, tokenizer, each prompt's token ids, how
    many tokens the model can set behind each).

    No weights are read yet. Raises InputError: the model is missing or of another kind, or a prompt leaves no room.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    from antarctic.pretrained import fetch, load, load_tokenizer
    gguf, what = is_gguf(name), "language model"
    if not gguf:
        fetch(name, what, ("tokenizer",))  # with the config, but before gigabytes of weights
    config = load_gguf(AutoConfig, name) if gguf else load(AutoConfig, name, what)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise InputError(f"{name} is a {config.model_type}, which cannot go on from a text as a causal language model does")
    if gguf:
        check_size(name, config)
    tokenizer = load_gguf(AutoTokenizer, name) if gguf else load_tokenizer(name, what)
    texts = chat_prompts(tokenizer, name, prompts) if chat else prompts
    tokens = tokenizer(texts, add_special_tokens=not chat)["input_ids"]  # a template has its own
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf  # some kinds have no end
    longest = max(range(len(prompts)), key=lambda i: len(tokens[i]))
    if len(tokens[longest]) >= positions:
        raise InputError(f'the prompt "{prompts[longest][:60]}..." has {len(tokens[longest])} tokens, but the language model '
                         f"{name} reads and writes {positions} at most")
    return config, tokenizer, tokens, [positions - len(ids) for ids in tokens]


def end_tokens(tokenizer, chat):
    """The ids that end a story. In a chat any special token does: models differ in which of them
    ends a turn, and none belongs into a story."""
    added = tokenizer.added_tokens_decoder.items() if chat else ()
    return sorted({tokenizer.eos_token_id, *(i for i, token in added if token.special)} - {None})


def load_lm(name, ends, device, dtype, config=None):
    """The causal language model; its generate() stops a row at a token id of `ends` and does nothing
    that is not asked of it. config: of encode(), which saves reading a GGUF file once more."""
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    from antarctic.pretrained import load
    if is_gguf(name):
        model, report = load_gguf(AutoModelForCausalLM, name, dtype=dtype, config=config,
                                  output_loading_info=True,
                                  quantization_config=GgufConfig(dequantize=True))
        if report["missing_keys"]:  # transformers would fill them with random numbers
            raise InputError(f"the GGUF file {name} is not a whole model: {len(report['missing_keys'])} "
                             f"tensors are missing, such as {min(report['missing_keys'])}")
    else:
        model = load(AutoModelForCausalLM, name, "language model", dtype=dtype)
    model = model.to(device).eval()
    # In place of the model's own, which may hold penalties. GPT-2 has no token to pad with; as padding is masked, any will do.
    model.generation_config = GenerationConfig(eos_token_id=ends or None,
                                               pad_token_id=max(ends, default=0))
    return model


@torch.inference_mode()
def sample(model, prompts, seeds, n, temperature=1.0, top_p=1.0):
    """Goes on from each prompt by at most n tokens, drawn from the nucleus.

    model: of load_lm. prompts: B lists of token ids. seeds: B integers. Returns B pairs: the list
    of new token ids up to an end token, and whether there was one. Each row has random numbers of
    its own, so its neighbours do not matter. They are drawn in a logits processor, which leaves the
    row one possible token; all else (positions, cache, stopping) is generate()'s, for any
    architecture.
    """
    width, ends = max(map(len, prompts)), model.generation_config.eos_token_id or []
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long, device=model.device)  # (B, width) each, padded on the left
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt):] = torch.tensor(prompt)
        mask[row, width - len(prompt):] = 1
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(_, logits):
        p, order = (t.cpu() for t in nucleus(logits / temperature, top_p))  # (B, K), (B, K)
        if p.isnan().any():
            raise InputError("the language model computes NaN; its weights are damaged, or need "
                             "another --dtype")
        # One random number a token, however many K its neighbours need: multinomial() takes K.
        drawn = torch.stack([invert(row[None], generator) for row, generator in zip(p, generators)])
        drawn = order.gather(1, drawn).to(logits.device)  # (B, 1)
        return torch.full_like(logits, -math.inf).scatter_(1, drawn, 0)

    output = model.generate(ids, attention_mask=mask, logits_processor=[draw], do_sample=False,
                            max_new_tokens=n)
    rows = output[:, width:].tolist()
    new = [list(takewhile(lambda token: token not in ends, row)) for row in rows]
    return [(ids, len(ids) < len(row)) for ids, row in zip(new, rows)]


def to_text(tokenizer, prompt, ids, new, ended):
    """The text of a story, which begins with the prompt, or where that is empty, as in a chat, with
    the model's first word. One that was broken off ends at its last full sentence, if it has one."""
    # Some tokenizers lose the space before new where it stands alone.
    begun, whole = (tokenizer.decode(t, skip_special_tokens=True, clean_up_tokenization_spaces=False) for t in (ids, ids + new))
    more = whole[len(begun):]
    if not ended:
        stops = [match.end() for match in re.finditer(r"""[.!?]["'”’)]*(?=\s|$)""", more)]
        more = more[:stops[-1]] if stops else more.rstrip("\ufffd")  # the start of a character
    return prompt + more if prompt else more.strip()
