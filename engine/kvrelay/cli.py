"""The `kvrelay` command. Tables and progress go to standard error, answers and JSON to standard output."""

import json
import logging
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from kvrelay.config import EngineConfig, cache_home
from kvrelay.engine_options import engine_options
from kvrelay.errors import KVRelayError
from kvrelay.experiments.demo import run_demo
from kvrelay.experiments.doctor import examine
from kvrelay.experiments.record import write_record
from kvrelay.experiments.tables import phase_table, worker_table
from kvrelay.llm import LLM
from kvrelay.models import hub
from kvrelay.models.progress import progress_bar
from kvrelay.outputs import RequestOutput
from kvrelay.sampling_params import SamplingParams
from kvrelay.serve_command import serve
from kvrelay.settings import parse_pair
from kvrelay.version import __version__

DEFAULT_MODEL = "smollm2-135m-instruct"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
models_app = typer.Typer(no_args_is_help=True, help="Get models, and see which there are.")
app.add_typer(models_app, name="models")
app.command()(serve)
console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document last, on standard output.")]
Model = Annotated[
    str | None,
    typer.Option(help=f"A pulled name, a Hugging Face directory, or a hub id; {DEFAULT_MODEL} unless told."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any engine setting, such as num_kv_blocks=64."),
]


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Disaggregated LLM inference: prefill and decode in separate processes, one KV-cache relay between."""
    if version:
        print(__version__)
        raise typer.Exit


@models_app.command("pull")
def models_pull(name: str, json_output: Json = False) -> None:
    """Fetch and convert a known model, or convert PATH.gguf. Does nothing when it is there already."""
    path = hub.pull(name, cache_home(), progress_bar)
    console.print(f"{name} is at {path}", soft_wrap=True)
    if json_output:
        _print_json({"name": name, "path": str(path)})


@models_app.command("list")
def models_list(json_output: Json = False) -> None:
    """Models that are here, and those that can be pulled by name."""
    found = hub.pulled(cache_home())
    table = Table("model", "size", "from", Column("directory", overflow="fold"))
    for model in found:
        table.add_row(model.name, f"{model.num_bytes / 1e6:.0f} MB", model.source, str(model.path))
    for name in sorted(set(hub.KNOWN) - {model.name for model in found}):
        table.add_row(name, "", f"kvrelay models pull {name}", "")
    console.print(table)
    if json_output:
        rows = [
            {"name": m.name, "path": str(m.path), "source": m.source, "num_bytes": m.num_bytes} for m in found
        ]
        _print_json({"models": rows, "known": sorted(hub.KNOWN)})


@app.command()
@engine_options
def generate(
    engine: dict[str, Any],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be given several times.")],
    model: Model = None,
    chat: Annotated[bool, typer.Option(help="Treat each prompt as a user's message.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string.")] = None,
    settings: Settings = None,
    report: Annotated[bool, typer.Option(help="Show the report tables too.")] = False,
    json_output: Json = False,
) -> None:
    """Continue one or more prompts; the first is streamed, the others follow in order."""
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop or ()
    )
    chosen = _settings(settings, engine, model)
    console.print(f"[dim]starting {escape(str(chosen['model']))} …[/]", highlight=False)
    with LLM(**chosen) as llm:
        prompts: Any = (
            llm.render([[{"role": "user", "content": text}] for text in prompt]) if chat else prompt
        )
        outputs = _stream(llm, prompts, params, quiet=json_output)
        summary = llm.report()
    if report:
        console.print(phase_table(summary))
        console.print(worker_table(summary))
    if json_output:
        _print_json({"outputs": msgspec.to_builtins(outputs), "report": summary.to_dict()})


@app.command()
@engine_options
def demo(
    engine: dict[str, Any],
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens per answer.")] = 48,
    settings: Settings = None,
    output: Annotated[Path, typer.Option(help="Where the JSON record goes.")] = Path("results/demo.json"),
    json_output: Json = False,
) -> None:
    """Answer eight questions through separate prefill and decode processes, and report what it cost."""
    chosen = _settings(settings, engine, model)
    name = EngineConfig.of(**chosen).model
    if name in hub.KNOWN:
        hub.pull(name, cache_home(), progress_bar)
    record = run_demo(chosen, max_tokens, Console())
    write_record(record, output)
    failed = [name for name, held in record["gate"]["checks"].items() if not held]
    if json_output:
        _print_json(record)
    else:
        print(output)
    if failed:
        raise KVRelayError(f"the demo's own checks failed: {'; '.join(failed)}")


@app.command()
def doctor(json_output: Json = False) -> None:
    """What this host has: devices, energy meters, transports, kernels, compilers, models."""
    findings = examine(cache_home())
    table = Table("", "what", "", "detail")
    for finding in findings:
        mark = "[green]yes[/]" if finding.available else "[yellow]no[/]"
        table.add_row(finding.area, finding.name, mark, escape(finding.detail))
    console.print(table)
    if json_output:
        _print_json({"findings": msgspec.to_builtins(findings)})


def main() -> NoReturn:
    """Run the command; an error of ours is one line on standard error and exit code 1."""
    logging.basicConfig(format="kvrelay: %(message)s")
    logging.getLogger("kvrelay").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except KVRelayError as error:
        console.print(f"[red]kvrelay: {type(error).__name__}:[/] {escape(str(error))}", soft_wrap=True)
    sys.exit(1)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds like any exit, so that `with` blocks stop their workers."""
    sys.exit(128 + signum)


def _settings(pairs: list[str] | None, options: dict[str, Any], model: str | None) -> dict[str, Any]:
    """Engine settings from `--set NAME=VALUE`, then options; a model always among them."""
    chosen = {"model": DEFAULT_MODEL} | dict(map(parse_pair, pairs or [])) | options
    return chosen if model is None else chosen | {"model": model}


def _stream(
    llm: LLM, prompts: list[Any], params: SamplingParams, *, quiet: bool
) -> list[RequestOutput | None]:
    """Print the first unfinished answer as it grows, then the others in order; all outputs in order."""
    texts = [""] * len(prompts)
    outputs: list[RequestOutput | None] = [None] * len(prompts)
    current = printed = 0
    announced: set[int] = set()
    for index, event in llm.stream_many(prompts, params):
        if event.error is not None:
            raise event.error
        texts[index] += event.text
        outputs[index] = event.output or outputs[index]
        while not quiet and current < len(prompts):
            if len(prompts) > 1 and current not in announced:
                announced.add(current)
                console.print(f"[dim]── {current + 1} of {len(prompts)}[/]", highlight=False)
            print(texts[current][printed:], end="", flush=True)
            printed = len(texts[current])
            if outputs[current] is None:
                break
            print()
            current, printed = current + 1, 0
    return outputs


def _print_json(document: Any) -> None:
    print(json.dumps(document, ensure_ascii=False))
