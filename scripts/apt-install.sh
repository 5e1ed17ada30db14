#!/bin/sh
# Install the Debian packages named, those only that are missing; quiet when there is nothing to do.
set -eu
missing=
for p in "$@"; do
	dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $p"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ]; then
	echo "missing Debian packages:$missing — run 'apt-get install$missing' as root" >&2
	exit 1
fi
echo "installing$missing" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Packages such as etcd-server would start a service of their own: Fibril runs its own, so keep them from starting.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod +x $policy
	trap 'rm -f $policy' EXIT
fi
log=$(mktemp)
# shellcheck disable=SC2086  # a list of words
if ! apt-get install -y -qq --no-install-recommends $missing >"$log" 2>&1; then
	cat "$log" >&2
	exit 1
fi
rm -f "$log"
