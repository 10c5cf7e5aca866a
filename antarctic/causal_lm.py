"""The causal language model of stories.py, from a name, folder or GGUF file, and its samples."""

import math
import re
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

import torch

from antarctic.bounded import in_child
from antarctic.decoding import invert, nucleus
from antarctic.distributed import on_rank0
from antarctic.errors import InputError
from antarctic.files import existing_file
from antarctic.held import held

MOST_FILLED = 100_000  # characters of a prompt in its chat template


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
    except Exception as error:  # three libraries read the file, and none documents its errors
        raise InputError(f"the GGUF file {name} is damaged, or of a kind that transformers cannot "
                         f"read ({reason(error)})") from error


def load_gguf(loader, name, **options):
    """loader.from_pretrained of a GGUF file, which has the weights, their sizes, the tokenizer and
    the chat template. Raises InputError."""
    from antarctic.model_files import quiet_transformers
    quiet_transformers()
    # transformers would look for a relative path in the working directory first.
    path = existing_file(name, "GGUF file").absolute()
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise InputError(f"transformers reads GGUF files such as {name} with the packages gguf and "
                         f"accelerate; pip install -r requirements.txt installs "
                         f"{' and '.join(missing)}")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{name} is not a GGUF file: it does not begin with the letters GGUF")
    with reading_gguf(name):
        return loader.from_pretrained(path.parent, gguf_file=str(path), local_files_only=True,
                                      trust_remote_code=False, **options)


def check_size(name, config):
    """Raises InputError where a GGUF file is too small for the model that its header describes,
    before memory for this model is taken. The smallest formats have one and a half bits a weight.
    """
    from transformers import AutoModelForCausalLM
    size = Path(name).stat().st_size
    with reading_gguf(name), torch.device("meta"):
        described = f"{config.num_hidden_layers:,} layers"
        if config.num_hidden_layers < size:
            weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if weights < 8 * size:
                return
            described = f"{weights:,} weights"
    raise InputError(f"the GGUF file {name} is damaged: its header describes {described}, which do "
                     f"not fit into its {size:,} bytes")


def chat_prompts(tokenizer, name, prompts):
    """The text of each prompt as the user's turn in the model's own chat template, up to the place
    where the model answers. Raises InputError."""
    if not tokenizer.chat_template:
        raise InputError(f"the language model {name} has no chat template, so --chat cannot be "
                         f"used; without --chat a story continues the prompt itself")
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    try:
        # A template is a program of the model's author. enable_thinking turns off the reasoning of
        # models that have it; other templates ignore it.
        texts = in_child(lambda: tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False, enable_thinking=False))
    except ValueError as error:
        raise InputError(f"the chat template of {name} cannot be filled ({error})") from error
    if (longest := max(map(len, texts))) > MOST_FILLED:  # a tokenizer would take minutes
        raise InputError(f"the chat template of {name} makes {longest:,} characters of a prompt")
    return texts


def encode(name, prompts, chat=False):
    """Tokenizes the prompts. Returns (config, tokenizer, token ids of each prompt, the most tokens
    that the model can write after each). The tokenizer's attribute digests is that of its
    ModelFiles.

    No weights are read yet. Raises InputError where the model is missing or of another kind, or
    where a prompt is too long.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    from antarctic.model_files import opened_model, telling
    if is_gguf(name):
        config = load_gguf(AutoConfig, name)
        require_causal(name, config, MODEL_FOR_CAUSAL_LM_MAPPING)
        check_size(name, config)
        tokenizer = load_gguf(AutoTokenizer, name)
        tokenizer.digests = {}  # the model's identity is of the whole file
    else:
        # And the config, before gigabytes of weights.
        with opened_model(name, "language model", ("tokenizer",)) as files:
            config = files.load(AutoConfig)
            require_causal(name, config, MODEL_FOR_CAUSAL_LM_MAPPING)
            tokenizer = files.load_tokenizer()
    texts = chat_prompts(tokenizer, name, prompts) if chat else prompts
    with telling("language model", name):  # a template has special tokens of its own
        tokens = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
    vocabulary = config.get_text_config().vocab_size
    if (highest := max(map(max, filter(None, tokens)), default=0)) >= vocabulary:
        raise InputError(f"the language model {name} has embeddings of {vocabulary:,} tokens, but "
                         f"its tokenizer gives the token {highest:,}")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    positions = positions or math.inf  # some architectures have no limit
    longest = max(range(len(prompts)), key=lambda i: len(tokens[i]))
    if len(tokens[longest]) >= positions:
        raise InputError(f'the prompt "{prompts[longest][:60]}..." has {len(tokens[longest])} '
                         f"tokens, but the language model {name} reads and writes at most "
                         f"{positions}")
    return config, tokenizer, tokens, [positions - len(ids) for ids in tokens]


def require_causal(name, config, known):
    if type(config) not in known or config.is_encoder_decoder:
        raise InputError(f"{name} is a {config.model_type}, which is not a causal language model")


def end_tokens(tokenizer, chat):
    """The token ids that end a story, sorted. In a chat they are all special tokens: models differ
    in the token that ends a turn, and none belongs in a story."""
    added = tokenizer.added_tokens_decoder.items() if chat else ()
    return sorted({tokenizer.eos_token_id, *(i for i, token in added if token.special)} - {None})


def load_lm(name, ends, device, dtype, config=None):
    """Loads the causal language model. Its generate() ends a row at a token id of `ends`; all other
    settings of the model's own for generate() are dropped. config: as encode returns it, so that a
    GGUF file is read once less. Its attribute identity names it by the weights that were read.
    Raises InputError."""
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    from antarctic.model_files import file_identity, opened_model, own_weights
    if is_gguf(name):
        with held(name, "GGUF file") as file:
            model, report = load_gguf(AutoModelForCausalLM, name, dtype=dtype, config=config,
                                      output_loading_info=True,
                                      quantization_config=GgufConfig(dequantize=True))
            model.identity = on_rank0(lambda: file_identity(file))
        if report["missing_keys"]:  # transformers would fill them with random numbers
            raise InputError(f"the GGUF file {name} is not a complete model: "
                             f"{len(report['missing_keys'])} tensors are missing, such as "
                             f"{min(report['missing_keys'])}")
        own_weights(model, f"GGUF file {name}")
    else:
        with opened_model(name, "language model", ("weights",)) as files:
            model = files.load_model(AutoModelForCausalLM, "causal language model", config,
                                     dtype=dtype)
            model.identity = on_rank0(files.identity)
    model = model.to(device).eval()
    # The model's own settings may have penalties. GPT-2 has no padding token; padding is masked, so
    # any token serves.
    model.generation_config = GenerationConfig(eos_token_id=ends or None,
                                               pad_token_id=max(ends, default=0))
    return model


@torch.inference_mode()
def sample(model, prompts, seeds, n, temperature=1.0, top_p=1.0):
    """Continues each prompt by at most n tokens, drawn from the nucleus.

    model: as load_lm returns it. prompts: B lists of token ids. seeds: B integers. Returns B pairs:
    the list of new token ids before an end token, and whether there was one.

    Each row has its own random numbers, so it does not depend on the rest of the batch. A logits
    processor draws the token and leaves the row no other; generate() does the rest (positions,
    cache, stopping) for any architecture.
    """
    width, ends = max(map(len, prompts)), model.generation_config.eos_token_id or []
    shape = (2, len(prompts), width)
    ids, mask = torch.zeros(shape, dtype=torch.long, device=model.device)  # (B, width), padded left
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt):] = torch.tensor(prompt)
        mask[row, width - len(prompt):] = 1
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(_, logits):
        p, order = (t.cpu() for t in nucleus(logits / temperature, top_p))  # (B, K), (B, K)
        if p.isnan().any():
            raise InputError("the language model computes values that are not finite (NaN); its "
                             "weights are damaged, or too large for this --dtype")
        # invert draws one random number a token, multinomial() would draw K, and K depends on the
        # other rows.
        uniform = torch.cat([torch.rand(1, generator=generator, dtype=torch.double)
                             for generator in generators])  # (B,)
        drawn = order.gather(1, invert(p, uniform)[:, None]).to(logits.device)  # (B, 1)
        return torch.full_like(logits, -math.inf).scatter_(1, drawn, 0)

    output = model.generate(ids, attention_mask=mask, logits_processor=[draw], do_sample=False,
                            max_new_tokens=n)
    rows = output[:, width:].tolist()
    new = [list(takewhile(lambda token: token not in ends, row)) for row in rows]
    return [(ids, len(ids) < len(row)) for ids, row in zip(new, rows)]


def to_text(tokenizer, prompt, ids, new, ended):
    """The text of a story. It begins with the prompt, or in a chat, where the prompt is empty, with
    the model's first word.

    ids: of the prompt. new: ids of the story. ended: whether the model ended the story; else it is
    cut after its last full sentence, if it has one.
    """
    # Decoding `new` alone would lose its leading space with some tokenizers.
    before, whole = (tokenizer.decode(tokens, skip_special_tokens=True,
                                      clean_up_tokenization_spaces=False)
                     for tokens in (ids, ids + new))
    more = whole[len(before):]
    if not ended:
        stops = [match.end() for match in re.finditer(r"""[.!?]["'”’)]*(?=\s|$)""", more)]
        more = more[:stops[-1]] if stops else more.rstrip("\ufffd")  # half a character
    return prompt + more if prompt else more.strip()
