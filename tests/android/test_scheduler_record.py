"""A bundle carries all that a loop on the device needs to know of the sampler."""

import json
from pathlib import Path

import torch
from bundle_request import BundleRequest

from sdconvert.adapters.schedulers import SchedulerSpec, replay
from sdconvert.android.run import scheduler_record
from sdconvert.assets import asset_path
from sdconvert.pipelines.loading import load_scheduler


def test_the_table_of_the_embedded_model_samples_from_the_bundle_alone(asked: BundleRequest, tmp_path: Path) -> None:
    scheduler = load_scheduler(asset_path("pasd_tiny"))
    bundle = asked.write(tmp_path / "bundle", scheduler=scheduler_record(scheduler, 4))
    record = json.loads((bundle / "manifest.json").read_text())["scheduler"]
    spec = SchedulerSpec.from_json(json.dumps(record["table"]))
    assert (record["class"], record["timesteps"]) == (type(scheduler).__name__, list(spec.timesteps))

    latents = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    found = replay(spec, lambda sample, timestep: torch.tanh(sample) * (timestep / 1000), latents)
    scheduler.set_timesteps(4)
    for timestep in scheduler.timesteps:
        output = torch.tanh(latents) * (timestep / 1000)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(found, latents, rtol=0, atol=1e-5)
