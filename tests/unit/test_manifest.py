"""Whether chunks cover a tensor once: the same answer as counting every number."""

import itertools
import random

import numpy as np
import pytest

from moe_train.checkpoint.manifest import check_cover


def tiling(shape: list[int], chance: random.Random) -> list[tuple[list[int], list[int], str]]:
    """Boxes that cover a tensor once: cut along a random dimension, again and again."""
    boxes = [([0] * len(shape), shape)]
    for _ in range(chance.randint(0, 6)):
        offsets, sizes = boxes.pop(chance.randrange(len(boxes)))
        dim = chance.randrange(len(shape)) if shape else 0
        if not shape or sizes[dim] < 1:
            boxes.append((offsets, sizes))
            continue
        cut = chance.randint(0, sizes[dim])
        for start, length in ((0, cut), (cut, sizes[dim] - cut)):
            new = (
                [start + o if i == dim else o for i, o in enumerate(offsets)],
                [length if i == dim else n for i, n in enumerate(sizes)],
            )
            boxes.append(new)
    chance.shuffle(boxes)
    return [(offsets, sizes, f"__{i}_0.distcp") for i, (offsets, sizes) in enumerate(boxes)]


def count(shape: list[int], chunks: list[tuple[list[int], list[int], str]]) -> np.ndarray:
    """How often each number is covered."""
    counts = np.zeros(shape, dtype=int)
    for offsets, sizes, _ in chunks:
        counts[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] += 1
    return counts


def test_against_counting() -> None:
    """Tilings pass; without a chunk, with one twice, moved or resized, they pass only where every number is covered once."""
    chance, seen = random.Random(0), set()
    for _ in range(2000):
        shape = [chance.randint(0, 5) for _ in range(chance.randint(0, 4))]
        chunks = tiling(shape, chance)
        check_cover("x", shape, chunks)
        victim = chance.randrange(len(chunks))
        offsets, sizes, file = chunks.pop(victim)
        change = chance.choice(["drop", "twice", "move", "resize"])
        if change == "twice":
            chunks += [(offsets, sizes, file)] * 2
        elif change != "drop" and shape:
            dim = chance.randrange(len(shape))
            moved = [o + (change == "move" and i == dim) for i, o in enumerate(offsets)]
            resized = [n + (chance.choice([-1, 1]) if change == "resize" and i == dim else 0) for i, n in enumerate(sizes)]
            if min(resized) < 0:
                continue
            chunks.append((moved, resized, file))
        inside = all(o + n <= s for c in chunks for o, n, s in zip(c[0], c[1], shape, strict=True))
        right = inside and bool((count(shape, chunks) == 1).all())
        seen.add((change, right))
        if right:
            check_cover("x", shape, chunks)
        else:
            with pytest.raises(ValueError, match=r"^x of "):
                check_cover("x", shape, chunks)
    assert {("drop", False), ("twice", False), ("move", False), ("resize", False)} <= seen


def test_what_is_said() -> None:
    """The missing expert, and the file of the chunk that is wrong."""
    experts = [([e, 0, 0], [1, 6, 4], f"__{e}_0.distcp") for e in range(8)]
    check_cover("experts", [8, 6, 4], experts)
    with pytest.raises(ValueError, match=r"^experts of \[8, 6, 4\] lacks \[1, 6, 4\] at \[3, 0, 0\], which is in no file$"):
        check_cover("experts", [8, 6, 4], experts[:3] + experts[4:])
    again = [*experts, ([5, 2, 0], [1, 1, 4], "__9_0.distcp")]
    with pytest.raises(ValueError, match=r"\[1, 1, 4\] at \[5, 2, 0\] in __9_0.distcp that overlaps another one"):
        check_cover("experts", [8, 6, 4], again)
    with pytest.raises(ValueError, match=r"\[1, 6, 4\] at \[7, 0, 0\] in __7_0.distcp, which is not inside of it"):
        check_cover("experts", [7, 6, 4], experts)


def test_a_tensor_of_many_chunks_is_checked_quickly() -> None:
    """A thousand ranks: 16 x 64 boxes."""
    chunks = [([16 * i, 8 * j], [16, 8], "f") for i, j in itertools.product(range(16), range(64))]
    random.Random(0).shuffle(chunks)
    check_cover("x", [256, 512], chunks)
