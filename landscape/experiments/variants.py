"""What a column of a map is: an algorithm, its order, its noise; and the calibrated noise of its replicas."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from landscape.checkpoints.format import RUN_FILE
from landscape.experiments.calibrate import Kind, calibrate_shapes
from landscape.experiments.profiles import load_profile, save_profile
from landscape.experiments.train import train
from landscape.tasks import Task
from landscape.training.config import TrainConfig
from landscape.training.noise import PLACES, SHAPES, NoiseDrift, NoisePlace, NoiseProfile, NoiseShape


@dataclass(frozen=True)
class Variant:
    """One column of a map.

    Attributes:
        algorithm: "ssgd", "ssgd-star" or "dpsgd".
        order: DPSGD's order.
        sigma0: SSGD*'s noise level; "matched" to the sigma_w(t) that DPSGD (AWC) recorded at the same rate and seed; or "calibrated" on
            the checkpoints of DPSGD (of the order above) at the same rate and seed, as the following say.
        noise_place: where calibrated noise stands; see `landscape.training.noise`.
        noise_shape: what it keeps.
        noise_drift: what becomes of the landscape noise's mean.
        noise_every: steps between its refreshes, and between the checkpoints of the DPSGD runs.
        noise_zero_sum: whether noises on the weights sum to zero over the learners.
    """

    algorithm: Literal["ssgd", "ssgd-star", "dpsgd"]
    order: Literal["awc", "atc", "cta"] = "awc"
    sigma0: float | Literal["matched", "calibrated"] = 0.0
    noise_place: NoisePlace = "weights"
    noise_shape: NoiseShape = "isotropic"
    noise_drift: NoiseDrift = "as-noise"
    noise_every: int = 10
    noise_zero_sum: bool = False

    @property
    def name(self) -> str:
        """As on figures: ssgd, ssgd-star-matched, ssgd-star-0.01, ssgd-star-gradient-low-rank, dpsgd, dpsgd-atc."""
        if self.algorithm == "ssgd-star":
            if self.sigma0 != "calibrated":
                kind = self.sigma0 if isinstance(self.sigma0, str) else f"{self.sigma0:g}"
            else:
                drift = "" if self.noise_drift == "as-noise" else f"-drift-{self.noise_drift}"
                shape = "" if self.noise_drift == "alone" else f"-{self.noise_shape}"
                kind = f"{self.noise_place}{shape}{drift}{'' if self.order == 'awc' else f'-{self.order}'}"
            return f"ssgd-star-{kind}{'-zero-sum' if self.noise_zero_sum else ''}"
        return self.algorithm if self.algorithm == "ssgd" or self.order == "awc" else f"{self.algorithm}-{self.order}"


def variant_named(name: str) -> Variant:
    """The variant of a name: "dpsgd-atc", "ssgd-star" with matched noise, "ssgd-star-gradient-low-rank" with calibrated noise."""
    if name == "ssgd-star":
        return Variant("ssgd-star", sigma0="matched")
    if name.startswith("ssgd-star-"):
        place, _, shape = name.removeprefix("ssgd-star-").partition("-")
        if place not in PLACES or shape not in SHAPES:
            raise ValueError(f"no such variant: {name}; noise is on the {' or '.join(PLACES)}, and {', '.join(SHAPES)}")
        return Variant("ssgd-star", sigma0="calibrated", noise_place=place, noise_shape=shape)  # type: ignore[arg-type]
    algorithm, _, order = name.partition("-")
    return Variant(algorithm, order or "awc")  # type: ignore[arg-type]


def replica_config(config: TrainConfig, variant: Variant, rate: float, seed: int) -> TrainConfig:
    """The configuration of one replica."""
    noise: dict[str, Any] = {
        "sigma0": variant.sigma0 if isinstance(variant.sigma0, float | int) else 0.0,
        "noise_place": "weights", "noise_shape": "isotropic", "noise_drift": "as-noise", "noise_every": 0,
    }  # fmt: skip
    if variant.sigma0 == "calibrated":
        noise = {"sigma0": "calibrated", **{name: getattr(variant, name) for name in noise if name != "sigma0"}}
    return replace(
        config, learning_rate=rate, seed=seed, algorithm=variant.algorithm, order=variant.order, noise_zero_sum=variant.noise_zero_sum,
        **noise,
    )  # fmt: skip


def calibrated_profile(
    task: Task, config: TrainConfig, variant: Variant, variants: Sequence[Variant], rate: float, seed: int, out: Path,
    data_root: str | Path | None, fingerprint: str,
) -> NoiseProfile:  # fmt: skip
    """Calibrated noise for a replica: kept from before, or measured on a DPSGD run with checkpoints, recorded where it is missing.

    What the map's other variants need from the same run and place is measured along.
    """
    like = Variant("dpsgd", variant.order)
    source = replace(replica_config(config, like, rate, seed), checkpoint_every=variant.noise_every)
    path = out / "runs" / f"{like.name}-a{rate:g}-s{seed}-{replica_key(task, source, like, fingerprint)}"

    def kept(kind: Kind) -> Path:
        return out / "noise" / f"{path.name}-{variant.noise_place}-{'-'.join(kind)}.safetensors"

    own: Kind = (variant.noise_shape, variant.noise_drift)
    if not kept(own).exists():
        shared = (variant.order, variant.noise_place, variant.noise_every)
        kinds = [
            (v.noise_shape, v.noise_drift)
            for v in variants
            if v.sigma0 == "calibrated" and (v.order, v.noise_place, v.noise_every) == shared
        ]
        missing = [kind for kind in dict.fromkeys([own, *kinds]) if not kept(kind).exists()]
        resume = (path / RUN_FILE).exists()
        run = train(task, source, path, data_root=data_root, resume=resume, quiet=True)
        (out / "noise").mkdir(parents=True, exist_ok=True)
        for kind, profile in calibrate_shapes(
            run,
            variant.noise_place,
            missing,
            every=variant.noise_every,
            device=config.device,
            data_root=data_root,
            task=task,
        ).items():
            save_profile(profile, kept(kind))
    return load_profile(kept(own))


FIRST_FIELDS = frozenset({
    "algorithm", "learning_rate", "num_learners", "local_batch_size", "num_steps", "topology", "order", "momentum", "dampening", "nesterov",
    "weight_decay", "schedule", "sigma0", "gamma", "checkpoint_every", "log_every", "seed", "dtype", "tf32",
})  # fmt: skip
"""Fields that a configuration had when parts of maps were first kept."""


def replica_key(task: Task, config: TrainConfig, variant: Variant, fingerprint: str) -> str:
    """Names a replica by everything that decides its numbers; a later field at its default does not, so that older parts are found."""
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    told = {
        k: v
        for k, v in config.to_json().items()
        if k not in ("device", "batching") and (k in FIRST_FIELDS or v != defaults[k])
    }
    identity = [task.name, told, variant.name, fingerprint]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
