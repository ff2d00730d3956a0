"""What a task is and how it is kept. Knows nothing of queues, sandboxes or protocols."""
