#!/usr/bin/env bash
# Makes the local stack's passwords, each once; what is there stays. The directory is closed to others; the files are
# not, since each container reads the ones that are given to it as a user of its own.
set -euo pipefail
directory=$(cd "$(dirname "$0")" && pwd)/secrets
mkdir -p "$directory"
chmod 700 "$directory"
umask 022

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

once() { # once NAME TEXT: keeps what is there
    test -s "$directory/$1" || printf '%s' "$2" >"$directory/$1"
}

once ray_token "$(random)"
once postgres_password "$(random)"
once grafana_password "$(random)"
once s3_key "$(random)"
once s3_secret "$(random)"
key=$(cat "$directory/s3_key") secret=$(cat "$directory/s3_secret")
once s3_credentials "[default]
aws_access_key_id = $key
aws_secret_access_key = $secret
"
once s3_identities.json "{\"identities\": [{\"name\": \"raystill\", \"credentials\": [{\"accessKey\": \"$key\", \"secretKey\": \"$secret\"}], \"actions\": [\"Admin\", \"Read\", \"Write\", \"List\", \"Tagging\"]}]}
"
echo "secrets are in $directory"
