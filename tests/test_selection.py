"""The entries of a table, against plain formulas for one image."""

import json

import pytest
import torch
from conftest import commands
from torch.nn.functional import normalize

from antarctic import selection
from antarctic.cache import Embeddings, search
from antarctic.checkpoints import checkpoint_settings, save_checkpoint
from antarctic.errors import InputError
from model import Model


def unit(*shape, seed):
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return normalize(vectors + 0.3, dim=-1)  # as CLIP's, they have a direction in common


def chosen(method, features, rows, k, size):
    """Tables from shortlists of so many of the rows."""
    return selection.choose_entries(method, Embeddings([rows]), *search(features, rows, size), k)


def relevant(cosines, vectors, k):
    """Maximal marginal relevance of one image, by its formula. Arrays of numpy."""
    likeness = vectors @ vectors.T
    relevance = (cosines - cosines.mean()) / cosines.std()
    likeness = (likeness - likeness.mean()) / likeness[::len(likeness) // 20].std()
    places = [0]
    while len(places) < k:
        left = [i for i in range(len(cosines)) if i not in places]
        places.append(max(left, key=lambda i: 0.5 * relevance[i] - 0.5 * likeness[i, places].max()))
    return places


@pytest.mark.parametrize("k", [1, 2, 10, 40])
def test_marginal_relevance_is_its_formula(k, monkeypatch):
    monkeypatch.setattr(selection, "SAMPLE", 20)  # of 40
    monkeypatch.setattr(selection, "RELEVANCE", 0.5)
    for seed in range(6):
        rows = unit(300, 24, seed=seed)
        cosines, indices = search(unit(1, 24, seed=100 + seed), rows, 40)
        image = cosines[0].double(), rows[indices[0]].double()
        assert (selection.marginal_relevance(*image, k)
                == relevant(*(each.numpy() for each in image), k))


@pytest.mark.parametrize("method", selection.METHODS)
def test_a_table_holds_entries_with_their_cosines_and_depends_on_no_other_image(method):
    features, rows = unit(12, 24, seed=0), unit(300, 24, seed=1)  # of one, rows are read alone
    for i, table in enumerate(chosen(method, features, rows, 10, 40)):
        [alone] = chosen(method, features[i:i + 1], rows, 10, 40)
        assert [row for row, _ in table] == [row for row, _ in alone]
        cosines = rows @ features[i]
        assert table[0][0] == cosines.argmax()  # the nearest entry comes first
        assert len({row for row, _ in table}) == len(table) == 10
        for row, cosine in table:
            assert cosine == pytest.approx(cosines[row].item(), abs=1e-6)


def test_topk_takes_the_nearest():
    features, rows = unit(3, 24, seed=0), unit(300, 24, seed=1)
    nearest = (features @ rows.T).argsort(descending=True)
    tables = chosen("topk", features, rows, 3, 3)
    assert [[row for row, _ in table] for table in tables] == nearest[:, :3].tolist()


@pytest.mark.parametrize("method, said", [("topk", 1), ("mmr", 2)])
def test_what_is_said_already_is_not_said_again(method, said):
    """Three directions have ten entries each that are nearly the same."""
    axes = torch.eye(3, 16).repeat_interleave(10, 0)
    noise = 0.02 * torch.rand(30, 16, generator=torch.Generator().manual_seed(0))
    feature = normalize(torch.tensor([[1.2, 1.1, 1.0]]) @ torch.eye(3, 16), dim=1)
    [table] = chosen(method, feature, normalize(axes + noise, dim=1), 3, 30)
    assert len({row // 10 for row, _ in table}) >= said > (method == "mmr")


@pytest.mark.parametrize("method", selection.METHODS)
@pytest.mark.parametrize("entries", [1, 2, 5])
def test_few_entries_are_a_table(method, entries):
    size = selection.shortlist_size(method, entries, 10)
    tables = chosen(method, unit(2, 8, seed=0), unit(entries, 8, seed=1), 10, size)
    assert [sorted(row for row, _ in table) for table in tables] == [list(range(entries))] * 2


def test_equal_entries_are_no_division_by_zero():
    [table] = chosen("mmr", unit(1, 8, seed=0), unit(1, 8, seed=1).repeat(20, 1), 3, 20)
    assert len({row for row, _ in table}) == 3


@pytest.mark.parametrize("entries, k, size", [
    (5, 10, 5), (100, 10, 10), (300, 10, 17), (17000, 10, 1000), (50000, 10, 1000),
    (50000, 1200, 1200)])
def test_a_shortlist_grows_with_the_cache_to_a_bound(entries, k, size):
    assert selection.shortlist_size("mmr", entries, k) == size
    assert selection.shortlist_size("topk", entries, k) == k


# ------------------------------------------------------------------------------------ the scripts

def test_a_checkpoint_brings_its_way_to_choose(script, world, cache, tmp_path):
    arguments = commands(world, cache, tmp_path / "out" / "best.safetensors")
    out, run = tmp_path / "out", tmp_path / "run"
    assert script("trainer", *arguments["trainer"](out, table="mmr", tmax=1)).code == 0
    tables = {}
    for flags in ([], ["--table", "mmr"], ["--table", "topk"]):
        result = script("sampler", *arguments["sampler"](run), *flags)
        assert result.code == 0, result.err
        assert ("was trained on tables by" in result.err) == (flags == ["--table", "topk"])
        with open(run / "details.jsonl") as file:
            tables[flags[-1] if flags else None] = [json.loads(line)["table"] for line in file]
    assert tables[None] == tables["mmr"] != tables["topk"]


def test_another_choice_is_captioned_anew(script, world, cache, checkpoint, tmp_path):
    sampler, captions = commands(world, cache, checkpoint)["sampler"], []
    for method in ("topk", "mmr", "topk"):
        assert script("sampler", *sampler(tmp_path), "--table", method).code == 0
        captions.append((tmp_path / "details.jsonl").read_bytes())
    assert captions[0] == captions[2] != captions[1]


@pytest.mark.parametrize("table", ["omp", "", 1, ["mmr"]])
def test_an_unknown_choice_is_refused_in_a_checkpoint_and_in_python(checkpoint, tmp_path, table):
    settings = checkpoint_settings(checkpoint)
    assert settings["table"] == "mmr"  # the trainer's default
    save_checkpoint(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, settings | {"table": table})
    with pytest.raises(InputError, match="is not a checkpoint that trainer.py wrote"):
        checkpoint_settings(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="table must be one of topk, mmr"):
        Model.load(table=table)


def test_a_new_training_is_no_reason_for_a_warning(script, world, cache, tmp_path):
    arguments = commands(world, cache, None)["trainer"](tmp_path, tmax=1)
    run = script("trainer", *arguments)
    assert run.code == 0 and "warning: tables are by" not in run.err, run.err
