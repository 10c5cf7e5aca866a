"""Where pretrained models come from: a folder, or the Hugging Face hub by name, where each file is
fetched once.

A model that is there whole is taken without a request: huggingface_hub keeps the list of a
repository's files beside them, which tells whether all that is needed has arrived.
"""

import difflib
import errno
import hashlib
import os
import re
import shutil
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError

from httpx2 import HTTPError, TransportError
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    get_session,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, validate_repo_id
from safetensors import SafetensorError

from antarctic.distributed import rank_and_world
from antarctic.errors import InputError

CLIP_NAMES = {  # OpenAI's names of its weights: the same on the hub
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
KNOWN = (*CLIP_NAMES, *CLIP_NAMES.values(), "google/siglip-base-patch16-224",
         "google/siglip2-base-patch16-224", "facebook/bart-base", "facebook/bart-large",
         "EleutherAI/gpt-neo-125m", "EleutherAI/gpt-neo-1.3B", "EleutherAI/gpt-neo-2.7B",
         "EleutherAI/gpt-j-6b", "HuggingFaceTB/SmolLM2-135M-Instruct")
WEIGHTS = (
    r"model\.safetensors", r"model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)",
    r"pytorch_model\.bin", r"pytorch_model(-\d+-of-\d+\.bin|\.bin\.index\.json)")  # best first
SHARD = r"(?:pytorch_)?model-\d+-of-(\d+)\.(?:safetensors|bin)"
TOKENIZER = {
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "spiece.model"
}  # SigLIP reads spiece.model beside tokenizer.json, the others need one of:
VOCABULARY = {"vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"}
VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"}, {
    "tokenizer.model"
}, {"vocab.txt"})
PROCESSOR = {"preprocessor_config.json", "processor_config.json"}
PATIENCE = 30  # seconds without an answer
unlisted = {
}  # {(cache, name): folder} that another program filled: the hub need not be asked for each part


def needed(names, parts, model):
    """Those of a repository's files that are read, each kind of weights once. Raises InputError
    where there are none.

    names: of its files. parts: of "config", "weights", "tokenizer" and "processor". model: how
    messages call it.
    """
    names, wanted = set(names), {"config.json"}
    if "weights" in parts:
        forms = ({file for file in names if re.fullmatch(form, file)} for form in WEIGHTS)
        weights = next(filter(None, forms), None)
        if weights is None:
            raise InputError(
                f"the {model} has no weights as model.safetensors or pytorch_model.bin")
        wanted |= weights
    if "tokenizer" in parts:
        wanted |= TOKENIZER | ({"tokenizer.json"} if "tokenizer.json" in names else VOCABULARY)
    if "processor" in parts:
        wanted |= PROCESSOR
    return sorted(wanted & names)


def fetch(name, what, parts):
    """The folder with a model's files: name itself where it is one, else the hub's, downloaded
    where it is not whole.

    what: how messages call the model. parts: see needed. Raises InputError, with a sentence of its
    own for each cause.
    """
    if os.path.exists(name):
        if not os.path.isdir(name):
            raise InputError(
                f"the {what} {name} is a file; give a folder or a name on the Hugging Face hub")
        return str(name)
    try:
        validate_repo_id(str(name))
        tree = [file.path for file in get_cached_repo_tree(name)]
        return snapshot_download(name, allow_patterns=needed(tree, parts, f"{what} {name}"),
                                 local_files_only=True)
    except HFValidationError as error:
        raise InputError(
            f"there is no folder {name} for the {what}, and a name on the Hugging Face hub is "
            "written "
            f"as owner/model{near(name)}") from error
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        pass  # never fetched, not whole, or by a program that kept no list
    key = constants.HF_HUB_CACHE, name
    if key in unlisted and whole(unlisted[key], parts):
        return unlisted[key]
    try:
        return download(name, what, parts)
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        with suppress(OSError):
            folder = snapshot_download(name, local_files_only=True)
            if whole(folder, parts):
                unlisted[key] = folder
                return folder
        raise InputError(f"the {what} {name} {reason(error, name)}") from error


def whole(folder, parts):
    """Whether a folder without a list, as other programs fill it, holds what each of the parts
    needs."""
    files = set(os.listdir(folder))
    shards = Counter(match[1] for match in map(re.compile(SHARD).fullmatch, files) if match)
    there = {
        "config": "config.json" in files,
        "weights": bool(files & {"model.safetensors", "pytorch_model.bin"})
        or any(count == int(total) for total, count in shards.items()),
        "tokenizer": any(vocabulary <= files for vocabulary in VOCABULARIES),
        "processor": bool(files & PROCESSOR),
    }
    return there["config"] and all(there[part] for part in parts)


def download(name, what, parts):
    """Fetches what is missing of a model from the hub, and says before what and how much. Returns
    its folder."""
    limit_waits()
    info = HfApi().model_info(name, files_metadata=True, timeout=PATIENCE)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    files = needed(sizes, parts, f"{what} {name}")
    missing = [
        file for file in files
        if not isinstance(try_to_load_from_cache(name, file, revision=info.sha), str)
    ]
    size, place = sum(sizes[file] for file in missing), Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(there).free) < size:
        raise InputError(
            f"the {what} {name} needs {readable(size)} in {place}, but {readable(free)} are free "
            "there; "
            f"HF_HOME names another folder")
    if missing and rank_and_world()[0] == 0:
        print(
            f"fetching the {what} {name}: {readable(size)} in {len(missing)} files from "
            f"{constants.ENDPOINT} "
            f"to {place}", file=sys.stderr, flush=True)
        if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
            enable_progress_bars()  # transformers has turned them off, with its own
    for file in missing:
        hf_hub_download(name, file, revision=info.sha)
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    return snapshot_download(name, allow_patterns=files)  # notes that all is there


def limit_waits():
    """Gives every request to the hub a time limit: huggingface_hub lists a repository's files
    without one."""
    hooks = get_session().event_hooks["request"]
    if limit_wait not in hooks:
        hooks.append(limit_wait)


def limit_wait(request):
    waits = request.extensions["timeout"]
    waits.update({kind: PATIENCE for kind, seconds in waits.items() if seconds is None})


def readable(size):
    """Bytes as people read them."""
    unit, name = next((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
                      if size >= unit or unit == 1e3)
    return f"{size / unit:.1f} {name}"


def near(name):
    """Names that a mistyped one may stand for, as the end of a sentence."""
    folded = {known.lower(): known for known in KNOWN}
    found = difflib.get_close_matches(str(name).lower(), folded, cutoff=0.7)
    return f"; did you mean {' or '.join(folded[match] for match in found)}?" if found else ""


def reason(error, name):
    """Why a model could not be fetched and what to do, as the end of a sentence that begins with
    its name."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__

    def of(kind):
        return next((error for error in chain if isinstance(error, kind)), None)

    hub = constants.ENDPOINT
    if of(OfflineModeIsEnabled):
        return (
            f"is not whole in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; unset it to "
            "fetch the model, or "
            f"give a folder")
    if of(GatedRepoError):
        return f"is gated; accept its terms at {hub}/{name} and log in with `hf auth login`, or set HF_TOKEN"
    if of(RepositoryNotFoundError):
        return (
            f"is neither a folder here nor a public model on {hub}{near(name)} (for a private one, "
            "log in with "
            f"`hf auth login`, or set HF_TOKEN)")
    if answer := of(HfHubHTTPError):
        status = answer.response.status_code
        if status in (401, 403):
            return f"may not be fetched with this login (status {status}); check HF_TOKEN, or `hf auth login`"
        busy = "is busy" if status == 429 else "does not work at present" if status >= 500 else "refused the request"
        return f"could not be fetched: {hub} {busy} (status {status}); rerun the same command in some minutes"
    if of(FileMetadataError) or of(ValueError):
        return f"could not be fetched: {hub} does not answer as the hub does; check the proxy, or HF_ENDPOINT"
    if of(TransportError):
        return (
            f"could not be fetched: there is no connection to {hub} "
            f"({type(of(TransportError)).__name__}); check "
            f"the network, or give a folder")
    if full := next((error for error in chain if getattr(error, "errno", None)), None):
        room = "make room" if full.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
        return f"could not be kept in {constants.HF_HUB_CACHE} ({full.strerror}); {room}, or name another in HF_HOME"
    return f"could not be fetched ({first_sentence(chain[0])}); rerun the same command to resume"


def first_sentence(error):
    return " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__


def load(loader, name, what, **options):
    """loader.from_pretrained(name), from a folder or the hub. Raises InputError."""
    kinds = {
        "AutoConfig": "config", "AutoTokenizer": "tokenizer", "AutoImageProcessor": "processor"
    }
    folder = fetch(name, what, (kinds.get(loader.__name__, "weights"),))
    try:
        return loader.from_pretrained(folder, local_files_only=True, **options)
    except ImportError as error:  # of SigLIP's tokenizer: sentencepiece, protobuf
        raise InputError(
            f"the {what} {name} needs another library: {first_sentence(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, UnpicklingError) as error:
        where = "" if folder == str(
            name) else f" from {folder}, which a rerun fetches anew once it is deleted"
        raise InputError(
            f"the {what} {name} could not be loaded{where} ({first_sentence(error)})") from error


def load_tokenizer(name, what):
    """As load; where the files are missing, transformers makes a tokenizer that knows no word, and
    says nothing."""
    from transformers import AutoTokenizer
    tokenizer = load(AutoTokenizer, name, what)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(f"the {what} {name} has no tokenizer")
    return tokenizer


def identity(name):
    """What files made with a model are stamped with: the hub's name, or a folder's or file's name
    and weights' digest."""
    place = Path(name)
    if not place.exists():
        return name
    digest = hashlib.sha256()
    for path in [place] if place.is_file() else sorted(place.glob("*.safetensors")) or sorted(
            place.glob("*.bin")):
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return f"{place.resolve().name}@{digest.hexdigest()[:12]}"
