#!/usr/bin/env bash
# Keeps `raystill watch-spot` beside Ray: it drains this node when EC2 announces the machine's end. On a machine that is
# not spot it asks every five seconds and hears nothing.
#
# A unit of systemd, since what a start command leaves in the background goes with its connection, and so that it is
# begun again should it fail. One that watched for the Ray before is ended first: that node has another id.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
sudo systemctl stop raystill-watch-spot 2>/dev/null || true
sudo systemd-run --quiet --collect --unit=raystill-watch-spot --uid="$(id -un)" \
    --property=Restart=on-failure --property=RestartSec=5 \
    bash -c ". $here/environment && exec raystill watch-spot"
