"""CLIP and the captioner against plain transformers, which computes one text or image at a time."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import BART, CLIP
from safetensors.torch import load_file
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, CLIPModel

import model
from antarctic import checkpoints
from antarctic.checkpoints import is_layernorm
from antarctic.datasets import read_coco
from antarctic.decoding import nucleus
from antarctic.errors import InputError
from antarctic.features import image_features
from antarctic.files import file_sha256
from antarctic.images import read_image
from model import Captioner, Clip
from snowglobe import scenes
from utils import linearize

TEXTS = ["a dog", "penguin", "two red cats next to a big house in the snow", "a",
         "there is a purple train at night"]
TABLES = [linearize(["a dog", "grass"]), linearize(["penguin"]),
          linearize(["two red cats", "cats", "snow", "a house", "next to"])]


@pytest.fixture(scope="module")
def captioner():
    return Captioner(BART)


def test_bart_large_trains_73728_numbers():
    config = BartConfig(vocab_size=50265, d_model=1024, encoder_layers=12, decoder_layers=12,
                        encoder_ffn_dim=4096, decoder_ffn_dim=4096, encoder_attention_heads=16,
                        decoder_attention_heads=16)
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
    tables = captioner.tokenize(TABLES, 64)
    captions = captioner.tokenize(["a dog", "a penguin", "two cats"], 16)
    captioner.loss(tables, captions).backward()
    optimizer.step()
    changed = {name for name, p in captioner.model.named_parameters()
               if not torch.equal(p, before[name])}
    assert changed == set(trained)


def test_trimmed_sorted_batches_encode_texts_as_one_by_one_at_full_length():
    clip, tokenizer = Clip(CLIP), AutoTokenizer.from_pretrained(CLIP)
    plain_clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval()
    vectors = []
    for text in TEXTS:
        tokens = tokenizer([text], padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            vectors.append(plain_clip.get_text_features(**tokens).pooler_output)
    expected = torch.nn.functional.normalize(torch.cat(vectors), dim=-1)
    for batch_size in (1, 2, 128):
        torch.testing.assert_close(clip.encode_texts(TEXTS, batch_size), expected, atol=2e-6,
                                   rtol=0)


def test_bfloat16_moves_the_vectors_little():
    clip, rounded = Clip(CLIP), Clip(CLIP, dtype=torch.bfloat16)
    texts, images = TEXTS * 9, [scenes.Image.new("RGB", (40, 30), "red")]
    for a, b in ((clip.encode_texts(texts), rounded.encode_texts(texts)),
                 (clip.encode_images(images), rounded.encode_images(images))):
        assert b.dtype == torch.float32 and 0.999 < (a * b).sum(1).min() < 1 - 1e-7


def test_images_alone_may_be_encoded_in_bfloat16(world, tmp_path):
    """Their vectors are kept apart from those of float32."""
    plain, rounded = Clip(CLIP), Clip(CLIP, image_dtype=torch.bfloat16)
    pictures = read_coco(world, "val2017")
    a, b = (image_features(clip, pictures, tmp_path)[0] for clip in (plain, rounded))
    assert b.dtype == torch.float32 and 0.999 < (a * b).sum(1).min() < 1 - 1e-7
    assert torch.equal(plain.encode_texts(TEXTS), rounded.encode_texts(TEXTS))
    assert torch.equal(image_features(plain, pictures, tmp_path)[0], a)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_images_are_encoded_alike_in_batches_and_found_again(world, tmp_path, monkeypatch):
    clip, pictures = Clip(CLIP), read_coco(world, "val2017")
    features, good, bad = image_features(clip, pictures, tmp_path, batch_size=3)
    assert [p._replace(sha256="") for p in good] == pictures and bad == []
    assert [p.sha256 for p in good] == [file_sha256(p.path) for p in pictures]
    alone = torch.cat([clip.encode_images([read_image(p.path)]) for p in pictures])
    torch.testing.assert_close(features, alone, atol=2e-6, rtol=0)
    monkeypatch.setattr("antarctic.features.encode_files", None)  # a second run encodes nothing
    assert torch.equal(image_features(clip, pictures, tmp_path)[0], features)


def test_images_are_encoded_once_though_the_run_is_stopped(world, tmp_path, monkeypatch):
    clip, pictures = Clip(CLIP), read_coco(world, "val2017")
    pictures.insert(2, pictures[0]._replace(path=tmp_path / "gone.png"))
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    expected, good, bad = image_features(clip, pictures, tmp_path / "whole", shard=3)
    assert len(good) == len(pictures) - 1 and [path.name for path, _ in bad] == ["gone.png"]
    encoded, encode = [], Clip.encode_images

    def stopped_encode(self, images):
        if len(encoded) == 5:
            raise KeyboardInterrupt
        encoded.extend(images)
        return encode(self, images)

    monkeypatch.setattr(Clip, "encode_images", stopped_encode)
    with pytest.raises(KeyboardInterrupt):
        image_features(clip, pictures, tmp_path / "cut", shard=3)
    assert len(list((tmp_path / "cut").iterdir())) == 2  # whole shards
    encoded.append(None)  # so that it does not stop again
    features, *rest = image_features(clip, pictures, tmp_path / "cut", shard=3)
    assert len(encoded) == len(good) + 1 and torch.equal(features, expected)
    assert rest == [good, bad]
    names = [[path.name for path in (tmp_path / name).iterdir()] for name in ("cut", "whole")]
    assert names[0] == names[1]


def test_a_damaged_features_file_is_made_again(world, tmp_path):
    clip, pictures = Clip(CLIP), read_coco(world, "val2017")[:2]
    before = image_features(clip, pictures, tmp_path)[0].clone()  # it is a map of the file
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    assert torch.equal(image_features(clip, pictures, tmp_path)[0], before)


def test_a_changed_image_is_encoded_again(world, tmp_path):
    clip, pictures = Clip(CLIP), read_coco(world, "val2017")[:2]
    pictures = [p._replace(path=tmp_path / f"{i}.png") for i, p in enumerate(pictures)]
    for i, name in enumerate(("red", "blue")):
        scenes.Image.new("RGB", (9, 9), name).save(pictures[i].path)
    before = image_features(clip, pictures, tmp_path)[0]
    scenes.Image.new("RGB", (30, 30), "green").save(pictures[1].path)
    after = image_features(clip, pictures, tmp_path)[0]
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


def test_padding_changes_no_logits(captioner):
    tokens = captioner.tokenize(TABLES, 64)
    start = torch.full((1, 1), captioner.model.config.decoder_start_token_id)
    starts = start.expand(len(tokens), 1)
    with torch.no_grad():
        logits = captioner.model(**captioner.pad(tokens), decoder_input_ids=starts).logits
        for row, ids in enumerate(tokens):
            alone = captioner.model(**captioner.pad([ids]), decoder_input_ids=start).logits
            torch.testing.assert_close(logits[row:row + 1], alone, atol=1e-4, rtol=0)


def test_beams_in_a_batch_equal_beams_one_by_one():
    captioner = Captioner(BART)
    captioner.model.double()  # in float32, beams that tie to 1e-6 may change places
    tokens = captioner.tokenize(TABLES, 64)
    for ids, candidates in zip(tokens, captioner.beam(tokens)):
        alone = captioner.beam([ids])[0]
        assert [text for text, _ in alone] == [text for text, _ in candidates]
        assert [score for _, score in alone] == pytest.approx([score for _, score in candidates])


@pytest.mark.parametrize("num_beams, returned", [(1, 1), (2, 1), (3, 3), (7, 5)])
@pytest.mark.parametrize("longest", [3, 4, 8, 32])
@pytest.mark.slow
def test_beams_are_those_of_generate(checkpoint, num_beams, returned, longest):
    """Texts and likelihoods are compared, for a pretrained language model and one with tuned
    layernorms."""
    for tuned in (False, True):
        captioner = Captioner(BART, maxlen_dec=longest)
        if tuned:
            checkpoints.load_checkpoint(checkpoint, captioner)
        captioner.model.double()
        tokens = captioner.tokenize(TABLES, 64)
        config, count = captioner.model.config, min(returned, num_beams if longest > 3 else 1)
        for ids, candidates in zip(tokens, captioner.beam(tokens, num_beams, returned)):
            output = captioner.model.generate(
                **captioner.pad([ids]), do_sample=False, num_beams=num_beams,
                num_return_sequences=count, max_length=longest, min_length=0, length_penalty=1.0,
                early_stopping=False, no_repeat_ngram_size=0,
                forced_bos_token_id=config.bos_token_id, forced_eos_token_id=config.eos_token_id,
                return_dict_in_generate=True, output_scores=True)
            texts, likelihoods = zip(*candidates)
            assert list(texts) == captioner.decode(output.sequences)
            if num_beams > 1 and longest > 3:
                expected = output.sequences_scores.tolist()
                assert list(likelihoods) == pytest.approx(expected, abs=1e-5)


def test_beams_wider_than_the_vocabulary_are_refused(captioner):
    with pytest.raises(InputError, match="--num_beams 100000 is too wide"):
        captioner.beam(captioner.tokenize(TABLES, 64), 100000, 1)


def plain_likelihood(captioner, table, text):
    """The mean log-probability a token, by teacher forcing, without cache or batch. <s> is free."""
    ids = captioner.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        log_p = captioner.model(**captioner.pad([table]), labels=ids).logits.log_softmax(-1)
    return log_p.gather(2, ids[..., None])[0, 1:, 0].sum().item() / ids.shape[1]


def test_the_likelihood_of_a_candidate_is_the_models_own(captioner):
    table = captioner.tokenize(TABLES[:1], 64)[0]
    for [candidates] in (captioner.sample([table], 6), captioner.sample([table], 6, 0.7, 0.9),
                         captioner.beam([table]), captioner.beam([table], 1, 1)):
        for text, likelihood, *_ in candidates:
            assert likelihood == pytest.approx(plain_likelihood(captioner, table, text), abs=1e-3)


@pytest.mark.parametrize("n, chunk", [(1, 256), (7, 256), (7, 20), (7, 5), (60, 9)])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.3, 0.8)])
def test_samples_depend_on_the_seed_alone(n, chunk, temperature, top_p):
    """Whatever other tables are drawn with them, and how many rows run at a time for one."""
    captioner = Captioner(BART, maxlen_dec=12)
    captioner.model.double()  # in float32, a draw may fall on the other side of a limit
    tables, seeds = captioner.tokenize(TABLES * 2, 64), [3, 3, 4, 5, 3, 7]
    dials = n, temperature, top_p
    together = captioner.sample(tables, *dials, seeds, chunk)
    for table, seed, samples in zip(tables, seeds, together, strict=True):
        [alone] = captioner.sample([table], *dials, [seed], chunk)
        assert [(text, count) for text, _, count in samples] == [(t, c) for t, _, c in alone]
        assert [p for _, p, _ in samples] == pytest.approx([p for _, p, _ in alone])
        assert sum(count for *_, count in samples) == n
    [other] = captioner.sample(tables[:1], *dials, [seeds[0] + 1], chunk)
    assert n < 5 or other != together[0]


def test_rows_at_a_time_are_those_that_fit(captioner):
    assert captioner.rows_at_a_time() == 256
    large = Captioner.__new__(Captioner)
    large.device, large.maxlen_dec = torch.device("cpu"), 32
    large.model = SimpleNamespace(config=BartConfig())  # of bart-large
    assert large.rows_at_a_time() == 135
    large.maxlen_dec = 1024
    assert 1 <= large.rows_at_a_time() < 10
    large.device = torch.device("cuda")
    assert large.rows_at_a_time() == 256


def random_captioner():
    """A BART of random weights and 9 words, so that all captions of up to 3 words can be listed."""
    torch.manual_seed(0)
    captioner = Captioner(BART, maxlen_dec=6)  # </s> <s> and 3 tokens and </s>
    captioner.model = BartForConditionalGeneration(
        BartConfig(vocab_size=12, d_model=16, encoder_layers=1, decoder_layers=2,
                   encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
                   decoder_attention_heads=2, max_position_embeddings=16, bos_token_id=0,
                   pad_token_id=1, eos_token_id=2, init_std=0.6, decoder_start_token_id=2,
                   forced_eos_token_id=2, attn_implementation="eager")).eval()
    captioner.decode = lambda sequences: list(map(tuple, sequences.tolist()))  # tokens, not texts
    return captioner


def all_captions(captioner, table, temperature, top_p):
    """{tokens: probability} of all captions, by the plain formula.

    It extends all prefixes of one length at a time, without a cache.
    """
    captions, prefixes = {}, {(2, 0): 1.0}
    while prefixes:
        with torch.no_grad():
            logits = captioner.model(**captioner.pad([table] * len(prefixes)),
                                     decoder_input_ids=torch.tensor(list(prefixes))).logits
        longer = {}
        for (prefix, mass), row in zip(prefixes.items(), logits[:, -1] / temperature):
            p = plain_nucleus(row.softmax(-1), top_p).tolist()
            if len(prefix) == captioner.maxlen_dec - 1:
                p = [float(token == 2) for token in range(len(p))]
            for token, share in enumerate(p):
                if share:
                    extended = captions if token == 2 else longer
                    extended[(*prefix, token)] = mass * share
        prefixes = longer
    return captions


@pytest.mark.parametrize("temperature, top_p, chunk", [
    (1.0, 1.0, 256), (0.7, 0.9, 256), (1.3, 0.8, 5)])
@pytest.mark.slow
def test_samples_that_share_prefixes_are_distributed_as_independent_ones(temperature, top_p, chunk):
    """Chi-square test of all samples of many seeds against enumerated probabilities.

    Over the seeds, the number of samples that are one caption must also vary as a binomial does,
    which it does not where samples depend on one another.
    """
    captioner, table, n, seeds = random_captioner(), [0, 5, 6, 7, 2], 40, 250
    exact = all_captions(captioner, table, temperature, top_p)
    assert sum(exact.values()) == pytest.approx(1)
    counts = []  # of each seed {caption: samples}
    for seed in range(seeds):
        [samples] = captioner.sample([table], n, temperature, top_p, [seed], chunk)
        counts.append({caption: count for caption, _, count in samples})
        assert sum(counts[-1].values()) == n
    total = sum(map(Counter, counts), Counter())
    assert set(total) <= set(exact)

    common = [caption for caption in exact if exact[caption] * n * seeds >= 5]
    cells = [(total[c], exact[c] * n * seeds) for c in common]  # (observed, expected)
    rest = 1 - sum(exact[c] for c in common)
    if rest > 1e-4:
        cells.append((n * seeds - sum(total[c] for c in common), rest * n * seeds))
    assert len(cells) > 20
    chi_square = sum((observed - expected) ** 2 / expected for observed, expected in cells)
    freedom = len(cells) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5

    ratios = []  # of the variance to a binomial's, for the 8 likeliest captions
    for c in sorted(common, key=exact.get)[-8:]:
        observed = torch.tensor([float(of_seed.get(c, 0)) for of_seed in counts])
        ratios.append(observed.var().item() / (n * exact[c] * (1 - exact[c])))
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=4 * (2 / seeds / len(ratios)) ** 0.5)


def plain_nucleus(p, top_p):
    """The nucleus of one distribution (V,), token by token."""
    chosen, mass = [], 0.0
    for i in p.argsort(descending=True).tolist():
        if mass >= top_p < 1:  # at 1 all tokens count, but the rounded sum may reach 1 earlier
            break
        chosen.append(i)
        mass += p[i].item()
    return torch.zeros_like(p).index_copy(0, torch.tensor(chosen), p[chosen] / p[chosen].sum())


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999, 1.0])
# The last distribution needs more than the 256 best tokens.
@pytest.mark.parametrize("vocabulary, spread", [(40, 2.0), (2000, 2.0), (2000, 0.2)])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, vocabulary, spread):
    noise = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(0))
    log_p = noise.mul(spread).log_softmax(-1)
    best, order = nucleus(log_p, top_p)
    nuclei = torch.zeros_like(log_p).scatter(1, order, best)
    for row, p in zip(nuclei, log_p.exp()):
        expected = plain_nucleus(p, top_p)
        # Rounding may add or remove the one token at the limit.
        assert ((row > 0) == (expected > 0)).sum() >= vocabulary - 1
        torch.testing.assert_close(row / row.sum(), expected, atol=2e-3, rtol=0)


def test_rescoring_gives_each_candidate_its_cosine():
    clip = Clip(CLIP)
    images = torch.nn.functional.normalize(
        torch.randn(2, clip.dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    candidates = [["a dog", "a cat", "a dog"], ["a dog"]]
    scores = model.rescore(clip, images, candidates)
    for image, texts, cosines in zip(images, candidates, scores):
        assert cosines == pytest.approx((clip.encode_texts(texts) @ image).tolist(), abs=1e-5)


def test_a_checkpoint_holds_the_layernorms_alone_and_comes_back(checkpoint):
    captioner = Captioner(BART)
    tensors = load_file(checkpoint)
    assert tensors and all(is_layernorm(name) for name in tensors)
    settings = checkpoints.load_checkpoint(checkpoint, captioner)
    assert settings["topk"] == 24 and settings["lm"] == captioner.identity
    parameters = dict(captioner.model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in tensors.items())
    assert set(tensors) == set(captioner.train_only(is_layernorm))
