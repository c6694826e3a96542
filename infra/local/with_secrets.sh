#!/usr/bin/env bash
# Runs a command with the database's password where libpq looks for it: in a file, not in the environment.
#
#     with_secrets.sh COMMAND [ARGUMENT ...]
set -euo pipefail
umask 077
printf 'postgres:5432:raystill:raystill:%s\n' "$(cat /run/secrets/postgres_password)" >"$HOME/.pgpass"
exec "$@"
