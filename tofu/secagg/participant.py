"""A client's name, keys and limits, which hold for all sessions of a run, and its validation of a roster.

Bonawitz et al., CCS 2017, figure 4, ShareKeys: a client continues only if there are enough other clients, all keys are
different and, against a malicious server, each key is signed by the client that owns it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tofu.errors import PayloadError, SettingError
from tofu.secagg.graph import min_threshold
from tofu.secagg.identities import ADVERT, Identity, check_known, verify
from tofu.secagg.messages import Advert, Roster, check_name
from tofu.secagg.shamir import MAX_SHARES


@dataclass(frozen=True)
class Participant:
    """A client of a run.

    Attributes:
        run: identifies the run to all its clients: 16 random bytes, or a name.
        name: of this client.
        identity: the client's signing key, or None in a run whose server is trusted to follow the protocol.
        known: name -> Ed25519 public key of every client, not received from the server; None without identities.
        min_neighbors: sessions with fewer neighbors are refused.
        max_colluding: c, the number of neighbors that may collude with the server; lower thresholds are refused.
        colluding: fraction of a session's clients that may collude, by the run's settings; the threshold must be at
            least `tofu.secagg.graph.min_threshold` for it.

    Raises:
        SettingError: identity and known keys are not given together, or contradict each other.
    """

    run: bytes
    name: str
    identity: Identity | None = None
    known: Mapping[str, bytes] | None = None
    min_neighbors: int = 2
    max_colluding: int = 0
    colluding: float = 0.0

    def __post_init__(self) -> None:
        check_name(self.name)
        if (self.identity is None) != (self.known is None):
            raise SettingError("secure_identities", self.known and f"of {len(self.known)} clients",
                               "a list of public keys if and only if the client has an identity")  # fmt: skip
        if self.identity is None or self.known is None:
            return
        if self.identity.name != self.name:
            raise SettingError("identity", self.identity.name, f"that of {self.name}")
        check_known(self.known)
        if self.known.get(self.name) != self.identity.public:
            raise SettingError("secure_identities", self.name, "a list that has this client's own public key")

    def signature(self, purpose: bytes, *parts: bytes) -> bytes:
        """Sign the parts for this run; b"" in a run without identities."""
        return self.identity.sign(purpose, self.run, *parts) if self.identity else b""

    def verify(self, name: str, signature: bytes, purpose: bytes, *parts: bytes) -> None:
        """Raises PayloadError if the run has identities and the named client did not sign the parts for this run."""
        if self.known is not None:
            verify(self.known, name, signature, purpose, self.run, *parts)

    def check_roster(self, roster: Roster, own: Advert) -> None:
        """Raises PayloadError if a roster fails validation; the error names the client at fault, if there is one.

        Args:
            roster: as received.
            own: the advert that this client sent for the session.
        """
        terms, count = roster.terms, len(roster.adverts)
        if own.digest not in terms.members:
            raise PayloadError(f"roster does not hold the advert that {self.name} sent")
        number = terms.members.index(own.digest)
        if roster.client != number:
            raise PayloadError(f"roster is for client {roster.client}, but {self.name} is client {number}")
        if not self.min_neighbors <= count <= MAX_SHARES or count != terms.neighbors:
            wanted = f"{terms.neighbors}, from {self.min_neighbors} to {MAX_SHARES}"
            raise PayloadError(f"roster has {count} neighbors, expected {wanted}")
        own_limit = count // 2 + self.max_colluding + 1  # see `tofu.secagg.graph`
        minimum = max(own_limit, min_threshold(len(terms.members), count, self.colluding))
        if not minimum <= terms.threshold <= count:
            raise PayloadError(f"roster has threshold {terms.threshold}, expected {minimum} to {count}")
        _check_distinct(own, roster.adverts)
        try:
            expected = terms.neighbors_of(number)
        except SettingError as error:
            raise PayloadError(f"roster does not describe a graph: {error}") from error
        for peer, advert in zip(expected, roster.adverts, strict=True):
            if advert.digest != terms.members[peer]:
                raise PayloadError(f"roster has {advert.name} as neighbor {peer}, expected another client of the graph")
            self.verify(advert.name, advert.signature, ADVERT, advert.name.encode(), advert.signed)


def _check_distinct(own: Advert, others: tuple[Advert, ...]) -> None:
    names, keys = {own.name}, {own.mask_key, own.share_key}
    for advert in others:
        if advert.name in names:
            raise PayloadError(f"roster has {advert.name} twice")
        if advert.mask_key in keys or advert.share_key in keys or advert.mask_key == advert.share_key:
            raise PayloadError(f"roster has a key of {advert.name} twice")
        names.add(advert.name)
        keys |= {advert.mask_key, advert.share_key}
