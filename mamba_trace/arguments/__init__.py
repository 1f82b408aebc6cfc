"""What a user gives, checked before anything runs: prompts, positions, channels, layers and sites."""
