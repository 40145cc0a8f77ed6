# Sourced by the scripts that start on a fresh machine, from the top of the checkout: makes .venv once, installs this
# checkout into it with what tests and exports need, and puts it first on PATH. CLIPCID_VENV names another environment,
# TORCH_INDEX_URL the index that PyTorch, and nothing else, is taken from.
venv=${CLIPCID_VENV:-.venv}
stamp=$venv/.clipcid-installed
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "clipcid needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON to one." >&2
        exit 1
    }
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    echo "Installing clipcid into $venv (PyTorch is large: minutes on a fresh machine) ..." >&2
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        "$venv/bin/python" -m pip install --progress-bar off torch torchvision --index-url "$TORCH_INDEX_URL" >&2
    fi
    if [ -t 2 ]; then
        "$venv/bin/python" -m pip install --editable '.[test]' >&2
    else # a line for each package that is fetched; awk would wait for 4 kB of them
        "$venv/bin/python" -m pip install --progress-bar off --editable '.[test]' |
            while read -r word package _; do
                if [ "$word" = Collecting ]; then echo "  $package" >&2; fi
            done
    fi
    touch "$stamp"
fi
export PATH="$(cd "$venv" && pwd)/bin:$PATH"
