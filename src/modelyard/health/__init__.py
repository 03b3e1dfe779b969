"""How the server is: alive, ready and why not, and its figures together with its engines'."""
