"""Where an entry was seen: shares that add up, the crop that is undone, maps in the results."""

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLIP
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from antarctic.clip import Clip
from antarctic.errors import InputError
from antarctic.images import read_image
from antarctic.openai_clip import LAYERS, TOWERS, ResNetClip
from antarctic.preprocessing import OpenAIPreprocessor
from antarctic.where import contributions, map_box, maps, require_maps

MEANS = OpenAIPreprocessor(1, (1, 1))[2:]
SMALL = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96,
         "hidden_size": 48}


@pytest.fixture(scope="module")
def clip():
    torch.set_num_threads(1)
    return Clip(CLIP)


@pytest.fixture(scope="module")
def images(world):
    return [read_image(path) for path in sorted((world / "near").glob("*.png"))[:3]]


def model_folder(folder, network, config, processor, **vision):
    """A folder with a small model of random weights, which are large enough to matter."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    tokenizer.save_pretrained(folder)
    text = SMALL | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    if network is not CLIPModel:
        text["projection_size"] = SMALL["hidden_size"]
    model = network(config(text_config=text, vision_config=SMALL | vision, projection_dim=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """32 pixels in patches of 10: two are in none."""
    return Clip(model_folder(
        tmp_path_factory.mktemp("siglip"), SiglipModel, SiglipConfig,
        SiglipImageProcessorPil(size={"height": 32, "width": 32}), image_size=32, patch_size=10))


@pytest.fixture(scope="module")
def openai(tmp_path_factory):
    """One of OpenAI's .pt files, with random weights."""
    folder = tmp_path_factory.mktemp("openai")
    torch.manual_seed(1)
    size = SMALL | {"hidden_size": 64, "num_attention_heads": 1}
    AutoTokenizer.from_pretrained(CLIP).save_pretrained(folder)
    text = size | {"vocab_size": 1100}
    model = CLIPModel(CLIPConfig(text_config=text, projection_dim=32,
                                 vision_config=size | {"image_size": 48, "patch_size": 16}))
    weights = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in TOWERS.items():
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        for theirs, ours in LAYERS.items():
            name = name.replace(ours, theirs)
        tensor = tensor + 0.1 * torch.randn_like(tensor)
        weights[name] = tensor.T if name in ("visual.proj", "text_projection") else tensor
    for query in [name for name in weights if ".q_proj." in name]:
        parts = [weights.pop(query.replace(".q_", f".{part}_")) for part in "qkv"]
        weights[query.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    torch.save(weights, folder / "tiny.pt")
    return Clip(str(folder / "tiny.pt"))


# ------------------------------------------------------------------------------------- the shares

def reference(clip, images):
    """What a CLIP's unit vectors are made of, token by token, in float64 by eager attention:
    (shares of all tokens in them, (B, 1 + patches, dim); the rest, (B, dim))."""
    config, kept = copy.deepcopy(clip.model.config), {}
    config.vision_config._attn_implementation = config._attn_implementation = "eager"
    model = CLIPModel(config).double().eval()
    model.load_state_dict(clip.model.state_dict())
    for number, layer in enumerate(model.vision_model.encoder.layers):
        layer.mlp.register_forward_hook(lambda _, inputs, output, number=number: kept.update(
            {number: output[:, 0]}))
    with torch.no_grad():
        pixels = clip.batch([clip.prepare(image) for image in images])["pixel_values"].double()
        output = model.vision_model(pixels, output_attentions=True, output_hidden_states=True)
        norm = model.vision_model.post_layernorm
        rest, shares = output.hidden_states[0][:, 0], 0
        for number, layer in enumerate(model.vision_model.encoder.layers):
            states = layer.layer_norm1(output.hidden_states[number])
            attention, width = layer.self_attn, layer.self_attn.head_dim
            for head, weights in enumerate(output.attentions[number].unbind(1)):
                part = slice(head * width, (head + 1) * width)
                values = attention.v_proj(states)[..., part]
                brought = values @ attention.out_proj.weight[:, part].T
                shares = shares + weights[:, 0, :, None] * brought
            rest = rest + attention.out_proj.bias + kept[number]
        whole = rest + shares.sum(1)
        deviation = (whole.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()

        def project(state, deviation, bias=0):
            state = (state - state.mean(-1, keepdim=True)) / deviation * norm.weight + bias
            return model.visual_projection(state)

        norms = model.visual_projection(output.pooler_output).norm(dim=-1, keepdim=True)
        return (project(shares, deviation[:, None]) / norms[:, None],
                project(rest, deviation, norm.bias) / norms)


@pytest.mark.parametrize("kind, shape", [("clip", (3, 36, 128)), ("openai", (3, 9, 32))])
def test_the_shares_with_the_class_tokens_and_the_rest_are_the_vector(kind, shape, request, images):
    clip = request.getfixturevalue(kind)
    features, c = contributions(clip, images)
    shares, rest = reference(clip, images)
    assert c.shape == shape and c.dtype == torch.float32
    assert (c - shares[:, 1:]).abs().max() < 1e-5
    assert (rest + shares[:, 0] + c.sum(1) - features).abs().max() < 1e-5
    assert c.sum(1).norm(dim=-1).min() > 0.1  # patches matter


@pytest.mark.parametrize("kind", ["clip", "openai", "siglip"])
def test_the_vectors_are_those_without_and_one_image_is_as_a_batch(kind, request, images):
    clip = request.getfixturevalue(kind)
    plain = clip.encode_images(images)
    features, c = contributions(clip, images)
    assert torch.equal(features, plain)
    assert torch.equal(clip.encode_images(images), plain)  # nothing stays behind
    for i, image in enumerate(images):
        alone, share = contributions(clip, [image])
        assert (alone[0] - features[i]).abs().max() < 1e-5 and (share[0] - c[i]).abs().max() < 1e-5


def test_siglips_shares_are_the_slope_of_its_pooling_head(siglip, images):
    """A patch's share is how the vector moves, to first order, as the patch's part of what the
    head attends to grows."""
    head, norm = siglip.model.vision_model.head, None
    features, c = contributions(siglip, images[:1])
    states = siglip.model.vision_model(
        **siglip.batch([siglip.prepare(images[0])])).last_hidden_state.double()
    head = head.double()
    try:
        attention = head.attention
        _, weights = attention(head.probe, states, states, average_attn_weights=False)
        values = torch.nn.functional.linear(states, *(each.chunk(3)[2] for each in (
            attention.in_proj_weight, attention.in_proj_bias)))
        parts = weights[0, :, 0, :, None] * values[0].unflatten(-1, (2, -1)).transpose(0, 1)
        written = parts.transpose(0, 1).flatten(1) @ attention.out_proj.weight.T  # (patches, width)
        whole = written.sum(0) + attention.out_proj.bias

        def pooled(state):
            return state + head.mlp(head.layernorm(state))

        norm = pooled(whole).norm()
        assert (pooled(whole) / norm - features[0]).abs().max() < 1e-5
        for patch in range(9):
            step = 1e-4 * written[patch]
            slope = (pooled(whole + step) - pooled(whole - step)) / 2e-4 / norm
            assert (slope - c[0, patch]).abs().max() < 1e-4
    finally:
        head.float()


def test_bfloat16_gives_nearly_the_same_shares(images, clip):
    rounded = Clip(CLIP, image_dtype=torch.bfloat16)
    features, c = contributions(rounded, images)
    assert torch.equal(features, rounded.encode_images(images)) and c.dtype == torch.float32
    exact = contributions(clip, images)[1]
    assert (c - exact).norm() < 0.05 * exact.norm()


def test_maps_are_products_with_rows_of_any_length(clip, images):
    _, c = contributions(clip, images)
    rows = torch.randn(3, 4, 128) * torch.tensor([0.1, 1, 2, 5])[:, None]
    found = maps(c, rows)
    assert found.shape == (3, 4, 6, 6)
    assert found[1, 2, 3, 4].item() == pytest.approx((c[1, 22] @ rows[1, 2]).item(), abs=1e-6)


# ---------------------------------------------------------------------------------------- the crop

def place_in_photo(clip, box, patch, size):
    """Where the middle of a patch lies, as shares of a photo's sides. patch: its number."""
    side = clip.model.config.vision_config.image_size // clip.model.config.vision_config.patch_size
    y, x = divmod(patch, side)
    left, top, right, bottom = box
    return (left + (x + 0.5) / side * (right - left)), (top + (y + 0.5) / side * (bottom - top))


@pytest.mark.parametrize("size", [(640, 240), (250, 600), (96, 96), (333, 500), (97, 60)])
@pytest.mark.parametrize("kind", ["openai", "siglip", "bilinear"])
def test_a_patch_is_found_where_it_lies_in_the_photo(kind, size, request):
    """The photo's colours say where in it a pixel lies; CLIP's own preprocessing is asked."""
    clip = request.getfixturevalue("siglip" if kind == "siglip" else "openai")
    if kind == "bilinear":
        processor = CLIPImageProcessorPil(size={"shortest_edge": 52}, resample=2, crop_size={
            "height": 48, "width": 48})
        clip = SimpleNamespace(model=clip.model, processor=processor, prepare=partial(
            Clip.prepare, SimpleNamespace(processor=processor)))
    width, height = size
    photo = np.zeros((height, width, 3), np.uint8)
    photo[..., 0] = (255 * (np.arange(width) + 0.5) / width)[None]
    photo[..., 1] = (255 * (np.arange(height) + 0.5) / height)[:, None]
    image = Image.fromarray(photo)
    [pixels] = clip.prepare(image)["pixel_values"]
    if kind == "siglip":
        pixels = pixels * 0.5 + 0.5
    else:
        pixels = pixels * np.array(MEANS[1])[:, None, None] + np.array(MEANS[0])[:, None, None]
    box = map_box(clip, size)
    patch = clip.model.config.vision_config.patch_size
    for number in range(9):
        y, x = divmod(number, 3)
        seen = pixels[:2, y * patch:(y + 1) * patch, x * patch:(x + 1) * patch].mean((1, 2))
        expected = place_in_photo(clip, box, number, size)
        assert seen == pytest.approx(expected, abs=0.02)


# ---------------------------------------------------------------------------------- who is refused

def with_model(model, processor=None):
    return SimpleNamespace(model=model, processor=processor)


def test_models_whose_shares_are_not_known_are_refused_by_name(siglip, openai):
    resnet = ResNetClip.__new__(ResNetClip)
    torch.nn.Module.__init__(resnet)
    resnet.config = CLIPConfig()
    with pytest.raises(InputError, match="not a CLIP with a ResNet"):
        require_maps(with_model(resnet))
    tiny = {"text_config": SMALL, "vision_config": SMALL}
    with pytest.raises(InputError, match="not SigLIP 2 NaFlex"):
        require_maps(with_model(Siglip2Model(Siglip2Config(**tiny))))
    with pytest.raises(InputError, match="not models of the kind clip_vision_model"):
        require_maps(with_model(SimpleNamespace(config=CLIPConfig().vision_config)))
    headless = SiglipConfig(**tiny | {"vision_config": SMALL | {"vision_use_head": False}})
    with pytest.raises(InputError, match="this one has none"):
        require_maps(with_model(SiglipModel(headless)))
    for change in {"do_resize": False}, {"size": {"longest_edge": 48}}, {"do_pad": True}:
        processor = CLIPImageProcessorPil()
        settings = processor.to_dict() | change
        processor = SimpleNamespace(to_dict=lambda settings=settings: settings)
        with pytest.raises(InputError, match="cannot tell what the image processor"):
            require_maps(with_model(openai.model, processor))
    for clip in openai, siglip:
        require_maps(clip)
