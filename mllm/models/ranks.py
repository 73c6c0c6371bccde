"""What ranks that train together have to do together."""

import torch
from torch import nn


def is_called_together(module: nn.Module, *, training: bool) -> bool:
    """Whether the ranks have to call a module equally often.

    Ranks that train or shard a module run its collectives together: one that skips it leaves the others waiting for
    ever (DeepSpeed issue 7170). What is whole and frozen on every rank has no collectives; what is whole has none
    outside of training.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if torch.distributed.get_world_size() == 1:
        return False
    parameters = list(module.parameters())
    # Of ZeRO-3 and of FSDP2.
    is_sharded = any(hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") for parameter in parameters)
    return is_sharded or (training and any(parameter.requires_grad for parameter in parameters))
