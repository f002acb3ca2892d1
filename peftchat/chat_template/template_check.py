"""A check of a chat template: what it does to each kind of conversation, and that answers stand behind their prompts.

Every example is compared with stock `apply_chat_template`: its ids before an answer must spell that answer's prompt.
"""

# ruff: noqa: RUF001

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftchat.chat_template.chat_format import ChatFormat
from peftchat.chat_template.examples import EncodedExample
from peftchat.chat_template.loss_mask import loss_mask_table
from peftchat.chat_template.template_renderer import PROBE_TOOL
from peftchat.conversation import Conversation, Message, ToolCall
from peftchat.errors import UserError
from peftchat.json_text import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPELLED_LIKE_TOKENS = re.compile(
    r"<\|[\w:./-]+\|?>|<｜[^｜<>\s{}'\"]+｜>|\[/?[A-Z][A-Z_]+\]|</?s>|<(?:bos|eos|pad|sep)>|<(?:start|end)_of_turn>"
)
PLAIN = ("one answer", "two answers")
"""The kinds that every template for chat must take."""


@dataclass(frozen=True, slots=True)
class TemplateResult:
    """What a template does to one conversation.

    Attributes:
        kind: of conversation, or where it came from.
        examples: how many examples it becomes; 0 if it is refused.
        answers: its trained answers.
        refusal: why the template cannot write it, and the cure; "" if it can.
        fault: how an example differs from the prompt of stock `apply_chat_template`; "" if none does.
    """

    kind: str
    examples: int = 0
    answers: int = 0
    refusal: str = ""
    fault: str = ""


def sample_conversations(special: str) -> dict[str, Conversation]:
    """Return a conversation of each kind.

    Args:
        special: a special token, for text that is spelled like it.
    """
    ask, end = Message("user", "Who has badge seven?"), Message("assistant", "Ada Lovelace has it.")
    call = ToolCall("find", '{"text": "seven"}', "abcde1234")
    other = ToolCall("find", '{"text": "eight"}', "fghij5678")
    found = Message("tool", '{"holder": "Ada"}', (), call.id, "find")
    also = Message("tool", "Nobody holds that one.", (), other.id, "find")
    more = (Message("user", "And badge eight?"), Message("assistant", "Nobody has that one."))
    thought = end._replace(reasoning="Seven was given to Ada.")
    tools = write_json([PROBE_TOOL])
    plain = {
        "one answer": (ask, end),
        "two answers": (ask, end, *more),
        "system message": (Message("system", "Answer in few words."), ask, end),
        "late system message": (ask, end, Message("system", "Answer loudly now."), *more),
        "two questions in a row": (ask, Message("user", "Please hurry."), end),
        "odd white space": (Message("user", "  Go on.\n"), Message("assistant", "\n\n    return 1  \n")),
        "text like tokens": (
            Message("user", f"What is {special}?"),
            Message("assistant", f"A token: {special}{special}"),
        ),
        "reasoning": (ask, thought),
        "reasoning, two answers": (ask, thought, more[0], more[1]._replace(reasoning="Eight was never given out.")),
    }
    calling = {
        "tool call": (ask, Message("assistant", "", (call,)), found, end),
        "parallel tool calls": (ask, Message("assistant", "", (call, other)), found, also, end),
        "text and tool call": (ask, Message("assistant", "I will look it up.", (call,)), found, end),
    }
    return {
        **{kind: Conversation(messages) for kind, messages in plain.items()},
        **{kind: Conversation(messages, tools=tools) for kind, messages in calling.items()},
    }


class TemplateCheck:
    """Checks conversations with one template.

    Args:
        chat: the template, with a tokenizer.
        variables: what the recipe gives the template.
    """

    def __init__(self, chat: ChatFormat, variables: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = chat.tokenizer
        self._encoder = chat.encoder()
        self._variables = dict(variables or {})
        self._trained = loss_mask_table("answers")

    def check(self, conversations: Iterable[tuple[str, Conversation]]) -> Iterator[TemplateResult]:
        """Yield what the template does to each conversation, which comes with its kind."""
        for kind, conversation in conversations:
            try:
                rows = self._encoder.encode([conversation])
            except UserError as error:
                yield TemplateResult(kind, refusal=f"{error.message}. {error.hint or ''}".strip())
                continue
            runs = [(row, start) for row in rows for start in self._starts(row)]
            yield TemplateResult(kind, len(rows), len(runs), fault=self._fault(conversation, runs))

    def _starts(self, row: EncodedExample) -> Iterator[int]:
        """Yield where each run of trained tokens starts."""
        trained = self._trained[row.token_tags]
        for is_trained, places in itertools.groupby(range(len(trained)), lambda at: bool(trained[at])):
            if is_trained:
                yield next(places)

    def _fault(self, conversation: Conversation, runs: list[tuple[EncodedExample, int]]) -> str:
        """Compare the ids before each answer with the prompt of stock `apply_chat_template`; "" if they agree."""
        messages = conversation.as_dicts()
        asked = [
            index
            for index, message in enumerate(conversation.messages)
            if index and message.role == "assistant" and message.train is not False
        ]
        if len(runs) != len(asked):
            return f"{len(runs)} runs of tokens are trained, expected {len(asked)} answers"
        for (row, start), index in zip(runs, asked, strict=True):
            prompt = self._stock_prompt(messages[:index], conversation)
            before = row.ids[:start].tolist()
            if prompt is None or self._tokenizer.decode(before) == prompt:
                continue
            # Byte fallback and normalizers do not always give a text back; the ids then tell.
            if before != self._tokenizer.encode(prompt, add_special_tokens=False):
                return f"the tokens before message {index + 1} are not those of its prompt"
        return ""

    def _stock_prompt(self, history: list[dict[str, Any]], conversation: Conversation) -> str | None:
        """Return the prompt; None where the template wants calls in another form than transformers gives them."""
        tools = conversation.tool_schemas()
        documents = conversation.documents()
        variables = self._variables if documents is None else {**self._variables, "documents": documents}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    history, tools=tools or None, tokenize=False, add_generation_prompt=True, **variables
                )
            )
        except Exception:
            return None


def stand_in_tokenizer(source: str) -> "PreTrainedTokenizerBase":
    """Return a tokenizer of bytes for a template without one: what is spelled like a special token is one.

    Args:
        source: the template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = sorted({*_SPELLED_LIKE_TOKENS.findall(source), "<s>", "</s>"})
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    made.chat_template = source
    return made
