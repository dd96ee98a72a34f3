"""The device that this rank computes on."""

import torch


def on_gpu() -> bool:
    """Whether the engines run on GPUs; DS_ACCELERATOR=cpu keeps them off."""
    return device().type == "cuda"


def device() -> torch.device:
    """The device that DeepSpeed has chosen for this rank."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """A host tensor on this rank's device. The copy goes through pinned memory, so that the host need not wait."""
    return tensor if device().type == "cpu" else tensor.pin_memory().to(device(), non_blocking=True)
