"""`tofu settings`: every setting, as TOML or as a JSON schema."""

import json
from typing import Annotated

import typer

from tofu.settings import FIELDS, dashed, json_schema


def settings(schema: Annotated[bool, typer.Option("--schema", help="print a JSON schema")] = False) -> None:
    """Print every setting with its default, as a TOML file for `--config`; or the JSON schema of such a file."""
    if schema:
        print(json.dumps(json_schema(), indent=2))
        return
    for name, field in FIELDS.items():
        print(f"{f'{dashed(name)} = {json.dumps(field.default)}':<32}# {field.description}")
