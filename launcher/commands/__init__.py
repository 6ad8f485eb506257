"""The CLI's commands, one module each: `run(namespace) -> exit status`; what they take is in `arguments`."""
