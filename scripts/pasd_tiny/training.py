"""What every training stage needs: a time budget, a cosine schedule over it, averaged weights, checkpoints."""

import sys
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pasd_tiny.muon import Muon

CHECKPOINTS = Path("build/train_pasd_tiny")
_SAVE_EVERY_SECONDS = 60.0


class Trainer:
    """Runs one stage: Muon, AdamW for vectors, cosine decay over a time budget, averaged weights, atomic checkpoints.

    Time, not steps, is the budget: the same command gives the best model that the machine can reach in it. A stopped
    run goes on where its last checkpoint was. Started by `torchrun`, several processes train on different crops and
    average their gradients; only the first one writes.

    Args:
        name: Name of the stage and of its checkpoint.
        modules: What is trained and averaged; the keys name them in the checkpoint.
        generator: Source of randomness, restored with the checkpoint.
        minutes: Budget, earlier runs included.
        learning_rate: Peak learning rate.
        average: Decay of the averaged weights per step.
    """

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        generator: torch.Generator,
        minutes: float,
        learning_rate: float,
        average: float = 0.999,
    ) -> None:
        self.name, self.modules, self.generator = (
            name,
            nn.ModuleDict(modules),
            generator,
        )
        self.seconds, self.learning_rate, self.average = (
            60 * minutes,
            learning_rate,
            average,
        )
        self.averaged = deepcopy(self.modules).requires_grad_(False)
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        matrices = [p for p in self.parameters if p.ndim > 1]
        vectors = [p for p in self.parameters if p.ndim < 2]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            Muon(matrices, lr=learning_rate),
            torch.optim.AdamW(vectors, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-2),
        )
        self.step, self.spent = 0, 0.0
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        if (path := checkpoint_path(name)).exists():
            self._restore(path)
        if self.rank:
            generator.manual_seed(generator.initial_seed() + 1000 * self.rank + self.step)

    def run(self, loss: Callable[[int], Tensor]) -> None:
        """Minimise `loss(step)` until the budget is spent, saving every minute and at the end."""
        started, saved, shown = time.monotonic() - self.spent, time.monotonic(), 0.0
        while self.spent < self.seconds:
            value = self._update(loss(self.step))
            shown = value if not shown else 0.98 * shown + 0.02 * value
            self.step, self.spent = self.step + 1, _agreed(time.monotonic() - started)
            if self.step % 50 == 0 and not self.rank:
                line = f"{self.name}: step {self.step}, {self.spent:.0f} of {self.seconds:.0f} s, loss {shown:.5f}"
                print(line, file=sys.stderr, flush=True)
            if time.monotonic() - saved > _SAVE_EVERY_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def save(self) -> None:
        """Write the checkpoint under a temporary name and rename it."""
        if self.rank:
            return
        path = checkpoint_path(self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "modules": self.modules.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "step": self.step,
            "spent": self.spent,
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def _restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.modules.load_state_dict(state["modules"])
        self.averaged.load_state_dict(state["averaged"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.generator.set_state(state["generator"])
        self.step, self.spent = state["step"], state["spent"]

    def _update(self, loss: Tensor) -> float:
        progress = min(self.spent / self.seconds, 1.0)
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
        rate = self.learning_rate * min(1.0, (self.step + 1) / 100) * (0.02 + 0.98 * cosine)
        loss.backward()  # type: ignore[no-untyped-call]
        _average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.average, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for mean, parameter in zip(self.averaged.parameters(), self.modules.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
        return float(loss.detach())


def _agreed(value: float) -> float:
    """The first process's value, so that all of them stop at the same step."""
    if not distributed.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    distributed.broadcast(shared, 0)
    return float(shared)


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    if not distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = parameters_to_vector(gradients)
    distributed.all_reduce(flat)
    vector_to_parameters(flat / distributed.get_world_size(), gradients)


def checkpoint_path(name: str) -> Path:
    """Where a stage keeps its checkpoint."""
    return CHECKPOINTS / f"{name}.pt"


def averaged_weights(name: str) -> dict[str, Tensor]:
    """The averaged weights of a stage, keyed `module.parameter`."""
    path = checkpoint_path(name)
    if not path.exists():
        raise SystemExit(f"{path} does not exist. hint: run --stage {name} first.")
    averaged: dict[str, Tensor] = torch.load(path, weights_only=True)["averaged"]
    return averaged


def part(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of one module, without its name."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): weight for key, weight in weights.items() if key.startswith(prefix)}
