"""One linear explained in full sentences: what was decided, which operation pinned its basis, what would free it."""

import difflib
import re
from collections.abc import Iterator, Sequence

from bwla_compiler.errors import PlanError
from bwla_compiler.graph.plan import Basis
from bwla_compiler.inspector.cost import GroupCost
from bwla_compiler.inspector.report import MEANINGS, InspectorReport, LinearRow
from bwla_compiler.inspector.table import number

PINNED = re.compile(r"pinned by (?P<node>[^:]+?)(?:: (?P<why>[^;]*))?(?:;|$)")
"""What a reason says of the operation that took the freedom: the node's name, and what it does."""

LISTED = 4
"""Names that a sentence lists at most."""

REMEDIES: tuple[tuple[str, str], ...] = (
    (
        "acts on each channel by itself",
        "A nonlinearity sees each channel by itself, so that no rotation passes through it: nothing frees this input "
        "while the model computes that function. What can change is the price: transform.budget limits it, and "
        "transform.online = false leaves the input in its own basis.",
    ),
    (
        "attention works head by head",
        "Attention mixes the channels inside a head and keeps heads apart, so that a head's own factor may fold and "
        "the factor across heads may not: nothing frees it while there are several heads, and it is a small one.",
    ),
    (
        "has no rule",
        "The analysis does not know this operation and pins what it touches, which is never wrong. A rule for it in "
        "graph/ would free the basis if the operation commutes with rotations (CONTRIBUTING.md, An operation's rule).",
    ),
    (
        "its gain stays",
        "A norm's gain scales each channel. It would be absorbed, and the basis freed, if linears alone read what the "
        "norm gives; the name in brackets says who else does.",
    ),
    ("a gain", "A product with one number per channel. It would be free if linears alone read what it gives."),
    (
        "graph output",
        "What the model returns must have its channels as callers know them; a linear behind it would free it.",
    ),
    ("graph input", "What comes into the model has its channels as callers give them; a linear behind it frees them."),
    (
        "do not line up",
        "Two places of the model cut these channels into different parts. One layout in both (heads next to each "
        "other, halves not interleaved) would free it.",
    ),
    ("a product meets a sum", "Here channels are read as rows and columns, elsewhere as pieces side by side."),
    ("slice", "A slice takes single channels by number. Pieces that a linear writes by itself would be free."),
    ("taken by number", "Single channels are taken by number, which a rotation would mix with others."),
    ("indexed", "Single channels are taken by number, which a rotation would mix with others."),
    ("mask", "A mask treats channels differently. One that treats all channels alike would leave them free."),
    ("batch of a product", "A product of two activations keeps its batch axes as they are."),
    ("experts are chosen by number", "Experts are chosen by number, and a rotation would mix them."),
    ("reads squares one by one", "Squares of single channels are read; a sum or mean over all of them would be free."),
)
"""What an operation does, by words of its reason, and what would free the basis."""

REFUSALS: tuple[tuple[str, str], ...] = (
    ("a router", "Nothing needs to change: a router is small, and a rounded one would send tokens elsewhere."),
    ("an adapter", "Merge the adapter into its base layer first, and it is quantized with it."),
    ("plain linear", "If that class computes what nn.Linear does, replace it by nn.Linear and it will be packed."),
    ("way of calling its experts", "Experts are packed in the forms that transformers' own mixtures have."),
    ("times as a product", "Each projection of packed experts is called once; here the model calls it more often."),
)
"""The same for linears that are left alone."""

UNKNOWN = (
    "What would free it is an operation there that treats all channels alike. Until then the linear works in its "
    "own basis, which is always correct."
)


def find_linear(report: InspectorReport, name: str) -> LinearRow:
    """Return a linear by its name, or by the end of it where one alone ends so. Raises PlanError, with near names."""
    exact = [x for x in report.linears if x.name == name]
    found = exact or [x for x in report.linears if x.name.endswith("." + name)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(x.name for x in found[:LISTED])
        raise PlanError(f"{name!r} is the end of {len(found)} linears ({names}, ...): give the block too")
    known = [x.name.removeprefix(report.prefix) for x in report.linears]
    near = difflib.get_close_matches(name.removeprefix(report.prefix), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"the first one is {report.linears[0].name!r}"
    raise PlanError(f"no linear is called {name!r}; {hint}")


def explain(report: InspectorReport, name: str) -> str:
    """Return paragraphs of full sentences on one linear. Raises PlanError where there is none of that name."""
    linear = find_linear(report, name)
    parts = (
        _what(linear),
        " ".join(_input(report, linear)),
        " ".join(_freed(linear)),
        " ".join(_surroundings(report, linear)),
        " ".join(_run(report, linear)),
        " ".join(_measured(linear)),
    )
    return "\n\n".join(part for part in parts if part)


def _what(x: LinearRow) -> str:
    experts = f" for each of {x.experts} experts" if x.experts else ""
    return (
        f"{x.name} takes {x.in_features:,} channels to {x.out_features:,}{experts}. It is {x.decision}: "
        f"{MEANINGS[x.decision]}."
    )


def _input(report: InspectorReport, x: LinearRow) -> Iterator[str]:
    known = {basis.name: basis for basis in report.bases}
    free = [known[name] for name in x.input_bases if name in known]
    if x.decision == "alone":
        yield f"The reason: {x.reason}."
        return
    if free and x.input == free[0].name:
        yield f"Its input lives in the basis {x.input}."
    elif free:
        yield f"Its input is {x.input}: 1[n] is a factor of n channels that stay as they are."
    else:
        yield f"No part of its {x.in_features:,} input channels may be rotated beforehand."
    for basis in free:
        yield _basis(basis)
    found = PINNED.search(x.reason)
    if found:
        does = f", which {_does(found['why'])}" if found["why"] else ""
        which = "A factor of it" if free else "The basis"
        yield f"{which} was pinned by the operation {found['node']}{does}."


def _does(why: str) -> str:
    """Return what an operation does as the end of a sentence."""
    if why.startswith("attention works"):
        return "works head by head"
    verbs = ("acts", "mixes", "reads", "works", "takes", "has")
    return why if why.startswith(verbs) else f"is where this was found: {why}"


def _basis(basis: Basis) -> str:
    free = {
        "free": "any rotation of it can be folded",
        "fixes-ones": f"rotations that keep the all-ones vector can be folded ({basis.reason})",
        "pinned": f"it is pinned ({basis.reason})",
    }[basis.freedom]
    writers = f"written by {_names(basis.writers)}" if basis.writers else "written by no linear"
    return f"{basis.name} has {basis.size:,} channels, {writers} and read by {_names(basis.readers)}; {free}."


def _names(names: Sequence[str]) -> str:
    if len(names) <= LISTED + 1:
        return ", ".join(names) or "none"
    return f"{', '.join(names[:LISTED])} and {len(names) - LISTED} more"


def _freed(x: LinearRow) -> Iterator[str]:
    table = REFUSALS if x.decision == "alone" else REMEDIES
    if x.decision == "folded":
        yield "Nothing holds it: its rotation is multiplied into the weights that write its input, once."
        return
    yield next((remedy for words, remedy in table if words in x.reason), UNKNOWN)


def _surroundings(report: InspectorReport, x: LinearRow) -> Iterator[str]:
    shared = [y.name for y in report.linears if y.group == x.group and y.name != x.name and y.decision != "alone"]
    if shared and x.decision != "alone":
        yield f"It shares its input with {_names(shared)}: what is done to that input is done once for all of them."
    gains = [norm for norm in report.norms if x.name in norm.absorbed_by]
    for norm in gains:
        yield f"It takes over {norm.gain or norm.shift}, the gain of the norm before it."
    freedom = {basis.name: basis.freedom for basis in report.bases}
    turned = [name for name in x.output_bases if freedom.get(name, "pinned") != "pinned"]
    if turned:
        yield f"Its output is written in {_names(turned)}, so that its rows are rotated once, too."


def _run(report: InspectorReport, x: LinearRow) -> Iterator[str]:
    stored = x.format
    if stored is None:
        return
    planes = "one bit a weight" if stored.planes == 1 else f"{stored.planes} bits a weight"
    pair = f", beside an int8 pair of rank {stored.rank}" if stored.rank else ""
    inputs = f"inputs of {stored.activation_bits} bits" if stored.activation_bits < 16 else "inputs left in floats"
    scale = {"row": "row", "row+column": "row and a column", "group": "group of a row"}[stored.scales]
    yield f"It is stored as {planes} with a scale for each {scale}{pair}: {stored.bits:.2f} bits a weight, {inputs}."
    if stored.transform:
        yield f"At run time its input goes through {stored.transform}."
    if stored.reason and not (x.decision == "folded" and not stored.transform and "already" in stored.reason):
        yield f"Of its transform the compiler says: {stored.reason}."
    group = _group_cost(report, x)
    if group and report.cost:
        name = report.cost.chosen
        yield (
            f"Modelled on {name}, the linears of its input take {1e6 * group.seconds[name]:.3g} microseconds a token, "
            f"{group.shares[name]:.0%} of it before the product ({group.kernels[name]})."
        )


def _group_cost(report: InspectorReport, x: LinearRow) -> GroupCost | None:
    """Return the cost of the group of a linear: the entry of its name among those of its width."""
    short = x.name.rpartition(".")[2]
    groups = report.cost.groups if report.cost else ()
    return next((g for g in groups if short in g.name.split(", ") and g.in_features == x.in_features), None)


def _measured(x: LinearRow) -> Iterator[str]:
    if x.error is not None:
        where = "output on calibration tokens" if x.output_error is not None else "weight"
        yield f"Quantizing it took {number(x.bits)} bits a weight and lost {x.error:.1%} of the energy of its {where}."
    spread = x.spread
    if spread and spread.weight_before and spread.weight_after:
        before, after = spread.weight_before.bimodality, spread.weight_after.bimodality
        yield (
            f"The bimodality of its weights went from {before:.3f} to {after:.3f} (1/3 is a normal distribution, 1 is "
            "two values)."
        )
    if spread and spread.input_before and spread.input_after:
        first, last = spread.input_before, spread.input_after
        yield (
            f"The largest value of a token of its input was {first.peak:.1f} times its rms, and is {last.peak:.1f} "
            f"times now; {last.bits} bits lose {last.lost:.2%} of its energy instead of {first.lost:.2%}."
        )
