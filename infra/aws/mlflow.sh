#!/usr/bin/env bash
# Starts MLflow on the head, for the head: it knows no users, so nothing else may reach it. Jobs run on the head and
# talk to it there; people tunnel (README.md). Does nothing where it runs already.
set -euo pipefail
curl --silent --fail --output /dev/null http://127.0.0.1:5000/health && exit 0
mkdir -p "$HOME/raystill/log"
# The store's address comes from the environment: a command line can be read by others.
MLFLOW_BACKEND_STORE_URI=${RAYSTILL_DATABASE_URL/postgresql:/postgresql+psycopg:}
export MLFLOW_BACKEND_STORE_URI
nohup mlflow server --host 127.0.0.1 --port 5000 --workers 2 --artifacts-destination "s3://$RAYSTILL_BUCKET/mlflow" \
    </dev/null >>"$HOME/raystill/log/mlflow.log" 2>&1 &
