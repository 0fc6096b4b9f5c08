"""The registry of attacks: a decorator registers a class, and `package.module:Class` selects any other one."""

from attacks.base import Attack
from tofu.registry import Registry

registry: Registry[type[Attack]] = Registry("attacks", Attack, "attacks")

ATTACKS = registry.names()
"""Names of the attacks in this package."""


def make_attack(name: str) -> Attack:
    """Create the attack with this name, with its default settings.

    Raises:
        SettingError: the name is unknown, or it names an object that is not an attack.
    """
    return registry.get(name)()
