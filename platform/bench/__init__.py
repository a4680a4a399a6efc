"""`make bench`: kvlab beside what people use instead, measured in one run on one machine."""
