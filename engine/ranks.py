"""Weights, gradients and optimizer divided among the ranks, for models that do not fit on one device: FSDP2, through
Accelerate.

Each rank keeps a part of every weight. While a layer computes, its weights are gathered; then they are dropped again.
While a rank samples, all weights stay gathered (`gathered`). Otherwise every token would be one gathering of the whole
model, and a rank could not go on to its next token before the others.

What is sharded is not on the main process. So all ranks take part in saving: `full_weights` for a checkpoint that
`from_pretrained` opens, `save_shards` for one that training resumes from. Without --fsdp these functions do nothing.

Not run here: GPUs, several machines. The ranks of several machines need a common file system for checkpoints.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by the name of Accelerate's mixed precision


def sharding_accelerator(**options) -> Accelerator:
    """An Accelerator whose `prepare` divides a model among the ranks. Ends the program if there is one rank alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise SystemExit("--fsdp divides the model among processes: launch at least two, see runs/accelerate")
    if not torch.cuda.is_available():
        # On CPUs Accelerate takes DDP without a word. So it is told that these ranks have GPUs, which lets it shard.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",  # a layer is gathered at a time
        reshard_after_forward=True,
        cpu_ram_efficient_loading=True,  # the main process of each machine reads the weights, the others get their part
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    if dtype := COMPUTE.get(accelerator.mixed_precision):
        # Accelerate's own policy would also round gradients, and log-probs on their way out of the model.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    return accelerator


def prepare_frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model, prepared as the policy is, but not for training."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare_model(model, evaluation_mode=True)
    model = fsdp2_prepare_model(accelerator, model)
    model.set_reshard_after_forward(True)  # lm_head, too: no backward pass comes that would drop its weights
    return model


def whole(value: Tensor) -> float:
    """A number of which each rank may hold a part, such as the norm of all gradients."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within, every rank has whole weights, in the type that it computes in; all ranks enter together."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


# ------------------------------------------------------------------------------------------------------- checkpoints


def full_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """All weights by name, on the CPU of the main process, {} on the others; None if the model is not sharded."""
    if not isinstance(model, FSDPModule):
        return None
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: weight for name, weight in weights.items() if name not in model.all_tied_weights_keys}


def save_shards(folder: Path, model: nn.Module, optimizer: AcceleratedOptimizer) -> Path | None:
    """Every rank writes its part of model and optimizer. Returns the folder, or None if the model is not sharded."""
    if not isinstance(model, FSDPModule):
        return None
    if PartialState().is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    PartialState().wait_for_everyone()
    dcp.save(_state(model, optimizer), checkpoint_id=folder)
    return folder


def load_shards(folder: Path, model: nn.Module, optimizer: AcceleratedOptimizer) -> None:
    """Restore what `save_shards` wrote, in place, on as many ranks as there were or on another number."""
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _state(model: nn.Module, optimizer: AcceleratedOptimizer) -> dict[str, dict]:
    if not optimizer.state:
        # torch makes the moments that are missing by a step without gradient and learning rate, and counts that step.
        get_state_dict(model, optimizer.optimizer)
        for moments in optimizer.state.values():
            moments["step"].zero_()
    weights, moments = get_state_dict(model, optimizer.optimizer)
    return {"model": weights, "optimizer": moments}
