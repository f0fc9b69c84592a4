"""One block's dataflow as an SVG picture: the residual stream as a rail, branches in layers, colours for bases."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import networkx as nx

from bwla_compiler.graph.plan import Norm
from bwla_compiler.inspector.report import LETTERS, BlockRow, LinearRow

BOX_WIDTH, BOX_HEIGHT = 142, 46
GAP_X, GAP_Y = 16, 34
RAIL_X, LEFT, TOP = 26, 66, 44

COLOURS = 6
"""Number of colours for free bases (CSS variables --basis-0 ...); pinned ones are grey."""


@dataclass(frozen=True)
class Palette:
    """Colours and chains of the bases that a block's linears read or write, in the order of first sight.

    chains: number of each basis' chain. Colour classes: "residual", "pinned", or "basis-<i>".
    """

    names: tuple[str, ...]
    chains: Mapping[str, int]

    def of(self, bases: Sequence[str]) -> str:
        """Return the class of an axis: that of its first basis; "pinned" where it has none."""
        if not bases or bases[0] not in self.names:
            return "pinned"
        return "residual" if bases[0] == "residual" else f"basis-{self.names.index(bases[0]) % COLOURS}"

    def data(self, bases: Iterable[str]) -> str:
        """Return the attribute that names the chains of an axis."""
        found = dict.fromkeys(f"c{self.chains[name]}" for name in bases if name in self.chains)
        return f' data-chain="{" ".join(found)}"' if found else ""

    def drawn(self, shape: str, bases: Sequence[str]) -> str:
        """Return the attributes of something that is drawn in the colour of an axis: its classes and chains."""
        return f'class="{shape} {self.of(bases)}"{self.data(bases)}'


def palette(block: BlockRow, chains: Sequence[Sequence[str]] = ()) -> Palette:
    """Return the colours and chains of the bases that a block's linears read or write."""
    seen = dict.fromkeys(name for x in block.linears for name in (*x.input_bases, *x.output_bases))
    return Palette(tuple(seen), {name: i for i, chain in enumerate(chains) for name in chain})


def branches(block: BlockRow) -> list[list[list[LinearRow]]]:
    """Return the block's branches: runs of groups from the residual stream back to it, each a list of groups."""
    found: list[list[list[LinearRow]]] = [[]]
    for linear in block.linears:
        run = found[-1]
        if run and run[-1][0].group == linear.group and run[-1][0].writes_residual == linear.writes_residual:
            run[-1].append(linear)
            continue
        if run and run[-1][0].writes_residual:
            run = []
            found.append(run)
        run.append([linear])
    return [run for run in found if run]


def block_graph(block: BlockRow, norms: tuple[Norm, ...]) -> "list[nx.DiGraph]":
    """Return one graph a branch. Nodes have kind (norm, linear, join) and texts; edges their bases."""
    return [_branch_graph(i, run, norms) for i, run in enumerate(branches(block))]


def _branch_graph(index: int, run: list[list[LinearRow]], norms: tuple[Norm, ...]) -> "nx.DiGraph":
    graph = nx.DiGraph()
    norm = next((n for n in norms if run[0][0].name in n.absorbed_by), None)
    above: list[tuple[str, tuple[str, ...]]] = []
    if norm is not None:
        graph.add_node(
            f"{index}.norm", kind="norm", title=_last(norm.gain or norm.shift or "norm"), text="gain absorbed"
        )
        above = [(f"{index}.norm", run[0][0].input_bases)]
    for at, group in enumerate(run):
        if at and len(above) > 1:
            join = f"{index}.join{at}"
            graph.add_node(join, kind="join", title=_common(group[0].short), text="")
            for source, bases in above:
                graph.add_edge(source, join, bases=bases)
            above = [(join, group[0].input_bases)]
        for linear in group:
            graph.add_node(linear.name, kind="linear", linear=linear)
            for source, _ in above:
                graph.add_edge(source, linear.name, bases=linear.input_bases)
        above = [(linear.name, linear.output_bases) for linear in group]
    return graph


def _last(parameter: str) -> str:
    return parameter.split(".")[-2] if "." in parameter else parameter


def _common(short: str) -> str:
    return short.rpartition(".")[0] or "combine"


def layout(graphs: "list[nx.DiGraph]") -> tuple[dict[str, tuple[float, float]], float, float]:
    """Return the centre of every node, and width and height: layers below each other, branches too."""
    layers = [list(nx.topological_generations(graph)) for graph in graphs]
    widest = max((len(layer) for rows in layers for layer in rows), default=1)
    longest = max((_pill(d["title"]) for graph in graphs for _, d in graph.nodes(data=True) if "title" in d), default=0)
    width = LEFT + max(widest * (BOX_WIDTH + GAP_X), longest + GAP_X)
    at: dict[str, tuple[float, float]] = {}
    y = float(TOP + 40)
    for rows in layers:
        for layer in rows:
            span = len(layer) * BOX_WIDTH + (len(layer) - 1) * GAP_X
            left = LEFT + (width - LEFT - GAP_X - span) / 2
            for i, node in enumerate(layer):
                at[node] = (left + BOX_WIDTH / 2 + i * (BOX_WIDTH + GAP_X), y + BOX_HEIGHT / 2)
            y += BOX_HEIGHT + GAP_Y
        y += GAP_Y
    return at, width, y


def block_svg(block: BlockRow, norms: tuple[Norm, ...], colours: Palette) -> str:
    """Return the picture. Each linear is a link to its row (#linear-<name>), so it is reached by keyboard.

    What lives in a free basis carries the number of its chain (data-chain="c0"): the page's script lights it up.
    """
    graphs = block_graph(block, norms)
    at, width, height = layout(graphs)
    residual = next((x for x in block.linears if x.writes_residual), block.linears[0])
    stream = residual.output_bases if residual.writes_residual else residual.input_bases
    parts = [
        f'<line {colours.drawn("rail", stream)} x1="{RAIL_X}" y1="{TOP - 14}" x2="{RAIL_X}" y2="{height - 6:.0f}"/>',
        f'<path {colours.drawn("rail-end", stream)} d="M{RAIL_X - 7} {height - 12:.0f} l7 12 l7 -12 z"/>',
        f'<text class="rail-name" x="{RAIL_X - 12}" y="{TOP - 22}">residual stream</text>',
    ]
    for graph in graphs:
        parts += _branch_svg(graph, at, colours, stream)
    label = f"Dataflow of {block.label}"
    return (
        f'<svg class="flow" viewBox="0 0 {width:.0f} {height + 8:.0f}" role="group" aria-label="{escape(label)}" '
        f'style="--width:{width:.0f}px">{"".join(parts)}</svg>'
    )


def _branch_svg(
    graph: "nx.DiGraph", at: dict[str, tuple[float, float]], colours: Palette, stream: Sequence[str]
) -> list[str]:
    edge, plus = colours.drawn("edge", stream), colours.drawn("plus", stream)
    starts = [n for n in graph if graph.in_degree(n) == 0]
    ends = [n for n in graph if graph.out_degree(n) == 0 and _writes(graph, n)]
    lines, boxes = [], []
    for start in starts:
        x, y = at[start]
        top = y - BOX_HEIGHT / 2
        lines.append(f'<path {edge} d="M{RAIL_X} {top - 18:.0f} H{x - 10:.0f} q10 0 10 10 V{top:.0f}"/>')
    for end in ends:
        x, y = at[end]
        bottom = y + BOX_HEIGHT / 2
        bend = f"M{x:.0f} {bottom:.0f} v8 q0 10 -10 10 H{RAIL_X + 9}"
        lines.append(f'<path {edge} d="{bend}"/>')
        boxes.append(
            f'<circle {plus} cx="{RAIL_X}" cy="{bottom + 18:.0f}" r="9"/>'
            f'<path class="plus-sign" d="M{RAIL_X - 4} {bottom + 18:.0f} h8 m-4 -4 v8"/>'
        )
    for a, b, data in graph.edges(data=True):
        lines.append(_edge(at[a], at[b], colours.drawn("edge", data["bases"])))
    boxes += [_box(graph.nodes[n], at[n], colours) for n in graph]
    return lines + boxes


def _writes(graph: "nx.DiGraph", node: str) -> bool:
    linear = graph.nodes[node].get("linear")
    return linear is not None and linear.writes_residual


def _edge(a: tuple[float, float], b: tuple[float, float], drawn: str) -> str:
    (x1, y1), (x2, y2) = (a[0], a[1] + BOX_HEIGHT / 2), (b[0], b[1] - BOX_HEIGHT / 2)
    middle = (y1 + y2) / 2
    curve = f"M{x1:.0f} {y1:.0f} C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"
    return f'<path {drawn} d="{curve}"/>'


def _pill(title: str) -> float:
    """Return the width of a norm's or a join's box: its text at 13 px, in a font of unknown width."""
    return max(BOX_WIDTH, 36 + 7.6 * len(title))


def _box(node: dict[str, object], centre: tuple[float, float], colours: Palette) -> str:
    x, y = centre[0] - BOX_WIDTH / 2, centre[1] - BOX_HEIGHT / 2
    linear = node.get("linear")
    if not isinstance(linear, LinearRow):
        middle = centre[1] + (-2 if node["text"] else 4)
        second = f'<text class="small" x="{centre[0]:.0f}" y="{centre[1] + 13:.0f}">{escape(str(node["text"]))}</text>'
        width = _pill(str(node["title"]))
        x = centre[0] - width / 2
        return (
            f'<g class="{node["kind"]}">'
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="23"/>'
            f'<text x="{centre[0]:.0f}" y="{middle:.0f}">{escape(str(node["title"]))}</text>'
            f"{second if node['text'] else ''}</g>"
        )
    title = f"{linear.name}: {linear.decision}. {linear.reason}"
    lit = colours.data((*linear.input_bases, *linear.output_bases))
    return (
        f'<a href="#linear-{escape(linear.name)}" class="linear {linear.decision}" '
        f'data-linear="{escape(linear.name)}"{lit}><title>{escape(title)}</title>'
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7"/>'
        f'<path class="badge" d="M{x + 7:.0f} {y:.0f} h17 v{BOX_HEIGHT} h-17 q-7 0 -7 -7 '
        f'v-{BOX_HEIGHT - 14} q0 -7 7 -7 z"/>'
        f'<text class="letter" x="{x + 12:.0f}" y="{centre[1] + 5:.0f}">{LETTERS[linear.decision]}</text>'
        f'<text x="{centre[0] + 12:.0f}" y="{centre[1] - 3:.0f}">{escape(linear.short.rpartition(".")[2])}</text>'
        f'<text class="small" x="{centre[0] + 12:.0f}" y="{centre[1] + 13:.0f}">'
        f"{linear.sizes}</text></a>"
    )
