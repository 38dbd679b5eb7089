"""The search of WebShop: Lucene's BM25 over text in Latin script, result for result, in plain numpy.

WebShop searches with Lucene through pyserini. What decides the order of two products that fit about equally well is
small print: stems, lengths that are remembered in one byte, single-precision scores. All of it is here, so that a page
of results is WebShop's page; libraries that compute BM25 in their own way order it otherwise.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
import regex
import Stemmer

K1, B = np.float32(0.9), np.float32(0.4)  # pyserini's, not Lucene's own 1.2 and 0.75
# A word stands between two word boundaries of Unicode (3.5, u.s.a. and women's are one word each) and begins with a
# letter, a digit or a pictograph, which were more when Lucene was built than they are now: stars, cards, notes.
BOUNDARY = regex.compile(r"(?V1w)\b")
FORMER = "\u2388\u2600-\u2605\u2607-\u2612\u2614-\u2685\u2690-\u2705\u2708-\u2712\u2763-\u2767\U0001f000-\U0001f64f"
SPOKEN = regex.compile(rf"_*[\p{{Alphabetic}}\p{{Nd}}\p{{Extended_Pictographic}}{FORMER}]")
LONGEST = 255  # characters of a word; what is longer is cut up
STOP_WORDS = """a an and are as at be but by for if in into is it no not of on or such that the their then there these
they this to was will with""".split()  # noqa: SIM905
STEMMER = Stemmer.Stemmer("porter")


def search_words(text: str) -> list[str]:
    """The words that the search compares: no possessive 's, no stop words, Porter stems.

    >>> search_words("The men's running shoes, size 9.5")
    ['men', 'run', 'shoe', 'size', '9.5']
    """
    found = (word for word in BOUNDARY.split(text.lower()) if SPOKEN.match(word))
    pieces = (word[start : start + LONGEST] for word in found for start in range(0, len(word), LONGEST))
    words = (regex.sub("['\u2019\uff07]s$", "", word) for word in pieces)
    return [STEMMER.stemWord(word) or word for word in words if word not in STOP_WORDS]


def remembered_length(length: int) -> int:
    """What Lucene remembers of a text's length: exact up to 39 words, then four significant bits above 24.

    >>> [remembered_length(n) for n in (7, 39, 57, 1000)]
    [7, 39, 56, 984]
    """
    shift = max(0, (length - 24).bit_length() - 4) if length > 24 else 0
    return 24 + ((length - 24) >> shift << shift)


class Index:
    """Texts that can be searched. texts: (id, text) pairs; of two with the same score the earlier one comes first."""

    def __init__(self, texts: Iterable[tuple[str, str]]):
        self._ids, lengths = [], []
        postings = defaultdict(lambda: (array("i"), array("i")))  # word -> numbers of the texts that have it, how often
        for number, (name, text) in enumerate(texts):
            words = search_words(text)
            self._ids.append(name)
            lengths.append(len(words))
            for word, times in Counter(words).items():
                postings[word][0].append(number)
                postings[word][1].append(times)
        mean = np.float32(sum(lengths) / max(1, len(lengths)))
        remembered = np.array([remembered_length(length) for length in lengths], dtype=np.float32)
        self._damping = 1 / (K1 * ((1 - B) + B * remembered / mean))  # (N,) for N texts
        self._postings = {word: tuple(map(np.array, lists)) for word, lists in postings.items()}

    def search(self, query: str, limit: int) -> list[str]:
        """Ids of the best matches, best first."""
        total = np.zeros(len(self._ids))  # double precision while summing, single at the end: so does Lucene
        for word, times in Counter(search_words(query)).items():
            if word in self._postings:
                texts, counts = self._postings[word]
                rarity = np.log(1 + (len(total) - len(texts) + 0.5) / (len(texts) + 0.5))
                weight = np.float32(times) * np.float32(rarity)
                total[texts] += weight - weight / (1 + counts.astype(np.float32) * self._damping[texts])
        scores = total.astype(np.float32)
        best = np.argsort(-scores, kind="stable")[:limit]
        return [self._ids[number] for number in best if scores[number] > 0]
