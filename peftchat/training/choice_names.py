"""Choice names: how a run tells what it has chosen and measured, in the recipe's terms."""

import math

from peftchat.runs.run_summary import AutoSetting
from peftchat.training.kept_choices import Choice, Measurement

_NAMES = {
    "compiled": "training.torch_compile",
    "attention": "model.attention",
    "threads": "OMP_NUM_THREADS",
    "loss_chunk": "positions of the loss at a time, as a factor",
    "micro_batch": "training.per_device_train_batch_size",
    "fused_adapter": "adapters computed together with their layers",
}


def choice_name(default: Choice, way: Choice) -> str:
    """Return what is particular to a way, as `field=value`."""
    return ", ".join(f"{name}={value}" for name, value in default.differences(way).items())


def chosen_setting(name: str, value: object, reason: str) -> AutoSetting:
    """Return how a run tells the value that it has chosen for a field."""
    text = str(value).lower() if isinstance(value, bool) else f"{value}"
    return AutoSetting(_NAMES[name], text, reason)


def measured_settings(measured: Measurement) -> tuple[AutoSetting, ...]:
    """Return a setting for each field of which several values were measured."""
    settings = []
    for name, default in ((name, getattr(measured.default, name)) for name in _NAMES):
        tried = {key: ratio for key, ratio in measured.ratios.items() if key.startswith(f"{name}=")}
        if not tried:
            continue
        figures = ", ".join(
            f"{key.removeprefix(f'{name}=')} failed" if ratio == math.inf
            else f"{key.removeprefix(f'{name}=')} {ratio:.2f} times as long"
            + (" with another loss" if key in measured.differs else "")
            for key, ratio in tried.items()
        )  # fmt: skip
        value = getattr(measured.chosen, name)
        reason = f"measured here on {measured.date}: {default} {measured.seconds:.2f} s a pass, {figures}"
        settings.append(chosen_setting(name, value, reason))
    return tuple(settings)
