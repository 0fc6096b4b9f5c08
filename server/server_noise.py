"""Differential privacy whose noise the server adds: clipping, the noised mean, and who may take part in a round."""

from collections.abc import Sequence

import numpy as np
import torch

from server.client_registry import Client
from tofu.errors import PayloadError, RunError
from tofu.formatting import format_count
from tofu.privacy import Noise, clip
from tofu.privacy.correlated import CorrelatedSums, Participation
from tofu.rounds.aggregation import Aggregator
from tofu.secagg.masks import Stream, new_seed
from tofu.settings.groups import PrivacySettings
from tofu.weights import ParamSpec, Weights, split_vector


class ServerNoise:
    """The noise of a run's rounds, and which clients took part in them.

    Attributes:
        participation: of the clients, which outlives this process with the privacy account.
    """

    def __init__(self, privacy: PrivacySettings, param_spec: ParamSpec) -> None:
        self.participation = Participation(privacy.min_separation)
        bands = privacy.min_separation if privacy.server_noise == "correlated" else 1
        noise = Noise(privacy.clip_norm, privacy.noise_multiplier)
        self._spec = param_spec
        self._sums = CorrelatedSums(noise, bands, sum(shape.numel() for shape in param_spec.shapes.values()))

    def eligible(self, clients: Sequence[Client], minimum: int) -> list[Client]:
        """Return those of the clients that may take part in the next round.

        Raises:
            RunError: there are fewer than `minimum`.
        """
        names = set(self.participation.eligible(client.name for client in clients))
        if len(names) < minimum:
            raise RunError(
                f"{len(names)} of {len(clients)} connected clients may take part, of {minimum} that are needed: the "
                f"others did in the last {format_count(self.participation.separation - 1, 'round')} (min-separation)"
            )
        return [client for client in clients if client.name in names]

    def begin_mean(self) -> "NoisedMean":
        """Return the mean of the updates of the round that was begun last."""
        return NoisedMean(self._spec, self._sums, self.participation.rows)


class NoisedMean(Aggregator):
    """The unweighted mean of clipped updates, to whose sum the server's noise is added.

    The server clips each update itself, so that no client can contribute more than the norm.
    """

    def __init__(self, param_spec: ParamSpec, sums: CorrelatedSums, row: int) -> None:
        super().__init__(param_spec, 0.0)
        self._sums, self._row, self._shapes = sums, row, param_spec.shapes
        self._total = np.zeros(sum(shape.numel() for shape in self._shapes.values()), np.int64)

    def add(self, update: Weights, examples: int) -> None:
        noise = self._sums.noise
        try:
            clipped, _ = clip({name: update[name] for name in self._shapes}, noise.norm)
        except RunError as error:
            raise PayloadError(str(error)) from error
        values = torch.cat([value.double().flatten() for value in clipped.values()]).numpy()
        self._total += noise.rounded(values, Stream(new_seed()))
        self.examples += 1

    def mean(self) -> Weights:
        """Return the noised mean. A second call would release the sum again, so it raises RunError."""
        noised = torch.from_numpy(self._sums.release(self._row, self._total) * (self._sums.noise.grid / self.examples))
        return split_vector(noised.float(), self._shapes)
