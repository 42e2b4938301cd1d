"""What a checkpoint of a model in training holds, and how training goes on from it, bit for bit on a CPU."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from brainage_nb.models.settings import refuse_difference

if TYPE_CHECKING:
    from brainage_nb.models.fitting.member_fit import MemberFit


def state_of(fit: MemberFit) -> dict[str, Any]:
    """All that decides what comes after this very step: plain tensors, numbers and text."""
    scaler = fit.accelerator.scaler
    cuda = fit.accelerator.device.type == "cuda"
    return {
        "identity": json.dumps(fit.identity),
        "model": fit.network.state_dict(),
        "average": fit.average.model.state_dict(),
        "optimiser": fit.optimiser.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else {},
        "epoch": fit.epoch,
        "position": fit.position,
        "step": fit.step,
        "seconds": fit.seconds,
        "history": fit.history,
        "best": fit.best,
        "sums": fit.sums,
        "micro_batch": fit.stepper.micro_batch,
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state() if cuda else None,
    }


def restore(fit: MemberFit, state: dict[str, Any]) -> None:
    """Put a training where `state_of` found one; `SettingsDiffer` where it is another run's."""
    refuse_difference(json.loads(state["identity"]), fit.identity, fit.folder)
    fit.network.load_state_dict(state["model"])
    fit.average.model.load_state_dict(state["average"])
    fit.optimiser.load_state_dict(state["optimiser"])
    if fit.accelerator.scaler is not None and state["scaler"]:
        fit.accelerator.scaler.load_state_dict(state["scaler"])
    fit.epoch, fit.position, fit.step = state["epoch"], state["position"], state["step"]
    fit.seconds, fit.history, fit.best = state["seconds"], state["history"], state["best"]
    fit.sums.copy_(state["sums"])
    fit.stepper.micro_batch = state["micro_batch"]
    torch.set_rng_state(state["random"])
    if fit.accelerator.device.type == "cuda" and state["random_cuda"] is not None:
        torch.cuda.set_rng_state(state["random_cuda"])
