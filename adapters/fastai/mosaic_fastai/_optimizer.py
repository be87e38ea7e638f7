"""The Learner's optimizer: what of it a run sees, and how it takes over new parameters."""

from collections import defaultdict
from collections.abc import Collection
from typing import Any, cast

from fastai.callback.training import GradientAccumulation
from fastai.optimizer import OptimWrapper
from fastai.torch_core import L, get_model, norm_bias_params
from torch import Tensor
from torch.optim import Optimizer

from mosaic_core import UnsupportedError
from mosaic_core.adoption import NewParameters

__all__ = ["adopt", "bare", "steps_per_epoch"]


def bare(opt: Any) -> Optimizer:
    """Return the torch optimizer inside an OptimWrapper, or fastai's own as it is.

    fastai's own class is no torch optimizer. A run hands it only to algorithms that change
    optimizers, which are refused beside it.
    """
    return cast(Optimizer, opt.opt if isinstance(opt, OptimWrapper) else opt)


def steps_per_epoch(learn: Any) -> float | None:
    """Return the optimizer steps of an epoch, None where the loader does not tell.

    GradientAccumulation counts examples, and its windows go on over the end of an epoch.
    """
    loader = learn.dls.train
    try:
        batches = len(loader)
    except TypeError:
        return None
    accumulation = learn._grab_cbs(GradientAccumulation)
    if not accumulation:
        return batches
    size = getattr(loader, "bs", None) or getattr(loader, "batch_size", None)
    return batches / -(-accumulation[0].n_acc // size) if size else None


def adopt(learn: Any, made: Collection[Tensor], joining: NewParameters) -> None:
    """Let an optimizer that exists already take over the parameters that surgery made.

    They join the group in which the Learner's splitter puts them, and hyper-parameters and the
    state of all others stay.

    Args:
        learn: The Learner, whose model was changed.
        made: The parameters that the model did not have before.
        joining: Where they belong; those of frozen ones are frozen, and may be unfrozen as these.

    Raises:
        UnsupportedError: If the splitter groups the others not as the optimizer does.
    """
    opt, model = learn.opt, get_model(learn.model)
    if opt is None:
        return
    alive, lists = list(model.parameters()), [set(group) for group in opt.param_lists]
    known = set().union(*lists)
    heirs = joining.heirs(known)
    new = {p for p in made if p.requires_grad or p in heirs} - known
    if not new and known <= set(alive):
        return
    frozen = [p for p in alive if not p.requires_grad]
    for p in frozen:  # the default splitter leaves them out
        p.requires_grad_(True)
    groups = L(learn.splitter(model))
    for p in frozen:
        p.requires_grad_(False)
    if not isinstance(groups[0], L | list):
        groups = [groups]
    groups = [[p for p in group if p in known | new] for group in groups]
    kept = [set(group) - new for group in groups]
    if kept != [group.intersection(alive) for group in lists]:
        raise UnsupportedError(
            "mosaic: the recipe changes the model's parameters, and the splitter groups them not as"
            " the optimizer that exists already; give MosaicCallback to Learner(cbs=...) and let"
            " the Learner make the optimizer by opt_func"
        )
    opt.param_lists = type(opt.param_lists)(type(opt.param_lists[0])(g) for g in groups)
    if not isinstance(opt.state, defaultdict):  # a plain dict after load_state_dict
        opt.state = defaultdict(dict, opt.state)
    for flag, wanted, with_bias in (
        ("do_wd", not learn.wd_bn_bias, True),
        ("force_train", learn.train_bn, False),
    ):
        for p in norm_bias_params(model, with_bias) if wanted else ():
            if p in new:
                opt.state[p][flag] = flag == "force_train"
    for group in groups[: opt.frozen_idx]:
        for p in new.intersection(group):
            p.requires_grad_(opt.state[p].get("force_train", False))
