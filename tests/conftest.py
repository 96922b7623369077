"""What holds for the whole suite."""

import signal

# A shell that starts the suite in the background makes it ignore Ctrl-C, and every process that a test interrupts would
# inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
