"""The command line: `tofu run`, `plan`, `demo`, `compare`, `report`, `predict`, `attack` and `deploy`."""

import dataclasses
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from tofu.errors import SettingError, TofuError
from tofu.formatting import printable
from tofu.settings import (
    FIELDS,
    Settings,
    Value,
    accepted_values,
    dashed,
    json_schema,
    kind_of,
    read_toml,
    section_of,
    separator_of,
)
from tofu.settings.deprecated import NAMES, present_names, warn_once

_app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Communication-efficient federated learning: proxy images, secure aggregation, training plugins.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tofu {version('tofu-fl')}")
        raise typer.Exit


@_app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with settings", rich_help_panel="Run")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object at the end, and no progress")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress view")]


def _comparison(flag: str, help_: str) -> Any:
    return typer.Option(flag, help=help_, rich_help_panel="Comparison")


Compressors = Annotated[str, _comparison("--compressors", "names of compressors, separated by commas")]
Ratios = Annotated[str, _comparison("--ratios", "ratios to run each of them at, separated by commas")]
Seeds = Annotated[int, _comparison("--seeds", "how many seeds, counted up from --seed")]
Folder = Annotated[Path, _comparison("--folder", "where the runs and the results go; finished runs are not run again")]
For = Annotated[
    list[str] | None,
    _comparison("--for", "NAME:setting=value for one compressor (full is FedAvg); may be given several times"),
]
Tune = Annotated[
    str | None,
    _comparison("--tune", "setting=value,value,... to choose from for FedAvg and each compressor at each ratio"),
]

_REPEATED = {name: separator for name in FIELDS if (separator := separator_of(name))}
"""Settings of several values that may also be given one at a time, and what stands between them."""


def main() -> None:
    """Run the command line; errors that a user can act on take one line and exit status 2."""
    for name, value in {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}.items():
        os.environ.setdefault(name, value)
    try:
        _app(_with_present_flags(sys.argv[1:]))
    except TofuError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _with_present_flags(arguments: Sequence[str]) -> list[str]:
    """Arguments with deprecated names of settings replaced, such as `--fraction=0.5`, and a warning for each."""
    result = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        prefix = "--no-" if flag.startswith("--no-") else "--"
        old = flag.removeprefix(prefix)
        if flag.startswith("--") and old in NAMES:
            warn_once(f"setting {old} is deprecated: use {NAMES[old]}")
            argument = f"{prefix}{NAMES[old]}{equals}{value}"
        result.append(argument)
    return result


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for every field of `Settings`; it receives those given as `overrides`."""
    names = list(FIELDS)

    def wrapped(**given: Any) -> None:
        overrides = {name: given.pop(name) for name in names}
        for name, separator in _REPEATED.items():
            if overrides[name] is not None:
                overrides[name] = separator.join(overrides[name])
        if "@" in (overrides["plugin_options"] or ""):
            from tofu.plugins.options import inline_files

            overrides["plugin_options"] = inline_files(overrides["plugin_options"])
        command(overrides={name: value for name, value in overrides.items() if value is not None}, **given)

    own = [p for p in inspect.signature(command).parameters.values() if p.name != "overrides"]
    options = [_option(name, field) for name, field in FIELDS.items()]
    wrapped.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
    wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
    return wrapped


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    dashed = name.replace("_", "-")
    text = str(field.description)
    choices = accepted_values(name)
    if choices and not any(choice in text for choice in choices):
        text += f" ({', '.join(choices)})"
    shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
    text += f" \\[default: {shown}]" if shown != "" else ""  # escaped: brackets are markup in a help text
    flags = [f"--{dashed}/--no-{dashed}" if kind_of(field) is bool else f"--{dashed}"]
    kind: Any = kind_of(field)
    if name in _REPEATED:
        flags.append(f"--{dashed.removesuffix('s')}")
        kind = list[str]
    option = typer.Option(*flags, help=text, rich_help_panel=section_of(name), show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _settings(config: Path | None, overrides: dict[str, Value]) -> Settings:
    """Options over the given file over this folder's pyproject.toml over the defaults."""
    values: dict[str, object] = {}
    if config is not None:
        values = read_toml(config)
    elif _is_ours(Path("pyproject.toml")):
        values = read_toml(Path("pyproject.toml"))
    return Settings.of(present_names(values) | present_names(overrides))


def _resumed(overrides: dict[str, Value]) -> Settings:
    """The settings of the run to go on with, and what was given beside it; the server says what may not differ."""
    from tofu.reporting.folder import read_config

    began = read_config(Path(str(overrides["resume"]))).to_config()
    return Settings.of(began | present_names(overrides))


def _is_ours(path: Path) -> bool:
    import tomllib

    if not path.is_file():
        return False
    try:
        app = tomllib.loads(path.read_text())["tool"]["flwr"]["app"]
        return bool(app["components"]["serverapp"] == "server.app:app")
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False


@_app.command()
@_with_settings
def run(*, config: ConfigFile = None, json_: Json = False, quiet: Quiet = False, overrides: dict[str, Value]) -> None:
    """Run a federation in this process: the same server and client apps as `flwr run`, no ray, no open port."""
    settings = _resumed(overrides) if overrides.get("resume") else _settings(config, overrides)
    summary = _run(settings, quiet=quiet or json_)
    if json_:
        print(json.dumps(summary))
    elif quiet:
        print(f"{summary['run']}/report.html")


def _run(settings: Settings, *, quiet: bool) -> dict[str, object]:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    from client.app import app as client_app
    from server.app import serve_in_process
    from tofu.observers.terminal import make_progress

    return serve_in_process(client_app, settings, make_progress(sys.stderr, quiet=quiet or settings.log == "json"))


@_app.command()
@_with_settings
def plan(*, config: ConfigFile = None, json_: Json = False, overrides: dict[str, Value]) -> None:
    """Say what a run will cost in bytes, without running it."""
    from server.ledger import reply_overhead
    from tofu.formatting import format_bytes
    from tofu.models import build_model
    from tofu.plan import make_plan
    from tofu.reference_model import ReferenceModel
    from tofu.rounds.schedule import Schedule

    settings = _settings(config, overrides)
    shape = settings.open_data().shape
    network = ReferenceModel(build_model(settings.model, shape, norm=settings.norm, seed=settings.seed).eval(), shape)
    schedule = Schedule.of(settings)
    kinds = [schedule.kind(r, ()) for r in range(1, settings.rounds + 1)]
    made = make_plan(
        settings,
        network,
        full_rounds=kinds.count("full"),
        secure_rounds=kinds.count("secure"),
        message_overhead=reply_overhead(),
    )
    if json_:
        extra = {name: getattr(made, name) for name in ("payload_ratio", "uplink_ratio", "both_ratio")}
        print(json.dumps(dataclasses.asdict(made) | extra))
        return
    proxies = f" ({made.proxies} proxies of {made.proxy_side}x{made.proxy_side})" if made.proxies else ""
    rows = [
        ("model", f"{settings.model}, {made.parameters:,} parameters"),
        ("one update as float32", format_bytes(made.update_bytes)),
        ("one compressed payload", f"{format_bytes(made.payload_bytes)}, {made.payload_ratio:.1f}x less{proxies}"),
        ("message around a payload", format_bytes(made.message_overhead)),
        ("rounds", f"{made.compressed_rounds} compressed, {made.full_rounds} full, {made.secure_rounds} secure"),
        ("uplink of the run", format_bytes(made.uplink_bytes)),
        ("uplink of FedAvg", f"{format_bytes(made.fedavg_uplink_bytes)}, {made.uplink_ratio:.1f}x as much"),
    ]
    if made.step_bytes:
        rows += [
            (
                "one step of the server",
                f"{format_bytes(made.step_bytes)}, {made.update_bytes / made.step_bytes:.1f}x less",
            ),
            ("downlink of the run", format_bytes(made.downlink_bytes)),
            ("both directions", f"{made.both_ratio:.1f}x less than FedAvg"),
        ]
    else:
        rows.append(("downlink of either", format_bytes(made.downlink_bytes)))
    for name, value in rows:
        print(f"{name:<26}{value}")
    for warning in made.warnings:
        print(f"warning: {warning}", file=sys.stderr)


@_app.command()
@_with_settings
def demo(*, config: ConfigFile = None, quiet: Quiet = False, overrides: dict[str, Value]) -> None:
    """Train the same federation twice, with FedAvg and with proxies, and compare accuracy and bytes.

    Without options: ten clients, a small network, the digits that come with scikit-learn.
    """
    from tofu.formatting import format_bytes
    from tofu.reporting.folder import add_baseline, check_new, fresh_folder
    from tofu.reporting.report import write_report

    tofu = _settings(config, overrides)
    folder = tofu.run_folder or str(fresh_folder(tofu))
    tofu = tofu.replace(run_folder=folder)
    fedavg = tofu.replace(schedule="full", run_folder=f"{folder}-fedavg")
    for settings in (tofu, fedavg):
        check_new(Path(settings.run_folder))
    print(f"1 of 2: FedAvg, {fedavg.clients} clients, full updates", file=sys.stderr)
    baseline = _run(fedavg, quiet=quiet)
    print("2 of 2: TOFU, proxies in place of updates", file=sys.stderr)
    summary = _run(tofu, quiet=quiet)
    add_baseline(Path(folder), Path(str(baseline["run"])))
    page = write_report(Path(folder))
    print(f"\n{'':<22}{'test accuracy':>14}{'uplink':>12}{'against FedAvg':>16}")
    for name, result in (("FedAvg", baseline), ("TOFU (proxy images)", summary)):
        accuracy, uplink, ratio = result["final_accuracy"], result["uplink_bytes"], result["uplink_ratio"]
        assert isinstance(accuracy, float)
        assert isinstance(uplink, int)
        assert isinstance(ratio, float)
        print(f"{name:<22}{accuracy:>13.1%} {format_bytes(uplink):>11}{f'{ratio:.0f}x less' if ratio > 1 else '':>16}")
    print(f"\nreport: {page}")


@_app.command()
@_with_settings
def compare(
    *,
    compressors: Compressors,
    folder: Folder,
    ratios: Ratios = "100",
    seeds: Seeds = 3,
    for_: For = None,
    tune: Tune = None,
    config: ConfigFile = None,
    json_: Json = False,
    quiet: Quiet = False,
    overrides: dict[str, Value],
) -> None:
    """Run compressors at several ratios, and FedAvg, on the same data: who ends more accurate at equal bytes.

    Runs are kept in the folder, so the same command goes on after an interruption. With --tune, FedAvg and every
    compressor at every ratio is first run once with each value and a seed of its own (the first plus 1000), and then
    uses its best.
    """
    for name, instead in {"compressor": "--compressors", "ratio": "--ratios", "run_folder": "--folder"}.items():
        if name in overrides:
            raise SettingError(name, overrides[name], f"{instead} in its place")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    from client.app import app as client_app
    from server.comparison import run_comparison
    from tofu.observers.base import Observer
    from tofu.observers.terminal import make_progress
    from tofu.reporting.compare.plan import Comparison
    from tofu.reporting.report.compare_tables import markdown

    comparison = Comparison.of(
        _settings(config, overrides), compressors=compressors, ratios=ratios, seeds=seeds, folder=folder,
        overrides=for_ or (), tune=tune or "",
    )  # fmt: skip
    quiet = quiet or json_

    def say(line: str) -> None:
        if not quiet:
            print(printable(line), file=sys.stderr, flush=True)

    def view() -> Observer:
        # A line for each round of each run would bury the lines that say how far the comparison is.
        return make_progress(sys.stderr, quiet=quiet) if sys.stderr.isatty() else Observer()

    document = run_comparison(comparison, client_app, say=say, view=view)
    if json_:
        print(json.dumps(document))
        return
    print(markdown(document))
    print(f"\nreport: {folder / 'compare.html'}")


@_app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    images: Annotated[Path, typer.Argument(help="an image, or a folder of images")],
    json_: Json = False,
) -> None:
    """Classify images with a run's model; with the ood plugin, say which it does not know."""
    from tofu.reporting.predict import predict_images

    rows = predict_images(run, images)
    if json_:
        print(json.dumps(rows))
        return
    width = max(len(str(row["image"])) for row in rows)
    for row in rows:
        verdict = "unknown" if row["unknown"] else f"class {row['class']}"
        score = "" if row["score"] is None else f"   score {row['score']:.4f}"
        print(f"{printable(str(row['image'])):<{width}}   {verdict:<10} {row['probability']:7.1%}{score}")


@_app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def attack(context: typer.Context) -> None:
    """Measure what messages leak: of a run with --record-clients, or of messages made for the purpose."""
    from tofu.cli.attack import main as attack_main

    raise SystemExit(attack_main(context.args))


@_app.command("settings")
def settings_(schema: Annotated[bool, typer.Option("--schema", help="print a JSON schema")] = False) -> None:
    """Print every setting with its default, as a TOML file for `--config`; or the JSON schema of such a file."""
    if schema:
        print(json.dumps(json_schema(), indent=2))
        return
    for name, field in FIELDS.items():
        print(f"{f'{dashed(name)} = {json.dumps(field.default)}':<32}# {field.description}")


@_app.command()
def report(run: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Write a run's report again."""
    from tofu.reporting.report import write_report

    print(write_report(run))


@_app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def deploy(context: typer.Context) -> None:
    """Run a federation of real processes, over TLS: `tofu deploy up`, `run`, `status`, `down`."""
    from tofu.cli.deploy import app

    app(context.args, prog_name="tofu deploy")
