"""How many images are captioned at a time."""

from itertools import islice

import pytest
import torch

from antarctic import batches
from antarctic.batches import batch_sizes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def first(sizes):
    return list(islice(sizes, 4))


@pytest.fixture
def memory(monkeypatch):
    """A GPU's memory, a dict of bytes, in the place of torch's figures."""
    memory = {"allocated": 100, "reserved": 150, "free": 1000, "peak": 100}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory["allocated"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: memory["reserved"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory["free"], 5000))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats",
                        lambda device: memory.update(peak=memory["allocated"]))
    return memory


def test_a_number_is_kept_and_a_processor_has_sixteen():
    assert first(batch_sizes(5, CPU)) == first(batch_sizes(5, GPU)) == [5] * 4
    assert first(batch_sizes(None, CPU)) == [16] * 4


@pytest.mark.parametrize("took, size", [
    (50, 168),  # 1000 bytes are free and 50 unused; half of these are ten and a half times 50
    (1, 256), (0, 256), (800, 16), (5000, 16)])
def test_a_gpu_gets_what_fits_into_half_of_its_free_memory(memory, took, size):
    memory["peak"] = 4000  # of loading, long ago
    sizes = batch_sizes(None, GPU)
    assert next(sizes) == 16
    memory["peak"] += took
    assert first(sizes) == [size] * 4


def test_all_processes_take_the_least(memory, monkeypatch):
    monkeypatch.setattr(batches, "gather_lists", lambda sizes: [*sizes, 40, 90])
    sizes = batch_sizes(None, GPU)
    next(sizes)
    memory["peak"] += 50
    assert first(sizes) == [40] * 4


@pytest.mark.parametrize("text", ["many", "1.5", ""])
def test_another_size_is_refused(script, text):
    result = script("sampler", "--images", "a.jpg", "--batch_size", text)
    assert result.code == 2 and f"must be a number or auto, not {text!r}" in result.err
