"""A pretrained model's files: opened once, checked, held and loaded, with no code of theirs.

transformers reads a private folder. In it are links to the files, which are open, and copies of
those settings that name code or other files, without these names. Whatever else the model's folder
has (modules, adapters, other formats, settings of generation) is not there. So transformers asks
nothing, runs nothing, and fetches nothing that a file names.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from antarctic.bounded import cannot_be_read
from antarctic.errors import InputError
from antarctic.files import reading, writing
from antarctic.held import HeldFile, sha256
from antarctic.leftovers import scratch_folder
from antarctic.model_checks import (
    check_config,
    check_index,
    check_processor,
    check_size,
    check_tokenizer,
    clean,
    is_kind,
    most_bytes,
    parse,
    read_tensors,
)
from antarctic.pretrained import PROCESSOR, fetch, first_sentence, needed
from antarctic.reads import persistent, system_error

WEIGHTS = (".safetensors", ".bin", ".gguf")


def quiet_transformers():
    """Hides transformers' bars of loading and its warnings. fetch() shows the bars of downloads."""
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()


class ModelFiles:
    """The files of a model that are read, held open. Attributes: name; kind, what messages call it;
    folder, the private one; tensors, a model_checks.Tensors of its weights, or None; digests,
    {small file: its SHA-256}, which name what else than the weights decides results."""

    def __init__(self, name, kind, parts, folder, stack):
        self.name, self.kind, self.folder = str(name), kind, Path(folder)
        source = fetch(name, kind, parts)
        self.is_folder = source == self.name
        self.advice = "" if self.is_folder else (
            f" from {source}; delete that folder, and a rerun fetches it anew")
        self.held, self.digests = {}, {}  # {file name: HeldFile}; {file name: SHA-256}
        with reading(source):
            present = os.listdir(source)
        for file in needed(present, parts, f"{kind} {name}"):
            self.held[file] = HeldFile(Path(source) / file, f"file of the {kind}")
            stack.callback(self.held[file].close)
        weights = {file: held for file, held in self.held.items() if file.endswith(WEIGHTS)}
        with self.telling():
            self.tensors = read_tensors(weights) if weights else None
            for file, held in self.held.items():
                changed = None if file in weights else self.check(file, held)
                if changed is None:
                    link(held.opened_path, self.folder / file)
                    continue
                with writing(self.folder / file):
                    (self.folder / file).write_text(json.dumps(changed))

    def check(self, file, held):
        """Checks a small file. Returns what transformers may see in its place, or None where that
        is the file itself."""
        data = held.read(most=most_bytes(file))
        self.digests[file] = hashlib.sha256(data).hexdigest()
        if not file.endswith(".json"):
            return None
        content = parse(data, file)
        if file.endswith(".index.json"):
            check_index(content, self.held)
        elif file == "config.json":
            check_config(content, self.tensors)
        elif file in ("tokenizer.json", "vocab.json", "added_tokens.json"):
            check_tokenizer(file, content)
            return None  # its keys may be words
        elif file == "tokenizer_config.json":
            check_tokenizer(file, content)
        elif file in PROCESSOR:
            check_processor(content)
        cleaned = clean(content)
        return None if json.dumps(cleaned) == json.dumps(content) else cleaned

    def require_unchanged(self):
        """Raises InputError where a file was changed since it was opened."""
        for held in self.held.values():
            held.check(in_place=True)

    def telling(self):
        return telling(self.kind, self.name, self.advice, self.held.values())

    def load(self, loader, **options):
        """loader.from_pretrained of these files, again where the system could not read them for a
        moment. Raises InputError."""
        quiet_transformers()
        with self.telling():
            return persistent(lambda: loader.from_pretrained(
                str(self.folder), local_files_only=True, trust_remote_code=False, **options))

    def load_model(self, loader, wanted, config=None, **options):
        """The model, with all of its weights, which are finite and in memory of their own.

        loader: one of transformers' AutoModel classes. wanted: one of model_checks.KINDS. config:
        as load(AutoConfig) returned it. Raises InputError.
        """
        from transformers import AutoConfig
        config = config or self.load(AutoConfig)
        if not is_kind(loader, config, wanted):
            raise InputError(f"the {self.kind} {self.name} is a {config.model_type}: it is no "
                             f"{wanted}")
        with self.telling():
            check_size(loader, config, self.tensors)
        model, report = self.load(loader, config=config, output_loading_info=True, **options)
        if missing := sorted(report["missing_keys"]):  # they would be random numbers
            raise InputError(f"the {self.kind} {self.name} lacks {len(missing)} of its weights, "
                             f"such as {missing[0]}")
        own_weights(model, f"{self.kind} {self.name}")
        return model

    def load_tokenizer(self, known=None):
        """The tokenizer. known: the tokens that the model knows, or None. Its attribute digests are
        those of these files. Raises InputError, also where its files are missing: transformers
        would make one without a vocabulary."""
        from transformers import AutoTokenizer
        tokenizer = self.load(AutoTokenizer)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise InputError(f"the {self.kind} {self.name} has no tokenizer")
        highest = max(tokenizer.get_vocab().values())
        if known is not None and highest >= known:
            raise InputError(f"the {self.kind} {self.name} has embeddings of {known:,} tokens, but "
                             f"its tokenizer has the token {highest:,}")
        tokenizer.digests = self.digests
        return tokenizer

    def identity(self):
        """The text that names the model in the files made with it: its name on the hub, or that of
        its folder with a digest of the weights."""
        if not self.is_folder:
            return self.name
        weights = (self.held[file] for file in sorted(self.held) if file.endswith(WEIGHTS))
        return file_identity(*weights, name=self.name)


@contextmanager
def telling(kind, name, advice="", files=()):
    """Tells each error of the body, which loads or tries a model, in one sentence. files: the
    HeldFiles that it reads."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:  # SigLIP's tokenizer needs sentencepiece and protobuf
        raise InputError(f"the {kind} {name} needs another library: "
                         f"{first_sentence(error)}") from error
    except Exception as error:  # such files can make the libraries raise anything
        paths = {file.opened_path: str(file.path) for file in files}
        text = re.sub(r"/proc/self/fd/\d+", lambda found: paths.get(found[0], found[0]),
                      first_sentence(error))
        if passing := system_error(error):
            for file in files:
                file.check_readable()  # where one of them is not, its name is known
            raise InputError(cannot_be_read(f"a file of the {kind} {name}", passing)) from error
        raise InputError(f"the {kind} {name} could not be loaded{advice} ({text})") from error


def link(target, path):
    try:
        path.symlink_to(target)
    except OSError:  # Windows lets only some users make links
        shutil.copyfile(target, path)


@contextmanager
def opened_model(name, kind, parts):
    """Holds the files of a model while the body loads it. Yields ModelFiles.

    name: a folder or a name on the hub. kind, parts: see pretrained.fetch. Raises InputError where
    a file is missing, too large, of a harmful form, or was changed meanwhile.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder("antarctic-model"))
        except OSError as error:
            raise InputError(f"there is no room for temporary files ({error.strerror}); set TMPDIR "
                             f"to a folder that can be written") from error
        files = ModelFiles(name, kind, parts, folder, stack)
        try:
            yield files
        except InputError:
            files.require_unchanged()  # which would explain it better
            raise
        files.require_unchanged()


def load_tokenizer(name, kind):
    """The tokenizer of a model alone. Arguments as of opened_model. Raises InputError."""
    with opened_model(name, kind, ("tokenizer",)) as files:
        return files.load_tokenizer()


def file_identity(*files, name=None):
    """The text that names a model by its folder or file, with a digest of its weights. files: each
    a HeldFile. name: the folder (default: the file)."""
    return f"{Path(name or files[0].path).resolve().name}@{sha256(*files)[:12]}"


@torch.no_grad()
def own_weights(model, title):
    """Copies all weights into memory of their own: a file that is changed later would change those
    that are read from it. Raises InputError where a weight is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.numel() and not torch.stack(parameter.aminmax()).isfinite().all():
            raise InputError(f"the {title} holds values that are not finite (in {name})")
        parameter.data = parameter.data.clone()
    for buffer in model.buffers():
        buffer.data = buffer.data.clone()
