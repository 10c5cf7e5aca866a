"""Reading by threads: the results and their order are those of one thread, within bounds."""

import hashlib
import io
import tarfile
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import CLIP
from PIL import Image, ImageFile
from tqdm import tqdm

from antarctic import features
from antarctic.ahead import Budget, map_ahead
from antarctic.errors import InputError
from antarctic.images import reads_heif
from model import Clip


def wait_until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_keep_their_order_and_are_not_ahead_of_the_bound(workers):
    begun, taken = [], 0

    def slowest_first(number):
        begun.append(number)
        time.sleep(0.01 if number % 3 == 0 else 0)
        return number ** 2

    for result in map_ahead(slowest_first, range(40), workers, 5):
        assert result == taken ** 2
        taken += 1
        assert len(begun) <= taken + 5
    assert taken == 40 and sorted(begun) == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_in_its_turn(workers):
    results = map_ahead(lambda number: 6 // (3 - number), range(5), workers, 4)
    assert [next(results) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_what_has_not_begun_never_does_once_it_is_closed():
    go, begun = threading.Event(), []

    def wait(number):
        begun.append(number)
        if number:
            assert go.wait(20)

    results = map_ahead(wait, range(50), 2, 30)
    next(results)
    wait_until(lambda: len(begun) == 3)
    results.close()  # it waits for no thread
    go.set()
    wait_until(lambda: not readers())
    assert begun == [0, 1, 2]


def test_threads_share_a_budget_and_what_is_larger_than_it_gets_it_alone():
    budget, held, most = Budget(10), [], []

    def use(amount):
        with budget.share(amount):
            held.append(amount)
            most.append(list(held))
            time.sleep(0.001)
            held.remove(amount)

    amounts = [1, 25, 4, 9, 3, 3, 10, 11, 2, 0] * 5
    assert list(map_ahead(use, amounts, 8, 50)) == [None] * 50
    assert sorted(amounts) == sorted(each[-1] for each in most)
    assert all(sum(each) <= 10 or len([one for one in each if one]) == 1 for each in most)
    assert budget.used == 0


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Images of many formats and sizes, some twice, some in a tar file, some bad."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    suffixes, found = [".jpg", ".png", ".webp", ".tif", ".gif", ".bmp"], []
    for i in range(36):
        size = generator.integers(20, 300, 2)
        image = Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
        found.append(folder / f"{i}{suffixes[i % len(suffixes)]}")
        image.save(found[-1])
    content = found[0].read_bytes()
    (folder / "cut.jpg").write_bytes(content[:len(content) // 2])
    (folder / "again.jpg").write_bytes(content)
    (folder / "text.png").write_text("text")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for path in found[1:9]:
            tar.add(path, f"in_{path.name}")
    members = [folder / "a.tar" / f"in_{path.name}" for path in found[1:9]]
    found[5:5] = [folder / "cut.jpg", folder / "again.jpg", folder / "gone.png",
                  folder / "text.png", *members]
    if reads_heif():
        import pillow_heif
        for i in range(3):
            image = Image.new("RGB", (64 + i, 64), (90 * i, 9, 9))
            pillow_heif.from_pillow(image).save(folder / f"{i}.heic")
            found.insert(12 * i, folder / f"{i}.heic")
    return found


@pytest.mark.parametrize("reading", [{}, {"truncated": True}, {"max_pixels": 70_000_000}])
def test_threads_read_what_one_reads(paths, reading, monkeypatch):
    """Digests, vectors to the bit, errors, and the batches that they are encoded in."""
    batches, encode = [], Clip.encode_images
    monkeypatch.setattr(Clip, "encode_images", lambda self, images: (
        batches.append(len(images)), encode(self, images))[1])
    monkeypatch.setattr(features, "BATCH_PIXELS", 200_000)  # some batches end by it
    clip, results = Clip(CLIP), []
    before = list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    for workers in (0, 1, 4):
        batches.clear()
        digests, vectors, bad = features.encode_files(clip, paths, 8, tqdm(disable=True),
                                                      workers=workers, **reading)
        results.append((digests, [(key, row.tobytes()) for key, row in vectors.items()], bad,
                        list(batches)))
    assert results[0] == results[1] == results[2]
    names = {paths[i].name for i in results[0][2]}
    expected = {"gone.png", "text.png"} if "truncated" in reading else {
        "gone.png", "text.png", "cut.jpg"}
    assert names == expected
    assert before == (list(warnings.filters), Image.MAX_IMAGE_PIXELS,
                      ImageFile.LOAD_TRUNCATED_IMAGES)


def test_what_is_known_is_not_decoded(paths, monkeypatch):
    known = {hashlib.sha256(path.read_bytes()).digest() for path in paths[-5:]}
    monkeypatch.setattr(features, "read_image", None)
    digests, vectors, bad = features.encode_files(None, paths[-5:], 8, tqdm(disable=True), known, 2)
    assert set(digests) == known and not vectors and not bad


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
def test_threads_end_where_the_run_does(paths, error):
    class StoppedClip:
        prepare = staticmethod(np.asarray)

        def encode_images(self, images):
            raise error("stopped")

    with pytest.raises(error):
        features.encode_files(StoppedClip(), paths * 20, 8, tqdm(disable=True), workers=3)
    wait_until(lambda: not readers())


def test_decoded_images_of_all_threads_stay_within_their_budget(tmp_path, monkeypatch):
    """Four threads decode four images of 4 million pixels each, no two of them at once where the
    budget is smaller."""
    image = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(image, "PNG")
    paths, decoding, most = [tmp_path / f"{i}.png" for i in range(6)], [], []
    for i, path in enumerate(paths):
        path.write_bytes(image.getvalue() + bytes([i]))

    class WatchingClip:
        def prepare(self, image):
            decoding.append(1)
            most.append(len(decoding))
            time.sleep(0.01)
            decoding.pop()
            return image.size

        def encode_images(self, images):
            return torch.ones(len(images), 2)

    monkeypatch.setattr(features, "MOST_PIXELS", 7_000_000)
    _, vectors, bad = features.encode_files(WatchingClip(), paths, 8, tqdm(disable=True), workers=4)
    assert len(vectors) == 6 and not bad and max(most) == 1
