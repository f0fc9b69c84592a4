"""The blocks of a run: fetched before their first group is fitted, stored once nothing reads them any more."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Node

from bwla_compiler.calibrate.report import BlockReport, LinearReport, linear_report
from bwla_compiler.calibrate.residency import Residency
from bwla_compiler.calibrate.stream import TwinStream
from bwla_compiler.graph.plan import Group, Plan
from bwla_compiler.passes.base import PassReport


class Blocks:
    """See the module's docstring. passes, linears: the run's reports, to which what was restored is added.

    on_block: told of each block that is done. Groups outside all blocks are fetched, and fitted anew by every run.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Sequence[Group],
        weights: Residency,
        *,
        passes: list[PassReport],
        linears: list[LinearReport],
        on_block: Callable[[BlockReport], None] | None = None,
    ) -> None:
        self.plan, self.groups, self.weights = plan, groups, weights
        self.passes, self.linears, self.on_block = passes, linears, on_block
        self._before = len(passes)  # of passes over the whole model, which every run makes
        self._last = {group.block: i for i, group in enumerate(groups) if group.block}
        self._entered: dict[str, float] = {}
        self._restored: set[str] = set()
        self._open: list[str] = []
        self._stored = 0

    def enter(self, group: Group, stream: TwinStream | None) -> bool:
        """Have a group's weights at hand; return whether it is still to be fitted."""
        block = group.block
        if not block:
            self.weights.fetch(*group.linears)
            return True
        if block not in self._entered:
            self._entered[block] = time.perf_counter()
            record = self.weights.finished(block, floats=stream is not None)
            if record is None:
                self.weights.fetch(block)
            else:
                self._restore(block, record, stream)
        return block not in self._restored

    def _restore(self, block: str, record: dict[str, Any], stream: TwinStream | None) -> None:
        self._restored.add(block)
        self.passes.extend(PassReport(**p, edits=[]) for p in _tupled(record["passes"]))
        found = [linear_report(x) for x in record["linears"]]
        self.linears.extend(found)
        if stream is not None:
            stream.replaced.update(x.name for x in found)

    def leave(self, done: int, stream: TwinStream | None, *, before: Node | None) -> None:
        """Store what is done after a group, which is number `done`; before: the node of the next one."""
        block = self.groups[done].block
        if self._last.get(block) == done:
            self._open.append(block)
        for name in list(self._open):
            if stream is None or before is None or stream.pass_by(name, before=before):
                self._open.remove(name)
                self._store(name)

    def close(self) -> None:
        """Store what something read to the very end."""
        for name in self._open:
            self._store(name)
        self._open.clear()

    def _store(self, block: str) -> None:
        linears = [x for x in self.linears if self.plan.linear(x.name).block == block]
        if block not in self._restored:
            record = {
                "linears": [dataclasses.asdict(x) for x in linears],
                "passes": [p for report in self.passes[self._before :] if (p := _within(report, block))],
            }
            self.weights.store(block, record)
        else:
            self.weights.store(block, {})
        self._stored += 1
        if self.on_block is not None:
            self.on_block(self._report(block, linears))

    def _report(self, block: str, linears: Sequence[LinearReport]) -> BlockReport:
        weights = [self.plan.linear(x.name).n_weights for x in linears]
        total = max(1, sum(weights))
        return BlockReport(
            name=block,
            output_error=sum(n * x.output_error for n, x in zip(weights, linears, strict=True)) / total,
            true_bits=sum(n * x.true_bits for n, x in zip(weights, linears, strict=True)) / total,
            seconds=time.perf_counter() - self._entered[block],
            done=self._stored,
            total=len(self._last),
            restored=block in self._restored,
        )


def _within(report: PassReport, block: str) -> dict[str, Any] | None:
    """Return what a report says of a block, as JSON data, or None for nothing."""
    changed = [(what, how) for what, how in report.changed if what.startswith(f"{block}.")]
    skipped = [(what, why) for what, why in report.skipped if what.startswith(f"{block}.")]
    if not changed and not skipped:
        return None
    return {"name": report.name, "changed": changed, "skipped": skipped, "seconds": report.seconds}


def _tupled(passes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return records of passes with the pairs that JSON made lists of."""
    return [{**p, **{key: [tuple(x) for x in p[key]] for key in ("changed", "skipped")}} for p in passes]
