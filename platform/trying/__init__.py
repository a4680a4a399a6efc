"""`kvlab try`: run-time methods on a checkpoint that is there, through the platform's own jobs."""
