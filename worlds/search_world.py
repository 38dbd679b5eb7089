"""A made-up world: named entities, a passage about each of them, and multi-hop questions about their facts.

"Who is Bo Lin's birthplace's mayor?" takes two searches: one for the birthplace, one for its mayor. The names are made
up, so a model cannot know the answer without the passages. The splits differ from `train`:
- `eval` is in distribution: the same pairs of relations, from start entities that no training question starts from.
- `ood_comp` is out of distribution: the same start entities as `eval`, with pairs of relations unseen in training.
- `ood_hops` is out of distribution: the same start entities as `eval`, with three relations instead of one or two.

The questions are easier than real ones. They name the relations in the order in which they are needed, and every fact
has the same wording. Facts are drawn independently: the capital of one country may be a city in another.
"""

import random
from dataclasses import dataclass
from itertools import pairwise, product

from worlds.retrieval import Passage

SPLITS = ("train", "eval", "ood_comp", "ood_hops")
PARTS_OF_20 = {"person": 8, "city": 3, "company": 3, "film": 4, "country": 2}  # kind -> its share of the entities
RELATIONS = {  # relation -> (kind of its head, kind of its tail)
    "birthplace": ("person", "city"), "teacher": ("person", "person"), "employer": ("person", "company"),
    "country": ("city", "country"), "mayor": ("city", "person"),
    "headquarters": ("company", "city"), "founder": ("company", "person"),
    "director": ("film", "person"), "studio": ("film", "company"),
    "capital": ("country", "city"), "president": ("country", "person"),
}  # fmt: skip
# Pairs of relations that are not in training. There, each relation still occurs in every position that it can take.
HELD_OUT = {
    ("birthplace", "mayor"), ("teacher", "employer"), ("employer", "founder"), ("mayor", "teacher"),
    ("headquarters", "country"), ("founder", "birthplace"), ("director", "employer"), ("president", "teacher"),
}  # fmt: skip
# No onset is "th": "The" must not be a name, because normalisation removes articles from answers.
ONSETS = "b ch d dr f g gr h j k l m n p pr r s sh st t tr v w z"
SYLLABLES = [f"{o}{v}{c}".capitalize() for o in ONSETS.split() for v in "aeiou" for c in ("", *"lmnrsk")]


@dataclass(frozen=True)
class Hop:
    """One fact, as one step from a question to its answer."""

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
    """A question and its right answers. hops: the facts that lead to the answer; none for real questions."""

    text: str
    answers: tuple[str, ...]
    task_type: str
    hops: tuple[Hop, ...] = ()


Names = dict[str, list[str]]  # kind -> its entities
Facts = dict[tuple[str, str], str]  # (entity, relation) -> entity


def build_world(entities: int, syllables: int, seed: int) -> tuple[list[Passage], dict[str, list[Question]]]:
    """Passages, and the questions of each split in a random order. The same arguments give the same world.

    entities: number of passages, 40 or more. The number of each kind is rounded down, so a few may be missing.
    syllables: number of distinct first words of names, and of distinct second words. A tiny model must learn to copy
    each of them.
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
    drawn = rng.sample(SYLLABLES, 2 * syllables)  # no syllable is both first and second: "Bo Lin" excludes "Lin Bo"
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
    """All chains of `length` relations in which the tail of each one is of the kind of the next one's head.

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
    """Every question of a split. A chain that returns to an entity is left out: its question could name its answer."""
    asked = []
    for path in split_paths(split):
        starts = names[RELATIONS[path[0]][0]]
        third = len(starts) // 3  # these start the questions of the held-out splits only
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
