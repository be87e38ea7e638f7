"""Our functions beside those of other libraries that do the same, timed in turns.

Every function does what a training step asks of it: mixing takes and returns inputs and labels, a
loss is computed forward and backward, gradients and averages are those of a ResNet-50. Libraries
that are not installed are left out.
"""

import contextlib
import copy
import datetime
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic_core import functional
from mosaic_core.mixture import Mixture
from mosaic_core.target import MixedTarget

__all__ = ["OURS", "SHAPES", "Arm", "Kernel", "kernels", "measure", "to_json"]

OURS = "mosaic"
SHAPES = ((128, 3, 224, 224), (512, 3, 32, 32))
_CLASSES = 1000
_BLOCK = 0.05  # seconds, at least one call; short, so that the arms see the same machine


@dataclass(frozen=True)
class Kernel:
    """One task, and who does it.

    Attributes:
        name: Task.
        on: What it is done on, such as a shape.
        functions: Functions without arguments by library, ours first.
    """

    name: str
    on: str
    functions: Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Arm:
    """How long one library takes for a task.

    Attributes:
        library: Its name.
        call: Median time of a call, in microseconds.
        ratio: Median over the blocks of our time by its time: below 1 where ours is faster.
        spread: First and third quartile of the same.
    """

    library: str
    call: float
    ratio: float
    spread: tuple[float, float]


def measure(kernel: Kernel, blocks: int = 21) -> list[Arm]:
    """Time the functions of a kernel in alternating blocks.

    Args:
        kernel: The kernel.
        blocks: Number of blocks for each function, at least 2.

    Returns:
        The arms in the order of the functions.
    """
    calls: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in kernel.functions}
    for name, function in kernel.functions.items():
        function()  # what only the first call pays for
        calls[name] = max(1, int(_BLOCK / _seconds(function, 1)))
    names = list(kernel.functions)
    for block in range(blocks):
        # Back and forth, so that a drift of the machine cancels.
        for name in names if block % 2 == 0 else reversed(names):
            times[name].append(_seconds(kernel.functions[name], calls[name]))
    arms = []
    for name in names:
        ratios = [ours / its for ours, its in zip(times[OURS], times[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        arms.append(Arm(name, 1e6 * statistics.median(times[name]), middle, (low, high)))
    return arms


def to_json(results: Iterable[tuple[Kernel, list[Arm]]]) -> str:
    """Return the figures with the environment they were measured in."""
    libraries = ("torch", "torchvision", "timm", "kornia")
    versions = {name: _version(name) for name in libraries}
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    environment = {
        "date": datetime.date.today().isoformat(),
        "machine": on or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version},
    }
    rows = [
        {"task": kernel.name, "on": kernel.on, **asdict(arm)}
        for kernel, arms in results
        for arm in arms
    ]
    return json.dumps({"environment": environment, "kernels": rows}, indent=1) + "\n"


def _version(distribution: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


def _seconds(function: Callable[[], Any], calls: int) -> float:
    _synchronise()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronise()
    return (time.perf_counter() - begin) / calls


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kernels(peers: Mapping[str, Callable[..., dict[str, Any]]] | None = None) -> Iterator[Kernel]:
    """Yield all kernels for the libraries that are installed.

    Args:
        peers: By title of an adapter, its function ``peers(task, *arguments)``, which returns the
            trainer's own function for a task, or None.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for shape in SHAPES:
        x = torch.randn(shape, device=device)
        y = torch.randint(_CLASSES, (shape[0],), device=device)
        text = "x".join(map(str, shape))
        for name, make in (("MixUp", _mixup), ("CutMix", _cutmix), ("CutOut", _cutout)):
            yield _with_peers(Kernel(name, text, make(x, y)), peers, x, y)
    logits = torch.randn(512, _CLASSES, device=device, requires_grad=True)
    y = torch.randint(_CLASSES, (512,), device=device)
    kernel = Kernel("LabelSmoothing", f"512x{_CLASSES} logits", _smoothing(logits, y))
    yield _with_peers(kernel, peers, logits, y)
    x = torch.randn(32, 64, 56, 56, device=device)
    yield Kernel("BlurPool", "32x64x56x56", _blurpool(x))
    vision = _installed("torchvision")
    if vision is not None:
        model = vision.models.resnet50().to(device)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        yield Kernel("adaptive clipping", "ResNet-50", _clipping(model))
        yield Kernel("EMA", "ResNet-50", _ema(model))


def _with_peers(kernel: Kernel, peers: Any, *arguments: Any) -> Kernel:
    found = {title: peer(kernel.name, *arguments) for title, peer in (peers or {}).items()}
    more = {title: function for title, function in found.items() if function is not None}
    return Kernel(kernel.name, kernel.on, {**kernel.functions, **more})


def _installed(name: str) -> Any:
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None


def _mixup(x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {OURS: lambda: functional.mixup_batch(x, y)}
    if v2 := _installed("torchvision.transforms.v2"):
        mix = v2.MixUp(alpha=0.2, num_classes=_CLASSES)
        found["torchvision"] = lambda: mix(x, y)
    if timm := _installed("timm.data"):
        timm_mix = timm.Mixup(mixup_alpha=0.2, num_classes=_CLASSES, label_smoothing=0.0)
        copied = x.clone()  # it writes into its input
        found["timm"] = lambda: timm_mix(copied, y)
    if kornia := _installed("kornia.augmentation"):
        kornia_mix = kornia.RandomMixUpV2(p=1.0, data_keys=["input", "class"])
        found["kornia"] = lambda: kornia_mix(x, y)
    return found


def _cutmix(x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    copied = x.clone()  # ours and that of timm write into their input
    found: dict[str, Callable[[], Any]] = {OURS: lambda: functional.cutmix_batch(copied, y)}
    if v2 := _installed("torchvision.transforms.v2"):
        mix = v2.CutMix(alpha=1.0, num_classes=_CLASSES)
        found["torchvision"] = lambda: mix(x, y)
    if timm := _installed("timm.data"):
        timm_mix = timm.Mixup(0.0, cutmix_alpha=1.0, num_classes=_CLASSES, label_smoothing=0.0)
        found["timm"] = lambda: timm_mix(copied, y)
    if kornia := _installed("kornia.augmentation"):
        kornia_mix = kornia.RandomCutMixV2(p=1.0, data_keys=["input", "class"])
        found["kornia"] = lambda: kornia_mix(x, y)
    return found


def _cutout(x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {OURS: lambda: functional.cutout_batch(x)}
    area = (0.25, 0.2500001)
    if v2 := _installed("torchvision.transforms.v2"):
        erase = v2.RandomErasing(p=1.0, scale=area, ratio=(1.0, 1.0000001))
        found["torchvision"] = lambda: erase(x)
    if kornia := _installed("kornia.augmentation"):
        kornia_erase = kornia.RandomErasing(p=1.0, scale=area, ratio=(1.0, 1.0), same_on_batch=True)
        found["kornia"] = lambda: kornia_erase(x)
    return found


def _smoothing(logits: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    # All compute the same value here. An ignored label, such as -100, is left out by torch's and so
    # by ours, an error for timm's, and smoothed all the same by a trainer's, which saves a mask.
    def backward(loss: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), logits)

    def ours() -> Tensor:
        return F.cross_entropy(logits, MixedTarget.of(Mixture.of(y).smooth(0.1)))

    found = {
        OURS: backward(ours),
        "torch": backward(lambda: F.cross_entropy(logits, y, label_smoothing=0.1)),
    }
    if timm := _installed("timm.loss"):
        loss = timm.LabelSmoothingCrossEntropy(0.1)
        found["timm"] = backward(lambda: loss(logits, y))
    return found


def _blurpool(x: Tensor) -> dict[str, Callable[[], Any]]:
    row = torch.tensor([1.0, 2.0, 1.0], device=x.device)
    kernel = (torch.outer(row, row) / 16).view(1, 1, 3, 3)
    found: dict[str, Callable[[], Any]] = {OURS: lambda: functional.blur_pool2d(x, kernel, 2)}
    if timm := _installed("timm.layers"):
        layer = timm.BlurPool2d(x.shape[1], filt_size=3, stride=2).to(x.device)
        found["timm"] = lambda: layer(x)
    if kornia := _installed("kornia.filters"):
        found["kornia"] = lambda: kornia.blur_pool2d(x, 3, 2)
    return found


def _clipping(model: nn.Module) -> dict[str, Callable[[], Any]]:
    parameters = list(model.parameters())
    found: dict[str, Callable[[], Any]] = {
        OURS: lambda: functional.apply_gradient_clipping(model, "adaptive", 0.01)
    }
    if timm := _installed("timm.utils.agc"):
        found["timm"] = lambda: timm.adaptive_clip_grad(parameters, 0.01)
    return found


def _ema(model: nn.Module) -> dict[str, Callable[[], Any]]:
    average = copy.deepcopy(model)
    swa_utils = torch.optim.swa_utils
    averaged = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.99), use_buffers=False
    )
    averaged.n_averaged.fill_(1)  # the first update is a copy
    found: dict[str, Callable[[], Any]] = {
        OURS: lambda: functional.compute_ema(model, average, 0.99),
        "torch": lambda: averaged.update_parameters(model),
    }
    if timm := _installed("timm.utils"):
        ema = timm.ModelEmaV3(model, decay=0.99)
        found["timm"] = lambda: ema.update(model)
    return found
