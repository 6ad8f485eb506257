"""The CLI's commands, one module each: `add_arguments(parser)` and `run(namespace) -> exit status`."""
