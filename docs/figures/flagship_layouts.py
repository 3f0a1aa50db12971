"""What each layout of the flagship sends and holds, by the closed forms of docs/parallelism.md.

`python docs/figures/flagship_layouts.py` prints the table of that page and draws flagship_layouts.svg beside itself.
"""

from math import comb
from pathlib import Path
from typing import NamedTuple

D, LAYERS, E, F, V, P, K = 1280, 24, 16, 448, 96512, 128, 4  # hidden, layers, experts, width, vocabulary, router, choices
TOKENS = 1120 * 4096  # of a step
RANKS, LINK = 8, 220e9  # GPUs; bytes/s that one sustains over NVLink 3 (300e9 on paper)
STEP = (
    14.0  # seconds of a step's work at 45 % of the peak of 8 A100s (312e12 FLOP/s each): 3.43e9 FLOP per token, 6.3 s at 100 %
)

ATTENTION, EXPERTS, ROUTER, NORMS = 4 * D * D, 3 * E * F * D, P * D + E * P, 2 * D  # parameters of a layer
CELL, VOCABULARY = 6 * P * P + 6 * P, V * D  # of the shared cell; of the embedding, and of the head


class Cost(NamedTuple):
    """One rank of a layout (the one that holds most)."""

    name: str
    parameters: float  # that it works with
    masters: float  # of which it holds fp32 masters and moments
    sent: dict[str, float]  # axis -> bytes of a step

    @property
    def states(self) -> float:
        """Bytes of bf16 parameters, fp32 gradients, and 12 bytes of master and moments for each of its own."""
        return 6 * self.parameters + 12 * self.masters


def data(n: int, narrow: float, wide: float = 0.0, reduces: int = 1) -> float:
    """n ranks gather parameters (bf16, `wide` ones fp32) once and reduce-scatter fp32 gradients `reduces` times."""
    return (n - 1) / n * (2 * narrow + 4 * wide + 4 * reduces * (narrow + wide))


def experts(ep: int) -> float:
    """A step's all-to-alls where loads are even: a token goes once to each other rank that owns one of its K experts."""
    ranks = ep * (1 - comb(E - E // ep, K) / comb(E, K))
    rows = ranks * (ep - 1) / ep * TOKENS / RANKS
    return LAYERS * rows * (2 * (2 * D * 2 + 4 * K) + 4 * K)


def tensor(tp: int) -> float:
    """Gathers and scatters around attention, embedding and head, in forward and in backward."""
    return 2 * (2 * LAYERS + 2) * (tp - 1) / tp * (TOKENS * tp / RANKS) * D * 2


def layouts() -> list[Cost]:
    """The flagship's layouts, the recommended one first."""
    routers, norms = LAYERS * ROUTER + CELL, LAYERS * NORMS + D
    dense = LAYERS * ATTENTION + norms + 2 * VOCABULARY
    whole = dense + LAYERS * EXPERTS
    total = whole + routers
    found = [
        Cost("dp8, `optimizer`", total, total / 8, {"data": data(8, whole, routers)}),
        Cost("dp8, `none`", total, total, {"data": 2 * 7 / 8 * 4 * total}),
        Cost("dp8, `gradients`", total, total / 8, {"data": data(8, whole, routers, reduces=10)}),
    ]
    again = 7 / 8 * (2 * 10 * (2 * (whole - 2 * VOCABULARY - D) + 2 * VOCABULARY + D) + 4 * 10 * routers + 4 * 10 * total)
    found.append(Cost("dp8, `parameters`", total / 8, total / 8, {"data": again}))
    for ep in (2, 4, 8):
        mine = LAYERS * EXPERTS / ep
        sent = {"data": data(8, dense, routers) + data(8 // ep, mine), "experts": experts(ep)}
        found.append(Cost(f"ep{ep}", dense + routers + mine, total / 8, sent))
    split, mine = LAYERS * ATTENTION / 2 + VOCABULARY, LAYERS * EXPERTS / 4
    sent = {"data": data(4, split + norms, routers) + data(2, mine), "experts": experts(4), "tensor": tensor(2)}
    found.append(Cost("tp2 ep4", split + norms + routers + mine, (split + norms + routers) / 4 + mine / 2, sent))
    stage = 15 * (ATTENTION + EXPERTS + NORMS) + VOCABULARY
    wide = 15 * ROUTER + CELL
    sent = {"data": data(4, stage, wide), "pipeline": TOKENS / 4 * (2 * D + 4 * P)}
    return [*found, Cost("pp2 dp4", stage + wide, (stage + wide) / 4, sent)]


def table() -> str:
    """The costs as markdown."""
    lines = [
        "| layout | parameters of a rank | states | sent a step | if nothing hides it | of a 14.0 s step |",
        "|---|---|---|---|---|---|",
    ]
    for cost in layouts():
        sent = sum(cost.sent.values())
        seconds = sent / LINK
        lines.append(
            f"| {cost.name} | {cost.parameters / 1e9:.3f} B | {cost.states / 1e9:.1f} GB | {sent / 1e9:.1f} GB "
            f"| {seconds:.3f} s | {seconds / STEP:.1%} |"
        )
    return "\n".join(lines)


def draw(path: Path) -> None:
    """Bars of bytes sent, by axis."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "flagship", "svg.fonttype": "none"}  # the same file each time, and text in it
    from matplotlib import pyplot as plt

    costs = layouts()[::-1]
    figure, axes = plt.subplots(figsize=(8, 3.6))
    left = [0.0] * len(costs)
    for kind in ("data", "experts", "tensor", "pipeline"):
        widths = [cost.sent.get(kind, 0.0) / 1e9 for cost in costs]
        axes.barh([cost.name.replace("`", "") for cost in costs], widths, left=left, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, (cost, total) in enumerate(zip(costs, left, strict=True)):
        axes.text(total + 5, i, f"{total:.1f} GB, states {cost.states / 1e9:.1f} GB", va="center", fontsize=8)
    axes.set_xlim(0, 640)
    axes.set_xlabel("GB that a GPU sends in a step of 4.6 M tokens (computed)")
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    print(table())
    draw(Path(__file__).with_suffix(".svg"))
