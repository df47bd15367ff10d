# Sourced by every script of this repository: afterwards `python` can import torchtitan_rd.
# First use makes .venv and installs the package with its dependencies at the versions of constraints.txt; later uses
# are instant. Nothing is made when the active environment has the package installed already.
#   EXTRAS=dev   also installs that group of optional dependencies (run_tests.sh and train_recurrent_demo.sh set it)
#   PYTHON=...   the interpreter that makes .venv (3.10 or newer)

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_is_installed() {  # -I: the repository's own folder must not count as an installation
    "$1" -I - "${EXTRAS:-}" <<'PY' 2>/dev/null
import importlib.metadata, sys
importlib.metadata.distribution("torchtitan_rd")
extras = {"dev": ("pytest", "pytest-timeout", "pytest-xdist", "ruff", "transformers"), "plots": ("matplotlib",)}
for name in extras.get(sys.argv[1], ()):
    importlib.metadata.distribution(name)
PY
}

_make_venv() {
    local python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "env.sh: $python is missing or older than Python 3.10; set PYTHON=/path/to/python3.10 or newer" >&2
        return 1
    fi
    echo "env.sh: setting up $_root/.venv (once; a few minutes)" >&2
    [ -x "$_root/.venv/bin/python" ] || "$python" -m venv "$_root/.venv" || return 1
    "$_root/.venv/bin/python" -m pip install --quiet -c "$_root/constraints.txt" -e "$_root${EXTRAS:+[$EXTRAS]}" || return 1
    _installed_from > "$_root/.venv/.installed${EXTRAS:+-$EXTRAS}"
}

_installed_from() {  # changes when the dependencies do, so that a `git pull` is followed by an install
    cat "$_root/pyproject.toml" "$_root/constraints.txt" | cksum
}

if ! { command -v python > /dev/null && _is_installed python; }; then
    if [ "$(cat "$_root/.venv/.installed${EXTRAS:+-$EXTRAS}" 2>/dev/null)" != "$(_installed_from)" ]; then
        # One installer at a time: several nodes or terminals may start together.
        exec {_lock}> "$_root/.venv.lock"
        command -v flock > /dev/null && flock "$_lock"
        if [ "$(cat "$_root/.venv/.installed${EXTRAS:+-$EXTRAS}" 2>/dev/null)" != "$(_installed_from)" ]; then
            _make_venv || { echo "env.sh: set-up failed; mend the cause above and run the same command again" >&2; exit 1; }
        fi
        exec {_lock}>&-
    fi
    # shellcheck disable=SC1091
    source "$_root/.venv/bin/activate"
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
