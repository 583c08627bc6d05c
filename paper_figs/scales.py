"""How large the runs behind the figures are. The data kept with the code are of the laptop scale; the others were not run here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from landscape.experiments.reproduce import PresetName
from landscape.training.noise import NoisePlace, NoiseShape

ScaleName = Literal["laptop", "gpu", "cluster"]


@dataclass(frozen=True)
class Scale:
    """What is run.

    Attributes:
        name: of the scale.
        words: for captions.
        preset: of `landscape reproduce`.
        num_seeds: of its map; None for the preset's.
        task: what is trained.
        device: where.
        spectrum_steps: further checkpoints at which the top of the Hessian's spectrum is measured.
        rescue_rate: learning rate of the counterfactual; None for that of the recorded runs. 1.2 was chosen on seeds 0 to 5.
        rescue_seeds: its seeds, none of which chose a rate.
        rescue_places: where the calibrated noise is added.
        rescue_shapes: what the calibrated noise keeps of DPSGD's.
        rescue_drifts: whether noise with the drift, and the drift alone, are tried beside.
        noise_every: steps between refreshes of the calibrated noise.
    """

    name: ScaleName
    words: str
    preset: PresetName
    num_seeds: int | None
    task: str
    device: str
    spectrum_steps: tuple[int, ...]
    rescue_rate: float | None
    rescue_seeds: tuple[int, ...]
    rescue_places: tuple[NoisePlace, ...]
    rescue_shapes: tuple[NoiseShape, ...]
    rescue_drifts: bool
    noise_every: int


DIGITS = "three-layer perceptron with 42,310 weights, 6 learners on a ring, local batch 1000, 500 steps"
EVERY_FORTY = tuple(range(20, 501, 40))

SCALES: dict[str, Scale] = {
    s.name: s
    for s in (
        Scale(
            "laptop", f"4,000 MNIST digits, {DIGITS}; one recorded run of each algorithm", "demo", None, "mnist-mlp", "cpu",
            (20, 60, 100, 140, 200, 260, 320, 380, 440, 500), 1.2, tuple(range(6, 11)), ("weights",), ("isotropic", "low-rank"), False, 10,
        ),
        Scale(
            "gpu", f"4,000 MNIST digits, {DIGITS}; one recorded run of each algorithm", "full", 20, "mnist-mlp", "cuda",
            EVERY_FORTY, 1.2, tuple(range(6, 26)), ("weights", "gradient"), ("isotropic", "layer", "diagonal", "low-rank"), True, 5,
        ),
        Scale(
            "cluster", f"60,000 MNIST digits, {DIGITS}; one recorded run of each algorithm", "full", 30, "mnist-full-mlp", "cuda",
            EVERY_FORTY, None, tuple(range(6, 36)), ("weights", "gradient"), ("isotropic", "layer", "diagonal", "low-rank"), True, 5,
        ),
    )
}  # fmt: skip
"""laptop: the bundled digits on a CPU. gpu: the same with more seeds, rates, batch sizes and noises. cluster: the paper's own digits task."""
