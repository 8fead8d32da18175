"""Thin commands: they read arguments, call the package, and print; nothing heavy is imported before it is needed."""
