"""The bundle: everything that a device needs to run the compiled graphs, and what it must answer."""
