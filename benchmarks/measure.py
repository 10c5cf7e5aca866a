"""Measures two ways to compute the same result: time, peak memory, and the share of the machine's
limit."""

import ctypes
import functools
import gc
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch


class Part(NamedTuple):
    """A hot part of a script, computed in two ways."""

    plain: Callable  # () -> result of the baseline: the original's method without its bugs
    ours: Callable  # () -> result of the project's own functions
    equal: Callable  # (result of plain, result of ours) -> whether they are equal
    floor: Callable  # (result of ours) -> fewest seconds that the machine needs for it


def compare(part, repeats, device):
    """Compares the results of plain and ours; if they are equal, times both alternately, `repeats`
    times each.

    Returns a dict. equal: whether the results are equal; if not, the dict has no other key. ratio,
    low, high: seconds of plain over ours, median and range of the pairs. of_limit: floor over
    seconds of ours. peak_mb, plain_peak_mb: peak memory above the memory before. seconds,
    plain_seconds: medians.
    """
    plain, ours = part.plain(), part.ours()
    if not part.equal(plain, ours):
        return {"equal": False}
    floor = part.floor(ours)
    del plain, ours
    runs = [(timed(part.plain, device), timed(part.ours, device)) for _ in range(repeats)]
    ratios = [plain / ours for (plain, _), (ours, _) in runs]
    (plain, plain_peak), (ours, ours_peak) = (zip(*side) for side in zip(*runs))
    return {"ratio": median(ratios), "low": min(ratios), "high": max(ratios),
            "of_limit": floor / median(ours), "peak_mb": max(ours_peak), "equal": True,
            "seconds": median(ours), "plain_seconds": median(plain),
            "plain_peak_mb": max(plain_peak)}


def seconds(call, device):
    """The seconds of a call, with the work of the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def timed(call, device):
    """(seconds, peak memory in MB above the memory before) of a call. The memory is 0 on other
    systems than CUDA and Linux."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return seconds(call, device), (torch.cuda.max_memory_allocated() - before) / 1e6
    if sys.platform != "linux":
        return seconds(call, device), 0.0
    # Returns freed memory to the system; its reuse would hide memory that the call takes.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak (man 5 proc)
    before = resident("VmRSS")
    return seconds(call, device), (resident("VmHWM") - before) / 1e6


def resident(name):
    """Memory of this process in bytes, now (VmRSS) or at the peak (VmHWM)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


# ------------------------------------------------------------------------------------------- limits

@functools.cache
def speed(device, dtype):
    """(FLOPs a second of a large matrix product, bytes a second of a long sum), each the best of
    five with the present number of threads."""
    side, length = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 26)
    a, b = torch.randn(side, side, device=device).to(dtype), torch.ones(length, device=device)
    product, total = (min(seconds(call, device) for _ in range(5))
                      for call in (lambda: a @ a, b.sum))
    return 2 * side ** 3 / product, 4 * length / total


def least(device, dtype, work):
    """The fewest seconds for pieces of work, one after the other. work: pairs of (FLOPs, numbers
    read from memory)."""
    flops, rate = speed(device, dtype)
    return sum(max(f / flops, numbers * dtype.itemsize / rate) for f, numbers in work)


def weights(*modules):
    """The number of weights in the linear layers of modules: half the FLOPs of a token, without
    attention."""
    return sum(layer.weight.numel() for module in modules for layer in module.modules()
               if isinstance(layer, torch.nn.Linear))


def bart_weights(bart):
    """(weights of a BART that a token of the table uses, weights that a token of the caption uses),
    the latter with the head."""
    decoder = bart.get_decoder()
    # The keys and values of cross-attention belong to the decoder, but the table's tokens use them.
    cross = sum(weights(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
                for layer in decoder.layers)
    return weights(bart.get_encoder()) + cross, weights(decoder) - cross + weights(bart.lm_head)
