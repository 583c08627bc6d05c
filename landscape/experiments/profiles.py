"""Noise profiles on disk, and the one that a configuration of SSGD* asks for."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from landscape import streams
from landscape.checkpoints import CheckpointError, Learners, Run, open_run
from landscape.checkpoints.format import RUN_FILE, write_atomically
from landscape.experiments.calibrate import calibrate_noise
from landscape.experiments.run_directory import NOISE_FILE
from landscape.noise.draws import Points
from landscape.tasks import Task
from landscape.training.config import TrainConfig
from landscape.training.loop import sum_to_zero
from landscape.training.noise import NoiseProfile


def save_profile(profile: NoiseProfile, path: str | Path) -> None:
    """Keep a profile as safetensors, whole or not at all; `--sigma0 PATH` uses it."""
    tensors = {"factors": profile.factors, "steps": torch.tensor(profile.steps), "layers": torch.tensor(profile.layers)}
    tensors |= {} if profile.drift is None else {"drift": profile.drift}
    names = {"place": profile.place, "shape": profile.shape, "drift_mode": profile.drift_mode}
    metadata = {"format": "landscape-noise", **names, "facts": json.dumps(dict(profile.facts))}
    content = safetensors.torch.save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, metadata)
    write_atomically(Path(path), content)


def load_profile(path: str | Path) -> NoiseProfile:
    """A profile that `save_profile` wrote."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: there is no noise profile")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            told = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None
    if told.get("format") != "landscape-noise":
        raise CheckpointError(f"{path} holds no noise profile")
    return NoiseProfile(
        steps=tuple(tensors["steps"].tolist()), place=told["place"], shape=told["shape"], factors=tensors["factors"],
        layers=tuple(tensors["layers"].tolist()), drift=tensors.get("drift"), drift_mode=told["drift_mode"],
        facts=json.loads(told["facts"]),
    )  # fmt: skip


def profile_for(config: TrainConfig, *, task: Task | None = None, data_root: str | Path | None = None) -> NoiseProfile:
    """The profile that an SSGD* configuration asks for: read from its file, or calibrated on its run.

    Raises:
        ValueError: if `sigma0` names neither, or a profile of another kind than the configuration says.
    """
    named = Path(str(config.sigma0))
    place, shape, drift = config.noise_place, config.noise_shape, config.noise_drift
    if (named / RUN_FILE).is_file():
        own = task if task is not None and open_run(named).task == task.name else None
        return calibrate_noise(
            named, place=place, shape=shape, drift=drift, every=config.noise_every or None, data_root=data_root, task=own,
            device=config.device,
        )  # fmt: skip
    if not named.is_file():
        raise ValueError(f"{named} is neither a run nor a noise profile, so SSGD*'s noise cannot be matched to it")
    profile = load_profile(named)
    for flag, wanted, held in (
        ("place", place, profile.place),
        ("shape", shape, profile.shape),
        ("drift", drift, profile.drift_mode),
    ):
        if wanted != held:
            raise ValueError(
                f"{named} is a profile with noise {flag} {held}, not {wanted}; say so with --noise-{flag} {held}"
            )
    if config.noise_every:
        raise ValueError(f"{named} is a profile with refreshes of its own; leave --noise-every out")
    return profile


def stored_profile(run: Run) -> NoiseProfile | None:
    """The profile of the matched noise that an SSGD* run was trained with, or None."""
    return load_profile(run.path / NOISE_FILE) if run.config.is_calibrated else None


def matched_points(run: Run, learners: Learners, profile: NoiseProfile, seed: int = 0) -> Points:
    """Where an SSGD* run with a profile takes the gradients of the step after a checkpoint, its noise drawn anew for every draw.

    Args:
        run: the SSGD* run.
        learners: of one of its checkpoints.
        profile: of `stored_profile`.
        seed: of the noise; other streams than training's.
    """
    if profile.place != "weights":
        return learners.weights
    held = profile.to("cpu", learners.weights.dtype)

    def points(draw: int) -> Tensor:
        generators = [
            streams.torch_generator("measured weight noise", seed, learners.step, draw, j) for j in range(len(learners))
        ]
        noise = torch.stack([held.sample(learners.step, g) for g in generators])
        return learners.weights + (sum_to_zero(noise, len(learners)) if run.config.noise_zero_sum else noise)

    return points
