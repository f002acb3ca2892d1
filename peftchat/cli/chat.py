"""`peftchat chat`: chat with a run or a model in the terminal."""

import sys

import click

from peftchat.cli.common import NameType, allow_changed_option, base_option, json_option


@click.command("chat")
@click.argument("model", type=NameType())
@base_option()
@allow_changed_option()
@click.option("--prompt", metavar="TEXT", help="Answer this and exit; `-` reads it from standard input.")
@click.option("--system", metavar="TEXT", help="System prompt.  [default: the one of the model's template]")
@click.option("--tools", metavar="FILE", help="Define the tools of this JSON list.")
@json_option("Print one JSON object per answer and nothing else.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Most tokens in an answer.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Sampling temperature; 0 is greedy.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from the top tokens with this probability mass."
)
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from the K most likely tokens.")
@click.option("--greedy", is_flag=True, help="Always take the most likely token.")
@click.option("--seed", type=int, help="Seed of the sampling.")
def command(
    model: str,
    base: str | None,
    allow_changed: bool,
    prompt: str | None,
    system: str | None,
    tools: str | None,
    as_json: bool,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    greedy: bool,
    seed: int | None,
) -> None:
    """Chat with a run or a model in the terminal.

    MODEL is a run folder, a merged model, or any model with a chat template. Settings that are not given come from its
    generation_config.json. Without --prompt each line of input is a message; /help lists the commands. Where the model
    calls a tool, /result TEXT gives what the tool returns.

    \b
    peftchat chat runs/assistant
    peftchat chat runs/assistant --prompt "How do I read a file line by line?"
    git diff | peftchat chat runs/assistant --system "Explain this change." --prompt -
    """
    from peftchat.errors import UserError
    from peftchat.serving.sampling import Sampling, apply_sampling
    from peftchat.serving.tool_calls import read_tools_file

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, greedy, seed)
    prompt = sys.stdin.read().strip() if prompt == "-" else prompt
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty", where="--prompt", hint="Give it some text, or leave the option out.")

    definitions = None if tools is None else read_tools_file(tools, "--tools")

    from transformers.utils.logging import disable_progress_bar

    from peftchat import api
    from peftchat.serving.history import ChatHistory
    from peftchat.serving.terminal import Chat, check_tools, system_prompt_error

    disable_progress_bar()
    loaded = api.load_chat_model(model, base=base, allow_changed=allow_changed)
    if system is not None and (problem := system_prompt_error(loaded, system)):
        raise UserError(problem, where="--system")
    check_tools(loaded, definitions, f"--tools {tools}")
    if seed is not None:
        # It imports PEFT, which a full model does not need.
        from transformers import set_seed

        set_seed(seed)
    chat = Chat(loaded, apply_sampling(loaded.generation_config, sampling), ChatHistory(system, definitions), as_json)
    if prompt is None:
        chat.loop()
    elif chat.ask(prompt).finish == "interrupted":
        raise KeyboardInterrupt
