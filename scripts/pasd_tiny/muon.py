"""Muon (Jordan et al. 2024): momentum whose update is orthogonalised, so that no direction of a weight starves.

A decoder that enlarges by repetition has to learn deconvolutions, which are badly conditioned: with AdamW alone it
takes several times as many steps. Updates are scaled to AdamW's size (Liu et al. 2025, arXiv:2502.16982).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_UPDATE_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for weights of two or more dimensions.

    Args:
        parameters: Weights; convolutions are seen as matrices (out, in · height · width).
        lr: Learning rate, of AdamW's magnitude.
        momentum: Decay of the momentum.
        weight_decay: Decay of the weights per step, times `lr`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient; equal shapes are orthogonalised together."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in by_shape.items():
                momenta = torch.stack([self._momentum(parameter, group["momentum"]) for parameter in parameters])
                matrices = orthogonalise(momenta.flatten(2))
                rate = group["lr"] * _UPDATE_RMS * max(matrices.shape[1:]) ** 0.5
                for parameter, matrix in zip(parameters, matrices, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(matrix.view(shape), alpha=rate)

    def _momentum(self, parameter: nn.Parameter, decay: float) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None  # filtered by the caller
        momentum: Tensor = state.setdefault("momentum", torch.zeros_like(gradient))
        momentum.lerp_(gradient, 1 - decay)
        return gradient.lerp(momentum, decay)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearly orthogonal factor of each matrix of a batch (N, rows, columns), by five Newton-Schulz iterations."""
    if matrices.shape[1] > matrices.shape[2]:
        transposed: Tensor = orthogonalise(matrices.mT).mT
        return transposed
    a, b, c = _NEWTON_SCHULZ
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    orthogonal: Tensor = x
    return orthogonal
