"""Engine, loop, loss, kernels, schedule, validation."""
