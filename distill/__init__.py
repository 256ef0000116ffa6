"""Training few-step flow models: the loop, its checkpoints, and the teacher it all starts from."""
