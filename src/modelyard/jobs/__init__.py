"""Jobs: pieces of work with a status, an event list and a log.

A request writes a row and the wish to interrupt it; the one `JobRunner` starts what is due, and writes every status.
What a kind of job does is not known here: the application hands the runner a table from kind to function.
A restart of the server calls the function of each running job again, with the same spec and folder; it adopts
what is alive and resumes from what is on disk; `survival` keeps a job from ending the server again and again. `feeds`
sends the events to followers.
"""
