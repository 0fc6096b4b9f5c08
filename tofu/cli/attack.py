"""`tofu attack`: what each kind of message leaks."""

import json
from collections.abc import Callable, Mapping
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tofu.cli.options import Json, Quiet, line_printer
from tofu.errors import Interrupted, RunError, SettingError
from tofu.formatting import format_count, format_seconds
from tofu.imports import check_extra
from tofu.registry import Registry
from tofu.settings import accepted_values
from tofu.settings.fields import comma_list
from tofu.settings.groups import MODELS

if TYPE_CHECKING:
    from attacks.evaluate import AttackEvaluation

_FOLDERS = "runs/attacks or RUN/attacks"
_ATTACKS = "idlg,codec-aware,label-counts; of a run analytic,simulation,codec-aware,proxy-images,label-counts"
_OF_MADE = ("norm", "lr", "messages", "batch_sizes", "pretrain_rounds", "steps", "seeds", "rounds", "know_labels")
"""Parameters that say how messages are made."""

ATTACKED_MODELS = (*MODELS, "lenet-smooth", "lenet-smooth-batch")
"""Names of models that are accepted without importing torch: `model_names` and `attacks.networks.NAMES`."""


def _check_attacks(names: str | None) -> str | None:
    """Refuse a misspelled attack before torch is imported, which takes seconds. Raises SettingError."""
    registry: Registry[Any] = Registry("attacks", "attacks.base:Attack", "attacks")
    for name in comma_list(names or ""):
        if ":" not in name and name not in registry.names():
            registry.get(name)
    return names


def _check_words(run: Path | None, options: Mapping[str, Any]) -> None:
    """Refuse what is misspelled or not installed before torch is imported, which takes seconds.

    Raises:
        MissingExtraError: torchmetrics is not installed.
        RunError: the run has no recordings.
        SettingError: a value cannot be used.
    """
    if run is not None and not (run / "record").is_dir():
        from tofu.recording import without_messages

        raise RunError(without_messages(run))
    model = options["model"]
    if model is not None and ":" not in model and model not in ATTACKED_MODELS:
        raise SettingError("model", model, f"one of {', '.join(ATTACKED_MODELS)}, or package.module:factory")
    for name in ("batch_sizes", "pretrain_rounds", "steps"):
        if not all(text.strip().isdecimal() for text in comma_list(options[name] or "")):
            raise SettingError(name, options[name], "whole numbers separated by commas")
    kinds = ("exact", "dp", "secure", *accepted_values("compressor"))
    for message in comma_list(options["messages"] or ""):
        if message.strip().partition(":")[0] not in kinds:
            accepted = "exact, proxy:smooth:RATIO, proxy:paper:RATIO, COMPRESSOR[:RATIO], dp:EPSILON or secure:CLIENTS"
            raise SettingError("messages", message, accepted)
    check_extra("attacks", "torchmetrics")


def _option(flag: str, help_: str, default: str, **more: Any) -> Any:
    """Return an option whose default `AttackEvaluation` has, which would import torch for `--help`."""
    return typer.Option(flag, help=f"{help_} (default: {default})", show_default=False, **more)


def _several(flag: str, help_: str, default: str, **more: Any) -> Any:
    return _option(flag, f"{help_}; several are separated by commas", default, **more)


AttackNames = Annotated[
    str | None, _several("--attacks", "registered names or package.module:Class", _ATTACKS, callback=_check_attacks)
]


def attack(
    context: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(help="folder of a run with --record-clients or of tofu.record; without it, messages are made"),
    ] = None,
    *,
    folder: Annotated[Path | None, _option("--folder", "results; their trials are not repeated", _FOLDERS)] = None,
    dataset: Annotated[
        str | None, _option("--dataset", "dataset of made messages, or package.module:function of an app", "digits")
    ] = None,
    model: Annotated[
        str | None, _option("--model", "model of made messages, or package.module:function of an app", "lenet-smooth")
    ] = None,
    norm: Annotated[str | None, _option("--norm", "normalization layers", "group")] = None,
    lr: Annotated[float | None, _option("--lr", "learning rate of the client", "0.1")] = None,
    messages: Annotated[
        str | None, _several("--messages", "kinds of message", "exact,proxy:smooth:100,proxy:paper:100")
    ] = None,
    attacks: AttackNames = None,
    batch_sizes: Annotated[str | None, _several("--batch-sizes", "numbers of images in a local step", "1,4")] = None,
    pretrain_rounds: Annotated[
        str | None, _several("--pretrain-rounds", "numbers of federated rounds before the message", "0")
    ] = None,
    steps: Annotated[str | None, _several("--steps", "numbers of local steps", "1")] = None,
    seeds: Annotated[int | None, _option("--seeds", "number of seeds", "3")] = None,
    rounds: Annotated[int | None, _option("--rounds", "number of rounds that the attacker accumulates", "1")] = None,
    recorded_rounds: Annotated[
        int, typer.Option(min=1, help="of a recorded run: number of rounds that are attacked, first and last included")
    ] = 3,
    know_labels: Annotated[bool, typer.Option("--know-labels", help="give the attacker the labels")] = False,
    seconds: Annotated[float | None, _option("--seconds", "time limit of one attack", "60")] = None,
    time_limit: Annotated[float, _option("--time-limit", "seconds after which no attack starts", "none")] = inf,
    threads: Annotated[int, typer.Option(help="threads of torch")] = 1,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what messages leak: those of a recorded run, or messages that are made for the purpose."""
    _check_words(run, context.params)
    from attacks.evaluate import evaluate
    from attacks.report import print_tables, write_report

    _set_threads(threads)
    log = line_printer(quiet=quiet)
    evaluation = _evaluation({name: value for name, value in context.params.items() if value is not None})
    folder = folder or (Path("runs/attacks") if run is None else run / "attacks")
    try:
        if run is None:
            rows = evaluate(evaluation, folder, log=log, seconds=time_limit)
        else:
            rows = _attack_recorded(run, folder, evaluation, context.params, log)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {_report_so_far(folder)}the same command goes on from here") from None
    page = write_report(rows, folder)
    if json_:
        print(json.dumps(rows))
        return
    print_tables(rows, page)
    print(f"\nreport: {page}")


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _report_so_far(folder: Path) -> str:
    """Write the report of the attacks that had ended when the user interrupted the command, and name it."""
    from attacks.evaluate import finished
    from attacks.report import write_report

    document = folder / "attacks.json"
    rows = json.loads(document.read_bytes())["rows"] if document.is_file() else []
    done = finished(rows)
    return f"the report of {format_count(len(done), 'attack')} is {write_report(rows, folder)}; " if done else ""


def _attack_recorded(
    run: Path, folder: Path, evaluation: "AttackEvaluation", options: dict[str, Any], log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Attack what a run recorded -> the rows. Raises SettingError for an option that has no use there."""
    from attacks.recorded import ATTACKS, attack_run, attacked_rounds
    from tofu.models.checks import eager_code
    from tofu.recording import recordings, round_of

    among = attacked_rounds(run, options["recorded_rounds"])
    messages = recordings(run)
    count = sum(round_of(message) in among for message in messages)
    for name in _OF_MADE:
        if options[name]:
            raise SettingError(name, options[name], "a command without a recorded run: it says how messages are made")
    chosen, limit = evaluation.attacks if options["attacks"] else ATTACKS, options["time_limit"]
    longest = format_seconds(min(limit + evaluation.seconds, 2 * count * len(chosen) * evaluation.seconds))
    some = f" of {len(messages)}, from rounds {', '.join(map(str, among))}" if count < len(messages) else ""
    log(
        f"messages: {count}{some}; attacks on each and on its exact update: {len(chosen)}; "
        f"at most {longest}, and Ctrl-C leaves a report"
    )
    with eager_code():
        return attack_run(
            run, folder, attacks=chosen, rounds=options["recorded_rounds"], seconds=evaluation.seconds,
            time_limit=limit, model=options["model"], dataset=options["dataset"], log=log,
        )  # fmt: skip


def _evaluation(options: dict[str, Any]) -> "AttackEvaluation":
    """Return the trials that options ask for; a tuple is given as text.

    Raises SettingError for a value that is not usable.
    """
    import dataclasses

    from attacks.evaluate import AttackEvaluation

    fields = {field.name: field for field in dataclasses.fields(AttackEvaluation)}
    values = {name: value for name, value in options.items() if name in fields}
    for name, text in values.items():
        default: Any = fields[name].default
        if isinstance(default, tuple):
            kind = type(default[0])
            try:
                values[name] = tuple(map(kind, comma_list(text)))
            except ValueError as error:
                raise SettingError(name, text, "whole numbers separated by commas") from error
    return AttackEvaluation(**values)
