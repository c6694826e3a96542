#!/usr/bin/env bash
# Makes a node of Amazon Linux 2023 able to run raystill: Python 3.11, the wheel at the pinned versions, and a file
# `environment` that every Ray process starts from. Run again, it changes nothing but raystill, which it installs anew.
#
#     setup.sh REGION DATABASE_HOST SECRET_ARN BUCKET
set -euo pipefail
region=$1 host=$2 secret=$3 bucket=$4
here=$(cd "$(dirname "$0")" && pwd)

if ! command -v python3.11 >/dev/null || ! command -v crond >/dev/null; then
    sudo dnf install --quiet --assumeyes python3.11 python3.11-pip cronie
fi
test -x "$here/venv/bin/python" || python3.11 -m venv "$here/venv"
wheel="$here/raystill-0.1.0-py3-none-any.whl"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check --constraint "$here/constraints.txt" \
    "raystill[postgres] @ file://$wheel"
# A wheel that was built again has the version of the one before, and to pip that is the same.
"$here/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --force-reinstall "$wheel"
chmod 600 "$HOME/.ray/auth_token"

# No password: libpq reads it from a file that only this user can read (database.sh).
cat >"$here/environment" <<VARIABLES
export PATH="$here/venv/bin:\$PATH"
export RAY_AUTH_MODE=token
export RAYSTILL_DATABASE_URL="postgresql://raystill@$host:5432/mlflow?sslmode=require"
export RAYSTILL_BUCKET="$bucket"
export AWS_DEFAULT_REGION="$region"
export MLFLOW_TRACKING_URI=http://127.0.0.1:5000
export MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false
export HF_HUB_OFFLINE=1
VARIABLES

# AWS rotates the password: ask again every ten minutes.
bash "$here/database.sh" "$region" "$host" "$secret"
sudo systemctl enable --quiet --now crond
echo "*/10 * * * * bash $here/database.sh $region $host $secret" | crontab -
