#!/usr/bin/env bash
# Measures cowherd beside other NBD servers: builds it if need be, installs what is measured beside it if that is
# allowed, and runs bench/peers with the flags given. README.md here explains the table.
set -euo pipefail
cd "$(dirname "$0")/../.."
make --no-print-directory build
scripts/clients.sh bench >&2
[ "${1-}" != kernel ] || scripts/clients.sh interop >&2
go build -trimpath -o bin/peers ./bench/peers
exec bin/peers "$@"
