"""Methods by name: how each is made, and what a step of it costs."""
