"""What it takes to hand a large working tree to a server, and to apply a large result, as ratios to what git itself
takes. Gates nothing."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from random import Random

import anyio
import pytest

from cloudagent_mcp.apply import apply, undo
from cloudagent_mcp.hand_over import for_server
from cloudagent_mcp.remote_server import RemoteServer
from cloudagent_mcp.settings import Settings
from cloudagent_queue.repository import bundle_working_tree
from tests.support.git_repos import Workshop
from tests.support.served import KEY, served
from tests.support.worlds import World, git

pytestmark = pytest.mark.benchmark

FILES, CHANGED, APPLIED, ROUNDS = 10_000, 10, 1_000, 3


def write(folder: Path, number: int, seed: int) -> None:
    """A file of 2 KB, as far from and as near to its neighbours as source code is."""
    words = Random(seed * FILES + number).choices(range(300), k=400)
    path = folder / f"d{number % 100}" / f"f{number}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(f"x{word}" for word in words))


def large_tree(folder: Path) -> Path:
    """A repository of such files, packed."""
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "gc.auto", "0")
    for number in range(FILES):
        write(folder, number, 0)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")
    git(folder, "gc", "-q")
    return folder


def bundle(folder: Path, *what: str) -> tuple[float, int]:
    """Seconds and bytes of what git itself makes of something that is committed."""
    started = time.monotonic()
    # To a pipe: a file that is named is replaced by another, also where it is a device.
    done = subprocess.run(["git", "bundle", "create", "-q", "-", *what], cwd=folder, check=True, capture_output=True)
    return time.monotonic() - started, len(done.stdout)


def test_upload_of_a_large_tree(world: World, tmp_path: Path) -> None:
    folder = large_tree(tmp_path / "large")

    def change(seed: int) -> None:
        for number in range(CHANGED):
            write(folder, number * 100 + seed, seed)

    with served(world) as url:
        settings = Settings.read(
            {"CLOUDAGENT_URL": url, "CLOUDAGENT_API_KEY": KEY, "CLOUDAGENT_HOME": str(tmp_path / "elsewhere")}
        )

        def upload() -> tuple[float, float]:
            """Seconds until the server has it, and bytes that went."""
            sizes = [0.0]

            async def tell(_: float, total: float, message: str) -> None:
                if message.startswith("Upload"):
                    sizes.append(total)

            async def run() -> None:
                async with RemoteServer(settings) as server:
                    place = await for_server(server, folder, None, None, may_upload=True, tell=tell)
                    assert str(place["repository"]).startswith("upload:"), place

            started = time.monotonic()
            anyio.run(run)
            return time.monotonic() - started, sizes[-1]

        print(
            f"\n{FILES} files, {CHANGED} changed and not committed; seconds until the server has it, and what was sent"
        )
        floor, size = bundle(folder, "HEAD")
        change(1)
        first, sent = upload()
        print(f"  first:  {first:.2f} s, {sent / 1e3:.0f} kB; git bundle create {floor:.2f} s, {size / 1e3:.0f} kB")
        print(f"          {first / floor:.1f}x the time, {sent / size:.2f}x the bytes")
        for seed in range(2, 2 + ROUNDS):
            change(seed)
            again, sent = upload()
            git(folder, "stash", "-q")  # a commit of the same changes
            floor, size = bundle(folder, "refs/stash", "^HEAD")
            git(folder, "stash", "pop", "-q")
            print(f"  again:  {again:.2f} s, {sent / 1e3:.0f} kB; git bundle create {floor:.2f} s, {size / 1e3:.0f} kB")
        same, sent = upload()
        print(f"  as it was: {same:.2f} s, {sent:.0f} bytes")


def test_apply_of_a_large_result(tmp_path: Path) -> None:
    shop = large_tree(tmp_path / "shop")
    workshop = Workshop(tmp_path / "workshop", bundle_working_tree(shop, base_ref=None).bundle)
    changed = [path.relative_to(shop) for path in sorted(shop.glob("d*/*.py"))[:APPLIED]]
    result = workshop.result({str(path): f"{(shop / path).read_text()}\nmore" for path in changed})
    diff = ["diff", "--binary", "--full-index", result.base_sha, result.branch]
    patch = subprocess.run(["git", *diff], cwd=workshop.folder, check=True, capture_output=True).stdout

    git(tmp_path, "clone", "-q", str(shop), "floor")

    def by_git() -> float:
        # What an earlier round has written is there already, and git takes a file for changed that was written anew.
        git(tmp_path / "floor", "reset", "-q", "--hard")
        git(tmp_path / "floor", "prune", "--expire=now")
        started = time.monotonic()
        subprocess.run(["git", "apply", "--3way"], cwd=tmp_path / "floor", input=patch, check=True, capture_output=True)
        return time.monotonic() - started

    def by_us() -> tuple[float, float]:
        started = time.monotonic()
        apply(shop, **result.given, state_folder=tmp_path / "state")
        applied = time.monotonic()
        undo(shop, task_id=result.task_id, state_folder=tmp_path / "state")
        return applied - started, time.monotonic() - applied

    print(f"\n{APPLIED} of {FILES} files changed")
    for _ in range(ROUNDS):
        floor, (applied, undone) = by_git(), by_us()
        print(f"  git apply --3way {floor:.2f} s; apply {applied:.2f} s ({applied / floor:.1f}x); undo {undone:.2f} s")
