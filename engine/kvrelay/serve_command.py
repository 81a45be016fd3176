"""`kvrelay serve`: options and a file become settings. The HTTP stack is imported only to run it."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvrelay.engine_options import engine_options
from kvrelay.errors import InvalidConfig
from kvrelay.settings import combine, read_file

Model = Annotated[str | None, typer.Option(help="A pulled name, a Hugging Face directory, or a hub id.")]
Config = Annotated[Path | None, typer.Option(help="A TOML file: engine settings, and a table named server.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Any setting: num_kv_blocks=64, server.max_headers=50."),
]
ApiKey = Annotated[
    str | None,
    typer.Option(help="The key that clients must send; better set in KVRELAY_API_KEY."),
]


@engine_options
def serve(
    engine: dict[str, Any],
    model: Model = None,
    config: Config = None,
    host: Annotated[str | None, typer.Option(help="Address; 127.0.0.1 unless told.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 8000 unless told, 0 for any.")] = None,
    api_key: ApiKey = None,
    served_model_name: Annotated[str | None, typer.Option(help="The name that clients use.")] = None,
    policy: Annotated[str | None, typer.Option(help="How a pair of workers is chosen.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of prompt and answer.")] = None,
    metrics_alias: Annotated[str | None, typer.Option(help="vllm: its metric names beside ours.")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Of the whole pool: cost per token.")] = None,
    settings: Settings = None,
) -> None:
    """Serve a model over HTTP as OpenAI does, until a signal says stop; a page at / shows it at work."""
    engine |= {
        "model": model,
        "policy": policy,
        "max_model_len": max_model_len,
        "served_model_name": served_model_name,
        "metrics_alias": metrics_alias,
        "price_per_hour": price_per_hour,
    }
    server = {"host": host, "port": port, "api_key": api_key}
    file = {} if config is None else read_file(config)
    engine_config, server_config = combine(file, settings or [], engine, server)
    try:
        from kvrelay.server import run
    except ModuleNotFoundError as error:
        raise InvalidConfig(f"kvrelay serve needs the package {error.name}") from error
    run.serve(engine_config, server_config, _say)


def _say(line: str) -> None:
    print(f"kvrelay: {line}", file=sys.stderr, flush=True)
