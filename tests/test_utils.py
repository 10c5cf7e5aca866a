"""Cache, search, table, COCO and safe writing against plain formulas."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from gallery import write_gallery
from utils import InputError


def unit_rows(n, dim, seed=0):
    rows = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


@pytest.mark.parametrize("n, k, chunk", [(1000, 10, 16384), (1000, 10, 64), (1000, 10, 7), (5, 10, 2), (64, 64, 64)])
def test_search_in_chunks_equals_sorting_all_scores(n, k, chunk):
    queries, embeddings = unit_rows(6, 16, seed=1), unit_rows(n, 16)
    scores, indices = utils.search(queries, embeddings, k, chunk)
    expected, order = (queries @ embeddings.T).sort(dim=1, descending=True)
    k = min(k, n)
    assert indices.shape == (6, k)
    assert torch.equal(indices, order[:, :k])
    torch.testing.assert_close(scores, expected[:, :k])


def test_the_table_ends_in_a_bar():
    assert utils.linearize(["a dog", "grass", "frisbee"]) == "a dog | grass | frisbee | "


def test_a_cache_comes_back_as_it_was_written(tmp_path):
    entries, rows = ["a dog", "grass", "naïve café"], unit_rows(3, 8)
    utils.write_cache(tmp_path / "c.txt", tmp_path / "c.npy", entries, rows.numpy(), "clip@1", "")
    found, embeddings = utils.read_cache([tmp_path / "c.txt"], [tmp_path / "c.npy"], "clip@1")
    assert found == entries
    assert torch.equal(embeddings, rows) and embeddings.dtype == torch.float32
    assert np.load(tmp_path / "c.npy").dtype == np.float32  # the original's format


def test_several_caches_are_one_and_an_entry_counts_once(tmp_path):
    first, second = unit_rows(3, 8), unit_rows(2, 8, seed=5)
    utils.write_cache(tmp_path / "a.txt", tmp_path / "a.npy", ["dog", "cat", "cow"], first.numpy(), "clip@1", "")
    utils.write_cache(tmp_path / "b.txt", tmp_path / "b.npy", ["cat", "penguin"], second.numpy(), "clip@1", "")
    entries, embeddings = utils.read_cache([tmp_path / "a.txt", tmp_path / "b.txt"], [tmp_path / "a.npy", tmp_path / "b.npy"], "clip@1")
    assert entries == ["dog", "cat", "cow", "penguin"]
    assert torch.equal(embeddings, torch.cat((first, second[1:])))


def test_a_cache_without_description_loads_with_a_warning(tmp_path, capsys):
    utils.write_cache(tmp_path / "c.txt", tmp_path / "c.npy", ["dog"], unit_rows(1, 8).numpy(), "clip@1", "")
    (tmp_path / "c.npy.json").unlink()
    assert utils.read_cache([tmp_path / "c.txt"], [tmp_path / "c.npy"], "clip@2")[0] == ["dog"]
    assert capsys.readouterr().err.count("warning") == 1


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), utils.atomic(path) as file:
        file.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_line_i_of_written_lines_is_text_i(tmp_path):
    utils.write_lines(tmp_path / "preds.txt", ["a dog\non grass", "", "a cat\r\n"])
    assert (tmp_path / "preds.txt").read_bytes() == b"a dog on grass\n\na cat\n"


def test_images_of_folders_are_found_with_subfolders_and_each_once(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("2.PNG", "1.jpg", "b/3.webp"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("no image")
    found = utils.list_images([tmp_path / "b" / "3.webp", tmp_path])
    assert [str(p.path.relative_to(tmp_path)) for p in found] == ["b/3.webp", "1.jpg", "2.PNG"]


def test_coco_captions_come_in_the_order_of_ids(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    data = {"images": [{"id": 9, "file_name": "9.jpg"}, {"id": 2, "file_name": "2.jpg"}],
            "annotations": [{"image_id": 9, "caption": " A dog. \n"}, {"image_id": 2, "caption": "A cat."}, {"image_id": 9, "caption": "Grass"}]}
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(data))
    pictures = utils.read_coco(tmp_path, "val2017")
    assert [(p.id, p.captions) for p in pictures] == [(2, ("A cat.",)), (9, ("A dog.", "Grass"))]
    with pytest.raises(InputError, match="there is val2017"):
        utils.read_coco(tmp_path, "test2017")


def test_the_gallery_shows_a_users_text_as_text(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "i.png")
    evil = "<script>alert(1)</script> \"'&"
    record = {"image_id": evil, "file": str(tmp_path / "i.png"), "caption": evil, "score": 0.3, "table": [[evil, 0.3], ["dog", 0.2]],
              "candidates": [[evil, 0.3, -1.0]]}
    write_gallery(tmp_path / "gallery.html", evil, [(evil, evil, [record], [(evil,)])])
    page = (tmp_path / "gallery.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 9
    assert not re.search(r'(?:src|href)="(?!data:)', page)  # self-contained


def test_patterns_folders_and_files_are_listed_once_in_order(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    whole = [tmp_path / name for name in ("a.JPG", "b.png", "sub/c.webp")]
    assert [p.path for p in utils.list_images([tmp_path])] == whole
    assert [p.path for p in utils.list_images([f"{tmp_path}/*.png", tmp_path])] == [whole[1], whole[0], whole[2]]
    assert [p.path for p in utils.list_images([f"{tmp_path}/**/*.webp"])] == whole[2:]
    with pytest.raises(InputError, match="only local files"):
        utils.list_images(["https://example.com/dog.jpg"])


@pytest.mark.parametrize("killed_at", range(7))
def test_a_cache_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, killed_at):
    """Killed before any of its renames, a write leaves the old cache or the new one, never a mixture."""
    files, old, new = (tmp_path / "c.txt", tmp_path / "c.npy"), unit_rows(2, 4).numpy(), unit_rows(3, 4, seed=1).numpy()
    utils.write_cache(*files, ["a", "b"], old, "clip", "")
    replace, count = utils.os.replace, [0]

    def killed(*paths):
        count[0] += 1
        if count[0] > killed_at:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(utils.os, "replace", killed)
    try:
        utils.write_cache(*files, ["a", "b", "c"], new, "clip", "")
    except KeyboardInterrupt:
        pass
    monkeypatch.setattr(utils.os, "replace", replace)
    entries, embeddings = utils.read_cache([files[0]], [files[1]], "clip", 4)
    assert len(entries) == (2 if killed_at < 3 else 3)
    assert np.array_equal(embeddings.numpy(), old if killed_at < 3 else new)
    assert utils.cache_description(files[1])["text_sha256"] == utils.file_sha256(files[0])
