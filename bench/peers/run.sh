#!/usr/bin/env bash
# Measures cowherd beside other programs: builds it if need be, installs what is measured beside it if that is allowed,
# and runs bench/peers with the part and the flags given. README.md here explains the parts and their tables.
set -euo pipefail
cd "$(dirname "$0")/../.."
make --no-print-directory build
scripts/clients.sh bench >&2
case ${1-} in
all | kernel) scripts/clients.sh interop >&2 ;;
esac
go build -trimpath -o bin/peers ./bench/peers
exec bin/peers "$@"
