# In a container of systemd.Dockerfile: a federation of two nodes, and a third under systemd, as the units' comments say.
set -euo pipefail
python=/opt/tofu-fl/.venv/bin/python here=/etc/tofu-fl federation=/root/federation
mkdir -p $here /srv/tofu-data
$python -m deploy.certificates $here --node node
$python -m deploy.certificates $here/local --host 127.0.0.1
head -c 32 /dev/urandom >$here/superexec
chgrp -R tofu-data /srv/tofu-data && chmod -R g+rX,o= /srv/tofu-data

$python -m tofu.cli deploy up --nodes 2 --folder $federation
cp $federation/keys/ca.crt $here/ca.crt
address=$($python - <<PYTHON
from pathlib import Path
from deploy.control import Control
from deploy.state import State
folder = Path("$federation")
address, keys = State.read(folder).address, folder / "keys"
Control(folder / "homes", address, keys / "ca.crt", keys / "control-token").register(Path("$here/node.pub"), "systemd")
print(address)
PYTHON
)
cat >$here/node.env <<ENV
SUPERLINK=$address
NODE_CONFIG='data="/srv/tofu-data" partition-id=2 journal="/var/lib/tofu-node-exec/rounds.db"'
ENV

systemctl daemon-reload
systemctl enable --now tofu-node tofu-node-exec
$python -m tofu.cli deploy run --folder $federation --clients 3 --min-clients 3 --rounds 2 --local-epochs 1 --max-evals 2
systemctl is-active tofu-node tofu-node-exec
$python -m tofu.cli deploy down --folder $federation
systemctl stop tofu-node
systemctl show --property Result --property ExecMainStatus tofu-node tofu-node-exec
cat $federation/runs/run-1/metrics.jsonl
