"""What a client knows before any session, and what it therefore takes from a roster.

Bonawitz et al., CCS 2017, figure 4, round 1: a client goes on only where there are enough others, all their keys differ
and, against a server that lies, each key is signed by the client that it is said to be of.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tofu.errors import PayloadError, SettingError
from tofu.secagg.identities import ADVERT, Identity, check_known, verify
from tofu.secagg.messages import Advert, Roster, check_name
from tofu.secagg.shamir import MAX_SHARES


@dataclass(frozen=True)
class Participant:
    """A client of a run.

    Attributes:
        run: identifies the run to all its clients, 16 random bytes or a name.
        name: of this client.
        identity: the key that proves the name, or None in a run whose server is trusted not to lie.
        known: name -> Ed25519 public key of every client, from elsewhere than the server; None without identities.
        min_neighbors: refuse a session with fewer.
        max_colluding: c, neighbors that may be in league with the server: refuse a threshold that does not bear them.

    Raises:
        SettingError: an identity without the list of known keys or the reverse, or one that the list contradicts.
    """

    run: bytes
    name: str
    identity: Identity | None = None
    known: Mapping[str, bytes] | None = None
    min_neighbors: int = 2
    max_colluding: int = 0

    def __post_init__(self) -> None:
        check_name(self.name)
        if (self.identity is None) != (self.known is None):
            raise SettingError("known", self.known, "a list of public keys beside an identity, and none without")
        if self.identity is None or self.known is None:
            return
        if self.identity.name != self.name:
            raise SettingError("identity", self.identity.name, f"that of {self.name}")
        check_known(self.known)
        if self.known.get(self.name) != self.identity.public:
            raise SettingError("known", self.name, "a list that has this client's own public key")

    def signature(self, purpose: bytes, *parts: bytes) -> bytes:
        """Of the parts in this run, or b"" in a run without identities."""
        return self.identity.sign(purpose, self.run, *parts) if self.identity else b""

    def verify(self, name: str, signature: bytes, purpose: bytes, *parts: bytes) -> None:
        """Raises PayloadError where the run has identities and that client did not sign the parts for this run."""
        if self.known is not None:
            verify(self.known, name, signature, purpose, self.run, *parts)

    def check_roster(self, roster: Roster, own: Advert) -> None:
        """Raises PayloadError, naming the client where one is to blame, for a roster that must not be answered.

        Args:
            own: the advert that we sent for this session.
        """
        terms, count = roster.terms, len(roster.adverts)
        if own.digest not in terms.members:
            raise PayloadError(f"roster does not hold the advert that {self.name} sent")
        number = terms.members.index(own.digest)
        if roster.client != number:
            raise PayloadError(f"roster is for client {roster.client}, and {self.name} is client {number}")
        if not self.min_neighbors <= count <= MAX_SHARES or count != terms.neighbors:
            wanted = f"{terms.neighbors}, from {self.min_neighbors} to {MAX_SHARES}"
            raise PayloadError(f"roster has {count} neighbors, expected {wanted}")
        least = count // 2 + self.max_colluding + 1  # see `tofu.secagg.graph`
        if not least <= terms.threshold <= count:
            raise PayloadError(f"roster has threshold {terms.threshold}, expected {least} to {count}")
        _check_distinct(own, roster.adverts)
        try:
            expected = terms.neighbors_of(number)
        except SettingError as error:
            raise PayloadError(f"roster describes no graph: {error}") from error
        for peer, advert in zip(expected, roster.adverts, strict=True):
            if advert.digest != terms.members[peer]:
                raise PayloadError(f"roster has {advert.name} as neighbor {peer}, which the graph does not have there")
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
