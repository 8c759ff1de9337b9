"""From token files to batches: windows, their order, their mixture."""
