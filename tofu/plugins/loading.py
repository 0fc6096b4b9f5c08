"""Plugins by name: built-in ones register with a decorator in client/plugins, others are `package.module:Class`."""

from tofu.errors import SettingError
from tofu.plugins.base import Plugin
from tofu.plugins.chain import Plugins, overrides
from tofu.plugins.options import options_of, read_options, split_options
from tofu.registry import Registry
from tofu.settings.deprecated import present_option
from tofu.settings.fields import comma_list

plugin_registry: Registry[type[Plugin]] = Registry("plugins", Plugin, "client.plugins")


def plugin_names() -> tuple[str, ...]:
    """Return the built-in names that `make_plugins` accepts."""
    return plugin_registry.names()


def make_plugins(names: str, options: str = "") -> Plugins:
    """Build plugins, for example `make_plugins("gpm,my.module:Mix", "gpm.threshold=0.97 mix.share=0.5")`.

    Args:
        names: built-in names or `package.module:Class`, separated by commas; imported only here.
        options: `plugin.option=value`, separated by spaces.

    Raises:
        SettingError: an unknown plugin, one that cannot be imported or occurs twice, two that do not go together, or
            an option that is unknown, of the wrong type, out of range or of a plugin that is not listed.
    """
    classes: dict[str, type[Plugin]] = {}
    for given in comma_list(names):
        kind = plugin_registry.get(given)
        options_of(kind)
        if kind.name in classes:
            raise SettingError("plugins", names, f"each plugin once, {kind.name} occurs twice")
        classes[kind.name] = kind
    texts: dict[str, dict[str, str]] = {name: {} for name in classes}
    for part in split_options(options):
        key, equals, text = part.partition("=")
        key = present_option(key)
        name, dot, own = key.partition(".")
        if not equals or not dot:
            raise SettingError("plugin-options", part, "plugin.option=value, separated by spaces")
        if name not in texts:
            raise SettingError(key, text, f"an option of a plugin in plugins ({', '.join(texts) or 'there is none'})")
        if own in texts[name]:
            raise SettingError(key, text, "each option once")
        texts[name][own] = text
    plugins = Plugins(kind(**read_options(kind, texts[name], prefix=name)) for name, kind in classes.items())
    _check_together(plugins, names)
    return plugins


def _check_together(plugins: Plugins, names: str) -> None:
    need, mix = [p.name for p in plugins if p.class_targets], [p.name for p in plugins if p.mixes_labels]
    if need and mix:
        raise SettingError("plugins", names, f"no {', '.join(mix)} with {need[0]}, which needs one class per image")
    for what, those in (
        ("changes the model's head", [p for p in plugins if p.changes_head]),
        ("encodes the input", [p for p in plugins if p.encodes_input]),
        ("has client groups", [p for p in plugins if p.groups > 1]),
        ("has its own predict", [p for p in plugins if overrides(p, "predict")]),
        ("has its own train_step", [p for p in plugins if overrides(p, "train_step")]),
    ):
        if len(those) > 1:
            raise SettingError("plugins", names, f"one plugin at most that {what} ({', '.join(p.name for p in those)})")
    listed = plugins.named()
    for plugin in plugins:
        for other, reason in plugin.excludes.items():
            if other in listed:
                raise SettingError("plugins", names, f"{plugin.name} without {other}: {reason}")
