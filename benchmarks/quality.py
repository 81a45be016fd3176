"""What sparse attention costs in quality, on a real model and without a network: needles, RULER tasks, text.

    python benchmarks/quality.py --budget-s 2400     # as many cells as fit; again: goes on where it stopped
    python benchmarks/quality.py --budget-s 0        # only the table, the record and the heat map

Every cell (part, settings, length, seed) is a file in `--work`. A row says how many it has, and what dense
scores on those same ones. Where a context fits in a budget, selection takes everything: the cell is dense's.
`exact-1024` reads as much as its heads need; on average over a prompt of 6K that is at most 1,024 keys
(`tokens_per_query`).
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file

from kvrelay.config import cache_home
from kvrelay.models.loading import load_model
from kvrelay.models.tokenizer import Tokenizer
from kvrelay.sparse import AttentionUse, SparseAttention
from quality_model import Reader
from quality_report import report
from quality_tasks import RULER, TEXTS, Writer, score

LENGTHS = (1024, 2048, 4096, 6144, 7424)
RULER_LENGTHS = (4096, 7424)
TEXT_TOKENS, SCORED_TOKENS, CONTINUED_TOKENS = 6144, 1024, 48
MAX_TOKENS = 9472
SETTINGS: dict[str, SparseAttention | None] = {
    "dense": None,
    "exact-1024": SparseAttention(
        budget_tokens=2048, top_p=0.98, exact=True, local_blocks=2, dense_below_tokens=0
    ),
    "tree-1024": SparseAttention(budget_tokens=1024, dense_below_tokens=0),
    "tree-4096": SparseAttention(budget_tokens=4096, dense_below_tokens=0),
    "tree-2048": SparseAttention(budget_tokens=2048, dense_below_tokens=0),
    "tree-512": SparseAttention(budget_tokens=512, local_blocks=4, dense_below_tokens=0),
    "quest-1024": SparseAttention(selector="quest", budget_tokens=1024, dense_below_tokens=0),
    "mean_pool-1024": SparseAttention(selector="mean_pool", budget_tokens=1024, dense_below_tokens=0),
}
FIRST_SETTINGS = ("dense", "exact-1024", "tree-1024")
RULER_SETTINGS = ("dense", "exact-1024", "tree-2048")


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement: scores by label, what was read, and for texts the greedy continuation."""

    part: str
    settings: str
    length: int
    seed: int
    scores: dict[str, float] = {}
    continued: list[int] = []
    use: AttentionUse = AttentionUse()
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """Its file's stem."""
        return f"{self.part}.{self.settings}.{self.length}.{self.seed}"


def cells(parts: list[str], seeds: int) -> Iterator[Cell]:
    """Every cell, most wanted first: the first seed of everything before the second of anything."""
    for seed in range(seeds):
        if "text" in parts and seed < len(_texts()):
            yield from _alike("text", (TEXT_TOKENS,), SETTINGS, seed)
        if "needle" in parts:
            yield from _alike("needle", LENGTHS, FIRST_SETTINGS, seed)
        if "ruler" in parts:
            for length in RULER_LENGTHS:
                for task in RULER:
                    yield from _alike(task, (length,), RULER_SETTINGS, seed)
        if "needle" in parts:
            yield from _alike(
                "needle", LENGTHS, [name for name in SETTINGS if name not in FIRST_SETTINGS], seed
            )


def _alike(part: str, lengths: Iterable[int], settings: Iterable[str], seed: int) -> Iterator[Cell]:
    for length, name in product(lengths, settings):
        yield Cell(part=part, settings=name, length=length, seed=seed)


class Bench:
    """Runs cells on one model and keeps them in `work`."""

    def __init__(self, directory: Path, work: Path) -> None:
        self._tokenizer = Tokenizer.from_directory(directory)
        self._writer = Writer(self._tokenizer)
        self._reader = Reader(load_model(directory, "cpu", torch.float32), MAX_TOKENS)
        self._work = work

    def run(self, cell: Cell) -> Cell:
        """Measure one cell and write it down; one that reads everything anyway is copied from dense."""
        path = self._work / f"{cell.name}.json"
        sparse = SETTINGS[cell.settings]
        if sparse is not None and cell.length + 256 <= sparse.first_sparse_position():
            done = self._dense(cell)
        else:
            start_s = time.perf_counter()
            self._reader.use = AttentionUse()
            done = self._text(cell, sparse) if cell.part == "text" else self._task(cell, sparse)
            seconds = time.perf_counter() - start_s
            done = msgspec.structs.replace(done, use=self._reader.use, seconds=seconds)
        path.write_bytes(msgspec.json.encode(done))
        return done

    def _dense(self, cell: Cell) -> Cell:
        dense = msgspec.structs.replace(cell, settings="dense")
        data = (self._work / f"{dense.name}.json").read_bytes()
        return msgspec.structs.replace(msgspec.json.decode(data, type=Cell), settings=cell.settings)

    def _task(self, cell: Cell, sparse: SparseAttention | None) -> Cell:
        sample = self._writer.sample(cell.part, cell.length, cell.seed)
        self._reader.read(sample.context, sparse, len(sample.context))
        questions = [question.token_ids for question in sample.questions]
        answers = self._reader.ask(len(sample.context), questions, sample.max_tokens, sparse)
        scores = {
            question.label or str(index): score(self._tokenizer.decode(answer), question.expected)
            for index, (question, answer) in enumerate(zip(sample.questions, answers, strict=True))
        }
        return msgspec.structs.replace(cell, scores=scores)

    def _text(self, cell: Cell, sparse: SparseAttention | None) -> Cell:
        tokens = self._writer.encode(_texts()[cell.seed].read_text())
        context, after = tokens[: cell.length], tokens[cell.length : cell.length + 2]
        hidden = self._reader.read(context, sparse, cell.length - SCORED_TOKENS)
        targets = torch.tensor(tokens[cell.length - SCORED_TOKENS + 1 : cell.length + 1])
        save_file({"hidden": hidden, "targets": targets}, self._work / f"{cell.name}.safetensors")
        logits = torch.cat([self._reader.model.logits(rows) for rows in hidden.split(128)])
        dense_path = self._work / f"{msgspec.structs.replace(cell, settings='dense').name}.safetensors"
        dense = load_file(dense_path)["hidden"]
        scores = compare(logits, torch.cat([self._reader.model.logits(r) for r in dense.split(128)]), targets)
        (continued,) = self._reader.ask(cell.length, [after], CONTINUED_TOKENS, sparse)
        return msgspec.structs.replace(cell, scores=scores, continued=continued)


def compare(logits: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Mean negative log-likelihood in nats, top-1 agreement, and KL(dense || sparse) in nats per token."""
    log_p, log_q = dense.log_softmax(-1), logits.log_softmax(-1)
    return {
        "nll": -log_q.gather(1, targets[:, None]).mean().item(),
        "top1": (log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
    }


def _texts() -> list[Path]:
    return [TEXTS / "python_source.txt", TEXTS / "prose.txt"]


def gate(bench: Bench) -> dict[str, bool]:
    """Selection that leaves nothing out must answer as dense does; one that leaves most out must differ."""
    reader, sample = bench._reader, bench._writer.sample("needle", 1024, 0)
    everything = SparseAttention(budget_tokens=2048, dense_below_tokens=0, top_p=1.0)
    little = SparseAttention(budget_tokens=128, local_blocks=1, dense_below_tokens=0, selector="local")
    rows = [reader.read(sample.context, sparse, 512) for sparse in (None, everything, little)]
    return {
        "a budget that holds everything is dense": torch.allclose(rows[0], rows[1], atol=1e-2, rtol=1e-2),
        "a budget of two blocks is not": not torch.allclose(rows[0], rows[2], atol=1e-1, rtol=1e-1),
    }


def main() -> None:
    """Run what fits in `--budget-s`, then report what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=cache_home() / "models/smollm2-135m-instruct")
    parser.add_argument("--work", type=Path, default=cache_home() / "quality")
    parser.add_argument("--parts", default="needle,text,ruler")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=2400.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.model, arguments.work)
    end_s = time.monotonic() + arguments.budget_s
    for cell in cells(arguments.parts.split(","), arguments.seeds):
        if (arguments.work / f"{cell.name}.json").exists():
            continue
        if time.monotonic() >= end_s:
            break
        done = bench.run(cell)
        print(
            done.name, {k: round(v, 3) for k, v in done.scores.items()}, f"{done.seconds:.0f} s", flush=True
        )
    found = [msgspec.json.decode(path.read_bytes(), type=Cell) for path in arguments.work.glob("*.json")]
    report(found, gate(bench), {name: msgspec.to_builtins(sparse) for name, sparse in SETTINGS.items()})


if __name__ == "__main__":
    main()
