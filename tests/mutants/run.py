"""Break the product on purpose, one promise at a time, and demand that a test sees it.

    uv run python tests/mutants/run.py [--fast] [--only NAME]... [--against NODE_ID]... [--list]

The tree is copied, each mutation is made in the copy, and the tests of the mutant run there. A mutant is caught when a
test *fails* of it: a test that cannot be collected, or a text that the mutation does not find, is an error here.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.mutant import Mutant
from tests.mutants.table import MUTANTS

ROOT = Path(__file__).parents[2]
PACKAGES = {"cloudagent_mcp": ".", "cloudagent_queue": "queue", "cloudagent_storage": "storage"}
TEST_S = 100
"""The longest that one test may hang before it counts as failed."""
RUN_S = 900


class CannotTell(Exception):
    """Nothing was learned of a mutant: the table, or the machinery here, is at fault."""


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    caught: bool
    seconds: float
    said: str
    """The first failure's line in pytest's summary."""


class Copy:
    """The tree in a folder of its own, with an environment in which its packages are the only ones of their name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = folder / "tree"
        self.python = folder / "venv" / "bin" / "python"
        self._moment = int(time.time())
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "HOME": str(folder)},
            capture_output=True,
            check=True,
        )
        for name in listed.stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                (self.tree / name).write_bytes((ROOT / name).read_bytes())
        # An environment rather than PYTHONPATH: tests start processes whose variables they choose themselves, and those
        # must run the mutant too. The editable install is not in it, as only `site` reads the .pth files of a folder.
        base = Path(os.path.realpath(sys.executable))
        self.python.parent.mkdir(parents=True)
        self.python.symlink_to(base)
        (folder / "venv" / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")
        site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
        site.mkdir(parents=True)
        paths = [*(str(self.tree / place) for place in PACKAGES.values()), sysconfig.get_path("purelib")]
        (site / "mutant.pth").write_text("\n".join(paths) + "\n")

    def run(self, *arguments: str, seconds: float = RUN_S) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python in the tree."""
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "LANG": "C.UTF-8", "COLUMNS": "250"}
        try:
            return subprocess.run(
                [str(self.python), *arguments],
                cwd=self.tree,
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            raise CannotTell(f"not over in {seconds:g} s: {' '.join(arguments)}") from None

    def test(self, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run some tests, until the first that fails."""
        # Without the plugins that cost half a second each; the options are those that pyproject.toml adds, but for -n.
        quick = ["-o", "addopts=--import-mode=importlib", "-p", "no:xdist", "-p", "no:cacheprovider"]
        quick += ["-p", "no:hypothesispytest", f"--basetemp={self.folder / 'tmp'}"]
        return self.run(
            "-m", "pytest", *quick, "--full", "-x", "-q", "-rfE", "--tb=line", f"--timeout={TEST_S}", *tests
        )

    @contextmanager
    def mutated(self, mutant: Mutant) -> Generator[None]:
        path = self.tree / mutant.file
        text = path.read_text()
        if (count := text.count(mutant.old)) != 1:
            raise CannotTell(f"{mutant.name}: the old text stands in {mutant.file} {count} times, not once")
        try:
            self._write(path, text.replace(mutant.old, mutant.new))
            compile(path.read_text(), path, "exec")
            yield
        except SyntaxError as error:
            raise CannotTell(f"{mutant.name}: the new text is no Python: {error}") from None
        finally:
            self._write(path, text)

    def check_isolation(self) -> None:
        """A canary: what is broken in the copy must break whoever imports it, and the copy alone must be imported."""
        imports = "import " + ", ".join(PACKAGES)
        show = f"{imports}; print({', '.join(f'{name}.__file__' for name in PACKAGES)}, sep=chr(10))"
        found = self.run("-c", show).stdout.split()
        if len(found) != len(PACKAGES) or not all(Path(file).is_relative_to(self.tree) for file in found):
            raise CannotTell(f"the copy's packages are not the ones that are imported: {found}")
        for name, place in PACKAGES.items():
            path = self.tree / place / name / "__init__.py"
            text = path.read_text()
            self._write(path, f'{text}\nraise RuntimeError("canary")\n')
            sings = "RuntimeError: canary" in self.run("-c", f"import {name}").stderr
            self._write(path, text)
            if not sings:
                raise CannotTell(f"a mutation of {name} was not noticed")

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        # Compiled code is taken for up to date by size and second: each writing has a second of its own.
        self._moment += 2
        os.utime(path, (self._moment, self._moment))


def try_all(mutants: Sequence[Mutant], *, against: Sequence[str] = ()) -> list[Outcome]:
    """Try mutants in their order, on their own tests or on those of `against`. Raises `CannotTell`."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(Path(folder))
        copy.check_isolation()
        tests = list(dict.fromkeys(test for mutant in mutants for test in (against or mutant.tests)))
        whole = copy.test(tests)
        if whole.returncode != 0:
            raise CannotTell(
                f"without any mutation the tests do not pass:\n{whole.stdout[-4000:]}{whole.stderr[-2000:]}"
            )
        outcomes: list[Outcome] = []
        for mutant in mutants:
            with copy.mutated(mutant):
                outcomes.append(_try(copy, mutant, against or mutant.tests))
            print(_row(outcomes[-1]), flush=True)
        return outcomes


def _try(copy: Copy, mutant: Mutant, tests: Sequence[str]) -> Outcome:
    started = time.monotonic()
    done = copy.test(tests)
    seconds = time.monotonic() - started
    if done.returncode == 0:
        return Outcome(mutant, False, seconds, "")
    failed = re.search(r"^FAILED \S+?::(.*)$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or failed is None:
        raise CannotTell(f"{mutant.name}: no test failed, and yet:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return Outcome(mutant, True, seconds, failed[1])


def _row(outcome: Outcome) -> str:
    verdict = "caught  " if outcome.caught else "SURVIVED"
    return f"{verdict} {outcome.seconds:5.1f} s  {outcome.mutant.name:42} {outcome.said[:200]}"


def main() -> int:
    """0 when every mutant was caught, 1 when one survived, 2 when nothing can be told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="this mutant; may be given again")
    parser.add_argument("--fast", action="store_true", help="those that are tried with every commit")
    parser.add_argument(
        "--against", action="append", default=[], metavar="NODE_ID", help="these tests, not the table's"
    )
    parser.add_argument("--list", action="store_true", help="name the mutants and their tests, and try none")
    given = parser.parse_args()
    unknown = set(given.only or ()) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"there is no mutant {', '.join(sorted(unknown))}")
    mutants = [
        mutant
        for mutant in MUTANTS
        if (given.only is None or mutant.name in given.only) and (mutant.fast or not given.fast)
    ]
    if given.list:
        for mutant in mutants:
            print(f"{mutant.name}\n    {mutant.file}", *mutant.tests, sep="\n    ")
        return 0
    try:
        outcomes = try_all(mutants, against=given.against)
    except CannotTell as error:
        print(error, file=sys.stderr)
        return 2
    survived = [outcome.mutant.name for outcome in outcomes if not outcome.caught]
    print(f"{len(outcomes) - len(survived)} of {len(outcomes)} mutants caught", *survived, sep="\n  survived: ")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
