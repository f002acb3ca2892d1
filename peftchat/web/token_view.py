"""The tokens of an answer: which are trained, how likely the model found each, and what else it could have written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup, escape

from peftchat.chat_template.loss_mask import loss_mask_table, part_of, role_of
from peftchat.conversation import Conversation
from peftchat.errors import UserError
from peftchat.serving.chat_model import ChatModel

ALTERNATIVES = 5
_MOST_ROWS = 400
_BREAK = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
_WORD = "\N{LOWER ONE EIGHTH BLOCK}"
_SPACE = "\N{OPEN BOX}"


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token of a conversation.

    Attributes:
        id: the token.
        text: its text.
        part: the turn and the part of it: `assistant content`.
        trained: whether training on this conversation would have it as a target.
        probability: what the model gave it behind all tokens before it; None for the first one.
        alternatives: the most likely tokens at this place, with their probabilities.
    """

    id: int
    text: str
    part: str
    trained: bool
    probability: float | None
    alternatives: tuple[tuple[str, float], ...]


def view_tokens(chat: ChatModel, conversation: Conversation) -> list[TokenView]:
    """Return every token of a conversation that ends with an answer, encoded as training encodes it.

    The probabilities are those of the model itself, at temperature 1.

    Args:
        chat: the model.
        conversation: ends with an answer.

    Raises:
        UserError: the template cannot write it, or it is longer than the model's context.
    """
    example = chat.prompts.encode_answers(conversation)[-1]
    if len(example.ids) > chat.context_length:
        what = f"the conversation has {len(example.ids):,} tokens, and the context {chat.context_length:,}"
        raise UserError(what, hint="Begin a new one.")
    ids = torch.tensor(example.ids[None].astype("int64"), device=chat.device)
    trained = loss_mask_table("answers")[example.token_tags]
    start = max(1, len(example.ids) - _MOST_ROWS)
    with torch.inference_mode():
        # The row at a position predicts the token behind it.
        logits: Any = chat.model(input_ids=ids, logits_to_keep=len(example.ids) - start + 1).logits[0, :-1].float()
        probabilities = logits.softmax(-1)
        top = probabilities.topk(min(ALTERNATIVES, probabilities.shape[-1]), dim=-1)
        chosen = probabilities.gather(-1, ids[0, start:, None])[:, 0].tolist()
    values, indices = top.values.tolist(), top.indices.tolist()

    def text_of(token: int) -> str:
        text = str(chat.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        # SentencePiece's decoder drops the space before the first token of a text, here of each.
        begins_word = str(chat.tokenizer.convert_ids_to_tokens(token)).startswith(_WORD)
        return f" {text}" if begins_word and not text.startswith(" ") else text

    found = []
    for at, (token, tag) in enumerate(zip(example.ids.tolist(), example.token_tags.tolist(), strict=True)):
        row = at - start
        others = () if row < 0 else tuple(zip(map(text_of, indices[row]), values[row], strict=True))
        part = f"{role_of(tag) or ''} {part_of(tag).name.lower().replace('_', ' ')}".strip()
        found.append(
            TokenView(token, text_of(token), part, bool(trained[at]), chosen[row] if row >= 0 else None, others)
        )
    return found


def tokens_as_html(views: Sequence[TokenView]) -> str:
    """Return the tokens as a text with the trained ones marked, and the last answer's as a table."""
    text = Markup("").join(_in_text(view) for view in views)
    answer = [view for view in views[_last_answer(views) :] if view.probability is not None]
    rows = Markup("").join(_row(view) for view in answer)
    count = sum(view.trained for view in views)
    return str(
        Markup(
            "<p>Training on this conversation has {count} of its {all} tokens as targets: those that are "
            '<span class="pc-trained">underlined</span>. The darker a token, the less likely the model found it.</p>'
            '<div class="pc-tokens" role="region" aria-label="Tokens of the conversation" tabindex="0">{text}</div>'
            '<div class="pc-table" role="region" aria-label="Tokens of the answer" tabindex="0"><table>'
            '<thead><tr><th scope="col">token</th><th scope="col">id</th><th scope="col">trained</th>'
            '<th scope="col">probability</th><th scope="col">most likely here</th></tr></thead>'
            "<tbody>{rows}</tbody></table></div>"
        ).format(count=count, all=len(views), text=text, rows=rows)
    )


def _last_answer(views: Sequence[TokenView]) -> int:
    """Return where the last answer's trained tokens begin."""
    start = len(views)
    for at in range(len(views) - 1, -1, -1):
        if views[at].trained:
            start = at
        elif start < len(views):
            break
    return start


def _in_text(view: TokenView) -> Markup:
    doubt = 0.0 if view.probability is None else 1.0 - view.probability
    return Markup('<span class="{css}" style="--doubt:{doubt}" title="{title}">{text}</span>').format(
        css="pc-token pc-trained" if view.trained else "pc-token",
        doubt=f"{doubt:.2f}",
        title=f"{view.part}, id {view.id}" + ("" if view.probability is None else f", p {view.probability:.3f}"),
        text=_with_breaks(view.text),
    )


def _row(view: TokenView) -> Markup:
    others = Markup(" ").join(
        Markup('<span class="pc-other{same}"><code>{text}</code> {share}</span>').format(
            same=" pc-same" if text == view.text else "", text=_visible(text), share=_percent(share)
        )
        for text, share in view.alternatives
    )
    return Markup(
        "<tr><td><code>{text}</code></td><td>{id}</td><td>{trained}</td><td>{share}</td><td>{others}</td></tr>"
    ).format(
        text=_visible(view.text),
        id=view.id,
        trained="yes" if view.trained else "no",
        share=_percent(view.probability or 0.0),
        others=others,
    )


def _percent(share: float) -> str:
    return "<0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


def _with_breaks(text: str) -> Markup:
    return escape(text).replace("\n", Markup("{}<br>").format(_BREAK))


def _visible(text: str) -> str:
    return text.replace("\n", _BREAK).replace(" ", _SPACE).replace("\t", "\N{RIGHTWARDS ARROW TO BAR}") or "∅"
