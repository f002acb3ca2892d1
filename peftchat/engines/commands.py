"""The engines and their commands: what each can serve, and how it is told to.

Sources: vLLM's `vllm serve` (https://docs.vllm.ai/en/stable/cli/serve.html), `transformers serve`
(https://huggingface.co/docs/transformers/main/en/serving), llama.cpp's server
(https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md).
"""

import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from peftchat.addresses import free_port, is_loopback
from peftchat.engines.served import Served
from peftchat.errors import UserError
from peftchat.export.vllm import LORA_RANKS, adapter_reasons, model_reasons
from peftchat.models.source import GENERATION_CONFIG, ModelKind

EngineName = Literal["vllm", "transformers", "llama.cpp"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

_INSTALL: dict[EngineName, str] = {
    "vllm": "`pip install vllm`, in an environment of its own",
    "transformers": "`pip install 'transformers[serving]'`",
    "llama.cpp": "llama.cpp, whose `llama-server` has to be on the PATH",
}
_SERVING_LIBRARIES = ("fastapi", "uvicorn", "openai")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the engine listens.

    Attributes:
        host: the address.
        port: the port.
        key: what clients have to send; None if they need none.
    """

    host: str
    port: int
    key: str | None = None


def check_place(host: str, port: int, key: str | None, *, needs_port: bool) -> Place:
    """Check who could reach the engine, and its port.

    Args:
        host: the address.
        port: the port.
        key: what clients have to send.
        needs_port: whether the port has to be free now.

    Raises:
        UserError: other machines reach the address and there is no key, or the port is taken.
    """
    if key is not None and not key.strip():
        raise UserError("the key is empty", where="--api-key", hint="Give it a value, or leave it out.")
    if key is None and not is_loopback(host):
        hint = "Set PEFTCHAT_API_KEY, or leave --host out and come through `ssh -L 8000:127.0.0.1:8000`."
        raise UserError("other machines can reach this address, and there is no key", where=f"--host {host}", hint=hint)
    if needs_port:
        free_port(host, port)
    return Place(host, port, key)


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """How an engine is started.

    Attributes:
        engine: which.
        arguments: the command line.
        environment: variables besides those of this process. Keys are here, because everyone sees command lines.
        models: the names that clients can ask for.
        notes: what the user should know.
    """

    engine: EngineName
    arguments: tuple[str, ...]
    models: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def installed_engines() -> dict[EngineName, str]:
    """Return the engines that are installed, each with its program."""
    found: dict[EngineName, str] = {}
    for engine, program in {"vllm": "vllm", "transformers": "transformers", "llama.cpp": "llama-server"}.items():
        path = _program(program)
        if path is None:
            continue
        if engine == "transformers" and not all(map(importlib.util.find_spec, _SERVING_LIBRARIES)):
            continue
        found[engine] = path  # type: ignore[index]
    return found


def engine_command(
    served: Sequence[Served],
    place: Place,
    *,
    engine: EngineName | None = None,
    extra: Sequence[str] = (),
    installed: Mapping[EngineName, str] | None = None,
    dry_run: bool = False,
) -> EngineCommand:
    """Choose an engine and return its command.

    Args:
        served: from `open_served`.
        place: where it listens.
        engine: the user's choice; None for the first that is installed and can serve them.
        extra: further arguments for the engine.
        installed: from `installed_engines`.
        dry_run: whether the command is only shown, for which the engine need not be here.

    Raises:
        UserError: no engine that is installed can serve them; names the reasons of each.
    """
    installed = installed_engines() if installed is None else installed
    refused: dict[EngineName, list[str]] = {}
    for candidate in (engine,) if engine else ENGINES:
        reasons = _REASONS[candidate](served, place)
        if candidate not in installed and not (dry_run and (engine or not installed)):
            reasons = [*reasons, f"it is not installed: it needs {_INSTALL[candidate]}"]
        if not reasons:
            program = installed.get(candidate, _PROGRAMS[candidate])
            command = _COMMANDS[candidate](program, served, place)
            return EngineCommand(
                candidate, (*command.arguments, *extra), command.models, command.environment, command.notes
            )
        refused[candidate] = reasons
    what = "; ".join(f"{name}: {', and '.join(reasons)}" for name, reasons in refused.items())
    names = " ".join(one.given for one in served)
    raise UserError(f"no engine can serve this. {what}", where=names, hint=_hint(served))


def _hint(served: Sequence[Served]) -> str | None:
    adapters = [one for one in served if one.adapter is not None and one.merged is None]
    if adapters:
        return f"Merge first: `peftchat merge {adapters[0].given}`."
    return None


def _program(name: str) -> str | None:
    """Return the path of a program: beside this Python, else on the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.is_file() else shutil.which(name)


# vLLM


def _vllm_reasons(served: Sequence[Served], place: Place) -> list[str]:
    reasons = [f"{one.given} is a GGUF file" for one in served if one.file is not None]
    if reasons:
        return reasons
    models, adapters = _for_vllm(served)
    for one in models:
        if one.source is not None and one.source.kind is not ModelKind.HUB:
            reasons += model_reasons(one.source)
    # A full model beside adapters has to be their base.
    bases = {_resolved(one.base): one.base for one in adapters}
    if len(bases) > 1:
        reasons.append(f"the adapters have different bases: {', '.join(sorted(bases.values()))}")
    others = [one for one in models if not (one.source and _resolved(one.source.name) in bases)]
    if adapters and others:
        reasons += [f"{one.given} is not the base of the adapters" for one in others if one.given]
    if not adapters and len(models) > 1:
        reasons.append("one process serves one full model, with any number of its adapters")
    if len({_template(one) for one in adapters}) > 1:
        reasons.append("the adapters have different chat templates, and a server has one")
    unmerged = [one for one in served if one.adapter is not None and adapter_reasons(one.adapter)]
    for one in unmerged:
        if one.merged is None:
            reasons += [f"{one.given}: {reason}" for reason in adapter_reasons(one.adapter or {})]
        elif len(served) > 1:
            why = adapter_reasons(one.adapter or {})[0]
            reasons.append(f"{one.given} is served merged ({why}), so alone")
    return list(dict.fromkeys(reasons))


def _for_vllm(served: Sequence[Served]) -> tuple[list[Served], list[Served]]:
    """Return the full models and the adapters; an adapter that vLLM cannot load counts as its merged model."""
    models, adapters = [], []
    for one in served:
        if one.adapter is None:
            models.append(one)
        elif not adapter_reasons(one.adapter):
            adapters.append(one)
        elif one.merged is not None:
            models.append(one.merged)
    return models, adapters


def _vllm_command(program: str, served: Sequence[Served], place: Place) -> EngineCommand:
    models, adapters = _for_vllm(served)
    arguments = [program, "serve"]
    if adapters:
        first = adapters[0]
        base_name = models[0].name if models else f"{first.name}-base"
        folder = str(_folder(first))
        rank = max(one.adapter["r"] for one in adapters if one.adapter)
        arguments += [first.base, "--served-model-name", base_name, "--tokenizer", folder]
        # The stop tokens are those of the runs, not of their base.
        arguments += ["--generation-config", folder, "--dtype", first.dtype, "--enable-lora"]
        arguments += ["--max-loras", str(len(adapters)), "--max-lora-rank"]
        arguments += [str(next(size for size in LORA_RANKS if size >= rank)), "--lora-modules"]
        arguments += [_lora_module(one) for one in adapters]
        names = [one.name for one in served]
    else:
        (model,) = models
        assert model.source is not None
        arguments += [model.source.name, "--served-model-name", model.name, "--dtype", model.dtype]
        names = [model.name]
    arguments += ["--host", place.host, "--port", str(place.port)]
    environment = {} if place.key is None else {"VLLM_API_KEY": place.key}
    return EngineCommand("vllm", tuple(arguments), tuple(names), environment)


def _lora_module(one: Served) -> str:
    """Return an adapter as vLLM reads it: `name=path`, or JSON where the path has characters that split it."""
    path = str(_folder(one))
    return json.dumps({"name": one.name, "path": path}) if {"=", ","} & set(path) else f"{one.name}={path}"


# transformers


def _transformers_reasons(served: Sequence[Served], place: Place) -> list[str]:
    reasons = [f"{one.given} is a GGUF file" for one in served if one.file is not None]
    reasons += [
        f"{one.given} is an adapter, and it loads full models"
        for one in served
        if one.adapter is not None and one.merged is None
    ]
    if len(served) > 1:
        reasons.append("one process serves one model here")
    if place.key is not None:
        reasons.append("it knows no key")
    for one in served:
        model = one.merged or one
        if model.source is not None and model.source.kind is ModelKind.FULL:
            reasons += model_reasons(model.source)
    return reasons


def _transformers_command(program: str, served: Sequence[Served], place: Place) -> EngineCommand:
    model = served[0].merged or served[0]
    assert model.source is not None
    is_hub = model.source.kind is ModelKind.HUB
    # Its clients name a model by what was loaded.
    name = model.source.name if is_hub else str(model.source.path.resolve())
    notes = [] if is_hub else [f"transformers' server calls it by its folder: {name}"]
    dtype = model.dtype
    if model.saved_dtype == "bfloat16":
        from peftchat.serving.chat_model import bfloat16_is_slow

        if bfloat16_is_slow():
            dtype = "float32"
            notes.append("This CPU has no kernels for bfloat16: the model computes in float32, which is faster.")
    arguments = [program, "serve", name, "--host", place.host, "--port", str(place.port), "--dtype", dtype]
    return EngineCommand("transformers", tuple(arguments), (name,), notes=tuple(notes))


# llama.cpp


def _llama_reasons(served: Sequence[Served], place: Place) -> list[str]:
    reasons = []
    for one in served:
        if one.file is None:
            command = f"`peftchat export {one.given} --to gguf`"
            reasons.append(f"{one.given} is no GGUF file, which {command} makes")
    if len(served) > 1:
        reasons.append("one process serves one file")
    return reasons


def _llama_command(program: str, served: Sequence[Served], place: Place) -> EngineCommand:
    (model,) = served
    arguments = [program, "--model", str(model.file), "--alias", model.name, "--jinja"]
    arguments += ["--host", place.host, "--port", str(place.port)]
    environment = {} if place.key is None else {"LLAMA_API_KEY": place.key}
    return EngineCommand("llama.cpp", tuple(arguments), (model.name,), environment)


_PROGRAMS: dict[EngineName, str] = {"vllm": "vllm", "transformers": "transformers", "llama.cpp": "llama-server"}
_REASONS = {"vllm": _vllm_reasons, "transformers": _transformers_reasons, "llama.cpp": _llama_reasons}
_COMMANDS = {"vllm": _vllm_command, "transformers": _transformers_command, "llama.cpp": _llama_command}


def _folder(one: Served) -> Path:
    assert one.source is not None
    return one.source.path


def _resolved(name: str) -> str:
    path = Path(name)
    return str(path.resolve()) if path.exists() else name


def _template(one: Served) -> tuple[bytes | None, ...]:
    """Return what decides how an adapter is asked and where its answers end."""
    files = (_folder(one) / name for name in ("chat_template.jinja", GENERATION_CONFIG))
    return tuple(path.read_bytes() if path.is_file() else None for path in files)
