"""Deep Search: answer a question by searching, reading and searching again, in Search-R1's setting.

The default is the made-up world of `search_world`, searched by BM25. Real questions come from a file or the hub
(`questions`). Their passages come from the questions' contexts, a file (`corpus`) or a server (`retriever`). The only
reward is at the end: 1 if the normalised answer matches exactly, else 0. The info reports F1 as well.

Differences from Search-R1:
- Actions are `search[words]` and `answer[text]`, to fit the ReAct form that every environment here uses.
- Every observation ends with the question, because a very small model does not remember it.
- Passages are cut to `passage_chars`.
Not covered: MuSiQue's and WebWalker's own file formats, and reading whole web pages.

    python -m worlds.search                        # shows one episode of the oracle
    python -m worlds.search --serve --port 8000    # serves the passages, for --retriever http://127.0.0.1:8000
"""

import hashlib
import json
import math
import re
import string
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from worlds.retrieval import Bm25, HttpRetriever, Passage, Retriever, RetrieverError, load_corpus, read_jsonl, server
from worlds.search_world import SPLITS, SYLLABLES, Question, build_world

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


def normalize(text: str) -> str:
    """Lower case without punctuation, articles and extra white space, as SQuAD and Search-R1 compare answers.

    >>> normalize("The  Beatles, U.K.")
    'beatles uk'
    """
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


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


# --------------------------------------------------------------------------------------------------- real questions


def load_questions(source: str) -> tuple[list[Question], list[Passage]]:
    """Questions with an answer, and the passages of their contexts (none if they have no contexts).

    source: a json, jsonl or parquet file, or a dataset on the hub as NAME[:CONFIG[:SPLIT]].
    Fields of a record: question, golden_answers or answer, and optionally context in HotpotQA's and 2Wiki's format.
    Questions without an answer are left out, with a warning that names them.
    Raises ValueError naming a record that is not a question.
    """
    questions, passages, unanswered = [], {}, []
    for where, record in _records(source):
        text = record.get("question")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{where}: no text in "question"')
        try:
            answers = _answers(record)
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from None
        try:
            passages |= {passage.contents: passage for passage in _context(record)}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f'{where}: "context" is not one of titles and sentences') from None
        if answers:
            kind = record.get("data_source") or record.get("type") or "question"  # Search-R1's field, HotpotQA's
            questions.append(Question(_encodable(text.strip()), answers, _encodable(str(kind))))
        else:
            unanswered.append(where.removeprefix(f"{source}, "))
    if unanswered:
        named = ", ".join(unanswered[:5]) + (", ..." if len(unanswered) > 5 else "")
        total = len(questions) + len(unanswered)
        warnings.warn(f"{source}: left out {len(unanswered)} of {total} questions, no answer: {named}", stacklevel=2)
    if not questions:
        raise ValueError(f"{source}: no questions")
    return questions, list(passages.values())


def _answers(record: dict) -> tuple[str, ...]:
    """The answers, without those that normalise to "". Raises TypeError for one that is neither text nor number."""
    given = record.get("golden_answers") or record.get("answer")
    answers = [answer for answer in (given if isinstance(given, list) else [given]) if answer is not None]
    if wrong := [answer for answer in answers if isinstance(answer, bool) or not isinstance(answer, str | int | float)]:
        raise TypeError(f"{wrong[0]!r} is not an answer")
    return tuple(_encodable(str(answer)) for answer in answers if normalize(str(answer)))


def _encodable(text: str) -> str:
    """The text with "?" for every lone surrogate. JSON may contain one, and no tokenizer or terminal accepts it."""
    return text.encode(errors="replace").decode()


def _context(record: dict) -> Iterator[Passage]:
    """HotpotQA's context as passages: [[title, sentences], ...] in its file, {title: [], sentences: []} on the hub."""
    context = record.get("context") or []
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
    for pair in pairs:
        if not isinstance(pair, list | tuple):  # the two keys of a dict would pass for title and sentences
            raise TypeError("a context is a list of [title, sentences]")
        title, sentences = pair
        text = sentences if isinstance(sentences, str) else " ".join(sentence.strip() for sentence in sentences)
        yield Passage(title, f'"{title.strip()}"\n{text}')


def _records(source: str) -> Iterator[tuple[str, dict]]:
    """(its place, record) for every record of a file or a dataset. Raises ValueError if it cannot be read."""
    path = Path(source)
    if path.suffix == ".jsonl":
        yield from read_jsonl(path)
        return
    if path.suffix not in (".json", ".parquet"):
        records = _hub_records(source)
    elif not path.is_file():
        raise ValueError(f"no such file: {source}")
    else:
        records = _json_records(path) if path.suffix == ".json" else _parquet_records(path)
    for number, record in enumerate(records, 1):
        where = f"{source}, record {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{where}: not a JSON object")
        yield where, record


def _json_records(path: Path) -> list:
    try:
        records = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # broken UTF-8 included
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: not a list of questions")
    return records


def _parquet_records(path: Path) -> list[dict]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ImportError("parquet files need pyarrow: pip install datasets==5.2.0") from None
    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from None


def _hub_records(source: str) -> Iterable[dict]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError("questions from the hub need datasets: pip install datasets==5.2.0") from None
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        return load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # no such dataset, no network, a loader script, broken data: all of different classes
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{source}: neither a json, jsonl or parquet file nor a dataset ({reason})") from None


def split_of(question: Question) -> str:
    """A hash of the question decides: about every fifth is in eval. The rest of the file makes no difference."""
    digest = hashlib.sha256(normalize(question.text).encode(errors="replace")).digest()
    return "eval" if int.from_bytes(digest[:8], "big") % 5 == 0 else "train"


# ---------------------------------------------------------------------------------------------- what there is to ask


@dataclass(frozen=True)
class Library:
    """What is loaded once and shared by all environments of a configuration."""

    questions: dict[str, list[Question]]  # by split
    retrieve: Retriever


@lru_cache(maxsize=2)
def open_library(config: SearchConfig) -> Library:
    """Loads or makes it. Raises ValueError for files that cannot be used, and for a server that does not answer."""
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
    """One question at a time. The contract is `envs.Env`. info["f1"] is the F1 of the answer, and 0 before it."""

    instructions = INSTRUCTIONS

    def __init__(self, config: SearchConfig | None = None):
        self.config = config or SearchConfig()
        self.library = open_library(self.config)

    def size(self, split: str) -> int:
        """Number of questions in the split. Real questions have no out-of-distribution splits, so 0 there."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; search has {', '.join(SPLITS)}")
        return len(self.library.questions.get(split, ()))

    def reset(self, split: str, seed: int) -> tuple[str, dict]:
        """Ask question number `seed` of the split. Raises ValueError if there is no such question."""
        if not 0 <= seed < self.size(split):
            raise ValueError(f"there is no question {seed} in {split}, which has {self.size(split)}")
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
        return _encodable(f"{text}Question: {self.question.text}")

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

        In the made-up world it searches for the first fact of the solution that it has not seen. A real question comes
        without these facts: it searches for the whole question once, then gives the answer.
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
    with server(retrieve, command.host, command.port) as http:
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
