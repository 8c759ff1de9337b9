"""Analysis: what the finished runs say, as tables and figures."""
