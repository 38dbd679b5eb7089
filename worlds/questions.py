"""Real questions for Deep Search, read from a file or from the Hugging Face hub and checked record by record.

A record has a question, its answers, and optionally a context: the passages in which the answer is found. Errors name
the record. Nothing is repaired silently: a question without an answer is left out with a warning.
"""

import hashlib
import json
import re
import string
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from worlds.contract import MOST_TASKS
from worlds.retrieval import Passage, read_jsonl
from worlds.search_world import Question

MOST_BYTES = 2**31  # of all questions: a few bytes of a parquet file can hold gigabytes


def normalize(text: str) -> str:
    """Lower case without punctuation, articles and extra white space, as SQuAD and Search-R1 compare answers.

    >>> normalize("The  Beatles, U.K.")
    'beatles uk'
    """
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def encodable(text: str) -> str:
    """The text with "?" for every lone surrogate. JSON may contain one, and no tokenizer or terminal accepts it."""
    return text.encode(errors="replace").decode()


def split_of(question: Question) -> str:
    """The split of a question, by a hash of its text: about one in five is in eval. Other questions do not matter."""
    digest = hashlib.sha256(normalize(question.text).encode(errors="replace")).digest()
    return "eval" if int.from_bytes(digest[:8], "big") % 5 == 0 else "train"


def load_questions(source: str) -> tuple[list[Question], list[Passage]]:
    """Questions with an answer, and the passages of their contexts (none if they have no contexts).

    source: a json, jsonl or parquet file, or a dataset on the hub as NAME[:CONFIG[:SPLIT]].
    Fields of a record: question, golden_answers or answer, and optionally context in HotpotQA's and 2Wiki's format.
    Questions without an answer are left out, with a warning that names them.
    Raises ValueError naming a record that is not a question.
    """
    questions, passages, unanswered, size = [], {}, [], 0
    for where, record in _records(source):
        text = record.get("question")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{where}: no text in "question"')
        answers = _answers(record, where)
        try:
            context = {passage.contents: passage for passage in _context(record)}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f'{where}: "context" is not one of titles and sentences') from None
        passages |= context
        size += sum(map(len, [text, *answers, *context]))
        if size > MOST_BYTES:
            raise ValueError(f"{where}: up to here there are {size} characters, which are too many")
        if answers:
            kind = record.get("data_source") or record.get("type") or "question"  # Search-R1's field, HotpotQA's
            questions.append(Question(encodable(text.strip()), answers, encodable(str(kind))))
        else:
            unanswered.append(where.removeprefix(f"{source}, "))
    if unanswered:
        named = ", ".join(unanswered[:5]) + (", ..." if len(unanswered) > 5 else "")
        total = len(questions) + len(unanswered)
        warnings.warn(f"{source}: left out {len(unanswered)} of {total} questions, no answer: {named}", stacklevel=2)
    if not questions:
        raise ValueError(f"{source}: no questions")
    return questions, list(passages.values())


def _answers(record: dict, where: str) -> tuple[str, ...]:
    """The answers, without those that normalise to "". Raises ValueError for one that is neither text nor number."""
    given = record.get("golden_answers") or record.get("answer")
    answers = [answer for answer in (given if isinstance(given, list) else [given]) if answer is not None]
    if wrong := [answer for answer in answers if isinstance(answer, bool) or not isinstance(answer, str | int | float)]:
        raise ValueError(f"{where}: {wrong[0]!r} is not an answer")
    return tuple(encodable(str(answer)) for answer in answers if normalize(str(answer)))


def _context(record: dict) -> Iterator[Passage]:
    """HotpotQA's context as passages: [[title, sentences], ...] in its file, {title: [], sentences: []} on the hub."""
    context = record.get("context") or []
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
    for pair in pairs:
        if not isinstance(pair, list | tuple):  # a dict with two keys would be unpacked, too
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


def _parquet_records(path: Path) -> Iterator[dict]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ImportError("parquet files need pyarrow: pip install datasets==5.2.0") from None
    try:
        file = parquet.ParquetFile(path)
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        size = sum(group.total_byte_size for group in groups)
        if size > MOST_BYTES or file.metadata.num_rows > MOST_TASKS:
            raise ValueError(f"{path}: {file.metadata.num_rows} questions of {size} bytes, unpacked, are too many")
        for batch in file.iter_batches(batch_size=100):
            yield from batch.to_pylist()
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
    except Exception as error:  # a wrong name, no network, a loader script, broken data: many types
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{source}: neither a json, jsonl or parquet file nor a dataset ({reason})") from None
