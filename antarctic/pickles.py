"""Readers of other projects' files: OpenAI's CLIP (.pt) and the original's Lightning checkpoints
(.ckpt). They run nothing of what the files hold. OpenAI's ResNets are computed by OpenAI's own
code, which the user has installed or cloned.

PyTorch's files are zips of raw numbers and of a pickle that says what the numbers are. A pickle can
call any function of any library while Python loads it. Here it can name only what KNOWN and
STORAGES list, and gets stand-ins for all of that.
"""

import io
import math
import os
import pickle
import zipfile
from contextlib import contextmanager
from typing import NamedTuple

import torch

from antarctic.errors import InputError

STORAGES = {
    f"torch.{name}Storage": dtype for name, dtype in {
        "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Double": torch.float64, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
        "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool
    }.items()
}

KNOWN = ("collections.OrderedDict", "argparse.Namespace", "pathlib.", "pytorch_lightning.",
         "__torch__.", "torch.jit._pickle.")

MOST_PICKLE = 1 << 21  # bytes; that of BART and CLIP with an optimizer's state has less than 1 MB

# bytes of one tensor's numbers; the largest of bart-large and of OpenAI's CLIPs have 206 MB
MOST_STORAGE = 1 << 28


class Entry(NamedTuple):
    """A tensor that is still in the file: a view of one of its storages, as torch.as_strided takes
    it."""

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple
    stride: tuple


class StandIn(dict):
    """An object of any class that a file names: it takes what it is given, and does nothing."""

    state = None  # what the pickle sets of it: a dict of attributes, as a rule

    def __init__(self, *args, **options):
        super().__init__()

    def __setstate__(self, state):
        self.state = state


class Reader(pickle._Unpickler):
    """Python's unpickler, of which the file can reach nothing but StandIn, the names of storages,
    and the two methods below.

    It is the one written in Python, since the other reserves as much memory for its memo as a file
    asks for. Tuples come as lists, which are no keys of a dict: to hash tuples inside one another,
    Python recurs until the process dies.
    """

    dispatch = pickle._Unpickler.dispatch | {
        pickle.EMPTY_TUPLE[0]: pickle._Unpickler.load_empty_list,
        pickle.TUPLE[0]: pickle._Unpickler.load_list
    } | {
        code[0]: lambda self, n=n: self.stack.append([self.stack.pop() for _ in range(n)][::-1])
        for n, code in enumerate((pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), 1)
    }

    def __init__(self, file, path):
        super().__init__(file)
        self.path = path

    def find_class(self, module, name):
        name = f"{module}.{name}"
        if name in STORAGES:
            return STORAGES[name]
        if name == "torch._utils._rebuild_tensor_v2":
            return self.tensor  # a bound method: a file can set no attribute of it
        if name == "torch._utils._rebuild_parameter":
            return self.parameter
        if any(name == known or known.endswith(".") and name.startswith(known) for known in KNOWN):
            return StandIn
        raise InputError(
            f"{self.path} asks for {name[:100]!r}, which no file of weights needs, so it was not "
            "loaded"
        )

    def persistent_load(self, pid):
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("a storage is described in an unknown way")
        return key, dtype

    def tensor(self, storage, offset, shape, stride, *_):
        numbers = (offset, *shape, *stride
                   )  # checked, since a text times a number would be a very long text
        key, dtype = storage
        if (len(numbers) > 20 or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)
                or not isinstance(key, str) or not isinstance(dtype, torch.dtype)):
            raise pickle.UnpicklingError("a tensor is described in an unknown way")
        return Entry(key, dtype, offset, tuple(shape), tuple(stride))

    def parameter(self, data, *_):
        return data


@contextmanager
def torch_file(path):
    """Opens a file of torch.save (since PyTorch 1.6) or of torch.jit.save. Yields (content, fetch).

    content: what was saved, with Entry for each tensor and StandIn for each object. fetch(entry):
    its numbers, a tensor in memory of its own; nothing else is read, so a file can be much larger
    than what is wanted of it. Raises InputError: the file names anything unknown, is damaged, or
    does not hold what the body of the with looks for.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            left = 2 * os.path.getsize(
                path)  # of bytes to read: a file can name its storages again and again

            def read(name, most):
                nonlocal left
                info = archive.getinfo(name)
                left -= info.file_size
                # PyTorch compresses nothing
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > most or left < 0:
                    raise zipfile.BadZipFile(f"{name} is compressed, or too large")
                return archive.read(info)

            def fetch(entry):
                numbers = torch.frombuffer(bytearray(read(f"{root}data/{entry.key}", MOST_STORAGE)),
                                           dtype=entry.dtype)
                if math.prod(entry.shape) > len(numbers):  # a view can repeat numbers without end
                    raise ValueError("a tensor is larger than its storage")
                return numbers.as_strided(entry.shape, entry.stride, entry.offset).clone()

            pickled, = (name for name in archive.namelist()
                        if name.endswith("/data.pkl") and name.count("/") == 1)
            root = pickled.removesuffix("data.pkl")
            yield Reader(io.BytesIO(read(pickled, MOST_PICKLE)), path).load(), fetch
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can fail in every way there is
        raise InputError(
            f"{path} cannot be read: it is damaged, cut short, or nothing that this project knows"
        ) from error


def named_entries(content):
    """{name: Entry} of a state dict, or of the modules of a JIT archive, whose names are joined by
    dots as in a state dict."""
    found, modules = {}, [("", content)]
    for prefix, module in modules:  # grows meanwhile
        attributes = module.state if isinstance(module, StandIn) and isinstance(module.state,
                                                                                dict) else {}
        for name, value in (*module.items(), *attributes.items()):
            if isinstance(value, Entry):
                found[prefix + name] = value
            elif isinstance(value, StandIn):
                modules.append((f"{prefix}{name}.", value))
            if len(found) + len(modules) > 10000 or len(prefix) + len(
                    name) > 1000:  # a module inside itself
                raise ValueError("too many tensors, or too deep")
    return found


def is_torch_zip(path):
    """Whether a file begins as a zip does, as those of torch.save do since PyTorch 1.6."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def lightning_settings(path):
    """The settings of a checkpoint that the original trained, as checkpoints.checkpoint_settings
    gives them; what the file does not say is the original's default. The language model ("lm") is
    None: it is not in the file. Raises InputError."""
    with torch_file(path) as (content, _):
        content["state_dict"]  # KeyError: no checkpoint
        told = content.get("hyper_parameters", {})
        told = told.state if isinstance(told, StandIn) and told.state else told
        settings = {name: told.get(name) for name in ("topk", "maxlen_enc", "maxlen_dec")}
        defaults = {"topk": 10, "maxlen_enc": 128, "maxlen_dec": 32}
        return {
            name: n if type(n) is int and n > 0 else defaults[name] for name, n in settings.items()
        } | {"lm": None}


def lightning_tensors(path, names):
    """{name: tensor} of some parameters of a Lightning checkpoint; the others are not read.

    names: the language model's own; the file's begin with the name that the model had in the
    training's module ("model."). Raises InputError: the file is none, or does not hold them all.
    """
    with torch_file(path) as (content, fetch):
        entries = named_entries(content["state_dict"])
        first = next(iter(names))
        for prefix in [name.removesuffix(first) for name in entries if name.endswith(first)]:
            if all(prefix + name in entries for name in names):
                return {name: fetch(entries[prefix + name]) for name in names}
    raise InputError(
        f"the checkpoint {path} does not fit the language model: it has no {first}, or not all "
        "like it"
    )
