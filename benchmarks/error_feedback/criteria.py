"""Another criterion between proxies with a correction and the correction alone than the explained variance."""

from tofu.codec.compressor import Candidate, ProxyCompressor
from tofu.weights import Weights, dot

CLIENTS = 10
"""Number of clients whose errors average out."""


class ByLag(ProxyCompressor):
    """Weighs what is missing of the update itself against what is added to it, which averages out over clients.

    With d decoded from x, the fraction f = <x, d> / |x|^2 of x arrives. What lags behind, (1 - f)^2, is common to all
    clients as far as their updates agree. The rest of the error, |d|^2 / |x|^2 - f^2, is orthogonal to x, so the mean
    over n clients has an n-th of it.
    """

    def criterion(self, update: Weights, candidate: Candidate) -> float:
        true = {name: update[name] for name in candidate.explained}
        decoded = {name: candidate.decoded[name] for name in candidate.explained}
        power = dot(true, true)
        if not power:
            return 0.0
        arrived = dot(true, decoded) / power
        return -((1 - arrived) ** 2 + (dot(decoded, decoded) / power - arrived**2) / CLIENTS)
