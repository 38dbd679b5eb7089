"""Retrieval: BM25 over passages, and both ends of Search-R1's HTTP protocol.

A retriever is a function (query, topk) -> hits, best first. `Bm25(passages)` searches in this process.
`HttpRetriever(url)` asks a server. `Server(retrieve, ...)` makes any retriever such a server:

    POST /retrieve  {"queries": ["Bo Lin mayor"], "topk": 3, "return_scores": true}
    200             {"result": [[{"document": {"id": "7", "contents": "\\"Bo Lin\\"\\nBo Lin's ..."}, "score": 5.2}]]}

Without return_scores the result holds the documents alone. A single query may come as {"query": "..."} (verl-agent).
Not covered: dense retrieval (use a server), and Lucene's stemming and stop words, which would remove parts of names.
"""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Timer
from urllib.parse import urlsplit

from worlds.shop_search import Index

# Asking a server.
WAITS = (0.0, 0.5, 1.0)  # seconds before each of the attempts for one query
DOWN_SECONDS = 30  # in which a server that failed is not asked again
MAX_ANSWER = 16 * 2**20  # bytes
# Being the server.
MAX_REQUEST = 2**20  # bytes
MAX_HITS = 10_000  # queries times topk in one request; 2,560 queries with topk 3 fit
BACKLOG = 1024  # connections that may wait to be accepted


@dataclass(frozen=True)
class Passage:
    """contents: the title (usually in quotes), a line break, then the text, as in Search-R1's corpora."""

    id: str
    contents: str

    @property
    def title(self) -> str:
        """The first line without its quotes, or "" if there is only text."""
        return self.contents.partition("\n")[0].strip().strip('"') if "\n" in self.contents else ""

    @property
    def text(self) -> str:
        return self.contents.partition("\n")[2] if "\n" in self.contents else self.contents


@dataclass(frozen=True)
class Hit:
    """A passage that was found, and its score: the higher, the better the match."""

    document: Passage
    score: float


Retriever = Callable[[str, int], list[Hit]]


class RetrieverError(RuntimeError):
    """The retrieval server is down or too slow, or its answer cannot be used. The message is one line."""


# ------------------------------------------------------------------------------------------------ passages on disk


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """("FILE, line N", object) for every line that is not blank. Raises ValueError naming a line without an object."""
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
    """The passages of a jsonl file: "contents", and optionally "id". Raises ValueError naming a bad line."""
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
    """The words that a text is indexed and searched by.

    >>> terms("Who is Bo Lin's mayor?")
    ['who', 'is', 'bo', 'lin', 's', 'mayor']
    """
    return re.findall(r"\w+", text.lower())


class Bm25:
    """BM25 over passages. Raises ValueError if no passage has a word.

    k1 = 1.5 and b = 0.75 are textbook values (k1 from 1.2 to 2, b about 0.75). The shop uses pyserini's, as WebShop.
    """

    def __init__(self, passages: list[Passage]):
        if not any(terms(passage.contents) for passage in passages):
            raise ValueError("there are no words to search in the corpus")
        numbered = {str(number): passage for number, passage in enumerate(passages)}  # ids in a file may repeat
        contents = ((number, passage.contents) for number, passage in numbered.items())
        self._passages, self._index = numbered, Index(contents, words=terms, k1=1.5, b=0.75)

    def __call__(self, query: str, topk: int) -> list[Hit]:
        """At most topk passages that share a word with the query, best first. Ties keep the order of the corpus."""
        return [Hit(self._passages[number], score) for number, score in self._index.search(query, topk)]


# ------------------------------------------------------------------------------------------------- over HTTP: asking


class HttpRetriever:
    """Asks a server that speaks Search-R1's protocol. Raises ValueError for an address that is not one.

    timeout: seconds for one query, all attempts together.
    A server that failed is not asked again for DOWN_SECONDS. Every query fails at once in that time, so a server that
    hangs costs the timeout once and not in every episode. No proxy is used, and no redirect is followed.
    """

    def __init__(self, url: str, timeout: float):
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:  # not a number, or above 65535
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or port == -1:
            raise ValueError(f"a retriever's address is http://HOST:PORT, got {url!r}")
        self.url = url if parts.path.strip("/") else f"{url.rstrip('/')}/retrieve"
        self.timeout, self._host, self._port = timeout, parts.hostname, port
        self._connection = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._target = urlsplit(self.url)._replace(scheme="", netloc="", fragment="").geturl()
        self._failure, self._down_until = "", 0.0

    def __call__(self, query: str, topk: int) -> list[Hit]:
        """At most topk hits. Raises RetrieverError if the server fails or its answer cannot be used."""
        if time.monotonic() < self._down_until:
            raise RetrieverError(f"{self._failure} (it is not asked again for {DOWN_SECONDS} s)")
        content = self._ask(json.dumps({"queries": [query], "topk": topk, "return_scores": True}).encode())
        try:
            (found,) = json.loads(content)["result"]
            return [_hit(record) for record in found][:topk]
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            raise RetrieverError(f"retriever {self.url} answers nonsense: {content[:80]!r}") from None

    def _ask(self, request: bytes) -> bytes:
        """The body of the answer. Connections that fail and overloaded servers (status 429, 5xx) are tried again."""
        deadline = time.monotonic() + self.timeout
        for wait in WAITS:
            time.sleep(max(0.0, min(wait, deadline - time.monotonic())))
            try:
                return self._post(request, deadline)
            except (OSError, HTTPException) as error:
                reason = " ".join(f"{error}".split())[:200] or type(error).__name__
            if time.monotonic() >= deadline:
                reason = f"no complete answer within {self.timeout} s"
                break
        self._failure = f"retriever {self.url} failed: {reason}"
        self._down_until = time.monotonic() + DOWN_SECONDS
        raise RetrieverError(self._failure)

    def _post(self, request: bytes, deadline: float) -> bytes:
        """One attempt. Raises OSError or HTTPException if another one may help, else RetrieverError."""
        connection = self._connection(self._host, self._port, timeout=max(0.001, deadline - time.monotonic()))
        connection.connect()
        # The timeout of a socket limits one read. The timer limits the whole answer.
        timer = Timer(deadline - time.monotonic(), _hang_up, [connection.sock])
        timer.start()
        try:
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("POST", self._target, request, headers)
            response = connection.getresponse()
            said, packed = f"{response.status} {response.reason}", response.getheader("Content-Encoding", "identity")
            if response.status == 429 or response.status >= 500:
                raise ConnectionError(said)
            if not 200 <= response.status < 300:
                place = response.getheader("Location")
                redirect = f": it redirects to {place!r}, and redirects are not followed" if place else ""
                raise RetrieverError(f"retriever {self.url} answers {said}{redirect}")
            if packed != "identity":  # the request allowed no other; a few bytes of gzip can hold gigabytes
                raise RetrieverError(f"retriever {self.url} answers in {packed!r}, which it was not asked for")
            content = response.read(MAX_ANSWER + 1)
        finally:
            timer.cancel()
            connection.close()
        if len(content) > MAX_ANSWER:
            raise RetrieverError(f"retriever {self.url} answers with more than {MAX_ANSWER} bytes")
        if response.length or time.monotonic() >= deadline:
            raise ConnectionError("the connection ended in the middle of the answer")
        return content


def _hang_up(connected: socket.socket) -> None:
    """End the wait of the thread that reads from this socket."""
    with suppress(OSError):  # the socket is closed already
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # the method of an SSL socket is not thread-safe


def _hit(record: dict) -> Hit:
    """A passage as a server sends it. Servers that search the web send neither ids nor scores."""
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
    if len(queries) * topk > MAX_HITS:
        raise ValueError(f"{len(queries)} queries with topk {topk} are too many: at most {MAX_HITS} passages a request")
    found = [[asdict(hit) for hit in retrieve(query, topk)] for query in queries]
    return {"result": found if request.get("return_scores") else [[hit["document"] for hit in hits] for hits in found]}


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    timeout = 60  # seconds for which a connection may stay silent

    def do_POST(self):
        try:
            self._reply(*self._answer())
        except ConnectionError:  # the client has gone
            self.close_connection = True

    def _answer(self) -> tuple[int, dict]:
        """Status and content of the reply."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 15:  # int() refuses thousands of digits
            return 400, {"error": "Content-Length must be the number of bytes of the request"}
        body = self._read(int(length))
        if self.path != "/retrieve":
            return 404, {"error": f"no {self.path} here, POST to /retrieve"}
        if len(body) > MAX_REQUEST:
            return 400, {"error": f"a request has at most {MAX_REQUEST} bytes, got {length}"}
        try:
            return 200, answer(self.server.retrieve, json.loads(body))
        except (ValueError, RecursionError) as error:
            return 400, {"error": str(error)}

    def _read(self, length: int) -> bytes:
        """The body, or its first bytes if it is too long. All of it is read: a client sends first, then listens."""
        body = self.rfile.read(min(length, MAX_REQUEST + 1))
        left = length - len(body)
        while left and (piece := self.rfile.read(min(left, 2**16))):
            left -= len(piece)
        return body

    def _reply(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Nothing: a line for every query would hide all other output."""


class Server(ThreadingHTTPServer):
    """Ready for `serve_forever`; starts a thread for each connection. Port 0 takes any free one. Raises OSError if the
    port is taken."""

    request_queue_size = BACKLOG

    def __init__(self, retrieve: Retriever, host: str, port: int):
        super().__init__((host, port), Handler)
        self.retrieve = retrieve
