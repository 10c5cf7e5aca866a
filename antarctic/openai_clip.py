"""OpenAI's CLIP files (.pt): vision transformers with transformers' names of the weights, and
ResNets in OpenAI's own code.
"""

import importlib.util
import math
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from antarctic.errors import InputError
from antarctic.model_files import load_tokenizer, own_weights
from antarctic.pickles import named_entries, torch_file
from antarctic.preprocessing import OpenAIPreprocessor
from antarctic.pretrained import CLIP_NAMES

SCRIPTS = Path(__file__).resolve().parents[1]  # OpenAI's repository can be cloned into this folder

TOWERS = {  # {beginning of OpenAI's name of a weight: beginning of transformers' name}
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

LAYERS = {".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.", ".attn.": ".self_attn.",
          ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2."}  # the same inside of names

NUMBERS = ("input_resolution", "context_length", "vocab_size")  # JIT archives have them as tensors


def read_openai_clip(path):
    """Reads a CLIP from OpenAI's .pt file: a state dict, or the JIT archive that OpenAI published.

    Returns (sizes, transformers' CLIPConfig as a dict; weights, {transformers' name: float32
    tensor}). Transformers has no ResNet: for one, sizes has only the text model and the image size,
    and weights keep OpenAI's names. OpenCLIP's files have the same names but often another
    activation, which cannot be read from the weights; load those models from the hub. Raises
    InputError, see torch_file.
    """
    with torch_file(path) as (content, fetch):
        entries = named_entries(content)
        for name in NUMBERS:  # clip_sizes reads them from the weights
            entries.pop(name, None)
        if not {"visual.conv1.weight", "text_projection"} <= entries.keys():
            raise InputError(f"{path} is not a CLIP model of OpenAI")
        weights = {name: fetch(entry).float() for name, entry in entries.items()}
        sizes = clip_sizes(weights)
        return sizes, weights if is_resnet(weights) else openai_to_transformers(weights)


def is_resnet(weights):
    return "visual.layer1.0.conv1.weight" in weights


def clip_sizes(weights):
    """transformers' CLIPConfig as a dict. weights: {OpenAI's name: tensor}. An attention head of
    OpenAI's models has 64 dimensions."""
    def tower(prefix, width):
        if not width or width % 64:
            raise ValueError(f"the width {width} is not a multiple of 64")
        layers = sum(
            name.startswith(f"{prefix}transformer.resblocks.") and name.endswith(".ln_1.weight")
            for name in weights)
        inner = len(weights[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"])
        return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
                "num_attention_heads": width // 64, "hidden_act": "quick_gelu"}

    vocabulary = len(weights["token_embedding.weight"])
    text = tower("", len(weights["ln_final.weight"]))
    text |= {"vocab_size": vocabulary, "bos_token_id": vocabulary - 2,
             "eos_token_id": vocabulary - 1,
             "max_position_embeddings": len(weights["positional_embedding"])}
    if is_resnet(weights):
        places = len(weights["visual.attnpool.positional_embedding"]) - 1  # without the mean's
        vision = {"image_size": 32 * math.isqrt(places)}
    else:
        width, _, patch, _ = weights["visual.conv1.weight"].shape
        places = len(weights["visual.positional_embedding"]) - 1  # without the class token's
        vision = tower("visual.", width)
        vision |= {"patch_size": patch, "image_size": patch * math.isqrt(places)}
    return {"projection_dim": weights["text_projection"].shape[1], "text_config": text,
            "vision_config": vision}


def openai_to_transformers(weights):
    """The weights of a CLIP with a vision transformer under transformers' names. Unknown names
    stay."""
    renamed = {}
    for name, tensor in weights.items():
        prefix = next((prefix for prefix in TOWERS if name.startswith(prefix)), None)
        if prefix:
            name = TOWERS[prefix] + name.removeprefix(prefix)
        for old, new in LAYERS.items():
            name = name.replace(old, new)
        if name.endswith("projection.weight"):
            tensor = tensor.T.contiguous()
        if ".in_proj_" in name:  # queries, keys and values in one tensor
            for part, rows in zip("qkv", tensor.chunk(3)):
                renamed[name.replace("in_proj_", f"{part}_proj.")] = rows
        else:
            renamed[name] = tensor
    return renamed


def openai_model_file():
    """The path of OpenAI's clip/model.py, or None.

    The file belongs to the installed package, or to OpenAI's repository cloned beside the scripts
    as CLIP/. It must define build_model, since other packages have the name clip, too. The current
    directory does not count, although Python searches it in a notebook and with -m: its files may
    come from anybody.
    """
    try:
        spec = importlib.util.find_spec("clip")  # imports nothing
    except ValueError:  # a module that a program made without a spec
        spec = None
    locations = spec.submodule_search_locations if spec else None
    folders = [Path(folder).resolve() for folder in locations or ()]
    folders = [folder for folder in folders
               if folder.parent == SCRIPTS or folder.parent != Path.cwd()]
    for path in (folder / "model.py" for folder in (*folders, SCRIPTS / "CLIP" / "clip")):
        if path.is_file() and "def build_model(" in path.read_text("utf-8", errors="replace"):
            return path
    return None


def openai_build_model(path):
    """OpenAI's function build_model. path: the .pt file to load, for messages. Raises InputError.

    Only model.py is imported: the package around it needs torchvision.
    """
    problem = f"{path} is a ResNet, which needs OpenAI's own code"
    file = openai_model_file()
    if file is None:
        raise InputError(f"{problem}, and that was not found: clone https://github.com/openai/CLIP "
                         f"into the folder {SCRIPTS}, or pip install "
                         f"git+https://github.com/openai/CLIP")
    try:
        spec = importlib.util.spec_from_file_location("openai_clip_model", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.build_model
    except Exception as error:  # another project's code can raise anything
        raise InputError(f"{problem}, but {file} does not run here ({type(error).__name__}): clone "
                         f"https://github.com/openai/CLIP anew") from error


class ResNetClip(torch.nn.Module):
    """A CLIP with a ResNet (RN50 ... RN50x64): OpenAI's own code behind the methods of
    transformers' CLIPModel, which has no ResNet.

    weights: as read_openai_clip returns them. path: their file, for messages. Raises InputError
    where OpenAI's code is missing, or does not load the weights.
    """

    def __init__(self, weights, path):
        super().__init__()
        build_model = openai_build_model(path)
        self.length = len(weights["positional_embedding"])
        try:
            self.clip = build_model(weights).float()
        except Exception as error:  # a weight is missing, unknown or of another shape
            raise InputError(f"{path} differs from OpenAI's CLIP models: OpenAI's own code does "
                             f"not load it") from error

    def get_image_features(self, pixel_values):
        return self.clip.encode_image(pixel_values)

    def get_text_features(self, input_ids, attention_mask):
        # OpenAI's code takes only texts of full length.
        padding = self.length - input_ids.shape[1]
        return self.clip.encode_text(torch.nn.functional.pad(input_ids, (0, padding)))


def load_openai_clip(path):
    """Loads OpenAI's .pt file as (model, tokenizer, image processor). Raises InputError.

    The file has no tokenizer: it comes from the folder of the file, else from the hub.
    """
    sizes, weights = read_openai_clip(path)
    config = CLIPConfig(**sizes)
    folder, hub = Path(path).parent, CLIP_NAMES["ViT-B/32"]
    source = folder if (folder / "tokenizer_config.json").is_file() else hub
    try:
        tokenizer = load_tokenizer(source, "tokenizer")
    except InputError as error:
        raise InputError(f"{path} needs OpenAI's tokenizer, which could not be loaded: save "
                         f"tokenizer.json and tokenizer_config.json of {hub} in the folder of the "
                         f"file") from error
    known = config.text_config.vocab_size
    if len(tokenizer) > known:
        raise InputError(f"{path} has embeddings of {known} tokens, but the tokenizer has "
                         f"{len(tokenizer)}")
    if is_resnet(weights):
        model = ResNetClip(weights, path)
        model.config = config
    else:
        model, report = CLIPModel.from_pretrained(None, config=config, state_dict=weights,
                                                  dtype=torch.float32, ignore_mismatched_sizes=True,
                                                  output_loading_info=True)
        mismatched = [name for name, *_ in report["mismatched_keys"]]
        wrong = [*report["missing_keys"], *report["unexpected_keys"], *mismatched]
        if wrong:
            raise InputError(f"{path} differs from OpenAI's CLIP models (at {min(wrong)})")
    own_weights(model, f"CLIP model {path}")
    side = config.vision_config.image_size
    return model, tokenizer, OpenAIPreprocessor(side, (side, side))
