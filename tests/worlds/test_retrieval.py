"""retrieval.py: ranking against brute force, both ends of the protocol, servers that misbehave, broken files."""

import gzip
import json
import math
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from envs import make_envs
from worlds import retrieval
from worlds.contract import WorldError
from worlds.retrieval import Bm25, Hit, HttpRetriever, Passage, RetrieverError, load_corpus

# ------------------------------------------------------------------------------------------------ passages and BM25


def test_bm25_by_hand():
    """Every word counts, whole: Lucene's analyzer would leave "no" out and shorten "das" to "da"."""
    retrieve = Bm25([Passage("0", "No, no Lin!"), Passage("1", "Das")])
    # ln(1 + 1.5 / 1.5) · 2 / (2 + 1.5 · (0.25 + 0.75 · 3 / 2)): in one of two passages, twice, length 3, mean 2
    assert [(hit.document.id, hit.score) for hit in retrieve("no", 3)] == [
        ("0", pytest.approx(math.log(2) * 2 / 4.0625))
    ]
    assert retrieve("da", 3) == []


def test_bm25_breaks_ties_by_position_and_finds_nothing_for_nothing():
    passages = [Passage("same id", f'"Same words"\n{i}') for i in range(9)]
    retrieve = Bm25(passages)
    assert [hit.document for hit in retrieve("words", 4)] == passages[:4]
    assert retrieve("", 3) == retrieve("?!", 3) == retrieve("other", 3) == []
    assert len(retrieve("SAME", 100)) == 9
    with pytest.raises(ValueError, match="no words"):
        Bm25([Passage("0", "...")])
    assert (passages[3].title, passages[3].text, Passage("0", "A city.").title) == ("Same words", "3", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "c.jsonl: no passages"),
        (b'{"id": 1, "contents": "x"}\n{"id": 2, "text": "x"}', 'c.jsonl, line 2: no text in "contents"'),
        (b'{"contents": " "}', 'c.jsonl, line 1: no text in "contents"'),
        *((b'{"contents": "x"}\n' + line, "c.jsonl, line 2: not JSON") for line in (b"x", b'{"contents": "\xff"}')),
    ],
)
def test_broken_corpora_are_named_with_the_line(tmp_path, content, message):
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(str(tmp_path / "c.jsonl"))


# ------------------------------------------------------------------------------------------ both ends of the protocol

HIT = {"document": {"id": "7", "contents": '"Bo Lin"\nThe mayor.'}, "score": 5.25}
FOUND = {"result": [[HIT]]}


@contextmanager
def running(http):
    """The address of a server that runs in a thread meanwhile."""
    thread, http.stopped = threading.Thread(target=http.serve_forever, args=(0.01,)), threading.Event()
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.stopped.set()
        http.shutdown()
        http.server_close()
        thread.join()


def ask(url, content, path="/retrieve", **headers):
    """(status, JSON) that a server answers with."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, body, headers), timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_server_speaks_both_dialects_and_the_client_one_of_them():
    retrieve = Bm25([Passage("7", "bo lin"), Passage("8", "bo"), Passage("9", "ka")])
    document = [{"id": "7", "contents": "bo lin"}, {"id": "8", "contents": "bo"}]
    with running(retrieval.Server(retrieve, "127.0.0.1", 0)) as url:
        status, answer = ask(url, {"queries": ["lin", "", "bo"], "topk": 1, "return_scores": True})
        assert status == 200
        assert [[hit["document"] for hit in hits] for hits in answer["result"]] == [[document[0]], [], [document[1]]]
        assert answer["result"][0][0]["score"] == pytest.approx(retrieve("lin", 1)[0].score)
        assert ask(url, {"queries": ["bo lin"]}) == (200, {"result": [document]})
        assert ask(url, {"query": "ka", "topk": None}) == (200, {"result": [[{"id": "9", "contents": "ka"}]]})
        for query in ("lin", "bo", "?", "nothing like it"):
            assert HttpRetriever(url, 5)(query, 4) == retrieve(query, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "Expecting property name"),
        (b"\xff", "utf-8"),
        (b"[" * 10_000, "recursion"),
        ([], "not a JSON object"),
        *(({"queries": wrong}, '"queries" must be a list of strings') for wrong in (None, "bo", [1])),
        ({"query": "bo", "topk": -1}, '"topk" must be an integer from 1 to 1000, got -1'),
        # 23 KiB that took 53 s and 1.5 GiB, as passages and not as bytes
        ({"queries": ["bo"] * 4000, "topk": 1000}, "4000 queries with topk 1000 are too many: at most 10000 passages"),
        ({"queries": [""] * 10_001, "topk": 1}, "10001 queries with topk 1 are too many"),
        (b" " * 2**25, "a request has at most 1048576 bytes, got 33554432"),
    ],
)
def test_server_refuses_nonsense_and_keeps_serving(content, message):
    with running(retrieval.Server(Bm25([Passage("0", "bo")] * 1000), "127.0.0.1", 0)) as url:
        status, answer = ask(url, content)
        assert (status, list(answer)) == (400, ["error"])
        assert message in answer["error"]
        assert ask(url, {"query": "bo"}, "/elsewhere")[0] == 404
        for length in ("-1", "9" * 5000):
            assert ask(url, b"", **{"Content-Length": length})[1]["error"].startswith("Content-Length must be")
        assert ask(url, {"query": "bo"})[0] == 200


def test_200_clients_may_knock_at_once():
    """Python's backlog is 5. The other clients were reset or left waiting."""
    with retrieval.Server(Bm25([Passage("0", "bo")]), "127.0.0.1", 0) as http, ExitStack() as clients:
        for _ in range(200):  # the server does not serve yet; a connection beyond the backlog times out
            clients.enter_context(socket.create_connection(http.server_address, timeout=1))


# -------------------------------------------------------------------------------------------- servers that misbehave


def scripted(*replies):
    """A server that answers with one reply after the other, the last one for ever: functions of the handler."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            try:
                replies[min(len(self.server.asked), len(replies)) - 1](self)
            except OSError:  # the client hung up
                self.close_connection = True

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.asked = []
    return http


def reply(body, status=200, **headers):
    def send(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    return send


def forever(piece, seconds=0.0, start=b"HTTP/1.0 200 OK\r\n\r\n"):
    """A reply that begins and never ends; a piece every so many seconds."""

    def send(handler):
        handler.wfile.write(start)
        while not handler.server.stopped.wait(seconds):
            handler.wfile.write(piece)

    return send


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(retrieval, "WAITS", (0.0, 0.0, 0.0))


def test_client_asks_in_search_r1s_words():
    with running(http := scripted(reply({"result": [[HIT, HIT]]}))) as url:
        hits = HttpRetriever(url, 5)("Bo", 1)
    assert http.asked == [{"queries": ["Bo"], "topk": 1, "return_scores": True}]
    assert [(hit.document.id, hit.document.title, hit.score) for hit in hits] == [("7", "Bo Lin", 5.25)]
    with running(scripted(reply({"result": [[{"document": {"contents": "from the web"}}]]}))) as url:
        assert HttpRetriever(f"{url}/retrieve?key=1", 5)("Bo", 1) == [Hit(Passage("", "from the web"), 0.0)]


def hang_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "first",  # an hour to wait, for each query of each environment; no answer; half an answer
    [reply({}, 503, Retry_After="3600"), hang_up, reply(b'{"result"', Content_Length="100")],
)
def test_client_tries_again_when_that_can_help(first):
    with running(http := scripted(first, hang_up, reply(FOUND))) as url:
        assert len(HttpRetriever(url, 5)("Bo", 3)) == 1
    assert len(http.asked) == 3


NONSENSE = [
    b"[" * 100_000, {"result": []}, {"result": ["Bo Lin"]}, {"result": [[HIT["document"]]]},
    {"result": [[{"document": {"id": "7"}}]]}, {"result": [[{"document": {"contents": 3}}]]},
    {"result": [[HIT | {"score": "high"}]]},
]  # fmt: skip
BOMB = gzip.compress(bytes(2**26))  # 64 KiB
SLOW = [  # silence, before the first byte and after; a byte at a time, of the body and of a header
    forever(b"", 0.1, start=b""), forever(b"", 0.1),
    forever(b" ", 0.01), forever(b"x", 0.01, start=b"HTTP/1.0 200 OK\r\nX: "),
]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "message", "times"),
    [
        (reply({}, 500), "failed: 500 Internal Server Error", 3),
        (reply({}, 404), "answers 404 Not Found", 1),
        (lambda handler: handler.wfile.write(b"gibberish\r\n\r\n"), "failed: .*gibberish", 3),
        (reply(b"<html>"), "answers nonsense: b'<html>'", 1),
        *((reply(body), "answers nonsense", 1) for body in NONSENSE),
        (reply({}, 307, Location="http://h/x"), "answers 307 .* redirects to 'http://h/x', and redirects are not", 1),
        (reply(BOMB, Content_Encoding="gzip"), "answers in 'gzip', which it was not asked for", 1),
        (forever(bytes(2**16)), "answers with more than 16777216 bytes", 1),
        *((slow, "failed: no complete answer within 0.5 s", 1) for slow in SLOW),
    ],
)
def test_client_says_in_one_line_what_is_wrong_and_in_time(answer, message, times):
    start = time.monotonic()
    with running(http := scripted(answer)) as url, pytest.raises(RetrieverError, match=message) as raised:
        HttpRetriever(url, 0.5 if "within" in message else 5)("Bo", 3)
    assert time.monotonic() - start < 4
    assert len(http.asked) == times
    assert str(raised.value).startswith(f"retriever {url}")
    assert "\n" not in str(raised.value)


def test_a_server_that_hangs_costs_the_timeout_once(monkeypatch):
    """It cost 31 s in each episode, one after another."""
    start = time.monotonic()
    with running(http := scripted(reply(FOUND), forever(b"", 0.1), reply(FOUND))) as url:
        envs = make_envs("search", ["timeout=1", f"retriever={url}"], 30)
        for number, env in enumerate(envs):
            env.reset("train", 0)
            message = r"within 1 s \(it is not asked again for 30 s\)$" if number else "within 1 s$"
            with pytest.raises(WorldError, match=message):
                env.step("search[Bo]")
        assert len(http.asked) == 2  # at the start, and by the first environment
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 31)
        assert envs[0].step("search[Bo]")[0].startswith("Bo Lin: The mayor.\n")
    assert now - start < 4


def test_a_server_that_is_down_stops_the_run_before_it_starts():
    with socket.socket() as taken:  # bound but not listening: nobody else gets the port, nobody answers
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(WorldError, match=r"failed: .*refused"):
            make_envs("search", [f"retriever=http://127.0.0.1:{taken.getsockname()[1]}"], 1)
