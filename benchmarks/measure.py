"""Times two ways to compute the same thing in turns, their peak memory, and how near the machine's
limit they come."""

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
    """A hot part: two ways to compute it, and what is known of the result."""
    plain: Callable  # () -> result: the original's way, without its faults
    ours: Callable  # () -> result: the project's own functions
    equal: Callable  # (result of plain, result of ours) -> whether they are the same
    floor: Callable  # (result of ours) -> seconds that the machine needs for it at the least


def compare(part, repeats, device):
    """Runs both ways once and compares their results; then, if these are equal, both in turns,
    repeats times each.

    Returns {"equal", "ratio", "low", "high": plain's seconds over ours, median and range of the
    pairs; "of_limit": floor over ours; "peak_mb", "plain_peak_mb": memory above what was there
    before; "seconds", "plain_seconds": medians}; of results that differ "equal" alone.
    """
    plain, ours = part.plain(), part.ours()
    if not part.equal(plain, ours):
        return {"equal": False}
    floor = part.floor(ours)
    del plain, ours
    runs = [(timed(part.plain, device), timed(part.ours, device)) for _ in range(repeats)]
    ratios = [plain / ours for (plain, _), (ours, _) in runs]
    (plain, plain_peak), (ours, ours_peak) = ([column for column in zip(*side)]
                                              for side in zip(*runs))
    return {
        "ratio": median(ratios), "low": min(ratios), "high": max(ratios),
        "of_limit": floor / median(ours), "peak_mb": max(ours_peak), "equal": True,
        "seconds": median(ours), "plain_seconds": median(plain), "plain_peak_mb": max(plain_peak)
    }


def seconds(call, device):
    """What a call takes, its device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def timed(call, device):
    """(seconds, peak memory in MB above what was there before) of a call. Elsewhere than on CUDA
    and Linux the memory is 0."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return seconds(call, device), (torch.cuda.max_memory_allocated() - before) / 1e6
    if sys.platform != "linux":
        return seconds(call, device), 0.0
    ctypes.CDLL(None).malloc_trim(
        0)  # else memory that was freed before would hide what is taken now
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew (man 5 proc)
    before = resident("VmRSS")
    return seconds(call, device), (resident("VmHWM") - before) / 1e6


def resident(name):
    """Bytes of this process in memory, now (VmRSS) or at the peak (VmHWM)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


# ------------------------------------------------------------------------------------------- limits

@functools.cache
def speed(device, dtype):
    """(FLOPs a second of a large matrix product, bytes a second of a long sum): the best of five,
    with as many threads as now."""
    side, length = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 26)
    a, b = torch.randn(side, side, device=device).to(dtype), torch.ones(length, device=device)
    product, total = (min(seconds(call, device) for _ in range(5))
                      for call in (lambda: a @ a, b.sum))
    return 2 * side ** 3 / product, 4 * length / total


def least(device, dtype, work):
    """Seconds that pieces of work take at the least. work: (FLOPs, numbers read from memory) pairs,
    one after the other."""
    flops, rate = speed(device, dtype)
    return sum(max(f / flops, numbers * dtype.itemsize / rate) for f, numbers in work)


def weights(*modules):
    """Numbers in the linear layers of modules: half the FLOPs a token, attention itself left
    out."""
    return sum(layer.weight.numel() for module in modules for layer in module.modules()
               if isinstance(layer, torch.nn.Linear))


def bart_weights(bart):
    """(numbers of a BART that a token of the table meets, that a token of the caption meets), the
    latter with the head."""
    decoder = bart.get_decoder()
    both = sum(
        weights(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in decoder.layers)
    return weights(bart.get_encoder()) + both, weights(decoder) - both + weights(bart.lm_head)
