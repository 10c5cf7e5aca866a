"""The decoder against the models' own forward, which reads each prefix whole, without a cache."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from antarctic.bart_decoder import Decoder, start_tokens
from antarctic.decoding import beam_search
from antarctic.errors import InputError

KINDS = ["bart", "mbart", "plbart", "mvp"]


def random_model(kind, **settings):
    """A small one of random weights, float64."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=4,
        max_position_embeddings=20, init_std=0.5, scale_embedding=True, bos_token_id=0,
        pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, **settings)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.double).eval()
    for parameter in model.parameters():  # norms and biases begin as ones and zeros
        parameter.data += torch.randn_like(parameter) / 10
    model.final_logits_bias.normal_()
    return model


TABLES = {"input_ids": torch.tensor([[0, 7, 8, 9, 2], [0, 5, 2, 1, 1], [0, 4, 4, 2, 1]]),
          "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])}
STEPS = [  # of each row its table, the row before that it continues, and its new token
    [(0, 0, 5), (0, 0, 6), (1, 1, 7), (2, 2, 8)],
    [(0, 1, 9), (0, 0, 10), (0, 1, 11), (1, 2, 12), (2, 3, 13), (2, 3, 14)],
    [(0, 2, 15), (2, 5, 16), (2, 4, 17)],  # the second table has ended
    [(2, 1, 18)]]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_step_computes_the_logits_of_the_models_own_forward(kind):
    model = random_model(kind)
    decoder = Decoder(model, TABLES)
    past, tokens, tables = decoder.empty_past(), start_tokens(model, 3), [0, 1, 2]
    new, rows = tokens, None
    for step in [*STEPS, None]:
        sizes = {table: tables.count(table) for table in tables}
        logits = decoder.logits(new, past, rows, sizes)
        own = model(**{name: values[tables] for name, values in TABLES.items()},
                    decoder_input_ids=tokens).logits[:, -1]
        torch.testing.assert_close(logits, own.float(), atol=1e-5, rtol=1e-5)
        if step:
            tables, parents, words = map(list, zip(*step))
            rows, new = torch.tensor(parents), torch.tensor(words)[:, None]
            tokens = torch.cat((tokens[rows], new), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_beams_of_all_kinds_are_those_of_generate(kind):
    model = random_model(kind)
    expected = model.generate(
        **TABLES, num_beams=3, num_return_sequences=3, max_length=9, min_length=0, do_sample=False,
        length_penalty=1.0, early_stopping=False, no_repeat_ngram_size=0, forced_bos_token_id=0,
        forced_eos_token_id=2, return_dict_in_generate=True, output_scores=True)
    found = [caption for captions in beam_search(model, TABLES, 3, 9) for caption in captions[:3]]
    for tokens, score, (likelihood, ids) in zip(expected.sequences.tolist(),
                                                expected.sequences_scores.tolist(), found):
        assert likelihood == pytest.approx(score, abs=1e-5)
        assert [t for t in tokens if t != 1] == [*ids.tolist(), 2]


def test_an_mvp_with_prompts_is_refused():
    model = random_model("mvp", use_prompt=True, prompt_length=4, prompt_mid_dim=8)
    with pytest.raises(InputError, match="an MVP with prompts"):
        beam_search(model, TABLES, 2, 5)
