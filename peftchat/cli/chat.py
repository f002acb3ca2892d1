"""`peftchat chat`: talk to a run or a model in the terminal."""

import sys

import click


@click.command()
@click.argument("model")
@click.option("--prompt", metavar="TEXT", help="Answer this and end; `-` reads it from standard input.")
@click.option("--system", metavar="TEXT", help="System prompt.  [default: the one of the model's template]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object an answer, and nothing else.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Sample, the wilder the higher; 0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample among the likeliest with this mass.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample among so many tokens.")
@click.option("--greedy", is_flag=True, help="Always the likeliest token.")
@click.option("--seed", type=int, help="Make sampling repeatable.")
def command(
    model: str,
    prompt: str | None,
    system: str | None,
    as_json: bool,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    greedy: bool,
    seed: int | None,
) -> None:
    """Talk to MODEL: a run folder, a merged model, or any model with a chat template.

    What the options leave open is as the model's generation_config.json says. Without --prompt each line of input is a
    message; /help lists the commands.

    \b
    peftchat chat runs/assistant
    peftchat chat runs/assistant --prompt "How do I read a file line by line?"
    git diff | peftchat chat runs/assistant --system "Explain this change." --prompt -
    """
    from peftchat.errors import UserError
    from peftchat.serving.generate import Sampling, apply_sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, greedy, seed)
    question = sys.stdin.read().strip() if prompt == "-" else prompt
    if question is not None and not question.strip():
        raise UserError("the question is empty", where="--prompt", hint="Give it some text, or leave the option out.")
    from peftchat.logging_setup import quiet_libraries

    quiet_libraries()
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar

    from peftchat.serving.chat_model import load_for_chat
    from peftchat.serving.terminal import Chat, ChatHistory, system_prompt_error

    disable_progress_bar()
    loaded = load_for_chat(model)
    if system is not None and (problem := system_prompt_error(loaded, system)):
        raise UserError(problem, where="--system")
    if seed is not None:
        set_seed(seed)
    chat = Chat(loaded, apply_sampling(loaded.generation_config, sampling), ChatHistory(system), as_json)
    if question is None:
        chat.loop()
    elif chat.ask(question).finish == "interrupted":
        raise KeyboardInterrupt
