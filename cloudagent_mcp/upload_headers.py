"""What goes along with an upload, in headers: addresses end up in logs."""

BASE_HEADER = "cloudagent-base"
"""The commit that is sent."""
NOTES_HEADER = "cloudagent-notes"
"""Sentences for the log of tasks that start from it: a list in JSON, percent-encoded."""
NOTES_MAX = 20
NOTE_LENGTH = 200
"""Characters. With these limits the header mostly stays below the 8 KB that proxies take."""
