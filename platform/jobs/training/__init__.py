"""What train and uptrain share: one loop, one objective, gangs, exact checkpoints."""
