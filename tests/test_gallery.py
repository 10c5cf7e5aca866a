"""The gallery's page: its structure, its policy, the images in it or beside it, and what it does in
a browser."""

import base64
import hashlib
import html
import io
import os
import re
import shutil
import weakref

import pytest
from PIL import Image

from antarctic import leftovers
from antarctic.errors import InputError
from antarctic.folders import Picture
from antarctic.gallery import SIDE, write_gallery
from antarctic.results import write_results

NOUNS = ["a dog", "a catfish", "scattered birds", "a cat", "ein Élan", "犬と猫"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of several sizes and colours."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(len(NOUNS)):
        Image.new("RGB", (600 + 90 * i, 700), (40 * i, 90, 120)).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(len(NOUNS))]


@pytest.fixture(scope="module")
def records(photos):
    """A record of each image; the scores are out of order."""
    return [{"image_id": 100 + i, "file": str(photos[i]), "caption": f"{noun} [{i}]",
             "score": 0.3 + 0.01 * (i * 4 % 7),
             "table": [[noun, 0.34], ["striped", 0.31], ["!", 0.3], ["grass", 0.2]],
             "candidates": [[f"{noun} [{i}]", 0.3, -1.0], ["no", 0.2, -2.0]]}
            for i, noun in enumerate(NOUNS)]


def write(path, records, **options):
    """Writes a gallery of these records, in two sections. Returns its HTML."""
    half = len(records) // 2
    sections = [(name, f"{len(part)} images", part, [("a reference",)] * len(part))
                for name, part in (("first", records[:half]), ("second", records[half:]))]
    write_gallery(path, "Captions", sections, **options)
    return path.read_text()


def sources(page):
    return re.findall(r'<img src="([^"]*)"', page)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------ the page

@pytest.mark.parametrize("most_inline, images", [(6, "data:"), (5, "'self' data:")])
def test_the_policy_names_the_pages_own_script_and_style_alone(tmp_path, records, most_inline,
                                                               images):
    page = write(tmp_path / "gallery.html", records, most_inline=most_inline)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    allowed = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert allowed.pop("img-src") == images
    for tag in "script", "style":
        text, = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert allowed.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert set(allowed.values()) == {"'none'"} and "default-src" in allowed
    body = page.partition("</style>")[2].partition("<script>")[0]
    assert not re.search(r"<[^>]* (style|on\w+)=", body)
    assert "eval" not in page and "innerHTML" not in page


def test_every_image_has_its_caption_its_size_and_its_own_button(tmp_path, records):
    page = write(tmp_path / "gallery.html", records)
    cards = page.split('<div class="card"')[1:]
    assert len(cards) == len(records)
    for number, (card, record) in enumerate(zip(cards, records)):
        assert f'<figure popover id="i{number}"><button popovertarget="i{number}"><img' in card
        width, height = map(int, re.search(r'width="(\d+)" height="(\d+)" loading="lazy"',
                                           card).groups())
        jpeg = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]*)", card)[1])))
        assert jpeg.size == (width, height) and max(jpeg.size) == SIDE
        assert html.unescape(re.search(r'alt="([^"]*)"', card)[1]) == record["caption"]
        assert "2 candidates, 1 reference<" in card


def test_entries_stand_as_bars_with_their_cosines(tmp_path, records):
    """Longer ones fit better. Those whose words are in the caption are marked; one without a word
    is not."""
    page = write(tmp_path / "gallery.html", records[:1] * 2)
    rows = re.findall(r'<li class="b(\d+)( used)?"><bdi>([^<]*)</bdi> ([\d.]+)', page)[:4]
    assert [(text, cosine) for _, _, text, cosine in rows] == [
        (text, f"{cosine:.3f}") for text, cosine in records[0]["table"]]
    lengths = [int(length) for length, *_ in rows]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == 20 and lengths[-1] > 0
    assert [bool(used) for _, used, *_ in rows] == [True, False, False, False]
    for length in lengths:
        assert f".b{length} {{ --long: {5 * length}% }}" in page


def test_a_long_table_is_folded(tmp_path, records):
    table = [[f"w{i}", 0.3 - i / 1000] for i in range(60)]
    page = write(tmp_path / "gallery.html", [{**records[0], "table": table, "candidates": []}] * 2)
    shown, _, more = page.partition("<details>")
    assert shown.count('<li class="b') == 24 and more.partition("</details>")[0].count("<li") == 37
    assert "<summary>36 more of the table, 1 reference<" in page


# --------------------------------------------------------------------------- images beside the page

def test_many_images_are_files_beside_the_page_and_go_with_it(tmp_path, records, monkeypatch):
    path, folder = tmp_path / "a page.html", tmp_path / "a page_files"
    inline = write(path, records)
    assert not folder.exists() and all(uri.startswith("data:") for uri in sources(inline))
    page = write(path, records, most_inline=5)
    names = [source.removeprefix("a%20page_files/") for source in sources(page)]
    assert files(folder) == {name: base64.b64decode(uri.partition(",")[2])
                             for name, uri in zip(names, sources(inline))}

    before = {name: (folder / name).stat().st_ino for name in names}
    (folder / names[1]).write_bytes(b"damaged")
    (folder / "mine.txt").write_text("a user's own")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 999_999_999)
        leftovers.temporary_path(folder / names[0]).write_text("of a killed run")
    assert write(path, records, most_inline=5) == page
    after = {name: (folder / name).stat().st_ino for name in names}
    assert {name for name in names if before[name] != after[name]} == {names[1]}  # written anew
    assert {*files(folder)} == {*names, "mine.txt"}

    write(path, records[2:], most_inline=1)
    assert {*files(folder)} == {*names[2:], "mine.txt"}
    (folder / "mine.txt").unlink()
    assert write(path, records) == inline and not folder.exists()


def test_a_stopped_run_leaves_the_earlier_page_whole(tmp_path, records):
    """Its images are there, with others that the next run removes."""
    def stopped():
        yield from records[3:5]
        raise KeyboardInterrupt

    path, folder = tmp_path / "gallery.html", tmp_path / "gallery_files"
    page = write(path, records[:3], most_inline=0)
    images = files(folder)
    with pytest.raises(KeyboardInterrupt):
        write_gallery(path, "Captions", [("a", "b", stopped(), [()] * 3)], most_inline=0)
    assert path.read_text() == page and len(files(folder)) == 5
    assert images.items() < files(folder).items()
    write(path, records[:3], most_inline=0)
    assert files(folder) == images


def test_no_link_leads_the_images_elsewhere(tmp_path, records):
    other = tmp_path / "other"
    other.mkdir()
    (other / f"{'0' * 16}.jpg").write_text("a user's own")
    (tmp_path / "gallery_files").symlink_to(other)
    with pytest.raises(InputError, match="gallery_files is a link"):
        write(tmp_path / "gallery.html", records, most_inline=0)
    write(tmp_path / "gallery.html", records)  # clears what is beside it
    assert {*files(other)} == {f"{'0' * 16}.jpg"}
    (tmp_path / "gallery_files").unlink()
    page = write(tmp_path / "gallery.html", records, most_inline=0)
    image = tmp_path / sources(page)[0]
    content = image.read_bytes()
    image.unlink()
    image.symlink_to(other / f"{'0' * 16}.jpg")
    write(tmp_path / "gallery.html", records, most_inline=0)
    assert not image.is_symlink() and image.read_bytes() == content
    assert (other / f"{'0' * 16}.jpg").read_text() == "a user's own"


class Record(dict):
    """A record that can be counted while it is in memory."""
    __hash__ = object.__hash__


def test_records_are_in_memory_one_after_the_other(tmp_path, records):
    living, most = weakref.WeakSet(), []

    class Records:
        where = False

        def read(self, pictures):
            for picture in pictures:
                record = Record(records[picture.id] | {"sha256": ""})
                living.add(record)
                most.append(len(living))
                yield record

    pictures = [Picture(i % 6, tmp_path, ("a reference",)) for i in range(40)]
    rows, _ = write_results(tmp_path, Records(), pictures, gallery=30)
    assert len(rows) == 40 and len(most) == 70 and max(most) <= 3
    assert len(sources((tmp_path / "gallery.html").read_text())) == 30


# ------------------------------------------------------------------------------------- in a browser

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window."""
    webdriver = pytest.importorskip("selenium.webdriver")
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not chromium:
        pytest.skip("Chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "window-size=1400,900", f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def find(browser):
    """find(selector) gives the elements that can be seen."""
    def seen(selector):
        return [element for element in browser.find_elements("css selector", selector)
                if element.is_displayed()]
    return seen


@pytest.fixture(params=["inline", "beside"])
def page(tmp_path, browser, records, request):
    """A gallery that the browser has opened as a file."""
    path = tmp_path / "a gallery" / "gallery.html"
    path.parent.mkdir()
    write(path, records, most_inline={"inline": 6, "beside": 0}[request.param])
    browser.get(path.as_uri())
    yield path
    assert browser.get_log("browser") == []  # no complaint of the policy either


@pytest.mark.slow
def test_a_page_is_searched_and_sorted(page, browser, find, records):
    def numbers():
        return [int(element.text.split()[0]) - 100 for element in find("figcaption .small")]

    search, = find("input")
    in_order, highest, lowest = browser.find_elements("css selector", "option")
    count, = find("output")
    assert numbers() == [*range(6)] and count.text == "6 images"
    for text, found in [("cat", [1, 3]), ("CAT a", [1, 3]), ("élan", [4]), ("e\u0301lan", [4]),
                        ("猫", [5]), ("[3]", [3]), ("103", [3]), ("striped dog", [0]), (".", []),
                        ("candidates", []), ("\\", []), ("bdi", []), ("", [*range(6)])]:
        browser.execute_script("arguments[0].value = arguments[1]; arguments[0].dispatchEvent("
                               "new Event('input'))", search, text)
        assert numbers() == found, text
        assert count.text == (f"{len(found)} of 6 images" if text else "6 images")
        sections = {number < 3 for number in found}  # one without images is not shown either
        assert len(find("h2")) == len(sections)

    def scores():
        return [[records[number]["score"] for number in part]
                for part in (numbers()[:3], numbers()[3:])]

    highest.click()
    assert all(part == sorted(part, reverse=True) for part in scores()) and numbers() != [*range(6)]
    lowest.click()
    assert all(part == sorted(part) for part in scores())
    in_order.click()
    assert numbers() == [*range(6)]


@pytest.mark.slow
def test_an_image_is_enlarged_by_mouse_and_keyboard(page, browser, find):
    """Without scripts, too, but for the arrow keys."""
    def enlarged():
        return [element.text.splitlines()[0] for element in find("figure:popover-open")]

    def press(key):
        browser.switch_to.active_element.send_keys(key)

    enter, escape, right, left = "\ue007", "\ue00c", "\ue014", "\ue012"
    first, second = find("figure button")[:2]
    assert browser.execute_async_script(
        "const done = arguments[0], image = document.images[0];"
        "image.decode().then(() => done(image.naturalWidth))") > 300
    small = first.size["width"]
    first.click()
    assert enlarged() == ["a dog [0]"] and first.size["width"] > 3 * small
    first.click()
    assert enlarged() == []
    second.send_keys(enter)
    press(right)
    assert enlarged() == ["scattered birds [2]"]
    press(left)
    press(left)
    press(left)
    assert enlarged() == ["a dog [0]"]
    press(escape)
    assert enlarged() == [] and browser.switch_to.active_element == first

    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.refresh()
        assert find("input, select") == [] and len(find("figure img")) == 6
        assert len(find("ol li")) == 24
        first = find("figure button")[0]
        first.send_keys(enter)
        assert first.size["width"] > 3 * small
        first.send_keys(escape)
        assert first.size["width"] == small
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def point(browser, element):
    """Moves the mouse to an element."""
    from selenium.webdriver import ActionChains
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    ActionChains(browser).move_to_element(element).perform()


@pytest.mark.slow
def test_an_entry_and_a_word_of_the_caption_light_their_map(tmp_path, browser, find, records):
    """By keyboard and by mouse; what CLIP did not see is dark."""
    maps = [[0.25, 0.3, "/wAAAA=="], None, [0.75, 0.7, "AAAA/w=="], [0.75, 0.3, "AP8AAA=="]]
    where = {"box": [0, 0.1, 1, 0.9], "side": 2, "maps": maps}
    write(tmp_path / "gallery.html", [record | {"where": where} for record in records])
    browser.get((tmp_path / "gallery.html").as_uri())

    def lit():
        """The darkness of five places of the image: the four quarters, and the top."""
        return browser.execute_script("""
          const canvas = document.querySelector("canvas"), pen = canvas?.getContext("2d");
          return canvas && [[.15, .2], [.85, .2], [.15, .8], [.85, .8], [.5, .05]].map(([x, y]) =>
            pen.getImageData(x * canvas.width, y * canvas.height, 1, 1).data[3])""")

    assert lit() is None
    card = find(".card")[0]
    first, striped, sign, grass = card.find_elements("css selector", "li[class^=b]")[:4]
    assert [entry.get_attribute("tabindex") for entry in (first, striped)] == ["0", None]
    for entry, bright in ((first, 0), (sign, 3), (grass, 1)):
        browser.execute_script("arguments[0].focus()", entry)
        dark = lit()
        assert dark.index(min(dark)) == bright and min(dark) < 10 and dark[4] > 190
    browser.execute_script("document.activeElement.blur()")
    point(browser, striped)
    assert lit() is None
    for word in card.find_elements("css selector", "[data-of]")[:2]:  # "a dog [0]"
        point(browser, word)
        assert lit()[0] < 10
        assert "lit" in first.get_attribute("class") and "lit" in word.get_attribute("class")
    point(browser, find("h1")[0])
    assert lit() is None and not find(".lit")
    find("figure button")[0].click()  # enlarged
    point(browser, find("figure:popover-open [data-of]")[1])
    veil, image = find("canvas")[0].rect, find("figure:popover-open img")[0].rect
    assert lit()[0] < 10 and veil == image
    assert not [line for line in browser.get_log("browser") if line["level"] != "WARNING"]


@pytest.mark.slow
@pytest.mark.parametrize("width, dark", [(390, False), (390, True), (1400, True)])
def test_the_page_fits_a_phone_and_the_dark(page, browser, find, width, dark):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        style = "return getComputedStyle(arguments[0])[arguments[1]]"
        brightness = [int(re.search(r"\d+", browser.execute_script(style, element, name))[0])
                      for element, name in ((find("body")[0], "backgroundColor"),
                                            (find(".caption")[0], "color"))]
        assert (brightness[0] < brightness[1]) == dark
        assert abs(brightness[0] - brightness[1]) > 150
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.slow
def test_the_policy_stops_another_script(tmp_path, browser, records):
    """Even one that found its way into the page."""
    path = tmp_path / "gallery.html"
    write(path, records)
    evil = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    with open(path, "a", encoding="utf-8") as file:
        file.write(evil)
    browser.get(path.as_uri())
    assert browser.find_elements("css selector", "img[onerror]") and browser.title == "Captions"
    blocked = [entry for entry in browser.get_log("browser")
               if "Content Security Policy" in entry["message"]]
    assert len(blocked) >= 2
