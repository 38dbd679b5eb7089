"""The smallest world to train in, and the template for your own: copy it, add a line to ENVIRONMENTS in envs.py, and
run `accelerate launch train.py --env coin`. What each method owes is said once, in `envs.Env`.

The observation names a side of a coin, and the agent says it twice, or three times if it first said `right`. So
episodes differ in length. Only the last word is rewarded.
"""

from dataclasses import dataclass

SPLITS = ("train", "eval")  # the first one is trained on


@dataclass(frozen=True)
class CoinConfig:
    max_steps: int = 4  # actions, then the episode is truncated
    tosses: int = 0  # tasks of each split; 0 for one task per seed


class Coin:
    instructions = "Say the side."

    def __init__(self, config: CoinConfig):
        self.config = config

    def size(self, split: str) -> int | None:
        return self.config.tosses or None

    def reset(self, split: str, seed: int) -> tuple[str, dict]:
        self.side, self.said, self.steps = ("left", "right")[seed % 2], [], 0
        return f"Toss {seed % 7}: {self.side}.", {"task_type": self.side, "success": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        self.steps += 1
        valid = action in ("left", "right")
        self.said += [action] if valid else []
        terminated = valid and len(self.said) == (2 if self.said[0] == "left" else 3)
        success = terminated and action == self.side
        info = {"valid": valid, "task_type": self.side, "success": success}
        truncated = not terminated and self.steps >= self.config.max_steps
        return "Again." if valid else "Nothing happens.", float(success), terminated, truncated, info

    def admissible(self) -> list[str]:
        return ["left", "right"]

    def oracle(self) -> tuple[str, str]:
        return f"It is {self.side}.", self.side
