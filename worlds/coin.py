"""The smallest world to train in, and the template for your own.

To add a world: copy this file, change it, add one line to ENVIRONMENTS in envs.py, and run
`accelerate launch train.py --env coin` with your world's name. `worlds.contract.Env` says what each method returns.

The observation names a side of a coin. The agent answers with two words, or with three if its first word was `right`.
Episodes therefore differ in length. The reward is 1.0 if the last word is the side. Both splits have the same tasks.
"""

from dataclasses import dataclass

SPLITS = ("train", "eval")  # the first split is for training


@dataclass(frozen=True)
class CoinConfig:
    max_steps: int = 4  # the episode is truncated after this many actions


class Coin:
    instructions = "Say the side."

    def __init__(self, config: CoinConfig):
        self.config = config

    def size(self, split: str) -> None:
        return None

    def reset(self, split: str, seed: int) -> tuple[str, dict]:
        self.side, self.said, self.steps = ("left", "right")[seed % 2], [], 0
        return f"Toss {seed % 7}: {self.side}.", {"task_type": self.side, "success": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        action, self.steps = action.lower(), self.steps + 1
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
