#!/usr/bin/env bash
# Start a Docker engine and make what tests/deploy/test_containers.py needs of images.
#
#   start.sh FOLDER        as root, where apt has docker.io; exit status 77 with the reason: no engine can be had
#
# FOLDER keeps the engine's data between runs (10 GB) and has its socket, FOLDER/docker.sock, and its number, FOLDER/dockerd.pid.
# DOCKER_HOST=... uses an engine that runs. Images that the engine lacks are built from Debian's packages and pip's (*.Dockerfile
# beside this file): `docker compose pull` before this script takes the real ones. DEBIAN=trixie makes them with Python 3.13; the
# folder is then one of its own. For that Python, PyPI has torch for CUDA only: set TORCH_INDEX to nothing in the tests.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd) repository=$(cd "$(dirname "$0")/../../.." && pwd)
mkdir -p "$1" && folder=$(cd "$1" && pwd)
skip() { echo "no Docker engine: $*"; exit 77; }
missing() { ! command -v "$1" >/dev/null; }

install_engine() {
    local packages=()
    missing dockerd && packages+=(docker.io iptables)
    missing mmdebstrap && packages+=(mmdebstrap)
    [ ${#packages[@]} = 0 ] && return
    [ "$(id -u)" = 0 ] && ! missing apt-get || return 1
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}"; } >/dev/null 2>&1
}

start_engine() {
    [ -n "${DOCKER_HOST:-}" ] && return
    export DOCKER_HOST=unix://$folder/docker.sock
    docker info >/dev/null 2>&1 && return
    setsid dockerd --data-root "$folder/data" --exec-root "$folder/exec" --pidfile "$folder/dockerd.pid" -H "$DOCKER_HOST" \
        >"$folder/dockerd.log" 2>&1 </dev/null &
    for _ in {1..60}; do docker info >/dev/null 2>&1 && return || sleep 1; done
    return 1
}

install_compose() {  # Debian 12's docker-compose is version 1, which cannot read the file: take Debian 13's
    docker compose version >/dev/null 2>&1 && return
    local apt=$folder/apt plugins=/usr/local/lib/docker/cli-plugins mirror
    mkdir -p "$apt"/{lists/partial,cache/archives/partial} $plugins
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Release: bookworm' | head -1)
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$apt/trixie.list"
    local options=(-o Dir::Etc::SourceList="$apt/trixie.list" -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists="$apt/lists" -o Dir::Cache="$apt/cache")
    (cd "$apt" && apt-get "${options[@]}" update -qq && apt-get "${options[@]}" download -qq docker-compose && dpkg -x docker-compose_*.deb .) >/dev/null 2>&1
    install "$apt/usr/libexec/docker/cli-plugins/docker-compose" $plugins/
}

has() { docker image inspect "$1" >/dev/null 2>&1; }
build() { docker build -q --network host "$@" >/dev/null 2>"$folder/build.log"; }
make_debian() {  # the root of all stand-ins
    has standin/debian && return
    [ -f "$folder/debian.tar" ] || mmdebstrap --quiet --variant=minbase --include=ca-certificates,nginx-light,python3-venv,wget \
        "${DEBIAN:-bookworm}" "$folder/debian.tar"
    docker import "$folder/debian.tar" standin/debian-root >/dev/null
    mkdir -p "$folder/root" && cp /etc/ssl/certs/ca-certificates.crt "$folder/root/"
    printf 'FROM standin/debian-root\nCOPY ca-certificates.crt /etc/ssl/certs/\n' | build -t standin/debian -f - "$folder/root"
}

install_engine || skip "installing docker.io needs root, apt-get and a Debian mirror"
start_engine || skip "it does not start: $(tail -1 "$folder/dockerd.log")"
install_compose || skip "Compose v2 cannot be had"
base=$(sed -n 's/^FROM \([^ ]*\).*/\1/p' "$repository/deploy/Dockerfile")
for image in $base $(docker compose -f "$repository/deploy/compose.yaml" config --images); do
    has "$image" && continue
    case $image in
        flwr/*)
            make_debian
            version=${image#*:}
            has "standin/flwr:$version" || build -t "standin/flwr:$version" -f "$here/flwr.Dockerfile" --build-arg FLWR_VERSION="$version" \
                --build-arg PIP_INDEX_URL="$(pip config get global.index-url 2>/dev/null || true)" "$folder/root"
            command=${image#flwr/}
            printf 'FROM standin/flwr:%s\nENTRYPOINT ["flower-%s"]\n' "$version" "${command%:*}" | build -t "$image" - ;;
        nginx:*) make_debian && build -t "$image" -f "$here/nginx.Dockerfile" "$folder/root" ;;
    esac
done
