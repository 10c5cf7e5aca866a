"""Other projects' files: results equal those of the projects, and no code of the files runs."""

import argparse
import hashlib
import importlib.util
import io
import json
import os
import pickle
import shutil
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BART, CLIP
from PIL import Image
from published import lightning_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPTokenizer,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from antarctic import openai_clip, pickles
from antarctic.cache import read_cache
from antarctic.checkpoints import checkpoint_settings, is_layernorm, load_checkpoint, trained_sha256
from antarctic.errors import InputError
from antarctic.held import held
from antarctic.model_files import file_identity, opened_model
from antarctic.preprocessing import OpenAIPreprocessor
from model import Captioner, Clip
from utils import linearize

TEXTS = ["a dog", "Two Red cats, next to a big house in the snow!", "penguin",
         "there is a train at night, it's 10 o'clock", "a"]
TABLES = [linearize(["a dog", "grass"]), linearize(["penguin"]),
          linearize(["two red cats", "cats", "snow", "a house", "next to"])]


def unit(tensor):
    return torch.nn.functional.normalize(tensor.float(), dim=-1)


def close(result, expected):
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    sizes = ((90, 64), (64, 64), (70, 151), (40, 31))
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
            for size in sizes]


# ------------------------------------------------------------------------------------ OpenAI's CLIP

def module_of(path):
    """A Python file as a module outside of sys.modules."""
    spec = importlib.util.spec_from_file_location(f"of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def openai():
    """OpenAI's model.py and tokenizer without the package's __init__, which needs torchvision.
    folder: of the package."""
    folder = Path(os.environ.get("OPENAI_CLIP", "nowhere"))
    if not (folder / "clip" / "model.py").is_file():
        pytest.skip("OpenAI's package is missing: test.sh installs it and sets OPENAI_CLIP to its "
                    "folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder)])  # with ftfy
        tokenizer = module_of(folder / "clip" / "simple_tokenizer.py").SimpleTokenizer()
    package = folder / "clip"
    return types.SimpleNamespace(model=module_of(package / "model.py"), tokenizer=tokenizer,
                                 folder=package)


@pytest.fixture(scope="module")
def beside(openai, tmp_path_factory):
    """A folder with OpenAI's tokenizer in transformers' format."""
    folder = tmp_path_factory.mktemp("openai")
    merges = list(openai.tokenizer.bpe_ranks)
    CLIPTokenizer(vocab=openai.tokenizer.encoder, merges=merges).save_pretrained(folder)
    return folder


def make_clip(openai, layers=2, width=64, patch=16):
    """A small CLIP of OpenAI's with random weights in half precision. Its layernorms are random,
    too; OpenAI's code sets them all to 1 and 0."""
    torch.manual_seed(0)
    clip = openai.model.CLIP(32, 64, layers, width, patch, 77, len(openai.tokenizer.encoder), 128,
                             2, 3)
    clip.eval().requires_grad_(False)
    for parameter in clip.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    openai.model.convert_weights(clip)
    return clip


def encoded_by_openai(openai, clip, texts, pixels):
    """(text vectors, image vectors) of unit length from OpenAI's package, in float32 on a CPU."""
    rows = [[49406, *openai.tokenizer.encode(text), 49407] for text in texts]
    tokens = torch.tensor([row + [0] * (77 - len(row)) for row in rows])
    clip = openai.model.build_model(dict(clip.state_dict())).float()
    return unit(clip.encode_text(tokens).detach()), unit(clip.encode_image(pixels).detach())


def save_jit(clip, path):
    """Saves a traced model like OpenAI's archives, with three numbers that are not weights."""
    for name, number in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
        vars(clip).pop(name, None)
        clip.register_buffer(name, torch.tensor(number))
    clip.float()  # a CPU lacks some operations in half precision
    inputs = torch.zeros(1, 3, 64, 64), torch.zeros(1, 77, dtype=torch.long)
    archive = torch.jit.trace(clip, inputs, check_trace=False)
    torch.jit.save(archive.half(), path)


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated
@pytest.mark.parametrize("form", ["state dict", "JIT archive"])
def test_a_pt_file_encodes_as_openais_package_does(openai, beside, images, form):
    original, path = make_clip(openai), beside / "tiny.pt"
    if form == "JIT archive":
        save_jit(original, path)
        saved = torch.jit.load(path).state_dict()
        with pickles.torch_file(path) as (content, fetch):
            read = {name: fetch(entry) for name, entry in pickles.named_entries(content).items()}
        assert read.keys() == saved.keys()
        assert all(torch.equal(read[name], saved[name]) for name in saved)
    else:
        torch.save(original.state_dict(), path)
    clip = Clip(str(path))
    pixels = clip.processor(images=images, return_tensors="pt")["pixel_values"]
    texts, pictures = encoded_by_openai(openai, original, TEXTS, pixels)
    close(clip.encode_texts(TEXTS, batch_size=2), texts)
    close(clip.encode_images(images), pictures)
    assert clip.processor == OpenAIPreprocessor(64, (64, 64))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert clip.dim == 32 and clip.identity == f"tiny.pt@{digest[:12]}"


@pytest.mark.parametrize("place", ["site-packages", "scripts/CLIP"])
def test_a_resnet_goes_through_openais_code(openai, beside, images, tmp_path, monkeypatch, place):
    """OpenAI's code is installed, or cloned beside the scripts. The package, which needs
    torchvision, is not imported."""
    original, path = make_clip(openai, (1, 1, 1, 1), 16, None), beside / "resnet.pt"
    torch.save(original.state_dict(), path)
    look_in(tmp_path, monkeypatch)
    package = shutil.copytree(openai.folder, tmp_path / place / "clip")
    (package / "__init__.py").write_text("raise RuntimeError('torchvision::nms does not exist')")
    clip = Clip(str(path))
    pixels = clip.processor(images=images, return_tensors="pt")["pixel_values"]
    texts, pictures = encoded_by_openai(openai, original, TEXTS, pixels)
    close(clip.encode_texts(TEXTS, batch_size=2), texts)
    close(clip.encode_images(images), pictures)
    shutil.rmtree(package)
    with pytest.raises(InputError, match="resnet.pt is a ResNet, .* was not found: clone https"):
        Clip(str(path))


def test_a_resnet_that_is_not_whole_is_refused(openai, beside, tmp_path, monkeypatch):
    weights = make_clip(openai, (1, 1, 1, 1), 16, None).state_dict()
    del weights["visual.layer2.0.conv1.weight"]
    torch.save(weights, beside / "resnet.pt")
    look_in(tmp_path, monkeypatch)
    shutil.copytree(openai.folder, tmp_path / "site-packages" / "clip")
    with pytest.raises(InputError, match="resnet.pt differs from OpenAI's CLIP models"):
        Clip(str(beside / "resnet.pt"))


def look_in(folder, monkeypatch):
    """Moves Python's modules, the scripts and the current directory into folders of `folder`."""
    for name in ("site-packages", "scripts", "current"):
        (folder / name).mkdir()
    monkeypatch.setattr(sys, "path", ["", str(folder / "site-packages")])
    monkeypatch.delitem(sys.modules, "clip", raising=False)
    monkeypatch.setattr(openai_clip, "SCRIPTS", folder / "scripts")
    monkeypatch.chdir(folder / "current")


def write_code(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    importlib.invalidate_caches()
    return path


OPENAIS = "def build_model(state_dict):\n    return 'built'\n"
RUNS = "import pathlib\npathlib.Path('ran').touch()\n"


@pytest.mark.parametrize("other", ["clip/__init__.py", "clip/model.py", "clip.py"])
def test_another_package_called_clip_is_not_taken_for_openais(tmp_path, monkeypatch, other):
    look_in(tmp_path, monkeypatch)
    write_code(tmp_path / "site-packages" / other, RUNS)
    with pytest.raises(InputError, match="RN50.pt is a ResNet, .* was not found: clone https"):
        openai_clip.openai_build_model("RN50.pt")
    cloned = write_code(tmp_path / "scripts" / "CLIP" / "clip" / "model.py", OPENAIS)
    assert openai_clip.openai_model_file() == cloned
    assert openai_clip.openai_build_model("RN50.pt")({}) == "built"
    assert not Path("ran").exists()


@pytest.mark.parametrize("place", ["clip/model.py", "CLIP/clip/model.py"])
@pytest.mark.parametrize("entry", ["", "the folder's path"])  # of sys.path: a notebook's, and -m's
def test_no_code_of_the_current_directory_is_run(tmp_path, monkeypatch, place, entry):
    look_in(tmp_path, monkeypatch)
    write_code(tmp_path / "current" / place, RUNS + OPENAIS)
    monkeypatch.setattr(sys, "path", [entry and str(tmp_path / "current"), *sys.path[1:]])
    with pytest.raises(InputError, match="was not found"):
        openai_clip.openai_build_model("RN50.pt")
    assert not Path("ran").exists()


def test_scripts_in_the_current_directory_find_what_lies_beside_them(tmp_path, monkeypatch):
    look_in(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path / "scripts")
    file = write_code(tmp_path / "scripts" / "CLIP" / "clip" / "model.py", OPENAIS)
    assert openai_clip.openai_model_file() == file


def test_openais_code_that_does_not_run_is_named(tmp_path, monkeypatch):
    look_in(tmp_path, monkeypatch)
    file = tmp_path / "site-packages" / "clip" / "model.py"
    write_code(file, OPENAIS + "import nowhere_to_be_found")
    with pytest.raises(InputError, match="model.py does not run here .ModuleNotFoundError.: clone"):
        openai_clip.openai_build_model("RN50.pt")


def test_a_clip_that_a_program_made_by_hand_is_no_package(tmp_path, monkeypatch):
    look_in(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "clip", types.ModuleType("clip"))
    assert openai_clip.openai_model_file() is None


@pytest.mark.parametrize("change", [
    lambda weights: weights.pop("ln_final.bias"),
    lambda weights: weights.update({"ln_final.bias": torch.zeros(3)}),
    lambda weights: weights.update({"visual.ln_pree.bias": torch.zeros(64)}),
], ids=["missing", "misshapen", "unknown"])
def test_a_pt_file_that_is_not_quite_a_clip_is_refused(openai, beside, change):
    weights = make_clip(openai).state_dict()
    change(weights)
    torch.save(weights, beside / "other.pt")
    message = "differs from OpenAI's CLIP models .at .*(final_layer_norm|ln_pree).bias"
    with pytest.raises(InputError, match=message):
        Clip(str(beside / "other.pt"))


def test_a_pt_file_without_a_tokenizer_says_what_to_do(openai, tmp_path):
    torch.save(make_clip(openai).state_dict(), tmp_path / "ViT-B-32.pt")
    with pytest.raises(InputError, match="save tokenizer.json and tokenizer_config.json"):
        Clip(str(tmp_path / "ViT-B-32.pt"))


@pytest.mark.parametrize("content", [
    {}, {"visual.conv1.weight": torch.ones(1), "text_projection": torch.ones(1)}, [1], "text"])
def test_a_pt_file_that_is_no_clip_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match="other.pt"):
        Clip(str(tmp_path / "other.pt"))


# ------------------------------------------------------------------------------------------- SigLIP

def siglip_tokenizer(folder):
    """SigLIP's tokenizer: sentencepiece, which drops punctuation and case; </s> is also the
    padding."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 9), model_prefix=str(folder / "spiece"), vocab_size=60,
        hard_vocab_limit=False, pad_id=-1, bos_id=-1, eos_id=1, unk_id=2, minloglevel=2)
    return {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True, "pad_token": "</s>",
            "eos_token": "</s>", "unk_token": "<unk>"}


def gemma_tokenizer(folder):
    """SigLIP 2's tokenizer: Gemma's, with capitals, though the model was trained without them."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.train_from_iterator(
        TEXTS * 9, trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>",
                                                             special_tokens=[("<eos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "add_eos_token": True,
            "padding_side": "right", **{f"{token[1:-1]}_token": token for token in special}}


def features(encode, inputs):
    with torch.no_grad():
        return unit(torch.cat([encode(**one).pooler_output for one in inputs]))


@pytest.mark.parametrize("tokenizer, config, network, processor", [
    pytest.param(siglip_tokenizer, SiglipConfig, SiglipModel, SiglipImageProcessorPil, id="SigLIP"),
    pytest.param(gemma_tokenizer, SiglipConfig, SiglipModel, SiglipImageProcessorPil, id="SigLIP2"),
    pytest.param(gemma_tokenizer, Siglip2Config, Siglip2Model, Siglip2ImageProcessorPil,
                 id="SigLIP2-NaFlex"),
])
def test_siglip_encodes_as_its_own_processor_and_model_do(tmp_path, images, tokenizer, config,
                                                          network, processor):
    torch.manual_seed(0)
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ids = {"vocab_size": 100, "bos_token_id": 2, "eos_token_id": 1}
    text = {**size, **ids, "hidden_size": 32, "projection_size": 48}
    vision = {**size, "patch_size": 16, "hidden_size": 48}
    if network is Siglip2Model:
        vision["num_patches"] = 16
        patches = {"max_num_patches": 16}  # NaFlex's processor cuts 256 by default
        processor(**patches).save_pretrained(tmp_path)
    else:
        vision["image_size"] = 32
        patches = {}
        processor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    network(config(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    settings = tokenizer(tmp_path)
    settings["processor_class"] = network.__name__.replace("Model", "Processor")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))

    clip = Clip(str(tmp_path))
    plain = AutoModel.from_pretrained(tmp_path).eval()
    prepare = AutoProcessor.from_pretrained(tmp_path)
    as_trained = dict(padding="max_length", max_length=64, truncation=True,
                      return_attention_mask=False, return_tensors="pt")
    texts = features(plain.get_text_features,
                     [prepare(text=[text.lower()], **as_trained) for text in TEXTS])
    inputs = [prepare(images=[image], return_tensors="pt", **patches) for image in images]
    pictures = features(plain.get_image_features, inputs)
    for batch_size in (1, 2, 128):
        close(clip.encode_texts(TEXTS, batch_size), texts)
    close(clip.encode_images(images), pictures)
    assert clip.dim == 48


# ----------------------------------------------------------------------- the original's checkpoints

@pytest.fixture(scope="module")
def lightning(checkpoint, tmp_path_factory):
    """A Lightning checkpoint with the parameters of the checkpoint fixture."""
    captioner, path = Captioner(BART), tmp_path_factory.mktemp("lightning") / "original.ckpt"
    load_checkpoint(checkpoint, captioner)
    settings = {"topk": 24, "maxlen_enc": 128, "maxlen_dec": 20, "clip_model": "ViT-B/16"}
    lightning_file(path, captioner, hyper_parameters=settings)
    return path


def beams(captioner):
    return [[text for text, _ in candidates]
            for candidates in captioner.beam(captioner.tokenize(TABLES, 64))]


def test_a_lightning_checkpoint_captions_as_ours_does(lightning, checkpoint, monkeypatch):
    ours, theirs = Captioner(BART, maxlen_dec=20), Captioner(BART, maxlen_dec=20)
    load_checkpoint(checkpoint, ours)
    read, plain = [], zipfile.ZipFile.read
    monkeypatch.setattr(zipfile.ZipFile, "read",
                        lambda archive, info: read.append(info.filename) or plain(archive, info))
    settings = load_checkpoint(lightning, theirs)
    assert settings == {"topk": 24, "maxlen_enc": 128, "maxlen_dec": 20, "lm": None}
    assert settings == checkpoint_settings(lightning)
    storages = [name for name in read if "/data/" in name]
    assert len(storages) == len(load_file(checkpoint))  # no other weights are read
    for (name, mine), (_, other) in zip(ours.model.named_parameters(),
                                        theirs.model.named_parameters()):
        assert torch.equal(mine, other), name
    assert beams(ours) == beams(theirs)
    assert trained_sha256(ours) == trained_sha256(theirs)


def test_the_digest_of_what_was_trained_is_of_every_number_and_of_nothing_else(
        lightning, checkpoint, tmp_path):
    captioner = Captioner(BART)
    load_checkpoint(checkpoint, captioner)
    digest, tensors = trained_sha256(captioner), load_file(checkpoint)
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    for name in tensors:
        changed = tensors | {name: tensors[name] + 1e-3 * (torch.arange(len(tensors[name])) == 7)}
        save_file(changed, tmp_path / "a.safetensors", metadata)
        load_checkpoint(tmp_path / "a.safetensors", captioner)
        assert trained_sha256(captioner) != digest, name
    load_checkpoint(lightning, captioner)
    with torch.no_grad():
        captioner.model.lm_head.weight.add_(1)  # not in a checkpoint
    assert trained_sha256(captioner) == digest


@pytest.mark.parametrize("saved, expected", [
    ({"hyper_parameters": argparse.Namespace(topk=5, maxlen_enc=64, maxlen_dec=16)}, (5, 64, 16)),
    ({"hyper_parameters": {"topk": "many", "maxlen_dec": -1}}, (10, 128, 32)),
    ({}, (10, 128, 32)),
])
def test_what_a_lightning_checkpoint_does_not_say_is_the_originals_default(
        tmp_path, saved, expected):
    torch.save({"state_dict": {}, **saved}, tmp_path / "a.ckpt")
    settings = checkpoint_settings(tmp_path / "a.ckpt")
    assert (settings["topk"], settings["maxlen_enc"], settings["maxlen_dec"]) == expected


@pytest.mark.parametrize("change", [
    lambda weights: weights.pop("model.encoder.layers.1.final_layer_norm.bias"),
    lambda weights: weights.update(
        {"model.encoder.layers.1.final_layer_norm.bias": torch.zeros(3)}),
    dict.clear,
])
def test_a_checkpoint_of_another_language_model_is_refused_and_changes_nothing(tmp_path, change):
    captioner = Captioner(BART)
    before = {name: tensor.clone() for name, tensor in captioner.model.state_dict().items()}
    weights = {name: torch.zeros_like(tensor) for name, tensor in before.items()
               if is_layernorm(name)}
    change(weights)
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="does not fit the language model"):
        load_checkpoint(tmp_path / "a.ckpt", captioner)
    after = captioner.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# ------------------------------------------------------------------------------ hostile and damaged

class Hostile:
    """An object whose loading calls a function, as any pickle can."""

    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


def refused_everywhere(path):
    captioner = Captioner(BART)
    for read in (checkpoint_settings, lambda path: load_checkpoint(path, captioner),
                 openai_clip.read_openai_clip):
        with pytest.raises(InputError, match=path.name) as refused:
            read(path)
        assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("call", ["system", "open", "exec"])
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(tmp_path, call):
    marker = tmp_path / "marker"
    hostile = {"system": Hostile(os.system, f"touch {marker}"),
               "open": Hostile(open, str(marker), "w"),
               "exec": Hostile(exec, f"open({str(marker)!r}, 'w')")}[call]
    lightning_file(tmp_path / "a.ckpt", Captioner(BART),
                   hyper_parameters={"topk": 10, "note": hostile})
    assert call in refused_everywhere(tmp_path / "a.ckpt")
    assert not marker.exists()
    with pytest.MonkeyPatch.context() as patch:  # Python itself runs the call
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        pickle.loads(pickle.dumps(hostile))
    assert marker.exists()


def global_(name):
    return b"c" + name.encode().replace(b" ", b"\n") + b"\n"


# Sets the attribute .a of the object before it.
ATTRIBUTE = b"N}X\x01\0\0\0a" + global_("pathlib Path") + b"s\x86b."
# Bytes, because Python pickles no object in this way. Most of them would change objects that read
# later files.
PICKLES = {
    "attribute of a stand-in class": global_("pathlib Path") + ATTRIBUTE,
    "attribute of a function": global_("torch._utils _rebuild_tensor_v2") + ATTRIBUTE,
    "dotted name": b"\x80\x04\x8c\x02os\x8c\x0bpath.os.system\x93\x8c\x04true\x85R.",
    "old instance": b"(S'true'\nios\nsystem\n.",
    "extension registry": b"\x82\x01)R.",
    "far memo": b"Nr\xff\xff\xff\x7f0\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "storage of another kind": global_("os system") + b"Q.",
    "storage that is no tuple": b"X\x01\0\0\0aQ.",
    "empty": b"",
    "cut short": b"\x80\x02}X",
}


@pytest.mark.parametrize("name", PICKLES)
def test_no_pickle_reaches_anything(tmp_path, name):
    reachable = pickles.StandIn, pickles.Reader, pickles.Reader.tensor
    before = [dict(vars(each)) for each in reachable]
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", PICKLES[name])
    refused_everywhere(tmp_path / "a.ckpt")
    assert [dict(vars(each)) for each in reachable] == before


def entry(key="0", dtype=torch.float32, offset=0, shape=(4,), stride=(1,)):
    return pickles.Entry(key, dtype, offset, shape, stride)


@pytest.mark.parametrize("bad", [
    entry(key="../data.pkl"), entry(key="7"), entry(shape=(5,)), entry(shape=(8,), stride=(0,)),
    entry(offset=1), entry(offset=-1), entry(stride=(-1,)), entry(dtype=torch.float64)], ids=str)
def test_a_tensor_that_is_not_in_the_file_is_refused(tmp_path, bad):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "a.pt")
    with pickles.torch_file(tmp_path / "a.pt") as (content, fetch):
        assert torch.equal(fetch(content["a"]), torch.arange(4.0)) and content["a"] == entry()
    with pytest.raises(InputError, match="a.pt cannot be read"):
        with pickles.torch_file(tmp_path / "a.pt") as (_, fetch):
            fetch(bad)


@pytest.mark.parametrize("offset, shape, stride", [
    (-1, (1,), (1,)), (0.5, (), ()), (0, (-1,), (1,)), (0, ("a", 1 << 40), (1, 1)),
    (0, (1 << 60,), (1,)), (0, (1,) * 99, (1,) * 99)])
def test_a_tensor_is_described_by_few_small_numbers(offset, shape, stride):
    with pytest.raises(pickle.UnpicklingError):
        pickles.Reader(io.BytesIO(), "a.pt").tensor(("0", torch.float32), offset, shape, stride)


def compressed(path, data):
    new = path.with_suffix(".new")
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    new.rename(path)


@pytest.mark.parametrize("damage", [
    lambda path, data: path.write_bytes(data[:len(data) // 2]),
    lambda path, data: path.write_bytes(data[:4]),
    lambda path, data: path.write_bytes(b""),
    lambda path, data: path.write_bytes(b"weights" * 1000),
    lambda path, data: path.write_bytes(data[:200] + bytes(100) + data[300:]),
    lambda path, data: zipfile.ZipFile(path, "w").close(),
    lambda path, data: torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=False),
    compressed,
], ids=["half", "four bytes", "empty", "garbage", "hole", "no pickle", "older than PyTorch 1.6",
        "compressed"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"model.encoder.layer_norm.weight": torch.arange(100.0)}}, path)
    assert checkpoint_settings(path)["topk"] == 10  # not damaged yet
    damage(path, path.read_bytes())
    refused_everywhere(path)


def test_a_module_inside_itself_ends(tmp_path):
    module = argparse.Namespace()
    module.itself = module
    torch.save(module, tmp_path / "a.pt")
    with pytest.raises(InputError, match="a.pt cannot be read"):
        openai_clip.read_openai_clip(tmp_path / "a.pt")


# ----------------------------------------------------------------------------- the original's cache

@pytest.mark.parametrize("dtype, slack", [(np.float32, 1e-7), (np.float16, 1e-3)])
def test_the_originals_cache_loads(tmp_path, capsys, dtype, slack):
    rows = unit(torch.randn(3, 8, generator=torch.Generator().manual_seed(0))).numpy()
    np.save(tmp_path / "postcache.npy", rows.astype(dtype))
    text = "a dog\ngeoff hinton\nfrisbee"  # the last line may lack its end
    (tmp_path / "postcache.txt").write_text(text)
    entries, embeddings = read_cache([tmp_path / "postcache.txt"], [tmp_path / "postcache.npy"],
                                     "ViT-B/16", 8)
    assert entries == ["a dog", "geoff hinton", "frisbee"] and embeddings[:].dtype == torch.float32
    torch.testing.assert_close(embeddings[:], torch.from_numpy(rows), atol=slack, rtol=0)
    assert "it is not checked" in capsys.readouterr().err


def test_a_folder_a_file_and_a_name_have_identities(tmp_path):
    path, digest = tmp_path / "ViT-B-32.pt", hashlib.sha256(b"weights").hexdigest()
    path.write_bytes(b"weights")
    with held(path, "model") as file:
        assert file_identity(file) == f"ViT-B-32.pt@{digest[:12]}"
    digest = hashlib.sha256((Path(CLIP) / "model.safetensors").read_bytes()).hexdigest()
    with opened_model(CLIP, "model", ("weights",)) as files:
        assert files.identity() == f"clip@{digest[:12]}"
