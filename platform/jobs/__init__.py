"""The kinds of job. Each is a folder: settings.py says what a user writes, run.py does it."""
