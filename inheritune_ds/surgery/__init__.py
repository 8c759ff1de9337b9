"""From the reference to the target: select, copy, verify."""
