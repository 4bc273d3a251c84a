"""This process and those it starts: signals, memory, the time a native call may take, what it is at work on."""
