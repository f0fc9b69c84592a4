"""What the cost model says of a model, as data and as tables: bytes, times, where decoding is compute bound."""

from dataclasses import dataclass

from bwla_compiler.cost.devices import DEVICES
from bwla_compiler.cost.model import GroupShape, ModelShape, float_shape
from bwla_compiler.cost.parts import PartCost, step_parts
from bwla_compiler.cost.roofline import region_cost
from bwla_compiler.errors import RecipeError
from bwla_compiler.inspector.formats import transform_text
from bwla_compiler.inspector.table import Cell, Table, number, row, size

MODELLED = "Modelled, not measured: a roofline of peaks, without launches, caches and whatever else a kernel loses."

DEFAULT_DEVICE = "h100-sxm"
"""Whose costs are shown first where no device is asked for."""


@dataclass(frozen=True)
class GroupCost:
    """One kind of group. crossovers: by device, tokens a step from which it computes longer than it moves bytes.

    count: how many of them; n_bytes: of one; transform: at run time; moved, ops: bytes and operations (two a
    multiply-add) of one for one token; seconds: by device, of one for one token; shares: by device, how much of that
    its change of basis and rounding take; kernels: by device, what runs it.
    """

    name: str
    count: int
    in_features: int
    out_features: int
    transform: str
    n_bytes: int
    moved: int
    ops: int
    seconds: dict[str, float]
    shares: dict[str, float]
    crossovers: dict[str, float | None]
    kernels: dict[str, str]


@dataclass(frozen=True)
class DeviceCost:
    """The whole model on one device, decoding a token of one sequence. gain: over the same model in 16 bit.

    prologues: share of the time that changes of basis and rounding take. crossover: the batch from which a decoding
    step computes longer than it moves bytes, None where the cache keeps it bound by memory; weights_crossover: the
    same without attention. decode, prefill: the parts of one decoded token, and of a prompt of `context` tokens;
    float_decode, float_prefill: the same of the model in 16 bit.
    """

    device: str
    seconds: float
    gain: float
    prologues: float
    crossover: float | None
    weights_crossover: float | None
    source: str
    decode: tuple[PartCost, ...]
    prefill: tuple[PartCost, ...]
    float_decode: tuple[PartCost, ...]
    float_prefill: tuple[PartCost, ...]


@dataclass(frozen=True)
class CostReport:
    """Figures of the cost model; all are modelled. context: tokens that each sequence has. unknown: what is left out.

    n_bytes: of the packed model; float_bytes: of the same model in 16 bit. recipe: "" for a packed model. chosen: the
    device that is shown first.
    """

    recipe: str
    context: int
    n_bytes: int
    float_bytes: int
    groups: tuple[GroupCost, ...]
    devices: tuple[DeviceCost, ...]
    unknown: str = ""
    chosen: str = DEFAULT_DEVICE

    def device(self, name: str = "") -> DeviceCost:
        """Return the figures of a device, of the chosen one if no name is given. Raises RecipeError where unknown."""
        check_device(name or self.chosen)
        return next(d for d in self.devices if d.device == (name or self.chosen))


def cost_report(
    shape: ModelShape, *, recipe: str = "", context: int = 2048, chosen: str = DEFAULT_DEVICE
) -> CostReport:
    """Return the modelled cost of a model on every device of the table. Raises RecipeError for an unknown device."""
    check_device(chosen)
    plain = float_shape(shape)
    groups = tuple(map(_group_cost, shape.groups))
    parts = [
        step_parts(s, DEVICES.values(), batch=1, context=context, tokens=tokens)
        for s in (shape, plain)
        for tokens in (1, context)
    ]
    devices = []
    for device in DEVICES.values():
        seconds, before = (sum(part.seconds for part in found[device.name]) for found in (parts[0], parts[2]))
        turning = sum(g.count * g.seconds[device.name] * g.shares[device.name] for g in groups)
        crossovers = [shape.crossover(device, context=tokens) for tokens in (context, 0)]
        devices.append(
            DeviceCost(
                device=device.name,
                seconds=seconds,
                gain=before / seconds,
                prologues=turning / seconds,
                crossover=crossovers[0],
                weights_crossover=crossovers[1],
                source=device.source,
                decode=parts[0][device.name],
                prefill=parts[1][device.name],
                float_decode=parts[2][device.name],
                float_prefill=parts[3][device.name],
            )
        )
    return CostReport(recipe, context, shape.stored, plain.stored, groups, tuple(devices), shape.unknown, chosen)


def check_device(name: str) -> None:
    """Raise RecipeError where the cost model does not know a device."""
    if name not in DEVICES:
        raise RecipeError(f"device {name!r} is not in the cost model: choose one of {', '.join(DEVICES)}")


def _group_cost(group: GroupShape) -> GroupCost:
    from bwla_compiler.inspector.kernels import kernel_names  # needs torch, which the help must not wait for

    spec = group.spec
    costs = {
        name: region_cost(spec, tokens=1, device=device, n_experts=group.experts, n_used=group.used)
        for name, device in DEVICES.items()
    }
    first = next(iter(costs.values()))
    return GroupCost(
        name=group.name,
        count=group.count,
        in_features=spec.in_features,
        out_features=sum(spec.out_features),
        transform=transform_text(spec),
        n_bytes=first.stored,
        moved=first.bytes,
        ops=first.ops,
        seconds={name: cost.seconds for name, cost in costs.items()},
        shares={name: cost.prologue_seconds / cost.seconds for name, cost in costs.items()},
        crossovers={name: cost.crossover for name, cost in costs.items()},
        kernels={name: kernel_names(spec, device) for name, device in DEVICES.items()},
    )


def crossover_table(cost: CostReport, *, only: str = "") -> Table:
    """Return the tokens a step from which each kind of linear, and the whole model, is bound by computing.

    only: the device to show, where there is no room for all.
    """
    names = [device.device for device in cost.devices if only in ("", device.device)]
    rows = [row(f"{g.name} x {g.count}", *(_tokens(g.crossovers[name]) for name in names)) for g in cost.groups]
    rows.append(row("all without attention", *(_tokens(cost.device(n).weights_crossover) for n in names)))
    rows.append(row(Cell("whole model", "best"), *(_tokens(cost.device(n).crossover) for n in names)))
    note = (
        f"{MODELLED} Below M* a decoding step is bound by memory. The whole model: sequences of a batch with "
        f"{cost.context:,} tokens each, attention's cache included; never: the cache keeps it bound by memory."
    )
    return Table(
        "Where decoding becomes compute bound: M*, modelled", ("M*", *(f">{n}" for n in names)), tuple(rows), note
    )


def _tokens(crossover: float | None) -> str:
    return "never" if crossover is None else number(crossover)


def region_table(cost: CostReport, name: str = "") -> Table:
    """Return what each kind of group costs a token on one device, the chosen one if none is named."""
    device = cost.device(name).device
    rows = [
        row(
            f"{g.name} x {g.count}",
            f"{g.in_features} → {g.out_features}",
            g.transform or "-",
            size(g.moved),
            number(g.ops / 1e6),
            f"{1e6 * g.seconds[device]:.3g}",
            f"{g.shares[device]:.0%}",
            Cell(g.kernels[device], "quiet"),
        )
        for g in cost.groups
    ]
    columns = ("region", ">shape", "transform", ">bytes", ">MFLOP", ">µs", ">before", "kernels")
    note = (
        f"{MODELLED} Of one such region, for one token on {device}; before: share of the change of basis and rounding."
    )
    return Table(f"Regions on {device}: modelled", columns, tuple(rows), note)


def plain_regions(cost: CostReport) -> Table:
    """Return the regions without transforms and kernels: what fits a narrow terminal."""
    whole = region_table(cost)
    kept = [i for i, name in enumerate(whole.columns) if name not in ("transform", "kernels")]
    rows = tuple(tuple(cells[i] for i in kept) for cells in whole.rows)
    return Table(whole.title, tuple(whole.columns[i] for i in kept), rows, whole.note)


def device_table(cost: CostReport) -> Table:
    """Return the whole model by device."""
    rows = tuple(
        row(
            d.device,
            f"{1e3 * d.seconds:,.3g}",
            number(1 / d.seconds),
            f"{d.gain:.1f}",
            f"{d.prologues:.0%}",
            Cell(d.source, "quiet"),
        )
        for d in cost.devices
    )
    columns = ("device", ">ms a token", ">tokens/s", ">x 16 bit", ">prologues", "peaks from")
    left_out = f" Left out: {cost.unknown}." if cost.unknown else ""
    note = (
        f"{MODELLED} One sequence of {cost.context:,} tokens, one token decoded; {size(cost.n_bytes)} packed, "
        f"{size(cost.float_bytes)} in 16 bit.{left_out}"
    )
    recipe = f" by {cost.recipe}" if cost.recipe else ""
    return Table(f"Decoding{recipe}: modelled", columns, rows, note)
