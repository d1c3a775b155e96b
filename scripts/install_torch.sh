#!/bin/sh
# Install PyTorch into a virtual environment: the CPU build where there is no NVIDIA GPU.
#
#   scripts/install_torch.sh .venv/bin/python
#   TORCH_VERSION=2.12.0 scripts/install_torch.sh .venv/bin/python   # another version than the tested one, or "newest"
#
# A plain `pip install torch` on Linux brings several GB of CUDA packages, wanted only where there is a GPU. So:
#   1. torch is there already           -> do nothing
#   2. a GPU is there (nvidia-smi)      -> plain install
#   3. the configured package index gives a build without CUDA packages (macOS, Windows, an index of CPU wheels)
#                                       -> plain install
#   4. otherwise                        -> the CPU wheels of download.pytorch.org
set -eu

python=${1:?usage: $0 path/to/python}
tested=2.13.0
version=${TORCH_VERSION:-$tested}
cpu_index=https://download.pytorch.org/whl/cpu

pip() { "$python" -m pip --disable-pip-version-check "$@"; }

# find_spec, not import: importing torch takes seconds.
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    exit 0
fi

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; }

# The newest release of which a build for this machine can be had; the tested one if none can be looked up.
if [ "$version" = newest ]; then
    # On Linux without a GPU the configured index does not count: its newest release has CUDA packages.
    where="--isolated --index-url $cpu_index"
    if has_gpu || [ "$(uname -s)" != Linux ]; then where=; fi
    # shellcheck disable=SC2086
    version=$("$python" -m pip index versions torch $where --retries 0 --timeout 15 2>/dev/null \
        | sed -n 's/^torch (\([0-9.]*\).*/\1/p') || true
    [ -n "$version" ] || echo "The newest torch for this machine cannot be looked up: taking $tested"
    version=${version:-$tested}
fi

if has_gpu; then
    echo "GPU found: installing torch $version with CUDA"
    pip install --quiet "torch==$version"
    exit 0
fi

# `--report` lists what would be installed; `--dry-run` fetches metadata only (not the wheel, on PyPI).
echo "No GPU found: installing the CPU build of torch $version"
if plan=$(pip install --quiet --dry-run --report - "torch==$version" 2>/dev/null) \
    && ! printf '%s' "$plan" | grep -Eiq '"name": *"(nvidia[-_]|cuda[-_]|triton)'; then
    pip install --quiet "torch==$version"
elif ! pip install --quiet --retries 0 --timeout 15 "torch==$version+cpu" --extra-index-url "$cpu_index"; then
    echo "error: this machine has no GPU, the package index offers torch $version only with CUDA packages, and" >&2
    echo "       $cpu_index cannot be reached. Install a CPU build of torch yourself" >&2
    echo "       ($python -m pip install ...) and run make again." >&2
    exit 1
fi
