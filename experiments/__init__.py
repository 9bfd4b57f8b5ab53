"""What people run: training, sweeps, experiments."""
