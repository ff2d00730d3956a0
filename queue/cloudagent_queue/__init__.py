"""How a task is run: claimed, given a sandbox, followed, saved, verified."""
