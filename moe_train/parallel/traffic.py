"""What a rank sends: calls and bytes of every collective and message, by axis of the layout.

Bytes are those that a rank sends to other ranks where the collective is as cheap as it can be (rings, or each rank to each), which is
what a link has to carry; what a library really sends may be more. For n ranks and an input of b bytes here:

    all-gather      (n - 1) b            reduce-scatter   (n - 1) / n b
    all-reduce      2 (n - 1) / n b      all-to-all       the parts that are for other ranks
    send            b                    broadcast        b from the root, 0 from the others

Receiving is not counted: it is somebody else's sending. A group of one rank sends nothing and is left out.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_train.parallel.mesh import Layout


class Sent(NamedTuple):
    """Of one operation on one axis."""

    calls: int
    bytes: int


class Traffic(TorchDispatchMode):
    """Context manager that counts what this rank sends while it is active.

    Axes: `pp`, `replicate`, `shard`, `tp`, `cp`, `ep`, `expert_tp`; `expert_shard` and `expert_replicate` (data parallelism of
    experts with a mesh of their own); `sharers` (cp and tp together); `world`. Axes that hold all ranks share torch's default group
    and are counted together, as `shard+ep`, with what else goes over the whole world.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self._axes = _axes(layout)
        self._calls: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()

    def sent(self) -> dict[tuple[str, str], Sent]:
        """(axis, operation) -> what this rank has sent."""
        return {key: Sent(calls, self._bytes[key]) for key, calls in sorted(self._calls.items())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a collective and run it."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its collectives are on plain tensors, and come here again
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0].strip("_")
        if namespace in ("c10d", "_c10d_functional") and name not in _SILENT:
            if name not in _COSTS:
                raise TypeError(f"moe_train.parallel.traffic does not know {func.name()}, which would go uncounted")
            self._count(*_COSTS[name], args)
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, bytes_of: Callable[..., int], args: tuple[Any, ...]) -> None:
        group = _group(args)
        if group.size() > 1:
            key = (self._axes[group.group_name], operation)
            self._calls[key] += 1
            self._bytes[key] += bytes_of(group, *args)


def _axes(layout: Layout) -> dict[str, str]:
    """Name of each process group -> its axis, or axes."""
    found: dict[str, list[str]] = {}
    for mesh, prefix in ((layout.dense, ""), (layout.rows, ""), (layout.experts, "expert_")):
        for axis in ("pp", "replicate", "shard", "tp", "cp", "ep", "expert_tp"):
            if axis in (mesh.mesh_dim_names or ()):
                names = found.setdefault(mesh.get_group(axis).group_name, [])
                if axis not in names:
                    names.append(prefix + axis if axis in ("replicate", "shard") else axis)
    found.setdefault(layout.sharers.group_name, ["sharers"])
    found.setdefault(dist.group.WORLD.group_name, ["world"])  # type: ignore[union-attr]
    return {group: "+".join(names) for group, names in found.items()}


def _group(args: tuple[Any, ...]) -> dist.ProcessGroup:
    """The process group among a collective's arguments: itself, or (functional ones, last) its name."""
    boxed = next((arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())), None)
    if boxed is not None:
        return dist.ProcessGroup.unbox(boxed)
    group = args[-1]
    return group if isinstance(group, dist.ProcessGroup) else dist.distributed_c10d._resolve_process_group(group)


def _size(x: Any) -> int:
    return x.nbytes if isinstance(x, Tensor) else sum(map(_size, x))


def _all_reduce(group: dist.ProcessGroup, tensors: Any, *_: Any) -> int:
    return 2 * _size(tensors) * (group.size() - 1) // group.size()


def _gather_base(group: dist.ProcessGroup, out: Tensor, x: Tensor, *_: Any) -> int:
    return _size(x) * (group.size() - 1)


def _scatter_base(group: dist.ProcessGroup, out: Tensor, x: Tensor, *_: Any) -> int:
    return _share(group, x)


def _share(group: dist.ProcessGroup, x: Any, *_: Any) -> int:
    return _size(x) * (group.size() - 1) // group.size()


def _whole(group: dist.ProcessGroup, x: Any, *_: Any) -> int:
    return _size(x) * (group.size() - 1)


def _exchange_base(
    group: dist.ProcessGroup, out: Tensor, x: Tensor, box: Any, received: list[int], sent: list[int], *_: Any
) -> int:
    return _exchange(group, x, received, sent)


def _exchange(group: dist.ProcessGroup, x: Tensor, received: list[int], sent: list[int], *_: Any) -> int:
    if not sent:
        return _share(group, x)
    return _size(x) * (sum(sent) - sent[group.rank()]) // max(sum(sent), 1)


def _send(group: dist.ProcessGroup, tensors: Any, *_: Any) -> int:
    return _size(tensors)


def _broadcast(group: dist.ProcessGroup, tensors: Any, box: Any, root: int, *_: Any) -> int:
    return _size(tensors) if group.rank() == root else 0


_COSTS: dict[str, tuple[str, Callable[..., int]]] = {
    "allreduce": ("all_reduce", _all_reduce),
    "all_reduce": ("all_reduce", _all_reduce),
    "allgather_base": ("all_gather", _gather_base),
    "allgather": ("all_gather", _gather_base),
    "all_gather_into_tensor": ("all_gather", _whole),
    "reduce_scatter_base": ("reduce_scatter", _scatter_base),
    "reduce_scatter_tensor": ("reduce_scatter", _share),
    "alltoall_base": ("all_to_all", _exchange_base),
    "all_to_all_single": ("all_to_all", _exchange),
    "broadcast": ("broadcast", _broadcast),
    "send": ("send", _send),
}
_SILENT = {"recv", "recv_any_source", "barrier", "monitored_barrier", "wait_tensor", "wrap_tensor_autograd"}
