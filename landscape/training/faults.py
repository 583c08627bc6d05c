"""Simulated faulty learners: what they send to others is wrong, what they compute themselves is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from landscape import streams
from landscape.functional import ParameterLayout
from landscape.training.communicator import Averaging, Communicator, Handle, Rows

Fault = Literal["gaussian", "sign-flip"]
FAULTS: tuple[str, ...] = get_args(Fault)


class FaultyCommunicator:
    """Another communicator, in which some learners of each replica send corrupted rows, for one step.

    In place of its row w_k a faulty learner k sends, with s the scale,

        gaussian     z, entries independent from N(0, s^2) (Blanchard et al. 2017, arXiv 1703.02757),
        sign-flip    -s w_k (Li et al. 2019, RSA, arXiv 1811.03761),

    the same to all who listen. It mixes what it hears with its own true row, M_kk w_k + sum_{l != k} M_kl w_l, takes honest gradients and
    tells its loss honestly: it is a learner whose outgoing link is broken. The noise is a pure function of (seed, learner, step, number of
    the exchange in the step), so that any backend sends the same. Averages, sums and `rows` are those of the true values.

    Args:
        communicator: the backend.
        num_faulty: how many: the last learners of each replica.
        fault: see above.
        scale: s.
        seeds: of the replicas.
        step: which is taken.
    """

    def __init__(
        self, communicator: Communicator, num_faulty: int, fault: Fault, scale: float | int, seeds: Sequence[int], step: int
    ) -> None:  # fmt: skip
        self.communicator, self.fault, self.scale, self.seeds, self.step = communicator, fault, scale, seeds, step
        self.num_learners, self.held = communicator.num_learners, communicator.held
        self.streams_gradients = communicator.streams_gradients
        honest = self.num_learners - num_faulty
        self._faulty = [
            (r * len(self.held) + i, r, k) for r in range(len(seeds)) for i, k in enumerate(self.held) if k >= honest
        ]
        self._num_exchanges = 0

    def start_mix(self, tensor: Tensor, mixing: Tensor) -> Handle:
        """See `Communicator`. Own terms of faulty learners are put right afterwards, to rounding on the scale of what was sent."""
        sent = self._sent(tensor)
        handle = self.communicator.start_mix(sent, mixing)
        if not self._faulty:
            return handle
        matrices = mixing.expand(len(self.seeds), -1, -1)
        own = [(row, float(matrices[replica, k, k])) for row, replica, k in self._faulty]
        return _OwnTermsTrue(handle, tensor, sent, own)

    def start_gather(self, tensor: Tensor, mixing: Tensor) -> Rows:
        """See `Communicator`. All rows are as they were sent, so a learner takes its own from its state."""
        return self.communicator.start_gather(self._sent(tensor), mixing)

    def start_mean(self, layout: ParameterLayout, contributions: int) -> Averaging:
        """See `Communicator`."""
        return self.communicator.start_mean(layout, contributions)

    def means(self, tensor: Tensor) -> Tensor:
        """See `Communicator`."""
        return self.communicator.means(tensor)

    def sums(self, tensor: Tensor) -> Tensor:
        """See `Communicator`."""
        return self.communicator.sums(tensor)

    def rows(self, tensor: Tensor) -> Tensor:
        """See `Communicator`."""
        return self.communicator.rows(tensor)

    def _sent(self, tensor: Tensor) -> Tensor:
        self._num_exchanges += 1
        if not self._faulty:
            return tensor
        sent = tensor.clone()
        for row, replica, learner in self._faulty:
            if self.fault == "sign-flip":
                sent[row].mul_(-self.scale)
            else:
                identity = (self.seeds[replica], learner, self.step, self._num_exchanges)
                generator = streams.torch_generator("fault", *identity, device=tensor.device)
                sent[row].normal_(0.0, self.scale, generator=generator)
        return sent


class _OwnTermsTrue:
    """Rows mixed from what was sent; then for the rows named, M_kk (true - sent) is added."""

    def __init__(self, handle: Handle, tensor: Tensor, sent: Tensor, own: list[tuple[int, float]]) -> None:
        self.handle, self.tensor, self.sent, self.own = handle, tensor, sent, own

    def wait(self) -> Tensor:
        mixed = self.handle.wait()
        for row, weight in self.own:
            mixed[row].add_(self.tensor[row] - self.sent[row], alpha=weight)
        return mixed
