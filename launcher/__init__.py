"""From a command line to a finished run: configuration, rendering, submission, and the controller inside the job."""
