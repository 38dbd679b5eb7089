"""ALFWorld: which games count, the oracle, the real engine and its speed-ups, the writer of games.

What every world has in common is tested in tests/test_envs.py. Tests that need the engine are skipped without it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import ALFWORLD_GAMES, ALFWORLD_INSTALL
from test_envs import transcript

from envs import Player, careless_player, oracle_player
from worlds.alfworld_env import LAYOUT, SPLITS, AlfWorld, AlfWorldConfig, Game, Oracle, find_games
from worlds.house import TASK_TYPES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def env(alfworld_data) -> AlfWorld:
    return AlfWorld(AlfWorldConfig(data=alfworld_data))


def actions_of(env: AlfWorld, split: str, seed: int, player: Player = oracle_player) -> list[str]:
    """The actions of a player who must succeed."""
    _, *steps = transcript(env, split, seed, player)
    assert steps[-1][-1]["success"], env.game
    return [action for action, *_ in steps]


def stored(env: AlfWorld) -> dict:
    """The content of the game file that is being played."""
    return json.loads(Path(env.game.path).read_text())


def python(code: str, *args: str, **environ: str) -> str:
    """What another process prints."""
    command = [sys.executable, "-c", code, *args]
    environ = os.environ | environ
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout


# ---------------------------------------------------------------------------------------------- without the engine


def test_the_project_works_without_the_engine():
    code = """import sys, envs
print({'alfworld', 'textworld', 'fast_downward'} & set(sys.modules))
sys.modules['textworld'] = None
try: envs.make_envs('alfworld', [], 1)
except SystemExit as error: print(error)"""
    loaded, message = python(code).splitlines()
    assert loaded == "set()"
    assert ALFWORLD_INSTALL in message


GOAL = {"object_target": "Apple", "parent_target": "Fridge", "toggle_target": ""}
PLAYED = {"pddl_domain": "", "grammar": "", "pddl_problem": "", "solvable": True}


def put(root: Path, name: str, task_type: str = TASK_TYPES[0], **game) -> Path:
    """Write the folder train/NAME/trial_NAME with one game. game: changes of the game file."""
    folder = root / "train" / name / f"trial_{name}"
    folder.mkdir(parents=True)
    (folder / "traj_data.json").write_text(json.dumps({"task_type": task_type, "pddl_params": GOAL}))
    (folder / "game.tw-pddl").write_text(json.dumps(PLAYED | game))
    return folder


def test_the_games_that_count_are_those_of_the_stock_loader(tmp_path, caplog):
    root = tmp_path / "movable" / LAYOUT  # only the names below this folder count
    for name in "ba":
        put(root, name)
    put(root, "unsolvable", solvable=False)
    put(root, "pick-AppleSliced-1")
    put(root, "pick_and_place_with_movable_recep-1")
    put(root, "other", task_type="pick_and_place_with_other_recep")
    put(root, "light", task_type=TASK_TYPES[1])
    (put(root, "unfinished") / "game.tw-pddl").unlink()
    games = find_games(root, "train", TASK_TYPES[:1])
    assert [Path(game.path).parent.name for game in games] == ["trial_a", "trial_b"]
    assert (games[0].task_type, games[0].kind, games[0].home, games[0].lamp) == (TASK_TYPES[0], "apple", "fridge", "")
    reasons = ("2 left out: movable or sliced", "1 left out: no game file", "1 left out: not solvable")
    assert f"2 games; {'; '.join(reasons)}; 2 left out: other task types" in caplog.text


def test_a_split_without_games_names_the_command(tmp_path):
    put(tmp_path, "a", solvable=False)
    with pytest.raises(ValueError, match=r"1 left out: not solvable; run .*alfworld_games --out .* --split train"):
        find_games(tmp_path, "train", TASK_TYPES)
    with pytest.raises(ValueError, match=r"no playable game in .*--split valid_seen"):
        find_games(tmp_path, "valid_seen", TASK_TYPES)


@pytest.mark.parametrize("file", ["traj_data.json", "game.tw-pddl"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"task_type": "", "pddl_params": [], "grammar": 3}', "\udcff"])
def test_a_broken_file_is_named(tmp_path, file, text):
    put(tmp_path, "a")
    (put(tmp_path, "b") / file).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"trial_b/{file} is broken"):
        find_games(tmp_path, "train", TASK_TYPES)


HEAT = "pick_heat_then_place_in_recep"
OPEN = {"opened": {("cabinet 1",), ("fridge 1",)}}


@pytest.mark.parametrize(
    ("held", "at", "task_type", "changes", "action"),
    [
        (None, "", TASK_TYPES[0], {}, "go to cabinet 1"),
        (None, "a", TASK_TYPES[0], {}, "open cabinet 1"),
        (None, "a", TASK_TYPES[0], OPEN, "take apple 1 from cabinet 1"),
        ("apple 1", "a", TASK_TYPES[0], {}, "go to fridge 1"),
        ("apple 1", "c", TASK_TYPES[0], {}, "open fridge 1"),
        ("apple 1", "c", TASK_TYPES[0], OPEN, "put apple 1 in/on fridge 1"),
        ("pen 1", "a", TASK_TYPES[0], OPEN, "go to countertop 1"),  # not wanted, and the cabinet cannot contain it
        ("pen 1", "b", TASK_TYPES[0], {}, "put pen 1 in/on countertop 1"),
        ("apple 1", "", HEAT, {}, "go to microwave 1"),
        ("apple 1", "d", HEAT, {}, "heat apple 1 with microwave 1"),  # the microwave stays closed
        ("apple 1", "", HEAT, {"ishot": {("apple 1",)}}, "go to fridge 1"),
        (None, "c", HEAT, {"inreceptacle": {("apple 1", "fridge 1")}}, "open fridge 1"),  # at home, but not hot
    ],
)
def test_the_oracle_decides_from_the_facts(held, at, task_type, changes, action):
    """In a kitchen with apple 1 in the closed cabinet 1, and pen 1 on the countertop."""
    spots = {"cabinet 1": "a", "countertop 1": "b", "fridge 1": "c", "microwave 1": "d", "sinkbasin 1": "d"}
    places = {"apple 1": "cabinet 1", "pen 1": "countertop 1"}
    facts = {
        "atlocation": {("agent1", at)},
        "holds": {("agent1", held)} if held else set(),
        "inreceptacle": {(thing, place) for thing, place in places.items() if thing != held},
        "objecttype": {(thing, thing.split()[0] + "type") for thing in places},
        "receptacleatlocation": set(spots.items()),
        "receptacletype": {(spot, spot.split()[0] + "type") for spot in spots},
        "cancontain": {("countertoptype", "pentype"), ("cabinettype", "appletype"), ("fridgetype", "appletype")},
        "openable": {("cabinet 1",), ("fridge 1",), ("microwave 1",)},
    }
    game = Game("", task_type, "apple", "fridge", "")
    assert Oracle(game, defaultdict(set, facts | changes), "put {o} in/on {r}").decide()[1] == action


def test_the_oracle_does_not_go_back_and_forth_between_two_homes():
    """With one wanted object in each of two possible homes, the nearest home was always the other one."""
    things, homes = ("pencil 1", "pencil 2"), ("shelf 1", "shelf 2")
    facts = {
        "objecttype": {(thing, "penciltype") for thing in things},
        "inreceptacle": set(zip(things, homes, strict=True)),
        "receptacletype": {(home, "shelftype") for home in homes},
        "receptacleatlocation": {(home, home) for home in homes},
    }
    game, actions = Game("", "pick_two_obj_and_place", "pencil", "shelf", ""), []
    for at in ("door", *homes):
        now = defaultdict(set, facts | {"atlocation": {("agent1", at)}})
        actions.append(Oracle(game, now, "move {o} to {r}").decide()[1])
    assert actions == ["go to shelf 2", "go to shelf 2", "take pencil 2 from shelf 2"]


# ------------------------------------------------------------------------------------------------------ the engine


def look_first(env: AlfWorld, actions: list[str], rng) -> tuple[str, str]:
    """The oracle, but its first action leaves the stored walkthrough."""
    return oracle_player(env, actions, rng) if actions else ("", "look")


@pytest.mark.parametrize("split", SPLITS)
def test_games_come_in_mixed_order_and_the_oracle_follows_their_walkthrough_or_finds_a_short_way(env, split):
    assert env.size(split) == ALFWORLD_GAMES[split]
    for seed in range(env.size(split)):
        assert env.reset(split, seed)[1]["task_type"] == TASK_TYPES[seed % 6]  # any first N are a fair sample
        assert actions_of(env, split, seed) == stored(env)["walkthrough"]
        assert len(actions_of(env, split, seed, look_first)) <= 1 + len(env.game.walkthrough) + 2
        actions_of(env, split, seed, careless_player(0.3))  # and it wins from any other state


def test_the_planner_is_asked_when_the_oracle_fails(env, monkeypatch):
    monkeypatch.setattr(Oracle, "decide", lambda self: ("No idea.", "dance"))
    for seed in range(env.size("valid_seen")):
        actions_of(env, "valid_seen", seed, look_first)


def test_the_task_ends_every_observation_or_only_the_first(env, alfworld_data):
    first, _ = env.reset("train", 0)
    assert first.startswith("You are in the middle of a room. Looking quickly around you, you see a ")
    assert set(env._engine.commands) - set(env.admissible()) == {"help"}
    task = first[first.index(" Task: put ") :]
    assert env.step("dance")[0] == f"Nothing happens.{task}"
    plain = AlfWorld(AlfWorldConfig(data=alfworld_data, restate_task=0))
    assert plain.reset("train", 0)[0] == first
    assert plain.step("dance")[0] == "Nothing happens."


STOCK = """import json, sys, textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
from textworld.envs import PddlEnv
env, answers = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True))), []
for path, actions in json.loads(sys.argv[1]):
    env.load(path)
    answers.append([env.reset().feedback])
    for action in actions:
        state, _, won = env.step(action)
        answers[-1].append([state.feedback, won, state["admissible_commands"]])
print(json.dumps(answers))"""


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="textworld as shipped does not run on Python 3.13")
def test_the_speed_ups_change_nothing(env):
    played, fast, engine = [], [], env._engine
    for seed in range(1, 5):  # light, clean, heat, cool
        actions = [*actions_of(env, "train", seed, careless_player(0.5)), "help"]
        played.append((env.game.path, actions))
        fast.append([engine.start(env.game.path)])
        fast[-1] += [[*engine.step(action), engine.commands] for action in actions]
    said = {action.split()[0] for _, actions in played for action in actions}
    assert said >= {"go", "open", "take", "move", "clean", "heat", "cool", "use"}
    assert any(answer[0] == "Nothing happens." for _, *answers in fast for answer in answers)
    assert json.loads(python(STOCK, json.dumps(played))) == json.loads(json.dumps(fast))


def test_an_engine_that_raises_can_be_reset(env, monkeypatch):
    from worlds.alfworld_engine import EngineError

    env.reset("train", 0)
    with monkeypatch.context() as patch:
        patch.setattr(env._engine._env, "step", lambda command: 1 / 0)
        with pytest.raises(EngineError, match=r"'look' in .*game.tw-pddl: ZeroDivisionError"):
            env.step("look")
    assert actions_of(env, "train", 0)


# ------------------------------------------------------------------------------------------------------- the data


def test_no_data_names_the_command(alfworld_data, tmp_path, monkeypatch):
    message = r"no ALFWorld games in .*alfworld-download.*worlds.alfworld_games --out .* --split train --games 100"
    with pytest.raises(ValueError, match=message):
        AlfWorld(AlfWorldConfig(data=str(tmp_path)))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        AlfWorld()
    monkeypatch.setenv("ALFWORLD_DATA", alfworld_data)
    assert AlfWorld().size("train") == ALFWORLD_GAMES["train"]


@pytest.mark.parametrize(("key", "old", "new"), [
    ("pddl_problem", ")\n(:init", "\n(:init"),
    ("pddl_domain", "(objectType ?o", "(objectKind ?o"),  # the translator calls sys.exit
    ("grammar", '"intro"', '"outro"'),
])  # fmt: skip
def test_a_game_that_the_engine_cannot_read_is_named(alfworld_data, tmp_path, key, old, new):
    shutil.copytree(alfworld_data, tmp_path, dirs_exist_ok=True)
    env = AlfWorld(AlfWorldConfig(data=str(tmp_path)))
    env.reset("train", 0)
    path, game = Path(env.game.path), stored(env)
    path.write_text(json.dumps(game | {key: game[key].replace(old, new)}))
    env.reset("train", 1)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{path.name} is broken"):
            env.reset("train", 0)
    assert actions_of(env, "train", 1)


@pytest.mark.parametrize("expression", [
    "open('FILE', 'w').close()",
    "r.name.join(map(open, ('FILE',), 'w'))",
    "r.name + str(open('FILE', 'w').close())",
    "r.__class__",
    "(lambda: r.name)()",
])  # fmt: skip
@pytest.mark.parametrize(("old", "new"), [
    ("You close the {r.name}", "You close the {%s}"),
    ("[{o.indefinite + ' ' + o.name |", "[{%s |"),
    ("-= Welcome", "{%s}"),
    ("open {r}", "open {%s}"),
    ('feedback :: "#OpenObject.feedback#"', 'feedback :: "{%s}"'),
])  # fmt: skip
def test_a_games_grammar_runs_nothing(alfworld_data, tmp_path, old, new, expression):
    """textworld calls eval with every {...} in a grammar."""
    shutil.copytree(alfworld_data, tmp_path, dirs_exist_ok=True)
    env, file = AlfWorld(AlfWorldConfig(data=str(tmp_path))), tmp_path / "left_by_payload"
    env.reset("train", 0)
    path, game = Path(env.game.path), stored(env)
    assert old in game["grammar"]
    grammar = game["grammar"].replace(old, new % expression.replace("FILE", str(file)))
    path.write_text(json.dumps(game | {"grammar": grammar}))
    env.reset("train", 1)
    with pytest.raises(ValueError, match=f"{path.name} is broken: EngineError: the grammar's expression .+$"):
        env.reset("train", 0)
    assert not file.exists()
    assert actions_of(env, "train", 1)


def test_the_expressions_of_a_grammar_have_their_values():
    pytest.importorskip("textworld", reason=ALFWORLD_INSTALL)
    from textworld.generator.game import EntityInfo

    from worlds.alfworld_engine import EngineError, evaluate, parse_expression

    thing, nameless = EntityInfo("o", "object"), EntityInfo("p", "object")
    thing.name, thing.indefinite, nameless.name = "apple 1", "a", ""
    variables = {"o": thing, "p": nameless}
    for text in (
        "o",
        "o.name",
        "o.indefinite + ' ' + o.name ",
        " p.name or p.id",
        "p.name or o.name or p.id",
        "p.name",
    ):
        assert evaluate(parse_expression(text), variables) == eval(text.strip(), {}, variables)
    for text in ("", "o.", "1", "o.name * 9", "o.name and o.id", "o()", "o.name.id", "o['name']", "f'{o}'", "(o := p)"):
        with pytest.raises(EngineError):
            parse_expression(text)


def test_a_verb_is_text_with_two_names(alfworld_data, tmp_path):
    shutil.copytree(alfworld_data, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.rglob("game.tw-pddl"):
        path.write_text(path.read_text().replace("move {o} to {r}", "move {o.__class__} to {r:999999999}"))
    with pytest.raises(ValueError, match="is broken: its grammar has no PutObject"):
        AlfWorld(AlfWorldConfig(data=str(tmp_path)))


def test_older_games_have_their_own_verb(alfworld_data, tmp_path):
    """Published games say `put X in/on Y` where newer ones say `move X to Y`."""
    shutil.copytree(alfworld_data, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.rglob("game.tw-pddl"):
        path.write_text(path.read_text().replace("move {o} to {r}", "put {o} in/on {r}"))
    env = AlfWorld(AlfWorldConfig(data=str(tmp_path)))
    assert "| put O in/on R |" in env.instructions
    assert "move" not in env.instructions
    for seed in range(3):
        for player in (careless_player(0.3), oracle_player):  # the stored walkthrough still says move
            assert not any(action.startswith("move") for action in actions_of(env, "train", seed, player))


# ------------------------------------------------------------------------------------------------------ the writer


@pytest.fixture
def writer(alfworld_data):
    """The module, which needs the engine."""
    from worlds import alfworld_games

    return alfworld_games


def config_of(writer, out: Path, **settings):
    return writer.GamesConfig(str(out), **{"games": 3, "receptacles": 6, "objects": 6} | settings)


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_files_other_seed_other_files(writer, tmp_path, monkeypatch):
    code = """import sys; from worlds.alfworld_games import *
write_games(GamesConfig(sys.argv[1], games=3, receptacles=6, objects=6))"""
    python(code, str(tmp_path / "elsewhere"), PYTHONHASHSEED="7")
    monkeypatch.setattr(sys, "argv", ["mine"])
    for seed in range(2):
        writer.write_games(config_of(writer, tmp_path / str(seed), seed=seed))
    assert sys.argv == ["mine"]  # the translator overwrites it
    first = texts(tmp_path / "0")
    assert len(first) == 9
    assert first == texts(tmp_path / "elsewhere")
    assert not set(first.values()) & set(texts(tmp_path / "1").values())


def test_unseen_rooms_are_in_no_other_split(alfworld_data):
    rooms = {}
    for split in SPLITS:
        found = (Path(alfworld_data) / LAYOUT / split).rglob("traj_data.json")
        rooms[split] = {json.loads(path.read_text())["scene"]["scene_num"] for path in found}
    assert not rooms["valid_unseen"] & (rooms["train"] | rooms["valid_seen"])


def test_no_game_is_in_two_splits(writer, monkeypatch):
    """The world is so small that both splits would draw the same starts, if the digest did not separate them."""
    monkeypatch.setattr(writer, "solve", lambda engine, game: ["look"])
    monkeypatch.setattr(writer.constants, "TRAIN_SCENE_NUMBERS", [410])
    monkeypatch.setattr(writer, "ATTEMPTS", 10_000)
    monkeypatch.setattr(writer, "TASK_TYPES", TASK_TYPES[:1])
    taken = {"train": set(), "valid_seen": set()}
    for split, digests in taken.items():
        config = config_of(writer, Path(), split=split, receptacles=5, objects=4)
        for number in range(100):
            writer.make_game(None, config, number, digests)
    assert [len(digests) for digests in taken.values()] == [100, 100]  # and never twice in one split
    assert not taken["train"] & taken["valid_seen"]


def test_the_digest_sees_what_the_player_sees(writer):
    room = writer.make_room(10, 12)
    spots = list(room.location)
    one, like, other, moved = (
        writer.Draw(room, TASK_TYPES[0], "Apple", "Fridge", {name: spots[place]}).digest()
        for name, place in [("Apple|1", 0), ("Apple|2", 0), ("Pen|1", 0), ("Apple|1", 1)]
    )
    assert one == like
    assert len({one, other, moved}) == 3


def test_the_writer_writes_a_whole_split_or_nothing(writer, alfworld_data, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "make_game", Mock(side_effect=[{"a": "b"}, KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        writer.write_games(config_of(writer, tmp_path))
    assert not (tmp_path / LAYOUT / "train").exists()
    with pytest.raises(ValueError, match="exists already; remove it or choose another --out"):
        writer.write_games(config_of(writer, Path(alfworld_data)))


def test_what_cannot_be_solved_is_drawn_again(writer, monkeypatch):
    solve = Mock(side_effect=[None, None, ["look"], None, None, None])
    monkeypatch.setattr(writer, "solve", solve)
    files = writer.make_game(None, config_of(writer, Path()), 0, set())
    problems = [game["pddl_problem"] for _, game in (call.args for call in solve.call_args_list)]
    assert problems[2] in files.values()
    assert len(set(problems)) == len(problems) == 3
    monkeypatch.setattr(writer, "ATTEMPTS", 3)
    with pytest.raises(ValueError, match="no pick_and_place_simple found in 3 draws"):
        writer.make_game(None, config_of(writer, Path()), 0, set())


def test_a_game_without_a_way_to_win_has_no_solution(writer, env):
    env.reset("train", 0)
    game = stored(env)
    stuck = "\n".join(line for line in game["pddl_problem"].split("\n") if not line.startswith("(pickupable"))
    assert writer.solve(env._engine, game) == game["walkthrough"]
    assert writer.solve(env._engine, game | {"pddl_problem": stuck}) is None


@pytest.mark.parametrize("arguments", [["--games", "0"], ["--split", "test"], ["--objects", "many"], ["--speed", "9"]])
def test_a_bad_command_line_ends_with_status_2(writer, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["alfworld_games.py", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match=r"^2$"):
        writer.main()
    assert arguments[0].strip("-") in capsys.readouterr().err
