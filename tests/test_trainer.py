"""Training: its schedule, its files, its seed, and runs that are stopped and resumed."""

import csv
import math
import os
import subprocess
import sys
from array import array
from itertools import islice

import pytest
import torch
from conftest import ROOT, commands
from safetensors.torch import load_file

import trainer
from antarctic.checkpoints import checkpoint_settings, digest_of
from model import Captioner
from trainer import batches, cosine_rate


@pytest.fixture
def arguments(world, cache):
    """arguments(savedir, option=value, ...): those of a short training."""
    return commands(world, cache, None, trainer={"batch_size": 16})["trainer"]


@pytest.fixture
def train(script, arguments):
    """train(savedir, option=value, ...) trains, and must succeed."""
    def run(savedir, **options):
        result = script("trainer", *arguments(savedir, **options))
        assert result.code == 0, result.err
        return result
    return run


def assert_same_results(folder, other):
    for name in ("best.safetensors", "last.safetensors", "loss.csv", "loss.png"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def test_the_rate_rises_then_falls_as_a_cosine_at_every_step():
    rates = [cosine_rate(step, 100, 10) for step in range(100)]
    assert rates[:10] == [(i + 1) / 10 for i in range(10)]
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    torch_rates = []
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
    for _ in range(90):
        torch_rates.append(cosine.get_last_lr()[0])
        optimizer.step()
        cosine.step()
    assert rates[10:] == pytest.approx(torch_rates, abs=1e-9)


def test_an_epoch_takes_each_image_once_with_a_caption_of_its_own_and_can_be_resumed():
    captions = [[f"{image} {number}" for number in range(1 + image % 3)] for image in range(23)]
    epoch = list(batches(captions, 5, 0, 0))
    assert [len(rows) for rows, _ in epoch] == [5, 5, 5, 5, 3]
    assert sorted(row for rows, _ in epoch for row in rows) == list(range(23))
    assert all(caption in captions[row] for rows, chosen in epoch
               for row, caption in zip(rows, chosen, strict=True))
    assert list(islice(batches(captions, 5, 0, 0), 2, None)) == epoch[2:]
    for seed, number in ((0, 1), (1, 0)):
        assert list(batches(captions, 5, seed, number)) != epoch


def test_the_digest_of_a_state_tells_all_that_is_trained_on():
    """As it is in memory: no file is read again, and no two sets look alike."""
    sets = [([[1, 2], [3]], [("a", "b"), ("c",)]), ([[1], [2, 3]], [("a", "b"), ("c",)]),
            ([[1, 2], [3]], [("a",), ("b", "c")]), ([[1, 2], [3]], [("a", "b"), ("d",)]),
            ([[1, 2], [4]], [("a", "b"), ("c",)]), ([[1, 2]], [("a", "b")]),
            ([[3], [1, 2]], [("c",), ("a", "b")])]
    digests = [digest_of([array("i", table) for table in tables], captions)
               for tables, captions in sets]
    assert len(set(digests)) == len(sets)


def test_help_and_a_refusal_load_no_library(tmp_path):
    """torch alone takes a second to load."""
    for name in ("torch", "transformers", "matplotlib", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} is loaded')\n")
    for options, code in (["--help"], 0), (["--topk", "0"], 2), ([], 2):
        run = subprocess.run([sys.executable, ROOT / "trainer.py", "--datadir", tmp_path, *options],
                             capture_output=True, text=True, cwd=tmp_path,
                             env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert run.returncode == code, run.stderr
        assert code == 0 or run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1


def test_training_says_what_it_trains_and_leaves_all_files(train, tmp_path):
    run = train(tmp_path)
    assert "training 3,456 of 3,389,184 parameters" in run.out
    best = checkpoint_settings(tmp_path / "best.safetensors")
    last = checkpoint_settings(tmp_path / "last.safetensors")
    with open(tmp_path / "loss.csv") as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    assert len(losses) == 2 and last["step"] == 6 and last["epoch"] == 2
    assert best["val_loss"] == pytest.approx(min(losses), abs=1e-4)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(load_file(tmp_path / "best.safetensors")) == 2 * 2 * 3 + 2 * 3


@pytest.mark.slow
def test_the_same_seed_trains_the_same_and_features_are_found_again(train, tmp_path):
    train(tmp_path / "a")
    before = load_file(tmp_path / "a" / "last.safetensors")
    run = train(tmp_path / "a")
    assert "encoding images" not in run.err
    after = load_file(tmp_path / "a" / "last.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    train(tmp_path / "b", seed=1)
    other = load_file(tmp_path / "b" / "last.safetensors")
    assert any(not torch.equal(before[name], other[name]) for name in before)


def test_tmax_bounds_the_steps(train, tmp_path):
    train(tmp_path, tmax=4)
    assert checkpoint_settings(tmp_path / "last.safetensors")["step"] == 4


def test_every_weight_can_be_trained_for_comparison(train, tmp_path):
    run = train(tmp_path, trained="all", tmax=1)
    assert "training 3,389,184 of 3,389,184 parameters" in run.out


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
        script, arguments, tmp_path):
    run = script("trainer", *arguments(tmp_path, lrate="inf", epochs=3))
    assert run.code == 2 and "the loss became" in run.err and "at step" in run.err
    if (tmp_path / "best.safetensors").exists():
        assert math.isfinite(checkpoint_settings(tmp_path / "best.safetensors")["val_loss"])


@pytest.mark.parametrize("stop_at, save_seconds", [(2, 0), (3, 0), (4, 0), (5, 1000), (6, 0)])
@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_as_an_uninterrupted_one(
        script, arguments, train, tmp_path, monkeypatch, stop_at, save_seconds):
    """A run is stopped before the loss of step stop_at: in an epoch, at its end, or before any save
    but that of the first epoch."""
    train(tmp_path / "whole")
    loss, steps = Captioner.loss, []

    def stopped_loss(self, tables, captions):
        if torch.is_grad_enabled():
            steps.append(len(tables))
            if len(steps) == stop_at:
                raise KeyboardInterrupt
        return loss(self, tables, captions)

    monkeypatch.setattr(Captioner, "loss", stopped_loss)
    run = script("trainer", *arguments(tmp_path / "cut", save_seconds=save_seconds))
    assert run.code == 130 and len(list((tmp_path / "cut").glob("state-*.pt"))) == 1
    train(tmp_path / "cut", save_seconds=save_seconds)
    unsaved = 1 if save_seconds else 0
    assert len(steps) == 6 + 1 + unsaved  # all steps, the one that was stopped, the unsaved ones
    assert_same_results(tmp_path / "whole", tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("state-*.pt"))


@pytest.mark.parametrize("tmax", [100, 5])
@pytest.mark.slow
def test_a_run_that_was_stopped_as_it_validated_validates_and_trains_no_step_twice(
        train, tmp_path, monkeypatch, tmax):
    """A run is stopped in its last validation, at the end of an epoch (100) or inside one (5). Its
    state is that of the last step."""
    options = {"tmax": tmax, "save_seconds": 0}
    train(tmp_path / "whole", **options)
    calls, validate = [], trainer.validate

    def stopped_validate(*arguments):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(*arguments)

    monkeypatch.setattr("trainer.validate", stopped_validate)
    with pytest.raises(AssertionError, match="stopped;"):
        train(tmp_path / "cut", **options)
    monkeypatch.setattr("trainer.share_step", lambda *_: pytest.fail("a step was trained twice"))
    train(tmp_path / "cut", **options)
    assert_same_results(tmp_path / "whole", tmp_path / "cut")


def test_a_damaged_state_is_named_and_other_settings_start_anew(
        script, arguments, train, tmp_path, monkeypatch):
    # The run ends after the first epoch's checkpoints are written, and before its state is.
    monkeypatch.setattr("trainer.write_curve", lambda *_: [].pop())
    with pytest.raises(IndexError):
        script("trainer", *arguments(tmp_path, save_seconds=0))
    monkeypatch.undo()
    [state] = tmp_path.glob("state-*.pt")
    state.write_bytes(state.read_bytes()[:1000])
    run = script("trainer", *arguments(tmp_path, save_seconds=0))
    assert run.code == 2 and str(state) in run.err.splitlines()[-1]
    train(tmp_path, seed=1)
    assert not state.exists()
