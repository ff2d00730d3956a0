from datetime import UTC, datetime

import pytest

from cloudagent_mcp.operations.diffs import parse_diff
from cloudagent_storage.errors import NotFound
from cloudagent_storage.records import Task, TaskStatus

TASK = Task(
    task_id="task_x", status=TaskStatus.COMPLETED, title="t", prompt="p", repository="none", branch="task/x",
    agent="claude", created_at=datetime.now(UTC),
)  # fmt: skip

DIFF = """\
diff --git a/src/app.py b/src/app.py
index 1..2 100644
--- a/src/app.py
+++ b/src/app.py
@@ -1,2 +1,3 @@
 keep
-old
+new
++diff --git a/fake b/fake
diff --git a/gone.txt b/gone.txt
deleted file mode 100644
--- a/gone.txt
+++ /dev/null
@@ -1 +0,0 @@
-bye
diff --git a/old name b/new name
similarity index 100%
rename from old name
rename to new name
diff --git a/logo.png b/logo.png
new file mode 100644
index 0..1
GIT binary patch
literal 3
+++ is no name here
diff --git a/run.sh b/run.sh
old mode 100644
new mode 100755
"""


def test_every_file_of_a_diff_is_listed_with_its_kind_of_change_and_its_lines() -> None:
    diff = parse_diff(TASK, DIFF, path=None, stat_only=False)
    assert [(f.path, f.change, f.insertions, f.deletions, f.binary) for f in diff.files] == [
        ("src/app.py", "modified", 2, 1, False),
        ("gone.txt", "deleted", 0, 1, False),
        ("new name", "renamed", 0, 0, False),
        ("logo.png", "added", 0, 0, True),
        ("run.sh", "modified", 0, 0, False),
    ]
    assert diff.diff == DIFF


def test_a_folder_selects_the_files_under_it() -> None:
    diff = parse_diff(TASK, DIFF, path="src/", stat_only=False)
    assert [file.path for file in diff.files] == ["src/app.py"]
    assert diff.diff.startswith("diff --git a/src/app.py") and "gone.txt" not in diff.diff


def test_stat_only_leaves_the_text_out() -> None:
    assert parse_diff(TASK, DIFF, path=None, stat_only=True).diff == ""


def test_a_file_that_was_not_changed_is_refused() -> None:
    with pytest.raises(NotFound):
        parse_diff(TASK, DIFF, path="sr", stat_only=False)
