"""The ``lmcache`` command. Heavy imports stay inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="LMCache, Triton edition: a KV-cache layer for LLM inference.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def version() -> None:
    """Print the version."""
    import lmcache

    typer.echo(lmcache.__version__)


@app.command()
def config(
    file: Annotated[Path | None, typer.Option("--file", "-f", help="YAML file; default: $LMCACHE_CONFIG_FILE")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="memory.capacity=4GiB ...")] = None,
) -> None:
    """Check a configuration and print it resolved, as YAML."""
    import yaml

    from lmcache.config import load_config
    from lmcache.errors import ConfigError

    try:
        values = {}
        for item in overrides or []:
            name, separator, value = item.partition("=")
            if not separator:
                raise ConfigError(f"expected name=value, got {item!r}")
            values[name] = yaml.safe_load(value)
        resolved = load_config(file, values)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False).rstrip())


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
