"""What quantizing a model did and cost, as data."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bwla_compiler.graph.plan import Plan
from bwla_compiler.graph.reading import read
from bwla_compiler.numerics.bits import Bits
from bwla_compiler.numerics.spread import Spread
from bwla_compiler.passes.base import PassReport
from bwla_compiler.recipe import Recipe


@dataclass(frozen=True)
class ExpertTokens:
    """How many calibration tokens each expert was fitted to, in the quantized stream.

    counts: by expert. floor: below it an expert's statistics are blended with those of all tokens. blended: experts
    below the floor. alike: the share of tokens that the fp stream sends to the same expert.
    """

    counts: tuple[int, ...]
    floor: int
    blended: int
    alike: float

    def __str__(self) -> str:
        least = f"{min(self.counts)} to {max(self.counts)} tokens an expert"
        floor = f"{self.blended} of {len(self.counts)} experts below {self.floor}, blended with all tokens"
        return f"{least}; {floor}; {self.alike:.0%} routed as in fp"


@dataclass(frozen=True)
class LinearReport:
    """One linear: its decision, true bits per weight (its transform counted), and errors of the fit.

    weight_error: ||W - W^||^2 / ||W||^2 in the basis that is read. output_error: tr(E H E^T) / tr(W H W^T), the
    share of the output's energy on calibration tokens that is lost (equal to weight_error without calibration). Of
    experts, both are means over the experts' tokens. tokens: of experts, None without calibration. spread: of weight
    and input, before anything was done and as they were fitted.
    """

    name: str
    decision: str
    transform: str
    rank: int
    true_bits: float
    weight_error: float
    output_error: float
    seconds: float
    tokens: ExpertTokens | None = None
    spread: Spread | None = None


def linear_report(data: Mapping[str, Any]) -> LinearReport:
    """Return the report that `dataclasses.asdict` made data of, through JSON or not. Raises PlanError for others."""
    return read(LinearReport, json.loads(json.dumps(data)), where="report of a linear")


@dataclass(frozen=True)
class BlockReport:
    """One block that is done: errors and bits are means over the weights of its linears; seconds of wall time.

    done, total: how many blocks, this one among them. restored: whether an earlier run had fitted it.
    """

    name: str
    output_error: float
    true_bits: float
    seconds: float
    done: int
    total: int
    restored: bool

    def __str__(self) -> str:
        how = "as an earlier run left it" if self.restored else f"{self.seconds:.1f} s"
        return f"{self.name}: error {self.output_error:.4f}, {self.true_bits:.3f} bits, {how}"


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` returns: the plan and recipe, what each pass did, each linear's errors, bits and seconds."""

    recipe: Recipe
    plan: Plan
    passes: tuple[PassReport, ...]
    linears: tuple[LinearReport, ...]
    bits: Bits
    seconds: dict[str, float]

    def without_times(self) -> "QuantizeReport":
        """Return the report of a run that took no time: two runs of one job then give the same."""
        passes = tuple(dataclasses.replace(p, seconds=0.0) for p in self.passes)
        linears = tuple(dataclasses.replace(x, seconds=0.0) for x in self.linears)
        return dataclasses.replace(self, passes=passes, linears=linears, seconds={})

    def to_json(self) -> str:
        """Return the report as JSON; edits are left out, their descriptions are in `passes`."""
        passes = [
            {"name": p.name, "changed": p.changed, "skipped": p.skipped, "seconds": p.seconds} for p in self.passes
        ]
        return json.dumps(
            {
                "recipe": self.recipe.to_dict(),
                "plan": json.loads(self.plan.to_json()),
                "passes": passes,
                "linears": [dataclasses.asdict(x) for x in self.linears],
                "bits": dataclasses.asdict(self.bits),
                "seconds": self.seconds,
            },
            indent=1,
        )
