"""OpenAI's CLIP files (.pt): their weights under transformers' names, and their ResNets through
OpenAI's own code."""

import importlib.util
import math
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from antarctic.errors import InputError
from antarctic.pickles import named_entries, torch_file
from antarctic.preprocessing import OpenAIPreprocessor
from antarctic.pretrained import CLIP_NAMES, load_tokenizer

SCRIPTS = Path(__file__).resolve().parents[1]  # beside which OpenAI's repository can lie

TOWERS = {  # OpenAI's names of its weights to transformers', by how they begin
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # sic
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}

LAYERS = {
    ".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.", ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2."
}


def read_openai_clip(path):
    """A CLIP of OpenAI's from its .pt file: a state dict, or the JIT archive that OpenAI published.

    Returns (sizes, transformers' CLIPConfig as a dict, read from the weights; weights,
    {transformers' name: float32 tensor}). Of a ResNet, which transformers does not have, sizes tell
    of the text and the image size alone, and names stay OpenAI's. OpenCLIP's files have the same
    names but often another activation, which weights do not tell: take those from the hub. Raises
    InputError, see torch_file.
    """
    with torch_file(path) as (content, fetch):
        entries = named_entries(content)
        for name in ("input_resolution", "context_length",
                     "vocab_size"):  # of JIT archives; told by the weights, too
            entries.pop(name, None)
        if not {"visual.conv1.weight", "text_projection"} <= entries.keys():
            raise InputError(f"{path} holds no CLIP of OpenAI's")
        weights = {name: fetch(entry).float() for name, entry in entries.items()}
        sizes = clip_sizes(weights)
        return sizes, weights if is_resnet(weights) else openai_to_transformers(weights)


def is_resnet(weights):
    return "visual.layer1.0.conv1.weight" in weights


def clip_sizes(weights):
    """transformers' CLIPConfig as a dict. weights: by OpenAI's names. OpenAI's heads are 64
    wide."""
    def tower(prefix, width):
        if not width or width % 64:
            raise ValueError(f"{width} is no width of OpenAI's")
        layers = sum(
            name.startswith(f"{prefix}transformer.resblocks.") and name.endswith(".ln_1.weight")
            for name in weights)
        inner = len(weights[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"])
        return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
                "num_attention_heads": width // 64, "hidden_act": "quick_gelu"}

    vocabulary, length = len(weights["token_embedding.weight"]), len(
        weights["positional_embedding"])
    text = tower("", len(weights["ln_final.weight"])) | {
        "vocab_size": vocabulary, "max_position_embeddings": length, "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1
    }
    if is_resnet(weights):
        vision = {
            "image_size": 32 * math.isqrt(len(weights["visual.attnpool.positional_embedding"]) - 1)
        }
    else:
        width, _, patch, _ = weights["visual.conv1.weight"].shape
        vision = tower("visual.", width) | {
            "patch_size": patch,
            "image_size": patch * math.isqrt(len(weights["visual.positional_embedding"]) - 1)
        }
    return {
        "projection_dim": weights["text_projection"].shape[1], "text_config": text,
        "vision_config": vision
    }


def openai_to_transformers(weights):
    """The weights of a CLIP with a vision transformer, renamed; a name that is not OpenAI's
    stays."""
    renamed = {}
    for name, tensor in weights.items():
        begin = next((begin for begin in TOWERS if name.startswith(begin)), None)
        if begin:
            name = TOWERS[begin] + name.removeprefix(begin)
        for old, new in LAYERS.items():
            name = name.replace(old, new)
        if name.endswith("projection.weight"):
            tensor = tensor.T.contiguous()
        if ".in_proj_" in name:  # queries, keys and values in one
            renamed |= {
                name.replace("in_proj_", f"{part}_proj."): rows
                for part, rows in zip("qkv", tensor.chunk(3))
            }
        else:
            renamed[name] = tensor
    return renamed


def openai_model_file():
    """The path of OpenAI's clip/model.py, or None.

    It is that of the installed package, else of their repository, cloned beside the scripts as
    CLIP/. Other packages are called clip, too, so the file must define build_model. Nothing is
    taken from the current directory, which Python searches in a notebook and with -m: the files
    there may be anybody's.
    """
    try:
        spec = importlib.util.find_spec("clip")  # imports nothing
    except ValueError:  # a module without a spec, made by hand
        spec = None
    found = spec.submodule_search_locations if spec else None
    folders = [Path(folder).resolve() for folder in found or ()]
    folders = [folder for folder in folders
               if folder.parent == SCRIPTS or folder.parent != Path.cwd()]
    for path in (folder / "model.py" for folder in (*folders, SCRIPTS / "CLIP" / "clip")):
        if path.is_file() and "def build_model(" in path.read_text("utf-8", errors="replace"):
            return path
    return None


def openai_build_model(path):
    """OpenAI's build_model, to load the file path with. Raises InputError.

    The package around model.py is not imported: it needs torchvision, and model.py does not.
    """
    kind = f"{path} is a ResNet of OpenAI's, which their own code computes"
    if (file := openai_model_file()) is None:
        raise InputError(f"{kind}, and that was not found: clone https://github.com/openai/CLIP "
                         f"into the folder {SCRIPTS}, or pip install "
                         f"git+https://github.com/openai/CLIP")
    try:
        spec = importlib.util.spec_from_file_location("openai_clip_model", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.build_model
    except Exception as error:  # another project's code can fail in every way there is
        raise InputError(f"{kind}, but {file} does not run here ({type(error).__name__}): clone "
                         f"https://github.com/openai/CLIP anew") from error


class ResNetClip(torch.nn.Module):
    """A CLIP with a ResNet (RN50 ... RN50x64), which transformers does not have: OpenAI's own code
    computes it, behind the methods of transformers' CLIPModel.

    weights: as read_openai_clip gives them; path: their file. Raises InputError where OpenAI's code
    is not there, or does not take the weights.
    """

    def __init__(self, weights, path):
        super().__init__()
        build_model = openai_build_model(path)
        self.length = len(weights["positional_embedding"])
        try:
            self.clip = build_model(weights).float()
        except Exception as error:  # a name too many, one too few, or another shape
            raise InputError(f"{path} is not quite a CLIP of OpenAI's: their own code does not "
                             f"load it") from error

    def get_image_features(self, pixel_values):
        return self.clip.encode_image(pixel_values)

    def get_text_features(self, input_ids, attention_mask):
        full = torch.nn.functional.pad(
            input_ids, (0, self.length - input_ids.shape[1]))  # the package takes no shorter texts
        return self.clip.encode_text(full)


def load_openai_clip(path):
    """A .pt file of OpenAI's as (model, tokenizer, image processor). Raises InputError.

    A tokenizer is not in the file: it is taken from the folder that the file lies in, else from the
    hub.
    """
    sizes, weights = read_openai_clip(path)
    config = CLIPConfig(**sizes)
    folder, hub = Path(path).parent, CLIP_NAMES["ViT-B/32"]
    try:
        tokenizer = load_tokenizer(folder if (folder / "tokenizer_config.json").is_file() else hub,
                                   "tokenizer")
    except InputError as error:
        raise InputError(
            f"{path} needs OpenAI's tokenizer, which cannot be had from here: save tokenizer.json "
            "and "
            f"tokenizer_config.json of {hub} in the folder of the file") from error
    if len(tokenizer) > config.text_config.vocab_size:
        raise InputError(
            f"{path} knows {config.text_config.vocab_size} tokens, but the tokenizer has "
            f"{len(tokenizer)}"
        )
    if is_resnet(weights):
        model = ResNetClip(weights, path)
        model.config = config
    else:
        model, report = CLIPModel.from_pretrained(None, config=config, state_dict=weights,
                                                  dtype=torch.float32, ignore_mismatched_sizes=True,
                                                  output_loading_info=True)
        if wrong := [
                *report["missing_keys"], *report["unexpected_keys"],
                *(name for name, *_ in report["mismatched_keys"])
        ]:
            raise InputError(f"{path} is not quite a CLIP of OpenAI's (at {min(wrong)})")
    side = config.vision_config.image_size
    return model, tokenizer, OpenAIPreprocessor(side, (side, side))
