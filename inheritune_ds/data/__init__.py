"""Documents, their tokens, and the order in which training reads them.

Tensor names end in their shape: B windows of a batch, T tokens of a window.
"""
