"""One trained answer beside the prompt that stock `apply_chat_template` makes for it."""

from itertools import islice

from peftchat.chat_template.loss_mask import LossPolicy, loss_mask_table
from peftchat.conversations import ProblemLog
from peftchat.dataset.cache import Split, conversations
from peftchat.errors import UserError
from peftchat.models.source import ModelSource
from peftchat.recipe import Recipe
from peftchat.reports.mask import escape_control_chars
from peftchat.training.context import chat_format_of


def turn_text(recipe: Recipe, split: Split, number: int, turn: int | None) -> str:
    """Return how an answer is trained, and the prompt at inference, as text.

    Args:
        recipe: the recipe.
        split: train or eval.
        number: which conversation, from 1.
        turn: which of its messages, from 1; None for the last trained answer.

    Raises:
        UserError: there is no such conversation, or its message is no trained answer.
    """
    if recipe.has_pairs:
        raise UserError(
            "one answer is shown of conversations, and the recipe learns from pairs",
            where="--conversation",
            hint="Leave it out: chosen and rejected answers are shown one after the other.",
        )
    found = list(islice(conversations(recipe, split, ProblemLog(strict=True)), max(number - 1, 0), max(number, 0)))
    if not found:
        count = sum(1 for _ in conversations(recipe, split, ProblemLog(strict=True)))
        raise UserError(
            f"there is no conversation {number}: `{split}` has {count}",
            where=f"--conversation {number}",
            hint=f"Give a number from 1 to {count}.",
        )
    (conversation,) = found
    chat = chat_format_of(recipe, ModelSource.of_recipe(recipe).tokenizer())
    tokenizer = chat.tokenizer
    loses_calls = recipe.chat.unsupported_roles == "drop" and "tool" in chat.template.missing_roles
    answers = [
        index + 1
        for index, message in enumerate(conversation.messages)
        if index
        and message.role == "assistant"
        and message.train is not False
        and not (loses_calls and message.tool_calls)
    ]
    turn = turn if turn is not None or not answers else answers[-1]
    if turn not in answers or turn is None:
        raise UserError(
            f"message {turn} of conversation {number} is no trained answer",
            where=conversation.source,
            hint=f"Its trained answers are the messages {', '.join(map(str, answers)) or 'none'}.",
        )
    prompt = tokenizer.apply_chat_template(
        conversation.as_dicts()[: turn - 1],
        tools=conversation.tool_schemas(),
        documents=conversation.documents(),
        add_generation_prompt=True,
        tokenize=False,
    )
    stock = tokenizer.encode(prompt, add_special_tokens=False)
    table = loss_mask_table(LossPolicy("answers"))
    runs = []
    for example in chat.encoder().encode([conversation]):
        trained = table[example.token_tags].tolist()
        starts = [at for at, on in enumerate(trained) if on and not (at and trained[at - 1])]
        for start in starts:
            stop = next((at for at in range(start, len(trained)) if not trained[at]), len(trained))
            runs.append((example.ids[:start].tolist(), example.ids[start:stop].tolist()))
    if len(runs) != len(answers):
        raise UserError("its answers cannot be told apart in the text", where=conversation.source)
    before, written = runs[answers.index(turn)]
    shared = next((at for at, (a, b) in enumerate(zip(before, stock, strict=False)) if a != b), None)
    if before == stock:
        verdict = f"The {len(stock)} ids before the answer equal those of the prompt at inference."
    else:
        at = min(len(before), len(stock)) if shared is None else shared
        verdict = (
            f"The ids part at {at}: the example has {tokenizer.decode(before[at : at + 8])!r}, "
            f"the prompt {tokenizer.decode(stock[at : at + 8])!r}."
        )
    lines = [
        f"{conversation.source}, message {turn}",
        "",
        "The prompt at inference:",
        escape_control_chars(prompt),
        "",
        "What is before the answer in the example:",
        escape_control_chars(tokenizer.decode(before)),
        "",
        "The answer, which `chat.loss_on: answers` trains:",
        escape_control_chars(tokenizer.decode(written)),
        f"ids: {' '.join(map(str, written))}",
        "",
        verdict,
    ]
    return "\n".join(lines) + "\n"
