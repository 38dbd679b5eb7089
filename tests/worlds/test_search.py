"""Deep Search: scores against counting, splits of the made-up world, the environment, real questions, bad files."""

import json
import os
import random
import subprocess
import sys
import urllib.request
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_envs import transcript

from envs import oracle_player
from worlds import questions, search
from worlds.questions import load_questions, normalize, split_of
from worlds.search import NOTHING, Search, SearchConfig, exact_match, f1
from worlds.search_world import HELD_OUT, RELATIONS, SPLITS, SYLLABLES, Question, build_world, paths

SMALL = SearchConfig(entities=120, syllables=12)

# --------------------------------------------------------------------------------------------------------- scoring


def test_scores_by_hand():
    assert normalize("An a the\tTheodore, the U.K.'s 3rd\n") == "theodore uks 3rd"  # an article is a whole word
    assert exact_match("the Bo Lin.", ("Ka Ren", "bo lin"))
    assert not exact_match("Bo", ("Bo Lin",))
    assert f1("Ka Ren of Bo", ("Ka Ren",)) == pytest.approx(2 / 3)  # precision 2/4, recall 2/2: 2·½·1 / 1½
    assert f1("bo bo lin", ("Bo Bo Bo",)) == pytest.approx(2 / 3)  # a word counts as often as both have it: 2/3, 2/3
    assert f1("Ka", ("Ka Ren", "Ka")) == 1  # the best of the answers
    assert f1("The", ("A",)) == 0  # nothing is left of either


TEXT = st.text("aAtThHeEn bz.,'-! \n", max_size=24)


def slow_words(text):
    """Words of a normalised text, letter by letter instead of by pattern."""
    kept = "".join(char for char in text.lower() if char.isalnum() or char.isspace())
    return [word for word in kept.split() if word not in ("a", "an", "the")]


@settings(derandomize=True, deadline=None)
@given(TEXT, TEXT)
def test_scores_agree_with_counting_word_by_word(said, right):
    left, shared = slow_words(right), 0
    for word in slow_words(said):
        if word in left:
            left.remove(word)
            shared += 1
    precision, recall = shared / max(1, len(slow_words(said))), shared / max(1, len(slow_words(right)))
    assert normalize(said) == " ".join(slow_words(said))
    assert exact_match(said, (right,)) == (slow_words(said) == slow_words(right))
    assert f1(said, (right,)) == pytest.approx(2 * precision * recall / (precision + recall) if shared else 0)


# ---------------------------------------------------------------------------------------------- the made-up world


def test_world_is_a_function_of_its_arguments_and_its_names_survive_normalisation():
    assert build_world(120, 12, 7) == build_world(120, 12, 7) != build_world(120, 12, 8)
    passages, questions = build_world(600, 30, 0)  # the default
    assert min(len(questions[split]) for split in SPLITS) >= 256
    names = [passage.title for passage in passages]
    assert len(set(map(normalize, names))) == len(names) == 600
    assert len(set(map(normalize, SYLLABLES)) - {""}) == len(SYLLABLES)  # no "The", which is no part of an answer


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_differ_in_what_they_say_and_questions_follow_the_facts(seed):
    passages, questions = build_world(240, 16, seed)
    text = {passage.title: passage.text for passage in passages}
    assert not any(f" is {title}." in text[title] for title in text)
    asked = [question for split in SPLITS for question in questions[split]]
    assert len({question.text for question in asked}) == len(asked)
    for question in asked:
        assert question.answers == (question.hops[-1].tail,)
        assert question.answers[0] not in question.text
        assert all(str(hop) in text[hop.head] for hop in question.hops)
        assert all(one.tail == other.head for one, other in pairwise(question.hops))
    starts = {split: {q.hops[0].head for q in questions[split]} for split in SPLITS}
    assert not any(starts["train"] & starts[split] for split in SPLITS[1:])
    lengths = {split: {len(q.hops) for q in questions[split]} for split in SPLITS}
    assert lengths == {"train": {1, 2}, "eval": {1, 2}, "ood_comp": {2}, "ood_hops": {3}}
    pairs = {
        split: {(a.relation, b.relation) for q in questions[split] for a, b in pairwise(q.hops)} for split in SPLITS
    }
    assert pairs["eval"] == pairs["train"] == set(paths(2)) - HELD_OUT
    assert pairs["ood_comp"] == HELD_OUT
    assert pairs["ood_hops"] <= pairs["train"]  # new is the length, and nothing else
    for place in (0, 1):  # training has every relation in every position that it can take
        assert {pair[place] for pair in pairs["train"]} == {path[place] for path in paths(2)}
    assert {q.hops[0].relation for q in questions["train"] if len(q.hops) == 1} == set(RELATIONS)


# ------------------------------------------------------------------------------------------------- the environment


@pytest.mark.parametrize("config", [SearchConfig(topk=1), SearchConfig(entities=60, syllables=8)])
@pytest.mark.parametrize("split", SPLITS)
def test_oracle_is_always_right_whatever_was_searched_before(config, split):
    env, rng = Search(config), random.Random(0)
    for seed in range(0, env.size(split), max(1, env.size(split) // 100)):
        env.reset(split, seed)
        for _ in range(rng.randrange(3)):
            env.step(rng.choice([action for action in env.admissible() if action.startswith("search")]))
        terminated = False
        while not terminated:
            _, reward, terminated, truncated, info = env.step(env.oracle()[1])
            assert not truncated
        assert (reward, info["success"], info["f1"]) == (1, True, 1)


def test_invalid_action_changes_nothing_but_the_count():
    env = Search(SearchConfig(max_steps=8))
    env.reset("eval", 0)
    before = env.admissible(), env.oracle()
    for action in ("look", "search", "search[]", "answer[ ]", "search Bo", "answer[Bo", "x search[Bo]"):
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation == f"{NOTHING} Question: {env.question.text}"
        assert (reward, terminated, truncated, info["valid"], info["f1"]) == (0, False, False, False, 0)
    assert before == (env.admissible(), env.oracle())


def test_any_spelling_of_a_valid_action_and_half_of_an_answer():
    env = Search(SMALL)
    env.reset("eval", 0)
    answer = env.question.answers[0]
    assert env.step("  Search[ something [never] heard ] ")[0] == f"Nothing found.\nQuestion: {env.question.text}"
    assert env.step("search[?!]")[4]["valid"]
    assert env.step(f"ANSWER[ the {answer.upper()}. ]")[1] == 1
    env.reset("eval", 0)
    _, reward, terminated, _, info = env.step(f"answer[{answer.split()[0]}]")
    assert (reward, terminated, info["success"]) == (0, True, False)
    assert info["f1"] == pytest.approx(2 / 3)


def test_actions_name_what_was_seen_and_the_oracle_follows_the_facts():
    env = Search(SMALL)
    env.reset("ood_comp", 0)
    hop = env.question.hops[0]
    assert env.admissible() == [f"search[{hop.head}]", f"answer[{hop.head}]"]
    assert env.oracle() == (f"I need {hop.head}'s {hop.relation}.", f"search[{hop.query}]")
    env.step(env.oracle()[1])
    assert env.oracle() == (str(hop), f"search[{env.question.hops[1].query}]")
    assert f"answer[{hop.tail}]" in env.admissible()


# --------------------------------------------------------------------------------------------------- real questions

HOTPOT = [  # as HotpotQA's own file has it
    {"question": f"Who runs city number {i}?", "answer": f"Mayor {i}", "type": "bridge",
     "context": [[f"City {i}", [f"City {i} is run by", f" Mayor {i}."]], ["Shared", ["In every context."]]]}
    for i in range(40)
]  # fmt: skip


def write(path, content):
    """A list is written as a JSON array, or as lines if the file's name says so."""
    if path.suffix == ".jsonl" and isinstance(content, list):
        content = "".join(f"{json.dumps(record)}\n" for record in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_every_format_reads_alike(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install datasets==5.2.0")
    from pyarrow import Table

    questions, passages = expected = load_questions(write(tmp_path / "q.json", HOTPOT))
    assert questions[0] == Question("Who runs city number 0?", ("Mayor 0",), "bridge")
    assert (len(questions), len(passages)) == (40, 41)  # a passage of several contexts is kept once
    assert passages[0].contents == '"City 0"\nCity 0 is run by Mayor 0.'
    contexts = ([list(part) for part in zip(*record["context"], strict=True)] for record in HOTPOT)
    hub = [r | {"context": {"title": t, "sentences": s}} for r, (t, s) in zip(HOTPOT, contexts, strict=True)]
    parquet.write_table(Table.from_pylist(hub), tmp_path / "q.parquet")
    asked, fake = [], type(sys)("datasets")
    fake.load_dataset = lambda *args, **kwargs: asked.append((*args, kwargs["split"])) or hub
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert load_questions(write(tmp_path / "q.jsonl", HOTPOT)) == expected
    assert load_questions(str(tmp_path / "q.parquet")) == expected
    assert load_questions("some/hotpot:distractor:validation") == load_questions("some/hotpot") == expected
    assert asked == [("some/hotpot", "distractor", "validation"), ("some/hotpot", None, "train")]


def test_questions_of_search_r1_have_no_contexts(tmp_path):
    record = {"id": "1", "question": " who? ", "golden_answers": ["Bo", "Bo Lin", ""], "data_source": "nq"}
    file = write(tmp_path / "q.jsonl", [record, record | {"golden_answers": [7]}])
    assert load_questions(file) == ([Question("who?", ("Bo", "Bo Lin"), "nq"), Question("who?", ("7",), "nq")], [])
    with pytest.raises(ValueError, match="no contexts to search"):
        Search(SearchConfig(questions=file))


def test_user_questions_are_split_for_good(tmp_path):
    questions, _ = load_questions(write(tmp_path / "all.json", HOTPOT))
    env = Search(SearchConfig(questions=write(tmp_path / "some.json", HOTPOT[10:30])))
    assert env.size("train") + env.size("eval") == 20
    assert min(env.size("train"), env.size("eval")) > 0
    assert env.size("ood_comp") == env.size("ood_hops") == 0
    assert {q.text for q in env.library.questions["eval"]} < {q.text for q in questions if split_of(q) == "eval"}
    for seed in range(env.size("eval")):
        _, (_, found, *_), (_, _, reward, *_) = transcript(env, "eval", seed, oracle_player)  # a search and the answer
        assert env.question.answers[0] in found
        assert reward == 1


def test_corpus_from_a_file_and_long_passages(tmp_path):
    contents = ['"City"\n' + "word " * 500, "no title"]
    corpus = write(tmp_path / "c.jsonl", [{"id": 5, "contents": contents[0]}, {"contents": contents[1]}])
    questions = write(tmp_path / "q.json", [{"question": "Which city?", "answer": "[City]\n 1"}] * 20)
    env = Search(SearchConfig(questions=questions, corpus=corpus, passage_chars=200))
    assert [hit.document.id for hit in env.library.retrieve("word title", 2)] == ["5", "1"]
    split = next(split for split in ("train", "eval") if env.size(split))
    env.reset(split, 0)
    assert len(env.step("search[word]")[0]) == 200 + len("\nQuestion: Which city?")  # the title counts
    assert env.step("search[title]")[0].startswith("no title\n")
    assert env.step(env.oracle()[1])[1] == 1


def test_questions_without_an_answer_are_left_out_and_named(tmp_path):
    records = [{"question": "Why?"}, {"question": "?", "answer": None}, {"question": "?", "golden_answers": ["The"]}]
    with pytest.warns(UserWarning, match="left out 3 of 4 questions, no answer: line 2, line 3, line 4"):
        questions, _ = load_questions(write(tmp_path / "q.jsonl", [HOTPOT[0], *records]))
    assert len(questions) == 1
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="no questions"):
        load_questions(write(tmp_path / "none.jsonl", records))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", '{"question": "?", "answer": "x"}\n{"question"', "q.jsonl, line 2: not JSON"),
        ("q.jsonl", "[]\n", "q.jsonl, line 1: not a JSON object"),
        ("q.jsonl", '\n{"answer": "x"}', 'q.jsonl, line 2: no text in "question"'),
        ("q.jsonl", '{"question": "?", "answer": "x", "context": ["x"]}', 'q.jsonl, line 1: "context" is not'),
        ("q.jsonl", '{"question": "?", "answer": "x", "context": [[1, ["x"]]]}', 'q.jsonl, line 1: "context" is not'),
        # the two keys of an object would pass for a title and its sentences
        ("q.jsonl", '{"question": "?", "answer": "x", "context": [{"title": "a", "text": "b"}]}', '"context" is not'),
        *(
            ("q.jsonl", f'{{"question": "?", "answer": {wrong}}}', "q.jsonl, line 1: .* is not an answer")
            for wrong in ('{"value": "x"}', '[["x"]]', "false")
        ),
        ("q.jsonl", "[" * 100_000, "q.jsonl, line 1: not JSON"),
        ("q.jsonl", "", "q.jsonl: no questions"),
        ("q.json", "[" * 100_000, "q.json: not JSON"),
        ("q.json", '[\n{"question": "?"\n', "q.json, line 3: not JSON"),
        ("q.json", "{}", "q.json: not a list of questions"),
        ("q.json", "[3]", "q.json, record 1: not a JSON object"),
        ("q.json", "[]", "q.json: no questions"),
        ("q.parquet", "nothing of the kind", "q.parquet: not a parquet file"),
        *((name, None, f"no such file: .*{name}") for name in ("q.json", "q.jsonl", "q.parquet")),
    ],
)
def test_broken_question_files_are_named_with_the_line(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pip install datasets==5.2.0")
    with pytest.raises(ValueError, match=message):
        load_questions(str(tmp_path / name) if content is None else write(tmp_path / name, content))


def test_a_parquet_file_that_repeats_one_long_text_is_refused(monkeypatch, tmp_path):
    """It is written once in the file, whose size unpacked says nothing."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install datasets==5.2.0")
    from pyarrow import table

    parquet.write_table(table({"question": ["x" * 10_000] * 1000, "answer": ["y"] * 1000}), tmp_path / "q.parquet")
    monkeypatch.setattr(questions, "MOST_BYTES", 200_000)
    with pytest.raises(ValueError, match=r"q.parquet, record 20: up to here there are 200020 characters, which are"):
        load_questions(str(tmp_path / "q.parquet"))


@pytest.mark.parametrize("limit", ["MOST_BYTES", "MOST_TASKS"])
def test_a_small_parquet_file_that_unpacks_to_gigabytes_is_refused(limit, monkeypatch, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install datasets==5.2.0")
    from pyarrow import table

    texts = table({"question": [f"{number} {'x' * 10_000}?" for number in range(1000)], "answer": ["y"] * 1000})
    parquet.write_table(texts, tmp_path / "q.parquet", compression="zstd")
    assert (tmp_path / "q.parquet").stat().st_size < 100_000
    assert len(load_questions(str(tmp_path / "q.parquet"))[0]) == 1000
    monkeypatch.setattr(questions, limit, 999)
    with pytest.raises(ValueError, match=r"q.parquet: 1000 questions of [0-9]+ bytes, unpacked, are too many"):
        load_questions(str(tmp_path / "q.parquet"))


def test_what_the_hub_cannot_give_is_said(monkeypatch):
    broken = type(sys)("datasets")
    broken.load_dataset = lambda *args, **kwargs: exec("raise RuntimeError('Dataset scripts are no longer supported')")
    monkeypatch.setitem(sys.modules, "datasets", broken)
    with pytest.raises(ValueError, match=r"some/dataset: neither .* nor a dataset \(Dataset scripts are no longer"):
        load_questions("some/dataset")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_questions("some/dataset")


def test_texts_can_be_encoded_whatever_is_in_them(tmp_path):
    """A lone surrogate stopped tokenizers, and one in a question's type the table of the results."""
    odd = "odd \ud800"
    record = {"question": odd, "answer": odd, "type": odd, "context": [[odd, [odd]]]}
    env = Search(SearchConfig(questions=write(tmp_path / "q.json", [record])))
    split = "train" if env.size("train") else "eval"
    observation, info = env.reset(split, 0)
    texts = [observation, info["task_type"], *env.oracle(), *env.admissible(), env.step("search[odd]")[0]]
    texts += [*env.oracle(), env.step(f"answer[{odd}]")[0]]
    assert "".join(texts).encode().count(b"odd ?") > 5


# -------------------------------------------------------------------------------------------------------------- CLI


def test_serving_from_the_command_line(tmp_path):
    corpus = write(tmp_path / "c.jsonl", [{"id": "3", "contents": "bo lin"}])
    command = [sys.executable, "-m", "worlds.search", "--serve", "--port", "0", "--corpus", corpus]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        url = process.stdout.readline().split()[2].rstrip(",")
        with urllib.request.urlopen(url, b'{"query": "lin"}', timeout=5) as answer:
            assert json.load(answer) == {"result": [[{"id": "3", "contents": "bo lin"}]]}
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


def test_command_line_shows_an_episode_or_one_line_of_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["search.py", "--entities", "120", "--syllables", "12"])
    search.main()
    assert capsys.readouterr().out.endswith("reward 1\n")
    for wrong in ("--serve --port 70000", "--corpus missing.jsonl --serve", "--topk 0", "--questions missing.json"):
        monkeypatch.setattr(sys, "argv", ["search.py", *wrong.split()])
        with pytest.raises(SystemExit, match=r"^search\.py: [^\n]+$"):
            search.main()
