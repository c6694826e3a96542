#!/usr/bin/env bash
# Writes the database's password from Secrets Manager to ~/.pgpass, where libpq looks for it. It is in no command line,
# no environment and no log.
#
#     database.sh REGION HOST SECRET_ARN
set -euo pipefail
umask 077
region=$1 host=$2 secret=$3
new=$(mktemp "$HOME/.pgpass.XXXXXX")
trap 'rm -f "$new"' EXIT
aws secretsmanager get-secret-value --region "$region" --secret-id "$secret" --query SecretString --output text |
    python3 -c '
import json, sys
escaped = json.load(sys.stdin)["password"].replace("\\", "\\\\").replace(":", "\\:")
print(f"{sys.argv[1]}:5432:mlflow:raystill:{escaped}")' "$host" >"$new"
mv "$new" "$HOME/.pgpass"
