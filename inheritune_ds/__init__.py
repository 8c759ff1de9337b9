"""inheritune_ds: turn a large pretrained causal language model into a smaller one (Inheritune).

Importing the package imports neither torch nor any other heavy library.
"""

__version__ = "0.1.0"
