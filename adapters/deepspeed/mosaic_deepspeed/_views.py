"""Views of parameters, gradients and master weights: one for each optimizer an engine may have.

Facts about DeepSpeed 0.19 that shape it: its ``safe_get_full_*`` functions return the wrong order
with ``round_robin_gradients`` and its ``safe_set_full_*`` fail on ZeRO-3 where a parameter does not
divide by the number of ranks, so the layout is read from the optimizers themselves; between
``engine.backward`` and ``engine.step`` reduced gradients are lists of tensors that tile the
partition of this rank; and master weights reach forward only when they are published.
"""

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from mosaic_core import UnsupportedError
from mosaic_core.parameters import Fragment, Parameters, ReplicatedParameters
from mosaic_deepspeed._view import View

__all__ = ["view_of"]


class _Unfused(View):
    """ZeRO-0 with bfloat16 weights: every rank owns float32 copies of all parameters."""

    def _layout(self) -> Iterator[tuple[nn.Parameter, int, int, Tensor, Any]]:
        optimizer = self._optimizer
        for params, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for param, master in zip(params, masters, strict=True):
                yield param, 0, param.numel(), master, None

    def _tile(self, fragment: Fragment) -> Tensor | None:
        return fragment.param.grad

    def all_reduce(self, value: Tensor) -> Tensor:
        """Return the value: no rank owns a part."""
        return value

    def publish(self) -> None:
        for fragment in self._fragments:
            fragment.param.data.copy_(fragment.master)

    def drop_grads(self) -> None:
        self._optimizer.zero_grad()


class _Partitioned(View):
    """ZeRO-1 and ZeRO-2: each rank owns a flat partition of every parameter group."""

    def _layout(self) -> Iterator[tuple[nn.Parameter, int, int, Tensor, Any]]:
        opt = self._optimizer
        for i, masters in enumerate(opt.single_partition_of_fp32_groups):
            low, high = _range(opt.partition_size[i], opt.real_dp_process_group[i])
            tile, end = 0, 0  # the list of gradients has an entry of zeros for every gap
            offsets = zip(
                opt.round_robin_bit16_groups[i], opt.round_robin_bit16_offsets[i], strict=True
            )
            for param, offset in offsets:
                first, last = max(offset, low), min(offset + param.numel(), high)
                if first >= last:
                    continue
                tile += first - low > end
                flat = masters.narrow(0, first - low, last - first)
                yield param, first - offset, last - first, flat, (i, tile)
                tile, end = tile + 1, last - low

    def _tile(self, fragment: Fragment) -> Tensor | None:
        group, index = self._places[fragment.name]
        tiles = self._optimizer.averaged_gradients.get(group)
        return None if tiles is None else tiles[index]

    def publish(self) -> None:
        self._optimizer.update_lp_params()

    def drop_grads(self) -> None:
        opt = self._optimizer
        opt.zero_grad()
        for gradients in (opt.averaged_gradients, opt.all_grad_tensors):
            for group in gradients:  # or the next backward would add to them
                gradients[group] = None


class _BF16(View):
    """ZeRO-1 that accumulates in float32: whole gradients everywhere, partitioned masters."""

    def _layout(self) -> Iterator[tuple[nn.Parameter, int, int, Tensor, Any]]:
        opt = self._optimizer
        for i, masters in enumerate(opt.fp32_groups_flat_partition):
            low, high = _range(masters.numel(), opt.real_dp_process_group[i])
            offset = 0
            for param, whole in zip(opt.bf16_groups[i], opt.fp32_groups_gradients[i], strict=True):
                first, last = max(offset, low), min(offset + param.numel(), high)
                if first < last:
                    flat = masters.narrow(0, first - low, last - first)
                    tile = whole.narrow(0, first - offset, last - first)
                    yield param, first - offset, last - first, flat, tile
                offset += param.numel()

    def _tile(self, fragment: Fragment) -> Tensor | None:
        tile: Tensor = self._places[fragment.name]
        return tile

    def settle(self) -> None:
        """Bring changed gradients to all ranks, each of which takes the norm of all to clip."""
        opt = self._optimizer
        for i, whole in enumerate(opt.fp32_groups_gradients_flat):
            part = opt.fp32_groups_gradient_flat_partition[i].clone()
            torch.distributed.all_gather_into_tensor(whole, part, opt.real_dp_process_group[i])

    def publish(self) -> None:
        self._optimizer.update_lp_params()

    def drop_grads(self) -> None:
        self._optimizer.zero_grad()


class _Stage3(View):
    """ZeRO-3: each rank owns a slice of every parameter, padded where it does not divide."""

    def _layout(self) -> Iterator[tuple[nn.Parameter, int, int, Tensor, Any]]:
        opt = self._optimizer
        for i, group in enumerate(opt.fp16_groups):
            for j, param in enumerate(group):
                _, offset, padded = opt.grad_position[opt.get_param_id(param)]
                start = padded * opt._get_param_partition_rank(param)
                numel = min(padded, param.ds_numel - start)
                if numel > 0:
                    flat = opt.fp32_partitioned_groups_flat[i].narrow(0, offset, numel)
                    yield param, start, numel, flat, (i, j)

    def _tile(self, fragment: Fragment) -> Tensor | None:
        group, index = self._places[fragment.name]
        tiles = self._optimizer.averaged_gradients.get(group)
        return None if tiles is None else tiles[index].view(-1).narrow(0, 0, fragment.numel)

    def publish(self) -> None:
        opt = self._optimizer
        opt._partition_all_parameters()  # what was gathered holds the weights of before
        for group in range(len(opt.fp16_groups)):
            opt._reassign_or_swap_out_partitioned_parameters(group)
        if opt.persistent_parameters:
            opt.persistent_parameters[0].all_gather(opt.persistent_parameters)

    def drop_grads(self) -> None:
        opt = self._optimizer
        opt.zero_grad()  # the next backward overwrites, but only what it reaches
        for tiles in opt.averaged_gradients.values():
            if tiles is not None:
                torch._foreach_zero_(list(tiles))


def _range(size: Any, group: Any) -> tuple[int, int]:
    low = torch.distributed.get_rank(group) * int(size)
    return low, low + int(size)


_VIEWS: dict[type, type[View]] = {
    FP16_UnfusedOptimizer: _Unfused,
    DeepSpeedZeroOptimizer: _Partitioned,
    BF16_Optimizer: _BF16,
    DeepSpeedZeroOptimizer_Stage3: _Stage3,
}


def view_of(engine: Any) -> Parameters:
    """Return the view of an engine's parameters.

    Raises:
        UnsupportedError: If there is none for the kind of its optimizer.
    """
    optimizer = engine.optimizer
    view = _VIEWS.get(type(optimizer))  # strictly: a subclass may shard in another way
    if view is not None:
        return view(engine)  # type: ignore[return-value]  # the subclasses are complete
    if isinstance(optimizer, torch.optim.Optimizer) and optimizer is engine.basic_optimizer:
        return ReplicatedParameters(engine.module)
    raise UnsupportedError(
        f"mosaic: an engine with {type(optimizer).__name__} is not supported; supported are a torch"
        " optimizer (ZeRO-0, float32), "
        + ", ".join(sorted(kind.__name__ for kind in _VIEWS))
        + ": ZeRO 0 to 3 with float32 or bfloat16 weights and no offload"
    )
