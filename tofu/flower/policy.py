"""A client's policy: which requests it accepts from a server, as a TOML file on the client's machine.

The node config names the file as `policy`; docs/client-policy.md lists the rules. Without a file, `Policy()` applies,
which accepts Tofu's own components, and no other code or data that a server names. Clients of a simulation run in the
server's process and accept everything: their node config has policy="none", or they run in Ray.
"""

import math
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tofu.data import ImageShape
from tofu.errors import PayloadError, PolicyError, RunError, SettingError, TofuError, described
from tofu.models import model_names
from tofu.plugins import plugin_names
from tofu.plugins.options import split_options
from tofu.privacy import Noise
from tofu.rounds import KINDS
from tofu.rounds.downlink import ResyncError
from tofu.secagg.client import ClientSession
from tofu.secagg.participant import Participant
from tofu.settings import EXTENSIBLE, FIELDS, Value, accepted_values, dashed
from tofu.settings.deprecated import present_kind, present_names, present_node_config, present_value
from tofu.settings.fields import comma_list
from tofu.settings.groups import EMBEDDED_TABLES

BUILT_IN = "built-in"
"""In an allow-list: all names that Tofu provides."""
ANY = "any"
"""In an allow-list: everything, including code on the client's machine that the server names."""
NO_POLICY = "none"
"""The node config's `policy` of a client that accepts everything."""

_NODE_RULES = ("allowed-rounds", "min-noise-multiplier", "min-neighbors", "max-colluding")
_RULES = ConfigDict(frozen=True, extra="forbid", strict=True, alias_generator=dashed, validate_by_name=True)


class Bounds(BaseModel):
    """Accepted values of a number: `{min = 0.001, max = 1}`; a missing bound does not limit."""

    model_config = _RULES

    min: float = -float("inf")
    max: float = float("inf")


class Policy(BaseModel):
    """The rules of one client, by the names that its file has, with dashes.

    Attributes:
        models, plugins: accepted names or `package.module:Class`; "built-in" stands for Tofu's own, "any" for all.
        components: the same for compressor, downlink, schedule, aggregator and server-optimizer.
        datasets: accepted values of `dataset`, for a client without data of its own.
        own_data: whether the client trains on the folder of its node config only.
        allowed_rounds: accepted kinds of round.
        min_noise_multiplier: lower limit of the run's noise multiplier, and of the noise that a secure sum certainly
            has (`check_sum_noise`).
        min_neighbors, max_colluding: limits for secure rounds (`tofu.secagg.Participant`).
        max_classes: upper limit of a network's outputs, which a request chooses.
        class_names: whether the client sends the names of the classes in its own folder.
        trust_server: whether a client that allows only secure rounds takes part in them without an identity. A server
            that impersonates all other clients could then read its update.
        error_details: whether error replies say why the client's own data or files cannot be used.
        settings: setting -> accepted values, or bounds of a number.

    Example:
        >>> Policy(models=["mlp"]).check_run({"model": "evil.module:make"}, {})
        Traceback (most recent call last):
        ...
        tofu.errors.PolicyError: model=evil.module:make is refused by this client's policy: rule models accepts mlp
    """

    model_config = _RULES

    models: list[str] = [BUILT_IN]
    plugins: list[str] = [BUILT_IN]
    components: list[str] = [BUILT_IN]
    datasets: list[str] = ["digits", *EMBEDDED_TABLES]
    own_data: bool = False
    allowed_rounds: list[str] = list(KINDS)
    min_noise_multiplier: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    min_neighbors: int = Field(default=2, ge=0)
    max_colluding: int = Field(default=0, ge=0)
    max_classes: int = Field(default=1000, ge=1)
    class_names: bool = True
    trust_server: bool = False
    error_details: bool = False
    settings: dict[str, list[Value] | Bounds] = {}

    @staticmethod
    def none() -> "Policy":
        """Return the policy of a client that runs in the server's process: it accepts everything."""
        return Policy(
            models=[ANY], plugins=[ANY], components=[ANY], datasets=[ANY], max_classes=65_535, error_details=True,
            trust_server=True,
        )  # fmt: skip

    @staticmethod
    def of(context: Context) -> "Policy":
        """Return the policy of a client's node config.

        Raises:
            SettingError: the file cannot be read, a rule is unknown or has another type, or a rule is given twice.
        """
        config = present_node_config(context.node_config)
        own: dict[str, Any] = {name: config[name] for name in _NODE_RULES if name in config}
        if "allowed-rounds" in own:
            own["allowed-rounds"] = [kind.strip() for kind in str(own["allowed-rounds"]).split(",")]
        name = str(config.get("policy", NO_POLICY if _simulated() else ""))
        if name == NO_POLICY:
            return _checked(Policy.none().model_dump(by_alias=True) | own)
        rules = _rules(Path(name)) if name else {}
        if twice := sorted(own.keys() & {dashed(rule) for rule in rules}):
            raise SettingError(twice[0], own[twice[0]], "this rule once, in the policy or in the node config")
        return _checked(rules | own)

    def check_run(self, run_config: Mapping[str, object], node_config: Mapping[str, object]) -> None:
        """Check the run's settings, before anything is imported or opened for them.

        Args:
            run_config: settings by their flat names, as the server sent them.

        Raises:
            PolicyError: a rule refuses one; the message names the rule.
        """
        given = {dashed(name): field.default for name, field in FIELDS.items()}
        given |= present_names(run_config, warn=False)
        self._check_list("models", "model", given["model"], (*model_names(), "bag_of_words"))
        for plugin in comma_list(str(given["plugins"])):
            self._check_list("plugins", "plugins", plugin, plugin_names())
        for option in split_options(str(given["plugin-options"])):
            if "=@" in option and ANY not in self.plugins:
                raise PolicyError("plugins", f"plugin-options={option}", "the content of a file in its place")
        for name in EXTENSIBLE:
            self._check_list("components", dashed(name), given[dashed(name)], accepted_values(name))
        if "data" not in node_config:
            if self.own_data:
                raise PolicyError("own-data", "a run without this client's own folder", "data in its node config")
            self._check_list("datasets", "dataset", given["dataset"], ())
        for name, accepted in self.settings.items():
            _check_value(name, given[name], accepted)

    def check_round(self, kind: str, noise_multiplier: float) -> None:
        """Check the kind and the noise of a round. Raises PolicyError if a rule refuses them."""
        if kind not in self.allowed_rounds:
            raise PolicyError("allowed-rounds", f"a {kind} round", ", ".join(self.allowed_rounds))
        self.check_noise(noise_multiplier)

    def check_identity(self, *, identified: bool) -> None:
        """Raises PolicyError if only secure rounds are allowed, and this client has no identity for them."""
        if self.allowed_rounds == ["secure"] and not identified and not self.trust_server:
            accepted = "identity and identities in the node config, or the rule trust-server = true"
            raise PolicyError("allowed-rounds", "a secure round without identities", accepted)

    def check_sum_noise(self, noise: Noise | None, session: ClientSession, member: Participant) -> None:
        """Check the noise that a secure sum certainly has.

        Without identities this is only the client's own share, 1 / sqrt(n) of the noise if n clients share it, because
        the server could impersonate all other members. With identities and a complete graph, it includes the shares of
        all members but those that may collude, because these have agreed to the run's settings by their keys.

        Raises:
            PolicyError: the noise is below `min_noise_multiplier`.
        """
        if noise is None or not self.min_noise_multiplier:
            return
        topology, members, honest = session.topology, session.members, 1
        if member.identity is not None and topology.neighbors == members - 1:
            honest = max(1, topology.threshold - max(self.max_colluding, math.floor(member.colluding * members)))
        sure = noise.multiplier * math.sqrt(min(1.0, honest / noise.sharers))
        if sure < self.min_noise_multiplier * (1 - 1e-9):
            found = f"a secure sum of which {sure:.3g} of noise-multiplier={noise.multiplier:g} is sure"
            raise PolicyError("min-noise-multiplier", found, f"{self.min_noise_multiplier:g} or more")

    def check_noise(self, noise_multiplier: float) -> None:
        """Raises PolicyError if the run's noise multiplier is below `min_noise_multiplier`."""
        minimum = self.min_noise_multiplier
        if not noise_multiplier >= minimum:
            raise PolicyError("min-noise-multiplier", f"noise-multiplier={noise_multiplier:g}", f"{minimum:g} or more")

    def check_shape(self, shape: ImageShape) -> None:
        """Raises PolicyError if a request names more outputs than `max_classes`."""
        if shape.classes > self.max_classes:
            raise PolicyError("max-classes", f"a network of {shape.classes} classes", f"at most {self.max_classes}")

    def public_reason(self, error: Exception, run_config: Mapping[str, object]) -> str:
        """Return the reason in an error reply.

        It says nothing about the client's files or data, unless `error_details`.
        """
        if self.error_details or isinstance(error, PayloadError | PolicyError | ResyncError | RunError):
            return str(error)
        if isinstance(error, SettingError):
            sent = run_config.get(error.field) == error.value
            return f"{error.field}{f'={error.value!r}' if sent else ''} is not usable on this client: see its log"
        if isinstance(error, TofuError):
            return "this client's data or files cannot be used in this run: see its log"
        return f"the client app failed with {type(error).__name__}: see its log"

    def _check_list(self, rule: str, setting: str, value: object, built_in: tuple[str, ...]) -> None:
        accepted: list[str] = getattr(self, rule)
        if ANY in accepted or value in accepted or (BUILT_IN in accepted and value in built_in):
            return
        raise PolicyError(rule, f"{setting}={value}", ", ".join(accepted))


@contextmanager
def error_replies(message: Message, context: Context, *, named: bool = False) -> Iterator[list[Message]]:
    """Turn an exception into an error reply, which becomes the only entry of the list.

    Details that the reply does not contain are printed on standard error. With `error_details`, an exception that is
    not a `TofuError` is raised instead. With `named`, the reason begins with "client NAME: " for a client with a name.
    """
    replies: list[Message] = []
    try:
        yield replies
    except Exception as error:
        policy = _policy_for_errors(context)
        if policy.error_details and not isinstance(error, TofuError):
            raise
        reason = policy.public_reason(error, context.run_config)
        if reason != str(error):
            print(f"client {client_name(context)}: {described(error)}", file=sys.stderr, flush=True)
        if named and "partition-id" in context.node_config:
            reason = f"client {client_name(context)}: {reason}"
        code = error.code if isinstance(error, ResyncError) else 0
        replies[:] = [Message(Error(code=code, reason=reason), reply_to=message)]


def _policy_for_errors(context: Context) -> Policy:
    try:
        return Policy.of(context)
    except SettingError:  # then this is the error, or the next message reports it
        return Policy()


def client_name(context: Context) -> str:
    """Return the client's name in ledger and logs: its partition id, or its node id if it has none."""
    return str(context.node_config.get("partition-id", context.node_id))


def _simulated() -> bool:
    """Return whether this process is a worker of Flower's simulation."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def read_policy(path: Path) -> Policy:
    """Return the policy in a file.

    Raises SettingError if it cannot be read, or a rule is unknown or has another type.
    """
    return _checked(_rules(path))


def _rules(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError("policy", str(path), f"a readable TOML file ({error.strerror})") from error
    except ValueError as error:
        raise SettingError("policy", str(path), f"a TOML file ({error})") from error


def _checked(rules: dict[str, Any]) -> Policy:
    try:
        policy = Policy(**rules)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        rule = str(first["loc"][0])
        raise SettingError(f"policy.{rule}", rules.get(rule), f"a rule of a client's policy ({first['msg']})") from None
    settings = {
        name: [present_value(name, one, warn=False) if isinstance(one, str) else one for one in accepted]
        if isinstance(accepted, list) else accepted
        for name, accepted in policy.settings.items()
    }  # fmt: skip
    kinds = [present_kind(kind) for kind in policy.allowed_rounds]
    policy = policy.model_copy(update={"settings": settings, "allowed_rounds": kinds})
    for kind in policy.allowed_rounds:
        if kind not in KINDS:
            raise SettingError("policy.allowed-rounds", kind, f"some of {', '.join(KINDS)}")
    for name in policy.settings:
        if name != dashed(name) or name.replace("-", "_") not in FIELDS:
            raise SettingError("policy.settings", name, "the name of a setting, with dashes")
    return policy


def _check_value(name: str, value: object, accepted: list[Value] | Bounds) -> None:
    rule = f"settings.{name}"
    if isinstance(accepted, list):
        if value not in accepted:
            raise PolicyError(rule, f"{name}={value}", ", ".join(map(str, accepted)))
    elif isinstance(value, bool | str) or not accepted.min <= value <= accepted.max:  # type: ignore[operator]
        raise PolicyError(rule, f"{name}={value}", f"{accepted.min:g} to {accepted.max:g}")
