"""What a caption came from: its words and those of its table."""

import json
import re

import pytest
from conftest import commands
from robustness.test_hostile import bounded

from antarctic import evidence
from antarctic.gallery import caption_text, cover_text

TABLE = [("two dogs", 0.3), ("sandy beach", 0.2), ("RED", 0.1)]


@pytest.mark.parametrize("caption, missing, share", [
    ("a red dog on the beach", set(), 1),
    ("Two dogs, behind a Beach!", set(), 1),  # numbers and places are no content
    ("a red penguin on the beach", {"penguin"}, 2 / 3),
    ("penguins", {"penguin"}, 0),
    ("the glass", {"glass"}, 0),  # no plural
    ("in the front of it", set(), None), ("", set(), None), ("?!", set(), None)])
def test_words_that_no_entry_says_are_found(caption, missing, share):
    assert evidence.from_nowhere(caption, TABLE) == missing
    assert evidence.cover(caption, TABLE) == (share if share is None else pytest.approx(share))


@pytest.mark.parametrize("one, other", [
    ("dogs", "dog"), ("ponies", "pony"), ("cookies", "cookie"), ("buses", "bus"),
    ("horses", "horse"), ("knives", "a knife"), ("women", "Woman"), ("ties", "tie"),
    ("riding", "rides"), ("sitting", "sits"), ("skiing", "ski"), ("parked", "park"),
    ("Geoff Hinton", "geoff hinton"), ("Stra\xdfe", "STRASSE"), ("e\u0301lan", "\xe9lan"),
    ("\u0915\u0941\u0924\u094d\u0924\u093e", "\u0915\u0941\u0924\u094d\u0924\u093e")])  # Hindi
def test_forms_of_a_word_are_one(one, other):
    assert evidence.content(one) == evidence.content(other) and len(evidence.content(one)) < 3


@pytest.mark.parametrize("one, other", [("string", "str"), ("seed", "se"), ("red", "r"),
                                        ("dog", "hotdog"), ("bus", "bu"), ("glass", "glas")])
def test_other_words_are_others(one, other):
    assert not evidence.content(one) & evidence.content(other)


def test_a_script_without_spaces_is_taken_letter_by_letter():
    table = [("\u72ac", 0.3), ("\u732b", 0.2)]
    assert evidence.cover("\u72ac\u3068\u732b", table) == pytest.approx(2 / 3)
    shown = caption_text("\u72ac\u3068\u732b", table)
    assert re.fullmatch("<bdi>\u72ac<u [^>]*>\u3068</u>\u732b</bdi>", shown)


def test_an_entry_is_used_where_all_of_its_words_are_in_the_caption():
    table = [*TABLE, ("two", 0.1), ("!", 0.1), ("red dog", 0.1)]
    assert evidence.used_entries("two dogs, a red one", table) == ["two dogs", "RED", "two",
                                                                   "red dog"]
    assert [used for *_, used, _ in evidence.graded(table, "two dogs")] == [True] + 2 * [False] + [
        True, False, False]


def test_words_are_marked_where_they_stand_and_stay_text():
    shown = caption_text("two <b> penguins, a  dog", TABLE)
    assert shown.startswith("<bdi>two &lt;<u title=") and shown.count("<u ") == 2
    assert ">b</u>&gt;" in shown and ">penguins</u>, a  dog</bdi>" in shown
    both = caption_text("a red penguin", TABLE, known={"a", "red"})
    assert re.fullmatch("<bdi>a red <mark><u [^>]*>penguin</u></mark></bdi>", both)
    assert caption_text("a dog", TABLE, known={"a"}) == "<bdi>a <mark>dog</mark></bdi>"
    assert cover_text("a red penguin on the beach", TABLE) == " · 67% of its words are in the table"
    assert cover_text("", TABLE) == ""


@pytest.mark.parametrize("text", ["x" * 10 ** 5, "ab " * 10 ** 5, "\u0301" * 10 ** 5,
                                  "\u72ac" * 10 ** 5, "ing" * 10 ** 5, "\x1b[2J\0\ud800" * 10 ** 4],
                         ids=range(6))
def test_texts_made_to_take_long_take_no_longer(text):
    with bounded():
        assert evidence.cover(text, [(text, 0.3)] * 3) in (1, None)
        assert caption_text(text, [(text, 0.3)]).count("<u") == 0


def test_details_hold_how_much_the_table_says(script, world, cache, checkpoint, tmp_path):
    sampler = commands(world, cache, checkpoint)["sampler"]
    assert script("sampler", *sampler(tmp_path, gallery=99)).code == 0
    with open(tmp_path / "details.jsonl") as file:
        records = list(map(json.loads, file))
    for record in records:
        share = evidence.cover(record["caption"], record["table"])
        assert record["cover"] == (share if share is None else round(share, 3))
        assert record["used"] == evidence.used_entries(record["caption"], record["table"])
    page = (tmp_path / "gallery.html").read_text()
    assert page.count("of its words are in the table") == sum(r["cover"] is not None
                                                              for r in records)
