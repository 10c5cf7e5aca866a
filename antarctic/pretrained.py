"""Pretrained models from a folder, or by name from the Hugging Face hub. Each file is fetched once.

A model that is complete on the disk is loaded without a request: huggingface_hub keeps the list of
a repository's files beside them, so a missing file is noticed.
"""

import difflib
import errno
import os
import re
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

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

from antarctic.distributed import is_rank0
from antarctic.errors import InputError, escape_control, print_safely
from antarctic.reads import is_there

CLIP_NAMES = {  # {OpenAI's name: the same model on the hub}
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
KNOWN = (*CLIP_NAMES, *CLIP_NAMES.values(), "google/siglip-base-patch16-224",
         "google/siglip2-base-patch16-224", "facebook/bart-base", "facebook/bart-large",
         "EleutherAI/gpt-neo-125m", "EleutherAI/gpt-neo-1.3B", "EleutherAI/gpt-neo-2.7B",
         "EleutherAI/gpt-j-6b", "HuggingFaceTB/SmolLM2-135M-Instruct")
WEIGHTS = (  # best first
    r"model\.safetensors", r"model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)",
    r"pytorch_model\.bin", r"pytorch_model(-\d+-of-\d+\.bin|\.bin\.index\.json)")
SHARD = re.compile(r"(?:pytorch_)?model-\d+-of-(\d+)\.(?:safetensors|bin)")
TOKENIZER = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "chat_template.jinja", "spiece.model"}  # SigLIP needs spiece.model and tokenizer.json
VOCABULARY = {"vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"}
VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"},
                {"tokenizer.model"}, {"vocab.txt"})  # a tokenizer needs one of these sets
PROCESSOR = {"preprocessor_config.json", "processor_config.json"}
TIMEOUT = 30  # seconds without an answer
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))

# {(cache, name): folder} of complete models that another program downloaded, without the list of
# their files. The hub is asked once for such a model, not once for each of its parts.
unlisted = {}


def needed(names, parts, model):
    """The files of a repository that are read, sorted, with the weights in one format only.

    names: all files of the repository. parts: of "config", "weights", "tokenizer" and "processor".
    model: the model's name in messages. Raises InputError where no file holds weights.
    """
    names, wanted = set(names), {"config.json"}
    if "weights" in parts:
        formats = ({file for file in names if re.fullmatch(form, file)} for form in WEIGHTS)
        weights = next(filter(None, formats), None)
        if weights is None:
            raise InputError(f"the {model} has no PyTorch weights, neither model.safetensors nor "
                             f"pytorch_model.bin")
        wanted |= weights
    if "tokenizer" in parts:
        wanted |= TOKENIZER | ({"tokenizer.json"} if "tokenizer.json" in names else VOCABULARY)
    if "processor" in parts:
        wanted |= PROCESSOR
    return sorted(wanted & names)


def fetch(name, kind, parts):
    """The folder with a model's files: the name itself where it is a folder, else the hub's cache,
    after the missing files are downloaded.

    kind: of the model, as messages call it. parts: see needed. Raises InputError, with a sentence
    for each cause.
    """
    if is_there(name):
        if not os.path.isdir(name):
            raise InputError(f"the {kind} {name} is a file; give a folder or a name on the Hugging "
                             f"Face hub")
        return str(name)
    try:
        validate_repo_id(str(name))
        tree = [file.path for file in get_cached_repo_tree(name)]
        return snapshot_download(name, allow_patterns=needed(tree, parts, f"{kind} {name}"),
                                 local_files_only=True)
    except HFValidationError as error:
        raise InputError(f"there is no folder {name} for the {kind}, and a name on the Hugging "
                         f"Face hub is written as owner/model{suggestion(name)}") from error
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        pass  # not downloaded yet, incomplete, or downloaded by a program that keeps no list
    key = constants.HF_HUB_CACHE, name
    if key in unlisted and is_complete(unlisted[key], parts):
        return unlisted[key]
    try:
        return download(name, kind, parts)
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        with suppress(OSError):
            folder = snapshot_download(name, local_files_only=True)
            if is_complete(folder, parts):
                unlisted[key] = folder
                return folder
        raise InputError(f"the {kind} {name} {failure(error, name)}") from error


def is_complete(folder, parts):
    """Whether a folder that another program filled, without a list, has the files of all parts."""
    files = set(os.listdir(folder))
    shards = Counter(match[1] for match in map(SHARD.fullmatch, files) if match)
    all_shards = any(count == int(total) for total, count in shards.items())
    present = {
        "config": "config.json" in files,
        "weights": bool(files & {"model.safetensors", "pytorch_model.bin"}) or all_shards,
        "tokenizer": any(vocabulary <= files for vocabulary in VOCABULARIES),
        "processor": bool(files & PROCESSOR),
    }
    return present["config"] and all(present[part] for part in parts)


def download(name, kind, parts):
    """Downloads the missing files of a model, after a line with their size. Returns its folder.

    Arguments as of fetch. Raises InputError where the disk is too full.
    """
    limit_waits()
    info = HfApi().model_info(name, files_metadata=True, timeout=TIMEOUT)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    files = needed(sizes, parts, f"{kind} {name}")
    cached = {file: try_to_load_from_cache(name, file, revision=info.sha) for file in files}
    missing = [file for file, path in cached.items() if not isinstance(path, str)]
    size, cache = sum(sizes[file] for file in missing), Path(constants.HF_HUB_CACHE)
    parent = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < size:
        raise InputError(f"the {kind} {name} needs {readable(size)} in {cache}, but only "
                         f"{readable(free)} are free; set HF_HOME to another folder")
    if missing and is_rank0():
        print_safely(escape_control(
            f"fetching the {kind} {name}: {readable(size)} in {len(missing)} files from "
            f"{constants.ENDPOINT} to {cache}"), "stderr")
        if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
            enable_progress_bars()  # transformers disables them together with its own
    for file in missing:
        hf_hub_download(name, file, revision=info.sha)
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    return snapshot_download(name, allow_patterns=files)  # keeps the list of files


def limit_waits():
    """Gives every request to the hub a time limit. huggingface_hub sets none when it lists a
    repository's files."""
    hooks = get_session().event_hooks["request"]
    if limit_wait not in hooks:
        hooks.append(limit_wait)


def limit_wait(request):
    waits = request.extensions["timeout"]
    waits.update({kind: TIMEOUT for kind, seconds in waits.items() if seconds is None})


def readable(size):
    """A number of bytes in kB, MB or GB."""
    unit, name = next(((unit, name) for unit, name in UNITS if size >= unit), UNITS[-1])
    return f"{size / unit:.1f} {name}"


def suggestion(name):
    """The end of a sentence that suggests known names like a mistyped one; empty where none is."""
    lowercase = {known.lower(): known for known in KNOWN}
    matches = difflib.get_close_matches(str(name).lower(), lowercase, cutoff=0.7)
    names = " or ".join(lowercase[match] for match in matches)
    return f"; did you mean {names}?" if names else ""


def failure(error, name):
    """Why a model could not be downloaded and what to do, as the end of a sentence that begins with
    its name."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__

    def of(kind):
        return next((error for error in chain if isinstance(error, kind)), None)

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    if of(OfflineModeIsEnabled):
        return (f"is not complete in {cache}, and HF_HUB_OFFLINE is set; unset it to fetch the "
                f"model, or give a folder")
    if of(GatedRepoError):
        return (f"is gated; accept its terms at {hub}/{name} and log in with `hf auth login`, or "
                f"set HF_TOKEN")
    if of(RepositoryNotFoundError):
        return (f"is neither a folder here nor a public model on {hub}{suggestion(name)} (for a "
                f"private one, log in with `hf auth login`, or set HF_TOKEN)")
    if answer := of(HfHubHTTPError):
        return refusal(answer.response.status_code)
    if of(FileMetadataError) or of(ValueError):
        return (f"could not be fetched: {hub} does not answer as the Hugging Face hub does; check "
                f"the proxy, or HF_ENDPOINT")
    if lost := of(TransportError):
        return (f"could not be fetched: there is no connection to {hub} ({type(lost).__name__}); "
                f"check the network, or give a folder")
    if failed := next((error for error in chain if getattr(error, "errno", None)), None):
        full = failed.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "make it writable"
        return (f"could not be saved in {cache} ({failed.strerror}); {remedy}, or set HF_HOME to "
                f"another folder")
    return f"could not be fetched ({first_sentence(chain[0])}); rerun the same command to resume"


def refusal(status):
    """The end of a sentence as of failure, for an HTTP status of the hub."""
    if status in (401, 403):
        return (f"may not be fetched with this login (status {status}); check HF_TOKEN, or `hf "
                f"auth login`")
    if status == 429:
        problem = "is busy"
    elif status >= 500:
        problem = "is not available"
    else:
        problem = "refused the request"
    return (f"could not be fetched: {constants.ENDPOINT} {problem} (status {status}); rerun the "
            f"same command in a few minutes")


def first_sentence(error):
    return " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
