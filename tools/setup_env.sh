#!/usr/bin/env bash
# Makes ./.venv hold what is asked for: `tools/setup_env.sh run` (the stack) or `tools/setup_env.sh dev` (and the tests).
# Says what it does and what it downloads; does nothing when the last run already did it.
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:?usage: tools/setup_env.sh run|dev}
case $what in
  run) extras="worker,embedded"; size="about 70 MB of packages" ;;
  dev) extras="worker,embedded,dev"; size="about 170 MB of packages" ;;
  *) echo "tools/setup_env.sh: '$what' is neither run nor dev" >&2; exit 2 ;;
esac
torch=${TORCH:-$(grep '^torch==' constraints.txt)}

stamp_of() { printf '%s\n' "$1" "$torch" "${TORCH_PIP_ARGS:-}" | cat - pyproject.toml constraints.txt | cksum; }
for done in "$what" dev; do  # what dev installs includes what run needs
  if [ -f ".venv/.installed-$done" ] && [ "$(cat ".venv/.installed-$done")" = "$(stamp_of "$done")" ]; then exit 0; fi
done

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }
python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && usable "$candidate"; then python=$candidate; break; fi
  done
fi
if [ -z "$python" ] || ! usable "$python"; then
  cat >&2 <<'MSG'
llorch needs Python 3.11, 3.12 or 3.13 with its venv module, and found none.
  Debian, Ubuntu:  sudo apt install python3-venv        (Python itself: python3.11 or newer)
  any system:      install uv, then `uv python install 3.12`, then `make run PYTHON="$(uv python find 3.12)"`
MSG
  exit 1
fi

if [ ! -x .venv/bin/python ]; then
  echo "llorch: making ./.venv with $("$python" --version)"
  "$python" -m venv .venv
fi
pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip "$@"; }

if ! .venv/bin/python -c 'import torch' 2>/dev/null || [ -n "${TORCH:-}" ]; then
  echo "llorch: installing $torch. Where pip finds a CPU build it downloads about 200 MB; on Linux pip otherwise takes the"
  echo "        CUDA build, about 3 GB. To choose: make $([ "$what" = run ] && echo run || echo test) TORCH='torch==X.Y.Z' TORCH_PIP_ARGS='--index-url <wheel index of the build you want>'"
  # shellcheck disable=SC2086
  pip install --quiet ${TORCH_PIP_ARGS:-} "$torch"
fi
echo "llorch: installing llorch[$extras] into ./.venv ($size)"
pinned=.venv/constraints.txt
grep -v '^torch==' constraints.txt > "$pinned"
.venv/bin/python -c 'import torch; print("torch==" + torch.__version__)' >> "$pinned"
pip install --quiet --constraint "$pinned" --editable ".[$extras]"
stamp_of "$what" > ".venv/.installed-$what"
