"""Mutants of the hand-off: what a result from a sandbox may do to its user's machine."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

APPLY = "cloudagent_mcp/apply"
HOSTILE = "tests/integration/test_apply_hostile.py::test_of_a_hostile_result"
RACES = "tests/integration/test_apply_races.py"
CRASH = "tests/integration/test_apply_crash.py"

MUTANTS = (
    Mutant(
        "a_symlink_goes_up_behind_another_one",
        f"{APPLY}/policy.py",
        "if not parts or descended:",
        "if not parts:",
        (
            f"{HOSTILE}[a symlink whose way up begins behind another one, higher than it looks, is refused]",
            f"{HOSTILE}[a symlink down and up again, which leads elsewhere once a folder on its way is a symlink "
            "is refused]",
        ),
    ),
    Mutant(
        "a_file_that_has_just_appeared_is_written_over",
        f"{APPLY}/tree.py",
        "        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)\n",
        "        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)\n        return\n",
        (f"{RACES}::test_a_file_that_appears_in_the_last_moment_is_not_written_over",),
    ),
    Mutant(
        "an_undo_that_died_counts_as_an_apply",
        f"{APPLY}/journal.py",
        '        self._entry["done"] = False\n        self._save()\n',
        "",
        (f"{CRASH}::test_at_whatever_write_it_dies_the_next_start_finds_the_tree_as_before_or_as_wanted",),
        fast=False,
    ),
)
