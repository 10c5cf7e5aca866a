"""Models by name from a hub on 127.0.0.1, with an empty cache: the files that are fetched, their
number of requests, and the message for each fault.
"""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import BART, CLIP, ROOT, VAL, running_page
from forks import context
from hub import Hub, bart_of_2020, repositories, serving, siglip2_of_2025
from huggingface_hub import constants
from test_pickles import gemma_tokenizer
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

from antarctic import pretrained
from antarctic.errors import InputError
from antarctic.model_files import load_tokenizer
from antarctic.pretrained import fetch
from model import Captioner, Clip

ALL = ("weights", "tokenizer", "processor")
B16, B32 = "openai/clip-vit-base-patch16", "openai/clip-vit-base-patch32"
BART_LARGE, NEO = "facebook/bart-large", "EleutherAI/gpt-neo-1.3B"
NEEDED = {  # one format of the weights and of the tokenizer
    B16: {"config.json", "model.safetensors", "preprocessor_config.json",
          "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"},
    B32: {"config.json", "pytorch_model.bin", "preprocessor_config.json",
          "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer_config.json"},
    BART_LARGE: {"config.json", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json"},
    NEO: {"config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json",
          "tokenizer_config.json"},
}


@pytest.fixture(scope="module")
def served():
    with serving(Hub(repositories())) as hub:
        yield hub


@pytest.fixture
def hub(served, tmp_path, monkeypatch):
    """The hub without faults. This process uses it as with HF_ENDPOINT and an empty HF_HOME."""
    point_to(monkeypatch, served.url, tmp_path / "home")
    monkeypatch.setattr(served, "repositories", dict(served.repositories))
    served.heal()
    yield served
    served.resume.set()


def point_to(monkeypatch, url, home):
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


def wanted(hub, name):
    return {file: hub.repositories[name][file] for file in NEEDED[name]}


# -------------------------------------------------------------------------- a newcomer's first runs

def command(script, *arguments, **environment):
    """Runs a script in a process of its own. Returns its output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run([sys.executable, ROOT / f"{script}.py", *map(str, arguments)], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, timeout=240)
    assert run.returncode == 0, run.stdout
    return run.stdout


@pytest.mark.slow
def test_every_script_runs_by_the_default_names_then_without_a_network(served, world, photos,
                                                                       tmp_path):
    served.heal()
    served.hang = {"other"}  # a run with unneeded requests would not end
    cache = ("--textfile", tmp_path / "cache.txt", "--embfile", tmp_path / "cache.npy")
    results = tmp_path / "results"
    runs = [("compute_cache", "--datadir", world, "--topk", "150", *cache),
            ("trainer", "--datadir", world, *cache, "--savedir", tmp_path / "checkpoints",
             "--epochs", 1),
            ("sampler", "--datadir", world, *cache, "--ckpt",
             tmp_path / "checkpoints/best.safetensors", "--savedir", results),
            ("scorer", "--preds", results / "preds.txt", "--images", world / "val2017"),
            ("stories", "--captions", results / "captions.json", "--savedir", tmp_path / "stories",
             "--max_tokens", 10)]
    online = {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "home"),
              "TQDM_POSITION": "-1"}  # bars without a terminal
    printed = [command(*run, **online) for run in runs]
    for name, files in NEEDED.items():
        assert served.fetched(name) == dict.fromkeys(files, 1), served.requests
    assert not [request for request in served.requests if request[1] == "other"]
    for name, output in ((B16, printed[0]), (BART_LARGE, printed[1]), (B32, printed[3]),
                         (NEO, printed[4])):
        line, = (line for line in output.splitlines()
                 if line.startswith("fetching") and ("weights" in line or "MB" in line))
        assert name in line and served.url in line and str(tmp_path / "home") in line
        assert re.search(r"\d+\.\d MB in \d+ files", line)
    first = (results / "preds.txt").read_text()
    assert len(first.splitlines()) == VAL and "model.safetensors: 100%" in printed[0]

    served.requests.clear()
    served.hang = {"api", "resolve", "blob", "other"}  # a run with any request would not end
    shutil.rmtree(results)
    for run in runs:
        command(*run, **online)
    assert served.requests == [] and (results / "preds.txt").read_text() == first
    shutil.rmtree(results)
    offline = online | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command(*runs[2], **offline)
    assert (results / "preds.txt").read_text() == first
    other = ("--dtype", "int8", "--table", "topk", "--workers", "2", "--batch_size", "auto",
             "--where", "--insert_cost", ".02")
    output = command(*runs[2], *other, **offline)
    assert f"{BART_LARGE} on cpu, int8" in output and "trained on tables by mmr" in output
    assert len((results / "preds.txt").read_text().splitlines()) == VAL
    assert (results / "details.jsonl").read_text().count('"where": {') == VAL
    output = command("compute_cache", *cache, "--teach", "Tom", photos / "Tom", "--as", "a cat",
                     "--others", photos / "others", **offline)
    assert "Tom, a cat: would be named in" in output
    command("sampler", "--images", photos / "new", *runs[2][3:], **offline)
    assert (results / "details.jsonl").read_text().count('["Tom", ') >= 3


@pytest.mark.slow
def test_the_page_runs_by_the_default_names_then_without_a_network(served, world, tmp_path):
    from gradio_client import Client, handle_file
    served.heal()
    (tmp_path / "words.txt").write_text("a dog\nthe sea\nsnow\na red house\n")
    cache = ("--textfile", tmp_path / "cache.txt", "--embfile", tmp_path / "cache.npy")
    home = {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command("compute_cache", "--entries", tmp_path / "words.txt", *cache, **home)
    arguments = (*cache, "--ckpt", "none", "--topk", 3, "--port", 0)
    image, answers = world / "near" / "000020000000.png", []
    for _ in range(2):
        with running_page(*arguments, **home) as (_, address):
            page = Client(address, verbose=False, analytics_enabled=False)
            answer = page.predict(photo=handle_file(image), words="a penguin",
                                  api_name="/caption")
            answers.append({name: answer[name] for name in ("caption", "table", "candidates")})
        if len(answers) == 1:
            assert served.requests
            served.requests.clear()
            served.hang = {"api", "resolve", "blob", "other"}  # any request would not end
    assert served.requests == []
    assert answers[0] == answers[1] and len(answers[0]["table"]) == 3


def test_models_of_the_hub_compute_as_the_same_models_in_folders(hub):
    texts = ["a red dog", "two cats next to a house", "Snow"]
    rows = ["a red dog | grass | ", "two cats | "]
    folder = Clip(CLIP)
    for name in ("ViT-B/16", "ViT-B/32"):
        clip = Clip(name)
        assert torch.equal(clip.encode_texts(texts), folder.encode_texts(texts))
        assert clip.identity == pretrained.CLIP_NAMES[name]
    ours, plain = Captioner(BART_LARGE), Captioner(BART)
    tables = [ours.tokenize([row], 64)[0] for row in rows]
    assert tables == [plain.tokenize([row], 64)[0] for row in rows]
    assert ours.beam(tables) == plain.beam(tables)


@pytest.mark.parametrize("change", [
    lambda files: files.pop("tokenizer_config.json"),
    lambda files: [files.pop(name) for name in ("tokenizer.json", "tokenizer_config.json")],
    lambda files: files.update({"model.safetensors.index.json": b"{}"}),  # shards are elsewhere
    lambda files: files.update({"onnx/model.onnx": b"onnx", "coreml/model.safetensors": b"x",
                                "model.fp16.safetensors": b"x"}),
], ids=["no tokenizer_config.json", "vocab.json and merges.txt alone", "a lonely index",
        "more copies of the weights"])
def test_repositories_of_other_forms_load(hub, change):
    hub.repositories[BART_LARGE] = bart_of_2020()
    change(hub.repositories[BART_LARGE])
    if "model.safetensors.index.json" in hub.repositories[BART_LARGE]:
        with pytest.raises(InputError, match="could not be loaded from .* a rerun fetches it anew"):
            Captioner(BART_LARGE)
        return
    captioner = Captioner(BART_LARGE)
    assert len(captioner.tokenizer) == 1100
    assert captioner.tokenize(["dog"], 9) == captioner.tokenize(["dog"], 9)
    hub.requests.clear()
    Captioner(BART_LARGE)
    assert hub.requests == []


def test_siglip2_is_fetched_with_one_of_its_two_tokenizers(hub, tmp_path):
    torch.manual_seed(0)
    size = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**size, "vocab_size": 100, "bos_token_id": 2, "eos_token_id": 1, "hidden_size": 32,
            "projection_size": 48}
    vision = {**size, "image_size": 32, "patch_size": 16, "hidden_size": 48}
    config = SiglipConfig(text_config=text, vision_config=vision)
    SiglipModel(config).save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(gemma_tokenizer(tmp_path)))
    name = "google/siglip2-base-patch16-224"
    hub.repositories[name] = siglip2_of_2025(tmp_path)
    clip = Clip(name)
    assert torch.equal(clip.encode_texts(["A red dog"]),
                       Clip(str(tmp_path)).encode_texts(["A red dog"]))
    assert hub.fetched(name) == dict.fromkeys(
        ("config.json", "model.safetensors", "preprocessor_config.json", "special_tokens_map.json",
         "tokenizer.json", "tokenizer_config.json"), 1)


def test_sharded_weights_are_fetched_whole(hub, tmp_path):
    Captioner(BART).model.save_pretrained(tmp_path / "shards", max_shard_size="3MB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert sum(name.endswith(".safetensors") for name in files) > 1
    hub.repositories["me/sharded"] = bart_of_2020() | files
    loaded, plain = Captioner("me/sharded").model.state_dict(), Captioner(BART).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.items())
    assert "pytorch_model.bin" not in hub.fetched("me/sharded")


def test_a_tokenizer_is_fetched_without_its_weights(hub):
    tokenizer = load_tokenizer(B32, "tokenizer")
    assert len(tokenizer) == 1100
    assert hub.fetched(B32) == dict.fromkeys(
        NEEDED[B32] - {"pytorch_model.bin", "preprocessor_config.json"}, 1)


# ---------------------------------------------------------------------- killed, cut and half-filled

def only_fetch(name, url, home):
    with pytest.MonkeyPatch.context() as patch:
        point_to(patch, url, home)
        fetch(name, "model", ALL)


@pytest.mark.slow
@pytest.mark.parametrize("paused", sorted(NEEDED[B32]))
def test_a_kill_at_any_file_is_mended_by_the_next_run(hub, tmp_path, paused):
    hub.paused = {paused: len(hub.repositories[B32][paused]) // 2}
    run = context.Process(target=only_fetch, args=(B32, hub.url, str(tmp_path / "home")))
    run.start()
    assert hub.reached.wait(60)
    time.sleep(0.2)
    run.kill()
    run.join()
    hub.resume.set()
    hub.paused = {}
    assert content(fetch(B32, "CLIP model", ALL)) == wanted(hub, B32)
    times = hub.fetched(B32)
    assert times.pop(paused) == 2 and set(times.values()) <= {1, 2}
    hub.requests.clear()
    fetch(B32, "CLIP model", ALL)
    assert hub.requests == []


@pytest.mark.parametrize("lost", sorted(NEEDED[B32]))
@pytest.mark.slow
def test_a_file_that_is_lost_is_fetched_again_alone(hub, lost):
    folder = Path(fetch(B32, "CLIP model", ALL))
    hub.requests.clear()
    (folder / lost).resolve().unlink()
    (folder / lost).unlink()
    assert content(fetch(B32, "CLIP model", ALL)) == wanted(hub, B32)
    assert hub.fetched(B32) == {lost: 1}


# transformers fetches the files in this order, and keeps no list of them.
ORDER = ["config.json", "pytorch_model.bin", "tokenizer_config.json", "vocab.json", "merges.txt",
         "special_tokens_map.json", "preprocessor_config.json"]


@pytest.mark.slow
@pytest.mark.parametrize("n", range(len(ORDER) + 1))
def test_what_another_program_left_is_completed(hub, n):
    for file in ORDER[:n]:
        huggingface_hub.hf_hub_download(B32, file)
    hub.requests.clear()
    assert content(fetch(B32, "CLIP model", ALL)) == wanted(hub, B32)
    assert hub.fetched(B32) == dict.fromkeys(ORDER[n:], 1)


@pytest.mark.parametrize("n", range(len(ORDER)))
def test_what_another_program_left_half_filled_is_not_loaded_without_a_network(hub, n):
    """The message must name the network, not a missing tokenizer."""
    for file in ORDER[:n]:
        huggingface_hub.hf_hub_download(B32, file)
    hub.status = 503
    assert "is not available" in refusal()


def test_half_of_the_shards_are_not_whole(tmp_path):
    for file in ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        (tmp_path / file).touch()
    assert not pretrained.is_complete(tmp_path, ("weights",))
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    assert pretrained.is_complete(tmp_path, ("weights",))
    assert not pretrained.is_complete(tmp_path, ("weights", "tokenizer"))
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert not pretrained.is_complete(tmp_path, ("weights",))  # only an index


def test_a_hub_that_is_away_is_asked_once_for_what_another_program_left(hub):
    """Each request can wait half a minute for an answer."""
    for file in ORDER:
        huggingface_hub.hf_hub_download(B32, file)
    hub.requests.clear()
    hub.status = 503
    assert Clip(B32).encode_texts(["a dog"]).shape == (1, 128)
    assert len(hub.requests) == 1


def test_what_another_program_left_whole_needs_no_network(hub, monkeypatch):
    for file in NEEDED[B32]:
        huggingface_hub.hf_hub_download(B32, file)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert content(fetch(B32, "CLIP model", ALL)) == wanted(hub, B32)


def test_a_cut_download_goes_on_where_it_was(hub, monkeypatch):
    # A cut loses the part of a chunk that has arrived; the usual chunk has 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 20)
    size = len(hub.repositories[B32]["pytorch_model.bin"])
    hub.cut = {"pytorch_model.bin": size // 2}
    assert content(fetch(B32, "CLIP model", ALL)) == wanted(hub, B32)
    assert hub.fetched(B32)["pytorch_model.bin"] == 2 and hub.ranges == [size // 2 >> 20 << 20]


@pytest.mark.slow
def test_two_processes_fetch_each_file_once(hub, tmp_path):
    hub.delay = 0.02
    arguments = B32, hub.url, str(tmp_path / "home")
    runs = [context.Process(target=only_fetch, args=arguments) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert hub.fetched(B32) == dict.fromkeys(NEEDED[B32], 1)
    assert content(fetch(B32, "CLIP model", ALL)) == wanted(hub, B32)


def test_a_newer_version_on_the_hub_does_not_disturb_the_one_that_is_here(hub):
    before = wanted(hub, BART_LARGE)
    fetch(BART_LARGE, "language model", ALL)
    hub.repositories[BART_LARGE] = bart_of_2020() | {"config.json": b"{}"}
    hub.requests.clear()
    assert content(fetch(BART_LARGE, "language model", ALL)) == before and hub.requests == []


# --------------------------------------------------------------------------- each cause, a sentence

def refusal(name=B32, parts=ALL):
    with pytest.raises(InputError) as caught:
        fetch(name, "CLIP model", parts)
    text = str(caught.value)
    assert name in text and "\n" not in text
    assert text.startswith(("the CLIP model", "there is no folder"))
    return text


@pytest.mark.parametrize("name, near", [
    ("openai/clip-vit-base-patch61", "openai/clip-vit-base-patch16"),
    ("VIT-B/32", "ViT-B/32"), ("ViT-B-32", "ViT-B/32"),
    ("facebook/bart-larg", "facebook/bart-large"), ("Facebook/Bart-Large", "facebook/bart-large"),
    ("google/siglip2-base-patch16", "google/siglip2-base-patch16-224"),
    ("eleutherai/gpt-neo-1.3b", "EleutherAI/gpt-neo-1.3B"),
])
def test_a_typo_is_told_with_near_names(hub, name, near):
    assert f"did you mean {near}" in refusal(name).replace(" or ", " did you mean ")


@pytest.mark.parametrize("name", ["somebody/private-model", "nobody"])
def test_an_unknown_name_may_be_private(hub, name):
    hub.repositories.pop(name, None)
    text = refusal(name)
    assert "neither a folder here nor a public model" in text and "HF_TOKEN" in text
    assert "did you mean" not in text


@pytest.mark.parametrize("name", ["./models/clip", "/data/clip", "models/openai/clip",
                                  "weights\\clip", "~/clip", "a b/c", "--x"])
def test_a_path_that_is_not_there_is_no_name(hub, name):
    assert "there is no folder" in refusal(name) and hub.requests == []


def test_a_gated_repository(hub):
    hub.gated = {B32}
    terms = r"is gated; accept its terms at http://.*/openai/clip-vit-base-patch32 and log in"
    assert re.search(terms, refusal())


@pytest.mark.parametrize("status, message", [
    (401, "with this login"), (403, "with this login"), (429, "is busy"),
    (500, "is not available"), (502, "is not available"), (503, "is not available"),
    (418, "refused the request"),
])
def test_a_status_of_the_hub(hub, status, message):
    hub.status = status
    text = refusal()
    assert message in text and str(status) in text


def test_a_login_page_of_a_network(hub):
    hub.page = b"<html>Welcome to the hotel</html>"
    assert "does not answer as the Hugging Face hub does" in refusal()


def test_no_network(hub, monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_to(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}", tmp_path / "home")
        start = time.monotonic()
        assert "there is no connection to http://127.0.0.1" in refusal()
    assert time.monotonic() - start < 5


def test_a_hub_that_hangs(hub, monkeypatch):
    monkeypatch.setattr(pretrained, "TIMEOUT", 0.5)
    hub.hang = {"api"}
    assert "there is no connection" in refusal() and "Timeout" in refusal()


def test_the_list_of_files_has_a_time_limit(hub, monkeypatch):
    """huggingface_hub sets no limit for it."""
    monkeypatch.setattr(pretrained, "TIMEOUT", 0.5)
    pretrained.limit_waits()
    pretrained.limit_waits()
    hub.hang = {"api"}
    with pytest.raises(Exception, match="timed out"):
        huggingface_hub.HfApi().model_info(B32)


@pytest.mark.parametrize("fill", [0, 3])
def test_offline_mode(hub, monkeypatch, fill):
    for file in sorted(NEEDED[B32])[:fill]:
        huggingface_hub.hf_hub_download(B32, file)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert "HF_HUB_OFFLINE is set" in refusal() and hub.requests == []


def test_a_disk_with_too_little_room_is_told_before(hub, monkeypatch):
    monkeypatch.setattr(pretrained.shutil, "disk_usage",
                        lambda _: shutil._ntuple_diskusage(10, 9, 1_500))
    text = refusal()
    assert re.search(r"needs 16\.\d MB in .* but only 1\.5 kB are free; set HF_HOME", text)
    assert hub.fetched(B32) == {}


def test_a_disk_that_fills_up(hub, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    assert re.search(r"could not be saved in .* \(No space left on device\); free some space",
                     refusal())


def test_a_folder_that_may_not_be_written(hub, monkeypatch, tmp_path):
    (tmp_path / "file").touch()  # root may write to any folder, but not below a file
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert re.search(r"could not be saved in .*file/hub \(Not a directory\); make it writable",
                     refusal())


def test_a_repository_without_weights_of_pytorch(hub):
    hub.repositories[B32] = {"config.json": b"{}", "tf_model.h5": b"tf", "model-q4.gguf": b"GGUF"}
    assert "has no PyTorch weights" in refusal()


@pytest.mark.parametrize("name, data", [
    ("model.gguf", b"GGUF" + bytes(99)), ("model.safetensors", bytes(99)), ("notes.txt", b"a dog"),
    ("empty.pt", b""), ("model.onnx", b"\x08\x07"),
])
def test_a_file_that_is_no_model(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=re.escape(name)):
        Clip(str(tmp_path / name))
    with pytest.raises(InputError, match=f"{re.escape(name)} is a file; give a folder or a name"):
        Captioner(str(tmp_path / name))


def test_damaged_files_of_the_hub_are_told_with_their_folder(hub):
    hub.repositories[B32] = hub.repositories[B32] | {"config.json": b"{"}
    message = "could not be loaded from .*snapshots.*; delete that folder, and a rerun fetches it"
    with pytest.raises(InputError, match=message):
        Clip(B32)


def test_a_model_of_another_kind(hub):
    with pytest.raises(InputError, match="is a clip: it is no BART"):
        Captioner(B32)
    name = "preprocessor_config.json"
    hub.repositories["me/bart"] = bart_of_2020() | {name: hub.repositories[B32][name]}
    with pytest.raises(InputError, match="it is no CLIP"):
        Clip("me/bart")
