"""Readers of other projects' files: OpenAI's CLIP (.pt) and the original's Lightning checkpoints
(.ckpt). They run no code from these files. OpenAI's ResNets run in OpenAI's own code, which the
user has installed or cloned.

A file of PyTorch's is a zip with raw numbers and a pickle that describes them. A pickle can call
any function of any library while Python loads it. Here it can name only what KNOWN and STORAGES
list, and gets stand-ins for these objects.
"""

import io
import math
import os
import pickle
import zipfile
from contextlib import contextmanager
from typing import NamedTuple

import torch

from antarctic.bounded import cannot_be_read
from antarctic.errors import InputError
from antarctic.reads import passes

STORAGES = {
    "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8, "torch.BoolStorage": torch.bool,
}

KNOWN = ("collections.OrderedDict", "argparse.Namespace", "pathlib.", "pytorch_lightning.",
         "__torch__.", "torch.jit._pickle.")

# Limits in bytes. The pickle of BART and CLIP with an optimizer's state has less than 1 MB. The
# largest tensors of bart-large and of OpenAI's CLIPs have 206 MB.
MOST_PICKLE = 1 << 21
MOST_STORAGE = 1 << 28


class Entry(NamedTuple):
    """A tensor that is not read yet: a view of a storage of the file, as for torch.as_strided."""

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple
    stride: tuple


class StandIn(dict):
    """Replaces an object of any class that a file names: it accepts all arguments and does
    nothing."""

    state = None  # the state that the pickle sets: usually a dict of attributes

    def __init__(self, *args, **options):
        super().__init__()

    def __setstate__(self, state):
        self.state = state


class Reader(pickle._Unpickler):
    """An unpickler that gives the file access only to StandIn, the names of storages, and the
    methods tensor and parameter.

    The base class is written in Python: the one in C allocates as much memory for its memo as a
    file asks for. Tuples become lists, which cannot be keys of a dict: to hash nested tuples,
    Python recurses until the process dies.
    """

    dispatch = dict(pickle._Unpickler.dispatch)  # {opcode: method}

    def __init__(self, file, path):
        super().__init__(file)
        self.path = path

    def pop_list(self, n):
        """Replaces the n values on top of the stack by a list of them."""
        values = [self.stack.pop() for _ in range(n)]
        self.stack.append(values[::-1])

    def load_list_of_1(self):
        self.pop_list(1)

    def load_list_of_2(self):
        self.pop_list(2)

    def load_list_of_3(self):
        self.pop_list(3)

    dispatch[pickle.EMPTY_TUPLE[0]] = pickle._Unpickler.load_empty_list
    dispatch[pickle.TUPLE[0]] = pickle._Unpickler.load_list
    dispatch[pickle.TUPLE1[0]] = load_list_of_1
    dispatch[pickle.TUPLE2[0]] = load_list_of_2
    dispatch[pickle.TUPLE3[0]] = load_list_of_3

    def find_class(self, module, name):
        name = f"{module}.{name}"
        if name in STORAGES:
            return STORAGES[name]
        if name == "torch._utils._rebuild_tensor_v2":
            return self.tensor  # a bound method, so the file cannot set its attributes
        if name == "torch._utils._rebuild_parameter":
            return self.parameter
        if any(name == known or known.endswith(".") and name.startswith(known) for known in KNOWN):
            return StandIn
        raise InputError(f"{self.path} was not loaded: it asks for {name[:100]!r}, which no file "
                         f"of weights needs")

    def persistent_load(self, pid):
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("a storage is described in an unknown way")
        return key, dtype

    def tensor(self, storage, offset, shape, stride, *_):
        # They must be integers: a text times a number would be a very long text.
        numbers = (offset, *shape, *stride)
        key, dtype = storage
        if (len(numbers) > 20 or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)
                or not isinstance(key, str) or not isinstance(dtype, torch.dtype)):
            raise pickle.UnpicklingError("a tensor is described in an unknown way")
        return Entry(key, dtype, offset, tuple(shape), tuple(stride))

    def parameter(self, data, *_):
        return data


@contextmanager
def torch_file(path, title=None):
    """Opens a file of torch.save (since PyTorch 1.6) or of torch.jit.save. Yields (content, fetch).

    content: the saved object, with an Entry in place of each tensor and a StandIn in place of each
    object. fetch(entry): reads a tensor into memory of its own. All other tensors stay unread,
    however large the file is. Raises InputError where the file names anything unknown or is
    damaged, or where the body of the with statement fails. title: what messages call the file
    (default: its path).
    """
    title = title or path
    try:
        with zipfile.ZipFile(path) as archive:
            # The number of bytes to read is limited: a file can name a storage many times.
            left = 2 * os.path.getsize(path)

            def read(name, most):
                nonlocal left
                info = archive.getinfo(name)
                left -= info.file_size
                # PyTorch does not compress its files.
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > most or left < 0:
                    raise zipfile.BadZipFile(f"{name} is compressed, or too large")
                return archive.read(info)

            def fetch(entry):
                storage = bytearray(read(f"{root}data/{entry.key}", MOST_STORAGE))
                numbers = torch.frombuffer(storage, dtype=entry.dtype)
                if math.prod(entry.shape) > len(numbers):  # a view can repeat numbers endlessly
                    raise ValueError("a tensor is larger than its storage")
                return numbers.as_strided(entry.shape, entry.stride, entry.offset).clone()

            pickled, = (name for name in archive.namelist()
                        if name.endswith("/data.pkl") and name.count("/") == 1)
            root = pickled.removesuffix("data.pkl")
            yield Reader(io.BytesIO(read(pickled, MOST_PICKLE)), title).load(), fetch
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise damaged(title, error) from error


def damaged(title, error):
    """The InputError for what reading a file raised, unless that may pass. title: what messages
    call the file."""
    if passes(error):
        return InputError(cannot_be_read(title, error))
    return InputError(f"{title} cannot be read: it is damaged, cut short, or of an unknown kind")


def named_entries(content):
    """{name: Entry} of a state dict or of the modules of a JIT archive. Dots join the names of
    modules, as in a state dict."""
    entries, modules = {}, [("", content)]
    for prefix, module in modules:  # the loop appends to the list
        state = module.state if isinstance(module, StandIn) else None
        attributes = state if isinstance(state, dict) else {}
        for name, value in (*module.items(), *attributes.items()):
            if isinstance(value, Entry):
                entries[prefix + name] = value
            elif isinstance(value, StandIn):
                modules.append((f"{prefix}{name}.", value))
            # A module can be inside itself.
            if len(entries) + len(modules) > 10000 or len(prefix) + len(name) > 1000:
                raise ValueError("too many tensors, or too deep")
    return entries


def require_small_pickle(path, most=1 << 24):
    """Raises ValueError where a file of torch.save has compressed parts, or a pickle of more than
    `most` bytes, which would fill the memory with small objects."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if (info.compress_type != zipfile.ZIP_STORED
                    or info.filename.endswith(".pkl") and info.file_size > most):
                raise ValueError(f"{info.filename} is compressed, or too large")


def weight_entries(path, title):
    """{name: Entry} of a state dict that torch.save wrote, in its zip format or in the one before
    PyTorch 1.6. title: what messages call the file. Raises InputError where the file names anything
    unknown, or is damaged."""
    try:
        with open(path, "rb") as file:
            zipped = is_torch_zip(file.read(4))
        if zipped:
            with torch_file(path, title) as (content, _):
                require_small_pickle(path)
                return named_entries(StandIn() | content)
        with open(path, "rb") as file:
            reader = Reader(io.BytesIO(file.read(MOST_PICKLE // 2)), title)
            _magic, _version, _system, content = (reader.load() for _ in range(4))
            return named_entries(StandIn() | content)
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise damaged(title, error) from error


def is_torch_zip(head):
    """Whether a file begins as a zip file, the format of torch.save since PyTorch 1.6. head: its
    first bytes."""
    return head.startswith(b"PK\3\4")


def lightning_settings(path, title):
    """The settings of the original's checkpoint, in the form of checkpoints.checkpoint_settings.

    Missing settings get the original's defaults. The language model ("lm") is None: the file does
    not name it. title: what messages call the file. Raises InputError.
    """
    settings = {"topk": 10, "maxlen_enc": 128, "maxlen_dec": 32, "lm": None}
    with torch_file(path, title) as (content, _):
        content["state_dict"]  # KeyError where the file is not a checkpoint
        saved = content.get("hyper_parameters", {})
        if isinstance(saved, StandIn) and saved.state:
            saved = saved.state
        for name in ("topk", "maxlen_enc", "maxlen_dec"):
            value = saved.get(name)
            if type(value) is int and value > 0:
                settings[name] = value
    return settings


def lightning_tensors(path, names, title):
    """{name: tensor} of some parameters of a Lightning checkpoint; the others are not read.

    names: the language model's own. In the file a prefix is before them, the model's name in the
    module that was trained ("model."). title: what messages call the file. Raises InputError where
    the file is not a checkpoint or lacks a parameter.
    """
    with torch_file(path, title) as (content, fetch):
        entries = named_entries(content["state_dict"])
        first = next(iter(names))
        for prefix in [name.removesuffix(first) for name in entries if name.endswith(first)]:
            if all(prefix + name in entries for name in names):
                return {name: fetch(entries[prefix + name]) for name in names}
    raise InputError(f"the checkpoint {title} does not fit the language model: it lacks {first}, "
                     f"or others of its parameters")
