"""`ca template …`."""

from __future__ import annotations

import click

from cloudagent_mcp.cli_shared import as_json


@click.group()
def template() -> None:
    """What sandboxes in the cloud start from."""


@template.command()
@click.option("--provider", required=True, help="novita or e2b.")
@click.option("--name", help="Its name there. Default: cloudagent and the version, such as cloudagent-0-1-0.")
@click.option("--cpus", type=click.IntRange(1, 64), help="Of each sandbox made from it (2).")
@click.option("--memory-mb", type=click.IntRange(512, 262_144), help="Of each sandbox made from it (4096).")
@as_json
def build(provider: str, name: str | None, cpus: int | None, memory_mb: int | None, as_json: bool) -> None:
    """Build the template with all that a task needs, so that no sandbox has to be prepared.

    The log goes to standard error; the line for the environment, SANDBOX_TEMPLATE=…, to standard output.
    """
    from cloudagent_mcp.settings import Settings
    from cloudagent_queue.sandboxes import PROVIDERS
    from cloudagent_queue.sandboxes import template as of_ours

    entry = PROVIDERS.get(provider)
    api = of_ours.api_of(provider, Settings.read().pick([*entry.environment] if entry else []))
    built = of_ours.build(
        api,
        name=name or of_ours.default_name(),
        cpus=cpus or of_ours.CPUS,
        memory_mb=memory_mb or of_ours.MEMORY_MB,
        tell=lambda line: click.echo(line, err=True),
    )
    if as_json:
        click.echo(built.model_dump_json())
        return
    what = f"{built.cpus} CPUs and {built.memory_mb} MB for each sandbox"
    click.echo(f"Built {built.name} in {built.seconds:.0f} s: {what}. For the worker's environment:", err=True)
    click.echo(f"SANDBOX_TEMPLATE={built.sandbox_template}")
