"""Documents, token files, and the order in which they are read.

Tensor names end in their shape: B windows of a batch, T tokens of a window.
"""
