"""`peftchat push`: publish a run or a model on the hub."""

import click

from peftchat.cli.common import NameType, json_option


@click.command("push")
@click.argument("model", type=NameType())
@click.argument("repo")
@click.option("--public", is_flag=True, help="Let everyone read it.  [default: private]")
@click.option("--base", metavar="ID", help="Hub id of an adapter's base that lies on this machine.")
@click.option("--dry-run", is_flag=True, help="Show files, sizes and the card; send nothing.")
@json_option()
def command(model: str, repo: str, public: bool, base: str | None, dry_run: bool, as_json: bool) -> None:
    """Push a run or a model to the hub, private unless told otherwise.

    MODEL is a run folder, a merged model, or the folder of any model. REPO is OWNER/NAME. Weights, tokenizer and card
    are pushed. Recipe, data, metrics, checkpoints and optimizer states stay here. A file with a key stops the push.

    \b
    peftchat push runs/assistant me/assistant --dry-run
    peftchat push runs/assistant/merged me/assistant-merged --public
    """

    from peftchat.cli.common import echo_json, note
    from peftchat.console import stdout
    from peftchat.formatting import format_bytes
    from peftchat.publishing.push import plan_push, push

    plan = plan_push(model, repo, public=public, base=base)
    url = None if dry_run else push(plan)
    if as_json:
        echo_json({**plan.as_dict(), "url": url})
        return
    for file in plan.files:
        stdout.print(f"{format_bytes(file.size):>10}  {file.name}", markup=False)
    if plan.card is None:
        note("There is no README.md, so the repository has no model card.", style="yellow")
    if plan.left:
        note(f"Not pushed: {', '.join(plan.left)}")
    kind = "private" if plan.private else "public"
    if url is None:
        stdout.print(f"{format_bytes(plan.size)} would go to the {kind} repository {plan.repo}.", markup=False)
        if plan.card is not None:
            stdout.print(f"\n{plan.card}", markup=False)
    else:
        stdout.print(f"{format_bytes(plan.size)} went to the {kind} repository: {url}", markup=False)
