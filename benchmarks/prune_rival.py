"""Torch-Pruning and onnxsim on one network, in a Python environment of their own.

    PYTHON benchmarks/prune_rival.py '{"net": "resnet18", "out": "OUT.onnx", "ratio": 0.5}'

Torch-Pruning prunes a torch module, one of `architectures.py` or a ResNet of CIFAR-10 rebuilt from its
.onnx file, as the library's guide has it: by the L2 norms of groups, the same ratio for every layer, the
layers of the outputs kept. Its result goes through edgewise's exporter, as the network itself does. There
is no training: that would need labels. onnxsim prunes an .onnx file, simplified before, by its
`apply_structured_pruning`.

A line of JSON tells the version and the seconds of pruning alone. The environment needs torch-pruning,
onnxsim and what edgewise needs to export.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rivals import Attempt, answer

if TYPE_CHECKING:
    from torch import Tensor, nn

_PATIENCE = 900.0  # seconds
_STEPS = 12  # halvings of the interval of ratios
_BATCH = 100  # images


TORCH_PRUNING, ONNXSIM = "torch-pruning", "onnxsim"


@dataclass(frozen=True)
class Request:
    """What is to be pruned, and how far: by a ratio of channels, or to a share of the MACs.

    Widths are rounded to a `multiple`. With `images`, an .npy file, batch norms are estimated anew. These and
    `macs` are for Torch-Pruning.
    """

    net: str
    out: str
    ratio: float = 0.0
    macs: float = 0.0
    multiple: int = 1
    images: str = ""
    tool: str = TORCH_PRUNING


def attempt(python: str, request: Request) -> Attempt:
    """Run this file in the environment of `python`; without one that is the failure."""
    if not python:
        return Attempt(failure="no --rivals-python")
    return answer([python, __file__, json.dumps(asdict(request))], _PATIENCE)


def made(net: str) -> tuple[nn.Module, tuple[str, ...]]:
    """The module and its inputs as edgewise's exporter takes them."""
    import architectures
    import cifar_resnet

    if net.endswith(".onnx"):
        return cifar_resnet.load(Path(net)), ("input=1x3x32x32",)
    return architectures.zeroed(net, "none", architectures.Plan())


def pruned(module: nn.Module, sample: Tensor, ratio: float, multiple: int) -> nn.Module:
    """A copy of `module` without this share of its channels."""
    import torch_pruning

    small = copy.deepcopy(module)
    pruner = torch_pruning.pruner.BasePruner(
        small,
        sample,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=list(last_layers(small)),
        num_heads=heads_of(small),
        round_to=multiple if multiple > 1 else None,
    )
    pruner.step()
    return small


def last_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers whose outputs are the network's own: they have to stay as they are."""
    import architectures
    from cifar_resnet import Resnet
    from torch import nn

    if isinstance(module, Resnet):
        yield module.linear
        return
    inner = {part for filters in architectures.filters_of(module) for part in filters.modules}
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention):
            inner.update(part.modules())
        if isinstance(part, nn.Linear | nn.Conv2d) and part not in inner:
            yield part


def heads_of(module: nn.Module) -> dict[nn.Module, int]:
    """How many heads an attention has, which no tracing shows."""
    import architectures
    from torch import nn

    torchs = {m: m.num_heads for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
    own = {m.enter: m.heads for m in module.modules() if isinstance(m, architectures.Attention)}
    return {**torchs, **own}


def within(module: nn.Module, sample: Tensor, macs: float, multiple: int) -> nn.Module:
    """What is left at the smallest ratio by which no more than this share of the MACs stays."""
    import torch_pruning

    low, high = 0.0, 1.0
    bound, best = macs * torch_pruning.utils.count_ops_and_params(module, sample)[0], None
    for _ in range(_STEPS):
        ratio = (low + high) / 2
        small = pruned(module, sample, ratio, multiple)
        if torch_pruning.utils.count_ops_and_params(small, sample)[0] <= bound:
            high, best = ratio, small
        else:
            low = ratio
    if best is None:
        raise ValueError(f"no ratio gives {macs:.0%} of the MACs")
    return best


def estimate_norms(module: nn.Module, images: Tensor) -> None:
    """Mean and variance of every batch norm over all images, by the forward passes of training alone."""
    import torch
    from torch import nn

    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None  # the mean over all batches
    module.train()
    with torch.no_grad():
        for batch in images.split(_BATCH):
            module(batch)
    module.eval()


def by_torch_pruning(request: Request) -> float:
    """Prune a module and write it; the seconds of pruning."""
    import numpy as np
    import torch

    from edgewise.optimizer import files
    from edgewise.optimizer.torch_export import to_model

    torch.set_num_threads(1)
    module, inputs = made(request.net)
    shape = [int(size) for size in inputs[0].partition("=")[2].split("x")]
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    if request.macs:
        small = within(module, sample, request.macs, request.multiple)
    else:
        small = pruned(module, sample, request.ratio, request.multiple)
    if request.images:
        estimate_norms(small, torch.from_numpy(np.load(request.images)))
    seconds = time.perf_counter() - start
    files.save(to_model(small, inputs), Path(request.out), force=True)
    return seconds


def by_onnxsim(request: Request) -> float:
    """Prune a file; the seconds that simplifying and pruning it took."""
    import onnx
    import onnxsim

    model = onnx.load(request.net)
    start = time.perf_counter()
    simple, _ = onnxsim.simplify(model)
    small = onnxsim.apply_structured_pruning(simple, sparsity=request.ratio)
    seconds = time.perf_counter() - start
    onnx.save(small, request.out)
    return seconds


def main() -> None:
    request = Request(**json.loads(sys.argv[1]))
    tool = {TORCH_PRUNING: by_torch_pruning, ONNXSIM: by_onnxsim}[request.tool]
    found = {"seconds": tool(request), "version": importlib.metadata.version(request.tool)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
