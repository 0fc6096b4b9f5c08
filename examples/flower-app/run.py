"""Run the app of a folder in this process, without ray: python examples/flower-app/run.py before|after [ROUNDS].

`flwr run examples/flower-app/after` runs the same app in Flower's simulation.
"""

import sys
import tomllib
from pathlib import Path

from tofu.flower.in_process import run_in_process

folder = Path(__file__).parent / sys.argv[1]
sys.path.insert(0, str(folder))

from digits_app import client_app, server_app  # noqa: E402  (of the folder)

config = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
if len(sys.argv) > 2:
    config["num-server-rounds"] = int(sys.argv[2])
run_in_process(server_app.app, client_app.app, run_config=config, num_supernodes=5)
