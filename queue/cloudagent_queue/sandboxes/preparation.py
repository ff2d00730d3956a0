"""What is done in a remote sandbox before it is used, and how one that lacks something is given it.

Shell, because a sandbox that was not made from our template may have nothing else yet. Run as root.
"""

from __future__ import annotations

from cloudagent_queue.sandboxes import inside

TEMPLATE_FOLDER = "/opt/cloudagent"
"""Where a template of ours has its interpreter: `bin/python` in there can import claude_agent_sdk."""

_HAS_LIBRARY = (
    "import sys, importlib.util as u; sys.exit(not (sys.version_info >= (3, 10) and u.find_spec('claude_agent_sdk')))"
)

CHECK = f"""
set -eu
cd {inside.FOLDER} 2>/dev/null || {{ mkdir -p {inside.FOLDER}; cd {inside.FOLDER}; }}
chmod 755 .
mkdir -p {inside.HOME}
printf '%s' "$CLOUDAGENT_INSIDE" > inside.py
found= missing=
IFS=:
for folder in {TEMPLATE_FOLDER}/bin {inside.FOLDER}/venv/bin $PATH; do
    for name in python3 python; do
        if [ -z "$found" ] && [ -x "$folder/$name" ] && "$folder/$name" -I -c "{_HAS_LIBRARY}" >/dev/null 2>&1; then
            found="$folder/$name"
        fi
    done
done
[ -n "$found" ] || missing="claude-agent-sdk"
command -v git >/dev/null || missing="git $missing"
if [ -n "$missing" ]; then
    printf '\\n{{"missing": "%s"}}\\n' "$missing"
    exit
fi
printf '#!/bin/sh\\nexec "%s" "$@"\\n' "$found" > python
chmod 755 python
exec ./python -I -S inside.py
"""
"""Finds an interpreter and git; the answer's last line is `{}` or `{"missing": "…"}`."""

_INSTALL = """
set -eu
if ! command -v git; then
    export DEBIAN_FRONTEND=noninteractive
    if command -v apt-get; then apt-get update; apt-get install -y --no-install-recommends git ca-certificates
    elif command -v apk; then apk add git
    elif command -v dnf; then dnf install -y git
    fi
fi
if python3 -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))"; then
    python3 -m venv venv
    venv/bin/python -m pip install --no-input "$CLOUDAGENT_LIBRARY"
else
    export UV_CACHE_DIR="$PWD/uv" UV_PYTHON_INSTALL_DIR="$PWD/pythons" UV_INSTALL_DIR="$PWD/bin" PATH="$PATH:$PWD/bin"
    command -v uv || python3 -m pip install --break-system-packages uv ||
        curl -LsSf https://astral.sh/uv/install.sh | sh
    uv venv --python 3.12 venv
    uv pip install --python venv/bin/python "$CLOUDAGENT_LIBRARY"
fi
chmod -R go+rX .
"""

START_INSTALLING = f"""
set -eu
cd {inside.FOLDER}
cat > install.sh <<'END_OF_INSTALL'
{_INSTALL}
END_OF_INSTALL
rm -f installed
setsid sh -c 'sh install.sh > install.log 2>&1; echo $? > installed.new; mv installed.new installed' \\
    </dev/null >/dev/null 2>&1 &
"""
INSTALLED = f"cat {inside.FOLDER}/installed 2>/dev/null || true"
"""Prints the exit code of the installation once it has ended."""
