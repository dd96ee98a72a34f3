"""TODO ranks.device."""

import torch
import torch.distributed


def on_gpu() -> bool:
    """Whether the engines run on GPUs; DS_ACCELERATOR=cpu keeps them off."""
    return device().type == "cuda"


def device() -> torch.device:
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """A host tensor on this rank's device; the host does not wait for the copy, which pinned memory alone allows."""
    return tensor if device().type == "cpu" else tensor.pin_memory().to(device(), non_blocking=True)
