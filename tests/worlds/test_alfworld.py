"""ALFWorld: which games count, the contract on the real engine, its speed-ups against it as shipped, and the writer.

What needs the engine is skipped without it; the rest runs anyway. The games are written here, a few of each split.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ALFWORLD_GAMES, ALFWORLD_INSTALL

import envs
from worlds.alfworld_env import LAYOUT, SPLITS, TASK_TYPES, AlfWorld, AlfWorldConfig, Game, Oracle, find_games

ROOT = Path(__file__).parents[2]


def config_of(out: Path, split: str, **changes):
    from worlds.alfworld_games import GamesConfig

    return GamesConfig(str(out), split, **{"games": ALFWORLD_GAMES[split], "receptacles": 12, "objects": 10} | changes)


@pytest.fixture(scope="session")
def data(alfworld_data) -> str:
    return alfworld_data


@pytest.fixture(scope="session")
def env(data) -> AlfWorld:
    return AlfWorld(AlfWorldConfig(data=data))


def play(env: AlfWorld, split: str, seed: int, player: envs.Player, rng_seed: int = 0) -> list[tuple]:
    """Every observation, action and answer of an episode."""
    rng, actions, transcript = random.Random(rng_seed), [], [env.reset(split, seed)]
    terminated = truncated = False
    while not terminated and not truncated:
        actions.append(player(env, actions, rng)[1])
        answer = env.step(actions[-1])
        _, _, terminated, truncated, _ = answer
        transcript.append((actions[-1], *answer, env.admissible()))
    return transcript


def python(code: str, *args: str, **environ: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, check=True
    ).stdout


# ---------------------------------------------------------------------------------------------- without the engine


def test_the_project_works_without_the_engine():
    loaded = python("import envs, sys; print({'alfworld', 'textworld', 'fast_downward'} & set(sys.modules))")
    assert loaded.strip() == "set()"


def test_a_missing_engine_names_the_command():
    code = "import sys; sys.modules['textworld'] = None; import envs\ntry: envs.make_envs('alfworld', [], 1)\n"
    assert ALFWORLD_INSTALL in python(code + "except ImportError as error: print(error)")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_types": ("pick_nothing",)}, "unknown task types"),
        ({"task_types": ()}, "task_types is empty"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"restate_task": 2}, "restate_task must be 0 or 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AlfWorldConfig(**settings)


GOAL = {"object_target": "Apple", "parent_target": "Fridge", "toggle_target": ""}
PLAYED = {"pddl_domain": "", "grammar": "", "pddl_problem": "", "solvable": True}


def put(root: Path, name: str, task_type: str = TASK_TYPES[0], **game) -> Path:
    """A folder as the loader wants it: train/NAME/trial_NAME, settings of the game file."""
    folder = root / "train" / name / f"trial_{name}"
    folder.mkdir(parents=True)
    (folder / "traj_data.json").write_text(json.dumps({"task_type": task_type, "pddl_params": GOAL}))
    (folder / "game.tw-pddl").write_text(json.dumps(PLAYED | game))
    return folder


def test_the_games_that_count_are_those_of_the_stock_loader(tmp_path, caplog):
    root = tmp_path / "movable" / LAYOUT  # only what is below it counts
    for name in "ba":
        put(root, name)
    put(root, "unsolvable", solvable=False)
    put(root, "pick-AppleSliced-1")
    put(root, "pick_and_place_with_movable_recep-1")
    put(root, "other", task_type="pick_and_place_with_other_recep")
    (put(root, "unfinished") / "game.tw-pddl").unlink()
    games = find_games(root, "train", TASK_TYPES)
    assert [Path(game.path).parent.name for game in games] == ["trial_a", "trial_b"]
    assert (games[0].task_type, games[0].kind, games[0].home, games[0].lamp) == (TASK_TYPES[0], "apple", "fridge", "")
    reasons = ("2 left out: movable or sliced", "1 left out: no game file", "1 left out: not solvable")
    assert f"2 games; {'; '.join(reasons)}; 1 left out: other task types" in caplog.text


def test_games_of_other_task_types_are_left_out(tmp_path):
    put(tmp_path, "a")
    put(tmp_path, "b", task_type=TASK_TYPES[1])
    (game,) = find_games(tmp_path, "train", TASK_TYPES[1:])
    assert game.task_type == TASK_TYPES[1]


def test_a_split_without_games_names_the_command(tmp_path):
    put(tmp_path, "a", solvable=False)
    with pytest.raises(ValueError, match=r"1 left out: not solvable; run .*alfworld_games --out .* --split train"):
        find_games(tmp_path, "train", TASK_TYPES)
    with pytest.raises(ValueError, match=r"no playable game in .*--split valid_seen"):
        find_games(tmp_path, "valid_seen", TASK_TYPES)
    with pytest.raises(ValueError, match="unknown split 'test'; alfworld has train, valid_seen, valid_unseen"):
        find_games(tmp_path, "test", TASK_TYPES)


@pytest.mark.parametrize("file", ["traj_data.json", "game.tw-pddl"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"task_type": "", "pddl_params": [], "grammar": 3}', "\udcff"])
def test_a_broken_file_is_named(tmp_path, file, text):
    put(tmp_path, "a")
    (put(tmp_path, "b") / file).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"trial_b/{file} is broken"):
        find_games(tmp_path, "train", TASK_TYPES)


def oracle(held: str | None = None, at: str = "middle", task: int = 0, **changes: set) -> str:
    """The oracle's action in a kitchen: apple 1 in the closed cabinet 1, pen 1 on the countertop."""
    spots = {"cabinet 1": "a", "countertop 1": "b", "fridge 1": "c", "microwave 1": "d", "sinkbasin 1": "d"}
    facts = {key: set() for key in ("holds", "ishot", "isclean", "iscool", "opened", "objecttype", "inreceptacle")} | {
        "atlocation": {("agent1", at)},
        "receptacleatlocation": set(spots.items()),
        "receptacletype": {(spot, spot.split()[0] + "type") for spot in spots},
        "cancontain": {("countertoptype", "pentype"), ("cabinettype", "appletype"), ("fridgetype", "appletype")},
        "openable": {("cabinet 1",), ("fridge 1",), ("microwave 1",)},
    }
    for thing, place in {"apple 1": "cabinet 1", "pen 1": "countertop 1"}.items():
        facts["objecttype"].add((thing, thing.split()[0] + "type"))
        facts["holds" if thing == held else "inreceptacle"].add(("agent1", thing) if thing == held else (thing, place))
    return Oracle(Game("", TASK_TYPES[task], "apple", "fridge", ""), facts | changes, "put {o} in/on {r}").decide()[1]


def test_the_oracle_decides_from_the_facts():
    assert oracle() == "go to cabinet 1"
    assert oracle(at="a") == "open cabinet 1"
    assert oracle(at="a", opened={("cabinet 1",)}) == "take apple 1 from cabinet 1"
    assert oracle("apple 1", at="a") == "go to fridge 1"
    assert oracle("apple 1", at="c") == "open fridge 1"
    assert oracle("apple 1", at="c", opened={("fridge 1",)}) == "put apple 1 in/on fridge 1"
    assert oracle("pen 1", at="a") == "go to countertop 1"  # not wanted, and the cabinet may not hold it
    assert oracle("pen 1", at="b") == "put pen 1 in/on countertop 1"
    heat = TASK_TYPES.index("pick_heat_then_place_in_recep")
    assert oracle("apple 1", task=heat) == "go to microwave 1"
    assert oracle("apple 1", task=heat, at="d") == "heat apple 1 with microwave 1"  # done from outside
    assert oracle("apple 1", task=heat, ishot={("apple 1",)}) == "go to fridge 1"
    raw = {("apple 1", "fridge 1"), ("pen 1", "countertop 1")}
    assert oracle(task=heat, at="c", inreceptacle=raw) == "open fridge 1"  # where it belongs, but not hot


# --------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("split", SPLITS)
def test_all_games_are_there_in_mixed_order(env, split):
    assert env.size(split) == ALFWORLD_GAMES[split]
    types = [env.reset(split, seed)[1]["task_type"] for seed in range(ALFWORLD_GAMES[split])]
    assert types == [*TASK_TYPES, *TASK_TYPES][: ALFWORLD_GAMES[split]]  # any first N are a fair sample


def test_same_seed_same_transcript(env, data):
    """In another environment and an interpreter that hashes strings otherwise: the engine keeps its facts in sets."""
    code = """import random, sys, envs
env, rng = envs.make_envs("alfworld", ["data=" + sys.argv[1]], 1)[0], random.Random(0)
for seed in range(2):
    print(env.reset("train", seed))
    for _ in range(20):
        print(env.step(rng.choice(env.admissible())), env.oracle())"""
    texts = [python(code, data, PYTHONHASHSEED=hash_seed) for hash_seed in "12"]
    assert texts[0] == texts[1]
    assert texts[0].count("\n") == 42
    assert play(env, "train", 1, envs.random_player) == play(env, "train", 1, envs.random_player)
    assert play(env, "train", 1, envs.random_player) != play(env, "train", 2, envs.random_player)


def test_the_first_observation_is_the_room_and_the_task(env):
    observation, info = env.reset("train", 0)
    assert observation.startswith("You are in the middle of a room. Looking quickly around you, you see a ")
    assert info == {"task_type": TASK_TYPES[0], "success": False}
    task = observation[observation.index(" Task: put ") :]
    assert task.endswith(".")
    assert env.step("look")[0].endswith(task)


def test_the_task_is_restated_only_on_demand(data):
    plain = AlfWorld(AlfWorldConfig(data=data, restate_task=0))
    assert " Task: put " in plain.reset("train", 0)[0]
    assert "Task" not in plain.step("look")[0]
    assert plain.step("dance")[0] == "Nothing happens."


@pytest.mark.parametrize(
    "action", ["", "dance", "go to moon 1", "go to", "take apple 1 from", "x" * 10_000, "<|im_end|>"]
)
def test_an_action_that_is_not_understood_changes_nothing(env, action):
    env.reset("train", 0)
    before = env.admissible()
    observation, reward, terminated, truncated, info = env.step(action)
    assert observation.startswith("Nothing happens. Task: ")
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info == {"valid": False, "task_type": TASK_TYPES[0], "success": False}
    assert env.admissible() == before


def test_the_limit_truncates_and_the_engine_terminates(data):
    env = AlfWorld(AlfWorldConfig(data=data, max_steps=3))
    env.reset("train", 0)
    answers = [env.step("look")[1:4] for _ in range(3)]
    assert answers == [(0.0, False, False), (0.0, False, False), (0.0, False, True)]
    env.reset("train", 0)
    assert not env.step("look")[3]  # the count starts anew
    *_, (_, _, reward, terminated, truncated, info, _) = play(AlfWorld(AlfWorldConfig(data=data)), "train", 0, won)
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    length = len(play(AlfWorld(AlfWorldConfig(data=data)), "train", 0, won)) - 1
    exactly = AlfWorld(AlfWorldConfig(data=data, max_steps=length))
    assert play(exactly, "train", 0, won)[-1][3:5] == (True, False)  # done in the last step that there is


won = envs.oracle_player


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("slip", [0.0, 0.3])
def test_the_oracle_wins_from_wherever_it_is(env, split, slip):
    for seed in range(env.size(split)):
        transcript = play(env, split, seed, envs.careless_player(slip), rng_seed=seed)
        rewards = [reward for _, _, reward, *_ in transcript[1:]]
        assert rewards == [0.0] * (len(rewards) - 1) + [1.0], env.game
        if slip == 0:
            walkthrough = json.loads(Path(env.game.path).read_text())["walkthrough"]
            assert [action for action, *_ in transcript[1:]] == walkthrough


@pytest.mark.parametrize("split", SPLITS)
def test_the_facts_lead_on_from_where_the_walkthrough_was_left(env, split):
    """The first action is a look around; the way from there is nearly as short as the planner's."""
    first_look = lambda env, actions, rng: envs.oracle_player(env, actions, rng) if actions else ("", "look")  # noqa: E731
    for seed in range(env.size(split)):
        actions = [action for action, *_ in play(env, split, seed, first_look)[1:]]
        assert len(actions) <= 1 + len(env.game.walkthrough) + 2, env.game


def test_the_planner_helps_out(env, monkeypatch):
    monkeypatch.setattr(Oracle, "decide", lambda self: ("No idea.", "dance"))
    for seed in range(6):
        assert play(env, "valid_seen", seed, envs.careless_player(0.3))[-1][2] == 1.0


def test_the_written_walkthrough_wins(env):
    for split in SPLITS:
        for seed in range(env.size(split)):
            env.reset(split, seed)
            walkthrough = json.loads(Path(env.game.path).read_text())["walkthrough"]
            rewards = [env.step(action)[1] for action in walkthrough]
            assert rewards == [0.0] * (len(rewards) - 1) + [1.0]


def test_taking_turns_is_playing_one_after_another(data):
    four = envs.make_envs("alfworld", [f"data={data}"], 4)
    alone = [play(env, "train", seed, envs.random_player)[:16] for seed, env in enumerate(four)]
    together = [[env.reset("train", seed)] for seed, env in enumerate(four)]
    for step in range(1, 16):
        for env, mine, recorded in zip(four, together, alone, strict=True):
            if len(recorded) > step:
                mine.append((recorded[step][0], *env.step(recorded[step][0]), env.admissible()))
    assert together == alone


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
    played, fast = [], []
    for seed in range(6):  # every task type: a whim in half the steps, so that every kind of answer is seen
        actions = [action for action, *_ in play(env, "train", seed, envs.careless_player(0.5), seed)[1:]] + ["help"]
        played.append((env.game.path, actions))
        engine = env._engine
        fast.append([engine.start(env.game.path)])
        fast[-1] += [[*engine.step(action), engine.commands] for action in actions]
    assert sum(len(actions) for _, actions in played) > 50
    assert json.loads(python(STOCK, json.dumps(played))) == json.loads(json.dumps(fast))


def test_the_command_line_is_left_alone(env):
    argv = list(sys.argv)
    env.reset("valid_unseen", 5)
    assert sys.argv == argv


# ------------------------------------------------------------------------------------------------------- bad data


def test_no_data_names_the_command(data, tmp_path, monkeypatch):
    message = r"no ALFWorld games in .*alfworld-download.*worlds.alfworld_games --out .* --split train --games 100"
    with pytest.raises(ValueError, match=message):
        AlfWorld(AlfWorldConfig(data=str(tmp_path)))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        AlfWorld()
    monkeypatch.setenv("ALFWORLD_DATA", data)
    assert AlfWorld().size("train") == ALFWORLD_GAMES["train"]


def test_a_number_that_is_not_there_is_refused(env):
    for seed in (-1, ALFWORLD_GAMES["train"]):
        with pytest.raises(ValueError, match=f"train has 12 games, numbered from 0; there is no {seed}"):
            env.reset("train", seed)


@pytest.mark.parametrize(("key", "old", "new"), [
    ("pddl_problem", ")\n(:init", "\n(:init"),
    ("pddl_domain", "(objectType ?o", "(objectKind ?o"),  # the translator would exit the process
    ("grammar", '"intro"', '"outro"'),
])  # fmt: skip
def test_a_game_that_the_engine_cannot_read_is_named(data, tmp_path, key, old, new):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    env = AlfWorld(AlfWorldConfig(data=str(tmp_path)))
    env.reset("train", 0)
    path = Path(env.game.path)
    game = json.loads(path.read_text())
    path.write_text(json.dumps(game | {key: game[key].replace(old, new)}))
    env.reset("train", 1)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{path.name} is broken"):
            env.reset("train", 0)
    assert play(env, "train", 1, envs.oracle_player)[-1][2] == 1.0


def test_an_engine_that_raises_can_be_reset(env, monkeypatch):
    from worlds.alfworld_engine import EngineError

    env.reset("train", 0)
    with monkeypatch.context() as patch:
        patch.setattr(env._engine._env, "step", lambda command: 1 / 0)
        with pytest.raises(EngineError, match=r"'look' in .*game.tw-pddl: ZeroDivisionError"):
            env.step("look")
    assert play(env, "train", 0, envs.oracle_player)[-1][2] == 1.0


def test_older_games_have_their_own_verb(data, tmp_path):
    """Published games say `put X in/on Y` where newer ones say `move X to Y`."""
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.rglob("game.tw-pddl"):
        path.write_text(path.read_text().replace("move {o} to {r}", "put {o} in/on {r}"))
    env = AlfWorld(AlfWorldConfig(data=str(tmp_path)))
    assert "| put O in/on R |" in env.instructions
    assert "move" not in env.instructions
    for seed in range(6):
        for player in (envs.careless_player(0.3), envs.oracle_player):  # the stored walkthrough still says move
            transcript = play(env, "train", seed, player)
            assert transcript[-1][2] == 1.0
            assert not any(action.startswith("move") for action, *_ in transcript[1:])


def test_the_oracle_does_not_run_to_and_fro_between_two_homes(env):
    """With one wanted object in each of two possible homes the nearest home was always the other one."""
    things, homes = ("pencil 1", "pencil 2"), ("shelf 1", "shelf 2")
    facts = {key: set() for key in ("holds", "ishot", "isclean", "iscool", "opened", "openable", "cancontain")}
    facts |= {
        "objecttype": {(thing, "penciltype") for thing in things},
        "inreceptacle": set(zip(things, homes, strict=True)),
        "receptacletype": {(home, "shelftype") for home in homes},
        "receptacleatlocation": {(home, home) for home in homes},
    }
    game = Game("", "pick_two_obj_and_place", "pencil", "shelf", "")
    decide = lambda at: Oracle(game, facts | {"atlocation": {("agent1", at)}}, "move {o} to {r}").decide()[1]  # noqa: E731
    assert [decide(at) for at in ("door", *homes)] == ["go to shelf 2", "go to shelf 2", "take pencil 2 from shelf 2"]


# ------------------------------------------------------------------------------------------------------ the writer


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_files_other_seed_other_files(data, tmp_path):
    code = "import sys; from worlds.alfworld_games import *; write_games(GamesConfig(sys.argv[1], games=6, receptacles=12, "
    for seed in "01":
        python(f"{code}objects=10, seed={seed}))", str(tmp_path / seed), PYTHONHASHSEED="7")
    first = texts(tmp_path / "0")
    assert len(first) == 18
    assert first.items() <= texts(Path(data)).items()
    assert not set(first.values()) & set(texts(tmp_path / "1").values())


def test_unseen_rooms_are_in_no_other_split(data):
    rooms = {}
    for split in SPLITS:
        found = (Path(data) / LAYOUT / split).rglob("traj_data.json")
        rooms[split] = {json.loads(path.read_text())["scene"]["scene_num"] for path in found}
    assert not rooms["valid_unseen"] & (rooms["train"] | rooms["valid_seen"])


def test_no_game_is_in_two_splits(data, monkeypatch):
    """Draws from a world so small that the same start comes up in both, were it not for the split of the digests."""
    from worlds import alfworld_games

    monkeypatch.setattr(alfworld_games, "solve", lambda engine, game: ["look"])
    monkeypatch.setattr(alfworld_games.constants, "TRAIN_SCENE_NUMBERS", [410])
    monkeypatch.setattr(alfworld_games, "ATTEMPTS", 10_000)
    monkeypatch.setattr(alfworld_games, "TASK_TYPES", TASK_TYPES[:1])
    taken = {"train": set(), "valid_seen": set()}
    for split, digests in taken.items():
        config = config_of(Path(), split, receptacles=5, objects=4)
        for number in range(100):
            alfworld_games.make_game(None, config, number, digests)
    assert [len(digests) for digests in taken.values()] == [100, 100]  # nor twice in one
    assert not taken["train"] & taken["valid_seen"]


def test_the_digest_sees_what_the_player_sees(data):
    from worlds.alfworld_games import Draw, make_room

    room = make_room(10, 12)
    spots = list(room.location)
    one, like, other, moved = (
        Draw(room, TASK_TYPES[0], "Apple", "Fridge", {name: spots[place]}).digest()
        for name, place in [("Apple|1", 0), ("Apple|2", 0), ("Pen|1", 0), ("Apple|1", 1)]
    )
    assert one == like
    assert len({one, other, moved}) == 3


def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(data, tmp_path, monkeypatch):
    from worlds import alfworld_games

    make, made = alfworld_games.make_game, []

    def killed(*args):
        if made:
            raise KeyboardInterrupt
        return made.append(make(*args)) or made[0]

    monkeypatch.setattr(alfworld_games, "make_game", killed)
    with pytest.raises(KeyboardInterrupt):
        alfworld_games.write_games(config_of(tmp_path, "train", games=2))
    assert not (tmp_path / LAYOUT / "train").exists()


def test_what_cannot_be_solved_is_drawn_again(data, tmp_path, monkeypatch):
    from worlds import alfworld_games

    solve, refused = alfworld_games.solve, []

    def refuse_two(engine, game):
        if len(refused) < 2:
            return refused.append(game["pddl_problem"])
        return solve(engine, game)

    monkeypatch.setattr(alfworld_games, "solve", refuse_two)
    folder = alfworld_games.write_games(config_of(tmp_path, "train", games=1))
    written = [text for name, text in texts(folder).items() if name.endswith(".pddl")]
    assert len(written) == 1
    assert written[0] not in refused

    monkeypatch.setattr(alfworld_games, "ATTEMPTS", 3)
    monkeypatch.setattr(alfworld_games, "solve", lambda engine, game: None)
    with pytest.raises(ValueError, match="no pick_and_place_simple found in 3 draws"):
        alfworld_games.write_games(config_of(tmp_path, "valid_seen"))
    assert not (tmp_path / LAYOUT / "valid_seen").exists()  # all or nothing


def test_a_game_without_a_way_to_win_has_no_solution(env, data):
    from worlds.alfworld_games import solve

    env.reset("train", 0)
    game = json.loads(Path(env.game.path).read_text())
    stuck = "\n".join(line for line in game["pddl_problem"].split("\n") if not line.startswith("(pickupable"))
    assert solve(env._engine, game) == game["walkthrough"]
    assert solve(env._engine, game | {"pddl_problem": stuck}) is None


def test_games_that_are_there_stay(data):
    from worlds.alfworld_games import write_games

    with pytest.raises(ValueError, match="exists already; remove it or choose another --out"):
        write_games(config_of(Path(data), "train"))


@pytest.mark.parametrize("arguments", [["--games", "0"], ["--split", "test"], ["--objects", "many"], ["--speed", "9"]])
def test_a_bad_command_line_ends_with_status_2(data, tmp_path, monkeypatch, capsys, arguments):
    pytest.importorskip("transformers")
    from worlds.alfworld_games import main

    monkeypatch.setattr(sys, "argv", ["alfworld_games.py", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert arguments[0].strip("-") in capsys.readouterr().err
