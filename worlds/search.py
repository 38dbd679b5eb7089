"""Deep Search: answer a question by searching, reading and searching again, in Search-R1's setting.

The default is the made-up world of `search_world`, searched by BM25. The setting `questions` names real questions.
Their passages come from the questions' contexts, a file (`corpus`) or a server (`retriever`). The only reward is at the
end: 1 if the normalised answer matches exactly, else 0. The info reports F1 as well.

Differences from Search-R1:
- Actions are `search[words]` and `answer[text]`, to fit the ReAct form that every environment here uses.
- Every observation ends with the question, because a very small model does not remember it.
- Passages are cut to `passage_chars`.
Not covered: MuSiQue's and WebWalker's own file formats, and reading whole web pages.

    python -m worlds.search                        # shows one episode of the oracle
    python -m worlds.search --serve --port 8000    # serves them: train.py --env_args retriever=http://127.0.0.1:8000
"""

import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

from worlds.questions import encodable, load_questions, normalize, split_of
from worlds.retrieval import Bm25, HttpRetriever, Retriever, RetrieverError, Server, load_corpus
from worlds.search_world import SYLLABLES, Question, build_world

NOTHING = "Nothing happens."
ACTION = re.compile(r"(search|answer)\[(.*)\]", re.IGNORECASE | re.DOTALL)
NAME = re.compile(r"[A-Z]\w*(?: [A-Z]\w*)*")
NO_NAMES = {"Who", "What"}  # the other capitalised words of the made-up world
INSTRUCTIONS = """You answer a question by searching. Every turn, write one thought and one action:
Thought: what is known, and what to look for next
Action: search[words] | answer[text]
A search shows the passages that match best. The first answer counts and must be exact: a name, not a sentence."""


def _setting(default: int | str, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class SearchConfig:
    """What is asked and what is searched. Raises ValueError for values out of range."""

    max_steps: int = _setting(6, "actions after which the episode is truncated")
    topk: int = _setting(3, "most passages that a search shows")
    passage_chars: int = _setting(800, "most characters of a passage that a search shows")
    entities: int = _setting(600, "passages of the made-up world, one for each entity")
    syllables: int = _setting(30, "distinct first words of the made-up names, and as many distinct second words")
    seed: int = _setting(0, "random seed of the made-up world")
    questions: str = _setting("", "real questions: a json, jsonl or parquet file, or a hub id NAME[:CONFIG[:SPLIT]]")
    corpus: str = _setting("", "passages: a jsonl file with id and contents; default: the questions' contexts")
    retriever: str = _setting("", "http://HOST:PORT of a server to search, in Search-R1's protocol")
    timeout: int = _setting(10, "seconds for one query to the server, up to three attempts together")

    def __post_init__(self):
        for name in ("max_steps", "topk", "timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.passage_chars < 200:
            raise ValueError(f"passage_chars must be at least 200, got {self.passage_chars}")
        if self.corpus and self.retriever:
            raise ValueError("corpus and retriever exclude each other: a server has its own passages")
        if not 60 <= self.entities <= 10_000:
            raise ValueError(f"entities must be 60 to 10000, got {self.entities}")
        fewest, most = math.isqrt(self.entities - 1) + 1, len(SYLLABLES) // 2
        if not fewest <= self.syllables <= most:
            raise ValueError(f"syllables must be {fewest} to {most} for {self.entities} names, got {self.syllables}")


# --------------------------------------------------------------------------------------------------------- scoring


def exact_match(text: str, answers: tuple[str, ...]) -> bool:
    """Whether the text is one of the answers, both normalised."""
    return normalize(text) in map(normalize, answers)


def f1(text: str, answers: tuple[str, ...]) -> float:
    """F1 of the normalised words, the best over the answers: harmonic mean of precision and recall, in [0, 1].

    >>> f1("Ka Ren of Bo", ("The Ka Ren", "Bo Lin"))  # precision 2/4, recall 2/2
    0.6666666666666666
    """
    said, best = normalize(text).split(), 0.0
    for answer in answers:
        right = normalize(answer).split()
        shared = (Counter(said) & Counter(right)).total()
        best = max(best, 2 * shared / (len(said) + len(right)) if shared else 0.0)
    return best


# ---------------------------------------------------------------------------------------------- what there is to ask


@dataclass(frozen=True)
class Library:
    """Questions and their retriever. Loaded once, and shared by all environments of a configuration."""

    questions: dict[str, list[Question]]  # by split
    retrieve: Retriever


@lru_cache(maxsize=2)
def open_library(config: SearchConfig) -> Library:
    """The library of a configuration. Raises ValueError for broken files, and for a server that does not answer."""
    if config.corpus and not config.questions:
        raise ValueError("a corpus without questions: give both, it does not answer those of the made-up world")
    if config.questions:
        asked, passages = load_questions(config.questions)
        questions = {split: [q for q in asked if split_of(q) == split] for split in ("train", "eval")}
    else:
        passages, questions = build_world(config.entities, config.syllables, config.seed)
    if config.retriever:
        retrieve = HttpRetriever(config.retriever, config.timeout)
        try:  # a server that is down stops the run before it starts
            retrieve(questions["train"][0].text if questions["train"] else "?", 1)
        except RetrieverError as error:
            raise ValueError(str(error)) from None
        return Library(questions, retrieve)
    if config.corpus:
        passages = load_corpus(config.corpus)
    if not passages:
        raise ValueError(f"{config.questions} has no contexts to search; give a corpus or a retriever")
    return Library(questions, Bm25(passages))


# ------------------------------------------------------------------------------------------------- the environment


class Search:
    """One question at a time; see `worlds.contract.Env`. info["f1"] is the F1 of the answer, and 0 before it."""

    instructions = INSTRUCTIONS

    def __init__(self, config: SearchConfig | None = None):
        self.config = config or SearchConfig()
        self.library = open_library(self.config)

    def size(self, split: str) -> int:
        """Number of questions in the split. Real questions have no out-of-distribution splits, so 0 there."""
        return len(self.library.questions.get(split, ()))

    def reset(self, split: str, seed: int) -> tuple[str, dict]:
        self.question = self.library.questions[split][seed]
        self.steps, self.seen = 0, [self.question.text]
        return self._with_question(""), {"task_type": self.question.task_type, "success": False, "f1": 0.0}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Search or answer. The reward is 1.0 for a right answer, else 0.0. RetrieverError if the server fails."""
        match = ACTION.fullmatch(action.strip())
        verb, text = (match[1].lower(), match[2].strip()) if match else ("", "")
        answered = bool(text) and verb == "answer"
        reply = f"You answer {text}.\n" if answered else f"{self._search(text)}\n" if text else f"{NOTHING} "
        self.steps += 1
        success = answered and exact_match(text, self.question.answers)
        truncated = not answered and self.steps >= self.config.max_steps
        info = {"valid": bool(text), "task_type": self.question.task_type, "success": success}
        info["f1"] = f1(text, self.question.answers) if answered else 0.0
        return self._with_question(reply), float(success), answered, truncated, info

    def _with_question(self, text: str) -> str:
        return encodable(f"{text}Question: {self.question.text}")

    def _search(self, query: str) -> str:
        found = [hit.document for hit in self.library.retrieve(query, self.config.topk)]
        texts = [f"{passage.title}: {passage.text}" if passage.title else passage.text for passage in found]
        shown = [text[: self.config.passage_chars] for text in texts]
        self.seen += shown
        return "\n".join(shown) or "Nothing found."

    # ------------------------------------------------------------------------------------------- scripted players

    def admissible(self) -> list[str]:
        """Search for, or answer with, any name seen so far, oldest first. A name is a run of capitalised words."""
        seen = dict.fromkeys(name for text in self.seen for name in NAME.findall(text) if name not in NO_NAMES)
        return [f"{verb}[{name}]" for verb in ("search", "answer") for name in seen or [self.question.text]]

    def oracle(self) -> tuple[str, str]:
        """(thought, action) of a player that knows the solution.

        In the made-up world it searches for the first fact of the solution that it has not seen. Real questions have no
        such facts. For these it searches for the whole question once, then answers.
        """
        question, known = self.question, ""
        if not question.hops and len(self.seen) == 1 and self.steps == 0:
            return "To be looked up.", f"search[{question.text}]"
        for hop in question.hops:
            if not any(str(hop) in text for text in self.seen):
                return known or f"I need {hop.head}'s {hop.relation}.", f"search[{hop.query}]"
            known = str(hop)
        return known or "That is known.", f"answer[{' '.join(question.answers[0].split())}]"


# -------------------------------------------------------------------------------------------------------------- CLI


@dataclass(frozen=True)
class CommandConfig:
    """What `python -m worlds.search` does."""

    serve: bool = _setting(False, "answer queries over HTTP until interrupted, instead of showing an episode")
    host: str = _setting("127.0.0.1", "address to serve at; 0.0.0.0 lets other machines connect")
    port: int = _setting(8000, "TCP port to serve at")


def serve(command: CommandConfig, config: SearchConfig) -> None:
    """Serve the passages of the configuration until interrupted."""
    retrieve = Bm25(load_corpus(config.corpus)) if config.corpus else open_library(config).retrieve
    with Server(retrieve, command.host, command.port) as http:
        print(f"serving at http://{command.host}:{http.server_port}/retrieve, Ctrl-C to stop", flush=True)
        http.serve_forever()


def show_episode(config: SearchConfig) -> None:
    """Print one episode of the oracle."""
    env = Search(config)
    observation, _ = env.reset("eval", 0)
    print(f"{env.instructions}\n\n{observation}")
    ended = False
    while not ended:
        thought, action = env.oracle()
        observation, reward, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
        print(f"\nThought: {thought}\nAction: {action}\n\n{observation}")
    print(f"\nreward {reward:g}")


def main() -> None:
    from transformers import HfArgumentParser  # slow to import, and only the command line needs it

    try:
        command, config = HfArgumentParser((CommandConfig, SearchConfig)).parse_args_into_dataclasses()
        if command.serve:
            serve(command, config)
        else:
            show_episode(config)
    except (OSError, ValueError, ImportError, OverflowError) as error:
        sys.exit(f"search.py: {error}")
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
