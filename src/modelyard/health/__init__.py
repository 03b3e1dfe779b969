"""The server's health: alive, ready and why not, and its figures together with its engines'."""
