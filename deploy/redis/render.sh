#!/bin/sh
# Fills a sample in: @NAME@ becomes $NAME, @sha256:NAME@ its SHA-256. Reads the sample on stdin, writes on stdout.
# Values come from the environment, so that no password stands on a command line.
#
#   export ORCHESTRATORD_PASSWORD=$(openssl rand -hex 24) OPERATOR_PASSWORD=$(openssl rand -hex 24)
#   (umask 077; sh render.sh < users.acl > users.acl.new) && install -o redis -m 0600 users.acl.new /etc/redis/users.acl
set -eu
exec awk '
function fail(why) { print "render.sh: " why | "cat >&2"; failed = 1; exit 1 }
!/^#/ {
  while (match($0, /@(sha256:)?[A-Z_]+@/)) {
    before = substr($0, 1, RSTART - 1); token = substr($0, RSTART + 1, RLENGTH - 2); after = substr($0, RSTART + RLENGTH)
    name = token; sub(/^sha256:/, "", name)
    value = ENVIRON[name]
    if (value == "") fail("set " name " in the environment")
    if (value !~ /^[A-Za-z0-9._~-]+$/) fail(name " may hold A-Z a-z 0-9 . _ ~ - only (openssl rand -hex 24)")
    if (token != name) {
      command = "printf %s \"$" name "\" | sha256sum"
      command | getline value; close(command); sub(/ .*/, "", value)
    }
    $0 = before value after
  }
}
{ lines[NR] = $0 }
END { if (!failed) for (i = 1; i <= NR; i++) print lines[i] }
'
