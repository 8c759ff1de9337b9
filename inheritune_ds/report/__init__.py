"""Tables and figures of finished runs and studies."""
