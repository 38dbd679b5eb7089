"""A made-up world to ask about: named entities, a passage about each of them, questions that chain its facts.

"Who is Bo Lin's birthplace's mayor?" takes two searches: nothing but the passages knows the answer. One split is in
distribution (`eval`: relations chained as in training, from start entities that training never starts from), two are
out of it, in one more way each (`ood_comp`: pairs of relations never chained in training; `ood_hops`: three relations).

A question names the relations in the order in which they are needed, and every fact is told in the same words: both
make it easier than real questions. Facts are drawn independently: a country's capital may lie in another country.
"""

import random
from dataclasses import dataclass
from itertools import pairwise, product

from worlds.retrieval import Passage

SPLITS = ("train", "eval", "ood_comp", "ood_hops")
PARTS_OF_20 = {"person": 8, "city": 3, "company": 3, "film": 4, "country": 2}  # kind -> its share of the entities
RELATIONS = {  # noun -> the kinds that it leads from and to
    "birthplace": ("person", "city"), "teacher": ("person", "person"), "employer": ("person", "company"),
    "country": ("city", "country"), "mayor": ("city", "person"),
    "headquarters": ("company", "city"), "founder": ("company", "person"),
    "director": ("film", "person"), "studio": ("film", "company"),
    "capital": ("country", "city"), "president": ("country", "person"),
}  # fmt: skip
HELD_OUT = {  # never chained in training, where each of their relations still comes first and second, if it can at all
    ("birthplace", "mayor"), ("teacher", "employer"), ("employer", "founder"), ("mayor", "teacher"),
    ("headquarters", "country"), ("founder", "birthplace"), ("director", "employer"), ("president", "teacher"),
}  # fmt: skip
# No "th" at the start: "The" must not be a name, because articles do not count in an answer.
ONSETS = "b ch d dr f g gr h j k l m n p pr r s sh st t tr v w z"
SYLLABLES = [f"{o}{v}{c}".capitalize() for o in ONSETS.split() for v in "aeiou" for c in ("", *"lmnrsk")]


@dataclass(frozen=True)
class Hop:
    """One fact of the world, as a step on the way to an answer."""

    head: str
    relation: str
    tail: str

    @property
    def query(self) -> str:
        return f"{self.head} {self.relation}"

    def __str__(self) -> str:
        return f"{self.head}'s {self.relation} is {self.tail}."


@dataclass(frozen=True)
class Question:
    """A question, every answer that counts as right, and for the made-up world the facts that lead there."""

    text: str
    answers: tuple[str, ...]
    task_type: str
    hops: tuple[Hop, ...] = ()


Names = dict[str, list[str]]  # kind -> its entities
Facts = dict[tuple[str, str], str]  # (entity, relation) -> entity


def build_world(entities: int, syllables: int, seed: int) -> tuple[list[Passage], dict[str, list[Question]]]:
    """Passages, and the questions of each split in a random order; the same for the same arguments.

    entities: 40 or more, about as many are made.  syllables: how many different ones a name's first word is made of,
    and its second word; a tiny model has to learn to copy each of them.
    """
    rng = random.Random(seed)
    names = _draw_names(rng, entities, syllables)
    facts = _draw_facts(rng, names)
    passages = [_passage(entity, facts) for kind in names.values() for entity in kind]
    rng.shuffle(passages)
    questions = {split: _questions(split, names, facts) for split in SPLITS}
    for asked in questions.values():
        rng.shuffle(asked)
    return passages, questions


def _draw_names(rng: random.Random, entities: int, syllables: int) -> Names:
    drawn = rng.sample(SYLLABLES, 2 * syllables)  # no syllable is both first and second, so "Bo Lin" has no "Lin Bo"
    pairs = list(product(drawn[:syllables], drawn[syllables:]))
    unused = iter(rng.sample(pairs, entities))
    return {
        kind: [" ".join(next(unused)) for _ in range(entities * parts // 20)] for kind, parts in PARTS_OF_20.items()
    }


def _draw_facts(rng: random.Random, names: Names) -> Facts:
    return {
        (head, relation): rng.choice([tail for tail in names[to] if tail != head])
        for relation, (kind, to) in RELATIONS.items()
        for head in names[kind]
    }


def _passage(entity: str, facts: Facts) -> Passage:
    sentences = [str(Hop(entity, r, facts[entity, r])) for r in RELATIONS if (entity, r) in facts]
    return Passage(entity, f'"{entity}"\n{" ".join(sentences)}')


def paths(length: int) -> list[tuple[str, ...]]:
    """All chains of `length` relations in which each one starts where the one before it led.

    >>> paths(2)[0]
    ('birthplace', 'country')
    """
    chains = [(relation,) for relation in RELATIONS]
    for _ in range(length - 1):
        chains = [(*c, r) for c in chains for r, (kind, _) in RELATIONS.items() if kind == RELATIONS[c[-1]][1]]
    return chains


def split_paths(split: str) -> list[tuple[str, ...]]:
    """The chains of relations that a split asks about."""
    if split == "ood_comp":
        return [path for path in paths(2) if path in HELD_OUT]
    lengths = (3,) if split == "ood_hops" else (1, 2)
    return [path for n in lengths for path in paths(n) if not HELD_OUT & set(pairwise(path))]


def _questions(split: str, names: Names, facts: Facts) -> list[Question]:
    """Every question of a split whose chain does not come back to an entity: the answer is never in the question."""
    asked = []
    for path in split_paths(split):
        starts = names[RELATIONS[path[0]][0]]
        third = len(starts) // 3  # training never starts from these
        for start in starts[third:] if split == "train" else starts[:third]:
            chain = [start]
            for relation in path:
                chain.append(facts[chain[-1], relation])
            if len(set(chain)) == len(chain):
                asked.append(_question(path, chain))
    return asked


def _question(path: tuple[str, ...], chain: list[str]) -> Question:
    hops = tuple(Hop(head, r, tail) for r, (head, tail) in zip(path, pairwise(chain), strict=True))
    asked = "'s ".join((chain[0], *path))
    word = "Who" if RELATIONS[path[-1]][1] == "person" else "What"
    kind = "1 hop" if len(path) == 1 else f"{len(path)} hops"
    return Question(f"{word} is {asked}?", (chain[-1],), kind, hops)
