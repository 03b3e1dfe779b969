"""Small programs that tests run as real children: slow, deaf, talkative, with a family that will not leave.

Each prints one line when it has come to the state that its name promises, so that a test need not guess.
"""
