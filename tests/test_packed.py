"""Packed layers against torch's own, and captions of packed models against plain ones."""

import pytest
import torch
from conftest import BART

from antarctic import packed
from antarctic.errors import InputError
from antarctic.packed import Int8Linear, PackedLinear, can_pack
from model import Captioner
from utils import choose_dtype, linearize

TABLES = [linearize(["a dog", "grass"]), linearize(["penguin"]),
          linearize(["two red cats", "cats", "snow", "a house", "next to"])]


def layer(inputs, outputs, bias):
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (3, 96), (2, 5, 96), (70, 1, 96)])
def test_a_packed_layer_computes_the_product(shape, bias):
    linear = layer(96, 70, bias)
    states = torch.randn(shape)
    torch.testing.assert_close(PackedLinear(linear)(states), linear(states))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1e-3, 1, 1e3])
def test_int8_rounds_each_weight_and_each_input_once(size, bias):
    """Against the formula: whole numbers, multiplied exactly, times both scales."""
    linear = layer(96, 70, bias)
    linear.weight[3] = 0
    states = size * torch.randn(2, 9, 96)
    states[1, 2] = 0
    weight_scale = linear.weight.abs().amax(1).clamp(min=1e-30) / 127
    input_scale = states.abs().amax(-1, keepdim=True).clamp(min=1e-30) / packed.MOST
    weight = (linear.weight / weight_scale[:, None]).round().clamp(-128, 127).double()
    product = ((states / input_scale).round().double() @ weight.T).float()
    expected = product * input_scale * weight_scale + (linear.bias if bias else 0)
    # A half may be rounded to the other side.
    torch.testing.assert_close(Int8Linear(linear)(states), expected, rtol=1e-4,
                               atol=2 * size * linear.weight.abs().max().item() / packed.MOST)
    assert (Int8Linear(linear)(states) - linear(states)).abs().max() < 0.02 * size * 96 ** 0.5


@pytest.mark.filterwarnings("error")
def test_a_row_in_int8_does_not_depend_on_the_others():
    linear = Int8Linear(layer(96, 70, True))
    states = torch.randn(20, 96) * torch.logspace(-2, 2, 20)[:, None]
    assert torch.equal(linear(states), torch.cat([linear(row[None]) for row in states]))


def captions(dtype=torch.float32, pack=True):
    captioner = Captioner(BART, dtype=dtype, maxlen_dec=16)
    if pack:
        captioner.pack()
    tables = captioner.tokenize(TABLES, 64)
    return captioner, captioner.beam(tables), captioner.sample(tables, 5, 0.7, 0.9)


@pytest.fixture(scope="module")
def plain():
    captioner, *found = captions(pack=False)
    return found


def test_a_packed_model_writes_the_captions_of_a_plain_one(plain):
    captioner, *found = captions()
    with pytest.raises(InputError, match="cannot be trained any more"):
        captioner.train_only(lambda name: True)
    layers = [part for part in captioner.model.modules() if isinstance(part, PackedLinear)]
    assert len(layers) == 1 + 6 * captioner.model.config.encoder_layers + 10 * (
        captioner.model.config.decoder_layers)
    assert not any(type(part) is torch.nn.Linear for part in captioner.model.modules())
    for ours, theirs in zip(found, plain, strict=True):
        assert [[text for text, *_ in each] for each in ours] == [
            [text for text, *_ in each] for each in theirs]
        for a, b in zip(ours, theirs):
            assert [p for _, p, *_ in a] == pytest.approx([p for _, p, *_ in b], abs=1e-5)


def test_a_model_in_int8_writes_nearly_those(plain):
    captioner, beams, _ = captions(torch.int8)
    assert any(isinstance(part, Int8Linear) for part in captioner.model.modules())
    likelihoods = [each[0][1] for each in beams]
    assert likelihoods == pytest.approx([each[0][1] for each in plain[0]], abs=0.1)
    assert likelihoods != pytest.approx([each[0][1] for each in plain[0]], abs=1e-6)


@pytest.mark.parametrize("lacks", ["oneDNN", "its functions"])
def test_a_torch_without_these_functions_captions_plainly(monkeypatch, plain, lacks):
    if lacks == "oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        monkeypatch.setitem(packed.FUNCTIONS, torch.float32, ("mkldnn", ("_is_missing",)))
    assert not can_pack(torch.float32)
    captioner, *found = captions()
    assert found == plain


def test_bfloat16_is_not_packed():
    captioner, *_ = captions(torch.bfloat16)
    assert not any(isinstance(part, PackedLinear) for part in captioner.model.modules())


def test_int8_is_refused_where_it_cannot_be_computed(monkeypatch):
    assert choose_dtype("int8", torch.device("cpu")) == torch.int8
    with pytest.raises(InputError, match="int8 cannot be used here on cuda"):
        choose_dtype("int8", torch.device("cuda"))
    monkeypatch.setitem(packed.FUNCTIONS, torch.int8, ("onednn", ("is_missing",)))
    with pytest.raises(InputError, match="int8 cannot be used here on cpu"):
        choose_dtype("int8", torch.device("cpu"))
