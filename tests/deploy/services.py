"""The members of a federation as services in containers, which compose.yaml and the Kubernetes example have to be."""

from pathlib import PurePosixPath

from deploy.topology import Member, Trust, identity_config, superexec, superlink, supernode

RUNTIME_PORT = 9094
HEALTH_PORT = 9100
JOURNAL = "/journal/rounds.db"
"""The file in which a client in a container records its secure rounds (`tofu.flower.secure_session`)."""


def containers(nodes: int) -> dict[str, Member]:
    """Return the members as services of deploy/compose.yaml. SuperNodes see the SuperLink through the proxy only."""
    mounted = PurePosixPath("/run/secrets")
    trust = Trust(mounted / "ca.crt", mounted / "server.pem", mounted / "server.key", mounted / "superexec")
    health = f"127.0.0.1:{HEALTH_PORT}"
    members = {
        "superlink": superlink(trust, host="0.0.0.0", port=8000, database=PurePosixPath("/state/state.db")),
        "superlink-exec": superexec(trust, address="superlink:8000", health=health),
    }
    known = identity_config(mounted / "identity", mounted / "identities.json")
    for node in range(nodes):
        members[f"node-{node}"] = supernode(
            trust, superlink="proxy:8443", key=mounted / "node",
            config={"data": "/data", "partition-id": node, **known, "journal": JOURNAL},
            host="0.0.0.0", port=RUNTIME_PORT,
        )  # fmt: skip
        members[f"node-{node}-exec"] = superexec(trust, address=f"node-{node}:{RUNTIME_PORT}", health=health)
    return members
