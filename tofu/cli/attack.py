"""`tofu attack`: what each kind of message leaks."""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tofu.cli.options import Json, Quiet
from tofu.errors import SettingError
from tofu.formatting import printable
from tofu.settings.deprecated import warn_once

if TYPE_CHECKING:
    from attacks.evaluate import AttackEvaluation


def _several(flag: str, help_: str) -> Any:
    return typer.Option(flag, help=f"{help_}; several are separated by commas", show_default=False)


def attack(
    run: Annotated[
        Path | None,
        typer.Argument(help="folder of a run with --record-clients or of tofu.record; without it, messages are made"),
    ] = None,
    *,
    folder: Annotated[Path | None, typer.Option(help="folder of the results; finished trials are not repeated")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="dataset of the messages that are made; of an app, package.module:function")
    ] = None,
    model: Annotated[str | None, typer.Option(help="model; of an app, package.module:function")] = None,
    norm: Annotated[str | None, typer.Option(help="normalization layers")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate of the client")] = None,
    messages: Annotated[
        str | None, _several("--messages", "kinds of message, such as exact or proxy:smooth:100")
    ] = None,
    attacks: Annotated[str | None, _several("--attacks", "registered names or package.module:Class")] = None,
    batch_sizes: Annotated[str | None, _several("--batch-sizes", "numbers of images in a local step")] = None,
    pretrain_rounds: Annotated[
        str | None, _several("--pretrain-rounds", "numbers of federated rounds before the message")
    ] = None,
    moments: Annotated[str | None, typer.Option(hidden=True)] = None,
    steps: Annotated[str | None, _several("--steps", "numbers of local steps")] = None,
    seeds: Annotated[int | None, typer.Option(help="number of seeds")] = None,
    rounds: Annotated[int | None, typer.Option(help="number of rounds that the attacker accumulates")] = None,
    know_labels: Annotated[bool, typer.Option("--know-labels", help="give the attacker the labels")] = False,
    seconds: Annotated[float | None, typer.Option(help="time limit of one attack")] = None,
    time_limit: Annotated[
        float, typer.Option(help="seconds after which no trial starts", show_default=False)
    ] = math.inf,
    threads: Annotated[int, typer.Option(help="threads of torch")] = 1,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what messages leak: those of a recorded run, or messages that are made for the purpose."""
    import torch

    from attacks.evaluate import evaluate
    from attacks.recorded import ATTACKS, attack_run
    from attacks.report import print_tables, write_report

    torch.set_num_threads(threads)
    if moments is not None:
        warn_once("option moments is deprecated: use pretrain-rounds")
        pretrain_rounds = pretrain_rounds or moments

    def log(line: str) -> None:
        if not quiet:
            print(printable(line), file=sys.stderr, flush=True)

    given = {
        "dataset": dataset, "model": model, "norm": norm, "lr": lr, "messages": messages, "attacks": attacks,
        "batch_sizes": batch_sizes, "pretrain_rounds": pretrain_rounds, "steps": steps, "seeds": seeds,
        "rounds": rounds, "know_labels": know_labels, "seconds": seconds,
    }  # fmt: skip
    evaluation = _evaluation({name: value for name, value in given.items() if value is not None})
    if run is not None:
        folder = folder or run / "attacks"
        chosen = ATTACKS if attacks is None else tuple(attacks.split(","))
        rows = attack_run(
            run, folder, attacks=chosen, seconds=evaluation.seconds, model=model, dataset=dataset, log=log
        )
    else:
        folder = folder or Path("runs/attacks")
        rows = evaluate(evaluation, folder, log=log, seconds=time_limit)
    page = write_report(rows, folder)
    if json_:
        print(json.dumps(rows))
        return
    print_tables(rows)
    print(f"\nreport: {page}")


def _evaluation(given: dict[str, Any]) -> "AttackEvaluation":
    """An `AttackEvaluation` from options; tuples are given as text. Raises SettingError for a value out of range."""
    import dataclasses

    from attacks.evaluate import AttackEvaluation

    for field in dataclasses.fields(AttackEvaluation):
        if field.name in given and isinstance(field.default, tuple):
            kind = type(field.default[0])
            try:
                parts = tuple(kind(part.strip()) for part in given[field.name].split(",") if part.strip())
            except ValueError as error:
                raise SettingError(field.name, given[field.name], "whole numbers separated by commas") from error
            given[field.name] = parts
    return AttackEvaluation(**given)
