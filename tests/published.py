"""Files in the form of the original's published files, and a server for them on 127.0.0.1."""

import collections
import re
import sys
import threading
import types
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import unquote

NAMES = {"cache.txt": "postcache.txt", "cache.npy": "postcache.npy",
         "checkpoint.ckpt": "-epoch=05-vloss=2.163.ckpt"}  # {name here: name there}


def lightning_file(path, captioner, **more):
    """Writes a checkpoint as Lightning 1.4 saved it in the original's training on a GPU: the whole
    module and the state of the training.

    captioner: a model.Captioner with the weights. more: further keys, such as hyper_parameters.
    """
    import torch

    from antarctic.checkpoints import is_layernorm
    callbacks = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callbacks.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": callbacks.__name__})
    parsing = types.ModuleType("pytorch_lightning.utilities.parsing")
    parsing.AttributeDict = type("AttributeDict", (dict,), {"__module__": parsing.__name__})
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.utilities")
    modules = {name: types.ModuleType(name) for name in names}
    modules |= {module.__name__: module for module in (callbacks, parsing)}
    clip = {"perceiver.visual.conv1.weight": torch.ones(4, 3, 2, 2).half()}
    weights = collections.OrderedDict(clip)
    for name, tensor in captioner.model.state_dict().items():
        weights[f"model.{name}"] = tensor
    weights._metadata = collections.OrderedDict({"": {"version": 1}})
    optimizer = torch.optim.AdamW(captioner.train_only(is_layernorm).values(), lr=0)
    table, caption = captioner.tokenize(["a dog | grass | ", "a dog"], 16)
    captioner.loss([table], [caption]).backward()
    optimizer.step()
    on_gpu = mock.patch("torch.serialization.location_tag", lambda _: "cuda:0")
    with mock.patch.dict(sys.modules, modules), on_gpu:
        torch.save({"epoch": 5, "global_step": 100, "pytorch-lightning_version": "1.4.0",
                    "state_dict": weights, "optimizer_states": [optimizer.state_dict()],
                    "callbacks": {callbacks.ModelCheckpoint: {"best_model_score": torch.tensor(2.0),
                                                              "dirpath": Path("a")}},
                    "lr_schedulers": [{"T_max": 1e5, "base_lrs": [3e-4]}],
                    "hparams_name": "args", "hparams_type": parsing.AttributeDict, **more}, path)


class Handler(BaseHTTPRequestHandler):
    """Serves files with ranges, as COCO's server does.

    server.cuts: paths whose answer breaks in the middle, once. server.stalls: paths whose answer
    stops there, once. server.answers: {path: status in place of the file}.
    """

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        wanted, path, server = self.headers.get("Range"), unquote(self.path), self.server
        (server.requests if with_body else server.heads).append((path, wanted))
        server.agents.add(self.headers.get("User-Agent"))
        data, status = server.files.get(path), server.answers.get(path)
        if data is None or status:
            return self.send_error(status or 404)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "9")
            self.end_headers()
            return self.wfile.write(b"<no more>")  # must not end up in the file
        body = data[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", server.kinds.get(path, "application/octet-stream"))
        self.end_headers()
        if not with_body:
            return
        halves = body[:len(body) // 2], body[len(body) // 2:]
        self.wfile.write(halves[0])
        if path in server.stalls:
            server.stalls.remove(path)
            server.stalled.set()
            return server.closing.wait(30)
        if path in server.cuts:
            return server.cuts.remove(path)
        self.wfile.write(halves[1])

    def log_message(self, *_):
        pass


@contextmanager
def serving(files):
    """A server on 127.0.0.1 that records requests (GET), heads and agents. files: {path: bytes}."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.kinds, server.answers = dict(files), {}, {}
    server.requests, server.heads, server.agents = [], [], set()
    server.cuts, server.stalls, server.ranges = set(), set(), True
    server.stalled, server.closing = threading.Event(), threading.Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
