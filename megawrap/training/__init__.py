"""The training loop and what it is handed: optimizer, schedule, FLOP counts, metrics and plots."""
