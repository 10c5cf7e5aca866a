"""Checkpoints: the trained tensors alone, as safetensors, and the state that a stopped training run
resumes from."""

import hashlib
import io
import json
from functools import partial

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from antarctic.bounded import MOST_SETTINGS, MissingError, cannot_be_read
from antarctic.distributed import on_rank0, warn
from antarctic.errors import InputError
from antarctic.files import atomic
from antarctic.held import held
from antarctic.pickles import (
    is_torch_zip,
    lightning_settings,
    lightning_tensors,
    require_small_pickle,
)
from antarctic.reads import system_error
from antarctic.selection import METHODS

# ------------------------------------------------------------------------------------ checkpoints

def is_layernorm(name):
    """Whether a parameter is one of the trained layernorms.

    These are the layernorms of BART's encoder, and those of the decoder that follow its attention
    to the encoder (`encoder_attn_layer_norm`): 73,728 numbers of bart-large.
    """
    return "layer_norm" in name and "encoder" in name


def save_checkpoint(path, trained, settings):
    """Writes the trained tensors alone. trained: {name: parameter}. settings: a dict of JSON
    values, stored as metadata. Raises InputError where a value is not finite."""
    require_finite(trained, path)
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trained.items()}
    with atomic(path, "wb") as file:
        file.write(save(tensors, {"antarctic_captions": json.dumps(settings)}))


def require_finite(tensors, path):
    """Raises InputError where a tensor that is about to be written to path is not finite, and names
    it. tensors: {name: tensor}."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{name} holds values that are not finite, so {path} was not written; "
                             f"the checkpoints beside it are of the last good epoch (try a lower "
                             f"--lrate)")


def checkpoint_settings(path):
    """The settings that a checkpoint was trained with, ours or the original's. Raises InputError
    where the file is neither."""
    with held(path, "checkpoint") as file:
        return read_settings(file)


def warn_of_settings(settings, clip_model, topk, table, entries):
    """Warns where tables are not those that a checkpoint was trained on.

    settings: of checkpoint_settings(). clip_model: the CLIP's identity. topk, table: as of Model.
    entries: how many there are in all.
    """
    trained_with = settings.get("clip_model") or clip_model  # the original's does not say
    if trained_with != clip_model:
        warn(f"the checkpoint was trained with the CLIP model {trained_with}, not with "
             f"{clip_model}")
    trained_on = settings.get("table", "topk")
    if table != trained_on:
        warn(f"tables are by --table {table}, but the checkpoint was trained on tables by "
             f"{trained_on}")
    if topk != settings["topk"]:
        warn(f"tables have --topk {topk} entries, but the checkpoint was trained on "
             f"{settings['topk']}")
    if entries < topk:
        warn(f"tables have {entries} entries, not --topk {topk}: there are no more")


def read_settings(file):
    """checkpoint_settings of a HeldFile."""
    try:
        if is_torch_zip(file.read(4)):
            return lightning_settings(file.opened_path, file.path)
        length = int.from_bytes(file.read(8), "little")
        if length > MOST_SETTINGS:
            raise ValueError("its header is too long")
        header = json.loads(file.read(length, 8))
        settings = json.loads(header["__metadata__"]["antarctic_captions"])
        sizes = [settings[name] for name in ("topk", "maxlen_enc", "maxlen_dec")]
        if not all(type(size) is int and 0 < size < 1 << 16 for size in sizes):
            raise ValueError("the settings are no sizes of tables and texts")
        if settings.get("table", "topk") not in METHODS:  # earlier versions knew topk alone
            raise ValueError("the tables are of an unknown kind")
        return settings | {"lm": settings["lm"] + ""}
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{file.path} is not a checkpoint that trainer.py wrote") from error


def trained_sha256(captioner):
    """A digest of the tensors that load_checkpoint has copied into the captioner.

    Files with equal tensors have the same digest, ours and the original's. It is computed of the
    captioner's parameters: of what is used, whatever has become of the file.
    """
    parameters, digest = dict(captioner.model.named_parameters()), hashlib.sha256()
    for name in captioner.checkpointed:
        digest.update(f"{name} {list(parameters[name].shape)}\n".encode())
        digest.update(parameters[name].detach().cpu().numpy())
    return digest.hexdigest()


def load_checkpoint(path, captioner, expected=None):
    """Copies a checkpoint's tensors into the captioner, whose `checkpointed` are their names.
    Returns its settings. expected: those that were read before. Raises InputError where it is of
    another language model, holds values that are not finite, or was changed since or meanwhile."""
    with held(path, "checkpoint") as file:
        settings, tensors = read_checkpoint(file, captioner)
    if expected not in (None, settings):
        raise InputError(f"the checkpoint {path} was changed while it was read; rerun the same "
                         f"command")
    # After the file was found unchanged, so that all of it is used or nothing.
    with torch.no_grad():
        parameters = dict(captioner.model.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    captioner.checkpointed = sorted(tensors)
    return settings


def read_checkpoint(file, captioner):
    """The settings and tensors of a HeldFile, a checkpoint that fits the captioner. Raises
    InputError."""
    path, settings = file.path, read_settings(file)
    if settings["lm"] not in (captioner.identity, None):
        raise InputError(f"the checkpoint {path} belongs to the language model {settings['lm']}, "
                         f"not to {captioner.identity}")
    parameters = dict(captioner.model.named_parameters())
    expected = list(filter(is_layernorm, parameters))
    if settings["lm"] is None:  # the original's, which holds all weights
        tensors = lightning_tensors(file.opened_path, expected, path)
    else:
        most = sum(parameter.nbytes for parameter in parameters.values())
        try:
            tensors = load(file.read(most=most + MOST_SETTINGS))
        except (SafetensorError, ValueError) as error:
            raise InputError(f"the checkpoint {path} is damaged ({error})") from error
    for name in sorted(tensors.keys() | expected):
        fits = (name in tensors and name in parameters
                and parameters[name].shape == tensors[name].shape)
        if not fits:
            raise InputError(f"the checkpoint {path} does not fit the language model "
                             f"{captioner.identity} (at {name})")
        if not tensors[name].float().isfinite().all():
            raise InputError(f"the checkpoint {path} holds values that are not finite (in {name})")
    return settings, tensors


# ------------------------------------------------------------------------- the state to resume from

def digest_of(tables, captions):
    """The SHA-256 of what is trained or validated on, as it is in memory, which names the state.

    tables: arrays of token ids, one an image. captions: of each image, texts without line breaks.
    """
    digest = hashlib.sha256()
    for table, texts in zip(tables, captions):
        digest.update(f"{len(table)} {len(texts)}\n".encode())
        digest.update(table.tobytes())
        digest.update("".join(f"{text}\n" for text in texts).encode())
    return digest.hexdigest()


def save_state(path, trained, optimizer, progress):
    """Saves what a stopped run needs to resume. trained: {name: parameter}. progress: plain
    numbers, lists and tuples. Nothing is written where a parameter is not finite: no run could
    recover from it, and the next loss or checkpoint reports it. Raises InputError where the
    optimizer's averages are not finite, which no loss would report."""
    if not all(parameter.isfinite().all() for parameter in trained.values()):
        return
    for name, parameter in trained.items():
        averages = optimizer.state.get(parameter, {})
        require_finite({f"the optimizer's {key} of {name}": value
                        for key, value in averages.items() if torch.is_tensor(value)}, path)
    state = {"trained": trained, "optimizer": optimizer.state_dict(), "progress": progress}
    buffer = io.BytesIO()  # torch.save to a file hides the error of a full disk
    torch.save(state, buffer)
    with atomic(path, "wb") as file:
        file.write(buffer.getbuffer())


def load_state(path, trained, optimizer):
    """Copies a saved state into the trained parameters and the optimizer. Returns the progress, or
    None where no state was saved. Raises InputError where it cannot be read."""
    state = on_rank0(partial(read_state, path))
    if state is None:
        return None
    try:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state["trained"][name])
        optimizer.load_state_dict(state["optimizer"])
        return state["progress"]
    except Exception as error:  # the pickle can hold anything
        raise InputError(no_state(path)) from error


def read_state(path):
    """What save_state wrote to path, a dict; None where there is no file. Raises InputError where
    it is damaged, or cannot be read."""
    try:
        with held(path, "state") as file:
            require_small_pickle(file.opened_path)
            return torch.load(file.opened_path, map_location="cpu", weights_only=True)
    except MissingError:
        return None
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        if passing := system_error(error):
            raise InputError(cannot_be_read(f"the state {path}", passing)) from error
        raise InputError(no_state(path)) from error


def no_state(path):
    return (f"the state {path} of a stopped run cannot be read; delete it to start from the "
            "beginning")
