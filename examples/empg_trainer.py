"""EMPG in TRL: a GRPOTrainer that modulates its advantages by step entropy. Copy it and empg.py beside your script.

    from trl import GRPOConfig
    from empg_trainer import EMPGTrainer
    args = GRPOConfig("out/empg", logging_steps=1)  # without a GPU: use_cpu=True
    trainer = EMPGTrainer(model, reward, args=args, train_dataset=prompts, k=1.0, k_future=1.0, zeta=0.1)
    trainer.train()

model, reward and prompts are those of any GRPOTrainer; tools and environments can be added in the same way. A step is
what the policy samples between two tool results. Without tools an episode is one step: f is 0, and g compares episodes.

TRL 1.16 has no hook for advantages of steps. Its loss accepts advantages of shape (B, L), and one method,
`_generate_and_score_completions`, returns the whole batch of an update before it is split. EMPGTrainer overrides it.

TRL does not keep entropies while it samples, so they cost one more forward pass. Its group-relative advantage adds 1e-4
to the standard deviation; empg.py adds 1e-6. Not covered: images.
"""

import torch
from torch import Tensor
from trl import GRPOTrainer

from empg import Modulation, modulation, spread, step_entropy


class EMPGTrainer(GRPOTrainer):
    """GRPOTrainer with modulated advantages. k, k_future, zeta: as in `empg.modulate`."""

    def __init__(self, *args, k: float = 1.0, k_future: float = 1.0, zeta: float = 0.1, **kwargs):
        super().__init__(*args, **kwargs)
        self.strength = {"k": k, "k_future": k_future, "zeta": zeta}

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Tensor]:
        """TRL's batch of this process, with "advantages" (B, L) in place of (B,).

        EMPG's min, max and means run over the episodes of all processes.
        """
        batch = super()._generate_and_score_completions(inputs)
        step_ids = sampled_steps(batch["completion_mask"] * batch.get("tool_mask", 1))  # (B, L)
        entropy, valid = step_entropy(self.token_entropy(batch), step_ids)  # (B, S), nats
        advantage = self.accelerator.gather(batch["advantages"])  # (B of all processes,), group-relative
        credit = modulation(advantage, self._gather(entropy), self._gather(valid.int()).bool(), **self.strength)
        self._log_credit(credit)
        first = self.accelerator.process_index * len(step_ids)  # each process keeps its own rows
        return batch | {"advantages": spread(credit.advantage[first : first + len(step_ids)], step_ids)}

    @torch.no_grad()
    def token_entropy(self, batch: dict[str, Tensor]) -> Tensor:
        """Entropy (B, L) in nats at every completion token, at the temperature of sampling."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        length, rows = batch["completion_ids"].shape[1], self.args.per_device_train_batch_size
        scored = self._get_per_token_logps_and_entropies(self.model, ids, mask, length, rows, compute_entropy=True)
        return scored[1].float()

    def _gather(self, rows: Tensor) -> Tensor:
        """The rows (B, S) of all processes, padded with 0 to the largest S."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(rows, dim=1))

    def _log_credit(self, credit: Modulation) -> None:
        """Add H, g, f and the advantages that train, over the steps of all processes, to TRL's metrics."""
        if not credit.valid.any():  # with mask_truncated_completions TRL may mask every completion
            return
        names = ("entropy", "g", "f", "advantage")
        entropy, g, f, advantage = (getattr(credit, name)[credit.valid] for name in names)
        metrics = {"entropy/mean": entropy.mean(), "entropy/min": entropy.min(), "entropy/max": entropy.max()}
        metrics |= {"empg/g_min": g.min(), "empg/g_max": g.max(), "empg/f_mean": f.mean()}
        metrics |= {"advantage/mean": advantage.mean(), "advantage/std": advantage.std(correction=0)}
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value.item())


def sampled_steps(mask: Tensor) -> Tensor:
    """The step that sampled each token, -1 if the policy did not: every run of ones in the mask is one step.

    mask: (B, L), 1 where the policy sampled. Between two steps there is always a tool result.
    >>> sampled_steps(torch.tensor([[1, 1, 0, 1, 0, 0]]))
    tensor([[ 0,  0, -1,  1, -1, -1]])
    """
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return ((mask > before).cumsum(1) - 1).where(mask > 0, -1)
