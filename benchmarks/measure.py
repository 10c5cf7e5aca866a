"""Measures two ways to compute the same result: time, peak memory, and the share of the machine's
limit."""

import ctypes
import functools
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Limit(NamedTuple):
    """The fewest seconds for a piece of work, and what takes them: "arithmetic", "memory", "calls"
    of torch's operations, or something that is no tensor's."""

    seconds: float
    name: str


class Part(NamedTuple):
    """A hot part of a script, computed in two ways."""

    plain: Callable  # () -> result of the baseline: the original's method without its bugs
    ours: Callable  # () -> result of the project's own functions
    equal: Callable  # (result of plain, result of ours) -> whether they are equal
    floor: Callable  # (result of ours) -> the machine's Limit for it


def compare(part, repeats, device):
    """Compares the results of plain and ours; if they are equal, times both alternately, `repeats`
    times each.

    Returns a dict. equal: whether the results are equal; if not, the dict has no other key. ratio,
    low, high: seconds of plain over ours, median and range of the pairs. of_limit, limit: the
    seconds of the limit over those of ours, and its name: the part's floor, or the calls of as many
    operations as ours makes, where these take longer. peak_mb, plain_peak_mb: peak memory above the
    memory before. seconds, plain_seconds: medians.
    """
    plain = part.plain()
    with Operations() as operations:
        ours = part.ours()
    if not part.equal(plain, ours):
        return {"equal": False}
    limit = max(part.floor(ours), Limit(operations.count * call_seconds(device), "calls"))
    del plain, ours
    runs = [(timed(part.plain, device), timed(part.ours, device)) for _ in range(repeats)]
    ratios = [plain / ours for (plain, _), (ours, _) in runs]
    (plain, plain_peak), (ours, ours_peak) = (zip(*side) for side in zip(*runs))
    return {"ratio": median(ratios), "low": min(ratios), "high": max(ratios),
            "of_limit": limit.seconds / median(ours), "limit": limit.name,
            "peak_mb": max(ours_peak), "equal": True, "seconds": median(ours),
            "plain_seconds": median(plain), "plain_peak_mb": max(plain_peak)}


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

class Operations(TorchDispatchMode):
    """Counts the operations of this thread. count: how many there were."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@functools.cache
def call_seconds(device):
    """Seconds of an operation on one number, the best of five runs of 10,000."""
    number = torch.zeros(1, device=device)

    def add():
        for _ in range(10000):
            number.add_(1)

    return min(seconds(add, device) for _ in range(5)) / 10000


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
    """The Limit of pieces of work. work: pairs of (FLOPs, numbers read from memory)."""
    flops, rate = speed(device, dtype)
    return in_turn(max(Limit(f / flops, "arithmetic"),
                       Limit(numbers * dtype.itemsize / rate, "memory")) for f, numbers in work)


def in_turn(limits):
    """The Limit of pieces of work one after the other, named as what takes most of it."""
    total = Counter()
    for each, name in limits:
        total[name] += each
    return Limit(total.total(), max(total, key=total.get))


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
