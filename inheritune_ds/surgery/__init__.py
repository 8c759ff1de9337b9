"""Surgery: load a reference, find its blocks, select some, build the target and its report."""
