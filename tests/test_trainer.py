"""Training: the schedule, the files it leaves, and that the same seed gives the same result."""

import csv
import math
import os
import subprocess
import sys
from itertools import islice

import pytest
import torch
from conftest import BART, CLIP, ROOT
from safetensors.torch import load_file

import trainer
from antarctic.checkpoints import checkpoint_settings
from model import Captioner
from trainer import batches, cosine_rate


def train(script, world, cache, savedir, *more):
    run = script("trainer", "--datadir", world, "--textfile", cache.textfile, "--embfile",
                 cache.embfile, "--savedir", savedir, "--clip_model", CLIP, "--lm", BART, "--topk",
                 "8", "--batch_size", "16", "--lrate", "1e-2", "--epochs", "2", *more)
    assert run.code == 0, run.err
    return run


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


def test_help_and_a_refusal_load_no_library(tmp_path):
    """torch alone takes a second."""
    for name in ("torch", "transformers", "matplotlib", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} is loaded')\n")
    for arguments, code in (["--help"], 0), (["--topk", "0"], 2), ([], 2):
        run = subprocess.run(
            [sys.executable, ROOT / "trainer.py", "--datadir", tmp_path, *arguments],
            capture_output=True, text=True, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert run.returncode == code, run.stderr
        assert code == 0 or run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1


def test_training_says_what_it_trains_and_leaves_all_files(script, world, cache, tmp_path):
    run = train(script, world, cache, tmp_path)
    assert "training 3,456 of 3,389,184 parameters" in run.out
    best, last = (checkpoint_settings(tmp_path / f"{name}.safetensors")
                  for name in ("best", "last"))
    with open(tmp_path / "loss.csv") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert len(losses) == 2 and last["step"] == 6 and last["epoch"] == 2
    assert best["val_loss"] == pytest.approx(min(losses), abs=1e-4)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(load_file(tmp_path / "best.safetensors")) == 2 * 2 * 3 + 2 * 3


def test_the_same_seed_trains_the_same_and_features_are_found_again(script, world, cache, tmp_path):
    train(script, world, cache, tmp_path / "a")
    first = load_file(tmp_path / "a" / "last.safetensors")
    again = train(script, world, cache, tmp_path / "a")
    assert "encoding images" not in again.err
    second = load_file(tmp_path / "a" / "last.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    train(script, world, cache, tmp_path / "b", "--seed", "1")
    other = load_file(tmp_path / "b" / "last.safetensors")
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_tmax_bounds_the_steps(script, world, cache, tmp_path):
    train(script, world, cache, tmp_path, "--tmax", "4")
    assert checkpoint_settings(tmp_path / "last.safetensors")["step"] == 4


def test_every_weight_can_be_trained_for_comparison(script, world, cache, tmp_path):
    run = train(script, world, cache, tmp_path, "--trained", "all", "--tmax", "1")
    assert "training 3,389,184 of 3,389,184 parameters" in run.out


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
        script, world, cache, tmp_path):
    run = script("trainer", "--datadir", world, "--textfile", cache.textfile, "--embfile",
                 cache.embfile, "--savedir", tmp_path, "--clip_model", CLIP, "--lm", BART, "--topk",
                 "8", "--batch_size", "16", "--lrate", "inf", "--epochs", "3")
    assert run.code == 2 and "the loss became" in run.err and "at step" in run.err
    if (tmp_path / "best.safetensors").exists():
        assert math.isfinite(checkpoint_settings(tmp_path / "best.safetensors")["val_loss"])


@pytest.mark.parametrize("stop_at, save_seconds", [(2, 0), (3, 0), (4, 0), (5, 1000), (6, 0)])
def test_a_stopped_run_goes_on_and_ends_as_an_uninterrupted_one(script, world, cache, tmp_path,
                                                                monkeypatch, stop_at, save_seconds):
    """Stopped before its loss of step stop_at: in an epoch, at its end, before any save but that of
    the first epoch."""
    train(script, world, cache, tmp_path / "whole")
    plain, steps = Captioner.loss, []

    def stops(self, tables, captions):
        if torch.is_grad_enabled():
            steps.append(len(tables))
            if len(steps) == stop_at:
                raise KeyboardInterrupt
        return plain(self, tables, captions)

    monkeypatch.setattr(Captioner, "loss", stops)
    run = script("trainer", "--datadir", world, "--textfile", cache.textfile, "--embfile",
                 cache.embfile, "--savedir", tmp_path / "cut", "--clip_model", CLIP, "--lm", BART,
                 "--topk", "8", "--batch_size", "16", "--lrate", "1e-2", "--epochs", "2",
                 "--save_seconds", save_seconds)
    assert run.code == 130 and len(list((tmp_path / "cut").glob("state-*.pt"))) == 1
    train(script, world, cache, tmp_path / "cut", "--save_seconds", save_seconds)
    assert len(steps) == 6 + 1 + (1 if save_seconds else 0
                                  )  # the one that was cut, and what was not saved
    for name in ("best.safetensors", "last.safetensors", "loss.csv", "loss.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" /
                                                            name).read_bytes(), name
    assert not list((tmp_path / "cut").glob("state-*.pt"))


@pytest.mark.parametrize("tmax", [100, 5])
def test_a_run_that_was_stopped_as_it_validated_validates_and_trains_no_step_twice(
        script, world, cache, tmp_path, monkeypatch, tmax):
    """In its last validation, at the end of an epoch or inside one: the state is that of the last
    step."""
    how = "--tmax", tmax, "--save_seconds", 0
    train(script, world, cache, tmp_path / "whole", *how)
    calls = []

    def stops(*arguments, plain=trainer.validate):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr("trainer.validate", stops)
    with pytest.raises(AssertionError, match="stopped;"):
        train(script, world, cache, tmp_path / "cut", *how)
    monkeypatch.setattr("trainer.share_step", lambda *_: pytest.fail("a step was trained twice"))
    train(script, world, cache, tmp_path / "cut", *how)
    for name in ("best.safetensors", "last.safetensors", "loss.csv", "loss.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" /
                                                            name).read_bytes(), name


def test_a_damaged_state_is_named_and_other_settings_start_anew(script, world, cache, tmp_path,
                                                                monkeypatch):
    monkeypatch.setattr(
        "trainer.write_curve",
        lambda *_: [].pop())  # after the first epoch's checkpoints, before its state
    arguments = ("--datadir", world, "--textfile", cache.textfile, "--embfile", cache.embfile,
                 "--savedir", tmp_path, "--clip_model", CLIP, "--lm", BART, "--topk", "8",
                 "--batch_size", "16", "--lrate", "1e-2", "--epochs", "2", "--save_seconds", "0")
    with pytest.raises(IndexError):
        script("trainer", *arguments)
    monkeypatch.undo()
    [state] = tmp_path.glob("state-*.pt")
    state.write_bytes(state.read_bytes()[:1000])
    run = script("trainer", *arguments)
    assert run.code == 2 and str(state) in run.err.splitlines()[-1]
    train(script, world, cache, tmp_path, "--seed", "1")
    assert not state.exists()
