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
    """Check a configuration, tiers, policies and codec included, and print it resolved, as YAML. Opens nothing."""
    import yaml

    from lmcache.config import load_config, masked, parse_overrides
    from lmcache.errors import ConfigError
    from lmcache.storage.registry import check_backend, check_policy

    try:
        resolved = load_config(file, parse_overrides(overrides or []))
        check_policy(resolved.memory.eviction, "memory.eviction")
        for index, tier in enumerate(resolved.tiers):
            check_backend(tier, f"tiers[{index}]")
        if resolved.codec is not None:
            from lmcache.kernels.codecs.base import build_codec

            build_codec(resolved.codec)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(yaml.safe_dump(masked(resolved.model_dump(mode="json")), sort_keys=False).rstrip())


@app.command()
def server(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; default: defaults")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="port=7420 storage.memory.capacity=4GiB ...")] = None,
) -> None:
    """Run the standalone store that several engines share, until SIGTERM or SIGINT."""
    import logging

    from lmcache.config import load, parse_overrides
    from lmcache.errors import ConfigError
    from lmcache.server.config import ServerConfig
    from lmcache.server.service import run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        done = run(load(ServerConfig, config, parse_overrides(overrides or [])))
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    raise typer.Exit(0 if done else 2)


@app.command()
def profile(
    kind: Annotated[str, typer.Argument(help="klt or cachegen")],
    texts: Annotated[list[Path], typer.Argument(help="text files to fit on, each of more than 1,024 tokens")],
    model: Annotated[Path, typer.Option(help="Hugging Face folder of a model with rotary attention")],
    out: Annotated[Path, typer.Option(help="the profile, for codec: {type: klt, profile: FILE}")],
    bits: Annotated[float, typer.Option(help="bits an element, before what streams cost")] = 2.3,
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
) -> None:
    """Measure what the codecs klt and cachegen must know of a model, on texts like those it will read."""
    import logging

    from lmcache.errors import KernelArgumentError
    from lmcache.kernels.codecs.fit import fit_texts
    from lmcache.kernels.codecs.profile import KINDS

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if kind not in KINDS:
            raise KernelArgumentError(f"unknown kind of profile {kind!r}; known: {', '.join(KINDS)}")
        named = {str(file): file.read_text() for file in texts}
        (fitted,) = fit_texts(kind, model, named, [bits], threads=threads)
        fitted.save(out)
    except (KernelArgumentError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(out)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
