"""Retrieval: passages ranked by BM25, and the HTTP protocol of Search-R1 from both ends.

A retriever is a function (query, topk) -> hits, best first: `Bm25(passages)` here, `HttpRetriever(url)` elsewhere;
`server(retrieve, ...)` answers for one over HTTP:

    POST /retrieve  {"queries": ["Bo Lin mayor"], "topk": 3, "return_scores": true}
    200             {"result": [[{"document": {"id": "7", "contents": "\\"Bo Lin\\"\\nBo Lin's ..."}, "score": 5.2}]]}

Without return_scores the answer lists the documents alone. One question may come as {"query": "..."} (verl-agent).
Not covered: stemming, stop words, dense retrieval (ask a server for that).
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

RETRIES = 2  # further attempts, for one query to a server
BACKOFF = 0.5  # seconds; the first further attempt comes at once, the second after twice that
MAX_BODY = 16 * 2**20  # bytes of a request


@dataclass(frozen=True)
class Passage:
    """contents: the title, usually in quotes, then a line break and the text, as in Search-R1's corpora."""

    id: str
    contents: str

    @property
    def title(self) -> str:
        """ "" if there is only text."""
        return self.contents.partition("\n")[0].strip().strip('"') if "\n" in self.contents else ""

    @property
    def text(self) -> str:
        return self.contents.partition("\n")[2] if "\n" in self.contents else self.contents


@dataclass(frozen=True)
class Hit:
    """A passage that was found, and how well it matches."""

    document: Passage
    score: float


Retriever = Callable[[str, int], list[Hit]]


class RetrieverError(RuntimeError):
    """The retrieval server is down, too slow, or answers nonsense. The message is one line."""


# ------------------------------------------------------------------------------------------------ passages on disk


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """("FILE, line N", object) for every line that is not blank. Raises ValueError naming a line that is no object."""
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # broken UTF-8 included
                raise ValueError(f"{where}: not JSON ({error})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: not a JSON object")
            yield where, record


def load_corpus(path: str) -> list[Passage]:
    """The passages of a jsonl file with "contents" and, if they have one, "id". Raises ValueError naming a bad line."""
    passages = []
    for where, record in read_jsonl(Path(path)):
        contents = record.get("contents")
        if not isinstance(contents, str) or not contents.strip():
            raise ValueError(f'{where}: no text in "contents"')
        passages.append(Passage(str(record.get("id", len(passages))), contents))
    if not passages:
        raise ValueError(f"{path}: no passages")
    return passages


# ------------------------------------------------------------------------------------------------------------ BM25


def terms(text: str) -> list[str]:
    """What a text is indexed and searched by.

    >>> terms("Who is Bo Lin's mayor?")
    ['who', 'is', 'bo', 'lin', 's', 'mayor']
    """
    return re.findall(r"\w+", text.lower())


def _import_bm25s():
    """The library. Where JAX is installed it would start it, and JAX takes three quarters of a GPU from the model."""
    hide = "jax" not in sys.modules
    if hide:
        sys.modules["jax"] = None  # to whoever imports it, it is not there
    try:
        import bm25s
    except ImportError:
        raise ImportError("the embedded retriever needs bm25s: pip install bm25s==0.3.16") from None
    finally:
        if hide:
            del sys.modules["jax"]
    return bm25s


class Bm25:
    """BM25 as Lucene scores it (k1 = 1.5, b = 0.75). Raises ValueError if the passages hold no words."""

    def __init__(self, passages: list[Passage]):
        corpus = [terms(passage.contents) for passage in passages]
        if not any(corpus):
            raise ValueError("there are no words to search in the corpus")
        self.passages, self._index = passages, _import_bm25s().BM25()
        self._index.index(corpus, show_progress=False)

    def __call__(self, query: str, topk: int) -> list[Hit]:
        """At most topk passages that share a word with the query, best first, ties in the order of the corpus."""
        words = terms(query)
        if not words:
            return []
        # Not bm25s' own `retrieve`: it fills up with passages of score 0, and raises if there are fewer than topk.
        scores = self._index.get_scores(words)  # (passages,)
        found = np.flatnonzero(scores > 0)
        if len(found) > topk:  # a common word finds nearly everything: do not sort all of that
            found = found[scores[found] >= np.partition(scores[found], -topk)[-topk]]
        best = found[np.argsort(-scores[found], kind="stable")][:topk]
        return [Hit(self.passages[i], float(scores[i])) for i in best]


# ------------------------------------------------------------------------------------------------- over HTTP: asking


class HttpRetriever:
    """Asks a server that speaks Search-R1's protocol. Raises ValueError for an address that is not one.

    timeout: seconds without a sign of life, for one attempt.  No proxy: a retriever stands beside the trainer.
    """

    def __init__(self, url: str, timeout: float):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a retriever's address is http://HOST:PORT, got {url!r}")
        self.url = url if parts.path.strip("/") else f"{url.rstrip('/')}/retrieve"
        self.timeout, self._session = timeout, requests.Session()
        self._session.trust_env = False
        # What a second attempt may mend: no connection, no answer, half an answer, a server that has too much to do.
        again = Retry(
            RETRIES,
            backoff_factor=BACKOFF,
            status_forcelist=[429, *range(500, 600)],
            allowed_methods=None,
            respect_retry_after_header=False,  # it may say an hour
        )
        self._session.mount(url, HTTPAdapter(max_retries=again))

    def __call__(self, query: str, topk: int) -> list[Hit]:
        """At most topk hits. Raises RetrieverError when the attempts are used up, at once if another cannot help."""
        question = {"queries": [query], "topk": topk, "return_scores": True}
        try:
            response = self._session.post(self.url, json=question, timeout=self.timeout)
            response.raise_for_status()
        except requests.RequestException as error:
            raise RetrieverError(f"retriever {self.url} failed: {error}") from None
        try:
            (found,) = response.json()["result"]
            return [_hit(record) for record in found][:topk]
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            raise RetrieverError(f"retriever {self.url} answers nonsense: {response.content[:80]!r}") from None


def _hit(record: dict) -> Hit:
    """What a server found; those that search the web send neither ids nor scores."""
    document = record["document"]
    if not isinstance(document["contents"], str):
        raise TypeError("contents must be a text")
    return Hit(Passage(str(document.get("id", "")), document["contents"]), float(record.get("score", 0)))


# ---------------------------------------------------------------------------------------------- over HTTP: answering


def answer(retrieve: Retriever, request: object) -> dict:
    """The answer to the JSON of a request. Raises ValueError saying what is wrong with it."""
    if not isinstance(request, dict):
        raise ValueError("the request is not a JSON object")
    queries = [request["query"]] if "query" in request else request.get("queries")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ValueError('"queries" must be a list of strings')
    topk = request.get("topk") or 3
    if type(topk) is not int or not 1 <= topk <= 1000:
        raise ValueError(f'"topk" must be an integer from 1 to 1000, got {topk!r}')
    found = [[asdict(hit) for hit in retrieve(query, topk)] for query in queries]
    return {"result": found if request.get("return_scores") else [[hit["document"] for hit in hits] for hits in found]}


def server(retrieve: Retriever, host: str, port: int) -> ThreadingHTTPServer:
    """A server that is ready for `serve_forever`; port 0 takes any free one. Raises OSError if the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # seconds for which a connection may stay silent

        def do_POST(self):
            try:
                self._answer()
            except ConnectionError:  # the client has gone
                self.close_connection = True

        def _answer(self) -> None:
            try:
                if self.path != "/retrieve":
                    self._reply(404, {"error": f"no {self.path} here, POST to /retrieve"})
                    return
                length = int(self.headers.get("Content-Length", ""))
                if not 0 <= length <= MAX_BODY:
                    raise ValueError(f"a request has at most {MAX_BODY} bytes")
                self._reply(200, answer(retrieve, json.loads(self.rfile.read(length))))
            except (ValueError, RecursionError) as error:
                self._reply(400, {"error": str(error)})

        def _reply(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            """A line for every query would drown everything else."""

    return ThreadingHTTPServer((host, port), Handler)
