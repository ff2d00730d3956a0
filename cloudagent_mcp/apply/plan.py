"""What an apply would do to each file, decided as a whole before the first write."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cloudagent_mcp.apply.journal import Step
from cloudagent_mcp.apply.layers import Layers
from cloudagent_mcp.apply.policy import folded, link_goal, listed, unsafe
from cloudagent_mcp.apply.tree import File, InTheWay, Tree, same
from cloudagent_queue import git
from cloudagent_queue.repository import ChangedFile, LocalRepository, Quarantine
from cloudagent_storage.errors import ApplyConflict

_SYMLINK = "120000"


def make_plan(
    quarantine: Quarantine,
    files: Sequence[ChangedFile],
    tree: Tree | None,
    repository: LocalRepository | None,
    earlier: Layers,
) -> list[Step]:
    """The writes that bring the result into a working tree; none when it is there already.

    With W the file here, B the base's and R the result's: W = R needs nothing; W = B becomes R; a W that the user has
    committed meanwhile, or that is as an `earlier` result left it, is merged with R. Anything else, and a merge that
    does not work out, is a conflict. Of results that R goes on from, W is what was there before them.
    Raises `ApplyConflict` and `UnsafeChange`, naming the files.
    """
    base = _contents(quarantine, {f.path: (f.old_mode, f.old_id) for f in files}, repository)
    result = _contents(quarantine, {f.path: (f.new_mode, f.new_id) for f in files}, repository)
    deleted = {path for path in base if path not in result}
    modes_count = repository is None or _modes_count(repository)
    steps: list[Step] = []
    to_merge: list[Step] = []
    under = earlier.under
    conflicts: list[str] = []
    for file in files:
        try:
            here = _here(tree, file.path, deleted)
        except InTheWay as obstacle:
            # A folder that this very plan empties is no obstacle to a file in its place.
            if tree is None or obstacle.path != file.path or not _is_emptied(tree, file.path, deleted):
                conflicts.append(obstacle.path)
                continue
            here = None
        before, after = base.get(file.path), result.get(file.path)
        if same(here, after, modes_count=modes_count):
            continue
        if after is not None and not modes_count and here is not None:
            after = File(after.data, mode=here.mode, link=after.link)
        if same(under.get(file.path, here), before, modes_count=modes_count):
            steps.append(Step(file.path, here, after))
        else:
            to_merge.append(Step(file.path, here, after))
    clean = _committed(repository, to_merge) | {s.path for s in to_merge if earlier.left(s.path, s.before)}
    for step in to_merge:
        ours = Step(step.path, under.get(step.path, step.before), step.after)
        merged = _merged(ours, base.get(step.path)) if step.path in clean else None
        if merged is None:
            conflicts.append(step.path)
        elif not same(merged, step.before):
            steps.append(Step(step.path, step.before, merged, merged=True))
    if conflicts:
        names = sorted(set(conflicts))
        raise ApplyConflict(
            f"Changed here as well as in the task: {listed(names)}. Nothing was written.",
            files=[(name, "changed here as well as in the task") for name in names],
        )
    if tree is not None:
        named = {file.path for file in files}
        taken_back = [Step(path, tree.read(path), original) for path, original in under.items() if path not in named]
        steps += [step for step in taken_back if step.before != step.after]
        deleted |= {step.path for step in taken_back if step.after is None}
        _check_surroundings(tree, steps, deleted)
    return steps


def _contents(
    quarantine: Quarantine, entries: Mapping[str, tuple[str, str]], repository: LocalRepository | None
) -> dict[str, File]:
    """Files as a checkout in this working tree would write them: with its line ends, but without any filter program."""
    found: dict[str, File] = {}
    regular = {path: entry for path, entry in entries.items() if entry[0] in ("100644", "100755")}
    links = {path: name for path, (mode, name) in entries.items() if mode == _SYMLINK}
    targets = quarantine.contents(links.values())
    found |= {path: File(targets[name], mode=0o777, link=True) for path, name in links.items()}
    with tempfile.TemporaryDirectory(prefix="cloudagent-apply-") as temporary:
        there = Path(temporary) / "files"
        there.mkdir()
        env = {
            "GIT_DIR": str(quarantine.folder),
            "GIT_WORK_TREE": str(repository.top if repository else there),
            "GIT_INDEX_FILE": str(Path(temporary) / "index"),
        }
        folder = repository.top if repository else there
        settings = repository.settings if repository else ()
        index = "".join(f"{mode} {name} 0\t{path}\0" for path, (mode, name) in regular.items()).encode()
        git.run("update-index", "-z", "--index-info", stdin=index, folder=folder, env=env, settings=settings)
        checkout = ["checkout-index", "--all", "--force", f"--prefix={there}{os.sep}"]
        git.run(*checkout, folder=folder, env=env, settings=settings)
        for path, (mode, _) in regular.items():
            found[path] = File((there / path).read_bytes(), mode=0o755 if mode == "100755" else 0o644)
    return found


def _here(tree: Tree | None, path: str, deleted: set[str]) -> File | None:
    """The file here. A file that this plan deletes may become a folder. Raises `InTheWay`."""
    if tree is None:
        return None
    try:
        return tree.read(path)
    except InTheWay as obstacle:
        if obstacle.path != path and obstacle.path in deleted:
            return None
        raise


def _modes_count(repository: LocalRepository) -> bool:
    return repository.run("config", "--type=bool", "--default=true", "--get", "core.fileMode").text != "false"


def _committed(repository: LocalRepository | None, steps: Sequence[Step]) -> set[str]:
    """Those files that are here as the user's HEAD has them."""
    if repository is None or not steps or repository.commit("HEAD") is None:
        return set()
    paths = [step.path for step in steps]
    literal = {"GIT_LITERAL_PATHSPECS": "1"}
    listing = repository.run("ls-tree", "-r", "-z", "--name-only", "HEAD", "--", *paths, env=literal)
    options = ["--name-only", "-z", "--no-ext-diff", "--no-textconv", "--no-renames", "--ignore-submodules=all"]
    dirty = repository.run("diff", *options, "HEAD", "--", *paths, env=literal)
    known, changed = (set(done.out.decode("utf-8", "surrogateescape").split("\0")) for done in (listing, dirty))
    return known - changed - {""}


def _merged(step: Step, base: File | None) -> File | None:
    """The user's file with the task's changes to it, or None when they cannot both be had."""
    here, after = step.before, step.after
    if here is None or after is None or base is None or here.link or after.link or base.link:
        return None
    # Whoever changed the right to execute it wins; both can only have changed it to the same.
    executable = after.executable if here.executable == base.executable else here.executable
    mode = 0o755 if executable else 0o644
    if here.data == base.data:
        return File(after.data, mode=mode)
    with tempfile.TemporaryDirectory(prefix="cloudagent-merge-") as name:
        folder = Path(name)
        for part, file in (("here", here), ("base", base), ("result", after)):
            (folder / part).write_bytes(file.data)
        # Its exit code counts the conflicts; 255 is for files that are no text.
        done = git.run("merge-file", "-p", "-q", "here", "base", "result", folder=folder, ok=range(256))
    return File(done.out, mode=mode) if done.exit_code == 0 else None


def _check_surroundings(tree: Tree, steps: Sequence[Step], deleted: set[str]) -> None:
    """What only this working tree can tell: repositories in it, names here that differ in case alone, symlinks here on
    a symlink's way."""
    names_in = functools.cache(tree.names)
    for step in steps:
        parts = step.path.split("/")
        if any(".git" in names_in("/".join(parts[:count])) for count in range(1, len(parts))):
            raise unsafe(step.path, "lies in another repository inside of this one")
        if step.before is None:
            for folder, part in (("/".join(parts[:count]), part) for count, part in enumerate(parts)):
                for name in names_in(folder):
                    path = f"{folder}/{name}" if folder else name
                    if name == part or folded(name) != folded(part):
                        continue
                    if path not in deleted and not _is_emptied(tree, path, deleted):
                        raise unsafe(step.path, "differs from another name here only in case or invisibly")
        if step.after is not None and step.after.link:
            goal = (link_goal(step.path, os.fsdecode(step.after.data)) or "").split("/")
            if any(_is_link(tree, "/".join(goal[: count + 1]), deleted) for count in range(len(goal))):
                raise unsafe(step.path, "is a symlink that leads through another one")


def _is_emptied(tree: Tree, folder: str, deleted: set[str]) -> bool:
    """Is this a folder that goes with the last of these files? An empty one is the user's, and stays."""
    inner = [f"{folder}/{name}" for name in tree.names(folder)]
    return bool(inner) and all(path in deleted or _is_emptied(tree, path, deleted) for path in inner)


def _is_link(tree: Tree, path: str, deleted: set[str]) -> bool:
    if not path or path in deleted:
        return False
    try:
        file = tree.read(path)
    except InTheWay:
        return False
    return file is not None and file.link
