"""How many images are captioned at a time: on a GPU as many as its memory holds."""

from itertools import repeat

from antarctic.distributed import gather_lists

FIRST, MOST = 16, 256  # images
SHARE = 0.5  # of the free memory, since other tables and captions may be longer than the first ones


def batch_sizes(size, device):
    """Yields how many images each process captions next, for ever.

    size: a number, or None: FIRST, and on a GPU after these what fitting() makes of the memory that
    they took, the least of all processes.
    """
    if size:
        yield from repeat(size)
    if device.type != "cuda":
        yield from repeat(FIRST)
    from torch import cuda

    before = cuda.memory_allocated(device)
    cuda.reset_peak_memory_stats(device)
    yield FIRST
    took = cuda.max_memory_allocated(device) - before
    unused = cuda.memory_reserved(device) - cuda.memory_allocated(device)  # kept by torch
    size = fitting(took, cuda.mem_get_info(device)[0] + unused)
    yield from repeat(min(gather_lists([size])))


def fitting(took, free):
    """How many images to caption at a time, where FIRST of them took so many bytes, and so many are
    free."""
    return max(FIRST, min(MOST, int(FIRST * SHARE * free / max(1, took))))
