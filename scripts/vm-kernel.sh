#!/bin/sh
# A Debian kernel with its modules, unpacked in a directory and installed nowhere. Arguments: the directory; the suite it is taken from. Without
# that, and only if there is none yet, it is the newest of this machine's package sources, or of the backports beside them if those have none
# from 6.3 on. DIRECTORY/kernel points at it.
set -eu
to=$1 suite=${2:-}
lists=$(mktemp -d)
trap 'rm -rf "$lists"' EXIT
[ -n "$suite" ] || [ ! -e "$to/kernel/done" ] || exit 0
apt="-o APT::Sandbox::User=root"

# Version of a kernel that the sources have.
candidate() {
	apt-cache $apt policy linux-image-amd64 | sed -n 's/^  Candidate: //p' | grep -v none
}

apt-get $apt update -qq
if [ -n "$suite" ] || dpkg --compare-versions "$(candidate)" lt 6.3; then
	# The same archive, another suite: in lists of its own, so that this machine's sources stay what they are.
	site=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Label: Debian' 'Created-By: Packages' | head -1)
	uri=${site% *} codename=${site#* }
	mkdir -p "$lists/lists/partial" "$lists/cache/archives/partial"
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri ${suite:-$codename-backports} main" >"$lists/sources.list"
	apt="$apt -o Dir::Etc::sourcelist=$lists/sources.list -o Dir::Etc::sourceparts=- -o Dir::State::lists=$lists/lists -o Dir::Cache=$lists/cache"
	apt-get $apt update -qq
fi
package=$(apt-cache $apt show "linux-image-amd64=$(candidate)" | sed -n 's/^Depends: *\(linux-image-[^ ,]*\).*/\1/p' | head -1)
release=${package#linux-image-}
if [ ! -e "$to/$release/done" ]; then
	echo "unpacking $package" >&2
	(cd "$lists" && apt-get $apt download -qq "$package")
	rm -rf "${to:?}/$release"
	mkdir -p "$to/$release"
	dpkg -x "$lists"/linux-image-*.deb "$to/$release"
	/sbin/depmod -b "$to/$release" "$release"
	touch "$to/$release/done"
fi
ln -sfn "$release" "$to/kernel"
