"""The constant shell scripts of a bootstrap. They run under /bin/sh of a machine that may have nothing else.

No value is ever spliced into them: what varies goes in as files of a tar archive on stdin.
"""

MARK = "llorch-probe:"

PROBE = r"""
IFS= read -r wanted || wanted=
say() { printf 'llorch-probe:%s=%s\n' "$1" "$2"; }
say system "$(uname -s)"
say machine "$(uname -m)"
say home "$HOME"
say glibc "$(getconf GNU_LIBC_VERSION 2>/dev/null | sed 's/.* //')"
say tar "$(command -v tar)"
say driver "$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)"
data="${XDG_DATA_HOME:-$HOME/.local/share}"
say free_kib "$(df -Pk "$HOME" 2>/dev/null | awk 'NR==2 {print $4}')"
say command "$(test -x "$data/llorch/pool/current/bin/llorch-pool" && echo "$data/llorch/pool/current/bin/llorch-pool")"
own="$data/llorch/pool/python"
for name in python3.13 python3.12 python3.11 python3 python "$own"/cpython-3.1*/bin/python3.1[123]; do
  found=$(command -v "$name" 2>/dev/null) || continue
  version=$("$found" -c 'import sys, venv; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null </dev/null) || continue
  say python "$version $found"
done
if [ -n "$wanted" ]; then
  found=$(command -v "$wanted" 2>/dev/null)
  said=$("$found" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>&1 </dev/null | tail -n 1)
  case "$found" in
    /*) case "$said" in
      [0-9]*.[0-9]*.[0-9]*)
        if "$found" -c 'import venv' >/dev/null 2>&1 </dev/null; then say wanted "$said $found"
        else say wanted_problem "has no module venv"; fi;;
      *) say wanted_problem "is no Python that runs there${said:+: $said}";;
    esac;;
    *) say wanted_problem "is not there, or may not be run";;
  esac
fi
say end 1
"""
"""What the machine is. Prints `llorch-probe:<name>=<value>` lines; anything else is a banner.

The first line on stdin may name a Python, which is tried as well.
"""

# mktemp puts random letters where the template has an X.
STAGE = r"""
umask 077
dir=$(mktemp -d "${TMPDIR:-/tmp}/llorch-bootstrap.XXXXXX") || exit 73
cd "$dir" || exit 73
read -r bytes
head -c "$bytes" | tar xf - || { rm -rf "$dir"; exit 74; }
exec 3<&0
trap : TERM HUP
sh ./run.sh </dev/null 3<&- & child=$!
{ cat <&3 >/dev/null; kill -TERM 0; } 2>/dev/null & lifeline=$!
wait "$child"; rc=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; rc=$?; done
kill "$lifeline" 2>/dev/null
cd / && rm -rf "$dir"
exit "$rc"
"""
"""Unpack a tar archive (its size in bytes on the first line) into a private folder and run its run.sh.

stdin is the lifeline: when it ends, everything started here is ended (non-interactive ssh commands lead their own
process group) and the folder is removed.
"""

RUN = r"""
set -u
python=$(cat python)
if [ -z "$python" ]; then
  base="${XDG_DATA_HOME:-$HOME/.local/share}/llorch/pool"
  mkdir -p "$base/python"
fi
if [ -z "$python" ] && [ -f python.tar.gz ]; then
  echo '{"event":"progress","phase":"unpacking","text":"Python 3.12, since there is none from 3.11 on"}'
  new="$base/python/.new.$$"
  trap 'rm -rf "$new"; exit 143' TERM
  if mkdir "$new" && tar xzf python.tar.gz -C "$new" 2>tar.log; then
    for dir in "$new"/cpython-3.12.*; do
      python="$base/python/${dir##*/}/bin/python3.12"
      [ -x "$python" ] || mv "$dir" "$base/python/"
    done
    rm -rf "$new"
    trap - TERM
  else
    rm -rf "$new"
    tail -n 5 tar.log >&2
    echo '{"event":"end","rc":1,"failure":{"code":"bootstrap","message":"the Python that was carried over could not be unpacked","next_step":"free space there (in $HOME), or set XDG_DATA_HOME on the pool"}}'
    exit 1
  fi
fi
if [ -z "$python" ]; then
  chmod +x uv
  export UV_PYTHON_INSTALL_DIR="$base/python" UV_CACHE_DIR="$PWD/uv-cache" UV_NO_PROGRESS=1 UV_NO_CONFIG=1
  echo '{"event":"progress","phase":"downloading","text":"Python 3.12 (about 30 MiB), since there is none from 3.11 on"}'
  if ./uv python install --no-bin 3.12 >uv.log 2>&1; then
    python=$(./uv python find --no-project --managed-python 3.12)
  else
    tail -n 5 uv.log >&2
    echo '{"event":"end","rc":1,"failure":{"code":"bootstrap","message":"there is no Python 3.11 or newer on the pool, and uv could not download one","next_step":"install Python 3.11 or newer there, or let it reach the internet (UV_PYTHON_INSTALL_MIRROR is honoured), or carry one over: --source carry"}}'
    exit 1
  fi
fi
exec "$python" -I install.py
"""  # noqa: E501 - a JSON line is one line
"""run.sh: find or bring a Python, then install."""
