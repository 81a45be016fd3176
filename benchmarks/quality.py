"""What sparse attention costs in quality, on a real model and without a network: needles, RULER tasks, text.

    python benchmarks/quality.py --budget-s 2400     # as many samples as fit; again: goes on where it stopped
    python benchmarks/quality.py --budget-s 0        # only the table, the record and the heat map

A sample (part, settings, lengths, seed) is read once and asked at each of its lengths. Every such cell is
a line of `--cells` that names the settings and the commit it was measured with; with other settings it is
measured anew, and several processes may share the file. A row says how many it has, and what dense scores on
those same ones. Where a context fits in a budget, selection takes everything: the cell is dense's. `default`
reads as much as its heads need, up to 4,096 keys, `p95` less of that, about as much as `1024`; both are
sparse from the first token here. Numbers are budgets.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import torch
from msgspec.structs import replace

from kvrelay.config import cache_home
from kvrelay.experiments.record import Gate, make_record
from kvrelay.models.loading import load_model
from kvrelay.models.tokenizer import Tokenizer
from kvrelay.sparse import GROUP_TOKENS, AttentionUse, SparseAttention
from quality_model import Reader
from quality_report import report
from quality_tasks import NEEDLES, NESTED, RULER, TEXTS, Writer, score

RULER_LENGTHS = (4096, 7424)
TEXT_TOKENS, SCORED_TOKENS, CONTINUED_TOKENS = 6144, 1024, 48
MAX_TOKENS = 9472
FIXED = SparseAttention(budget_tokens=1024, dense_below_tokens=0, top_p=None)
SHARED = replace(FIXED, local_blocks=8, exact=False)  # one list a KV group, ranked by two queries of 64
COMPARED = ("quest", "mean_pool", "two_stage", "antidiagonal", "local", "oracle")
SETTINGS: dict[str, SparseAttention | None] = {
    "dense": None,
    "default": SparseAttention(dense_below_tokens=0),
    "p95": SparseAttention(dense_below_tokens=0, top_p=0.95),
    "2048": SparseAttention(budget_tokens=2048, dense_below_tokens=0),
    "1024": FIXED,
    "512": replace(FIXED, budget_tokens=512),
    **{f"{selector}-1024": replace(FIXED, selector=selector) for selector in COMPARED},
    "shared-1024": SHARED,
    "shared-4096": replace(SHARED, budget_tokens=4096),
}
PARTS = ("needle", "text", "ruler")
MOST_ROUNDS = 20
CELLS = Path(__file__).parent / "results" / "quality_cells.jsonl"
FIRST_ALONE = 1000  # seed of contexts of one length: a cell is named by its length and seed


class Cell(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One measurement: scores by label, and for texts what was read and the greedy continuation.

    `seconds` are the sample's up to this length, less what was shared with the settings before; `sparse` and
    `commit` are what was measured.
    """

    part: str
    settings: str
    length: int
    seed: int
    sparse: SparseAttention | None = None
    scores: dict[str, float] = {}
    continued: list[int] = []
    use: AttentionUse = AttentionUse()
    seconds: float = 0.0
    commit: str = ""

    @property
    def name(self) -> str:
        """What it is a measurement of."""
        return f"{self.part}.{self.settings}.{self.length}.{self.seed}"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One sample read by one setting: a cell for each length."""

    part: str
    settings: str
    lengths: tuple[int, ...]
    seed: int

    def cells(self) -> list[Cell]:
        """Its cells, yet without scores."""
        return [
            Cell(
                part=self.part,
                settings=self.settings,
                length=length,
                seed=self.seed,
                sparse=SETTINGS[self.settings],
            )
            for length in self.lengths
        ]


def jobs(parts: list[str], rounds: int) -> Iterator[Job]:
    """Every job: a sample for all settings, which share what they read of it alike, before the next."""
    for part, lengths, seed in _samples(parts, rounds):
        for name in SETTINGS:
            yield Job(part=part, settings=name, lengths=lengths, seed=seed)


def _samples(parts: list[str], rounds: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    for index in range(rounds):
        if "text" in parts and index < len(_texts()):
            yield "text", (TEXT_TOKENS,), index
        for lengths, places in NEEDLES.items() if "needle" in parts else ():
            first = index * len(places) + (FIRST_ALONE if len(lengths) == 1 else 0)
            for seed in range(first, first + len(places)):
                yield "needle", lengths, seed
        for task in RULER if "ruler" in parts else ():
            for lengths in [RULER_LENGTHS] if task in NESTED else [(n,) for n in RULER_LENGTHS]:
                yield task, lengths, index


class Bench:
    """Runs jobs on one model and keeps their cells as lines of the file `cells`."""

    def __init__(self, directory: Path, cells: Path) -> None:
        self._tokenizer = Tokenizer.from_directory(directory)
        self._writer = Writer(self._tokenizer)
        self._reader = Reader(load_model(directory, "cpu", torch.float32), MAX_TOKENS)
        self._cells, self._size, self._start_s = cells, 0, 0.0
        self._found: dict[str, Cell] = {}
        self._dense_texts: dict[int, torch.Tensor] = {}  # hidden states of the rows that are scored
        record = make_record("quality", {}, Gate(checks={}), {})
        self._commit = f"{record['commit'] or 'unknown'}{'+changes' if record['dirty'] else ''}"

    def run(self, job: Job) -> list[Cell]:
        """Measure a sample and write its cells; one that reads everything anyway is copied from dense."""
        sparse = SETTINGS[job.settings]
        self._start_s = time.perf_counter()
        if sparse is not None and job.lengths[-1] + 256 <= sparse.first_sparse_position():
            dense = replace(job, settings="dense")
            found = self.measured(dense.cells())
            found = found if len(found) == len(job.lengths) else self.run(dense)
            done = [replace(cell, settings=job.settings, sparse=sparse) for cell in found]
        elif job.part == "text":
            done = [self._text(cell, sparse) for cell in job.cells()]
        else:
            done = self._task(job, sparse)
        with self._cells.open("ab+") as file:
            is_torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
            lines = [msgspec.json.encode(cell) + b"\n" for cell in done]
            file.write(b"\n" * is_torn + b"".join(lines))
        return done

    def measured(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those that were measured, with these settings, as they were measured last, by whatever process."""
        if self._cells.exists() and self._cells.stat().st_size != self._size:
            self._found, self._size = read_cells(self._cells), self._cells.stat().st_size
        asked = ((cell, self._found.get(cell.name)) for cell in cells)
        return [own for cell, own in asked if own is not None and own.sparse == cell.sparse]

    def _finish(self, cell: Cell) -> Cell:
        return replace(cell, seconds=time.perf_counter() - self._start_s, commit=self._commit)

    def _task(self, job: Job, sparse: SparseAttention | None) -> list[Cell]:
        """Read the context up to each length and ask there: what follows does not change what was read."""
        sample = self._writer.sample(job.part, job.lengths, job.seed)
        done, read = [], self._reader.shared_with_last(sample.context, sparse, job.lengths[0])
        for cell in job.cells():
            end = cell.length // GROUP_TOKENS * GROUP_TOKENS
            asked = [question for question in sample.questions if question.length == end]
            if read < end:
                self._reader.read(sample.context[:end], sparse, end, read)
            answers = self._reader.ask(end, [q.token_ids for q in asked], sample.max_tokens, sparse)
            scores = {
                question.label: score(self._tokenizer.decode(answer), question.expected)
                for question, answer in zip(asked, answers, strict=True)
            }
            done.append(self._finish(replace(cell, scores=scores)))
            read = end
        return done

    def _text(self, cell: Cell, sparse: SparseAttention | None) -> Cell:
        tokens = self._writer.encode(_texts()[cell.seed].read_text())
        context, after = tokens[: cell.length], tokens[cell.length : cell.length + 2]
        targets = torch.tensor(tokens[cell.length - SCORED_TOKENS + 1 : cell.length + 1])
        first = cell.length - SCORED_TOKENS
        if sparse is not None and cell.seed not in self._dense_texts:
            self._dense_texts[cell.seed] = self._reader.read(context, None, first)
        self._reader.use = AttentionUse()
        hidden = self._reader.read(context, sparse, first)
        rows = self._dense_texts.setdefault(cell.seed, hidden), hidden
        dense, own = (torch.cat([self._reader.model.logits(few) for few in all.split(128)]) for all in rows)
        (continued,) = self._reader.ask(cell.length, [after], CONTINUED_TOKENS, sparse)
        scores = compare(own, dense, targets)
        return self._finish(replace(cell, scores=scores, continued=continued, use=self._reader.use))


def read_cells(path: Path) -> dict[str, Cell]:
    """What was measured, by name; of several of a name, the last. Lines that are no cells are left out."""
    found = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            cell = msgspec.json.decode(line, type=Cell)
        except msgspec.DecodeError as error:  # a run was killed as it wrote; or its settings had other names
            print(f"{path.name}:{number}: {error}", file=sys.stderr)
        else:
            found[cell.name] = cell
    return found


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
    reader, sample = bench._reader, bench._writer.sample("needle", (1024,), 0)
    everything = SparseAttention(budget_tokens=2048, dense_below_tokens=0, top_p=1.0)
    little = SparseAttention(
        budget_tokens=128, local_blocks=1, dense_below_tokens=0, selector="local", top_p=None
    )
    rows = [reader.read(sample.context, sparse, 512) for sparse in (None, everything, little)]
    return {
        "a budget that holds everything is dense": torch.allclose(rows[0], rows[1], atol=1e-2, rtol=1e-2),
        "a budget of two blocks is not": not torch.allclose(rows[0], rows[2], atol=1e-1, rtol=1e-1),
    }


def _names(parser: argparse.ArgumentParser, option: str, asked: str, known: tuple[str, ...]) -> list[str]:
    names = asked.split(",")
    for name in names:
        if name not in known:
            parser.error(f"--{option}: {name!r} is none of {', '.join(known)}")
    return names


def main() -> None:
    """Run what fits in `--budget-s`, then report what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=cache_home() / "models/smollm2-135m-instruct")
    parser.add_argument("--cells", type=Path, default=CELLS, help="what was measured; more is added to it")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--settings", default=",".join(SETTINGS), help="which to measure; all are reported")
    parser.add_argument("--rounds", type=int, default=5, help="ten needles a length, one of each RULER task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=2400.0)
    arguments = parser.parse_args()
    parts, settings = (
        _names(parser, option, getattr(arguments, option), known)
        for option, known in (("parts", PARTS), ("settings", tuple(SETTINGS)))
    )
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments.model, arguments.cells)
    end_s = time.monotonic() + arguments.budget_s
    for job in jobs(parts, arguments.rounds):
        if job.settings not in settings or len(bench.measured(job.cells())) == len(job.lengths):
            continue
        if time.monotonic() >= end_s:
            break
        for done in bench.run(job):
            scores = {label: round(value, 3) for label, value in done.scores.items()}
            print(done.name, scores, f"{done.seconds:.0f} s", flush=True)
    found = bench.measured(cell for job in jobs(list(PARTS), MOST_ROUNDS) for cell in job.cells())
    if not found:
        parser.error(f"--cells {arguments.cells}: nothing has been measured; the record stays as it is")
    report(found, gate(bench), {name: msgspec.to_builtins(sparse) for name, sparse in SETTINGS.items()})


if __name__ == "__main__":
    main()
