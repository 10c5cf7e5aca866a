"""CLIP and the captioner against transformers used plainly, one by one."""

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, CLIPModel

import model
from conftest import BART, CLIP
from model import Captioner, Clip, is_layernorm
from snowglobe import scenes
from utils import linearize, read_coco, read_image

TEXTS = ["a dog", "penguin", "two red cats next to a big house in the snow", "a", "there is a purple train at night"]
TABLES = [linearize(t) for t in (["a dog", "grass"], ["penguin"], ["two red cats", "cats", "snow", "a house", "next to"])]


@pytest.fixture(scope="module")
def captioner():
    return Captioner(BART)


def test_bart_large_trains_73728_numbers():
    config = BartConfig(vocab_size=50265, d_model=1024, encoder_layers=12, decoder_layers=12, encoder_ffn_dim=4096, decoder_ffn_dim=4096,
                        encoder_attention_heads=16, decoder_attention_heads=16)
    with torch.device("meta"):
        bart = BartForConditionalGeneration(config)
    named = dict(bart.named_parameters())
    assert sum(p.numel() for p in named.values()) == 406_291_456
    assert sum(p.numel() for name, p in named.items() if is_layernorm(name)) == 73_728


def test_training_touches_the_layernorms_alone():
    captioner = Captioner(BART)
    before = {name: p.clone() for name, p in captioner.model.named_parameters()}
    trained = captioner.train_only(is_layernorm)
    assert all(("layer_norm" in name) and ("encoder" in name) for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    captioner.loss(captioner.tokenize(TABLES, 64), captioner.tokenize(["a dog", "a penguin", "two cats"], 16)).backward()
    optimizer.step()
    changed = {name for name, p in captioner.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trained)


def test_trimmed_sorted_batches_encode_texts_as_one_by_one_at_full_length():
    clip, tokenizer = Clip(CLIP), AutoTokenizer.from_pretrained(CLIP)
    plain_clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval()
    plain = []
    for text in TEXTS:
        tokens = tokenizer([text], padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            plain.append(plain_clip.get_text_features(**tokens).pooler_output)
    plain = torch.nn.functional.normalize(torch.cat(plain), dim=-1)
    for batch_size in (1, 2, 128):
        torch.testing.assert_close(clip.encode_texts(TEXTS, batch_size), plain, atol=2e-6, rtol=0)


def test_images_are_encoded_alike_in_batches_and_found_again(world, tmp_path, monkeypatch):
    clip, pictures = Clip(CLIP), read_coco(world, "val2017")
    features, good, bad = model.image_features(clip, pictures, tmp_path, batch_size=3)
    assert good == pictures and bad == []
    alone = torch.cat([clip.encode_images([read_image(p.path)]) for p in pictures])
    torch.testing.assert_close(features, alone, atol=2e-6, rtol=0)
    monkeypatch.setattr(model, "encode_files", None)  # a second run encodes nothing
    assert torch.equal(model.image_features(clip, pictures, tmp_path)[0], features)


def test_a_changed_image_is_encoded_again(world, tmp_path):
    clip, pictures = Clip(CLIP), read_coco(world, "val2017")[:2]
    pictures = [p._replace(path=tmp_path / f"{i}.png") for i, p in enumerate(pictures)]
    for i, name in enumerate(("red", "blue")):
        scenes.Image.new("RGB", (9, 9), name).save(pictures[i].path)
    before = model.image_features(clip, pictures, tmp_path)[0]
    scenes.Image.new("RGB", (30, 30), "green").save(pictures[1].path)
    after = model.image_features(clip, pictures, tmp_path)[0]
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


def test_padding_changes_no_logits(captioner):
    tokens = captioner.tokenize(TABLES, 64)
    start = torch.full((1, 1), captioner.model.config.decoder_start_token_id)
    with torch.no_grad():
        together = captioner.model(**captioner.pad(tokens), decoder_input_ids=start.expand(len(tokens), 1)).logits
        for row, ids in enumerate(tokens):
            alone = captioner.model(**captioner.pad([ids]), decoder_input_ids=start).logits
            torch.testing.assert_close(together[row:row + 1], alone, atol=1e-4, rtol=0)


def test_beams_in_a_batch_equal_beams_one_by_one():
    captioner = Captioner(BART)
    captioner.model.double()  # in float32 beams that tie to 1e-6 may change places
    tokens = captioner.tokenize(TABLES, 64)
    together = captioner.beam(tokens)
    for ids, candidates in zip(tokens, together):
        alone = captioner.beam([ids])[0]
        assert [text for text, _ in alone] == [text for text, _ in candidates]
        assert [score for _, score in alone] == pytest.approx([score for _, score in candidates])


def plain_likelihood(captioner, table, text):
    """Teacher-forced, without cache or batch: mean log-probability a token, <s> counted as certain."""
    ids = captioner.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        log_p = captioner.model(**captioner.pad([table]), labels=ids).logits.log_softmax(-1)
    return log_p.gather(2, ids[..., None])[0, 1:, 0].sum().item() / ids.shape[1]


def test_the_likelihood_of_a_candidate_is_the_models_own(captioner):
    table = captioner.tokenize(TABLES[:1], 64)[0]
    for candidates in (captioner.sample(table, 6), captioner.sample(table, 6, 0.7, 0.9), captioner.beam([table])[0],
                       captioner.beam([table], 1, 1)[0]):
        for text, likelihood in candidates:
            assert likelihood == pytest.approx(plain_likelihood(captioner, table, text), abs=1e-3)


def test_samples_depend_on_the_seed_alone_and_chunks_share_one_distribution(captioner):
    table = captioner.tokenize(TABLES[:1], 64)[0]
    assert captioner.sample(table, 20, seed=3) == captioner.sample(table, 20, seed=3)
    assert captioner.sample(table, 20, seed=3) != captioner.sample(table, 20, seed=4)


def test_first_words_are_drawn_with_the_models_probabilities(captioner):
    table, n = captioner.tokenize(TABLES[:1], 64)[0], 3000
    start = torch.tensor([[captioner.model.config.decoder_start_token_id, captioner.model.config.bos_token_id]])
    with torch.no_grad():
        p = captioner.model(**captioner.pad([table]), decoder_input_ids=start).logits[0, -1].softmax(-1)
    short = Captioner(BART, maxlen_dec=4)  # <s>, one word, </s>
    counts = Counter(text for text, _ in short.sample(table, n))
    likely = [i for i in p.argsort(descending=True)[:8].tolist() if p[i] * n >= 10]
    assert likely
    for i in likely:
        expected, deviation = p[i].item() * n, (n * p[i] * (1 - p[i])).sqrt().item()
        assert abs(counts[captioner.decode([[i]])[0]] - expected) < 5 * deviation


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p):
    log_p = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).mul(2).log_softmax(-1)
    kept = model.nucleus(log_p, top_p)
    for row, p in zip(kept, log_p.exp()):
        chosen, mass = [], 0.0
        for i in p.argsort(descending=True).tolist():
            if mass >= top_p:
                break
            chosen.append(i)
            mass += p[i].item()
        expected = torch.zeros(40)
        expected[chosen] = p[chosen] / p[chosen].sum()
        torch.testing.assert_close(row, expected)


def test_rescoring_gives_each_candidate_its_cosine():
    clip = Clip(CLIP)
    images = torch.nn.functional.normalize(torch.randn(2, clip.dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    candidates = [["a dog", "a cat", "a dog"], ["a dog"]]
    scores = model.rescore(clip, images, candidates)
    for image, texts, found in zip(images, candidates, scores):
        assert found == pytest.approx((clip.encode_texts(texts) @ image).tolist(), abs=1e-5)


def test_a_checkpoint_holds_the_layernorms_alone_and_comes_back(checkpoint):
    captioner = Captioner(BART)
    tensors = load_file(checkpoint)
    assert tensors and all(is_layernorm(name) for name in tensors)
    settings = model.load_checkpoint(checkpoint, captioner)
    assert settings["topk"] == 24 and settings["lm"] == captioner.identity
    parameters = dict(captioner.model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in tensors.items())
    assert set(tensors) == set(captioner.train_only(is_layernorm))
