"""Whole models: decode, prefill, time to first token, memory, and compile time cold and warm, way beside way.

Each contender has a process of its own, and they compute in turn. Its logits are compared with the reference's before
anything is timed. All read the same tokens, so that all do the same work whatever they predict.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.budget import LEFT_OUT, Budget
from benchmarks.errors import ContenderError, ResultsError
from benchmarks.gguf_model import write_float_gguf
from benchmarks.noise import Noise
from benchmarks.peers import LLAMA, Way, ways
from benchmarks.subject import Subject, make_subject
from benchmarks.timing import Times, in_turn, quartiles
from benchmarks.turns import Contender
from bwla_compiler.errors import CheckpointError

Progress = Callable[[str, int, int], None]
Row = dict[str, Any]

OURS = "bwla"

STARTING = 0.7
"""Of the budget: for starting contenders; the rest is for timing them and for warm starts."""

FIRST = (
    "eager fp32", "bwla, eager", OURS, "inductor bf16", "inductor fp32", "llama.cpp Q4_0", "llama.cpp Q1_0",
    "torchao int8 dynamic", "torchao int4 weight-only", "eager bf16", "llama.cpp Q8_0", "torchao int8 weight-only",
)  # fmt: skip
"""Ways that are started before all others, so that a short budget leaves out what matters least. What compiles longest
(max-autotune) is not among them."""


@dataclass(frozen=True)
class Work:
    """What each contender does: a prompt of so many tokens, then so many single ones; over so many rounds."""

    prompt: int = 64
    steps: int = 16
    rounds: int = 8
    threads: int = 2
    warm: bool = True


def measure(
    progress: Progress,
    *,
    model: str = "demo:",
    floats: str = "",
    layers: int = 0,
    vocab: int = 0,
    alike: bool = False,
    chosen: Sequence[str] = (),
    work: Work | None = None,
    budget: Budget | None = None,
) -> list[Row]:
    """Return a row per way: figures, or why there are none ("missing", "refused", "failed").

    model, floats, layers, vocab, alike: see `make_subject`. chosen: ways by name. budget: of wall time; ways that do
    not fit are not begun. Raises ResultsError for an unknown way, ModelError and CheckpointError for an unusable model.
    """
    wanted = ways(tuple(chosen))
    with TemporaryDirectory() as folder:
        root = Path(folder)
        subject = make_subject(
            model, work=root, floats=floats, layers=layers, vocab=vocab, alike=alike, progress=progress
        )
        return Race(subject, wanted, work or Work(), root, progress, budget or Budget()).run()


class Race:
    """Contenders of one subject, from their start to their rows."""

    def __init__(
        self, subject: Subject, chosen: Sequence[Way], work: Work, root: Path, progress: Progress, budget: Budget
    ) -> None:
        self.subject, self.work, self.root, self.progress, self.budget = subject, work, root, progress, budget
        self.ways = {way.name: way for way in chosen}
        self.rows: dict[str, Row] = {name: self._about(name) for name in self.ways}
        self.ids = root / "ids.pt"
        torch.save(subject.ids(work.prompt + work.steps), self.ids)

    def run(self) -> list[Row]:
        """Start, check and time the contenders, and return the rows of all ways."""
        noise = Noise()
        with ExitStack() as stack:
            racing = self._started(stack)
            racing = self._checked(racing)
            self._timed(racing)
            for name, contender in racing.items():
                self.rows[name] |= contender.ask("memory")
        if self.work.warm:
            self._warm(list(racing))
        for row in self.rows.values():
            row |= noise.fields()
        return [*self.rows.values()]

    def _about(self, name: str) -> Row:
        work = self.work
        return {
            "model": self.subject.label,
            "way": name,
            "prompt": work.prompt,
            "steps": work.steps,
            "threads": work.threads,
        }

    def _path(self, way: Way) -> str:
        """Return what a way loads, written first where it is a file of its own.

        Raises ResultsError and CheckpointError where this model cannot be had that way.
        """
        if missing := way.missing():
            raise ResultsError(missing)
        folder = self.subject.folder(way.source)
        if folder is None:
            raise ResultsError("the float model was not given")
        if not way.ggml:
            return folder
        file = self.root / f"{way.ggml}.gguf"
        return str(file if file.exists() else write_float_gguf(folder, file, kind=way.ggml))

    def _job(self, way: Way) -> dict[str, Any]:
        return {
            "way": way.name,
            "path": self._path(way),
            "ids": str(self.ids),
            "prompt": self.work.prompt,
            "threads": self.work.threads,
        }

    def _started(self, stack: ExitStack) -> dict[str, Contender]:
        """Return the contenders that load and make their first call, which compiles."""
        started: dict[str, Contender] = {}
        for done, name in enumerate(self.budget.part(STARTING).within(self._order(self.ways), like=self._compiles)):
            way = self.ways[name]
            self.progress("models: first calls", done, len(self.ways))
            try:
                job = self._job(way)
            except (ResultsError, CheckpointError) as error:
                self.rows[name]["missing"] = str(error)
                continue
            contender = stack.enter_context(Contender(job, caches=self._caches(name)))
            try:
                loaded = contender.answer()
                first = contender.ask("first")
            except ContenderError as error:
                self.rows[name]["failed"] = str(error)[:300]
                continue
            self.rows[name] |= _rounded(loaded, first, "cold")
            started[name] = contender
        for name, row in self.rows.items():
            if name not in started and not {"missing", "failed"} & row.keys():
                row["missing"] = LEFT_OUT
        self.progress("models: first calls", len(self.ways), len(self.ways))
        return started

    def _order(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))

    def _compiles(self, name: str) -> bool:
        """Whether a way takes long to start: what a budget tells ways apart by."""
        return self.ways[name].compiler not in ("eager", LLAMA)

    def _caches(self, name: str) -> Path:
        return self.root / f"caches-{list(self.ways).index(name)}"

    def _checked(self, started: Mapping[str, Contender]) -> dict[str, Contender]:
        """Return the contenders whose logits are right; the others' rows say by how much they are wrong."""
        logits: dict[str, Tensor] = {}
        for name, contender in started.items():
            path = self.root / "logits.pt"
            try:
                contender.ask(f"logits {path}")
            except ContenderError as error:
                self.rows[name]["failed"] = str(error)[:300]
                continue
            logits[name] = torch.load(path)
        right: dict[str, Contender] = {}
        for name in logits:
            compared = compare(self.ways[name], logits)
            self.rows[name] |= compared
            if "refused" not in compared:
                right[name] = started[name]
        return right

    def _timed(self, racing: Mapping[str, Contender]) -> None:
        if not racing:
            return
        seconds = in_turn(
            {name: partial(contender.ask, "round") for name, contender in racing.items()},
            rounds=self.work.rounds,
        )
        times = {
            part: {name: Times(tuple(found[part] for found in rounds)) for name, rounds in seconds.items()}
            for part in ("first_token", "prefill", "decode")
        }
        ours = times["decode"].get(OURS)
        for name in racing:
            self.rows[name] |= self._figures({part: times[part][name] for part in times}, ours)

    def _figures(self, times: Mapping[str, Times], ours: Times | None) -> Row:
        decode = times["decode"]
        low, high = decode.quartiles
        figures: Row = {}
        if ours is not None:
            ratio_low, ratio_high = quartiles(ours.ratios(decode))
            figures = {
                "times_ours": round(ours.ratio(decode), 3),
                "times_low": round(ratio_low, 3),
                "times_high": round(ratio_high, 3),
            }
        return figures | {
            "decode_tokens_per_second": round(1 / decode.median, 1),
            "decode_low": round(1 / high, 1),
            "decode_high": round(1 / low, 1),
            "prefill_tokens_per_second": round(self.work.prompt / times["prefill"].median, 1),
            "prefill_spread": round(times["prefill"].spread, 3),
            "first_token_ms": round(times["first_token"].median * 1e3, 2),
        }

    def _warm(self, names: Sequence[str]) -> None:
        """Start what compiles again, one after another, with the caches that the first start has left."""
        names = [name for name in self._order(names) if self._compiles(name)]
        for done, name in enumerate(self.budget.within(names, like=self._compiles)):
            self.progress("models: warm starts", done, len(names))
            with Contender(self._job(self.ways[name]), caches=self._caches(name)) as contender:
                loaded = contender.answer()
                self.rows[name] |= _rounded(loaded, contender.ask("first"), "warm")
        self.progress("models: warm starts", len(names), len(names))


def compare(way: Way, logits: Mapping[str, Tensor]) -> Row:
    """Return how near a way's logits are to its reference's and to the float model's; "refused" where they are wrong.

    logits [tokens, vocabulary] by way's name. Of a way without a reference, or whose reference did not run, finite
    logits are asked for alone.
    """
    mine = logits[way.name].double()
    fields: Row = {}
    for of, name in (("reference", way.reference), ("fp32", "eager fp32")):
        if name in logits and name != way.name:
            agreed = (mine.argmax(-1) == logits[name].argmax(-1)).double().mean()
            fields[f"top1_{of}"] = round(float(agreed), 4)
    if not bool(mine.isfinite().all()):
        return fields | {"refused": "its logits are not finite: not timed"}
    if way.reference in logits:
        wanted = logits[way.reference].double()
        error = float((mine - wanted).norm() / wanted.norm())
        fields["error"] = float(f"{error:.2e}")
        if not error <= way.tolerance:
            fields["refused"] = f"wrong by {error:.1e} (at most {way.tolerance:g}): not timed"
    return fields


def _rounded(loaded: Row, first: Row, state: str) -> Row:
    """Return the columns of a start, cold or warm."""
    seconds = first["first_prefill_seconds"] + first["first_decode_seconds"]
    found = {f"compile_{state}_seconds": round(seconds, 2), f"load_{state}_seconds": round(loaded["load_seconds"], 2)}
    about = {} if state == "warm" else {"n_bytes": loaded["n_bytes"], "version": loaded["version"]}
    return found | about
