"""Routers in a model's own operators: what their values mean, that they are ``route``, their rewrite. docs/routers.md."""
