"""Where an entry was seen: shares that add up, the crop that is undone, maps in the results."""

import base64
import copy
import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BART, CLIP
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

from antarctic import page
from antarctic.cache import Embeddings, read_cache
from antarctic.clip import Clip
from antarctic.errors import InputError
from antarctic.evidence import pieces
from antarctic.files import file_sha256
from antarctic.folders import Picture
from antarctic.gallery import gallery_card, spelled
from antarctic.images import read_image
from antarctic.openai_clip import LAYERS, TOWERS, ResNetClip
from antarctic.preprocessing import OpenAIPreprocessor
from antarctic.records import Records
from antarctic.seen import add_maps, seen, where_of
from antarctic.studio import Studio
from antarctic.taught import Taught
from antarctic.visitors import Words
from antarctic.where import contributions, map_box, maps, require_maps
from model import Caption, Model, rescore
from snowglobe import strangers
from snowglobe.kinds import KINDS
from snowglobe.where import inside, measure, measure_taught

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


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    """A small SigLIP with random weights, large enough to matter: 32 pixels in patches of 10, so
    that two are in none."""
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(CLIP).save_pretrained(folder)
    text = SMALL | {"vocab_size": 1100, "bos_token_id": 0, "eos_token_id": 1, "projection_size": 48}
    model = SiglipModel(SiglipConfig(
        text_config=text, vision_config=SMALL | {"image_size": 32, "patch_size": 10}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def siglip(siglip_folder):
    return Clip(siglip_folder)


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


@pytest.mark.parametrize("how", [{"image_dtype": torch.bfloat16}, {"dtype": torch.bfloat16}],
                         ids=["by autocast", "weights too"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_bfloat16_gives_nearly_the_same_shares(images, kind, how, request, siglip_folder):
    rounded = Clip(CLIP if kind == "clip" else siglip_folder, **how)
    features, c = contributions(rounded, images)
    assert torch.equal(features, rounded.encode_images(images)) and c.dtype == torch.float32
    exact = contributions(request.getfixturevalue(kind), images)[1]
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


# ------------------------------------------------------------------------------- the sampler's maps

@pytest.fixture(scope="module")
def flags(world, cache, checkpoint, tmp_path_factory):
    """The sampler's arguments for three drawings, the second in the middle of a wide photo."""
    folder = tmp_path_factory.mktemp("photos")
    for i, path in enumerate(sorted((world / "near").glob("*.png"))[:3]):
        image = Image.open(path)
        if i == 1:
            wide = Image.new("RGB", (320, 128), (90, 120, 90))
            wide.paste(image, (96, 0))
            wide.save(folder / "wide.png")
        image.save(folder / f"{i}.png")
    return ("--textfile", cache.textfile, "--embfile", cache.embfile, "--clip_model", CLIP, "--lm",
            BART, "--ckpt", checkpoint, "--images", folder)


@pytest.fixture
def sample(script, monkeypatch, flags):
    """sample(folder, *more) runs the sampler there: (bytes of details.jsonl, records, how many
    images were captioned, how many got maps)."""
    counts = {"model.rescore": 0, "antarctic.seen.where_of": 0}
    for name, function in (("model.rescore", rescore), ("antarctic.seen.where_of", where_of)):
        def count(*args, name=name, function=function):
            counts[name] += len(args[2]) if function is rescore else 1
            return function(*args)
        monkeypatch.setattr(name, count)

    def sample(folder, *more):
        counts.update(dict.fromkeys(counts, 0))
        run = script("sampler", *flags, "--savedir", folder, *more)
        assert run.code == 0, run.err
        data = (folder / "details.jsonl").read_bytes()
        return data, [json.loads(line) for line in data.splitlines()], *counts.values()
    return sample


@pytest.fixture(scope="module")
def plain(script, flags, tmp_path_factory):
    """A run without --where: its folder, and the bytes of its details.jsonl."""
    folder = tmp_path_factory.mktemp("plain")
    assert script("sampler", *flags, "--savedir", folder).code == 0
    return folder, (folder / "details.jsonl").read_bytes()


def test_a_records_maps_are_the_shares_and_its_peak_lies_in_the_photo(sample, clip, cache,
                                                                      tmp_path, plain):
    data, records, captioned, mapped = sample(tmp_path, "--where")
    assert captioned == mapped == 4
    entries = cache.textfile.read_text().splitlines()
    rows = torch.from_numpy(np.load(cache.embfile)).float()
    for record in records:
        where, table = record.pop("where"), record["table"]
        _, c = contributions(clip, [read_image(record["file"])])
        shares = c[0] @ rows[[entries.index(entry) for entry, _ in table]].T  # (patches, entries)
        wide = "wide" in record["file"]
        assert where["side"] == 6 and where["box"] == ([0.3, 0, 0.7, 1] if wide else [0, 0, 1, 1])
        for (x, y, text), share in zip(where["maps"], shares.T, strict=True):
            packed = np.frombuffer(base64.b64decode(text), np.uint8)
            expected = (255 * share / share.max()).clamp(min=0)
            assert np.abs(packed - expected.numpy()).max() <= 1 and packed.max() == 255
            row, column = divmod(share.argmax().item(), 6)
            x = (x - 0.3) / 0.4 if wide else x
            assert (x, y) == pytest.approx(((column + 0.5) / 6, (row + 0.5) / 6), abs=3e-4)
    without = [json.loads(line) for line in plain[1].splitlines()]
    assert [record | {"seal": 0} for record in records] == [each | {"seal": 0} for each in without]
    page = (tmp_path / "gallery.html").read_text()
    assert page.count(" data-map=") == sum(len(each["table"]) for each in without)
    assert "score of the entry came from" in page
    assert "data-" not in re.sub(" data-score=", "", (plain[0] / "gallery.html").read_text(
        ).partition("</style>")[2].partition("<script>")[0])


def test_maps_are_added_to_records_that_have_none_and_left_out_again(sample, tmp_path, plain):
    """No image is captioned anew, and both files are those of a first run, to the byte."""
    fresh, *_ = sample(tmp_path / "fresh", "--where", "--batch_size", "4")
    folder = Path(shutil.copytree(plain[0], tmp_path / "r"))
    data, _, captioned, mapped = sample(folder, "--where", "--batch_size", "4")
    assert data == fresh and (captioned, mapped) == (0, 4)
    assert sample(folder, "--where")[2:] == (0, 0)
    assert (folder / "details.jsonl").read_bytes() == fresh
    assert sample(folder)[::2] == (plain[1], 0)
    assert sample(folder, "--where", "--workers", "0", "--batch_size", "4")[0] == fresh


def test_a_stopped_run_keeps_the_maps_that_it_has(sample, tmp_path, plain, monkeypatch):
    folder, whole = (Path(shutil.copytree(plain[0], tmp_path / name)) for name in ("r", "whole"))
    fresh, *_ = sample(whole, "--where", "--batch_size", "1")
    write, left = Records.write, [2]

    def fail(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return write(*args)

    with monkeypatch.context() as patch, pytest.raises(BaseException):  # noqa: B017
        patch.setattr(Records, "write", fail)
        sample(folder, "--where", "--batch_size", "1")
    assert (folder / "details.jsonl").read_bytes() == plain[1]
    without = Path(shutil.copytree(folder, tmp_path / "without"))
    data, _, captioned, mapped = sample(folder, "--where", "--batch_size", "1")
    assert data == fresh and (captioned, mapped) == (0, 2)
    assert not list(folder.glob("*.part"))
    assert sample(without)[::2] == (plain[1], 0)  # a run without the flag goes on, too


CAPTION = Caption("a dog", 0.3, [("dog", 0.3), ("cat", 0.2)], [("a dog", 0.3, -1.0)])
WHERE = {"box": [0, 0.1, 1, 0.9], "side": 2, "maps": [[0.25, 0.3, "AAD/Ag=="], None]}


def one_record(folder, where):
    """A Records whose part holds one record with these maps, and its Picture."""
    picture, records = Picture("a.png", Path("a.png"), (), "a" * 64), Records(folder, "0", True)
    record = records.record_of(picture, CAPTION) | {"where": where}
    records.write([picture], [record | {"seal": records.seal_of(record)}])
    return Records(folder, "0", True), picture


def test_maps_are_part_of_a_record(tmp_path):
    records, picture = one_record(tmp_path, WHERE)
    assert [record["where"] for record in records.read([picture])] == [WHERE]
    assert not records.missing([picture]) and not records.without_maps([picture])
    [plain] = Records(tmp_path, "0").read([picture])
    assert plain == records.record_of(picture, CAPTION) | {
        "table": [["dog", 0.3], ["cat", 0.2]], "candidates": [["a dog", 0.3, -1.0]], "cover": 1.0,
        "used": ["dog"]}
    line = records.part.read_bytes()
    records.part.write_bytes(line.replace(b"0.25", b"0.26"))
    assert Records(tmp_path, "0", True).missing([picture]) == [0]


@pytest.mark.parametrize("change", [
    {"side": 0}, {"side": 17}, {"side": True}, {"side": "2"}, {"box": [0, 0, 1]}, {"box": "0001"},
    {"box": [0, 0, 1, math.nan]}, {"maps": [None]}, {"maps": {}}, {"maps": 7}, {"more": 1},
    {"maps": [None, [0.2, 0.3, "AAA"]]}, {"maps": [None, [0.2, 0.3, "A\"onload="]]},
    {"maps": [None, [0.2, "0", "AAD/Ag=="]]}, {"maps": [None, [0.2, "AAD/Ag=="]]},
    {"maps": [None, [0.2, 0.3, "AAD/Ag==", 1]]}, {"maps": [None, [0.2, 0.3, ["AAD/Ag=="]]]},
    {"maps": [None, [0.2, 0.3, "AAD/AgAA"]]}, {"maps": [None, [0.2, 0.3, "AAD/Ag==\n"]]}], ids=str)
def test_a_seal_makes_no_maps_of_other_values(tmp_path, change):
    """Who knows the settings can seal whatever they like."""
    records, picture = one_record(tmp_path, WHERE | change)
    assert records.missing([picture]) == [0]


def test_an_image_that_is_not_what_was_captioned_gets_no_map(clip, world, tmp_path):
    paths = sorted((world / "near").glob("*.png"))[:3]
    shas = [file_sha256(paths[0]), "b" * 64, "c" * 64]
    pictures = [Picture(str(path), path, (), sha) for path, sha in zip(paths, shas)]
    pictures[2] = Picture("gone.png", tmp_path / "gone.png", (), "c" * 64)
    records, later = Records(tmp_path, "0", True), []
    records.append(pictures, [CAPTION] * 3)
    rows = clip.encode_texts(["dog"])
    model = SimpleNamespace(clip=clip, entries=["dog"], embeddings=Embeddings([rows]),
                            taught=Taught().fitted(rows, 1))
    add_maps(model, pictures, records, 2, later)
    assert [path for path, _ in later] == [paths[1], tmp_path / "gone.png"]
    assert "changed" in later[0][1] and "No such file" in later[1][1]
    assert records.without_maps(pictures) == [1, 2]
    read = list(records.read(pictures))
    assert ["where" in record for record in read] == [True, False, False]
    assert [each and len(each) for each in read[0]["where"]["maps"]] == [3, None]  # no cat known


def test_what_was_taught_is_seen_by_its_own_row(clip, images):
    """Also where the cache has an entry of that name."""
    rows = clip.encode_texts(["dog", "Tom"])
    taught = SimpleNamespace(things=[SimpleNamespace(noun="Tom")], rows=3 * rows[:1])
    model = SimpleNamespace(clip=clip, entries=["dog", "Tom"], embeddings=Embeddings([rows]),
                            taught=taught)
    found = [(clip.prepare(images[0]), (0, 0, 1, 1))]
    [where] = seen(model, found, [[("Tom", 0.4), ("dog", 0.3)]])
    assert where["maps"][0] == where["maps"][1]


def test_large_maps_are_made_small(clip):
    """A map has 16 x 16 shares at most; the peak is that of the patches."""
    c = torch.zeros(27 * 27, 4)
    c[27 * 5 + 20, 0] = 0.5
    where = where_of((0, 0, 1, 1), c, [("a", 0.1)], {"a": torch.tensor([2.0, 0, 0, 0])})
    [[x, y, text]] = where["maps"]
    assert (x, y) == pytest.approx((20.5 / 27, 5.5 / 27), abs=1e-4) and where["side"] == 16
    packed = np.frombuffer(base64.b64decode(text), np.uint8).reshape(16, 16)
    assert packed.max() == 255 and packed.argmax() in (16 * 3 + 11, 16 * 3 + 12)


# -------------------------------------------------------------------------------------- the gallery

@pytest.mark.parametrize("caption, entries, places", [
    ("A red dog, on grass", ["red dog", "dog", "grass", "cat"], [None, 0, 1, None, 2]),
    ("two dogs", ["dog", "two", "two dogs"], [1, 0]),
    ("a dog and a cat", ["a dog", "!", "dog cat"], [0, 0, None, None, None]),
    ("Élan é", ["élan"], [0, None]), ("", ["dog"], []), ("!", ["!"], [])])
def test_a_word_of_a_caption_leads_to_the_shortest_entry_that_spells_it(caption, entries, places):
    words = pieces(caption)[1::2]
    found = spelled(words, [(entry, 0.3) for entry in entries])
    assert [found.get(place) for place in range(len(words))] == places


def test_a_card_with_maps_shows_texts_as_texts(world):
    path = str(next((world / "near").glob("*.png")))
    table = [["<b>dog</b>", 0.3], ["cat", 0.2]]
    record = {"image_id": 1, "file": path, "caption": "a <b>dog</b> & a cat", "score": 0.3,
              "table": table, "candidates": [], "where": WHERE}
    card = gallery_card(0, record, ())
    assert "<b>" not in card and 'data-box="0 0.1 1 0.9" data-side="2"' in card
    assert card.count("data-map=") == 1 and 'data-map="AAD/Ag==" data-at="0.25 0.3"' in card
    words = re.findall(r'<span data-of="(.)">(.*?)</span>', card)
    assert words == [("0", "b"), ("0", "dog"), ("0", "b"), ("1", "cat")]


# ----------------------------------------------------------------------------------------- the page

@pytest.mark.parametrize("words", [Words(), Words(("penguin",), ("penguin", "sea", "sky"))],
                         ids=["", "words"])
def test_the_page_shows_the_maps_of_both_tables(cache, checkpoint, world, clip, words):
    path = str(sorted((world / "out").glob("*.png"))[4])
    model = Model.load(CLIP, BART, checkpoint, cache.textfile, cache.embfile, topk=5, device="cpu")
    studio = Studio(model)
    result, seconds = studio.caption(path, words)
    [expected] = model.with_words(*words).caption([path])
    assert result == expected
    where = studio.where(path, result.table, words)
    _, c = contributions(clip, [read_image(path)])
    peaks = [c[0] @ clip.encode_texts([entry])[0] for entry, _ in result.table]
    for (x, y, _), shares in zip(where["maps"], peaks, strict=True):
        row, column = divmod(shares.argmax().item(), 6)
        assert (x, y) == pytest.approx(((column + 0.5) / 6, (row + 0.5) / 6), abs=1e-4)
    shown = page.caption_html(result, seconds, None, [where, None])
    assert shown.count(" data-map=") == len(result.table) and "Point at an entry" in shown
    both = page.caption_html(result, seconds, result, [where, where])
    assert both.count(" data-map=") == 2 * len(result.table) and both.count(" data-box=") == 2
    assert "data-" not in page.caption_html(result, seconds)


def test_the_page_does_without_maps_where_they_are_not_known(cache, monkeypatch, world):
    def refuse(clip):
        raise InputError("not this kind")

    monkeypatch.setattr("antarctic.studio.require_maps", refuse)
    studio = Studio(Model.load(CLIP, BART, "none", cache.textfile, cache.embfile, device="cpu"))
    path = str(next((world / "near").glob("*.png")))
    result, _ = studio.caption(path)
    assert studio.where(path, result.table) is None


def test_a_clip_that_has_no_maps_is_refused_before_any_image_is_encoded(script, flags, tmp_path,
                                                                        monkeypatch):
    folder = Path(shutil.copytree(CLIP, tmp_path / "clip"))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"do_center_crop": False, "do_resize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(Clip, "try_out", lambda self: None)
    run = script("sampler", *flags, "--clip_model", folder, "--savedir", tmp_path / "r", "--where")
    assert run.code == 2 and run.err.count("--where cannot tell") == 1
    assert not (tmp_path / "r" / "preds.txt").exists()


# ----------------------------------------------------------------------------------- how good it is

def test_most_peaks_lie_in_a_box_of_the_named_kind(clip, world, cache):
    entries, embeddings = read_cache([cache.textfile], [cache.embfile], clip.identity, clip.dim)
    numbers, prepared = measure(clip, world, "val2017", entries, embeddings[:], 24)
    count, shares, masked, chance, *_ = numbers
    assert len(prepared) == 8 and count > 20
    assert shares > 0.8 and shares > chance + 0.4 and shares > masked


def test_taught_things_are_seen_where_they_are(clip, cache):
    rows, kinds = torch.from_numpy(np.load(cache.embfile)).float(), list(KINDS)
    with strangers.moved_in():
        [_, (group, count, shares, words, chance), *_] = measure_taught(clip, rows, 10, 0, images=3)
    assert list(KINDS) == kinds
    assert group == "new kinds, beside others" and count == 18
    assert shares > 0.7 and shares > words and shares > chance + 0.3


def test_boxes_are_those_that_are_drawn():
    things = [{"kind": "dog", "x": 0.25, "y": 1.0, "size": 0.5},
              {"kind": "cat", "x": 0.75, "y": 0.5, "size": 0.3}]
    assert inside({"things": things}, "dog", 4).tolist() == 2 * [4 * [False]] + 2 * [
        [True, True, False, False]]
    assert inside({"things": things}, "cat", 4).nonzero().tolist() == [[1, 2], [1, 3]]
