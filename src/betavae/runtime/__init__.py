"""From a command line to a finished run folder. Research needs nothing of this."""
