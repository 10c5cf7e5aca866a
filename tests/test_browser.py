"""The page in a real browser: Debian's chromium, headless, with its driver."""

import json
import re
import shutil
import time
from contextlib import suppress

import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not "
                       "installed (apt-get install chromium chromium-driver)")]
QUIET = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")


class Browser:
    """A chromium on the page. width: pixels of its window. dark: the visitor's preference."""

    def __init__(self, served, profile, width=1400, dark=False):
        options = webdriver.ChromeOptions()
        for argument in (*QUIET, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.binary_location = CHROMIUM
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})
        if dark:
            preference = {"name": "prefers-color-scheme", "value": "dark"}
            self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
        self.served = served
        self.driver.get(served.address)
        self.wait(lambda: self.find("#photo input[type=file]"))

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def wait(self, holds, seconds=20):
        """What holds() returns, once it is true."""
        end, value = time.monotonic() + seconds, None
        while time.monotonic() < end:
            with suppress(WebDriverException):
                value = holds()
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} seconds; the caption is {self.caption()!r}")

    def caption(self):
        return "".join(part.text for part in self.driver.find_elements(By.ID, "caption"))

    def entries(self):
        """The entries of all tables on the page."""
        return [part.text for part in self.driver.find_elements(By.CSS_SELECTOR, ".ac-entry")]

    def drop(self, path):
        self.find("#photo input[type=file]").send_keys(str(path))
        return self.wait(self.caption)

    def type(self, box, text):
        self.find(f"#{box} textarea, #{box} input").send_keys(text)

    def overflow(self):
        """How many pixels the page is wider than the window."""
        return self.driver.execute_script(
            "return document.documentElement.scrollWidth - innerWidth")


@pytest.fixture
def browse(served, tmp_path):
    """browse(**settings) opens a Browser. At its end no error is in the console, and the page has
    asked nobody but its own server."""
    opened = []

    def browse(**settings):
        opened.append(Browser(served, tmp_path / f"profile{len(opened)}", **settings))
        return opened[-1]

    yield browse
    errors, addresses = [], []
    for browser in opened:
        with suppress(WebDriverException):
            errors += [entry["message"] for entry in browser.driver.get_log("browser")
                       if entry["level"] == "SEVERE"]
            for entry in browser.driver.get_log("performance"):
                message = json.loads(entry["message"])["message"]
                if message["method"] == "Network.requestWillBeSent":
                    addresses.append(message["params"]["request"]["url"])
        browser.driver.quit()
    own = (served.address, "data:", "blob:", "chrome:")  # chrome: its own first, empty window
    assert not errors and not [url for url in addresses if not url.startswith(own)]
    assert any(url.startswith(served.address) for url in addresses)


def test_a_word_comes_and_goes(browse, served):
    browser = browse()
    assert "penguin" not in browser.drop(served.penguin)
    browser.type("own-words", "penguin\npenguins")
    browser.wait(lambda: "penguin" in browser.caption())
    marked = [mark.text for mark in browser.driver.find_elements(By.CSS_SELECTOR, ".ac-new mark")]
    assert "penguin" in marked
    assert browser.find(".ac-sides.two section:nth-child(2) h3").text == "Before"
    browser.type("ban-words", "penguin\npenguins")
    browser.wait(lambda: browser.caption() and "penguin" not in browser.caption())


def test_search_save_and_story(browse, served):
    browser = browse()
    browser.drop(served.penguin)
    browser.type("own-words", "penguin")
    browser.wait(lambda: "penguin" in browser.caption())
    next(button for button in browser.driver.find_elements(By.CSS_SELECTOR, "button.label-wrap")
         if "Search" in button.text).click()
    browser.wait(lambda: browser.find("#search textarea, #search input").is_displayed())
    browser.type("search", "penguin" + Keys.ENTER)
    assert "in the vocabulary" in browser.wait(lambda: browser.find("#found .ac-card").text)
    browser.find("#save").click()
    assert "sampler.py" in browser.wait(lambda: browser.find("#saved .ac-code").text)
    assert [path.read_text() for path in served.saved.glob("*.txt")] == ["penguin\n"]
    browser.find("#tell").click()
    assert browser.wait(lambda: browser.find("#story .ac-card").text).startswith("Once upon a time")


def test_many_images(browse, served, world):
    browser = browse()
    next(tab for tab in browser.driver.find_elements(By.CSS_SELECTOR, "button[role=tab]")
         if "Many" in tab.text).click()
    pictures = sorted((world / "near").glob("*.png"))[:4]
    text = served.folder / "<img src=x onerror=alert(1)>.png"
    text.write_text("no image")
    files = browser.wait(lambda: browser.find("#files input[type=file]"))
    files.send_keys("\n".join(map(str, [*pictures, text])))
    browser.wait(lambda: browser.find("#files").text.count(".png") == 5)
    browser.find("#many").click()
    browser.wait(lambda: browser.find("#downloads a"))
    state = browser.find("#state").text
    assert "5 of 5 images" in state and "Left out: 1" in state
    assert len(browser.driver.find_elements(By.CSS_SELECTOR, "#gallery img")) >= 4
    assert not browser.driver.find_elements(By.CSS_SELECTOR, "#state img")


def test_hostile_words_are_text(browse, served):
    browser = browse()
    browser.drop(served.penguin)
    hostile = '<img src=x onerror="document.title=1">${document.title=2}'
    browser.type("only-words", hostile + "\n<script>document.title=3</script>\nsea")
    browser.wait(lambda: browser.find(".ac-sides.two"))
    assert hostile in browser.entries()
    assert not browser.driver.find_elements(By.CSS_SELECTOR, "#result img, #result script")
    assert browser.driver.title == "antarctic-captions"


def test_pointing_at_an_entry_lights_where_it_was_seen(browse, served):
    browser = browse()
    browser.drop(served.penguin)
    first, second = browser.driver.find_elements(By.CSS_SELECTOR, ".ac-bars [data-map]")[:2]
    ActionChains(browser.driver).move_to_element(first).perform()
    veil = browser.wait(lambda: browser.find("#photo canvas"))
    assert veil.rect == pytest.approx(browser.find("#photo img").rect, abs=1)
    drawn = "return arguments[0].toDataURL()"
    before = browser.driver.execute_script(drawn, veil)
    browser.driver.execute_script("arguments[0].focus()", second)
    assert browser.driver.execute_script(drawn, browser.find("#photo canvas")) != before
    assert len(browser.driver.find_elements(By.CSS_SELECTOR, "#photo canvas, .ac-lit")) == 2
    ActionChains(browser.driver).move_to_element(browser.find("h1")).perform()
    assert not browser.driver.find_elements(By.CSS_SELECTOR, "#photo canvas, .ac-lit")


def test_pointing_at_a_word_of_the_caption_lights_the_entry_that_spells_it(browse, served):
    browser = browse()
    browser.drop(served.penguin)
    word = browser.find("#caption [data-of]")
    ActionChains(browser.driver).move_to_element(word).perform()
    browser.wait(lambda: browser.find("#photo canvas"))
    lit = browser.find(".ac-bars .ac-lit .ac-entry").text
    assert word.text.lower() in lit and "ac-lit" in word.get_attribute("class")
    ActionChains(browser.driver).move_to_element(browser.find("h1")).perform()
    assert not browser.driver.find_elements(By.CSS_SELECTOR, "#photo canvas, .ac-lit")


def test_a_name_is_taught_from_photos_and_forgotten(browse, served, photos):
    browser, other = browse(), browse()
    new = sorted((photos / "new").iterdir())[0]
    browser.drop(new)
    assert "Tom" not in browser.entries()
    browser.find("#teaching button.label-wrap").click()
    files = browser.wait(lambda: browser.find("#teach-photos input[type=file]"))
    files.send_keys("\n".join(str(path) for path in sorted((photos / "Tom").iterdir())))
    browser.wait(lambda: browser.find("#teach-photos").text.count(".png") == 5)
    browser.find("#teach").click()
    assert "a name must be" in browser.wait(lambda: browser.find("#taught .ac-problem").text)
    browser.type("teach-name", "Tom")
    browser.type("teach-phrase", "a cat" + Keys.ENTER)
    told = browser.wait(lambda: browser.find("#taught .ac-card:not(.ac-problem)").text)
    assert "Tom, a cat: would be named in" in told and "of 120 others" in told
    wrong = int(re.search(r"wrongly in (\d+)", told)[1])
    shown = browser.driver.find_elements(By.CSS_SELECTOR, "#taught img")
    assert len(shown) == min(8, wrong)
    assert browser.wait(lambda: "Tom" in browser.entries())  # BART reads its class word
    assert browser.find(".ac-sides.two section:nth-child(2) h3").text == "Before"
    other.drop(new)
    assert "Tom" not in other.entries()  # of another visitor
    browser.find("#forget").click()
    browser.wait(lambda: browser.entries() and "Tom" not in browser.entries())
    assert browser.overflow() <= 0


def test_a_phone_s_window(browse, served):
    browser = browse(width=390)
    browser.drop(served.penguin)
    browser.type("own-words", "penguin\na line that is rather long for a narrow window, as it has "
                              "many words")
    browser.wait(lambda: browser.find(".ac-sides.two"))
    assert browser.overflow() <= 0
    photo, result, words = (browser.find(f"#ac-{name}").rect["y"]
                            for name in ("photo", "result", "words"))
    assert photo < result < words


def test_dark_mode_is_legible(browse, served):
    browser = browse(dark=True)
    browser.drop(served.penguin)
    browser.type("own-words", "penguin")
    browser.wait(lambda: "penguin" in browser.caption())
    shades = browser.driver.execute_script("""
        const shade = colour => colour.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + +b, 0);
        return [".ac-caption mark", ".ac-card h3", ".ac-entry"].map(selector => {
          let node = document.querySelector(selector);
          const text = shade(getComputedStyle(node).color);
          while (/rgba\\(0, 0, 0, 0\\)|transparent/.test(getComputedStyle(node).backgroundColor))
            node = node.parentElement;
          return [text, shade(getComputedStyle(node).backgroundColor)];
        })""")
    assert shades[1][1] < 200  # the cards are dark
    assert all(abs(text - ground) > 250 for text, ground in shades), shades


def test_the_keyboard_alone(browse, served):
    """An example by Tab and Enter, then a word."""
    browser = browse()

    def focus(selector):
        for _ in range(60):
            browser.driver.switch_to.active_element.send_keys(Keys.TAB)
            if browser.driver.execute_script(
                    "return document.activeElement.matches(arguments[0])", selector):
                return browser.driver.switch_to.active_element
        raise AssertionError(f"Tab does not lead to {selector}")

    focus("#examples button").send_keys(Keys.ENTER)
    browser.wait(browser.caption)
    focus("#own-words textarea").send_keys("lighthouse")
    browser.wait(lambda: browser.find(".ac-sides.two"))
    focus("#use-words").send_keys(Keys.ENTER)


def test_a_visitor_who_leaves_stops_nobody_else(browse, served):
    leaving, staying = browse(), browse()
    leaving.find("#photo input[type=file]").send_keys(str(served.penguin))
    leaving.driver.get("about:blank")
    assert staying.drop(served.penguin)
