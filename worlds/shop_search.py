"""Lucene's BM25 in plain numpy, for the shop and Deep Search.

WebShop searches with Lucene through pyserini. For text in Latin script this file finds the same products in the same
order. Small details decide the order of similar products: word boundaries, stems, text lengths that are stored in one
byte, single-precision scores. BM25 libraries treat them differently, so they are written out here.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
import regex

# Words as in Unicode's rules for word boundaries (UAX 29). `WB=...` are the classes of those rules.
MARKS = r"[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]*"  # accents, soft hyphens: part of the character before them
LETTER = rf"[\p{{WB=ALetter}}\p{{WB=Hebrew_Letter}}--\xb8]{MARKS}"  # \xb8 became a letter after Lucene's version
DIGIT = rf"\p{{Nd}}{MARKS}"
KATAKANA = rf"\p{{WB=Katakana}}{MARKS}"
JOINER = rf"\p{{WB=ExtendNumLet}}{MARKS}"  # the underscore
QUOTE = r"\p{WB=MidNumLet}\p{WB=Single_Quote}"
LETTERS = rf"{LETTER}(?:(?:[{QUOTE}\p{{WB=MidLetter}}]{MARKS})?{LETTER})*"  # women's, u.s.a
NUMBER = rf"{DIGIT}(?:(?:[{QUOTE}\p{{WB=MidNum}}]{MARKS})?{DIGIT})*"  # 3.5, 12,000
# Lucene knows the pictographs of Unicode 12.1. Later versions removed these.
REMOVED = (
    r"\u2388\u2600-\u2605\u2607-\u2612\u2614-\u2685\u2690-\u2705\u2708-\u2712\u2763-\u2767\U0001f000-\U0001f0ff"
    r"\U0001f10d-\U0001f10f\U0001f12f\U0001f16c-\U0001f171\U0001f1ad\U0001f1ae\U0001f249-\U0001f53d"
    r"\U0001f546-\U0001f64f\U0001f680-\U0001f6ff\U0001f774-\U0001f77f\U0001f7d5-\U0001f7ff\U0001f947-\U0001fbef"
)
PICTOGRAPH = rf"[\p{{Extended_Pictographic}}{REMOVED}]"
WORD = regex.compile(
    rf"(?V1)(?:(?:{JOINER})*(?:{LETTERS}|{NUMBER}|{KATAKANA}))+(?:{JOINER})*"  # w_large, 9v
    rf"|\u200d?{PICTOGRAPH}(?:{MARKS}\u200d{PICTOGRAPH})*{MARKS}"  # one pictograph, or several with joiners
    rf"|(?:\p{{RI}}{MARKS}){{2}}|[#*]\ufe0f?\u20e3{MARKS}"  # flags, and the keys # and *
    rf"|[\p{{Han}}\p{{Hiragana}}]{MARKS}"  # each character is a word
)
LONGEST = 255  # characters; Lucene cuts a longer word into pieces
STOP_WORDS = """a an and are as at be but by for if in into is it no not of on or such that the their then there these
they this to was will with""".split()  # noqa: SIM905


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """Porter's stem of a word."""
    from nltk.stem.porter import PorterStemmer  # nltk takes seconds to import, and only the shop needs it

    return PorterStemmer(PorterStemmer.MARTIN_EXTENSIONS).stem(word)


def search_words(text: str) -> list[str]:
    """The words of a text as the search compares them: Porter stems, without possessive 's and without stop words.

    >>> search_words("The men's running shoes, size 9.5")
    ['men', 'run', 'shoe', 'size', '9.5']
    """
    found = WORD.findall(text.lower())
    pieces = (word[start : start + LONGEST] for word in found for start in range(0, len(word), LONGEST))
    words = (regex.sub("['\u2019\uff07]s$", "", word) for word in pieces)
    return [stem(word) for word in words if word not in STOP_WORDS]


def remembered_length(length: int) -> int:
    """What Lucene stores as the length of a text, in words: exact up to 39, then four significant bits above 24.

    >>> [remembered_length(n) for n in (7, 39, 63, 1000)]
    [7, 39, 60, 984]
    """
    shift = max(0, (length - 24).bit_length() - 4) if length > 24 else 0
    return 24 + ((length - 24) >> shift << shift)


class Index:
    """BM25 over texts, with Lucene's arithmetic.

    texts: (id, text) pairs.  words: splits a text or a query into the words to compare.
    k1: weight of repeated words, above 0.  b: penalty for long texts, 0 to 1.  Both defaults are pyserini's.
    """

    def __init__(
        self,
        texts: Iterable[tuple[str, str]],
        *,
        words: Callable[[str], list[str]] = search_words,
        k1: float = 0.9,
        b: float = 0.4,
    ):
        self._words, self._ids, lengths = words, [], []
        postings = defaultdict(lambda: (array("i"), array("i")))  # word -> numbers of the texts that have it, how often
        for number, (name, text) in enumerate(texts):
            found = words(text)
            self._ids.append(name)
            lengths.append(len(found))
            for word, times in Counter(found).items():
                postings[word][0].append(number)
                postings[word][1].append(times)
        self._filled = max(1, np.count_nonzero(lengths))  # Lucene counts only texts that have a word
        mean = np.float32(max(1, sum(lengths)) / self._filled)
        remembered = np.array([remembered_length(length) for length in lengths], dtype=np.float32)
        k1, b = np.float32(k1), np.float32(b)
        self._damping = 1 / (k1 * ((1 - b) + b * remembered / mean))  # (N,) for N texts
        self._postings = {word: tuple(map(np.array, lists)) for word, lists in postings.items()}

    def search(self, query: str, limit: int) -> list[tuple[str, float]]:
        """(id, score) of the texts that share a word with the query: at most `limit` (1 or more), best first, equal
        scores in the order of the texts."""
        total = np.zeros(len(self._ids))  # (N,), summed in double precision and then rounded to single, as in Lucene
        for word, times in Counter(self._words(query)).items():
            if word in self._postings:
                texts, counts = self._postings[word]
                rarity = np.log(1 + (self._filled - len(texts) + 0.5) / (len(texts) + 0.5))
                weight = np.float32(times) * np.float32(rarity)
                total[texts] += weight - weight / (1 + counts.astype(np.float32) * self._damping[texts])
        scores = total.astype(np.float32)
        found = np.flatnonzero(scores)
        if len(found) > limit:  # a common word finds nearly all texts: sort only the best
            found = found[scores[found] >= np.partition(scores[found], -limit)[-limit]]
        best = found[np.argsort(-scores[found], kind="stable")][:limit]
        return [(self._ids[number], float(scores[number])) for number in best]
