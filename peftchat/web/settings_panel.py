"""The settings of the page: system prompt, sampling, tools."""

import math
from dataclasses import asdict
from typing import Any

from peftchat.errors import UserError
from peftchat.serving.chat_model import ChatModel
from peftchat.serving.sampling import DEFAULT_NEW_TOKENS, Sampling
from peftchat.serving.tool_calls import read_tools

_TOOLS_EXAMPLE = '[{"type": "function", "function": {"name": "weather", "parameters": {…}}}]'


class SettingsPanel:
    """The fields, with what they hold as `Sampling`, system prompt and tools.

    Args:
        chat: the first model, whose own settings are told as the defaults.
    """

    def __init__(self, chat: ChatModel) -> None:
        import gradio as gr

        own = chat.generation_config
        sampled = bool(own.do_sample)
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self._system = gr.Textbox(
                label="System prompt", info="Empty: the one of the model's template.", lines=2, elem_id="system"
            )
            with gr.Row():
                temperature = _number("Temperature", f"{_told(own.temperature, 1)}" if sampled else "0, greedy")
                top_p = _number("Top p", _told(own.top_p if sampled else None, 1))
                top_k = _number("Top k", _told(own.top_k if sampled else None, "all"))
                longest = _number("Most tokens", _told(own.max_new_tokens, DEFAULT_NEW_TOKENS))
                seed = _number("Seed", "none")
            self._tools = gr.Textbox(
                label="Tools", info=f"A JSON list of functions: {_TOOLS_EXAMPLE}", lines=2, elem_id="tools"
            )
        self.fields: list[Any] = [self._system, self._tools, temperature, top_p, top_k, longest, seed]
        """What a callback gets as its last arguments, for `read_settings`."""


def read_settings(values: tuple[Any, ...]) -> tuple[str | None, str | None, Sampling]:
    """Return the system prompt, the tools and the sampling that the fields hold.

    Args:
        values: of `SettingsPanel.fields`.

    Raises:
        UserError: a field holds what it cannot.
    """
    system, tools, *numbers = values
    names = ("Temperature", "Top p", "Top k", "Most tokens", "Seed")
    temperature, top_p, top_k, longest, seed = (
        _read_number(value, name, whole=name in names[2:]) for value, name in zip(numbers, names, strict=True)
    )
    if temperature is not None and temperature < 0:
        raise UserError(f"expected 0 or more, got {temperature:g}", where="Temperature")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"expected a number above 0 and up to 1, got {top_p:g}", where="Top p")
    for name, value in {"Top k": top_k, "Most tokens": longest}.items():
        if value is not None and value < 1:
            raise UserError(f"expected 1 or more, got {value:g}", where=name)
    if seed is not None and not 0 <= seed < 2**32:
        raise UserError(f"expected 0 to {2**32 - 1}, got {seed:g}", where="Seed")
    whole = [None if value is None else int(value) for value in (longest, top_k, seed)]
    sampling = Sampling(whole[0], temperature, top_p, whole[1], seed=whole[2])
    return (system if system and system.strip() else None), read_tools(tools), sampling


def sampling_as_dict(sampling: Sampling) -> dict[str, Any]:
    """Return the settings that the user made."""
    return {key: value for key, value in asdict(sampling).items() if value is not None and value is not False}


def _told(value: Any, default: Any) -> str:
    return str(default if value is None else value)


def _read_number(value: str | float | None, name: str, *, whole: bool) -> float | None:
    """Return the number that a field holds; None if it is empty."""
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    kind = "a whole number" if whole else "a number such as 0.7"
    try:
        number = float(text)
    except ValueError:
        raise UserError(f"expected {kind} or nothing, got `{text}`", where=name) from None
    if not math.isfinite(number) or (whole and number != int(number)):
        raise UserError(f"expected {kind} or nothing, got `{text}`", where=name)
    return number


def _number(label: str, own: str) -> Any:
    """Return a field for a number that may stay empty.

    Gradio's own field makes 0 of nothing once it is shown (`value ??= 0`): https://github.com/gradio-app/gradio/issues/6728
    """
    import gradio as gr

    name = label.lower().replace(" ", "-")
    return gr.Textbox(label=label, info=f"Empty: {own}.", max_lines=1, min_width=120, elem_id=name)
