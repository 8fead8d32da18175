"""Samplers as tables that a device replays: one file per scheduler, named as diffusers names its file."""

from sdconvert.adapters.schedulers import (
    scheduling_ddim,
    scheduling_dpmsolver_multistep,
    scheduling_euler_discrete,
    scheduling_pndm,
    scheduling_unipc_multistep,
)
from sdconvert.adapters.schedulers.base import (
    SchedulerAdapter,
    SchedulerRegistry,
    noisings_of,
    require_expressible,
    scheduler_spec,
)
from sdconvert.adapters.schedulers.spec import Noising, Replay, SchedulerSpec, SchedulerStep, replay, start_from

__all__ = [
    "Noising",
    "Replay",
    "SchedulerAdapter",
    "SchedulerRegistry",
    "SchedulerSpec",
    "SchedulerStep",
    "noisings_of",
    "replay",
    "require_expressible",
    "scheduler_spec",
    "start_from",
]

# Importing a scheduler's file registers it; naming the modules keeps the imports from looking unused.
SCHEDULERS = (
    scheduling_ddim,
    scheduling_dpmsolver_multistep,
    scheduling_euler_discrete,
    scheduling_pndm,
    scheduling_unipc_multistep,
)
