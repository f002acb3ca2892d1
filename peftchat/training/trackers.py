"""Experiment trackers: what they get beside metrics, and that none of them can stop a run."""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from peftchat.errors import first_line

if TYPE_CHECKING:
    from peftchat.recipe import Recipe
    from peftchat.runs.run_folder import RunFolder
    from peftchat.training.context import TrainContext
    from peftchat.training.trainer import ChatTrainer

PROJECT = "peftchat"
"""The project that runs are filed under, where the user's environment names none."""

_PROJECT_VARIABLES = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}

_EVENTS = tuple(name for name in dir(TrainerCallback) if name.startswith("on_"))


def name_projects(recipe: "Recipe") -> None:
    """Set the project of the recipe's trackers; transformers would file all runs under its own name."""
    for tracker in recipe.training.report_to:
        if tracker in _PROJECT_VARIABLES:
            os.environ.setdefault(_PROJECT_VARIABLES[tracker], PROJECT)


def shield_trackers(trainer: "ChatTrainer", context: "TrainContext") -> None:
    """Wrap the callbacks of the recipe's trackers, in place."""
    for name in context.recipe.training.report_to:
        kind = INTEGRATION_TO_CALLBACK[name]
        callbacks = trainer.callback_handler.callbacks
        for index, callback in enumerate(callbacks):
            if type(callback) is kind:
                callbacks[index] = ShieldedTracker(name, callback, context)


class ShieldedTracker(TrainerCallback):
    """A tracker's callback: it also gets the recipe, the samples and the place of the report, and stops no run.

    A tracker that raises is left alone from then on, with a note; `metrics.jsonl` has everything in any case.

    Args:
        name: the tracker.
        tracker: transformers' callback.
        context: the run.
    """

    def __init__(self, name: str, tracker: TrainerCallback, context: "TrainContext") -> None:
        self._name = name
        self._tracker = tracker
        self._folder = context.run_folder
        self._recipe = context.recipe
        self._tell = context.notes.tell
        self._is_main = context.is_main
        self._has_failed = False

    def call(self, event: str, *arguments: Any, **more: Any) -> None:
        """Pass an event on to the tracker."""
        if self._has_failed:
            return
        try:
            if event == "on_train_end" and self._is_main:
                _SAMPLES[self._name](self._tracker, _samples(self._folder))
            getattr(self._tracker, event)(*arguments, **more)
            if event == "on_train_begin" and self._is_main:
                _DESCRIPTION[self._name](self._tracker, self._folder, self._recipe)
        except Exception as error:
            # Trackers raise what they like: of their service, their files, their network.
            self._has_failed = True
            self._tell(f"{self._name} failed and gets nothing more; the run goes on without it: {first_line(error)}")


def _passing_on(event: str) -> Callable[..., None]:
    def passed_on(self: ShieldedTracker, *arguments: Any, **more: Any) -> None:
        self.call(event, *arguments, **more)

    return passed_on


for _event in _EVENTS:
    setattr(ShieldedTracker, _event, _passing_on(_event))


def _samples(folder: "RunFolder") -> list[Mapping[str, Any]]:
    return list(folder.samples.read()) if folder.samples.path.is_file() else []


def _columns(samples: list[Mapping[str, Any]]) -> list[list[str]]:
    return [[str(sample[name]) for name in ("step", "prompt", "answer")] for sample in samples]


def _describe_to_tensorboard(tracker: Any, folder: "RunFolder", recipe: "Recipe") -> None:
    tracker.tb_writer.add_text("recipe", f"```yaml\n{folder.recipe.read_text(encoding='utf-8')}\n```")
    tracker.tb_writer.add_text("report", str(folder.report.absolute()))


def _samples_to_tensorboard(tracker: Any, samples: list[Mapping[str, Any]]) -> None:
    for sample in samples:
        text = f"**{sample['prompt']}**\n\n{sample['answer']}"
        tracker.tb_writer.add_text("samples", text, global_step=sample["step"])


def _describe_to_wandb(tracker: Any, folder: "RunFolder", recipe: "Recipe") -> None:
    settings = {"recipe": recipe.model_dump(mode="json"), "report": str(folder.report.absolute())}
    tracker._wandb.config.update(settings, allow_val_change=True)


def _samples_to_wandb(tracker: Any, samples: list[Mapping[str, Any]]) -> None:
    if samples:
        table = tracker._wandb.Table(columns=["step", "prompt", "answer"], data=_columns(samples))
        tracker._wandb.log({"samples": table})


def _describe_to_mlflow(tracker: Any, folder: "RunFolder", recipe: "Recipe") -> None:
    tracker._ml_flow.log_text(folder.recipe.read_text(encoding="utf-8"), "recipe.yaml")
    tracker._ml_flow.set_tag("report", str(folder.report.absolute()))


def _samples_to_mlflow(tracker: Any, samples: list[Mapping[str, Any]]) -> None:
    if samples:
        names = ("step", "prompt", "answer")
        columns = dict(zip(names, map(list, zip(*_columns(samples), strict=True)), strict=True))
        tracker._ml_flow.log_table(columns, "samples.json")


def _describe_to_trackio(tracker: Any, folder: "RunFolder", recipe: "Recipe") -> None:
    settings = {"recipe": recipe.model_dump(mode="json"), "report": str(folder.report.absolute())}
    tracker._trackio.config.update(settings, allow_val_change=True)


def _samples_to_trackio(tracker: Any, samples: list[Mapping[str, Any]]) -> None:
    lines = [f"**{sample['prompt']}** (step {sample['step']})\n\n{sample['answer']}" for sample in samples]
    if lines:
        tracker._trackio.log({"samples": tracker._trackio.Markdown("\n\n".join(lines))})


_DESCRIPTION: Mapping[str, Callable[[Any, "RunFolder", "Recipe"], None]] = {
    "tensorboard": _describe_to_tensorboard,
    "wandb": _describe_to_wandb,
    "mlflow": _describe_to_mlflow,
    "trackio": _describe_to_trackio,
}
_SAMPLES: Mapping[str, Callable[[Any, list[Mapping[str, Any]]], None]] = {
    "tensorboard": _samples_to_tensorboard,
    "wandb": _samples_to_wandb,
    "mlflow": _samples_to_mlflow,
    "trackio": _samples_to_trackio,
}
