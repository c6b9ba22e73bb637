"""The messages that cross a process: tasks, events, workers, pools, errors. No program lives here.

Import the module you need (`llorch_wire.events`, `llorch_wire.tasks`, ...): this file imports nothing, so that a
program which only needs one of them starts quickly.
"""

PROTOCOL_VERSION = 1
"""Raised when a message changes in a way that an older peer can't read."""
