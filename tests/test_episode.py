"""An episode as a batch, as a file, as a text to be read, and played once more."""

import json
import math

import pytest
import torch

from envs import PLAYERS, make_envs
from episode import Episode, Step, Task, collate, load_episodes, replay, save_episodes, transcript
from rollout import play_scripted

TENSORS = ("ids", "step_ids", "old_logp", "token_entropy", "reward", "length")
TOKEN_LISTS = list(TENSORS[:4])


def made_up(lengths: list[tuple[int, int]], **fields) -> Episode:
    """An episode whose steps insert and then sample the given numbers of tokens; every number in it is another one."""
    episode, count = Episode(Task("toy", "train", 3), "You see a door.", info={"success": False}, **fields), 0
    for inserted, sampled in lengths:
        new = list(range(count + 1, count + 1 + inserted + sampled))
        episode.insert(new[:inserted])
        episode.append_sampled(new[inserted:], [-0.125 * i for i in new[inserted:]], [0.5 * i for i in new[inserted:]])
        end = count = len(episode.ids)
        episode.steps.append(Step(f"why {end}", f"do {end}", f"done {end}", True, end - sampled, end))
    return episode


# ------------------------------------------------------------------------------------------------------- the episode


def test_tokens_are_appended_with_the_step_that_sampled_them():
    """The step index was parsed back out of the prompt's text, and an episode without it ended a run."""
    episode = made_up([(2, 1), (1, 2)])
    assert episode.ids == [1, 2, 3, 4, 5, 6]
    assert episode.step_ids == [-1, -1, 0, -1, 1, 1]
    assert episode.old_logp == [0, 0, -0.375, 0, -0.625, -0.75]
    assert episode.token_entropy == [0, 0, 1.5, 0, 2.5, 3]


# ------------------------------------------------------------------------------------------------------------ batches


def test_collate_by_hand():
    """With the mask taken from the ids, a stop token that doubles as padding was never learnt: here it is id 0."""
    stopped, without_steps = made_up([(1, 1)], reward=0.25), made_up([(1, 0)])
    stopped.append_sampled([0], [-2.0], [3.0])
    batch = collate([stopped, made_up([(2, 1), (1, 1)], reward=1.0), without_steps])
    assert batch.ids.tolist() == [[1, 2, 0, 0, 0], [1, 2, 3, 4, 5], [1, 0, 0, 0, 0]]
    assert batch.step_ids.tolist() == [[-1, 0, 1, -1, -1], [-1, -1, 0, -1, 1], [-1] * 5]
    assert batch.old_logp.tolist() == [[0, -0.25, -2, 0, 0], [0, 0, -0.375, 0, -0.625], [0] * 5]
    assert batch.token_entropy.tolist() == [[0, 1, 3, 0, 0], [0, 0, 1.5, 0, 2.5], [0] * 5]
    assert batch.mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 0, 1], [0] * 5]
    assert batch.reward.tolist() == [0.25, 1.0, 0.0]
    assert batch.length.tolist() == [3, 5, 1]
    dtypes = [getattr(batch, name).dtype for name in TENSORS]
    assert dtypes == [torch.long, torch.long, torch.float32, torch.float32, torch.float32, torch.long]


@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1], list(range(6))])
def test_select_is_the_batch_of_these_episodes_alone(rows, house_episodes):
    selected, alone = collate(house_episodes).select(rows), collate([house_episodes[row] for row in rows])
    assert all(torch.equal(getattr(selected, name), getattr(alone, name)) for name in TENSORS)


# -------------------------------------------------------------------------------------------- files, replay, transcript


def test_saved_episodes_are_loaded_as_they_were_and_replay(house_episodes, tmp_path):
    env = make_envs("house", [], 1)[0]
    without_tokens = play_scripted(env, [Task("house", "train", seed) for seed in range(3)], PLAYERS["oracle"], seed=0)
    save_episodes(tmp_path / "e", [*house_episodes, *without_tokens])
    loaded = load_episodes(tmp_path / "e")
    assert loaded == [*house_episodes, *without_tokens]
    for episode in loaded:
        replay(episode, env)
    for line in (tmp_path / "e").read_text().splitlines():  # texts first, to be read; the long lists last
        assert (list(json.loads(line))[:3], list(json.loads(line))[-4:]) == (["task", "prompt", "steps"], TOKEN_LISTS)


def test_floats_are_saved_bit_for_bit(tmp_path):
    """Rounded to six digits, old_logp no longer fitted its tokens: the ratio of an untouched policy was not 1."""
    odd = [0.1, 1 / 3, -0.0, 5e-324, -1.7976931348623157e308, math.inf, -math.inf, math.nan]
    episode = made_up([(1, 1)], reward=0.1 + 0.2)
    episode.append_sampled([9] * len(odd), odd, odd[::-1])
    save_episodes(tmp_path / "e", [episode])
    loaded = load_episodes(tmp_path / "e")[0]
    for name in ("old_logp", "token_entropy"):
        assert [x.hex() for x in getattr(loaded, name)] == [float(x).hex() for x in getattr(episode, name)]
    assert loaded.reward == 0.1 + 0.2


def test_a_text_may_hold_any_character(tmp_path):
    """A line separator that only Python's splitlines knows cut a record in two."""
    episode = made_up([(1, 1)])
    episode.prompt = 'a\nb\r\u2028\u2029\x85\x1c\x0c"\\ é 屋 \U0001f600 \ud800'
    save_episodes(tmp_path / "e", [episode, episode])
    assert load_episodes(tmp_path / "e") == [episode, episode]


def test_what_stands_beside_the_fields_of_an_episode_is_left_out(tmp_path):
    """The episodes that a run keeps have the texts of their tokens and their modulation beside them."""
    save_episodes(tmp_path / "e", [made_up([(1, 1)])])
    kept = json.loads((tmp_path / "e").read_text()) | {"tokens": ["a"], "modulation": {"base": 0.0}}
    (tmp_path / "kept").write_text(json.dumps(kept))
    assert load_episodes(tmp_path / "kept") == load_episodes(tmp_path / "e")


NO_STEP = '{"task": {"env": "e", "split": "s", "seed": 0}, "steps": [{}]}'


@pytest.mark.parametrize("broken", ["", "{", "[1]", "7", "{}", '{"task": 1}', NO_STEP, "cut"])
def test_a_line_that_is_no_episode_is_named(broken, tmp_path):
    save_episodes(tmp_path / "e", [made_up([(1, 1)])])
    good = (tmp_path / "e").read_text()
    (tmp_path / "e").write_text(good + good[:-20] if broken == "cut" else good + broken + "\n" + good)
    with pytest.raises(ValueError, match="line 2: not an episode") as error:
        load_episodes(tmp_path / "e")
    assert str(tmp_path / "e") in str(error.value)


def test_replay_names_the_first_answer_that_differs():
    """Nobody could play a published episode again, so nobody saw that the world had changed since."""
    env = make_envs("house", [], 1)[0]
    tampered = play_scripted(env, [Task("house", "eval", 7)], PLAYERS["oracle"], seed=0)[0]
    answer = tampered.steps[1].observation
    tampered.steps[1].observation = tampered.steps[2].observation = "You win."
    with pytest.raises(ValueError, match=r"seed=7\), step 1: got .*recorded was 'You win\.'") as error:
        replay(tampered, env)
    assert repr(answer) in str(error.value)
    tampered.prompt = "You are in a boat."
    with pytest.raises(ValueError, match=r"seed=7\): the world starts with .*recorded was 'You are in a boat\.'"):
        replay(tampered, env)


def test_transcript_by_hand():
    episode = made_up([(1, 1), (1, 2)], reward=1.0, terminated=True)
    episode.info["success"], episode.steps[1].valid = True, False
    expected = """\
toy train 3: success, reward 1

You see a door.

step 0  H 0.250  A +1.500
  Thought: why 2
  Action: do 2
  done 2

step 1  H 0.625  A -0.250  (invalid)
  Thought: why 5
  Action: do 5
  done 5
"""
    assert transcript(episode, [0.25, 0.625], [1.5, -0.25]) == expected


@pytest.mark.parametrize(
    ("success", "truncated", "word"), [(True, False, "success"), (False, True, "truncated"), (False, False, "failure")]
)
def test_transcript_says_how_it_ended(success, truncated, word):
    episode = made_up([], truncated=truncated, terminated=not truncated)
    episode.info["success"] = success
    assert transcript(episode, [], []).startswith(f"toy train 3: {word}, reward 0\n")
    assert episode.done
    assert not made_up([]).done
