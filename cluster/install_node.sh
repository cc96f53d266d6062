#!/usr/bin/env bash
# Prepares one node, once or again: the environment of its shells, the token's mode, Python with moe_runtime.
# The cluster files ship it to ~/moe_runtime/install.sh and run it as a setup command.
#   MOE_PYTHON   the interpreter of the new virtual environment: Python 3.11 or newer (python3)
#   MOE_PIP_ARGS more arguments of pip, such as an index or a folder of wheels
set -euo pipefail
cd ~/moe_runtime
python=venv/bin/python
ray_version=$(sed -n 's/^ray==//p' src/constraints.txt)

# Another mode would let every user of the node run code on the cluster.
chmod 700 ~/.ray
chmod 600 ~/.ray/auth_token

# `ray exec`, `ray stop` and `ray attach` run login shells, and need Ray and the token's mode there.
grep -qsF moe_runtime/env.sh ~/.bashrc || echo '[ ! -r ~/moe_runtime/env.sh ] || . ~/moe_runtime/env.sh' >> ~/.bashrc

# What this node alone is: an administrator may write Ray labels here, such as `ray.io/accelerator-type: A100`. For the
# GPUs it knows, Ray finds that one by itself.
[ -e labels.yaml ] || echo '{}' > labels.yaml

# Ray refuses nodes of another version. The package itself is an editable install: it is always what was shipped last.
if ! "$python" -c "import moe_runtime, ray, sys; sys.exit(ray.__version__ != '$ray_version')" 2>/dev/null; then
  [ -x "$python" ] || "${MOE_PYTHON:-python3}" -m venv venv
  # shellcheck disable=SC2086  # several words are several arguments
  "$python" -m pip install --quiet ${MOE_PIP_ARGS:-} --constraint src/constraints.txt --editable 'src[runtime]'
fi
