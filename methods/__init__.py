"""What is being compared. Importing this package does not import torch."""
