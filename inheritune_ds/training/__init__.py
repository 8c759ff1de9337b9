"""Training: world, DeepSpeed config, optimizer groups, schedule, engine, checkpoints, loop."""
