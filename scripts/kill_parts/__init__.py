"""The parts of kill_check: the run that is killed, and the moments at which it is."""
