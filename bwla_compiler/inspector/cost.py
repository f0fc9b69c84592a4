"""What the cost model says of a model, as data and as tables: bytes, times, where decoding is compute bound."""

from dataclasses import dataclass

from bwla_compiler.cost.devices import DEVICES
from bwla_compiler.cost.model import GroupShape, ModelShape, float_shape
from bwla_compiler.cost.roofline import region_cost
from bwla_compiler.inspector.table import Cell, Table, number, row, size

MODELLED = "Modelled, not measured: a roofline of peaks, without launches, caches and whatever else a kernel loses."


@dataclass(frozen=True)
class GroupCost:
    """One kind of group. crossovers: by device, tokens a step from which it computes longer than it moves bytes.

    count: how many of them; n_bytes: of one; transform: at run time; seconds: by device, of one for one token;
    shares: by device, how much of that its change of basis and rounding take.
    """

    name: str
    count: int
    in_features: int
    out_features: int
    transform: str
    n_bytes: int
    seconds: dict[str, float]
    shares: dict[str, float]
    crossovers: dict[str, float | None]


@dataclass(frozen=True)
class DeviceCost:
    """The whole model on one device, decoding a token of one sequence. gain: over the same model in 16 bit.

    prologues: share of the time that changes of basis and rounding take. crossover: the batch from which a decoding
    step computes longer than it moves bytes, None where the cache keeps it bound by memory; weights_crossover: the
    same without attention.
    """

    device: str
    seconds: float
    gain: float
    prologues: float
    crossover: float | None
    weights_crossover: float | None
    source: str


@dataclass(frozen=True)
class CostReport:
    """Figures of the cost model; all are modelled. context: tokens that each sequence has. unknown: what is left out.

    n_bytes: of the packed model; float_bytes: of the same model in 16 bit. recipe: "" for a packed model.
    """

    recipe: str
    context: int
    n_bytes: int
    float_bytes: int
    groups: tuple[GroupCost, ...]
    devices: tuple[DeviceCost, ...]
    unknown: str = ""


def cost_report(shape: ModelShape, *, recipe: str = "", context: int = 2048) -> CostReport:
    """Return the modelled cost of a model on every device of the table."""
    plain = float_shape(shape)
    groups = tuple(map(_group_cost, shape.groups))
    devices = []
    for device in DEVICES.values():
        seconds, before = (s.seconds(device, batch=1, context=context) for s in (shape, plain))
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
            )
        )
    return CostReport(recipe, context, shape.stored, plain.stored, groups, tuple(devices), shape.unknown)


def _group_cost(group: GroupShape) -> GroupCost:
    spec, t = group.spec, group.spec.transform
    costs = {
        name: region_cost(spec, tokens=1, device=device, n_experts=group.experts, n_used=group.used)
        for name, device in DEVICES.items()
    }
    factors = " x ".join(str(n) if there else f"1[{n}]" for n, there in ((t.n1, t.left), (t.n2, t.right)))
    return GroupCost(
        name=group.name,
        count=group.count,
        in_features=spec.in_features,
        out_features=sum(spec.out_features),
        transform=f"{t.kind} {factors}" if t.left or t.right else "",
        n_bytes=next(iter(costs.values())).stored,
        seconds={name: cost.seconds for name, cost in costs.items()},
        shares={name: cost.prologue_seconds / cost.seconds for name, cost in costs.items()},
        crossovers={name: cost.crossover for name, cost in costs.items()},
    )


def crossover_table(cost: CostReport) -> Table:
    """Return the tokens a step from which each kind of linear, and the whole model, is bound by computing."""
    names = [device.device for device in cost.devices]
    rows = [row(f"{g.name} x {g.count}", *(_tokens(g.crossovers[name]) for name in names)) for g in cost.groups]
    rows.append(row("all without attention", *(_tokens(d.weights_crossover) for d in cost.devices)))
    rows.append(row(Cell("whole model", "best"), *(_tokens(d.crossover) for d in cost.devices)))
    note = (
        f"{MODELLED} Below M* a decoding step is bound by memory. The whole model: sequences of a batch with "
        f"{cost.context:,} tokens each, attention's cache included; never: the cache keeps it bound by memory."
    )
    return Table(
        "Where decoding becomes compute bound: M*, modelled", ("M*", *(f">{n}" for n in names)), tuple(rows), note
    )


def _tokens(crossover: float | None) -> str:
    return "never" if crossover is None else number(crossover)


def group_table(cost: CostReport) -> Table:
    """Return what each kind of linear stores, and how long one token takes, in microseconds by device."""
    names = [device.device for device in cost.devices]
    rows = []
    for g in cost.groups:
        times = (f"{1e6 * g.seconds[n]:,.3g}, {g.shares[n]:.0%}" for n in names)
        shape = f"{g.in_features} → {g.out_features}"
        rows.append(row(f"{g.name} x {g.count}", shape, g.transform or "-", size(g.n_bytes), *times))
    columns = ("linears", ">shape", "at run time", ">bytes", *(f">{n}" for n in names))
    note = f"{MODELLED} Microseconds of one token, and the share that the change of basis and rounding take of it."
    return Table("Linears: modelled", columns, tuple(rows), note)


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
