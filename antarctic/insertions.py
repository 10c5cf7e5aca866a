"""Candidates with an entry of the table that none of them says, in English.

A language model that has not seen a new word in training often leaves it out, although CLIP put it
into the table. Here the entry takes the place of a noun phrase, or comes at the end, and CLIP says
whether that fits better.
"""

import re

from antarctic.english import article
from antarctic.evidence import VERB, content
from antarctic.taught import Thing

MOST_ENTRIES, MOST_TEXTS = 3, 10  # entries of a table; candidates, of which the likeliest are taken


def unsaid(candidates, table):
    """The nouns among the entries of a table that no candidate says, at most MOST_ENTRIES: single
    words, but for plurals and verbs by their endings. candidates: texts. table: (entry, cosine)
    pairs."""
    said = set().union(*map(content, candidates))
    nouns = [entry for entry, _ in table
             if re.fullmatch(r"[^\W\d_]{2,}", entry) and content(entry) - said
             and not VERB.fullmatch(entry) and not re.search("[^su]s$", entry)]
    return nouns[:MOST_ENTRIES]


def insertions(candidates, table):
    """Candidates in which an entry stands that none of them says, each as likely as what it was
    made of: {text: likelihood}, without the candidates. candidates: {text: likelihood}. table:
    (entry, cosine) pairs."""
    likeliest = sorted(candidates.items(), key=lambda each: -each[1])[:MOST_TEXTS]
    made = {}
    for noun in unsaid(candidates, table):
        name = f"{article(noun)} {noun}"
        for text, likelihood in likeliest:
            for new in (*Thing(name, name).called(text, anything=True), f"{text} and {name}"):
                made.setdefault(new, likelihood)
    return {text: likelihood for text, likelihood in made.items() if text not in candidates}
