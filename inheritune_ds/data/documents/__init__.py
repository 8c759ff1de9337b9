"""Documents of every kind of source."""
