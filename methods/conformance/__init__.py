"""What every run-time method must do, checked: for kvlab's own methods and for those of others."""
