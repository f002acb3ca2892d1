"""Rendering many conversations by one template: what `apply_chat_template` does, without doing it again each time.

Rendering answer by answer gives a template the same messages and tools again and again. Stock transformers copies all
of them each time, and the template writes the same definitions of tools as JSON. Here each message is prepared once,
and the JSON of each value is written once.
https://github.com/huggingface/transformers/blob/main/src/transformers/utils/chat_template_utils.py
"""

import secrets
import types
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEMBERED = 2048
"""The most values that are kept by their identity. Each is kept alive, so that no other can have its identity."""
_FORMATTING = ("format", "format_map")
_METHODS = (types.MethodType, types.BuiltinMethodType)


class _Memory:
    """Results of a function by the identity of its argument, which nothing changes meanwhile."""

    def __init__(self) -> None:
        self._results: dict[Any, tuple[Any, Any]] = {}

    def get(self, value: Any, make: Callable[[Any], Any], key: Any = None) -> Any:
        found = self._results.get((id(value), key))
        if found is not None and found[0] is value:
            return found[1]
        made = make(value)
        if len(self._results) >= _REMEMBERED:
            self._results.clear()
        self._results[id(value), key] = value, made
        return made


CLOSED = f"x{secrets.token_hex(8)}closed"
"""What `render_both` has written where the generation prompt begins."""


@lru_cache(maxsize=64)
def _compiled(source: str, *, marked: bool = False) -> Any:
    """Return a template compiled as transformers does, whose `tojson` writes each value once.

    Args:
        source: of the template.
        marked: whether it writes `CLOSED` in front of the generation prompt. The result is then None where that
            prompt is not the last thing that the template writes, or asked for elsewhere too.
    """
    from transformers.utils import chat_template_utils

    template = chat_template_utils._cached_compile_jinja_template(source)
    if marked:
        quick, tree = _compiled(source), _with_mark(template.environment._parse(source, None, None))
        return None if tree is None else quick.environment.from_string(tree)
    written = template.environment.filters["tojson"]
    memory = _Memory()

    def tojson(value: Any, *args: Any, **kwargs: Any) -> str:
        if type(value) not in (dict, list):
            return str(written(value, *args, **kwargs))
        key = (args, tuple(kwargs.items()))
        return str(memory.get(value, lambda one: written(one, *args, **kwargs), key))

    template.environment.filters["tojson"] = tojson
    template.environment.getattr = _quick_getattr(template.environment)
    return template


def _with_mark(tree: Any) -> Any:
    """Return the syntax tree of a template with `CLOSED` in front of its generation prompt; None if that is not sure.

    Where the whole rest of a template is `{% if add_generation_prompt %}…{% endif %}`, and nothing before asks for the
    variable, the rendering without a generation prompt is the one with it up to there.
    """
    from jinja2 import nodes

    name = "add_generation_prompt"
    if len([one for one in tree.find_all(nodes.Name) if one.name == name]) != 1 or not tree.body:
        return None
    last = tree.body[-1]
    if not isinstance(last, nodes.If) or last.elif_ or last.else_:
        return None
    if not isinstance(last.test, nodes.Name) or last.test.name != name:
        return None
    mark = nodes.Output([nodes.TemplateData(CLOSED)], lineno=last.lineno)
    tree.body.insert(len(tree.body) - 1, mark)
    return tree.set_environment(tree.environment)


def _quick_getattr(environment: Any) -> Callable[[Any, str], Any]:
    """Return what the sandbox's `getattr` returns, at a fraction of its cost, which is half of a rendering's.

    The sandbox looks for an attribute of the object first. A dict has none but those of its type, and it takes an
    exception to find that out. What is safe to read depends on the type of the object and the name, and is asked once.
    https://github.com/pallets/jinja/blob/main/src/jinja2/sandbox.py
    """
    from jinja2.runtime import LoopContext
    from jinja2.utils import Namespace

    slow, undefined = environment.getattr, environment.undefined
    of_dict = frozenset(dir(dict))
    safe: dict[tuple[type, str], bool] = {}

    def quick(value: Any, name: str) -> Any:
        kind = type(value)
        if kind is dict:
            if name in of_dict:
                return slow(value, name)
            try:
                return value[name]
            except KeyError:
                return undefined(obj=value, name=name)
        key = kind, name
        known = safe.get(key)
        if known is None:
            usual = kind is str or kind is LoopContext or issubclass(kind, Namespace)
            known = usual and name not in _FORMATTING and bool(environment.is_safe_attribute(value, name, None))
            if len(safe) < _REMEMBERED:
                safe[key] = known
        if not known:
            return slow(value, name)
        try:
            found = getattr(value, name)
        except AttributeError:
            return slow(value, name)
        # A namespace may hold a method that formats, which the sandbox wraps.
        return slow(value, name) if kind is not str and isinstance(found, _METHODS) else found

    return quick


def template_writer(tokenizer: "PreTrainedTokenizerBase") -> Callable[..., str]:
    """Return a function that renders as the tokenizer's `apply_chat_template(tokenize=False)` does.

    It takes the source, the messages, the tools and variables of the template. What it is given must not be changed
    afterwards. A tokenizer with an `apply_chat_template` of its own is asked itself. With `marked`, the rendering has
    `CLOSED` in it where its generation prompt begins; "" where that is not to be had.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    def stock(source: str, messages: Sequence[Any], tools: Any, *, marked: bool = False, **variables: Any) -> str:
        if marked:
            return ""
        given = list(messages)
        return str(tokenizer.apply_chat_template(given, tools=tools, chat_template=source, tokenize=False, **variables))

    needed = ("_cached_compile_jinja_template", "_plain_template_data", "_alias_reasoning_fields")
    own = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    if own or not all(hasattr(chat_template_utils, name) for name in needed):
        return stock
    plain, alias = chat_template_utils._plain_template_data, chat_template_utils._alias_reasoning_fields
    memory = _Memory()

    def prepared(message: Mapping[str, Any]) -> Any:
        return alias([plain({key: value for key, value in message.items() if value is not None})])[0]

    def write(source: str, messages: Sequence[Any], tools: Any, *, marked: bool = False, **variables: Any) -> str:
        if not messages or not all(isinstance(message, dict) for message in messages):
            return stock(source, messages, tools, marked=marked, **variables)
        template = _compiled(source, marked=marked)
        if template is None:
            return ""
        given = {"documents": None, **tokenizer.special_tokens_map, **plain(variables)}
        written = template.render(
            messages=[memory.get(message, prepared) for message in messages],
            tools=None if tools is None else memory.get(tools, plain),
            **given,
        )
        return str(written)

    return write
