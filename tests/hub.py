"""A Hugging Face hub on 127.0.0.1 for the tests. It answers huggingface_hub as huggingface.co does,
and can have faults.

Its repositories have the form of the real ones: their files, the config keys of their year, and the
names and types of weights of that time. The models in them are the snowglobe's.
"""

import hashlib
import io
import json
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import torch
from conftest import ROOT
from safetensors.torch import load_file, save

WEIGHTS = ROOT / "snowglobe" / "weights"
LARGE = (".bin", ".safetensors", ".msgpack", ".h5", ".model", ".ot")  # in LFS: ETag is a SHA-256


# --------------------------------------------------------------------------------- the repositories

def dump(data):
    return json.dumps(data, indent=2).encode()


def pickled(tensors):
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    return buffer.getvalue()


def other_frameworks():
    """Weights in formats that are not read here."""
    return {"flax_model.msgpack": b"flax" * 999, "tf_model.h5": b"tf" * 999,
            "rust_model.ot": b"ot" * 999}


def vocabulary(model, fast=True):
    """The tokenizer of a snowglobe model in the files of early repositories. fast: whether
    tokenizer.json is one of them."""
    tokenizer = json.loads((WEIGHTS / model / "tokenizer.json").read_text())
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    tokenizer["truncation"] = tokenizer["padding"] = None
    files = {"vocab.json": dump(tokenizer["model"]["vocab"]),
             "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode()}
    if fast:
        files["tokenizer.json"] = dump(tokenizer)
    return files


def clip_of_2021(fast=True, safetensors=True):
    """openai/clip-vit-base-patch32 and -patch16: float32 weights with position_ids, a feature
    extractor, and all keys of 2021."""
    config = json.loads((WEIGHTS / "clip/config.json").read_text())
    old = {"_name_or_path": "", "add_cross_attention": False, "output_past": True, "top_k": 50,
           "torchscript": False, "dropout": 0.0, "gradient_checkpointing": False,
           "torch_dtype": None}
    for tower in ("text", "vision"):
        config[f"{tower}_config"].pop("dtype")
        config[f"{tower}_config"] |= old
        config[f"{tower}_config_dict"] = None
    config |= {"torch_dtype": "float32", "transformers_version": None, "initializer_factor": 1.0}
    config.pop("dtype")
    tensors = {name: tensor.float()
               for name, tensor in load_file(WEIGHTS / "clip/model.safetensors").items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(37)[None]
    extractor = {
        "crop_size": 96, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 96,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711]}
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
               "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    added = {"add_prefix_space": False, "errors": "replace", "do_lower_case": True,
             "model_max_length": 77, "name_or_path": "openai/clip-vit-base-patch32",
             "special_tokens_map_file": "./special_tokens_map.json"}
    files = {
        "README.md": b"---\ntags: [vision]\n---\n# Model Card: CLIP",
        ".gitattributes": b"*.bin filter=lfs", "config.json": dump(config),
        "preprocessor_config.json": dump(extractor), "special_tokens_map.json": dump(special),
        "tokenizer_config.json": dump(special | added), "pytorch_model.bin": pickled(tensors)}
    if safetensors:
        files["model.safetensors"] = save(tensors, {"format": "pt"})
    return files | vocabulary("clip", fast) | other_frameworks()


def bart_of_2020():
    """facebook/bart-large: only a float16 pytorch_model.bin, names without "model.", no
    final_logits_bias."""
    config = json.loads((WEIGHTS / "bart/config.json").read_text())
    config.pop("dtype")
    config |= {
        "architectures": ["BartModel"], "add_bias_logits": False, "add_final_layer_norm": False,
        "classif_dropout": 0.1, "early_stopping": True, "gradient_checkpointing": False,
        "no_repeat_ngram_size": 3, "normalize_before": False, "normalize_embedding": True,
        "num_beams": 4, "num_hidden_layers": 3, "torch_dtype": "float32",
        "transformers_version": "4.7.0.dev0", "forced_bos_token_id": 0,
        "task_specific_params": {
            "summarization": {"length_penalty": 1.0, "max_length": 128, "min_length": 12}},
    }
    tensors = {name.removeprefix("model."): tensor.half()
               for name, tensor in load_file(WEIGHTS / "bart/model.safetensors").items()
               if name.startswith("model.")}
    for side in ("encoder", "decoder"):
        tensors[f"{side}.embed_tokens.weight"] = tensors["shared.weight"]
        tensors[f"{side}.version"] = torch.tensor([3.0])
    tokenizer = {"model_max_length": 160, "add_prefix_space": True}
    return {"README.md": b"# BART", ".gitattributes": b"", "config.json": dump(config),
            "pytorch_model.bin": pickled(tensors), "tokenizer_config.json": dump(tokenizer),
            **vocabulary("bart"), **other_frameworks()}


def gpt_neo_of_2021():
    """EleutherAI/gpt-neo-1.3B: attention masks among the weights; vocab.json, merges.txt and
    tokenizer.json."""
    config = json.loads((WEIGHTS / "gpt/config.json").read_text())
    config.pop("dtype")
    config |= {
        "gradient_checkpointing": False, "model_revision": None, "summary_activation": None,
        "tokenizer_class": "GPT2Tokenizer", "transformers_version": "4.5.0.dev0",
        "task_specific_params": {
            "text-generation": {"do_sample": True, "max_length": 50, "temperature": 0.9}},
    }
    tensors = {name: tensor.float()
               for name, tensor in load_file(WEIGHTS / "gpt/model.safetensors").items()}
    for layer in range(3):
        name = f"transformer.h.{layer}.attn.attention"
        tensors[f"{name}.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()
        tensors[f"{name}.masked_bias"] = torch.tensor(-1e9)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    tokenizer = special | {"add_prefix_space": False, "errors": "replace", "model_max_length": 128}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return {"README.md": b"# GPT-Neo", ".gitattributes": b"", "config.json": dump(config),
            "pytorch_model.bin": pickled(tensors),
            "model.safetensors": save(contiguous, {"format": "pt"}),
            "special_tokens_map.json": dump(special), "tokenizer_config.json": dump(tokenizer),
            **vocabulary("gpt"), **other_frameworks()}


def siglip2_of_2025(folder):
    """google/siglip2-base-patch16-224, from the folder of a small model: Gemma's tokenizer as
    tokenizer.json and as tokenizer.model."""
    names = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
             "tokenizer_config.json")
    return {"README.md": b"# SigLIP 2", ".gitattributes": b"", "tokenizer.model": b"spm" * 999,
            "special_tokens_map.json": dump({"pad_token": "<pad>", "eos_token": "<eos>"}),
            **{name: (folder / name).read_bytes() for name in names}}


def repositories():
    """{name: {file: bytes}} of the default models."""
    return {"openai/clip-vit-base-patch32": clip_of_2021(fast=False, safetensors=False),
            "openai/clip-vit-base-patch16": clip_of_2021(),
            "facebook/bart-large": bart_of_2020(), "EleutherAI/gpt-neo-1.3B": gpt_neo_of_2021()}


# --------------------------------------------------------------------------------------- the server

class Hub(ThreadingHTTPServer):
    """Serves repositories and records the requests.

    repositories: {name: {file: bytes}}. requests: (method, kind, repository, file or "") in order.
    kind is "api", "resolve", "blob" (the bytes), or "other", which the real hub would answer but no
    run should send. ranges: the first byte of each request with a range.

    Faults. gated: names whose files answer 403. delay: seconds before each answer. status: of every
    answer. hang: kinds that get no answer. cut: {file: bytes before the connection breaks, once}.
    paused: {file: bytes before the answer waits for `resume`}; `reached` is set then. page: a web
    page in place of every answer.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.heal()

    def heal(self):
        """Ends all faults and clears the requests."""
        self.requests, self.ranges = [], []
        self.gated, self.hang, self.cut, self.paused = set(), set(), {}, {}
        self.delay = self.status = self.page = None
        self.resume, self.reached = threading.Event(), threading.Event()

    def fetched(self, name):
        """How often the bytes of each file were requested, {file: times}."""
        return dict(Counter(file for _, kind, repository, file in self.requests
                            if kind == "blob" and repository == name))


@contextmanager
def serving(hub):
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.resume.set()
        hub.shutdown()
        thread.join()
        hub.server_close()


def commit(files):
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(f"{name} {git_oid(files[name])}".encode())
    return digest.hexdigest()


@lru_cache(None)
def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@lru_cache(None)
def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.note("other", "", self.path)
        self.refuse(404, None, "Not Found")

    def note(self, kind, repository, file):
        self.server.requests.append((self.command, kind, repository, file))
        if self.server.delay:
            time.sleep(self.server.delay)
        if kind in self.server.hang:
            self.server.resume.wait(300)

    def send(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message, **headers):
        if code:
            headers["X-Error-Code"] = code
        body = json.dumps({"error": message}).encode()
        self.send(status, {"Content-Type": "application/json", "X-Error-Message": message,
                           **headers}, body)

    def answer(self):
        try:
            self.route(unquote(urlsplit(self.path).path))
        except (BrokenPipeError, ConnectionResetError):  # the client was killed, or gave up
            self.close_connection = True

    def route(self, path):
        if path == "/api/agent-harnesses":  # huggingface_hub asks once a day, for its user agent
            return self.send(200, {"Content-Type": "application/json"},
                             b'{"standardEnvVars": [], "harnesses": {}}')
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path)
        resolve = re.fullmatch(
            r"/(?:api/resolve-cache/models/)?([^/]+/[^/]+?)/(?:resolve/)?([^/]+)/(.+)", path)
        blob = re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path)
        match = api or blob or resolve
        cached = path.startswith("/api/resolve-cache/")
        if api:
            kind = "api"
        elif blob or cached and self.command == "GET":
            kind = "blob"
        else:
            kind = "resolve" if resolve and (cached or "/resolve/" in path) else "other"
        name = match[1] if match else ""
        self.note(kind, name, path if api or not match else match[match.lastindex])
        return self.reply(kind, name, api, blob, resolve)

    def reply(self, kind, name, api, blob, resolve):
        """Answers a request for a repository. api, blob, resolve: matches of its path, or None."""
        files = self.server.repositories.get(name)
        if self.server.page:
            return self.send(200, {"Content-Type": "text/html"}, self.server.page)
        if self.server.status:
            return self.refuse(self.server.status, None, "the test asked for this")
        if files is None:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if api:
            return self.send_listing(name, files, api[2] or "")
        if blob:
            return self.send_bytes(blob[2], files[blob[2]])
        if resolve[2] not in ("main", commit(files)):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if kind != "other":
            return self.send_file(name, files, resolve[3])
        self.refuse(404, None, "Not Found")

    def send_listing(self, name, files, part):
        """/api/models/NAME[/revision/main], and /tree/COMMIT?recursive=True."""
        entries, siblings = [], []
        for file, data in sorted(files.items()):
            size, oid = len(data), git_oid(data)
            entry = {"type": "file", "oid": oid, "size": size, "path": file}
            sibling = {"rfilename": file, "size": size, "blobId": oid}
            if file.endswith(LARGE):
                entry["lfs"] = {"oid": sha256(data), "size": size, "pointerSize": 134}
                sibling["lfs"] = {"sha256": sha256(data), "size": size, "pointerSize": 134}
            entries.append(entry)
            siblings.append(sibling)
        info = {"_id": "0", "id": name, "modelId": name, "sha": commit(files), "private": False,
                "gated": "manual" if name in self.server.gated else False, "disabled": False,
                "downloads": 1, "likes": 1, "tags": [], "siblings": siblings}
        listing = entries if part.startswith("/tree") else info
        self.send(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def send_file(self, name, files, file):
        """/NAME/resolve/REVISION/FILE: the metadata of a file, and the address of its bytes."""
        headers = {"X-Repo-Commit": commit(files)}
        if name in self.server.gated:
            return self.refuse(403, "GatedRepo", "Access to this model is restricted", **headers)
        if file not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", **headers)
        data = files[file]
        if file.endswith(LARGE):  # their bytes are on another host
            headers |= {"X-Linked-ETag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data)),
                        "Location": f"http://localhost:{self.server.server_port}/cdn/{name}/{file}"}
            return self.send(302, headers)
        headers["ETag"] = f'"{git_oid(data)}"'
        if not self.path.startswith("/api/resolve-cache/"):  # the place of small files since 2025
            headers["Location"] = f"/api/resolve-cache/models/{name}/{commit(files)}/{file}"
            return self.send(307, headers)
        self.send_bytes(file, data, headers)

    def send_bytes(self, file, data, more=None):
        wanted = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        self.server.ranges += [start] * bool(wanted)
        headers = {"Content-Length": str(len(data) - start), "Accept-Ranges": "bytes",
                   **(more or {}), "Content-Disposition": f'inline; filename="{file}";'}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(206 if wanted else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = self.server.cut.pop(file, self.server.paused.get(file))
        self.wfile.write(data[start:end])
        if file in self.server.paused:
            self.wfile.flush()
            self.server.reached.set()
            self.server.resume.wait(300)
        self.close_connection = end is not None

    def log_message(self, *_):
        pass
