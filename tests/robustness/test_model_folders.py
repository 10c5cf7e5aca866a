"""Model folders made to do harm: no code of theirs runs, nothing that they name is fetched. Each is
loaded right, or refused with one sentence, in 10 seconds and a GB of memory."""

import builtins
import errno
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import BART, CLIP, GPT
from safetensors.torch import load_file, save_file
from test_hostile import bounded, refusal

from antarctic import bounded as bounds
from antarctic import causal_lm, checkpoints, files, model_checks, model_files, pickles, reads
from antarctic.cache_files import cache_description
from antarctic.errors import InputError
from antarctic.index import index_description
from antarctic.model_files import load_tokenizer
from antarctic.texts import read_text
from model import Captioner, Clip

PROMPT = ["Once upon a time"]


def load_story_model(folder):
    config, tokenizer, *_ = causal_lm.encode(folder, PROMPT)
    return causal_lm.load_lm(folder, causal_lm.end_tokens(tokenizer, False), "cpu", torch.float32,
                             config)


def vectors(folder):
    return Clip(folder).encode_texts(["a red dog"])


def logits(model, tokens=((0, 5, 9, 2),)):
    with torch.inference_mode():
        return model(input_ids=torch.tensor(tokens)).logits


KINDS = {  # {kind: (folder, function of a folder to numbers that depend on all of its parts)}
    "CLIP": (CLIP, vectors),
    "BART": (BART, lambda folder: logits(Captioner(folder).model)),
    "GPT": (GPT, lambda folder: logits(load_story_model(folder))),
}


@pytest.fixture
def copy(tmp_path):
    """copy(folder) copies a model folder and returns the copy's path."""
    return lambda folder: shutil.copytree(folder, tmp_path / Path(folder).name)


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    def asked(*_):
        raise AssertionError("a model asked a question")
    monkeypatch.setattr(builtins, "input", asked)


def change(path, **values):
    """Sets values of a JSON file; it may be missing."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def told(read, folder):
    return refusal(read, str(folder))


# ---------------------------------------------------------------------------------------- no code

def plant(folder, marker):
    """Puts everything into a folder by which transformers or PEFT would run code of it, or fetch
    another model."""
    code = f"open({str(marker)!r}, 'w')\n"
    for name in ("evil.py", "custom_generate/generate.py", "modeling_clip.py", "sitecustomize.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM",
               "AutoImageProcessor", "AutoProcessor")
    maps = {name: "evil.Evil" for name in classes} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    change(folder / "config.json", auto_map=maps, _name_or_path="someone/else",
           attn_implementation="someone/kernel", _attn_implementation="someone/kernel",
           transformers_weights="../else.safetensors", custom_pipelines={"evil": "evil.Evil"})
    change(folder / "tokenizer_config.json", auto_map=maps, tokenizer_file="/etc/passwd",
           vocab_file="/etc/passwd", name_or_path="someone/else", init_inputs=["/etc/passwd"],
           fast_tokenizer_files=["/etc/passwd"])
    if (folder / "preprocessor_config.json").exists():
        change(folder / "preprocessor_config.json", auto_map=maps)
    (folder / "adapter_config.json").write_text(json.dumps(
        {"base_model_name_or_path": "someone/else", "peft_type": "LORA", "auto_mapping": maps}))
    (folder / "generation_config.json").write_text('{"num_beams": "many", "max_length": -1}')
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "a.jinja").write_text("{{ 1 / 0 }}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_a_known_kind_loads_without_the_code_beside_it(copy, tmp_path, kind):
    source, numbers = KINDS[kind]
    folder, marker = copy(source), tmp_path / "marker"
    plant(folder, marker)
    assert torch.equal(numbers(str(folder)), numbers(source)) and not marker.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_needs_its_own_code_is_refused(copy, tmp_path, kind):
    source, numbers = KINDS[kind]
    folder, marker = copy(source), tmp_path / "marker"
    plant(folder, marker)
    change(folder / "config.json", model_type="evil")
    assert str(folder) in told(numbers, folder) and not marker.exists()


@pytest.mark.parametrize("name", [
    "pipeline", "AutoModel", "os", "__doc__", "",
    *(pytest.param(name, marks=pytest.mark.slow)  # they import most of transformers
      for name in ("AutoProcessor", "AutoTokenizer", "Trainer"))])
def test_a_tokenizers_class_is_no_way_to_other_code(copy, name):
    folder = copy(GPT)
    change(folder / "tokenizer_config.json", tokenizer_class=name)
    with bounded():
        try:
            assert load_tokenizer(str(folder), "language model")("a dog")["input_ids"]
        except InputError as error:
            assert str(folder) in str(error)


def test_quantized_weights_are_refused(copy):
    folder = copy(GPT)
    change(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    assert "its weights are quantized" in told(load_story_model, folder)


CHAT = {  # {template: what becomes of it}
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "seconds",
    "{{ 'a' * 10 ** 10 }}": "MemoryError",
    "{% for a in range(99999) %}{{ 'a' * 10 ** 3 }}{% endfor %}": "characters of a prompt",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "cannot be filled",
}


@pytest.mark.parametrize("template", CHAT)
def test_a_chat_template_is_bounded(copy, monkeypatch, template):
    folder, in_child = copy(GPT), causal_lm.in_child
    (folder / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(causal_lm, "in_child", lambda make: in_child(make, seconds=1))
    assert CHAT[template] in refusal(causal_lm.encode, str(folder), PROMPT, True)


# ------------------------------------------------------------------------------- files and numbers

SPECIAL = {"pipe": os.mkfifo, "zeros": lambda path: path.symlink_to("/dev/zero"),
           "sparse": lambda path: os.truncate(path.touch() or path, 1 << 40), "folder": Path.mkdir,
           "nothing": lambda path: path.symlink_to("nowhere")}
NAMES = ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
         "model.safetensors"]


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_refused_at_once(copy, name, special):
    folder = copy(CLIP)
    (folder / name).unlink()
    SPECIAL[special](folder / name)
    with bounded(seconds=5, megabytes=300):
        assert str(folder) in told(Clip, folder)


def test_links_to_files_are_read_as_in_the_hubs_cache(tmp_path):
    for path in Path(GPT).iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert torch.equal(logits(load_story_model(str(tmp_path))), logits(load_story_model(GPT)))


@pytest.mark.parametrize("kind, key, value", [
    ("BART", "encoder_layers", 10 ** 8), ("BART", "decoder_layers", 5000),
    ("BART", "max_position_embeddings", 10 ** 9), ("BART", "vocab_size", 10 ** 9),
    ("BART", "d_model", 10 ** 6), ("BART", "num_labels", 10 ** 8), ("BART", "encoder_layers", 4),
    ("GPT", "attention_types", [[["global"], 10 ** 8]]), ("GPT", "num_layers", 10 ** 8),
    ("GPT", "max_position_embeddings", 10 ** 6), ("GPT", "hidden_size", 10 ** 30),
    ("CLIP", "vision_config", {"image_size": 10 ** 9}),
    ("CLIP", "text_config", {"num_hidden_layers": 10 ** 8}), ("CLIP", "projection_dim", 10 ** 9),
], ids=str)
def test_sizes_that_do_not_fit_the_weights_are_refused_before_memory_is_taken(
        copy, kind, key, value):
    source, numbers = KINDS[kind]
    folder = copy(source)
    config = json.loads((folder / "config.json").read_text())
    value = config[key] | value if isinstance(value, dict) else value
    change(folder / "config.json", **{key: value})
    with bounded(megabytes=400):
        assert str(folder) in told(numbers, folder)


@pytest.mark.parametrize("change_of", [
    lambda tokens: tokens["added_tokens"].append(tokens["added_tokens"][0] | {
        "id": 10 ** 9, "content": "far"}),
    lambda tokens: tokens["added_tokens"].append(tokens["added_tokens"][0] | {
        "id": 2000, "content": "near"}),
    lambda tokens: tokens["model"]["vocab"].update(far=10 ** 9),
    lambda tokens: tokens["model"]["vocab"].update({f"x{i}": i for i in range(3000)}),
    lambda tokens: tokens.update(normalizer={"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}] * 20}),
    lambda tokens: tokens.update(padding={
        "strategy": {"Fixed": 10 ** 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}),
], ids=["token 10^9", "token beyond the embedding", "word 10^9", "too many words",
        "longer and longer", "padded"])
def test_a_tokenizer_made_to_take_memory_is_refused(copy, monkeypatch, change_of):
    monkeypatch.setattr(model_checks, "MOST_TOKENS", 3000)  # half a million take seconds to write
    folder = copy(BART)
    tokens = json.loads((folder / "tokenizer.json").read_text())
    change_of(tokens)
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    assert "token" in told(Captioner, folder)


def test_an_added_token_of_the_settings_is_bounded(copy):
    folder = copy(BART)
    change(folder / "tokenizer_config.json", added_tokens_decoder={
        str(10 ** 9): {"content": "far", "special": True}})
    assert "its tokenizer has the token 1000000000" in told(Captioner, folder)


def test_a_tokenizer_of_500_megabytes_is_refused(copy):
    folder = copy(BART)
    os.truncate(folder / "tokenizer.json", 500_000_000)
    with bounded(seconds=5, megabytes=200):
        assert "500,000,000 bytes" in told(Captioner, folder)


@pytest.mark.parametrize("values", [
    {"rescale_factor": None}, {"crop_size": {"height": 64, "width": 64}}, {"image_mean": ["a"] * 3},
    {"size": {"shortest_edge": 10 ** 9}, "crop_size": 10 ** 9}], ids=str)
def test_an_image_processor_that_does_not_fit_is_refused(copy, values):
    folder = copy(CLIP)
    change(folder / "preprocessor_config.json", **values)
    with bounded(seconds=5, megabytes=300):
        assert str(folder) in told(Clip, folder)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "other.safetensors"])
def test_a_part_of_the_weights_elsewhere_is_refused(copy, shard):
    folder = copy(GPT)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    save_file(weights, folder.parent / "other.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "it lacks its part" in told(load_story_model, folder)
    index["weight_map"] = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(load_story_model(str(folder))), logits(load_story_model(GPT)))


# ------------------------------------------------------------------------------------ the weights

def spoil(folder, name, value, kind="safetensors"):
    """Writes a model's weights anew, in float32, with one of them set to a value, or without it
    where the value is None."""
    weights = {key: tensor.float() for key, tensor in load_file(
        folder / "model.safetensors").items()}
    weights[name].fill_(value) if value is not None else weights.pop(name)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


NORM = {"CLIP": "text_model.final_layer_norm.weight",
        "BART": "model.encoder.layers.0.fc1.weight", "GPT": "transformer.ln_f.weight"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value, reason", [
    (float("nan"), "values that are not finite (in"), (float("inf"), "values that are not finite"),
    (None, "lacks 1 of its weights, such as")])
def test_a_weight_that_is_none_is_named_at_loading(copy, kind, value, reason):
    source, numbers = KINDS[kind]
    folder = copy(source)
    spoil(folder, NORM[kind], value)
    message = told(numbers, folder)
    assert (reason in message or "do not fit" in message or "describes" in message)
    assert value is None or NORM[kind] in message


@pytest.mark.parametrize("kind", ["CLIP", "BART"])
def test_weights_that_overflow_are_told_at_loading(copy, kind):
    source, numbers = KINDS[kind]
    folder = copy(source)
    spoil(folder, NORM[kind], 3e38)
    assert "not finite" in told(numbers, folder)


@pytest.mark.parametrize("write", [
    lambda captioner, table: captioner.beam([table]),
    lambda captioner, table: captioner.sample([table], 20),
    lambda captioner, table: captioner.sample([table], 20, 0.5, 0.9)],
    ids=["beams", "samples", "nucleus"])
def test_logits_that_overflow_end_in_a_sentence(write):
    captioner = Captioner(BART)
    table, = captioner.tokenize(["a dog | "], 16)
    with torch.no_grad():
        captioner.model.model.decoder.layers[-1].final_layer_norm.weight.fill_(3e38)
    assert "values that are not finite" in refusal(write, captioner, table)


@pytest.mark.parametrize("legacy", [True, False])
def test_pickled_weights_load_and_their_bombs_do_not(copy, legacy):
    folder = copy(GPT)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    assert torch.equal(logits(load_story_model(str(folder))), logits(load_story_model(GPT)))
    if legacy:
        head = path.read_bytes()[:137]  # the first three of five pickles
        path.write_bytes(head + b"]" * (1 << 26))
    else:
        with zipfile.ZipFile(path) as old:
            members = {info.filename: old.read(info) for info in old.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in members.items():
                new.writestr(name, data)
    assert "pytorch_model.bin" in told(load_story_model, folder)


# ----------------------------------------------------------------- what is changed while it is read

CHANGES = {
    "in place": lambda path: path.write_bytes(path.read_bytes()[::-1]),
    "replaced": lambda path: shutil.copy(path, f"{path}.new") and os.replace(f"{path}.new", path),
    "removed": os.unlink,
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_that_changes_while_it_is_read_is_refused(copy, monkeypatch, name, how):
    folder, own = copy(BART), model_files.own_weights

    def change_then_own(*arguments):
        own(*arguments)
        CHANGES[how](folder / name)

    monkeypatch.setattr(model_files, "own_weights", change_then_own)
    assert "was changed while this run read it" in told(Captioner, folder)


STALE = os.strerror(errno.ESTALE)


class Loader:
    """A library that a disk leaves in the lurch so many times."""

    def __init__(self, error, times):
        self.error, self.times = error, times

    def from_pretrained(self, *_, **__):
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return "loaded"


@pytest.mark.parametrize("error", [
    OSError(errno.ESTALE, STALE), OSError(f"{STALE} (os error {errno.ESTALE})"),
    RuntimeError(f"unable to mmap 9 bytes from file </proc/self/fd/3>: {STALE} ({errno.ESTALE})")],
    ids=["Python", "Rust", "torch"])
def test_an_error_of_the_disk_inside_a_library_is_tried_again(monkeypatch, error):
    monkeypatch.setattr(reads, "PAUSES", (0, 0, 0))
    with model_files.opened_model(BART, "language model", ("tokenizer",)) as held:
        assert held.load(Loader(error, 3)) == "loaded"
        with pytest.raises(InputError, match=rf"{BART} cannot be read \({STALE}\); rerun"):
            held.load(Loader(error, 4))
        with pytest.raises(InputError, match="could not be loaded"):
            held.load(Loader(ValueError("no such thing (5)"), 1))

        def opened(path, *how, open=open):
            if os.path.realpath(path) == os.path.join(BART, "tokenizer.json"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return open(path, *how)

        monkeypatch.setattr(builtins, "open", opened)
        with pytest.raises(InputError, match=r"tokenizer.json cannot be read \(Input/output error"):
            held.load(Loader(error, 4))


def test_a_state_on_a_disk_that_fails_is_not_to_be_deleted(tmp_path, monkeypatch):
    state, failing = tmp_path / "state-0.pt", OSError(errno.EIO, os.strerror(errno.EIO))
    torch.save({}, state)
    monkeypatch.setattr(torch, "load", Loader(failing, 1).from_pretrained)
    with pytest.raises(InputError, match=r"state-0.pt cannot be read \(Input/output error\)"):
        checkpoints.load_state(state, {}, None)
    monkeypatch.setattr(torch, "load", Loader(ValueError("bad magic"), 1).from_pretrained)
    with pytest.raises(InputError, match="delete it"):
        checkpoints.load_state(state, {}, None)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_file_of_which_nobody_can_tell_is_not_called_missing(tmp_path, monkeypatch, code):
    monkeypatch.setattr(reads, "PAUSES", (0, 0, 0))

    def stat(path, *_, **__):
        raise OSError(code, os.strerror(code), path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", stat)
        with pytest.raises(InputError, match=rf"a.ckpt cannot be read \({os.strerror(code)}\)"):
            files.existing_file(tmp_path / "a.ckpt", "checkpoint")
        with pytest.raises(OSError, match="clip"):
            reads.is_there(tmp_path / "clip")
    with pytest.raises(InputError, match="there is no checkpoint at"):
        files.existing_file(tmp_path / "a.ckpt", "checkpoint")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changes_afterwards_changes_nothing(copy, kind):
    source, _ = KINDS[kind]
    folder = copy(source)
    spoil(folder, NORM[kind], 0.5)  # float32, whose pages would be the file's own
    load = {"CLIP": Clip, "BART": Captioner, "GPT": load_story_model}[kind]
    model = load(str(folder))
    weights = getattr(model, "model", model).state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())


def test_a_checkpoint_that_changes_while_it_is_read_changes_nothing(
        checkpoint, tmp_path, monkeypatch):
    path = shutil.copy(checkpoint, tmp_path / "a.safetensors")
    captioner, load = Captioner(BART), checkpoints.load
    before = {name: tensor.clone() for name, tensor in captioner.model.state_dict().items()}

    def load_then_change(*arguments):
        tensors = load(*arguments)
        CHANGES["replaced"](path)
        return tensors

    monkeypatch.setattr(checkpoints, "load", load_then_change)
    message = refusal(checkpoints.load_checkpoint, path, captioner)
    assert "was changed while this run read it" in message
    assert all(torch.equal(tensor, before[name])
               for name, tensor in captioner.model.state_dict().items())


# ------------------------------------------------------------------------------ what is written

def trained_one():
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite_is_written(tmp_path, value):
    path = tmp_path / "state-0.pt"
    parameter, optimizer = trained_one()
    optimizer.state[parameter]["exp_avg_sq"][2] = value
    message = refusal(checkpoints.save_state, path, {"shared.weight": parameter}, optimizer, ())
    assert "the optimizer's exp_avg_sq of shared.weight holds" in message and not path.exists()
    with torch.no_grad():
        parameter[1] = value
    message = refusal(checkpoints.save_checkpoint, path, {"shared.weight": parameter}, {})
    assert message.startswith("shared.weight holds values that are not finite")
    checkpoints.save_state(path, {"shared.weight": parameter}, optimizer, ())
    assert not path.exists()


def test_a_state_whose_pickle_would_fill_the_memory_is_refused(tmp_path):
    parameter, optimizer = trained_one()
    with zipfile.ZipFile(tmp_path / "state-0.pt", "w") as archive:
        archive.writestr("state/data.pkl", b"]" * ((1 << 24) + 1))
    assert "state-0.pt" in refusal(checkpoints.load_state, tmp_path / "state-0.pt",
                                   {"a": parameter}, optimizer)
    with pytest.raises(ValueError, match="too large"):
        pickles.require_small_pickle(tmp_path / "state-0.pt")


# --------------------------------------------------------------------------------- files of others

READERS = {
    "text": lambda path: read_text(path, "list of words"),
    "bytes": lambda path: bounds.read_bytes(path, "file"),
    "description": lambda path: cache_description(path.with_suffix("")),
    "checkpoint": lambda path: checkpoints.load_checkpoint(path, None),
    "index": lambda path: index_description(path.with_suffix("")),
}


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", READERS)
def test_a_reader_waits_for_no_pipe_and_reads_no_endless_file(tmp_path, name, special):
    path = tmp_path / "a.npy.json"
    (tmp_path / "a.npy").touch()
    SPECIAL[special](path)
    with bounded(seconds=2, megabytes=50):
        if (name, special) == ("description", "nothing"):
            assert cache_description(tmp_path / "a.npy") is None
        else:
            assert "a.npy.json" in refusal(READERS[name], path)


@pytest.mark.parametrize("text", ["[[],", "[{},"])
def test_lists_of_lists_are_refused_before_they_are_made(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text("[" + text[1:] * 15_000_000 + "0]")
    with bounded(megabytes=300), pytest.raises(InputError, match="8,388,608 lists and objects"):
        bounds.parse_json(path.read_text(), path, "caption file")


def test_a_prefix_of_ten_megabytes_is_refused(tmp_path):
    change(tmp_path / "c.npy.json", clip_model="a", text_sha256="b", prefix="a" * 10_000_000)
    assert "is not the description of a cache" in refusal(cache_description, tmp_path / "c.npy")
