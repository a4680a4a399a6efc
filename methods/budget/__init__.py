"""The budget axis: how many past rows each layer may keep."""
