"""No message costs work: streams that cannot be written, scripts without a terminal, Ctrl-C before the work begins."""

import ast
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from conftest import ROOT, SMALL, flags_of, rows, until

from engine.checkpoint import checkpoints, verify_checkpoint
from engine.terminal import Words


def dead_pipe() -> int:
    """The writing end of a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("broken", ["full", "dead", "closed"])
def test_words_that_cannot_be_written_are_dropped(broken, tmp_path):
    file = {"full": "/dev/full", "dead": dead_pipe()}.get(broken, tmp_path / "file")
    words = Words(open(file, "w"))  # noqa: SIM115
    if broken == "closed":
        words.close()
    print("more than a buffer " * 1000, file=words, flush=True)
    words.flush()
    assert words.closed == (broken == "closed")


def test_words_that_the_encoding_lacks_are_escaped(tmp_path):
    with open(tmp_path / "file", "w", encoding="ascii") as stream:
        print("µ", file=Words(stream))
    assert (tmp_path / "file").read_text() == "\\xb5\n"


def test_words_wait_for_a_reader_once_and_are_written_when_it_reads_again():
    """A pipe that was full, and Ctrl-S, stopped the run, and the stop."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while os.write(writer, bytes(1000)):
            pass
    os.set_blocking(writer, True)
    with os.fdopen(writer, "w") as stream, os.fdopen(reader, "rb") as other:
        words = Words(stream, patience=0.01)
        print("dropped", file=words)
        assert words.wait == 0
        other.read(50_000)
        print("one", "two", file=words)
        assert words.wait == 0.01
        stream.close()
        assert other.read().strip(b"\0") == b"one two\n"


SCRIPT = """
import sys
from engine.terminal import start_script
start_script()
from tqdm import tqdm
with open(sys.argv[1], "w") as file:
    for _ in tqdm(range(3), mininterval=0):
        tqdm.write("a word")
    print("words", flush=True)
    print("words", file=sys.stderr, flush=True)
    file.write(f"{min(file.fileno(), 3)}")
if sys.argv[2:]:
    raise KeyboardInterrupt
"""


def script(*arguments: str, redirect: str = "", **streams) -> subprocess.CompletedProcess:
    """The script in a process of its own, whose shell redirects its streams."""
    command = ["bash", "-c", f'exec "$@" {redirect}', "bash", sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False, **streams)


@pytest.mark.parametrize("broken", [">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full", "2> /dev/full", "dead"])
def test_a_script_without_a_terminal_works_and_its_files_hold_no_words(broken, tmp_path):
    """The next file got the number of a stream that was closed. Python ended with status 120 if it could not flush."""
    pipe = dead_pipe() if broken == "dead" else subprocess.DEVNULL
    done = script(str(tmp_path / "file"), redirect="" if broken == "dead" else broken, stdout=pipe, stderr=pipe)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "3"


def test_ctrl_c_before_a_run_is_prepared_is_one_line(tmp_path):
    """It was a traceback through the imports, which take seconds."""
    done = script(str(tmp_path / "file"), "interrupt", stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.decode().splitlines()[-1] == "stopped; nothing was saved yet"
    assert b"Traceback" not in done.stderr


def test_a_run_whose_terminal_is_closed_saves(whole, cache, tmp_path):
    """The reader of both streams ends, the run goes on, and SIGHUP stops it. A bar or the handler's line ended it."""
    flags = SMALL | {"iterations": 100_000, "checkpoint_every": 100_000, "eval_every": 100_000}
    command = [sys.executable, "train.py", *flags_of(flags | {"out": tmp_path / "run", "cache": cache})]
    reader, writer = os.pipe()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=writer, stderr=writer)
    try:
        os.close(writer)
        until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
        os.close(reader)
        until(lambda: len(rows(tmp_path / "run")) > 2 or process.poll() is not None)
        process.send_signal(signal.SIGHUP)
        assert process.wait(300) == 1
    finally:
        process.kill()
    (saved,) = checkpoints(tmp_path / "run")
    verify_checkpoint(saved)
    assert rows(tmp_path / "run")[1]["policy/loss"] == rows(whole)[1]["policy/loss"]


@pytest.mark.parametrize("name", ["train", "eval", "imitate"])
def test_a_script_guards_its_terminal_before_its_imports(name):
    begin = ast.parse((ROOT / f"{name}.py").read_text()).body[1]  # after the docstring
    assert ast.unparse(begin).split("\n    ")[1:] == ["from engine.terminal import start_script", "start_script()"]
