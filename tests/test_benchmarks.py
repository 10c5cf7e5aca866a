"""The benchmarks with --small: each part runs, and ours returns the baseline's result. No test
checks a time."""

import json
import math

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import captions, entries, measure

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reported(script):
    """The output of `python -m benchmarks --small --repeats 1`."""
    result = script("benchmarks.__main__", "--small", "--repeats", 1)
    assert result.code == 0, result.out + result.err
    return result.out


@pytest.mark.slow
def test_each_part_gives_what_the_plain_way_gives(reported):
    lines = [json.loads(line) for line in reported.splitlines() if line.startswith("{")]
    assert [line["part"] for line in lines] == list(benchmarks.PARTS)
    for line in lines:
        assert list(line) == ["part", "ratio", "low", "high", "of_limit", "limit", "peak_mb",
                              "equal"]
        if "to_faiss" in line["part"] and line["equal"] is None:  # faiss is not installed
            continue
        assert line["equal"] is True, line
        assert 0 < line["low"] <= line["ratio"] <= line["high"]
        assert 0 < line["of_limit"] < math.inf and line["peak_mb"] >= 0


def test_what_differs_is_not_timed(monkeypatch):
    monkeypatch.setattr(measure, "timed", None)
    part = measure.Part(lambda: 1, lambda: 2, lambda a, b: a == b, None)
    assert measure.compare(part, 1, CPU) == {"equal": False}


def test_a_limit_is_named_as_what_takes_most_of_it(monkeypatch):
    monkeypatch.setattr(measure, "speed", lambda device, dtype: (10.0, 4.0))
    work = [(20, 1), (10, 3)]  # 2 s of arithmetic, then 3 s of memory beside 1 s of arithmetic
    assert measure.least(CPU, torch.float32, work) == (5.0, "memory")
    assert measure.least(CPU, torch.float32, [*work, (20, 1)]) == (7.0, "arithmetic")

    def ours():
        return [torch.zeros(1).add(1) for _ in range(3)]

    def part(seconds):
        return measure.Part(ours, ours, lambda a, b: a == b, lambda _: measure.Limit(seconds, "a"))

    monkeypatch.setattr(measure, "call_seconds", lambda device: 0.5)
    assert measure.compare(part(2.9), 1, CPU)["limit"] == "calls"  # of six operations
    assert measure.compare(part(3.1), 1, CPU)["limit"] == "a"


@pytest.mark.parametrize("name, module, function, wrong", [
    ("encode_ngrams", entries.Clip, "encode_texts", lambda true: true.roll(1, 0)),
    ("search_64", entries, "search", lambda true: (true[0], true[1].flip(1))),
    ("beam_base", captions.Captioner, "beam", lambda true: true[::-1]),
    ("rescore", captions, "rescore", lambda true: [true[0][::-1]]),
    ("sample_base", captions.Captioner, "sample",
     lambda true: [[(text, 1.01 * likelihood, n) for text, likelihood, n in true[0]]]),
    ("sample_base", captions.Captioner, "sample",
     lambda true: [[sample for sample in true[0] if len(sample[0].split()) > 10]]),
])
@pytest.mark.slow
def test_a_wrong_result_is_found_out(name, module, function, wrong, monkeypatch):
    true = getattr(module, function)
    monkeypatch.setattr(module, function,
                        lambda *arguments, **named: wrong(true(*arguments, **named)))
    assert measure.compare(benchmarks.PARTS[name](True, CPU), 1, CPU) == {"equal": False}
