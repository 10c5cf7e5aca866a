"""Turns a caption into the first sentence of a story: "Two dogs run." to "were two dogs running".

The rules and short word lists fit captions of COCO's annotators and of models trained on them. They
need no parser and no data. Two capitalized words in a row are a name.
"""

import re

OPENING = "Once upon a time there {was} {caption}"


def words_of(text):
    return frozenset(text.split())


# Words that say only that there is a picture. A story is about its content.
FRAME = re.compile(r"""(?ix) (
    there(\ is|\ are|\ was|\ were|'s|\ appears?\ to\ be|\ seems?\ to\ be)
    | (this|that|it|here)(\ is|'s|\ appears\ to\ be|\ seems\ to\ be|\ looks\ like|\ shows)
    | (these|those|here|they)\ are | (i|we|you)(\ can)?\ see
    | (an?\ |the\ |this\ )? ([\w-]+\ (and\ [\w-]+\ )?){0,2}?
      (picture|image|photo|photograph|shot|view|close[-\ ]?up)
      (\ (picture|image|photo|photograph|shot|view|is))?\ (of|showing|shows|taken\ of) )\s""")
DEFINITE = words_of("the this that these those")
SINGULAR = words_of("a an one another each every someone somebody something 1")
PLURAL = words_of("two three four five six seven eight nine ten eleven twelve several many "
                  "multiple numerous various few both all")
EITHER = words_of("some most no more lots plenty my his her its our their half")
MANY = re.compile(r"(?i)(an? )?(few|couple of|dozen|number of|variety of)\b")
PART = re.compile(r"(a lot|lots|plenty|some|half) of (the |these )?")  # number as of the noun
PLURAL_NOUNS = words_of("people men women children sheep cattle police geese mice feet teeth")
SINGULAR_NOUNS = words_of("bus tennis grass christmas series lens gas news")  # and those in -ss
MASS = words_of("""food traffic water snow meat fruit broccoli luggage furniture grass bread rice
    soup pasta cheese graffiti equipment wood stuff sand clothing silverware smoke corn bacon
    chicken salad coffee wine beef soap baseball tennis""")
NAMES = words_of("african american asian british chinese christmas english french german italian "
                 "japanese mexican")
NOUNS_IN_ING = words_of("""building painting living dining parking ceiling king string ring wing
    thing nothing morning evening swing wedding drawing clothing shopping vending baking
    racing fishing""")
VERBS = words_of("""sit stand ride hold walk look fly swing take prepare pose play lean lie lay
    smile throw pull get eat drive rest stare watch hang contain pass reach carry talk sleep jump
    wear read graze wait run use cross lead kneel stop sniff travel gather swim surf perform perch
    show try attempt enjoy go make""")
AUXILIARY = {"is": "was", "are": "were", "has": "had", "have": "had"}
DETERMINERS = words_of("a an the his her its their another one two three")
AFTER_VERBS = words_of("""a an the this that his her its their some two three four one on in at of
    to of with by near next from inside outside over under above below behind beside between against
    along around through into onto across down up out off as while together for like past toward
    towards atop underneath amongst among before after about back there each other another many
    several it them him upside alone and or who which where during amid without ready made seen
    shown set full""")


def is_plural(noun):
    noun = noun.lower().strip(",.;")
    in_s = noun.endswith("s") and not noun.endswith(("ss", "us", "'s"))
    return noun in PLURAL_NOUNS or in_s and noun not in SINGULAR_NOUNS


def stem(verb):
    """"sit" of "sits", "carry" of "carries", "lie" of "lies", "reach" of "reaches"."""
    if verb.endswith("ies") and len(verb) > 4:
        return verb[:-3] + "y"
    return verb[:-2] if re.search("(ss|x|zz|o|sh|ch)es$", verb) else verb[:-1]


def participle(verb):
    """"sitting" of "sit", "riding" of "ride", "lying" of "lie"."""
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if re.search("[^eo]e$", verb):
        return verb[:-1] + "ing"
    return verb + verb[-1] * bool(re.fullmatch("[^aeiou]*[aeiou][^aeiouwxy]", verb)) + "ing"


def ends_noun_phrase(word):
    word = word.lower()
    return not word or word.endswith(("ing", "ed")) or word in AFTER_VERBS


def finite_verb(words, i, in_head):
    """The stem of word i if it is a finite verb, else None.

    A finite verb is one of VERBS after a noun of its number, or any word in -s after a singular
    noun phrase and before a word that ends one. in_head: whether word i can still belong to the
    first noun phrase.
    """
    before, word, after = (w.lower() for w in [*words, ""][i - 1:i + 2])
    inside = before in AFTER_VERBS - {"and"} | PLURAL | SINGULAR or before.endswith("ing")
    if inside or word in AUXILIARY or word in AFTER_VERBS:
        return None
    ends, known = ends_noun_phrase(after), (stem(word) if word.endswith("s") else word) in VERBS
    if not word.endswith("s"):
        plural = is_plural(before) or ends and "and" in words[:i]
        return word if known and plural else None
    one = words[0].lower() in SINGULAR and not MANY.match(" ".join(words[:3]))
    if known and (ends or one and in_head and not is_plural(after)):
        return stem(word)
    other = in_head and is_plural(word) and (one and after != "of" or after in DETERMINERS)
    return stem(word) if other and ends else None


def auxiliary(word, after, main, relative):
    """The words that replace "is", "are", "has" or "have", so that no verb in the present tense
    remains.

    word, after: the auxiliary and the word after it. main: whether it is the verb of the main
    clause or of a relative clause. relative: whether "that", "which" or "who" is before it.
    """
    if main and word in ("is", "are") and ends_noun_phrase(after) and after not in DETERMINERS:
        return []  # "a man is on a bus"
    if main and word in ("has", "have") and not after.endswith(("ed", "been")):
        return ["with"]
    return ["that", AUXILIARY[word]] if main and not relative else [AUXILIARY[word]]


def without_finite_verbs(words):
    """"A man is sitting" and "A man sits" become "A man sitting", "A room has a bed" becomes "A
    room with a bed". Takes and returns a list of words."""
    out, waiting, in_head = words[:1], True, True  # waiting: for the verb of the main clause
    for i, word in enumerate(words[1:], 1):
        low, after = word.lower(), " ".join(words[i + 1:i + 2]).lower()
        relative = out[-1].lower() in ("that", "which", "who")
        main = (waiting or relative) and out[-1] != "there"
        verb = finite_verb(words, i, in_head) if main or out[-1] == "and" else None
        if low in AUXILIARY and out[-1] not in ("to", "may", "not"):
            new = auxiliary(low, after, main, relative)
        else:
            new = [participle(verb)] if verb and (out[-1] != "and" or not waiting) else [word]
        if relative and new not in ([word], [AUXILIARY.get(low)]):
            out.pop()
        waiting = waiting and new == [word] and low not in ("while", "as", "where", "when")
        in_head = in_head and not ends_noun_phrase(low)
        out += new
    return out


def head_of(words):
    """The noun of the first noun phrase: "cows" of "black and white cows in a field"."""
    for i, word in enumerate(words[1:], 1):
        joins = word == "and" and i + 1 < len(words) and not ends_noun_phrase(words[i + 1])
        ends = ends_noun_phrase(word) and word.lower() not in NOUNS_IN_ING and not joins
        if ends or words[i - 1].endswith(","):
            return words[i - 1]
    return words[-1]


def article(word):
    """The article before a singular: "a" or "an"."""
    return "an" if re.match("(?!uni|use|one|eu)[aeiou]|hour", word.lower()) else "a"


def with_article(words, known=False):
    """The words as inside of a sentence: a singular noun gets an article, and only names keep a
    capital. known: whether "the" was before the words, so that they are not a name."""
    first, head = words[0].lower(), head_of(words)
    if first in SINGULAR | PLURAL | EITHER | DEFINITE:
        return [first, *words[1:]]
    name = not words[0][:1].islower() and (len(words) == 1 or words[1][:1].isupper())
    if name and not known:
        return words
    bare = words if first in NAMES else [words[0][:1].lower() + words[0][1:], *words[1:]]
    if is_plural(head) or head.lower() in MASS:
        return bare
    return [article(first), *bare]


def noun_phrase(caption):
    """The words after "there": ("was" or "were", the caption as a noun phrase)."""
    text = caption.strip(" .,!?")
    text = text.lower() if text.isupper() and " " in text else text
    while frame := FRAME.match(text):
        text = text[frame.end():]
    words = text.split() or [caption]
    low = words[0].lower()
    if low.endswith("ing") and low not in NOUNS_IN_ING and ends_noun_phrase("".join(words[1:2])):
        words = ["someone", low, *words[1:]]
    words = without_finite_verbs(words)
    known = words[0].lower() in DEFINITE and len(words) > 1 and words[2:3] != ["of"]
    words = with_article(words[known:], known)  # no "the": the story has not mentioned it yet
    first, phrase = words[0], " ".join(words)
    if part := PART.match(phrase):
        plural = is_plural("".join(phrase[part.end():].split()[:1]))
    else:
        plural = first not in SINGULAR and is_plural(head_of(words))
    counted = first in PLURAL or first.isdecimal() and first != "1" or MANY.match(phrase)
    return "were" if counted or plural else "was", phrase


def fill(template, caption):
    """The prompt: a template whose {caption} becomes the caption, as the middle of a sentence.

    Other braces stay as they are.
    """
    if "{was}" in template:
        was, caption = noun_phrase(caption)
        template = template.replace("{was}", was)
    else:
        article, *rest = caption.rstrip(" .").split()
        if article in ("A", "An", "The") and not template.startswith("{caption}"):
            article = article.lower()  # another word's capital may be a name's
        caption = " ".join([article, *rest])
    prompt = template.replace("{caption}", caption)
    return prompt.encode("utf-8", "replace").decode()  # tokenizers refuse lone surrogates
