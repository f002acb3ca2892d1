"""Where a model runs."""

import torch


def best_device() -> torch.device:
    """The machine's accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")
