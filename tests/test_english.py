"""Captions of every kind read well after "there"."""

import pytest

from antarctic.english import noun_phrase, participle, stem


@pytest.mark.parametrize("caption, phrase", [
    # articles, counts, quantities
    ("A whale.", "was a whale"),
    ("an old clock", "was an old clock"),
    ("Two giraffes near a tree", "were two giraffes near a tree"),
    ("2 dogs", "were 2 dogs"),
    ("1 dog", "was 1 dog"),
    ("Several boats in the sand", "were several boats in the sand"),
    ("Some people on a bus", "were some people on a bus"),
    ("Some food on a table", "was some food on a table"),
    ("A few birds", "were a few birds"),
    ("A couple of sheep in a field", "were a couple of sheep in a field"),
    ("A couple on a bench", "was a couple on a bench"),
    ("A group of people on a beach", "was a group of people on a beach"),
    ("A lot of cars on a road", "were a lot of cars on a road"),
    ("Lots of food on a plate", "was lots of food on a plate"),
    ("Someone in a kitchen", "was someone in a kitchen"),
    # nouns without an article
    ("Giraffes standing in a zoo", "were giraffes standing in a zoo"),
    ("People on a beach", "were people on a beach"),
    ("Man riding a wave", "was a man riding a wave"),
    ("Old man on a bench", "was an old man on a bench"),
    ("Uniformed men near a bus", "were uniformed men near a bus"),
    ("Unicorn in a wood", "was a unicorn in a wood"),
    ("Traffic on a bridge", "was traffic on a bridge"),
    ("Food on a plate", "was food on a plate"),
    ("Black and white cows in a field", "were black and white cows in a field"),
    ("Parking meter on a street", "was a parking meter on a street"),
    # what the story has not mentioned yet has no "the"
    ("The man on the roof", "was a man on the roof"),
    ("The dogs", "were dogs"),
    ("The whale", "was a whale"),
    ("whale", "was a whale"),
    ("The two sheep in a pen", "were two sheep in a pen"),
    ("The inside of a train", "was the inside of a train"),
    ("Those zebras near a lake", "were zebras near a lake"),
    # names keep their capitals
    ("Geoff Hinton on a bus", "was Geoff Hinton on a bus"),
    ("Antarctica", "was Antarctica"),
    ("Chinese food on a plate", "was Chinese food on a plate"),
    # words that only say that there is a picture
    ("There is a dog on a couch.", "was a dog on a couch"),
    ("There are two cats", "were two cats"),
    ("This is a picture of a kitchen", "was a kitchen"),
    ("An image of two men at a table", "were two men at a table"),
    ("A close up of a hot dog", "was a hot dog"),
    ("A black and white photo of people on a street", "were people on a street"),
    ("these are three giraffes", "were three giraffes"),
    # sentences
    ("A man is sitting on a bench.", "was a man sitting on a bench"),
    ("Two dogs are running", "were two dogs running"),
    ("A dog is on a couch", "was a dog on a couch"),
    ("The street light is green", "was a street light that was green"),
    ("A statue that is in front of a house", "was a statue in front of a house"),
    ("A cat sits on a bed", "was a cat sitting on a bed"),
    ("Batter punts a ball", "was a batter punting a ball"),
    ("Two boys play tennis", "were two boys playing tennis"),
    ("A group of people fly kites", "was a group of people flying kites"),
    ("A man plays tennis on a court", "was a man playing tennis on a court"),
    ("A bus stop in a town", "was a bus stop in a town"),
    ("A man watching kites and birds", "was a man watching kites and birds"),
    ("People sit and walk around a lake", "were people sitting and walking around a lake"),
    ("A man in a suit lies on a couch", "was a man in a suit lying on a couch"),
    ("A kitchen has a stove in it", "was a kitchen with a stove in it"),
    ("The wine has been poured", "was wine that had been poured"),
    ("A laptop that is to have a lid", "was a laptop to have a lid"),
    ("A kitten as a pet", "was a kitten as a pet"),
    ("Looking out of a window at a bus", "was someone looking out of a window at a bus"),
    # capitals and punctuation
    ("A MAN ON A BIKE", "was a man on a bike"),
    ("TWO DOGS ARE PLAYING", "were two dogs playing"),
    ("A dog!", "was a dog"),
    ("a dog , a cat and a bus .", "was a dog , a cat and a bus"),
    # a text that is not a phrase stays as it is
    ("!", "was !"),
    ("\u732b", "was \u732b"),
])
def test_a_caption_is_a_noun_phrase_behind_there(caption, phrase):
    assert " ".join(noun_phrase(caption)) == phrase


@pytest.mark.parametrize("verb, in_ing", [
    ("sits", "sitting"), ("rides", "riding"), ("lies", "lying"), ("carries", "carrying"),
    ("reaches", "reaching"), ("uses", "using"), ("passes", "passing"), ("poses", "posing"),
    ("eats", "eating"), ("looks", "looking"), ("sees", "seeing"), ("goes", "going"),
    ("wears", "wearing"), ("waxes", "waxing"), ("opens", "opening"), ("hits", "hitting"),
])
def test_participles(verb, in_ing):
    assert participle(stem(verb)) == in_ing
